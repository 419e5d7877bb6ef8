"""Anthropic's routes: messages, token counts, message batches, models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from .anthropic_batch import AnthropicDialect, receive_requests
from .anthropic_input import VERSIONS, read_anthropic
from .anthropic_output import anthropic_body, prefix_digest
from .batches import Batch
from .dialogue import Refused, refuse
from .exchange import (
    Exchange,
    Route,
    ask_realtime,
    cancel,
    create,
    limit_of,
    look,
    reply,
)
from .openai_output import new_id
from .uploads import DAY
from .wire import Response

_DIALECT = AnthropicDialect()
_SHOWN_MODELS = ["claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"]
_EXTENDED = "output-300k-2026-03-24"


def check_version(x: Exchange) -> None:
    version = x.request.headers.get("anthropic-version")
    if version is None:
        raise refuse("anthropic-version: header is required")
    if version not in VERSIONS:
        message = f"anthropic-version: '{version}' is not a valid version"
        raise refuse(message)


def _version(x: Exchange) -> str:
    return x.request.headers["anthropic-version"]


def _extended(x: Exchange) -> bool:
    return _EXTENDED in x.request.headers.get("anthropic-beta", "")


# ---- realtime


def _create_message(x: Exchange) -> Response:
    request = read_anthropic(x.json(), version=_version(x))
    answer, headers = ask_realtime(x, request)
    digest = prefix_digest(request)
    known = bool(digest) and x.world.remembers(digest)
    body = anthropic_body(request, answer.reply, answer.usage, prefix_known=known)
    return reply(body, headers=headers)


def _count_tokens(x: Exchange) -> Response:
    request = read_anthropic(x.json(), version=_version(x), counting=True)
    return reply({"input_tokens": request.input_tokens})


# ---- message batches


def _create_batch(x: Exchange) -> Response:
    settings = x.world.settings
    most_bytes = settings.limit("anthropic_bytes")
    if x.request.stream.length > most_bytes:
        x.request.drain()
        raise refuse("Request exceeds the maximum size", status=413)
    body = x.read()
    if len(body) > most_bytes:
        raise refuse("Request exceeds the maximum size", status=413)
    most = settings.limit("anthropic_requests")
    custom_ids, source = receive_requests(body, x.world.files.new_path(), most=most)
    _check_queue(x, len(custom_ids))
    batch = Batch(new_id("msgbatch_"), "anthropic", _DIALECT, source)
    batch.endpoint, batch.version, batch.extended = "/v1/messages", _version(x), _extended(x)
    batch.custom_ids = custom_ids
    create(x, batch)
    return reply(shown(x, batch))


def _check_queue(x: Exchange, size: int) -> None:
    x.world.batches.settle(x.world)
    waiting = (b for b in x.world.batches.listing() if b.protocol == "anthropic" and not b.ended)
    full = sum(batch.total for batch in waiting) + size > x.world.settings.limit("anthropic_queue")
    if full or x.struck("token-limit"):
        message = "Your organization has too many requests in the batch processing queue."
        raise Refused(refuse(message, status=429).failure, {"retry-after": "60"})


def shown(x: Exchange, batch: Batch) -> dict[str, Any]:
    """The batch as its creator sees it: while it runs, nothing of what was done is told."""
    ended, cancelled = batch.ended, batch.stamps.get("cancelling")
    status = "ended" if ended else "canceling" if cancelled else "in_progress"
    counts = batch.counts if ended else dict.fromkeys(batch.counts, 0)
    end = max(batch.stamps.values()) if ended else None
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {
            "processing": 0 if ended else batch.total,
            "succeeded": counts["succeeded"],
            "errored": counts["errored"],
            "canceled": counts["cancelled"],
            "expired": counts["expired"],
        },
        "ended_at": _stamp(end),
        "created_at": _stamp(batch.created),
        "expires_at": _stamp(batch.created + DAY),
        "archived_at": None,
        "cancel_initiated_at": _stamp(cancelled),
        "results_url": _results_url(x, batch) if ended else None,
    }


def _stamp(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _results_url(x: Exchange, batch: Batch) -> str:
    path = f"/v1/messages/batches/{batch.id}/results"
    return path if x.struck("relative-url") else f"http://{x.request.headers['host']}{path}"


def _batch(x: Exchange) -> Batch:
    batch = x.world.batches.get(x.params["id"], "anthropic", x.scope)
    if batch is None:
        raise refuse(f"Message batch {x.params['id']} not found", status=404)
    return batch


def _retrieve_batch(x: Exchange) -> Response:
    batch = _batch(x)
    look(x, batch)
    body = shown(x, batch)
    if x.struck("sparse"):
        body.pop("request_counts")
        body.pop("expires_at")
    if odd := x.struck("odd-status"):
        body["processing_status"] = odd.options["status"]
    return reply(body)


def _list_batches(x: Exchange) -> Response:
    x.world.batches.settle(x.world)
    limit, query = limit_of(x, default=20, most=1_000), x.request.query
    batches = x.world.batches.visible("anthropic", x.scope)
    ids = [batch.id for batch in batches]
    if after := query.get("after_id"):
        batches = batches[_place(ids, after) + 1 :]
        page, more = batches[:limit], len(batches) > limit
    elif before := query.get("before_id"):
        batches = batches[: _place(ids, before)]
        page, more = batches[-limit:], len(batches) > limit
    else:
        page, more = batches[:limit], len(batches) > limit
    data = [shown(x, batch) for batch in page]
    return reply(
        {
            "data": data,
            "has_more": more,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )


def _place(ids: list[str], wanted: str) -> int:
    if wanted not in ids:
        raise refuse(f"Message batch {wanted} not found", status=404)
    return ids.index(wanted)


def _cancel_batch(x: Exchange) -> Response:
    batch = _batch(x)
    cancel(x, batch)
    return reply(shown(x, batch))


def _delete_batch(x: Exchange) -> Response:
    batch = _batch(x)
    if not batch.ended:
        raise refuse(f"Message batch {batch.id} has not ended: cancel it first", status=400)
    x.world.batches.remove(batch.id)
    return reply({"id": batch.id, "type": "message_batch_deleted"})


def _results(x: Exchange) -> Response:
    batch = _batch(x)
    if not batch.ended:
        raise refuse(f"Message batch {batch.id} has no results yet", status=404)
    body = batch.output if batch.output is not None else b""
    return Response(200, body, {"content-type": "application/x-jsonl"})


def _list_models(x: Exchange) -> Response:
    names = x.world.settings.models or _SHOWN_MODELS
    created = _stamp(x.world.started)
    data = [{"id": name, "type": "model", "display_name": name, "created_at": created} for name in names]
    first, last = (names[0], names[-1]) if names else (None, None)
    return reply({"data": data, "has_more": False, "first_id": first, "last_id": last})


MODELS = Route("models.list", "GET", "/v1/models", _list_models)

_BATCHES = "/v1/messages/batches"
ROUTES = [
    Route("messages.create", "POST", "/v1/messages", _create_message),
    Route("messages.count_tokens", "POST", "/v1/messages/count_tokens", _count_tokens),
    Route("messages.batches.create", "POST", _BATCHES, _create_batch),
    Route("messages.batches.list", "GET", _BATCHES, _list_batches),
    Route("messages.batches.retrieve", "GET", _BATCHES + "/{id}", _retrieve_batch),
    Route("messages.batches.cancel", "POST", _BATCHES + "/{id}/cancel", _cancel_batch),
    Route("messages.batches.delete", "DELETE", _BATCHES + "/{id}", _delete_batch),
    Route("messages.batches.results", "GET", _BATCHES + "/{id}/results", _results),
]
