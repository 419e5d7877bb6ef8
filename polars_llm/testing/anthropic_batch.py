"""Anthropic's message batches: how a create body is read, and how its requests are answered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from .anthropic_input import read_anthropic
from .anthropic_output import anthropic_body, anthropic_error, prefix_digest
from .batches import Batch, Outcome, Row
from .dialogue import Failure, Refused, refuse
from .openai_output import new_id
from .wire import Slice

if TYPE_CHECKING:
    from .dialogue import ModelRequest
    from .world import World

_CUSTOM_ID = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class _Request(msgspec.Struct):
    custom_id: str
    params: msgspec.Raw


class _Create(msgspec.Struct):
    requests: list[_Request]


class _Line(msgspec.Struct):
    custom_id: str
    params: dict[str, Any]


_create = msgspec.json.Decoder(_Create)
_line = msgspec.json.Decoder(_Line)
_encode = msgspec.json.Encoder().encode


def receive_requests(body: bytes, path: Path, *, most: int) -> tuple[list[str], Slice]:
    """Check a create body and write its requests to `path`, one a line: ids and bytes."""
    try:
        requests = _create.decode(body).requests
    except msgspec.ValidationError as problem:
        raise refuse(f"requests: {problem}") from None
    except msgspec.DecodeError as problem:
        raise refuse(f"The request body is not valid JSON: {problem}") from None
    if not requests:
        raise refuse("requests: List should have at least 1 item after validation, not 0")
    if len(requests) > most:
        message = f"requests: List should have at most {most} items, not {len(requests)}"
        raise refuse(message, status=413)
    seen: set[str] = set()
    for place, request in enumerate(requests):
        _check(place, request, seen)
    with path.open("wb") as file:
        for request in requests:
            # A line feed in JSON can only stand between tokens: a space does as well.
            params = bytes(request.params).replace(b"\n", b" ")
            name = request.custom_id.encode()
            file.write(b'{"custom_id":"%s","params":%s}\n' % (name, params))
        size = file.tell()
    return [request.custom_id for request in requests], Slice(path, 0, size)


def _check(place: int, request: _Request, seen: set[str]) -> None:
    name = request.custom_id
    if not _CUSTOM_ID.fullmatch(name):
        message = "String should match pattern '^[a-zA-Z0-9_-]{1,64}$'"
        raise refuse(f"requests.{place}.custom_id: {message}")
    if name in seen:
        raise refuse(f"requests.{place}.custom_id: '{name}' is not unique in this batch")
    seen.add(name)
    if not bytes(request.params).startswith(b"{"):
        raise refuse(f"requests.{place}.params: Input should be a valid dictionary")


class AnthropicDialect:
    """Anthropic's side of a batch: see `batches.Dialect`. Bad requests fail one by one."""

    splits_errors = False

    def check(self, world: World, batch: Batch) -> list[dict[str, Any]]:
        return []

    def rows(self, lines: list[bytes]) -> list[Row]:
        read = (_line.decode(line) for line in lines)
        return [Row(line.custom_id, line.params) for line in read]

    def publish(self, world: World, batch: Batch) -> None:
        """Results are found by the batch's own id."""

    def answer(self, world: World, batch: Batch, rows: list[Row]) -> Iterator[Outcome]:
        asked: list[tuple[str, ModelRequest]] = []
        for row in rows:
            if row.unanswered:
                kind = "canceled" if row.unanswered == "cancelled" else "expired"
                line = _result(row.custom_id, {"type": kind})
                yield Outcome(row.custom_id, line, row.unanswered)
                continue
            try:
                request = _read(batch, row)
            except Refused as refused:
                yield _errored(row.custom_id, refused.failure)
                continue
            asked.append((row.custom_id, request))
        answers = world.ask([request for _, request in asked])
        for (custom_id, request), answer in zip(asked, answers, strict=True):
            if answer.reply.expired:
                line = _result(custom_id, {"type": "expired"})
                yield Outcome(custom_id, line, "expired")
            elif answer.reply.failure is not None:
                yield _errored(custom_id, answer.reply.failure)
            else:
                known = _knows_prefix(world, request)
                body = anthropic_body(request, answer.reply, answer.usage, prefix_known=known)
                line = _result(custom_id, {"type": "succeeded", "message": body})
                cached = body["usage"]["cache_read_input_tokens"]
                yield Outcome(custom_id, line, "succeeded", answer.charge(request), cached)


def _read(batch: Batch, row: Row) -> ModelRequest:
    if batch.plan.end == "failed":
        raise Refused(Failure(status=500, message=batch.plan.message))
    return read_anthropic(
        row.body,
        version=batch.version,
        mode="batch",
        custom_id=row.custom_id,
        extended=batch.extended,
    )


def _knows_prefix(world: World, request: ModelRequest) -> bool:
    digest = prefix_digest(request)
    return bool(digest) and world.remembers(digest)


def _result(custom_id: str, result: dict[str, Any]) -> bytes:
    return _encode({"custom_id": custom_id, "result": result})


def _errored(custom_id: str, failure: Failure) -> Outcome:
    error = anthropic_error(failure, new_id("req_"))
    line = _result(custom_id, {"type": "errored", "error": error})
    return Outcome(custom_id, line, "errored")
