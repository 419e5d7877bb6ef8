"""The Chat Completions wire form: options -> body, result lines -> answers. Pure; no SDK, no network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.base import Options
from polars_llm.backends.replies import Reply, decoded, failed, never_ran, rows
from polars_llm.errors import InvalidRequest
from polars_llm.request import Json, RequestHeader, Requests, canonical, custom_ids

__all__ = ["ENDPOINT", "body", "custom_ids_of", "parse_lines", "read_reply", "render"]

ENDPOINT = "/v1/chat/completions"

# Fields that we write ourselves: one in `params` would contradict the column.
_OURS = frozenset({"model", "messages", "stream", "n"})


def body(options: Options, *, limit_field: str = "max_completion_tokens") -> dict[str, Json]:
    """Fields of the request body beside model and messages; nothing that the user did not set.

    `limit_field` is what the host calls ``max_tokens``.

    Raises
    ------
    InvalidRequest
        At call: a field in `params` that the library writes itself, or that is set twice.
    """
    fields: dict[str, Any] = {
        limit_field: options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stop": options.stop,
        "seed": options.seed,
        "reasoning_effort": options.reasoning_effort,
    }
    chosen = {name: value for name, value in fields.items() if value is not None}
    ours = _OURS | chosen.keys() | ({"response_format"} if options.schema else set())
    for name in options.params:
        if name in ours:
            raise InvalidRequest(
                f"params={{{name!r}: ...}} is set by the verb itself",
                hint=f"leave {name!r} out of params. Nothing was sent.",
            )
    result = canonical({**chosen, **options.params})
    assert isinstance(result, dict)
    return result


def render(requests: Requests) -> Iterator[bytes]:
    """Request lines of a batch file, in the order of the rows.

    The constant parts are encoded once; only the texts are encoded per row (one pass of msgspec).
    """
    header = requests.header
    encode = msgspec.json.Encoder().encode
    for part in requests.frame.iter_slices(10_000):
        ids = part.select(custom_ids(pl.col("key"))).to_series().to_list()
        start = b'","method":"POST","url":' + encode(header.endpoint) + b',"body":{"model":'
        start += encode(header.model) + b',"messages":'
        rows = zip(ids, _messages(part), _tails(header, part), strict=True)
        for name, messages, tail in rows:
            yield b'{"custom_id":"' + name.encode() + start + messages + tail


_FORMAT = (
    b',"response_format":{"type":"json_schema","json_schema":{"name":"answer","strict":true,"schema":%b}}'
)


def _messages(part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    columns = (part["prompt"].to_list(), part["kind"].to_list(), part["system"].to_list())
    for prompt, kind, system in zip(*columns, strict=True):
        if kind == "m":
            first = [b'{"role":"system","content":' + encode(system) + b"}"] if system else []
            yield _with_first(prompt.encode(), first)
        elif system is None:
            yield b'[{"role":"user","content":' + encode(prompt) + b"}]"
        else:
            yield (
                b'[{"role":"system","content":'
                + encode(system)
                + b'},{"role":"user","content":'
                + encode(prompt)
                + b"}]"
            )


def _with_first(messages: bytes, first: list[bytes]) -> bytes:
    return b"[" + first[0] + b"," + messages[1:] if first else messages


def _tails(header: RequestHeader, part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    fields, seed = header.body, header.body.get("seed")
    # The schema is spliced in as text: encoding it again would lose the order of its properties.
    last = b"}}" if header.schema is None else _FORMAT % header.schema.encode() + b"}}"
    for sample in part["sample"].to_list():
        # A seed fixes the answer: asking again means asking with the next one.
        row = {**fields, "seed": seed + sample} if isinstance(seed, int) and sample else fields
        yield (b"," + encode(row)[1:-1] if row else b"") + last


# --- replies ------------------------------------------------------------------------------------


class _Failure(msgspec.Struct):
    code: Any = None
    type: Any = None
    message: Any = None


class _Response(msgspec.Struct):
    status_code: int = 200
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str = ""
    response: _Response | None = None
    error: _Failure | None = None


class _ErrorBody(msgspec.Struct):
    error: _Failure | str | None = None


class _Message(msgspec.Struct):
    content: Any = None
    refusal: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _InputDetails | None = None


class _Chat(msgspec.Struct):
    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None


_chat_decoder = msgspec.json.Decoder(_Chat)
_error_decoder = msgspec.json.Decoder(_ErrorBody)
_line_decoder = msgspec.json.Decoder(_Line)

# Codes of lines that never ran; sent again by themselves, alone, a bounded number of times.
_NEVER_RAN = {"batch_expired": "expired", "batch_cancelled": "cancelled"}


def parse_lines(lines: Iterable[bytes]) -> pl.DataFrame:
    """Lines of output and error files as one frame (REPLY_SCHEMA)."""
    return rows(lines, _line_decoder, _read_line)


def custom_ids_of(path: Path) -> Iterator[str]:
    """The custom_ids in a file of request or result lines."""
    with path.open("rb") as file:
        for line in decoded(file, _line_decoder):
            yield line.custom_id


def _read_line(line: _Line) -> Reply:
    if line.response is not None:
        raw = bytes(line.response.body)
        if raw.startswith(b'"'):  # some hosts put the body in as a JSON string
            raw = msgspec.json.decode(raw, type=str).encode()
        return read_reply(line.response.status_code, raw)
    error = line.error or _Failure(code="empty_line", message="the line has no response, no error")
    return _failed(None, str(error.code or error.type or "unknown"), error.message, b"")


def read_reply(status: int, raw: bytes) -> Reply:
    """One reply of the endpoint, whatever its status, as a row."""
    if status != 200:
        try:
            error = _error_decoder.decode(raw).error
        except msgspec.DecodeError:
            error = None
        if not isinstance(error, _Failure):
            error = _Failure(message=error or raw[:200].decode(errors="replace"))
        return _failed(status, str(error.code or error.type or f"http_{status}"), error.message, raw)
    try:
        chat = _chat_decoder.decode(raw)
        choice = chat.choices[0]
    except (msgspec.DecodeError, IndexError):
        return _failed(422, "unreadable_reply", "the reply is not a chat completion", raw)
    return _answered(chat, choice, raw)


def _answered(chat: _Chat, choice: _Choice, raw: bytes) -> Reply:
    usage = chat.usage or _Usage()
    details = usage.prompt_tokens_details or _InputDetails()
    message = choice.message
    reason = choice.finish_reason
    text = _text(message.content)
    if text is None and message.refusal:
        reason = "refusal"
    return {
        "state": DONE,
        "text": text,
        "error_message": message.refusal,
        "finish_reason": reason,
        "input_tokens": usage.prompt_tokens,
        "cached_input_tokens": details.cached_tokens,
        "cache_write_tokens": details.cache_write_tokens,
        "output_tokens": usage.completion_tokens,
        "model": chat.model,
        "body": raw,
    }


def _text(content: Any) -> str | None:
    if isinstance(content, str):
        return content
    if isinstance(content, list):  # parts: only text parts can be a String
        parts = [p["text"] for p in content if isinstance(p, dict) and isinstance(p.get("text"), str)]
        return "".join(parts) if parts else None
    return None


def _failed(status: int | None, kind: str, message: Any, raw: bytes) -> Reply:
    if kind in _NEVER_RAN:
        return never_ran(_NEVER_RAN[kind], message, raw)
    return failed(status, kind, message, raw)
