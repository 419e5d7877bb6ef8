"""JSON Schema -> shapes: the part of it that strict structured output knows and that has a dtype."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from polars_llm.schema.dtypes import named
from polars_llm.schema.shapes import Fields, Items, Leaf, Shape, refuse, rules_of

__all__ = ["choices", "looks_like", "root_of"]

# JSON type and format -> dtype; other formats stay text. `docs/schema.md` shows them.
_LEAVES: dict[tuple[str, str | None], pl.DataType] = {
    ("string", None): pl.String(),
    ("string", "date"): pl.Date(),
    ("string", "date-time"): pl.Datetime("us", "UTC"),
    ("string", "time"): pl.Time(),
    ("string", "duration"): pl.Duration("us"),
    ("boolean", None): pl.Boolean(),
    ("integer", None): pl.Int64(),
    ("number", None): pl.Float64(),
}

_RULES = (
    "minLength",
    "maxLength",
    "pattern",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
)
_MEANING = {"type", "properties", "required", "additionalProperties", "items", "enum", "const", "format"}
_WRAPPERS = ("$ref", "anyOf", "oneOf", "allOf")
# They say nothing about which values fit.
_ANNOTATIONS = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
}
# Beside a wrapper these say nothing that is not said inside of it.
_BESIDE = {*_ANNOTATIONS, "type", "additionalProperties"}
_KNOWN = {*_RULES, *_MEANING, *_WRAPPERS, *_ANNOTATIONS}


def looks_like(schema: Mapping[str, Any]) -> bool:
    """Whether a dict is a JSON Schema, and not names and dtypes."""
    return (
        isinstance(schema.get("type"), (str, list))
        or isinstance(schema.get("properties"), Mapping)
        or any(isinstance(schema.get(word), (str, list)) for word in _WRAPPERS)
    )


def root_of(schema: Mapping[str, Any]) -> Shape:
    """The shape of a whole schema."""
    return _Reader(schema).shape(schema, "", ())


def choices(values: Sequence[Any], path: str) -> Leaf:
    """One of these: labels land in an Enum of exactly them, whole numbers in Int64."""
    nullable = None in values
    given = tuple(value for value in values if value is not None)
    if any(isinstance(value, (list, dict)) for value in given):
        refuse(path, "is one of lists or objects.", "use texts, or whole numbers.")
    if len(set(given)) < len(given):
        refuse(path, "names a value twice.", "name each once.")
    if given and all(type(value) is int and abs(value) < 2**63 for value in given):
        return Leaf(kind="integer", dtype=pl.Int64(), choices=given, nullable=nullable)
    if not given or not all(isinstance(value, str) for value in given):
        said = ", ".join(map(repr, given[:5])) or "nothing"
        refuse(path, f"is one of {said}: not texts, and not whole numbers.", "use one kind of value.")
    labels = tuple(str.__str__(value) for value in given)
    if any(0xD800 <= ord(c) < 0xE000 for label in labels for c in label):
        refuse(path, "has a label with a lone surrogate, which is not Unicode text.", "decode it first.")
    return Leaf(kind="string", dtype=pl.Enum(labels), choices=labels, nullable=nullable)


class _Reader:
    """Reads one schema; knows its root, where references point."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root

    def shape(self, node: Any, path: str, above: tuple[str, ...]) -> Shape:
        if not isinstance(node, Mapping):
            refuse(path, f"is {node!r}, not a schema.", "write {'type': ...}.")
        for word in node:
            if word not in _KNOWN:
                refuse(
                    path, f"has {word!r}, which strict structured output cannot say.", f"leave {word} out."
                )
        shape = self._wrapped(node, path, above)
        said = node.get("description")
        return dataclasses.replace(shape, description=said) if isinstance(said, str) and said else shape

    def _wrapped(self, node: Mapping[str, Any], path: str, above: tuple[str, ...]) -> Shape:
        wrapper = next((word for word in _WRAPPERS if word in node), None)
        if wrapper is None:
            return self._plain(node, path, above)
        beside = next((word for word in node if word != wrapper and word not in _BESIDE), None)
        if beside is not None:
            refuse(
                path,
                f"has {beside!r} beside {wrapper!r}, which has no strict form.",
                f"write all of it in one place, without {wrapper}.",
            )
        if wrapper != "$ref":
            return self._union(wrapper, node[wrapper], path, above)
        reference = node["$ref"]
        if reference in above:
            refuse(
                path,
                f"is {reference!r} again, inside itself.",
                "a dtype is finite: write the levels out.",
            )
        return self.shape(self._resolved(reference, path), path, (*above, reference))

    def _resolved(self, reference: Any, path: str) -> Any:
        node: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#/"):
            refuse(path, f"refers to {reference!r}, outside of the schema.", "put it under $defs.")
        try:
            for step in reference.removeprefix("#/").split("/"):
                node = node[step.replace("~1", "/").replace("~0", "~")]
        except (KeyError, TypeError):
            refuse(path, f"refers to {reference!r}, which is not there.", "put it under $defs.")
        return node

    def _union(self, word: str, parts: Any, path: str, above: tuple[str, ...]) -> Shape:
        if not isinstance(parts, Sequence) or isinstance(parts, str):
            refuse(path, f"has {word} {parts!r}, which is no list.", "list the schemas.")
        rest = [part for part in parts if part != {"type": "null"}]
        if len(rest) > 1 and word == "allOf":
            refuse(path, "is several schemas at once (allOf).", "write them as one, without allOf.")
        if len(rest) != 1:
            refuse(path, "may have several types, and a column has one.", "keep one of them, and null.")
        shape = self.shape(rest[0], path, above)
        return dataclasses.replace(shape, nullable=shape.nullable or len(rest) < len(parts))

    def _plain(self, node: Mapping[str, Any], path: str, above: tuple[str, ...]) -> Shape:
        kind, nullable = _kind(node, path)
        if "enum" in node or "const" in node:
            shape: Shape = _choice(kind, node, path)
        elif kind == "object":
            shape = self._object(node, path, above)
        elif kind == "array":
            shape = self._array(node, path, above)
        else:
            shape = _leaf(kind, node, path)
        return dataclasses.replace(shape, nullable=shape.nullable or nullable)

    def _object(self, node: Mapping[str, Any], path: str, above: tuple[str, ...]) -> Fields:
        if node.get("additionalProperties", False) is not False:
            refuse(path, "is open for other properties.", "set additionalProperties to false, or use a list.")
        properties = node.get("properties") or refuse(path, "has no properties.", "name at least one.")
        if not isinstance(properties, Mapping):
            refuse(path, f"has properties {properties!r}, which is no dict.", "map names to schemas.")
        required = node.get("required", [])
        if not isinstance(required, Sequence) or isinstance(required, str):
            refuse(path, f"has required {required!r}, which is no list.", "list names of properties.")
        for name in required:
            if name not in properties:
                refuse(path, f"requires {name!r}, which is none of its properties.", "mend the name.")
        fields = []
        for name, inner in properties.items():
            shape = self.shape(inner, named(path, name), above)
            # Strict schemas require every property; one that may be absent is one that may be null.
            fields.append((name, shape if name in required else dataclasses.replace(shape, nullable=True)))
        return Fields(fields=tuple(fields))

    def _array(self, node: Mapping[str, Any], path: str, above: tuple[str, ...]) -> Items:
        if "items" not in node:
            refuse(path, "is an array of anything.", "say of what, with items.")
        inner = self.shape(node["items"], f"{path}[]", above)
        return Items(inner=inner, rules=rules_of("array", _rules(node), path))


