"""OpenAI's routes: files, batches, chat completions, responses, embeddings, models."""

from __future__ import annotations

import time
from typing import Any

from .batches import Batch, Plan
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
from .openai_batch import OpenAIDialect, token_limit_error
from .openai_input import ENDPOINTS, read_openai
from .openai_output import new_id, openai_body
from .uploads import DAY, StoredFile, receive_form, stored
from .wire import Response

_MOST_PAIRS, _LONGEST_KEY, _LONGEST_VALUE = 16, 64, 512
_MOST_FILE_BYTES = 512_000_000
_PURPOSES = {"batch", "assistants", "fine-tune", "vision", "user_data", "evals"}
_DIALECT = OpenAIDialect()
_SHOWN_MODELS = ["gpt-6-luna", "gpt-6.1-sol", "text-embedding-3-small"]


# ---- files


def _create_file(x: Exchange) -> Response:
    limit = x.world.settings.limit("openai_bytes")
    fields, file = receive_form(x.request, x.world.files.new_path())
    purpose = fields.get("purpose")
    if purpose not in _PURPOSES:
        raise refuse(f"'{purpose}' is not one of {sorted(_PURPOSES)} - 'purpose'", param="purpose")
    if file is None:
        raise refuse("'file' is a required property", param="file")
    filename, piece = file
    if piece.size > (limit if purpose == "batch" else _MOST_FILE_BYTES):
        piece.path.unlink()
        message = f"The file has {piece.size} bytes, more than the limit of {limit}."
        raise refuse(message, status=413 if piece.size > _MOST_FILE_BYTES else 400, param="file")
    lives = _lifetime(
        fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]"), "expires_after"
    )
    lives = lives or (30 * DAY if purpose == "batch" else None)
    file_id = new_id("file-")
    known = stored(file_id, purpose, piece, x.owner, filename=filename, lives=lives)
    x.world.files.add(known)
    x.world.account.note(files=1)
    return reply(known.shown())


def _lifetime(anchor: Any, seconds: Any, param: str) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at" or not str(seconds).isdigit():
        raise refuse(f"Invalid '{param}'.", param=param)
    if not 3_600 <= int(seconds) <= 30 * DAY:
        message = f"Invalid '{param}.seconds': {seconds}. Expected 3600 to {30 * DAY}."
        raise refuse(message, param=f"{param}.seconds")
    return int(seconds)


def _file(x: Exchange) -> StoredFile:
    file = x.world.files.get(x.params["id"], x.scope)
    if file is None:
        raise refuse(f"No such File object: {x.params['id']}", status=404, param="id")
    return file


def _retrieve_file(x: Exchange) -> Response:
    return reply(_file(x).shown())


def _file_content(x: Exchange) -> Response:
    return Response(200, _file(x).piece, {"content-type": "application/octet-stream"})


def _delete_file(x: Exchange) -> Response:
    file = _file(x)
    # A batch that isn't done yet goes on reading its input.
    used = {b.source.path for b in x.world.batches.listing() if not b.ended}
    x.world.files.remove(file.id, keep_bytes=file.piece.path in used)
    return reply({"id": file.id, "object": "file", "deleted": True})


def _list_files(x: Exchange) -> Response:
    query = x.request.query
    files = [f for f in x.world.files.listing() if x.scope in (None, f.owner)]
    files = [f for f in files if query.get("purpose") in (None, f.purpose)]
    if query.get("order", "desc") == "desc":
        files.reverse()
    return _page(x, [f.shown() for f in files], default=10_000, most=10_000)


def _page(x: Exchange, items: list[dict[str, Any]], *, default: int, most: int) -> Response:
    limit, after = limit_of(x, default=default, most=most), x.request.query.get("after")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise refuse(f"No object with id '{after}' to list after.", status=404, param="after")
        items = items[ids.index(after) + 1 :]
    page = items[:limit]
    return reply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(items) > limit,
        }
    )


# ---- batches


def _create_batch(x: Exchange) -> Response:
    body = x.json()
    endpoint = body.get("endpoint")
    if endpoint not in ENDPOINTS:
        message = f"Invalid value: '{endpoint}'. Supported values are: {', '.join(ENDPOINTS)}."
        raise refuse(message, param="endpoint", code="invalid_value")
    if body.get("completion_window") != "24h":
        message = "Invalid value for 'completion_window'. Supported values are: '24h'."
        raise refuse(message, param="completion_window", code="invalid_value")
    _check_metadata(body.get("metadata"))
    _check_hourly(x)
    file = x.world.files.get(str(body.get("input_file_id")), x.scope)
    if file is None:
        message = f"No such File object: {body.get('input_file_id')}"
        raise refuse(message, status=404, param="input_file_id")
    if file.purpose != "batch":
        raise refuse("The input file must have purpose 'batch'.", param="input_file_id")
    batch = Batch(new_id("batch_"), "openai", _DIALECT, file.piece)
    batch.endpoint, batch.input_file_id, batch.metadata = endpoint, file.id, body.get("metadata")
    lives = body.get("output_expires_after") or {}
    batch.output_lives = (
        _lifetime(lives.get("anchor"), lives.get("seconds"), "output_expires_after") or 30 * DAY
    )
    create(x, batch)
    if x.struck("token-limit"):
        error = token_limit_error("the model", 2_000_000)
        batch.plan = Plan("failed", 0.0, error["code"], error["message"])
    return reply(shown(batch))


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > _MOST_PAIRS:
        message = f"Invalid 'metadata': expected an object with at most {_MOST_PAIRS} properties."
        raise refuse(message, param="metadata", code="object_above_max_properties")
    for key, value in metadata.items():
        if not isinstance(value, str) or len(value) > _LONGEST_VALUE or len(key) > _LONGEST_KEY:
            message = (
                f"Invalid 'metadata.{key[:80]}': keys have at most {_LONGEST_KEY} characters, "
                f"values are strings of at most {_LONGEST_VALUE}."
            )
            raise refuse(message, param="metadata", code="string_above_max_length")


