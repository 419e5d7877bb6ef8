"""Anthropic's Messages wire form: options -> body, request lines, result lines -> answers. Pure.

``max_tokens`` is required there, so a default is sent where the user sets none: `MAX_TOKENS`. It and
`API_VERSION` are frozen: they are part of the key of a request, whatever the SDK's own defaults become.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply, decode, decoded, failed, never_ran, rows, word
from polars_llm.errors import InvalidRequest
from polars_llm.images import Image, Link, of_rows, with_parts
from polars_llm.request import Json, RequestHeader, Requests, canonical, custom_ids

__all__ = [
    "API_VERSION",
    "ENDPOINT",
    "MAX_TOKENS",
    "CacheSystem",
    "body",
    "cache_mark",
    "custom_ids_of",
    "error_kind",
    "headers",
    "parse_lines",
    "read_reply",
    "render",
    "versions",
]

ENDPOINT = "/v1/messages"

API_VERSION = "2026-10-21"
"""What is asked for unless the user pins another."""

MAX_TOKENS = 4_096
"""Tokens of an answer, thinking included, where the user sets no ``max_tokens``."""

CacheSystem: TypeAlias = Literal["5m", "1h"]

_VERSION = re.compile(r"\d{4}-\d{2}-\d{2}")
_SAMPLING = ("temperature", "top_p", "top_k")
_SAMPLING_GONE = "2026-10-21"

# Fields that we write ourselves, or that a batch does not take.
_NOT_IN_PARAMS = {
    "model": "is set by the verb itself",
    "messages": "is set by the verb itself",
    "system": "is set by the verb itself: pass system=",
    "stream": "is not for batches",
    "speed": "is not for batches",
    "seed": "does not exist on Anthropic",
}


def headers(api_version: str, betas: Sequence[str] = ()) -> dict[str, str]:
    """Headers that change answers, as they enter the key.

    Raises
    ------
    InvalidRequest
        At call: a version that is not a date, or a beta that is not one word.
    """
    if not isinstance(api_version, str) or not _VERSION.fullmatch(api_version):
        raise InvalidRequest(
            f"api_version={api_version!r} is not a version of Anthropic's API",
            hint=f"a version is a date such as {API_VERSION!r}. Nothing was sent.",
        )
    if isinstance(betas, str) or not all(re.fullmatch(r"[\w.-]+", str(beta)) for beta in betas):
        raise InvalidRequest(
            f"betas={betas!r} is not a list of names",
            hint="for example betas=['output-300k-2026-03-24']. Nothing was sent.",
        )
    beta = {"anthropic-beta": ",".join(sorted(set(betas)))} if betas else {}
    return {"anthropic-version": api_version, **beta}


def versions(headers: Mapping[str, str]) -> dict[str, Any]:
    """Inverse of `headers`: the arguments that made them."""
    betas = headers.get("anthropic-beta", "")
    return {
        "api_version": headers.get("anthropic-version", API_VERSION),
        "betas": tuple(betas.split(",")) if betas else (),
    }


def cache_mark(cache_system: CacheSystem | None) -> dict[str, Json]:
    """What marks the end of the system prompt for the provider's cache; empty for None.

    Raises
    ------
    InvalidRequest
        At call: another duration.
    """
    if cache_system is None:
        return {}
    if cache_system not in get_args(CacheSystem):
        raise InvalidRequest(
            f"cache_system is {cache_system!r}",
            hint="it takes '5m' or '1h': how long the provider keeps the system prompt between requests."
            " Nothing was sent.",
        )
    return {"cache_control": {"type": "ephemeral", "ttl": cache_system}}


def body(options: Options, *, api_version: str = API_VERSION) -> dict[str, Json]:
    """Fields of the request body beside model, messages and system.

    Nothing that the user did not set, but for ``max_tokens``.

    Raises
    ------
    InvalidRequest
        At call: what this version of the API refuses (sampling parameters, a seed), and fields in
        `params` that the library writes itself, or that are set twice.
    """
    _check_sampling(options, api_version)
    if options.seed is not None:
        raise _refused("seed", "does not exist on Anthropic", "leave it out; sample= asks again.")
    fields: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stop_sequences": [options.stop] if isinstance(options.stop, str) else options.stop,
    }
    chosen = {name: value for name, value in fields.items() if value is not None}
    for name in options.params:
        if name in _NOT_IN_PARAMS:
            raise _refused(f"params={{{name!r}: ...}}", _NOT_IN_PARAMS[name], f"leave {name!r} out.")
        if name in chosen:
            raise _refused(f"params={{{name!r}: ...}}", "is set twice", f"leave {name!r} out of params.")
    _check_format(options)
    whole = {"max_tokens": MAX_TOKENS, **chosen, **options.params, **_effort(options)}
    limit = whole["max_tokens"]
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise _refused(f"max_tokens={limit!r}", "is not a number of tokens", "give a whole number from 1 up.")
    result = canonical(whole)
    assert isinstance(result, dict)
    return result


def _check_sampling(options: Options, api_version: str) -> None:
    if api_version < _SAMPLING_GONE:
        return
    own = {"temperature": options.temperature, "top_p": options.top_p}
    named = {name for name, value in own.items() if value is not None}
    for name in _SAMPLING:
        if name in named or name in options.params:
            raise _refused(
                name,
                f"does not exist in Anthropic's API since version {_SAMPLING_GONE}",
                "leave it out, or, for an older model that takes it, pass"
                " model=pllm.Anthropic(NAME, api_version='2023-06-01').",
            )


def _check_format(options: Options) -> None:
    given = options.params.get("output_config")
    if options.schema and not (given is None or (isinstance(given, Mapping) and "format" not in given)):
        raise _refused("schema", "is set twice", "leave output_config.format out of params.")


def _effort(options: Options) -> dict[str, Any]:
    """``output_config`` with the effort put in; what the user wrote in params stays beside it."""
    if options.reasoning_effort is None:
        return {}
    given = options.params.get("output_config", {})
    if not isinstance(given, Mapping) or "effort" in given:
        raise _refused("reasoning_effort", "is set twice", "leave output_config.effort out of params.")
    return {"output_config": {**given, "effort": options.reasoning_effort}}


def _refused(what: str, why: str, hint: str) -> InvalidRequest:
    return InvalidRequest(f"{what} {why}", hint=f"{hint} Nothing was sent.")


def render(requests: Requests, *, cache_system: CacheSystem | None = None) -> Iterator[bytes]:
    """Request lines, in the order of the rows: one element of a batch's ``requests`` each.

    With `cache_system` the end of each system prompt is marked for the provider's cache. The constant
    parts are encoded once; only the texts are encoded per row.

    Raises
    ------
    InvalidRequest
        A conversation that ends with the assistant's words (this API has no prefill), or that has no
        message but system ones.
    """
    encode = msgspec.json.Encoder().encode
    start = b'","params":{"model":' + encode(requests.header.model) + b',"messages":'
    tail = _tail(requests.header)
    mark = cache_mark(cache_system)
    for part in requests.frame.iter_slices(10_000):
        ids = part.select(custom_ids(pl.col("key"))).to_series().to_list()
        for name, text in zip(ids, _inputs(part, mark), strict=True):
            yield b'{"custom_id":"' + name.encode() + start + text + tail


def _tail(header: RequestHeader) -> bytes:
    """What is the same for every row."""
    encode = msgspec.json.Encoder().encode
    if header.schema is None:
        return b"," + encode(header.body)[1:] + b"}"
    # The schema is spliced in as text: encoding it again would lose the order of its properties.
    rest = {name: value for name, value in header.body.items() if name != "output_config"}
    config = encode(header.body.get("output_config") or {})[1:-1]
    format_ = b'"format":{"type":"json_schema","schema":' + header.schema.encode() + b"}}"
    return b"," + encode(rest)[1:-1] + b',"output_config":{' + (config and config + b",") + format_ + b"}}"


def _inputs(part: pl.DataFrame, mark: Mapping[str, Json]) -> Iterator[bytes]:
    """Messages, and the system prompt behind them where there is one."""
    encode = msgspec.json.Encoder().encode
    columns = (part["prompt"].to_list(), part["kind"].to_list(), part["system"].to_list(), of_rows(part))
    for prompt, kind, system, images in zip(*columns, strict=True):
        # The API refuses empty text blocks: an empty system prompt is none.
        blocks = [{"type": "text", "text": system}] if system else []
        if images:
            messages = with_parts(kind, prompt, images, _parts)
            text = encode(_spoken(messages, blocks))
        elif kind == "m":
            text = encode(_spoken(msgspec.json.decode(prompt), blocks))
        else:
            text = b'[{"role":"user","content":' + encode(prompt) + b"}]"
        if blocks:
            blocks[-1] = {**blocks[-1], **mark}
        yield text + (b',"system":' + encode(blocks) if blocks else b"")


def _spoken(messages: list[dict[str, Any]], blocks: list[Any]) -> list[dict[str, Any]]:
    """The messages without the system ones at their beginning, which go to `blocks`."""
    rest = list(messages)
    while rest and rest[0]["role"] == "system":
        content = rest.pop(0)["content"]
        text = [{"type": "text", "text": content}] if content else []
        blocks += content if isinstance(content, list) else text
    if not rest or rest[-1]["role"] == "assistant":
        raise InvalidRequest(
            "a conversation has no message from the user at its end",
            hint="Anthropic's models take no prefill: end every conversation with role 'user'."
            " Nothing was sent.",
        )
    if any(message["role"] == "developer" for message in rest):
        raise InvalidRequest(
            "a conversation has a message with role 'developer', which Anthropic does not know",
            hint="give it the role 'system'. Nothing was sent.",
        )
    return rest


def _parts(text: str, images: Sequence[Image | Link]) -> list[dict[str, Any]]:
    """The content of a message with images: they come before the text, as Anthropic's guide says."""
    sources = [
        {"type": "url", "url": image.url}
        if isinstance(image, Link)
        else {"type": "base64", "media_type": image.media_type, "data": image.base64}
        for image in images
    ]
    words = [{"type": "text", "text": text}] if text else []
    return [*({"type": "image", "source": source} for source in sources), *words]