def _choice(kind: str, node: Mapping[str, Any], path: str) -> Leaf:
    values = node["enum"] if "enum" in node else [node["const"]]
    if not isinstance(values, Sequence) or isinstance(values, str):
        refuse(path, f"has enum {values!r}, which is no list.", "list the values.")
    leaf = choices(values, path)
    if kind not in ("", leaf.kind):
        refuse(path, f"has the type {kind!r}, and values that are {leaf.kind}s.", "mend one of the two.")
    return leaf


def _kind(node: Mapping[str, Any], path: str) -> tuple[str, bool]:
    kinds = node.get("type", "object" if "properties" in node else None)
    if kinds is None and ("enum" in node or "const" in node):
        return "", False
    if not isinstance(kinds, (str, list, tuple, types.NoneType)):
        refuse(path, f"has the type {kinds!r}, which JSON Schema does not have.", "see docs/schema.md.")
    listed = [kinds] if isinstance(kinds, str) else list(kinds or ())
    rest = [kind for kind in listed if kind != "null"]
    if len(rest) != 1:
        said = "several types" if rest else "no type"
        refuse(path, f"has {said}, and a column has one.", "keep one of them, and null.")
    return rest[0], len(rest) < len(listed)


def _leaf(kind: str, node: Mapping[str, Any], path: str) -> Leaf:
    format_ = node.get("format")
    if not isinstance(format_, (str, types.NoneType)):
        refuse(path, f"has format {format_!r}, which is no text.", "for example 'date-time'.")
    if (kind, None) not in _LEAVES:
        refuse(path, f"has the type {kind!r}, which JSON Schema does not have.", "see docs/schema.md.")
    dtype = _LEAVES.get((kind, format_), _LEAVES[kind, None])
    return Leaf(
        kind=kind,
        format=format_ if kind == "string" else None,
        dtype=dtype,
        rules=rules_of(kind, _rules(node), path),
    )


def _rules(node: Mapping[str, Any]) -> dict[str, Any]:
    return {word: node[word] for word in _RULES if word in node}
