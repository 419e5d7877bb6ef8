"""Lines of OpenAI's batch files: what is around the bodies, whichever endpoint they are for. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import polars as pl

from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply, decode, decoded, failed, never_ran, rows
from polars_llm.errors import InvalidRequest
from polars_llm.request import Json, RequestHeader, Requests, canonical, custom_ids

__all__ = ["Wire", "custom_ids_of", "merged", "not_read", "parse", "read_error", "render"]


class Wire(Protocol):
    """One endpoint's form; the modules `chat`, `responses` and `embeddings` are such."""

    ENDPOINT: str

    def body(self, options: Options, *, limit_field: str) -> dict[str, Json]:
        """Fields of the request body beside model and input; nothing that the user did not set.

        `limit_field` is what the host calls ``max_tokens`` where chat is concerned.
        """

    def render(self, requests: Requests) -> Iterator[bytes]:
        """Request lines of a batch file, in the order of the rows."""

    def read_reply(self, status: int, raw: bytes) -> Reply:
        """One reply of the endpoint, whatever its status, as a row."""


def merged(chosen: dict[str, Any], options: Options, ours: Iterable[str]) -> dict[str, Json]:
    """What the user set by our names, and ``params``.

    Raises
    ------
    InvalidRequest
        At call: a field in `params` that the library writes itself (`ours`), or that is set twice.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name in options.params:
        if name in chosen or name in ours:
            raise InvalidRequest(
                f"params={{{name!r}: ...}} is set by the verb itself",
                hint=f"leave {name!r} out of params. Nothing was sent.",
            )
    result = canonical({**chosen, **options.params})
    assert isinstance(result, dict)
    return result


def render(
    requests: Requests,
    said: Callable[[pl.DataFrame], Iterator[bytes]],
    tails: Callable[[RequestHeader, pl.DataFrame], Iterator[bytes]],
) -> Iterator[bytes]:
    """Request lines: the constant parts are encoded once, only the texts per row.

    Parameters
    ----------
    said
        The fields of the body that hold what a row says, such as ``"messages":[...]``.
    tails
        The rest of the body, from a comma on, to its closing brace.
    """
    header = requests.header
    encode = msgspec.json.encode
    start = b'","method":"POST","url":' + encode(header.endpoint)
    start += b',"body":{"model":' + encode(header.model) + b","
    for part in requests.frame.iter_slices(10_000):
        ids = part.select(custom_ids(pl.col("key"))).to_series().to_list()
        for name, text, tail in zip(ids, said(part), tails(header, part), strict=True):
            yield b'{"custom_id":"' + name.encode() + start + text + tail + b"}"


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


_error_decoder = msgspec.json.Decoder(_ErrorBody)
_line_decoder = msgspec.json.Decoder(_Line)
_text_decoder = msgspec.json.Decoder(str)

# Codes of lines that never ran; sent again by themselves, alone, a bounded number of times.
_NEVER_RAN = {"batch_expired": "expired", "batch_cancelled": "cancelled"}


def parse(lines: Iterable[bytes], read_reply: Callable[[int, bytes], Reply]) -> pl.DataFrame:
    """Lines of output and error files as one frame (REPLY_SCHEMA)."""

    def read(line: _Line) -> Reply:
        if line.response is None:
            error = line.error or _Failure(code="empty_line", message="the line has no response, no error")
            return _failed(None, str(error.code or error.type or "unknown"), error.message, b"")
        raw = bytes(line.response.body)
        if raw.startswith(b'"'):  # some hosts put the body in as a JSON string
            raw = decode(raw, _text_decoder).encode()
        return read_reply(line.response.status_code, raw)

    return rows(lines, _line_decoder, read)


def custom_ids_of(path: Path) -> Iterator[str]:
    """The custom_ids in a file of request or result lines."""
    with path.open("rb") as file:
        for line in decoded(file, _line_decoder):
            yield line.custom_id


def read_error(status: int, raw: bytes) -> Reply:
    """A reply whose status is not 200."""
    try:
        error = decode(raw, _error_decoder).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    if not isinstance(error, _Failure):
        error = _Failure(message=error or raw[:200].decode(errors="replace"))
    return _failed(status, str(error.code or error.type or f"http_{status}"), error.message, raw)


def not_read(what: str, raw: bytes) -> Reply:
    """A reply with status 200 that is not what the endpoint gives."""
    return failed(422, "unreadable_reply", f"the reply is not {what}", raw)


def _failed(status: int | None, kind: str, message: Any, raw: bytes) -> Reply:
    if kind in _NEVER_RAN:
        return never_ran(_NEVER_RAN[kind], message, raw)
    return failed(status, kind, message, raw)
