"""What can be wrong with the bytes of a result file, and with the way they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from .faults import Fault
from .wire import Response, Slice

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.decode
_TAIL = " \u2028and\u0085on"


def spoil(response: Response, faults: list[Fault]) -> Response:
    """Apply the download faults to a good response."""
    # Garbage comes last: the others read what is there.
    for fault in sorted(faults, key=lambda fault: fault.kind == "garbage-line"):
        if fault.phase != "download" or response.status != 200:
            continue
        if fault.kind == "truncate":
            response.cut, response.framing = fault.options["share"], fault.options["framing"]
            continue
        data = response.body.read() if isinstance(response.body, Slice) else response.body
        lines = [line for line in data.split(b"\n") if line]
        response.body = _SPOILERS[fault.kind](lines, fault.options)
    return response


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _edited(lines: list[bytes], edit: Callable[[Any], Any]) -> bytes:
    return _joined([_encode(edit(_decode(line))) for line in lines])


def _with_tail(value: Any, tail: str = _TAIL) -> Any:
    """Append separators that JSON allows raw, or something else, to every answer text in a result line."""
    if isinstance(value, list):
        return [_with_tail(item, tail) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: inner + tail
        if key in ("content", "text") and isinstance(inner, str)
        else _with_tail(inner, tail)
        for key, inner in value.items()
    }


def _half_a_pair(line: bytes) -> bytes:
    """End every answer text in the middle of an emoji, as a model may that reaches its limit there."""
    return json.dumps(_with_tail(_decode(line), "\ud83d"), ensure_ascii=True).encode()


def _foreign(lines: list[bytes], options: dict[str, Any]) -> bytes:
    strangers = []
    for number, line in enumerate(lines[: options["count"]]):
        strangers.append(_encode({**_decode(line), "custom_id": f"somebody-elses-{number}"}))
    return _joined(strangers + lines)


def _string_body(line: Any) -> Any:
    if line.get("response"):
        line["response"]["body"] = _encode(line["response"]["body"]).decode()
    return line


def _no_response(line: Any) -> Any:
    """Leave out the keys that a lax service leaves out; an error has no response at all."""
    response = line.get("response")
    if response and response["status_code"] != 200:
        error = response["body"]["error"]
        return {
            "custom_id": line["custom_id"],
            "error": {"code": error["code"], "message": error["message"]},
        }
    return {key: value for key, value in line.items() if value is not None}


def _missing(lines: list[bytes], options: dict[str, Any]) -> bytes:
    wanted = options["custom_id"]
    if wanted is None:
        return _joined(lines[options["count"] :])
    return _joined([line for line in lines if _decode(line)["custom_id"] != wanted])


_SPOILERS: dict[str, Callable[[list[bytes], dict[str, Any]], bytes]] = {
    "crlf": lambda lines, _: b"".join(line + b"\r\n" for line in lines),
    "blank-lines": lambda lines, _: b"\n" + b"".join(line + b"\n\n" for line in lines),
    "duplicate-lines": lambda lines, _: _joined([*lines, *lines]),
    "foreign-ids": _foreign,
    "raw-separators": lambda lines, _: _edited(lines, _with_tail),
    "lone-surrogates": lambda lines, _: _joined([_half_a_pair(line) for line in lines]),
    "string-body": lambda lines, _: _edited(lines, _string_body),
    "no-response": lambda lines, _: _edited(lines, _no_response),
    "missing-lines": _missing,
    "garbage-line": lambda lines, _: _joined([*lines[:1], b'{"custom_id": "cut', *lines[1:]]),
    "no-final-newline": lambda lines, _: b"\n".join(lines),
}
