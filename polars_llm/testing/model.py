"""The built-in model: deterministic, readable, instant. It summarises, obeys schemas, embeds."""

from __future__ import annotations

import hashlib
import math
from array import array
from functools import lru_cache

import msgspec

from .dialogue import ModelRequest, Reply, ToolCall, count_tokens
from .markers import without_markers
from .openai_input import embedding_dimensions
from .reading import summary, words
from .structured import conforming

_WORD_PLACES = 12
_MOST_WORDS = 400


class BuiltInModel:
    """Answers from the request alone: the same request always gets the same answer."""

    def answer(self, requests: list[ModelRequest]) -> list[Reply]:
        return [_reply(request) for request in requests]


def _reply(request: ModelRequest) -> Reply:
    if request.endpoint == "/v1/embeddings":
        size = embedding_dimensions(request.body)
        return Reply(vectors=[embedding(text, size) for text in request.inputs])
    prompt = without_markers(request.prompt)
    if request.schema is not None:
        return Reply(texts=[conforming(request.schema, prompt)])
    if forced := _forced_tool(request):
        return Reply(tools=[forced])
    if request.json_only:
        return Reply(texts=[conforming(_ANY_OBJECT, prompt)])
    return Reply(texts=[_fitting(summary(prompt), request.max_tokens)])


_ANY_OBJECT = {"type": "object", "properties": {"answer": {"type": "string"}}}


def _fitting(text: str, limit: int | None) -> str:
    """The text, or as many of its words as the limit takes. A limit below a word still cuts."""
    if limit is None or count_tokens(text) <= limit:
        return text
    kept = text.encode()[: limit * 4 - 3].decode(errors="ignore").rpartition(" ")[0]
    return f"{kept}…" if kept else text


def _forced_tool(request: ModelRequest) -> ToolCall | None:
    """The call that `tool_choice` insists on."""
    choice, tools = request.body.get("tool_choice"), request.body.get("tools")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if not tools or kind not in ("required", "any", "tool", "function"):
        return None
    named = (choice.get("function") or choice).get("name") if isinstance(choice, dict) else None
    plain = [tool.get("function", tool) for tool in tools]
    tool = next((t for t in plain if t.get("name") == named), plain[0])
    schema = tool.get("parameters") or tool.get("input_schema") or _ANY_OBJECT
    return ToolCall(tool["name"], msgspec.json.decode(conforming(schema, request.prompt)))


@lru_cache(maxsize=50_000)
def _places(word: str) -> tuple[int, ...]:
    return tuple(array("H", hashlib.shake_128(word.encode()).digest(2 * _WORD_PLACES)))


def embedding(text: str, size: int) -> list[float]:
    """A unit vector: texts that share words lie closer together, equal texts are equal."""
    noise = array("h", hashlib.shake_128(text.encode()).digest(2 * size))
    found = words(text)[:_MOST_WORDS]
    # Noise that weighs a tenth of the words tells apart texts with the same words.
    scale = 0.1 * math.sqrt((len(found) + 1) * _WORD_PLACES / size) / 18_918
    vector = [value * scale for value in noise]
    for word in found:
        for place in _places(word):
            vector[(place >> 1) % size] += 1.0 if place & 1 else -1.0
    length = math.hypot(*vector) or 1.0
    return [round(value / length, 7) for value in vector]