# --- replies ------------------------------------------------------------------------------------


class _Failure(msgspec.Struct):
    type: str | None = None
    message: Any = None
    details: Any = None

    @property
    def code(self) -> str | None:
        code = self.details.get("error_code") if isinstance(self.details, dict) else None
        return code if isinstance(code, str) else None


class _ErrorBody(msgspec.Struct):
    error: _Failure | str | None = None


class _Result(msgspec.Struct):
    type: str = ""
    message: msgspec.Raw = msgspec.Raw(b"null")
    error: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    custom_id: str = ""
    result: _Result | None = None


class _Block(msgspec.Struct):
    type: str = ""
    text: Any = None


class _StopDetails(msgspec.Struct):
    category: str | None = None
    explanation: str | None = None


class _CacheWrites(msgspec.Struct):
    ephemeral_1h_input_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: _CacheWrites | None = None
    service_tier: Any = None
    inference_geo: Any = None


class _Message(msgspec.Struct):
    content: list[_Block]
    model: str | None = None
    stop_reason: str | None = None
    stop_details: _StopDetails | None = None
    usage: _Usage | None = None


_error_decoder = msgspec.json.Decoder(_ErrorBody)
_line_decoder = msgspec.json.Decoder(_Line)
_message_decoder = msgspec.json.Decoder(_Message)