def _check_hourly(x: Exchange) -> None:
    since, most = time.time() - 3_600, x.world.settings.limit("openai_batches_per_hour")
    batches = x.world.batches.listing()
    if sum(b.protocol == "openai" and b.created > since for b in batches) >= most:
        message = f"Rate limit reached: at most {most} batches can be created per hour."
        failure = refuse(message, status=429).failure
        raise Refused(failure, {"retry-after": "60"})


def shown(batch: Batch) -> dict[str, Any]:
    """The batch as its creator sees it."""
    known = batch.stage not in ("validating", "failed")
    failed = batch.counts["errored"] + batch.counts["expired"] + batch.counts["cancelled"]
    errors = {"object": "list", "data": batch.errors} if batch.errors else None
    stamps = {
        f"{stage}_at": _seconds(batch.stamps.get(stage))
        for stage in (
            "in_progress",
            "finalizing",
            "completed",
            "failed",
            "expired",
            "cancelling",
            "cancelled",
        )
    }
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.stage,
        "output_file_id": batch.output_file_id if batch.ended else None,
        "error_file_id": batch.error_file_id if batch.ended else None,
        "created_at": int(batch.created),
        "expires_at": int(batch.created) + DAY,
        **stamps,
        "request_counts": {
            "total": batch.total if known else 0,
            "completed": batch.done_so_far(),
            "failed": failed if batch.ended else 0,
        },
        "usage": _usage(batch) if batch.ended and known else None,
        "metadata": batch.metadata,
    }


def _seconds(stamp: float | None) -> int | None:
    return None if stamp is None else int(stamp)


def _usage(batch: Batch) -> dict[str, Any]:
    usage = batch.usage
    return {
        "input_tokens": usage["input"],
        "input_tokens_details": {"cached_tokens": usage["cached"]},
        "output_tokens": usage["output"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["input"] + usage["output"],
    }


def _batch(x: Exchange) -> Batch:
    batch = x.world.batches.get(x.params["id"], "openai", x.scope)
    if batch is None:
        raise refuse(f"No batch found with id '{x.params['id']}'.", status=404)
    return batch


def _retrieve_batch(x: Exchange) -> Response:
    batch = _batch(x)
    look(x, batch)
    body = shown(batch)
    if x.struck("sparse"):
        missing = ("request_counts", "usage", "metadata", "expires_at", "endpoint")
        body = {key: value for key, value in body.items() if key not in missing}
    if odd := x.struck("odd-status"):
        body["status"] = odd.options["status"]
    return reply(body)


def _list_batches(x: Exchange) -> Response:
    x.world.batches.settle(x.world)
    batches = x.world.batches.visible("openai", x.scope)
    return _page(x, [shown(b) for b in batches], default=20, most=100)


def _cancel_batch(x: Exchange) -> Response:
    batch = _batch(x)
    cancel(x, batch)
    return reply(shown(batch))


# ---- realtime


def _answer(x: Exchange) -> Response:
    request = read_openai(x.request.path.rstrip("/"), x.json())
    answer, headers = ask_realtime(x, request)
    return reply(openai_body(request, answer.reply, answer.usage), headers=headers)


def _count_input(x: Exchange) -> Response:
    request = read_openai("/v1/responses", x.json())
    return reply({"object": "response.input_tokens", "input_tokens": request.input_tokens})


def list_models(x: Exchange) -> Response:
    names = x.world.settings.models or _SHOWN_MODELS
    models = [
        {"id": name, "object": "model", "created": int(x.world.started), "owned_by": "emulated"}
        for name in names
    ]
    return reply({"object": "list", "data": models})


ROUTES = [
    Route("files.create", "POST", "/v1/files", _create_file),
    Route("files.list", "GET", "/v1/files", _list_files),
    Route("files.retrieve", "GET", "/v1/files/{id}", _retrieve_file),
    Route("files.content", "GET", "/v1/files/{id}/content", _file_content),
    Route("files.delete", "DELETE", "/v1/files/{id}", _delete_file),
    Route("batches.create", "POST", "/v1/batches", _create_batch),
    Route("batches.list", "GET", "/v1/batches", _list_batches),
    Route("batches.retrieve", "GET", "/v1/batches/{id}", _retrieve_batch),
    Route("batches.cancel", "POST", "/v1/batches/{id}/cancel", _cancel_batch),
    Route("chat.completions.create", "POST", "/v1/chat/completions", _answer),
    Route("responses.create", "POST", "/v1/responses", _answer),
    Route("responses.input_tokens", "POST", "/v1/responses/input_tokens", _count_input),
    Route("embeddings.create", "POST", "/v1/embeddings", _answer),
    Route("models.list", "GET", "/v1/models", list_models),
]
