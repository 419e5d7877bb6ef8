"""Markers: words in double brackets in a prompt that decide how it is answered.

=====================  ============================================================================
``[[fail:STATUS]]``    an error with this HTTP status
``[[fail:STATUS:N]]``  the same, for the first N times that this body is sent; then an answer
``[[expire]]``         in a batch: not answered before the batch expired; realtime: status 504
``[[expire:N]]``       the same, for the first N times
``[[refuse]]``         the model refuses
``[[content_filter]]`` cut by the content filter (Anthropic: a refusal)
``[[length]]``         cut by the token limit
``[[empty]]``          an answer without text
``[[tool]]``           a tool call: the request's first tool, or one called ``lookup``
``[[say:TEXT]]``       exactly this text
``[[separators]]``     text with raw U+2028, U+2029, U+0085 and a line feed in it
``[[case]]``           the usual answer with its letters in the other case
``[[not_json]]``       text that is no JSON, whatever the schema asks for
=====================  ============================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

from .dialogue import Failure, ModelRequest, Reply, ToolCall
from .reading import summary
from .structured import conforming

_MARKER = re.compile(r"\[\[([a-z_]+)(?::([^\]]*))?\]\]")
SEPARATORS = "one\u2028two\u2029three\u0085four\nfive"


def marked(request: ModelRequest, attempt: Callable[[str], int]) -> Reply | None:
    """The reply that a marker in the prompt asks for; None if there is none."""
    if "[[" not in request.prompt:
        return None
    found = _MARKER.search(request.prompt)
    if found is None or found[1] not in _ANSWERS:
        return None
    return _ANSWERS[found[1]](request, found[2] or "", attempt)


def without_markers(prompt: str) -> str:
    return _MARKER.sub("", prompt) if "[[" in prompt else prompt


def _fail(request: ModelRequest, argument: str, attempt: Callable[[str], int]) -> Reply | None:
    status, _, times = argument.partition(":")
    if times and attempt(request.digest) >= int(times):
        return None
    message = f"The prompt asked for an error with status {status}."
    return Reply(failure=Failure(status=int(status), message=message))


def _expire(request: ModelRequest, argument: str, attempt: Callable[[str], int]) -> Reply | None:
    if argument and attempt(request.digest) >= int(argument):
        return None
    if request.mode == "batch":
        return Reply(expired=True)
    return Reply(failure=Failure(status=504, message="The request timed out."))


def _usual(request: ModelRequest) -> str:
    if request.schema is not None:
        return conforming(request.schema, without_markers(request.prompt))
    return summary(without_markers(request.prompt))


def _length(request: ModelRequest, *_: Any) -> Reply:
    text = _usual(request)
    return Reply(texts=[text[: max(1, len(text) // 2)]], finish="length")


def _tool(request: ModelRequest, *_: Any) -> Reply:
    tools = request.body.get("tools") or [{"name": "lookup"}]
    tool = tools[0].get("function", tools[0])
    schema = tool.get("parameters") or tool.get("input_schema")
    prompt = without_markers(request.prompt).strip()
    if not schema:
        return Reply(tools=[ToolCall(tool["name"], {"query": prompt})])
    return Reply(tools=[ToolCall(tool["name"], msgspec.json.decode(conforming(schema, prompt)))])


_ANSWERS: dict[str, Callable[[ModelRequest, str, Callable[[str], int]], Reply | None]] = {
    "fail": _fail,
    "expire": _expire,
    "refuse": lambda *_: Reply(texts=["I can't help with that."], finish="refusal"),
    "content_filter": lambda *_: Reply(texts=[], finish="content_filter"),
    "length": _length,
    "empty": lambda *_: Reply(texts=[""], finish="stop"),
    "tool": _tool,
    "say": lambda _, argument, __: Reply(texts=[argument]),
    "separators": lambda *_: Reply(texts=[SEPARATORS]),
    "case": lambda request, *_: Reply(texts=[_usual(request).swapcase()]),
    "not_json": lambda *_: Reply(texts=["{This is no JSON"]),
}