# Results without an answer that were not billed; sent again by themselves.
_NEVER_RAN = {"canceled": "cancelled", "expired": "expired"}

# Error types of batch lines as the statuses that they have elsewhere. A type that is not listed may
# pass: the guide says to send again unchanged whatever is not an invalid request.
_STATUS = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "timeout_error": 504,
    "overloaded_error": 529,
}


def parse_lines(lines: Iterable[bytes]) -> pl.DataFrame:
    """Result lines as one frame (REPLY_SCHEMA)."""
    return rows(lines, _line_decoder, _read_line)


def custom_ids_of(lines: Iterable[bytes]) -> Iterator[str]:
    """The custom_ids of result lines, ours and others."""
    for line in decoded(lines, _line_decoder):
        yield line.custom_id


def _read_line(line: _Line) -> Reply:
    result = line.result or _Result()
    if result.type == "succeeded":
        return read_reply(200, bytes(result.message))
    if result.type == "errored":
        raw = bytes(result.error)
        return read_reply(_STATUS.get(_failure_of(raw).type or "", 500), raw)
    if result.type in _NEVER_RAN:
        return never_ran(_NEVER_RAN[result.type], "the batch ended before this request ran", b"")
    return failed(422, "unreadable_reply", f"a result of type {result.type!r}", b"")


