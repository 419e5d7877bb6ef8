"""Polars dtypes -> shapes."""

from __future__ import annotations

import zoneinfo
from collections.abc import Mapping
from typing import Any

import polars as pl

from polars_llm.schema.shapes import Fields, Items, Leaf, Rules, Shape, refuse, rules_of

__all__ = ["check_decimal", "named", "shape_of"]

_WHOLE = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32)
_DIGITS, _PLACES = 38, 9

# dtype -> JSON type, format. `docs/schema.md` shows them, and a test compares.
_LEAVES: dict[Any, tuple[str, str | None]] = {
    pl.String: ("string", None),
    pl.Boolean: ("boolean", None),
    **dict.fromkeys(_WHOLE, ("integer", None)),
    pl.Float64: ("number", None),
    pl.Float32: ("number", None),
    pl.Decimal: ("number", None),
    pl.Date: ("string", "date"),
    pl.Datetime: ("string", "date-time"),
    pl.Time: ("string", "time"),
    pl.Duration: ("string", "duration"),
}

_INSTEAD: dict[Any, str] = {
    pl.UInt64: "use pl.Int64, the widest that every provider and parser agrees on.",
    pl.Int128: "use pl.Int64, the widest that every provider and parser agrees on.",
    pl.Categorical: "use pl.Enum([...]) with the categories, or pl.String.",
    pl.Binary: "use pl.String: JSON has no bytes.",
}


def shape_of(dtype: Any, path: str = "") -> Shape:
    """The shape of a dtype's values.

    Raises
    ------
    InvalidRequest
        At call: a dtype that no answer in JSON can have, with the path to it.
    """
    dtype = _instance(dtype, path)
    match dtype:
        case pl.Struct():
            return fields_of({f.name: f.dtype for f in dtype.fields}, path)
        case pl.List():
            return Items(inner=shape_of(dtype.inner, f"{path}[]"))
        case pl.Array():
            return Items(inner=shape_of(dtype.inner, f"{path}[]"), size=dtype.size)
        case pl.Enum():
            return _enum(dtype, path)
        case pl.Decimal():
            dtype = _decimal(dtype)
            check_decimal(dtype.precision or _DIGITS, dtype.scale, path)
        case pl.Datetime():
            _check_zone(dtype.time_zone, path)
    found = _LEAVES.get(type(dtype))
    if found is None:
        hint = _INSTEAD.get(type(dtype), "use one of the dtypes that docs/schema.md lists.")
        refuse(path, f"has dtype {dtype}, which no answer in JSON can have.", hint)
    return Leaf(kind=found[0], format=found[1], dtype=dtype, rules=_bounds(dtype))


def fields_of(fields: Mapping[str, Any], path: str = "") -> Fields:
    """The shape of a struct's values."""
    if not fields:
        refuse(path, "has no fields.", "name at least one.")
    return Fields(fields=tuple((name, shape_of(t, named(path, name))) for name, t in fields.items()))


def named(path: str, name: Any) -> str:
    """The path of a field; refuses names that are no text, or that JSON readers stumble over."""
    if not isinstance(name, str):
        refuse(path, f"has a field named {name!r}, and names in JSON are strings.", "make it a string.")
    where = f"{path}.{name}" if path else name
    if not name or any(c in '"\\' or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        refuse(path, f"has a field named {name!r}.", "use letters, digits and spaces in names.")
    return where


def _instance(dtype: Any, path: str) -> pl.DataType:
    if isinstance(dtype, pl.DataType):
        return dtype
    if dtype in {pl.Datetime, pl.Duration}:
        made: pl.DataType = dtype("us")
        return made
    if dtype is pl.Decimal:
        return pl.Decimal(_DIGITS, _PLACES)
    try:
        made = dtype()
    except TypeError:  # a nested dtype without its parts
        refuse(path, f"is {dtype.__name__} without its parts.", "write for example pl.List(pl.String).")
    return made


def _bounds(dtype: pl.DataType) -> Rules:
    """What keeps a provider from writing a number that a narrow dtype cannot hold."""
    if type(dtype) not in _WHOLE or dtype == pl.Int64:
        return ()
    bits, signed = int(str(dtype).lstrip("UInt")), str(dtype).startswith("I")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return rules_of("integer", {"minimum": low, "maximum": high}, "")


def _check_zone(zone: str | None, path: str) -> None:
    try:
        if zone is not None:
            zoneinfo.ZoneInfo(zone)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        refuse(path, f"has the time zone {zone!r}, which is not known.", "for example 'UTC'.")


def _decimal(dtype: pl.Decimal) -> pl.Decimal:
    return dtype if dtype.precision is not None else pl.Decimal(_DIGITS, dtype.scale)


def check_decimal(digits: int, places: int, path: str) -> None:
    """Refuse a decimal that no column can have."""
    if not 1 <= digits <= _DIGITS:
        refuse(path, f"has {digits} digits, and a decimal has 1 to {_DIGITS}.", "ask for fewer.")
    if not 0 <= places <= digits:
        refuse(path, f"has {digits} digits, of which {places} are decimal places.", "ask for fewer of these.")


def _enum(dtype: pl.Enum, path: str) -> Leaf:
    categories = tuple(dtype.categories.to_list())
    if not categories:
        refuse(path, "is an Enum without categories.", "name at least one.")
    return Leaf(kind="string", dtype=dtype, choices=categories)
