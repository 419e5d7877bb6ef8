"""A JSON value that obeys a schema, the same one for the same prompt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import msgspec

from .reading import summary, tone, words
from .schema_rules import resolve

_DEEPEST = 8
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_FORMATS = {
    "date-time": "2026-11-21T12:00:00Z",
    "date": "2026-11-21",
    "time": "12:00:00Z",
    "duration": "P1D",
    "email": "someone@example.com",
    "hostname": "example.com",
    "uri": "https://example.com/",
    "ipv4": "192.0.2.1",
    "ipv6": "2001:db8::1",
    "uuid": "123e4567-e89b-42d3-a456-426614174000",
}
_TONES = {1: ("positive", "good", "praise", "happy"), -1: ("negative", "bad", "complaint", "angry")}


def conforming(schema: dict[str, Any], prompt: str) -> str:
    """The JSON text of a value that obeys `schema`."""
    return msgspec.json.encode(_Writer(schema, prompt).value(schema, "", 0)).decode()


class _Writer:
    def __init__(self, root: dict[str, Any], prompt: str) -> None:
        self._root = root
        self._prompt = prompt
        self._folded = prompt.casefold()

    def value(self, schema: Any, name: str, depth: int) -> Any:
        schema = self._simple(schema, depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._choice(schema["enum"], name)
        kind = schema.get("type", "object" if "properties" in schema else "string")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        writer = _WRITERS.get(kind)
        return None if writer is None else writer(self, schema, name, depth)

    def _simple(self, schema: Any, depth: int) -> dict[str, Any]:
        """The schema behind references, unions and intersections."""
        while isinstance(schema, dict):
            if "$ref" in schema:
                schema = resolve(self._root, schema["$ref"])
            elif "anyOf" in schema or "oneOf" in schema:
                schema = self._branch(schema.get("anyOf") or schema["oneOf"], depth)
            elif "allOf" in schema:
                schema = self._merged(schema)
            else:
                return schema
        return {"type": "string"}

    def _branch(self, branches: list[Any], depth: int) -> Any:
        """The first branch that isn't null; null when it gets too deep, so that recursion ends."""
        nulls = [b for b in branches if b.get("type") == "null"]
        if depth >= _DEEPEST and nulls:
            return nulls[0]
        return next((b for b in branches if b.get("type") != "null"), branches[0])

    def _merged(self, schema: dict[str, Any]) -> dict[str, Any]:
        merged = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            inner = resolve(self._root, part["$ref"]) if "$ref" in part else part
            properties = {**merged.get("properties", {}), **inner.get("properties", {})}
            merged = {**merged, **inner}
            if properties:
                merged["properties"] = properties
        return merged

    def _object(self, schema: dict[str, Any], _: str, depth: int) -> dict[str, Any]:
        required = set(schema.get("required", ()))
        return {
            key: self.value(inner, key, depth + 1)
            for key, inner in schema.get("properties", {}).items()
            if key in required or depth < _DEEPEST
        }

    def _array(self, schema: dict[str, Any], name: str, depth: int) -> list[Any]:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if depth >= _DEEPEST and not least:
            return []
        size = max(least, 2)
        size = size if most is None else min(size, most)
        items = schema.get("items", {})
        choices = self._enum_of(items)
        if choices and not least:
            named = [c for c in choices if str(c).casefold() in self._folded][:most]
            return named or [self._choice(choices, name)][:most]
        return [self.value(items, f"{name}{index or ''}", depth + 1) for index in range(size)]

    def _enum_of(self, items: Any) -> list[Any]:
        while isinstance(items, dict) and "$ref" in items:
            items = resolve(self._root, items["$ref"])
        return list(items.get("enum", [])) if isinstance(items, dict) else []

    def _choice(self, choices: list[Any], name: str) -> Any:
        """The value that the prompt names most often; else one with its tone; else a fixed one."""
        counts = [
            (self._folded.count(str(choice).casefold()) if choice is not None else 0) for choice in choices
        ]
        most = max(counts)
        if most and counts.count(most) == 1:
            return choices[counts.index(most)]
        mood = tone(self._prompt)
        for choice in choices if mood else ():
            if str(choice).casefold() in _TONES[1 if mood > 0 else -1]:
                return choice
        if most == 0 and (neutral := [c for c in choices if c in ("neutral", "other", "Other")]):
            return neutral[0]
        return choices[self._dice(name) % len(choices)]

    def _string(self, schema: dict[str, Any], name: str, _: int) -> str:
        if (format_ := schema.get("format")) in _FORMATS:
            return _FORMATS[format_]
        if "pattern" in schema:
            return self._matching(schema["pattern"])
        text = self._text(name)
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        text = text if len(text) >= least else text.ljust(least, ".")
        return text if most is None else text[:most]

    def _text(self, name: str) -> str:
        """Something the prompt says: a telling sentence, or for a later item a word of it."""
        position = re.search(r"(\d+)$", name)
        found = words(self._prompt)
        if position and found:
            return found[int(position[1]) % len(found)]
        return summary(self._prompt)

    def _matching(self, pattern: str) -> str:
        """A word of the prompt that matches, or something built from the pattern's simple parts."""
        regex = re.compile(pattern)
        for candidate in (*self._prompt.split(), *_FORMATS.values(), "A", "a", "A1", "0", "AB-12"):
            if regex.search(candidate):
                return candidate
        return _spelled(pattern)

    def _number(self, schema: dict[str, Any], name: str, *, whole: bool) -> float:
        low = schema.get("minimum", schema.get("exclusiveMinimum"))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        step = schema.get("multipleOf") or (1 if whole else 0.5)
        found = (float(text) for text in _NUMBER.findall(self._prompt[:2_000]))
        for number in found:
            if _within(number, schema) and (number / step).is_integer():
                return number
        if low is None:
            low = 0 if high is None else high - 10 * step
        start = -(-low // step) * step
        room = 10 if high is None else max(1, int((high - start) / step) + 1)
        number = start + (self._dice(name) % room) * step
        while not _within(number, schema) and number <= start + room * step:
            number += step
        return number if _within(number, schema) else start + step

    def _integer(self, schema: dict[str, Any], name: str, _: int) -> int:
        return int(self._number(schema, name, whole=True))

    def _float(self, schema: dict[str, Any], name: str, _: int) -> float:
        return self._number(schema, name, whole=False)

    def _boolean(self, _: dict[str, Any], name: str, __: int) -> bool:
        return bool(self._dice(name) % 2)

    def _dice(self, name: str) -> int:
        digest = hashlib.blake2b(f"{name}\0{self._prompt}".encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big")


_WRITERS: dict[str, Callable[[_Writer, dict[str, Any], str, int], Any]] = {
    "object": _Writer._object,
    "array": _Writer._array,
    "string": _Writer._string,
    "integer": _Writer._integer,
    "number": _Writer._float,
    "boolean": _Writer._boolean,
}


def _within(number: float, schema: dict[str, Any]) -> bool:
    return bool(
        number >= schema.get("minimum", number)
        and number <= schema.get("maximum", number)
        and ("exclusiveMinimum" not in schema or number > schema["exclusiveMinimum"])
        and ("exclusiveMaximum" not in schema or number < schema["exclusiveMaximum"])
    )


_SPELLING = re.compile(r"\\d|\\w|\[([^\]]+)\]|[\w@ /.-]")
_REPEAT = re.compile(r"\{(\d+)(?:,\d*)?\}")


def _spelled(pattern: str) -> str:
    """Spell a simple pattern: literals, classes and counts. Anything else is left out."""
    out, at = "", 0
    while at < len(pattern):
        found = _SPELLING.match(pattern, at)
        if found is None:
            at += 1
            continue
        char = {"\\d": "1", "\\w": "a"}.get(found[0], (found[1] or found[0])[0])
        at = found.end()
        count = _REPEAT.match(pattern, at)
        out += char * (int(count[1]) if count else 1)
        at = count.end() if count else at
    return out
