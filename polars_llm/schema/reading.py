"""Text -> typed values: one pass of msgspec over the rows, then whole columns.

What does not fit at first gets a second look, which forgives two things: letter case of labels and names
(Claude may answer "Positive" for "positive"), and whole numbers written as ``3.0``.
"""

from __future__ import annotations

import datetime as dt
import functools
import ipaddress
import math
import types
import uuid
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal

import msgspec
import polars as pl

from polars_llm.schema.shapes import Fields, Items, Leaf, Shape, dtype_of

__all__ = ["compiled", "read"]

Check = Callable[[Any], "str | None"]
"""Says why a decoded value does not fit, where msgspec's types cannot."""


def read(shape: Fields, text: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Values and reasons; see `Schema.read`."""
    decoder = compiled(shape)
    values: list[Any] = []
    reasons: list[str | None] = []
    for row in text.to_list():
        value, reason = (None, None) if row is None else decoder(row)
        values.append(value)
        reasons.append(reason)
    return _column(shape, values).alias(text.name), pl.Series("reason", reasons, dtype=pl.String)


@functools.lru_cache(maxsize=128)
def compiled(shape: Fields) -> Callable[[str], tuple[Any, str | None]]:
    """A function from one text to (value, why it does not fit)."""
    decode = msgspec.json.Decoder(_type(shape)).decode
    loose = msgspec.json.Decoder(float_hook=Decimal).decode
    encode = msgspec.json.Encoder(decimal_format="number").encode
    check = _check(shape)

    def strict(text: str | bytes) -> tuple[Any, str | None]:
        try:
            value = decode(text)
        except msgspec.DecodeError as error:  # ValidationError is one
            return None, str(error)
        reason = None if check is None else check(value)
        return (value, None) if reason is None else (None, reason)

    def reading(text: str) -> tuple[Any, str | None]:
        value, reason = strict(text)
        if reason is None:
            return value, None
        try:
            forgiven = _forgiven(shape, loose(text))
        except msgspec.DecodeError:
            return None, reason
        second, still = strict(encode(forgiven))
        return (second, None) if still is None else (None, still)

    return reading


# --- msgspec's types -----------------------------------------------------------------------------

_META = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "minLength": "min_length",
    "maxLength": "max_length",
    "pattern": "pattern",
    "minItems": "min_length",
    "maxItems": "max_length",
}

_TEMPORAL: dict[str, type] = {
    "date": dt.date,
    "date-time": dt.datetime,
    "time": dt.time,
    "duration": dt.timedelta,
}


def _type(shape: Shape) -> Any:
    plain = _plain_type(shape)
    return plain | None if shape.nullable else plain


def _plain_type(shape: Shape) -> Any:
    match shape:
        case Fields():
            slots = [f"f{i}" for i in range(len(shape.fields))]
            parts = [_type(inner) for _, inner in shape.fields]
            names = {slot: name for slot, (name, _) in zip(slots, shape.fields, strict=True)}
            return msgspec.defstruct("Value", list(zip(slots, parts, strict=True)), rename=names, gc=False)
        case Items():
            size = {} if shape.size is None else {"minItems": shape.size, "maxItems": shape.size}
            return _bounded(types.GenericAlias(list, (_type(shape.inner),)), {**dict(shape.rules), **size})
        case Leaf():
            return _leaf_type(shape)


def _leaf_type(leaf: Leaf) -> Any:
    if leaf.choices is not None:
        literal: Any = Literal
        return literal[leaf.choices]
    if isinstance(leaf.dtype, pl.Decimal):
        return Decimal
    if leaf.kind == "integer":
        return Annotated[int, msgspec.Meta(**_whole_bounds(leaf))]
    if leaf.kind == "number":
        return float
    if not isinstance(leaf.dtype, pl.String):
        return bool if leaf.kind == "boolean" else _TEMPORAL[leaf.format or ""]
    return _bounded(str, dict(leaf.rules))


def _bounded(plain: Any, rules: dict[str, Any]) -> Any:
    return Annotated[plain, msgspec.Meta(**{_META[n]: v for n, v in rules.items()})] if rules else plain


_INT64 = (-(2**63), 2**63 - 1)


def _whole_bounds(leaf: Leaf) -> dict[str, Any]:
    """Bounds of an integer as the tightest ``ge`` and ``le``: msgspec takes no more than one of each side."""
    rules = dict(leaf.rules)
    least, most = [_INT64[0]], [_INT64[1]]
    for name, value in rules.items():
        if name == "minimum":
            least.append(math.ceil(value))
        elif name == "exclusiveMinimum":
            least.append(math.floor(value) + 1)
        elif name == "maximum":
            most.append(math.floor(value))
        elif name == "exclusiveMaximum":
            most.append(math.ceil(value) - 1)
    step = {"multiple_of": rules["multipleOf"]} if "multipleOf" in rules else {}
    return {"ge": max(least), "le": min(most), **step}


# --- what msgspec's types cannot say -----------------------------------------------------------------


def _check(shape: Shape) -> Check | None:
    check = _plain_check(shape)
    if check is None or not shape.nullable:
        return check
    return lambda value: None if value is None else check(value)


def _plain_check(shape: Shape) -> Check | None:
    match shape:
        case Leaf():
            return _leaf_check(shape)
        case Items():
            return _each(_check(shape.inner))
        case Fields():
            parts = [(f"f{i}", name, _check(inner)) for i, (name, inner) in enumerate(shape.fields)]
            return _all([(slot, name, check) for slot, name, check in parts if check is not None])


def _each(check: Check | None) -> Check | None:
    if check is None:
        return None
    return lambda values: next((why for value in values if (why := check(value))), None)


def _all(parts: list[tuple[str, str, Check]]) -> Check | None:
    if not parts:
        return None

    def first(value: Any) -> str | None:
        for slot, name, check in parts:
            if why := check(getattr(value, slot)):
                return f"{name}: {why}"
        return None

    return first


def _leaf_check(leaf: Leaf) -> Check | None:
    if isinstance(leaf.dtype, pl.Decimal):
        return functools.partial(_decimal_misfit, leaf.dtype, dict(leaf.rules))
    if leaf.kind == "number":
        rules = dict(leaf.rules)
        if isinstance(leaf.dtype, pl.Float32):
            rules = {"minimum": -_FLOAT32, "maximum": _FLOAT32, **rules}
        return functools.partial(_number_misfit, rules) if rules else None
    if isinstance(leaf.dtype, pl.Datetime):
        return functools.partial(_instant_misfit, leaf.dtype)
    if isinstance(leaf.dtype, pl.Duration):
        return functools.partial(_span_misfit, leaf.dtype)
    if leaf.format in _PARSERS:
        return functools.partial(_format_misfit, leaf.format)
    return None


_FLOAT32 = 3.4028234663852886e38
_NANOSECONDS = (dt.datetime(1678, 1, 1), dt.datetime(2262, 1, 1))


# Formats of texts that the standard library can judge; others are taken at their word.
_PARSERS: dict[str, Callable[[str], object]] = {
    "uuid": uuid.UUID,
    "ipv4": ipaddress.IPv4Address,
    "ipv6": ipaddress.IPv6Address,
}


def _format_misfit(name: str, value: str) -> str | None:
    try:
        _PARSERS[name](value)
    except ValueError:
        return f"{value!r} is not of format {name}"
    return None


def _number_misfit(rules: dict[str, Any], value: Any) -> str | None:
    exact = isinstance(value, Decimal)
    for name, given in rules.items():
        bound = Decimal(str(given)) if exact else given
        if name == "multipleOf":
            count = Fraction(value) / Fraction(bound) if exact else value / bound
            wrong = abs(count - round(count)) > (0 if exact else 1e-9 * max(1.0, abs(count)))
        else:
            wrong = {
                "minimum": value < bound,
                "exclusiveMinimum": value <= bound,
                "maximum": value > bound,
                "exclusiveMaximum": value >= bound,
            }[name]
        if wrong:
            return f"{value} breaks {name} {given}"
    return None


def _decimal_misfit(dtype: pl.Decimal, rules: dict[str, Any], value: Decimal) -> str | None:
    if not value.is_finite():
        return f"{value} is not a number"
    if value:
        # Its own digits: arithmetic would round to the 28 that Python's context has.
        _, digits, exponent = value.as_tuple()
        assert isinstance(exponent, int)
        trailing = next(i for i, digit in enumerate(reversed(digits)) if digit)
        if -(exponent + trailing) > dtype.scale:
            return f"{value} has more than {dtype.scale} decimal places"
        if len(digits) + exponent > dtype.precision - dtype.scale:
            return f"{value} has more than {dtype.precision} digits"
    return _number_misfit(rules, value)


_A_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}


def _span_misfit(dtype: pl.Duration, value: dt.timedelta) -> str | None:
    if abs(value.total_seconds()) >= 2**63 / _A_SECOND[dtype.time_unit] * (1 - 1e-9):
        return f"{value} is out of range"
    return None


def _instant_misfit(dtype: pl.Datetime, value: dt.datetime) -> str | None:
    try:
        instant = _instant(dtype, value)
    except OverflowError:
        return f"{value.isoformat()} is out of range"
    if dtype.time_unit == "ns" and not _NANOSECONDS[0] <= instant < _NANOSECONDS[1]:
        return f"{value.isoformat()} is out of range for nanoseconds"
    return None


def _instant(dtype: pl.Datetime, value: dt.datetime) -> dt.datetime:
    """What the column holds: UTC where it has a zone, else the time as it was written."""
    if dtype.time_zone is not None and value.tzinfo is not None:
        value = value.astimezone(dt.UTC)
    return value.replace(tzinfo=None)


# --- the second look ----------------------------------------------------------------------------------


def _forgiven(shape: Shape, value: Any) -> Any:
    """The value with labels and names in their own case, and whole numbers as integers; else as it is."""
    match shape, value:
        case Fields(), dict():
            own = dict(shape.fields)
            named = {_meant(tuple(own), n): v for n, v in value.items()}
            return {n: _forgiven(own[n], v) for n, v in named.items() if n in own}
        case Items(), list():
            return [_forgiven(shape.inner, v) for v in value]
        case Leaf(choices=tuple()), str():
            return _meant(shape.choices or (), value)
        case Leaf(kind="integer"), Decimal() if _is_whole(value):
            return int(value)
    return value


def _is_whole(value: Decimal) -> bool:
    return _INT64[0] <= value <= _INT64[1] and value == value.to_integral_value()


def _meant(choices: tuple[Any, ...], text: str) -> str:
    return text if text in choices else _folded(choices).get(text.casefold(), text)


@functools.lru_cache(maxsize=256)
def _folded(choices: tuple[Any, ...]) -> dict[str, str]:
    """Case-folded label -> label, where that says which one is meant."""
    folded: dict[str, list[str]] = {}
    for choice in choices:
        folded.setdefault(str(choice).casefold(), []).append(choice)
    return {key: labels[0] for key, labels in folded.items() if len(labels) == 1}


# --- columns --------------------------------------------------------------------------------------


def _column(shape: Shape, values: list[Any]) -> pl.Series:
    match shape:
        case Leaf():
            return _leaf_column(shape.dtype, values)
        case Items():
            return _list_column(shape, values)
        case Fields():
            missing = pl.Series([value is None for value in values], dtype=pl.Boolean)
            parts = []
            for i, (name, inner) in enumerate(shape.fields):
                own = [None if value is None else getattr(value, f"f{i}") for value in values]
                parts.append(_column(inner, own).alias(name))
            whole = pl.DataFrame(parts).to_struct("value")
            if not missing.any():
                return whole
            return pl.select(pl.when(~missing).then(whole).alias("value")).to_series()


def _leaf_column(dtype: pl.DataType, values: list[Any]) -> pl.Series:
    match dtype:
        case pl.Datetime():
            plain = [None if v is None else _instant(dtype, v) for v in values]
            made = pl.Series("value", plain, dtype=pl.Datetime(dtype.time_unit))
            zone = dtype.time_zone
            return made if zone is None else made.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
        case pl.Time():
            values = [None if v is None else v.replace(tzinfo=None) for v in values]
    return pl.Series("value", values, dtype=dtype)


def _list_column(shape: Items, values: list[Any]) -> pl.Series:
    """All items as one column, then cut into rows: Polars takes 20 times as long for lists of structs."""
    inner = _column(shape.inner, [item for value in values if value for item in value])
    owners = [row for row, value in enumerate(values) if value for _ in value]
    items = pl.DataFrame([pl.Series("row", owners, dtype=pl.UInt32), inner.alias("value")])
    lists = items.group_by("row", maintain_order=True).agg("value")
    rows = pl.DataFrame(
        {"row": range(len(values)), "null": [v is None for v in values]},
        schema={"row": pl.UInt32, "null": pl.Boolean},
    )
    joined = rows.join(lists, on="row", how="left", maintain_order="left")
    empty = pl.Series([[]], dtype=pl.List(dtype_of(shape.inner)))
    whole = joined.select(
        pl.when(~pl.col("null")).then(pl.col("value").fill_null(pl.lit(empty).first()))
    ).to_series()
    return whole if shape.size is None else whole.cast(dtype_of(shape))