def read_reply(status: int, raw: bytes) -> Reply:
    """One reply of the endpoint, whatever its status, as a row."""
    if status != 200:
        failure = _failure_of(raw)
        kind = error_kind(failure.type, failure.code, failure.message)
        return failed(status, kind or f"http_{status}", failure.message, raw)
    try:
        message = decode(raw, _message_decoder)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return failed(422, "unreadable_reply", "the reply is not a message", raw)
    return _answered(message, raw)


def _failure_of(raw: bytes) -> _Failure:
    try:
        error = decode(raw, _error_decoder).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        error = None
    if isinstance(error, _Failure):
        return error
    return _Failure(message=error or raw[:200].decode(errors="replace"))


def error_kind(type_: str | None, code: str | None, message: Any) -> str | None:
    """The name of an error: its code where it has one, else its type.

    Two things that concern the account come under types of the request, told apart by their message
    alone: an unknown model, and an empty balance.
    """
    said = message if isinstance(message, str) else ""
    if type_ == "not_found_error" and said.startswith("model:"):
        return "model_not_found"
    if type_ == "invalid_request_error" and "credit balance is too low" in said:
        return "billing_error"
    return code or type_


def _answered(message: _Message, raw: bytes) -> Reply:
    usage = message.usage or _Usage()
    reason = message.stop_reason
    text, said = _text(message.content), None
    if reason == "refusal":
        # What was written before the refusal is not an answer; it stays readable beside it.
        details = message.stop_details or _StopDetails()
        said, text = details.explanation or details.category or text, None
    elif reason == "tool_use":
        text = None
    return {
        "state": DONE,
        "text": text,
        "error_message": said,
        "finish_reason": reason,
        "input_tokens": _input_tokens(usage),
        "cached_input_tokens": usage.cache_read_input_tokens,
        "cache_write_tokens": usage.cache_creation_input_tokens,
        "cache_write_1h_tokens": (usage.cache_creation or _CacheWrites()).ephemeral_1h_input_tokens,
        "output_tokens": usage.output_tokens,
        "service_tier": word(usage.service_tier),
        "inference_geo": word(usage.inference_geo),
        "model": message.model,
        "body": raw,
    }


def _text(content: list[_Block]) -> str | None:
    """All text blocks joined; thinking and tool blocks are not text."""
    parts = [b.text for b in content if b.type == "text" and isinstance(b.text, str)]
    return "".join(parts) if parts else None


def _input_tokens(usage: _Usage) -> int | None:
    """All tokens that were read: the API counts cached ones beside ``input_tokens``."""
    if usage.input_tokens is None:
        return None
    cached = (usage.cache_creation_input_tokens or 0) + (usage.cache_read_input_tokens or 0)
    return usage.input_tokens + cached
