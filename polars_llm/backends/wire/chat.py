"""The Chat Completions wire form: options -> body, replies -> answers. Pure; no SDK, no network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply, decode, word
from polars_llm.backends.wire import lines
from polars_llm.backends.wire.lines import merged, not_read, read_error
from polars_llm.images import Image, Link, of_rows, with_parts
from polars_llm.request import Json, RequestHeader, Requests

__all__ = ["ENDPOINT", "body", "read_reply", "render"]

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
    ours = _OURS | ({"response_format"} if options.schema else set())
    return merged(fields, options, ours)


def render(requests: Requests) -> Iterator[bytes]:
    """Request lines of a batch file, in the order of the rows."""
    return lines.render(requests, _messages, _tails)


_FORMAT = (
    b',"response_format":{"type":"json_schema","json_schema":{"name":"answer","strict":true,"schema":%b}}'
)


def _messages(part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    columns = (part["prompt"].to_list(), part["kind"].to_list(), part["system"].to_list(), of_rows(part))
    for prompt, kind, system, images in zip(*columns, strict=True):
        first = b"" if system is None else b'{"role":"system","content":' + encode(system) + b"},"
        if images:
            said = with_parts(kind, prompt, images, _parts)
            yield b'"messages":[' + first + encode(said)[1:]
        elif kind == "m":
            yield b'"messages":[' + first + prompt.encode()[1:]
        else:
            yield b'"messages":[' + first + b'{"role":"user","content":' + encode(prompt) + b"}]"


def _parts(text: str, images: Sequence[Image | Link]) -> list[dict[str, Any]]:
    """The content of a message with images: the text first, as in OpenAI's guide."""
    return [
        {"type": "text", "text": text},
        *({"type": "image_url", "image_url": {"url": image.url}} for image in images),
    ]


def _tails(header: RequestHeader, part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    fields, seed = header.body, header.body.get("seed")
    # The schema is spliced in as text: encoding it again would lose the order of its properties.
    last = b"}" if header.schema is None else _FORMAT % header.schema.encode() + b"}"
    for sample in part["sample"].to_list():
        # A seed fixes the answer: asking again means asking with the next one.
        row = {**fields, "seed": seed + sample} if isinstance(seed, int) and sample else fields
        yield (b"," + encode(row)[1:-1] if row else b"") + last


# --- replies ------------------------------------------------------------------------------------


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
    service_tier: Any = None


_chat_decoder = msgspec.json.Decoder(_Chat)


def read_reply(status: int, raw: bytes) -> Reply:
    """One reply of the endpoint, whatever its status, as a row."""
    if status != 200:
        return read_error(status, raw)
    try:
        chat = decode(raw, _chat_decoder)
        choice = chat.choices[0]
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        return not_read("a chat completion", raw)
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
        "service_tier": word(chat.service_tier),
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
