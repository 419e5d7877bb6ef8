"""The shape of a value: a frozen tree that is the same whatever a schema was written in.

Everything else is read off it: our strict JSON Schema (`json_form`), the dtype (`dtype_of`), and the type
that msgspec reads an answer with (`reading`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

import polars as pl

from polars_llm.errors import InvalidRequest

__all__ = ["Fields", "Items", "Leaf", "Rules", "Shape", "dtype_of", "json_form", "refuse", "rules_of"]

Rules: TypeAlias = tuple[tuple[str, Any], ...]
"""Constraints by their names in JSON Schema, in the order of `_KEYWORDS`."""

_KEYWORDS = {
    "string": ("minLength", "maxLength", "pattern"),
    "integer": ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"),
    "number": ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf"),
    "array": ("minItems", "maxItems"),
    "boolean": (),
}

# Each lower bound, and the upper bounds that it must leave room under.
_SIDES = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minimum", "maximum"),
    ("minimum", "exclusiveMaximum"),
    ("exclusiveMinimum", "maximum"),
    ("exclusiveMinimum", "exclusiveMaximum"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A value without parts.

    Parameters
    ----------
    kind
        Its JSON type.
    dtype
        Where it lands.
    format
        JSON Schema's ``format``.
    choices
        The only values that fit.
    """

    kind: str
    dtype: pl.DataType
    format: str | None = None
    choices: tuple[str, ...] | tuple[int, ...] | None = None
    rules: Rules = ()
    nullable: bool = False
    description: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """A list; with `size` an array of so many."""

    inner: Shape
    size: int | None = None
    rules: Rules = ()
    nullable: bool = False
    description: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """An object: its properties in order, all of them required, and no others."""

    fields: tuple[tuple[str, Shape], ...]
    nullable: bool = False
    description: str | None = None


Shape: TypeAlias = Leaf | Items | Fields


def refuse(path: str, why: str, hint: str) -> NoReturn:
    """Say which field of a schema cannot be mapped, and why."""
    where = f"The schema's field {path!r}" if path else "The schema"
    raise InvalidRequest(f"{where} {why}", hint=f"{hint} Nothing was sent.")


def rules_of(kind: str, given: Mapping[str, Any], path: str) -> Rules:
    """Constraints in their one order and form; those that are None are not set."""
    known = _KEYWORDS[kind]
    for name, value in given.items():
        if value is not None and name not in known:
            refuse(path, f"has {name}, which says nothing about JSON type {kind!r}.", f"leave {name} out.")
    rules = tuple((name, _bound(name, given[name], path)) for name in known if given.get(name) is not None)
    _check_room(dict(rules), path)
    step = dict(rules).get("multipleOf", 1)
    if kind == "integer" and not isinstance(step, int):
        refuse(path, f"has multipleOf {step}, and is an integer.", "give a whole number.")
    return rules


def _check_room(rules: Mapping[str, Any], path: str) -> None:
    """Refuse bounds between which nothing fits: every answer would be paid for and fail."""
    for low, high in _SIDES:
        if low in rules and high in rules:
            closed = not (low + high).count("exclusive")
            if rules[low] > rules[high] or (rules[low] == rules[high] and not closed):
                refuse(
                    path,
                    f"has {low} {rules[low]} and {high} {rules[high]}: nothing fits.",
                    "mend one of the two.",
                )


def _bound(name: str, value: Any, path: str) -> Any:
    """One constraint's value as JSON says it."""
    if name == "pattern":
        return _pattern(value, path)
    if not isinstance(value, (int, float)):
        try:
            value = float(value)  # a Decimal, say
        except (TypeError, ValueError):
            refuse(path, f"has {name} {value!r}, which is not a number.", "give a number.")
    if isinstance(value, bool) or not math.isfinite(value) or (value <= 0 and name == "multipleOf"):
        refuse(path, f"has {name} {value!r}, which no number can keep.", "give a finite number.")
    if name.endswith(("Length", "Items")) and (value < 0 or value != int(value)):
        refuse(path, f"has {name} {value!r}, which is not a count.", "give a whole number from 0 up.")
    return int(value) if float(value).is_integer() and abs(value) < 2**53 else value


def _pattern(value: Any, path: str) -> str:
    try:
        re.compile(value)
    except (TypeError, re.error) as error:
        refuse(path, f"has the pattern {value!r}, which Python cannot read: {error}.", "mend the pattern.")
    return str(value)


def dtype_of(shape: Shape) -> pl.DataType:
    """Where its values land."""
    match shape:
        case Leaf():
            return shape.dtype
        case Items(size=None):
            return pl.List(dtype_of(shape.inner))
        case Items():
            return pl.Array(dtype_of(shape.inner), shape.size)
        case Fields():
            return pl.Struct({name: dtype_of(inner) for name, inner in shape.fields})


def json_form(shape: Shape) -> dict[str, Any]:
    """Our strict JSON Schema: one spelling for one shape. It enters keys: it never changes."""
    form = _plain_form(dataclasses.replace(shape, description=None))
    if shape.nullable:
        form = {"anyOf": [form, {"type": "null"}]}
    said = _description(shape)
    return {"description": said, **form} if said else form


def _plain_form(shape: Shape) -> dict[str, Any]:
    match shape:
        case Leaf(choices=None):
            format_ = {"format": shape.format} if shape.format else {}
            return {"type": shape.kind, **format_, **dict(shape.rules)}
        case Leaf():
            return {"type": shape.kind, "enum": list(shape.choices or ())}
        case Items():
            size = {} if shape.size is None else {"minItems": shape.size, "maxItems": shape.size}
            return {"type": "array", "items": json_form(shape.inner), **dict(shape.rules), **size}
        case Fields():
            return {
                "type": "object",
                "properties": {name: json_form(inner) for name, inner in shape.fields},
                "required": [name for name, _ in shape.fields],
                "additionalProperties": False,
            }


def _description(shape: Shape) -> str | None:
    # No provider can be told of a decimal's scale in another way that they all take.
    if not isinstance(shape, Leaf) or not isinstance(shape.dtype, pl.Decimal):
        return shape.description
    scale = f"(at most {shape.dtype.scale} decimal places)"
    return f"{shape.description} {scale}" if shape.description else scale
