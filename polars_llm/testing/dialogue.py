"""What goes to a model and what comes back: request, reply, failure, and how tokens are counted."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

Finish = Literal["stop", "length", "content_filter", "refusal", "tool_calls", "stop_sequence"]

_sorted = msgspec.json.Encoder(order="sorted")


def count_tokens(text: str) -> int:
    """One token per four UTF-8 bytes, rounded up: the emulator's only tokenizer."""
    return (len(text.encode()) + 3) // 4 if not text.isascii() else (len(text) + 3) // 4


def cut_to_tokens(text: str, limit: int) -> str:
    """The longest beginning of `text` that counts no more than `limit` tokens."""
    return text.encode()[: limit * 4].decode(errors="ignore")


def body_digest(body: Any) -> str:
    """Names a request body by its content, whatever the order of its keys."""
    return hashlib.blake2b(_sorted.encode(body), digest_size=16).hexdigest()


class ModelRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What a model is asked: the argument of a ``model=`` callable.

    Attributes
    ----------
    endpoint
        ``/v1/chat/completions``, ``/v1/responses``, ``/v1/embeddings`` or ``/v1/messages``.
    mode
        ``"batch"`` or ``"realtime"``.
    model
        The name in the request.
    prompt
        The text of the last user message (the first input of an embedding request).
    system
        The system prompt; empty if there is none.
    body
        The whole request body.
    custom_id
        In a batch, the request's custom id.
    max_tokens
        The output limit in the request, if there is one.
    schema
        The JSON schema that the answer must obey, if there is one.
    inputs
        The texts of an embedding request.
    stop
        Stop sequences.
    input_tokens
        What the input counts.
    digest
        The body's digest, as in `Bill.by_digest`.
    """

    endpoint: str
    mode: Literal["batch", "realtime"]
    model: str
    prompt: str
    body: dict[str, Any]
    input_tokens: int
    digest: str
    system: str = ""
    custom_id: str | None = None
    max_tokens: int | None = None
    schema: dict[str, Any] | None = None
    json_only: bool = False
    inputs: list[str] = []
    stop: list[str] = []


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """An error in neither provider's words yet; each protocol has its own shape for it."""

    status: int
    message: str
    type: str | None = None
    code: str | None = None
    param: str | None = None


class Refused(Exception):
    """Answer with this failure."""

    def __init__(self, failure: Failure, headers: dict[str, str] | None = None) -> None:
        super().__init__(failure.message)
        self.failure = failure
        self.headers = headers or {}


def refuse(message: str, *, status: int = 400, code: str | None = None, param: str | None = None) -> Refused:
    return Refused(Failure(status=status, message=message, code=code, param=param))


class ToolCall(msgspec.Struct, frozen=True):
    name: str
    arguments: dict[str, Any]


class Usage(msgspec.Struct, kw_only=True):
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0


class Reply(msgspec.Struct, kw_only=True):
    """What a model said. `texts` are its text blocks: most replies have one."""

    texts: list[str] = []
    finish: Finish | None = None
    tools: list[ToolCall] = []
    vectors: list[list[float]] | None = None
    usage: dict[str, int] = {}
    failure: Failure | None = None
    expired: bool = False
    stopped_by: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


def finished(request: ModelRequest, reply: Reply) -> Reply:
    """Apply what no model decides for itself: stop sequences, then the token limit."""
    if reply.finish is not None or reply.failure is not None or reply.vectors is not None:
        return reply
    reply.finish = "tool_calls" if reply.tools else "stop"
    text = reply.text
    for word in request.stop:
        if word and word in text:
            text, reply.stopped_by = text.partition(word)[0], word
            reply.texts, reply.finish = [text], "stop_sequence"
    limit = request.max_tokens
    if limit is not None and count_tokens(text) > limit:
        reply.texts, reply.finish = [cut_to_tokens(text, limit)], "length"
    return reply


def usage_of(request: ModelRequest, reply: Reply) -> Usage:
    """Tokens in and out, as the reply states them or as they are counted."""
    spoken = sum(map(count_tokens, reply.texts))
    spoken += sum(count_tokens(msgspec.json.encode(t.arguments).decode()) for t in reply.tools)
    stated = reply.usage
    return Usage(
        input_tokens=stated.get("input_tokens", request.input_tokens),
        output_tokens=stated.get("output_tokens", spoken),
        cached_tokens=stated.get("cached_input_tokens", 0),
        cache_write_tokens=stated.get("cache_write_tokens", 0),
        reasoning_tokens=stated.get("reasoning_tokens", 0),
    )


_REPLY_KEYS = {"text", "parts", "json", "finish_reason", "refusal", "tool_calls", "usage", "error"}


def reply_from(value: object, request: ModelRequest) -> Reply:
    """Read what a ``model=`` callable returned.

    A string is the text. A dict may have ``text``, ``parts`` (text blocks), ``json`` (a value,
    sent as JSON text), ``finish_reason``, ``refusal``, ``tool_calls`` (dicts with ``name`` and
    ``arguments``), ``usage`` and ``error`` (a status, or a dict with ``status`` and ``message``).
    A list holds text blocks, or for an embedding request numbers or lists of numbers.
    """
    if isinstance(value, str):
        return Reply(texts=[value])
    if isinstance(value, list) and request.endpoint == "/v1/embeddings":
        vectors = value if value and isinstance(value[0], list) else [value]
        return Reply(vectors=vectors)
    if isinstance(value, list):
        return Reply(texts=[p if isinstance(p, str) else p["text"] for p in value])
    if not isinstance(value, dict) or not value.keys() <= _REPLY_KEYS:
        message = (
            f"a model= callable returned {value!r}\n\n"
            f"Hint: return a string, a list of text blocks, or a dict with some of the keys "
            f"{', '.join(sorted(_REPLY_KEYS))}."
        )
        raise TypeError(message)
    return _reply_from_dict(value, request)


def _reply_from_dict(value: dict[str, Any], request: ModelRequest) -> Reply:
    if (error := value.get("error")) is not None:
        facts = {"status": error} if isinstance(error, int) else dict(error)
        facts.setdefault("message", "the emulated model failed")
        return Reply(failure=Failure(**facts))
    reply = Reply(usage=value.get("usage", {}), finish=value.get("finish_reason"))
    if "parts" in value:
        reply.texts = reply_from(value["parts"], request).texts
    elif "json" in value:
        reply.texts = [msgspec.json.encode(value["json"]).decode()]
    elif "refusal" in value:
        reply.texts, reply.finish = [value["refusal"]], "refusal"
    elif "text" in value:
        reply.texts = [value["text"]]
    reply.tools = [ToolCall(t["name"], t.get("arguments", {})) for t in value.get("tool_calls", [])]
    return reply
