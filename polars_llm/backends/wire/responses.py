"""The Responses wire form: options -> body, replies -> answers. Pure; no SDK, no network.

``store`` is false unless the user sets it: by itself the API keeps every answer for 30 days. It is part of
the key. How an answer ended is said in the words of Chat Completions: ``stop``, ``length``,
``content_filter``, ``tool_calls``, ``refusal``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply, decode, failed, word
from polars_llm.backends.wire import lines
from polars_llm.backends.wire.lines import merged, not_read, read_error
from polars_llm.errors import InvalidRequest
from polars_llm.images import Image, Link, of_rows, with_parts
from polars_llm.request import Json, RequestHeader, Requests

__all__ = ["ENDPOINT", "body", "read_reply", "render"]

ENDPOINT = "/v1/responses"

_LEAST_TOKENS = 16
_FORMAT = b'"format":{"type":"json_schema","name":"answer","strict":true,"schema":%b}}}'

# Fields that we write ourselves, or that a request which is answered once can't have.
_OURS = frozenset({"model", "input", "instructions", "stream", "background"})


def body(options: Options, *, limit_field: str = "") -> dict[str, Json]:  # noqa: ARG001 (chat has it)
    """Fields of the request body beside model, input and instructions.

    Nothing that the user did not set, but for ``store``.

    Raises
    ------
    InvalidRequest
        At call: what this API does not have (``stop``, ``seed``), too small a ``max_tokens``, and fields
        in `params` that the library writes itself, or that are set twice.
    """
    for name in ("stop", "seed"):
        if getattr(options, name) is not None:
            raise InvalidRequest(
                f"{name} does not exist in the Responses API",
                hint=f"leave {name} out, or use pllm.OpenAI(NAME) without endpoint. Nothing was sent.",
            )
    if options.max_tokens is not None and options.max_tokens < _LEAST_TOKENS:
        raise InvalidRequest(
            f"max_tokens is {options.max_tokens}; the Responses API takes {_LEAST_TOKENS} or more",
            hint="give it more room, or use pllm.OpenAI(NAME) without endpoint. Nothing was sent.",
        )
    if options.schema and "format" in _mapping(options.params.get("text")):
        raise InvalidRequest("schema is set twice", hint="leave text.format out of params. Nothing was sent.")
    fields: dict[str, Any] = {
        "max_output_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
    }
    params = {name: value for name, value in options.params.items() if name != "reasoning"}
    rest = merged(fields, Options(params=params), _OURS)
    return {"store": False, **rest, **merged(_reasoning(options), Options(), ())}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _reasoning(options: Options) -> dict[str, Any]:
    """``reasoning`` with the effort put in; what the user wrote in params stays beside it."""
    given = options.params.get("reasoning")
    if options.reasoning_effort is None:
        return {"reasoning": given}
    if given is not None and (not isinstance(given, Mapping) or "effort" in given):
        raise InvalidRequest(
            "reasoning_effort is set twice",
            hint="leave reasoning.effort out of params. Nothing was sent.",
        )
    return {"reasoning": {**(given or {}), "effort": options.reasoning_effort}}


def render(requests: Requests) -> Iterator[bytes]:
    """Request lines of a batch file, in the order of the rows."""
    return lines.render(requests, _inputs, _tails)


def _inputs(part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    columns = (part["prompt"].to_list(), part["kind"].to_list(), part["system"].to_list(), of_rows(part))
    for prompt, kind, system, images in zip(*columns, strict=True):
        if images:
            said = encode(with_parts(kind, prompt, images, _parts))
        else:
            said = prompt.encode() if kind == "m" else encode(prompt)
        beside = b"" if system is None else b',"instructions":' + encode(system)
        yield b'"input":' + said + beside


def _parts(text: str, images: Sequence[Image | Link]) -> list[dict[str, Any]]:
    """The content of a message with images: the text first, as in OpenAI's guide."""
    return [
        {"type": "input_text", "text": text},
        *({"type": "input_image", "image_url": image.url} for image in images),
    ]


def _tails(header: RequestHeader, part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.encode
    rest = b"," + encode(header.body)[1:]
    if header.schema is not None:
        # The schema is spliced in as text: encoding it again would lose the order of its properties.
        others = encode({name: value for name, value in header.body.items() if name != "text"})[1:-1]
        beside = encode(_mapping(header.body.get("text")))[1:-1]
        rest = b"," + others + b',"text":{' + (beside and beside + b",") + _FORMAT % header.schema.encode()
    return itertools.repeat(rest, part.height)


# --- replies ------------------------------------------------------------------------------------


class _Part(msgspec.Struct):
    type: str = ""
    text: Any = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    type: str = ""
    content: list[_Part] | None = None


class _Failure(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Incomplete(msgspec.Struct):
    reason: str | None = None


class _InputDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_tokens_details: _InputDetails | None = None


class _Response(msgspec.Struct):
    output: list[_Item]
    status: str | None = None
    error: _Failure | None = None
    incomplete_details: _Incomplete | None = None
    model: str | None = None
    usage: _Usage | None = None
    service_tier: Any = None


_decoder = msgspec.json.Decoder(_Response)

# Why an answer is not complete, in the words of Chat Completions.
_REASONS = {"max_output_tokens": "length"}


def read_reply(status: int, raw: bytes) -> Reply:
    """One reply of the endpoint, whatever its status, as a row."""
    if status != 200:
        return read_error(status, raw)
    try:
        response = decode(raw, _decoder)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return not_read("a response", raw)
    if response.status == "failed":
        error = response.error or _Failure()
        # The provider's own fault: the request was taken, and may go through the next time.
        return failed(500, error.code or "server_error", error.message, raw)
    return _answered(response, raw)


def _answered(response: _Response, raw: bytes) -> Reply:
    usage = response.usage or _Usage()
    details = usage.input_tokens_details or _InputDetails()
    parts = [part for item in response.output if item.type == "message" for part in item.content or ()]
    texts = [p.text for p in parts if p.type == "output_text" and isinstance(p.text, str)]
    refusals = [p.refusal for p in parts if p.type == "refusal" and p.refusal]
    return {
        "state": DONE,
        "text": "".join(texts) if texts else None,
        "error_message": "".join(refusals) or None,
        "finish_reason": _finish_reason(response, refused=bool(refusals and not texts)),
        "input_tokens": usage.input_tokens,
        "cached_input_tokens": details.cached_tokens,
        "cache_write_tokens": details.cache_write_tokens,
        "output_tokens": usage.output_tokens,
        "service_tier": word(response.service_tier),
        "model": response.model,
        "body": raw,
    }


def _finish_reason(response: _Response, *, refused: bool) -> str | None:
    if response.status == "incomplete":
        reason = (response.incomplete_details or _Incomplete()).reason
        return _REASONS.get(reason or "", reason or "incomplete")
    if refused:
        return "refusal"
    if any(item.type.endswith("_call") for item in response.output) and not any(
        item.type == "message" for item in response.output
    ):
        return "tool_calls"
    return "stop"
