"""Which JSON schemas the providers refuse: OpenAI's strict mode and Anthropic's structured output.

A request with a refused schema fails like any other bad request, so that a schema which would be
refused in production is refused in a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec

from .dialogue import refuse

_OPENAI_UNSUPPORTED = (
    "allOf",
    "not",
    "dependentRequired",
    "dependentSchemas",
    "if",
    "then",
    "else",
    "default",
    "oneOf",
    "patternProperties",
    "uniqueItems",
)
_ANTHROPIC_UNSUPPORTED = (
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "maxItems",
    "uniqueItems",
    "oneOf",
    "not",
    "if",
    "patternProperties",
)
_MOST_OPTIONAL = 24
_MOST_UNIONS = 16
_DEEPEST = 10

_encode = msgspec.json.encode
_decode = msgspec.json.decode


def check_references(schema: dict[str, Any], param: str) -> None:
    """Refuse a reference that leads nowhere."""
    wanted = _lost_reference(_encode(schema))
    if wanted is not None:
        raise refuse(f"Invalid schema in '{param}': cannot resolve reference '{wanted}'.")


def resolve(root: Any, reference: str) -> Any:
    """What a reference inside a schema points at. Raises LookupError."""
    node = root
    for step in reference.lstrip("#/").split("/"):
        key = step.replace("~1", "/").replace("~0", "~")
        node = node[key] if key else node
    return node


def check_openai_schema(schema: dict[str, Any], name: str, param: str) -> None:
    """Refuse what strict mode refuses."""
    complaint = _openai_complaint(_encode(schema))
    if complaint is not None:
        message = f"Invalid schema for response_format '{name}': {complaint}"
        raise refuse(message, code="invalid_json_schema", param=param)


def check_anthropic_schema(schema: dict[str, Any]) -> None:
    """Refuse what structured outputs refuse."""
    complaint = _anthropic_complaint(_encode(schema))
    if complaint is not None:
        raise refuse(f"output_config.format.schema: {complaint}")


# Fifty thousand rows share one schema: judge it once.
@lru_cache(maxsize=64)
def _openai_complaint(encoded: bytes) -> str | None:
    schema = _decode(encoded)
    if schema.get("type") != "object":
        return "schema must be a JSON Schema of 'type: \"object\"', got a root of another type."
    for path, depth, node in _nodes(schema):
        if depth > _DEEPEST:
            return f"In context={path}, more than {_DEEPEST} levels of nesting."
        for word in _OPENAI_UNSUPPORTED:
            if word in node:
                return f"In context={path}, '{word}' is not permitted."
        complaint = _openai_object_complaint(path, node)
        if complaint is not None:
            return complaint
    return None


def _openai_object_complaint(path: str, node: dict[str, Any]) -> str | None:
    if "object" not in _types(node) and "properties" not in node:
        return None
    if node.get("additionalProperties") is not False:
        return f"In context={path}, 'additionalProperties' is required to be false."
    if missing := node.get("properties", {}).keys() - set(node.get("required", [])):
        names = ", ".join(sorted(missing))
        return f"In context={path}, 'required' must include every property. Missing: {names}."
    return None


@lru_cache(maxsize=64)
def _anthropic_complaint(encoded: bytes) -> str | None:
    schema = _decode(encoded)
    optional = unions = 0
    for path, _, node in _nodes(schema):
        complaint = _anthropic_node_complaint(node)
        if complaint is not None:
            return f"For path {path}, {complaint}"
        if "object" in _types(node):
            optional += len(node.get("properties", {}).keys() - set(node.get("required", [])))
        unions += "anyOf" in node or len(_types(node)) > 1
    if optional > _MOST_OPTIONAL:
        return f"too many optional parameters ({optional}, at most {_MOST_OPTIONAL})"
    if unions > _MOST_UNIONS:
        return f"too many parameters with union types ({unions}, at most {_MOST_UNIONS})"
    return _recursion(schema)


def _anthropic_node_complaint(node: dict[str, Any]) -> str | None:
    for word in _ANTHROPIC_UNSUPPORTED:
        if word in node:
            return f"property '{word}' is not supported"
    if node.get("minItems", 0) not in (0, 1):
        return "'minItems' values other than 0 or 1 are not supported"
    if str(node.get("$ref", "#")).split("#")[0]:
        return "external '$ref' is not supported"
    if "object" in _types(node) and node.get("additionalProperties") is not False:
        return "'additionalProperties' must be explicitly set to false"
    return None


@lru_cache(maxsize=64)
def _lost_reference(encoded: bytes) -> str | None:
    schema = _decode(encoded)
    for _, _, node in _nodes(schema):
        try:
            resolve(schema, str(node.get("$ref", "#")))
        except (LookupError, TypeError):
            return str(node["$ref"])
    return None


def _recursion(schema: dict[str, Any]) -> str | None:
    definitions = schema.get("$defs", {})
    uses = {
        name: {str(n["$ref"]).rsplit("/", 1)[-1] for _, _, n in _nodes(node) if "$ref" in n}
        for name, node in definitions.items()
    }
    for name in uses:
        reached, frontier = set[str](), {name}
        while frontier:
            frontier = set[str]().union(*(uses.get(n, set()) for n in frontier)) - reached
            reached |= frontier
        if name in reached:
            return "Circular reference detected in schema definitions"
    return None


def _types(node: dict[str, Any]) -> list[str]:
    kind = node.get("type", [])
    return [kind] if isinstance(kind, str) else list(kind)


def _nodes(schema: dict[str, Any]) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every schema inside a schema: its path, its depth, itself."""
    heap: list[tuple[str, int, Any]] = [("()", 0, schema)]
    while heap:
        path, depth, node = heap.pop()
        if not isinstance(node, dict):
            continue
        yield path, depth, node
        for word in ("properties", "$defs", "definitions"):
            inner = node.get(word, {})
            step = 0 if word != "properties" else 1
            heap += [(f"{path}.{word}.{key}", depth + step, sub) for key, sub in inner.items()]
        for word in ("anyOf", "oneOf", "allOf"):
            heap += [(f"{path}.{word}", depth, sub) for sub in node.get(word, [])]
        heap.append((f"{path}.items", depth, node.get("items")))
