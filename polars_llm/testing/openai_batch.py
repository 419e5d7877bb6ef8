"""OpenAI's batch files: how an input file is validated, and how its lines are answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from .batches import Batch, Outcome, Row
from .dialogue import Failure, Refused
from .openai_input import count_inputs, read_openai
from .openai_output import new_id, openai_body, openai_error
from .uploads import stored
from .wire import Slice

if TYPE_CHECKING:
    from .dialogue import ModelRequest
    from .world import World

_MOST_ERRORS = 50
_UNANSWERED = {
    "expired": (
        "batch_expired",
        "This request could not be executed before the completion window expired.",
    ),
    "cancelled": (
        "batch_cancelled",
        "This request was not executed because the batch was cancelled.",
    ),
}


class _Model(msgspec.Struct):
    model: str
    stream: bool | None = None


class _Peek(msgspec.Struct):
    """What validation reads of a line."""

    custom_id: str
    method: str
    url: str
    body: _Model


class _Line(msgspec.Struct):
    custom_id: str
    body: dict[str, Any]


_peek = msgspec.json.Decoder(_Peek)
_line = msgspec.json.Decoder(_Line)
_encode = msgspec.json.Encoder().encode


def _error(code: str, message: str, line: int | None = None, param: str | None = None) -> Any:
    return {"code": code, "line": line, "message": message, "param": param}


class _Check:
    """One pass over an input file."""

    def __init__(self, world: World, batch: Batch) -> None:
        self._world = world
        self._batch = batch
        self._seen: set[str] = set()
        self.errors: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        batch, most = self._batch, self._world.settings.limit("openai_requests")
        batch.custom_ids = []
        for number, line in enumerate(batch.source.lines(), 1):
            self._read(number, line)
            if len(self.errors) >= _MOST_ERRORS:
                return self.errors
        if not batch.custom_ids and not self.errors:
            return [_error("empty_file", "The input file is empty.")]
        if len(batch.custom_ids) > most:
            message = f"The input file has {len(batch.custom_ids)} requests, at most {most} fit."
            return [_error("too_many_tasks", message)]
        return self.errors or self._whole()

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = _peek.decode(line)
        except msgspec.ValidationError as problem:
            code = "missing_required_parameter"
            self.errors.append(_error(code, f"The line is not a request: {problem}.", number))
            return
        except msgspec.DecodeError:
            message = "This line is not parseable as valid JSON."
            self.errors.append(_error("invalid_json_line", message, number))
            return
        self._batch.custom_ids.append(row.custom_id)
        complaint = self._complaint(row)
        self._seen.add(row.custom_id)
        if complaint is not None:
            self.errors.append({**complaint, "line": number})

    def _complaint(self, row: _Peek) -> dict[str, Any] | None:
        batch = self._batch
        if row.custom_id in self._seen:
            message = (
                "The custom_id for this request is a duplicate of another request. The custom_id "
                "parameter must be unique for each request in a batch."
            )
            return dict(_error("duplicate_custom_id", message, param="custom_id"))
        if row.method != "POST":
            return dict(_error("invalid_method", "The method must be POST.", param="method"))
        if row.url != batch.endpoint:
            message = f"The URL {row.url} does not match the batch endpoint {batch.endpoint}."
            return dict(_error("mismatched_endpoint", message, param="url"))
        if row.body.stream:
            return dict(_error("invalid_request", "stream is not supported.", param="body.stream"))
        batch.model = batch.model or row.body.model
        if row.body.model != batch.model:
            message = "All requests of a batch must use the same model."
            return dict(_error("mismatched_model", message, param="body.model"))
        return None

    def _whole(self) -> list[dict[str, Any]]:
        """What is wrong with the file, when each of its lines is right."""
        batch, settings = self._batch, self._world.settings
        if settings.models is not None and batch.model not in settings.models:
            message = f"The provided model '{batch.model}' is not supported by the Batch API."
            return [_error("model_not_found", message, 1, "body.model")]
        if batch.endpoint == "/v1/embeddings":
            most = settings.limit("openai_embedding_inputs")
            lines = batch.source.lines()
            inputs = sum(count_inputs(_line.decode(line).body) for line in lines if line.strip())
            if inputs > most:
                message = f"The file has {inputs} embedding inputs, at most {most} fit in a batch."
                return [_error("too_many_tasks", message)]
        return self._queue()

    def _queue(self) -> list[dict[str, Any]]:
        batch, most = self._batch, self._world.settings.limit("openai_enqueued_tokens")
        waiting = (b for b in self._world.batches.listing() if b.model == batch.model)
        queued = sum(b.source.size // 4 for b in waiting if not b.ended or b is batch)
        if not most or queued <= most:
            return []
        return [token_limit_error(batch.model or "", most)]


def token_limit_error(model: str, limit: int) -> dict[str, Any]:
    message = (
        f"Enqueued token limit reached for {model} in organization org-emulated. Limit: "
        f"{limit:,} enqueued tokens. Please try again once some in_progress batches have been "
        "completed."
    )
    return dict(_error("token_limit_exceeded", message))


class OpenAIDialect:
    """OpenAI's side of a batch: see `batches.Dialect`."""

    splits_errors = True

    def check(self, world: World, batch: Batch) -> list[dict[str, Any]]:
        return _Check(world, batch).run()

    def rows(self, lines: list[bytes]) -> list[Row]:
        read = (_line.decode(line) for line in lines if line.strip())
        return [Row(line.custom_id, line.body) for line in read]

    def publish(self, world: World, batch: Batch) -> None:
        def add(name: str, piece: Slice | None) -> str | None:
            if piece is None:
                return None
            file_id, filename = new_id("file-"), f"{batch.id}_{name}.jsonl"
            lives = batch.output_lives
            file = stored(file_id, "batch_output", piece, batch.owner, filename=filename, lives=lives)
            world.files.add(file)
            return file_id

        batch.output_file_id = add("output", batch.output)
        batch.error_file_id = add("error", batch.error_output)

    def answer(self, world: World, batch: Batch, rows: list[Row]) -> Iterator[Outcome]:
        asked: list[tuple[str, ModelRequest]] = []
        for row in rows:
            if row.unanswered:
                yield _unanswered(row.custom_id, row.unanswered)
                continue
            try:
                request = read_openai(batch.endpoint, row.body, mode="batch", custom_id=row.custom_id)
            except Refused as refused:
                yield _failed(row.custom_id, refused.failure)
                continue
            asked.append((row.custom_id, request))
        answers = world.ask([request for _, request in asked])
        for (custom_id, request), answer in zip(asked, answers, strict=True):
            if answer.reply.expired:
                yield _unanswered(custom_id, "expired")
            elif answer.reply.failure is not None:
                yield _failed(custom_id, answer.reply.failure)
            else:
                body = openai_body(request, answer.reply, answer.usage)
                line = _result(custom_id, 200, body)
                charge = answer.charge(request)
                yield Outcome(custom_id, line, "succeeded", charge, answer.usage.cached_tokens)


def _result(custom_id: str, status: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status, "request_id": new_id("req_"), "body": body}
    facts = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response}
    return _encode({**facts, "error": None})


def _failed(custom_id: str, failure: Failure) -> Outcome:
    line = _result(custom_id, failure.status, openai_error(failure))
    return Outcome(custom_id, line, "errored")


def _unanswered(custom_id: str, kind: Any) -> Outcome:
    code, message = _UNANSWERED[kind]
    facts = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": None}
    line = _encode({**facts, "error": {"code": code, "message": message}})
    return Outcome(custom_id, line, kind)
