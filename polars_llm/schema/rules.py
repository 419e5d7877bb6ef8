"""What a provider takes of a schema: its limits, and which constraints it enforces.

Constraints that a provider does not take are said in the field's description, as its own SDK does; they are
checked in any case when the answer is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec

from polars_llm.schema.shapes import refuse

__all__ = ["ANTHROPIC", "OPENAI", "VLLM", "Rules", "worded"]

_RULES = frozenset(
    {
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "exclusiveMinimum",
        "maximum",
        "exclusiveMaximum",
        "multipleOf",
        "minItems",
        "maxItems",
    }
)
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"},
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What one provider takes; None is no limit that is known.

    Parameters
    ----------
    constraints, formats
        Sent as they are; others go into the description.
    least_items
        Values of ``minItems`` that are sent as they are, None for all.
    depth
        Objects in objects, the outermost included.
    characters
        Of all names and enum values together.
    """

    provider: str
    constraints: frozenset[str]
    formats: frozenset[str]
    least_items: frozenset[int] | None = None
    depth: int | None = None
    properties: int | None = None
    characters: int | None = None
    enum_values: int | None = None
    unions: int | None = None


# Sources: developers.openai.com structured outputs; platform.claude.com structured outputs.
OPENAI = Rules(
    provider="OpenAI",
    constraints=_RULES - {"minLength", "maxLength"},
    formats=_FORMATS,
    depth=10,
    properties=5_000,
    characters=120_000,
    enum_values=1_000,
)
ANTHROPIC = Rules(
    provider="Anthropic",
    constraints=frozenset({"format", "minItems"}),
    formats=_FORMATS | {"uri"},
    least_items=frozenset({0, 1}),
    unions=16,
)
# xgrammar 0.2 as vLLM 0.32 takes it (v1/structured_output/backend_xgrammar.py): no multipleOf, and no pattern
# beside a length.
VLLM = Rules(
    provider="vLLM",
    constraints=_RULES - {"minLength", "maxLength", "multipleOf"},
    formats=_FORMATS | {"uri"},
)

# OpenAI: an enum of more than 250 values may have 15,000 characters.
_LONG_ENUM, _LONG_ENUM_CHARACTERS = 250, 15_000


def worded(schema: str, rules: Rules) -> str:
    """Our strict form as a provider takes it: the text that goes on the wire, and into the key.

    Raises
    ------
    InvalidRequest
        At call: it passes one of the provider's limits, with the path to the field where there is one.
    """
    tree = msgspec.json.decode(schema)
    _check(list(_nodes(tree, "", 1)), rules)
    return msgspec.json.encode(_said(tree, rules)).decode()


def _said(node: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """The node and those in it, with what the provider does not take in their descriptions."""
    if "anyOf" in node:
        return {**node, "anyOf": [_said(part, rules) for part in node["anyOf"]]}
    told = {name: value for name, value in node.items() if name in _RULES and not _takes(rules, name, value)}
    kept = {name: value for name, value in node.items() if name not in told}
    if "properties" in kept:
        kept["properties"] = {name: _said(inner, rules) for name, inner in kept["properties"].items()}
    if "items" in kept:
        kept["items"] = _said(kept["items"], rules)
    if not told:
        return kept
    listed = ", ".join(f"{name} {value}" for name, value in told.items())
    said = f"{kept.pop('description')} " if "description" in kept else ""
    return {"description": f"{said}({listed})", **kept}


def _takes(rules: Rules, name: str, value: Any) -> bool:
    if name == "format" and value not in rules.formats:
        return False
    if name == "minItems" and rules.least_items is not None and value not in rules.least_items:
        return False
    return name in rules.constraints


def _nodes(node: dict[str, Any], path: str, depth: int) -> Iterator[tuple[str, int, dict[str, Any]]]:
    yield path, depth, node
    for part in node.get("anyOf", ()):
        yield from _nodes(part, path, depth)
    for name, inner in node.get("properties", {}).items():
        yield from _nodes(inner, f"{path}.{name}" if path else name, depth + 1)
    if "items" in node:
        yield from _nodes(node["items"], f"{path}[]", depth)


def _check(nodes: list[tuple[str, int, dict[str, Any]]], rules: Rules) -> None:
    names = [name for _, _, node in nodes for name in node.get("properties", ())]
    labels = [[str(v) for v in node["enum"]] for _, _, node in nodes if "enum" in node]
    values = [label for enum in labels for label in enum]
    unions = [path for path, _, node in nodes if "anyOf" in node]
    most = f"{rules.provider} takes at most"
    for path, depth, node in nodes:
        if rules.depth is not None and depth > rules.depth and "properties" in node:
            refuse(path, f"lies {depth} levels deep; {most} {rules.depth}.", "make it flatter.")
        long = [str(v) for v in node.get("enum", ())]
        if (
            rules.enum_values is not None
            and len(long) > _LONG_ENUM
            and len("".join(long)) > _LONG_ENUM_CHARACTERS
        ):
            refuse(
                path,
                f"has {len(long)} labels of {len(''.join(long)):,} characters; {most}"
                f" {_LONG_ENUM_CHARACTERS:,} for so many.",
                "use fewer or shorter labels.",
            )
    counts = {
        "properties": (len(names), rules.properties, "use fewer fields."),
        "characters of names and labels": (
            len("".join(names + values)),
            rules.characters,
            "use shorter ones.",
        ),
        "labels in all enums": (len(values), rules.enum_values, "use fewer labels."),
        "fields that may be null": (len(unions), rules.unions, "make some of them never null."),
    }
    for what, (count, limit, hint) in counts.items():
        if limit is not None and count > limit:
            refuse("", f"has {count:,} {what}; {most} {limit:,}.", hint)
