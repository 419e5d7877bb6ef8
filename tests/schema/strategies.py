"""Schemas and values that fit them, as Hypothesis draws them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal, TypedDict

import polars as pl
from hypothesis import strategies as st

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
NAMES = st.text(st.characters(categories=["L", "N", "Zs"], include_characters="_-.é"), min_size=1, max_size=8)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may be.

    Parameters
    ----------
    annotation
        As a user writes it.
    values
        JSON texts with the Python value that must come out.
    """

    annotation: Any
    values: st.SearchStrategy[tuple[str, Any]]
    dtype: pl.DataType


def _leaf(annotation: Any, values: st.SearchStrategy[Any], dtype: Any, spell: Callable[[Any], str]) -> Kind:
    return Kind(annotation, values.map(lambda v: (spell(v), v)), dtype)


def _quoted(value: Any) -> str:
    return json.dumps(value.isoformat())


_ZONES = st.integers(-14 * 60, 14 * 60).map(lambda m: dt.timezone(dt.timedelta(minutes=m)))
_INSTANTS = st.datetimes(dt.datetime(2, 1, 1), dt.datetime(9998, 12, 31), timezones=_ZONES)
_WALL = st.datetimes(dt.datetime(1700, 1, 1), dt.datetime(2200, 1, 1))


def _labels(labels: list[str]) -> Kind:
    # Equal labels always in one order, though no alphabetical one: `Literal["a", "b"] | None` gives what
    # `Literal["b", "a"] | None` gave before, since `typing` keeps unions by equality.
    labels = sorted(labels, key=lambda label: hashlib.blake2b(label.encode()).digest())
    return _leaf(Literal[tuple(labels)], st.sampled_from(labels), pl.Enum(labels), json.dumps)


LEAVES: list[Kind] = [
    _leaf(str, TEXT, pl.String(), json.dumps),
    _leaf(bool, st.booleans(), pl.Boolean(), json.dumps),
    _leaf(int, st.integers(-(2**63), 2**63 - 1), pl.Int64(), json.dumps),
    _leaf(pl.UInt8, st.integers(0, 255), pl.UInt8(), json.dumps),
    _leaf(float, st.floats(allow_nan=False, allow_infinity=False), pl.Float64(), json.dumps),
    _leaf(pl.Float32, st.floats(allow_nan=False, allow_infinity=False, width=32), pl.Float32(), json.dumps),
    _leaf(
        pl.Decimal(20, 3),
        st.decimals(Decimal("-9e16"), Decimal("9e16"), places=3, allow_nan=False, allow_infinity=False),
        pl.Decimal(20, 3),
        str,
    ),
    _leaf(dt.date, st.dates(), pl.Date(), _quoted),
    _leaf(dt.datetime, _INSTANTS, pl.Datetime("us", "UTC"), _quoted),
    _leaf(pl.Datetime("us"), _WALL, pl.Datetime("us"), lambda v: json.dumps(v.isoformat() + "+05:30")),
    _leaf(dt.time, st.times(), pl.Time(), lambda v: json.dumps(v.isoformat() + "Z")),
    _leaf(
        dt.timedelta,
        st.integers(-(10**9), 10**9).map(lambda s: dt.timedelta(seconds=s)),
        pl.Duration("us"),
        lambda v: json.dumps(f"{'-' if v < dt.timedelta() else ''}PT{abs(v) // dt.timedelta(seconds=1)}S"),
    ),
    _leaf(Literal[1, 5, -7], st.sampled_from([1, 5, -7]), pl.Int64(), json.dumps),
]


def _optional(kind: Kind) -> Kind:
    values = st.just(("null", None)) | kind.values
    return Kind(kind.annotation | None, values, kind.dtype) if _is_type(kind) else kind


def _is_type(kind: Kind) -> bool:
    # A dtype or a dict is no annotation that typing could make optional.
    return not isinstance(kind.annotation, (dict, pl.DataType, pl.datatypes.DataTypeClass))


def _list(kind: Kind) -> Kind:
    values = st.lists(kind.values, max_size=3).map(
        lambda pairs: ("[" + ", ".join(text for text, _ in pairs) + "]", [value for _, value in pairs])
    )
    annotation = list[kind.annotation] if _is_type(kind) else pl.List(kind.dtype)  # type: ignore[name-defined]
    return Kind(annotation, values, pl.List(kind.dtype))


def structs(inner: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    """Objects of one to four fields."""
    return st.dictionaries(NAMES, inner, min_size=1, max_size=4).map(_struct)


def _struct(fields: dict[str, Kind]) -> Kind:
    values = st.tuples(*(kind.values for kind in fields.values())).map(
        lambda pairs: (
            "{" + ",".join(f"{json.dumps(n)}: {t}" for n, (t, _) in zip(fields, pairs, strict=True)) + "}",
            {name: value for name, (_, value) in zip(fields, pairs, strict=True)},
        )
    )
    dtype = pl.Struct({name: kind.dtype for name, kind in fields.items()})
    annotations = {name: kind.annotation for name, kind in fields.items()}
    if all(map(_is_type, fields.values())):  # a class can be optional, and in a list
        return Kind(TypedDict("Drawn", annotations), values, dtype)  # type: ignore[operator]
    return Kind(annotations, values, dtype)


_ENUMS = st.lists(TEXT.filter(bool), min_size=1, max_size=5, unique=True).map(_labels)
_LEAF = st.sampled_from(LEAVES) | _ENUMS
_KINDS: st.SearchStrategy[Kind] = st.recursive(
    _LEAF,
    lambda inner: inner.map(_optional) | inner.filter(_is_type).map(_list) | structs(inner),
    max_leaves=6,
)

SCHEMAS = structs(_KINDS)


@st.composite
def schemas_with_values(draw: st.DrawFn) -> tuple[Kind, list[tuple[str, Any]]]:
    """A schema and up to five values that fit it."""
    kind = draw(SCHEMAS)
    return kind, draw(st.lists(kind.values, max_size=5))
