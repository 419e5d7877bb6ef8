"""Python classes and annotations -> shapes: dataclasses, TypedDicts, pydantic models, `typing`'s words.

pydantic is asked for its fields, not for its JSON Schema, whose printing changes between versions. Docstrings
and defaults do not enter: a comment must not cost money, and every field is asked for.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime as dt
import enum
import sys
import types
import typing
import uuid
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, Union, get_args, get_origin

import polars as pl

from polars_llm.schema import dtypes, json_schema
from polars_llm.schema.shapes import Fields, Items, Leaf, Shape, refuse, rules_of

__all__ = ["root_of"]

_PLACES = 9
_FINITE = "a dtype is finite: write the levels out."

# Python type -> JSON type, format, dtype. `docs/schema.md` shows them, and a test compares.
_LEAVES: dict[Any, tuple[str, str | None, pl.DataType]] = {
    str: ("string", None, pl.String()),
    bool: ("boolean", None, pl.Boolean()),
    int: ("integer", None, pl.Int64()),
    float: ("number", None, pl.Float64()),
    Decimal: ("number", None, pl.Decimal(38, _PLACES)),
    dt.date: ("string", "date", pl.Date()),
    dt.datetime: ("string", "date-time", pl.Datetime("us", "UTC")),
    dt.time: ("string", "time", pl.Time()),
    dt.timedelta: ("string", "duration", pl.Duration("us")),
    uuid.UUID: ("string", "uuid", pl.String()),
}

_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable)

# Names of constraints on annotations (annotated_types, pydantic, msgspec) -> JSON Schema's.
_CONSTRAINTS = {
    "ge": "minimum",
    "gt": "exclusiveMinimum",
    "le": "maximum",
    "lt": "exclusiveMaximum",
    "multiple_of": "multipleOf",
    "min_length": "minLength",
    "max_length": "maxLength",
    "pattern": "pattern",
}
_SIZES = {"minLength": "minItems", "maxLength": "maxItems"}


def root_of(schema: Any) -> Fields:
    """The shape of whatever a user may write a schema in."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "json_schema" or (
            isinstance(schema.get("name"), str) and isinstance(schema.get("schema"), Mapping)
        ):
            refuse("", "is a response_format, not a schema.", "pass what lies under 'schema' alone.")
        shape = json_schema.root_of(schema) if json_schema.looks_like(schema) else _mapping(schema, "", ())
    else:
        shape = _shape(schema, "", ())
    if not isinstance(shape, Fields) or shape.nullable:
        refuse("", "is not an object with fields.", "wrap it: a class, or a dict, with one field.")
    return shape


def _mapping(fields: Mapping[Any, Any], path: str, above: tuple[Any, ...]) -> Fields:
    """Names and dtypes, Python types, or more of the same."""
    if not fields:
        refuse(path, "has no fields.", "name at least one.")
    if any(fields is outer for outer in above):
        refuse(path, "is a dict again, inside itself.", _FINITE)
    inside = (*above, fields)
    return Fields(fields=tuple((n, _shape(t, dtypes.named(path, n), inside)) for n, t in fields.items()))


def _shape(given: Any, path: str, above: tuple[Any, ...]) -> Shape:
    """The shape of an annotation; `above` are the classes that it is in."""
    given, notes = _unwrapped(given)
    shape = _named_type(given, path, above, notes)
    return _described(shape, notes)


def _unwrapped(given: Any) -> tuple[Any, list[Any]]:
    """The annotation without names and wrappers, and what was noted on it."""
    notes: list[Any] = []
    while True:
        if get_origin(given) is typing.Annotated:
            given, *more = get_args(given)
            notes += [note for each in more for note in (each, *_inner_notes(each))]
        elif getattr(get_origin(given), "_name", None) in {"Required", "NotRequired", "ReadOnly"}:
            given = get_args(given)[0]
        elif hasattr(given, "__supertype__"):  # NewType
            given = given.__supertype__
        elif type(given).__name__ == "TypeAliasType":
            given = given.__value__
        else:
            return given, notes


def _inner_notes(note: Any) -> list[Any]:
    """Those that a pydantic Field holds."""
    inner = getattr(note, "metadata", ())
    return inner if isinstance(inner, list) else []


def _named_type(given: Any, path: str, above: tuple[Any, ...], notes: list[Any]) -> Shape:
    origin = get_origin(given)
    if origin in (Union, types.UnionType):
        return _union(given, path, above, notes)
    if origin is Literal:
        return json_schema.choices(get_args(given), path)
    if origin in _LISTS:
        return _list(given, path, above, notes)
    if isinstance(given, (pl.DataType, pl.datatypes.DataTypeClass)):
        return _constrained(dtypes.shape_of(given, path), notes, path)
    if isinstance(given, Mapping):
        return _mapping(given, path, above)
    if isinstance(given, type) and origin is None:
        return _class(given, path, above, notes)
    if dataclasses.is_dataclass(given) or _is_pydantic(type(given)):
        refuse(path, f"is an object of {type(given).__name__}, not a class.", "pass the class itself.")
    hint = (
        "use str, or a dtype such as pl.String." if isinstance(given, str) else _INSTEAD.get(origin, _WORDS)
    )
    refuse(path, f"is {_spelled(given)}, which has no dtype.", hint)


_PLAIN = "use the plain type: str for an address, datetime.date for a date."
_WORDS = "docs/schema.md lists what can be mapped; every field needs one definite type."


def _spelled(given: Any) -> str:
    return given.__name__ if isinstance(given, type) and get_origin(given) is None else repr(given)


def _union(given: Any, path: str, above: tuple[Any, ...], notes: list[Any]) -> Shape:
    parts = [part for part in get_args(given) if part is not types.NoneType]
    if len(parts) != 1:
        refuse(path, f"is {given}, and a column has one type.", "keep one of them, with or without None.")
    inner, more = _unwrapped(parts[0])
    shape = _described(_named_type(inner, path, above, [*more, *notes]), more)
    return dataclasses.replace(shape, nullable=True)


def _constrained(shape: Shape, notes: list[Any], path: str) -> Shape:
    """The shape of a dtype with what was noted on it; its own bounds stay where they are narrower."""
    found = _constraints(notes)
    if not found or isinstance(shape, Fields) or (isinstance(shape, Leaf) and shape.choices is not None):
        return shape
    if isinstance(shape, Items):
        sizes = {_SIZES.get(n, n): v for n, v in found.items()}
        return dataclasses.replace(shape, rules=rules_of("array", sizes, path))
    for name, own in shape.rules:
        narrower = max if name == "minimum" else min
        found[name] = narrower(own, found.get(name, own))
    return dataclasses.replace(shape, rules=rules_of(shape.kind, found, path))


def _list(given: Any, path: str, above: tuple[Any, ...], notes: list[Any]) -> Shape:
    parts = get_args(given)
    if not parts:
        refuse(path, f"is {given}, which does not say of what.", "write for example list[str].")
    size = None
    if get_origin(given) is tuple and parts[1:] != (Ellipsis,):
        if len(set(parts)) != 1:
            refuse(path, f"is {given}, whose places differ.", "make it a class with named fields.")
        size = len(parts)
    sizes = {_SIZES.get(n, n): v for n, v in _constraints(notes).items()}
    inner = _shape(parts[0], f"{path}[]", above)
    return Items(inner=inner, size=size, rules=rules_of("array", sizes, path))


def _class(given: type, path: str, above: tuple[Any, ...], notes: list[Any]) -> Shape:
    if given in above:
        refuse(path, f"is {given.__name__} again, inside itself.", _FINITE)
    if issubclass(given, enum.Enum):
        return json_schema.choices([member.value for member in given], path)
    inside = (*above, given)
    if dataclasses.is_dataclass(given):
        return _dataclass(given, path, inside)
    if issubclass(given, dict) and hasattr(given, "__total__"):
        return _typed_dict(given, path, inside)
    if _is_pydantic(given):
        return _pydantic(given, path, inside)
    if given not in _LEAVES:
        hint = _PLAIN if given.__module__.partition(".")[0] == "pydantic" else _INSTEAD.get(given, _WORDS)
        refuse(path, f"is {given.__name__}, which has no dtype.", hint)
    return _leaf(given, path, notes)


_INSTEAD: dict[Any, str] = {
    list: "say of what: list[str], for example.",
    tuple: "say of what: tuple[str, ...], for example.",
    dict: "strict schemas are closed: use a class with fields, or a list of (key, value) objects.",
    set: "strict schemas cannot ask for distinct items: use a list.",
    bytes: "use str: JSON has no bytes.",
}


def _leaf(given: type, path: str, notes: list[Any]) -> Leaf:
    kind, format_, dtype = _LEAVES[given]
    rules = _constraints(notes)
    digits, places = (_noted(notes, name) for name in ("max_digits", "decimal_places"))
    if given is Decimal and (digits is not None or places is not None):
        if places is None:
            refuse(path, f"has max_digits {digits} and no decimal_places.", "say both, or neither.")
        digits = 38 if digits is None else digits
        dtypes.check_decimal(digits, places, path)
        dtype = pl.Decimal(digits, places)
    return Leaf(kind=kind, format=format_, dtype=dtype, rules=rules_of(kind, rules, path))


def _constraints(notes: list[Any]) -> dict[str, Any]:
    found = {json: _noted(notes, name) for name, json in _CONSTRAINTS.items()}
    return {name: getattr(value, "pattern", value) for name, value in found.items() if value is not None}


def _noted(notes: list[Any], name: str) -> Any:
    return next((value for note in notes if (value := getattr(note, name, None)) is not None), None)


def _described(shape: Shape, notes: list[Any]) -> Shape:
    """The shape with the description that was noted: a plain text, a Doc, or a field's ``description``."""
    for note in notes:
        said = (
            note
            if isinstance(note, str)
            else _noted([note], "description") or _noted([note], "documentation")
        )
        if isinstance(said, str):
            return dataclasses.replace(shape, description=said)
    return shape


# --- classes with fields ------------------------------------------------------------------------------


_RESOLVE = "define every name in them at module level."


def _hints(cls: type, path: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError) as error:
        refuse(path, f"has an annotation that cannot be resolved: {error}.", _RESOLVE)


def _dataclass(cls: Any, path: str, above: tuple[Any, ...]) -> Fields:
    hints = _hints(cls, path)
    # pydantic's own dataclasses have fields with an alias and constraints.
    known = getattr(cls, "__pydantic_fields__", {}) if getattr(cls, "__pydantic_complete__", False) else {}
    fields = []
    for field in dataclasses.fields(cls):
        if field.name in known:
            name, shape = _pydantic_field(field.name, known[field.name], path, above)
        else:
            name, shape = field.name, _shape(hints[field.name], dtypes.named(path, field.name), above)
        said = field.metadata.get("description")
        if isinstance(said, str) and said:
            shape = dataclasses.replace(shape, description=said)
        fields.append((name, shape))
    return _filled(fields, cls, path)


def _typed_dict(cls: Any, path: str, above: tuple[Any, ...]) -> Fields:
    fields = []
    for name, hint in _hints(cls, path).items():
        shape = _shape(hint, dtypes.named(path, name), above)
        fields.append(
            (name, shape if _is_required(cls, name, hint) else dataclasses.replace(shape, nullable=True))
        )
    return _filled(fields, cls, path)


def _is_required(cls: Any, name: str, hint: Any) -> bool:
    # `from __future__ import annotations` hides NotRequired from the class itself, not from its hints.
    wrapper = getattr(get_origin(hint), "_name", None)
    return wrapper == "Required" or (wrapper != "NotRequired" and name in cls.__required_keys__)


def _is_pydantic(cls: type) -> bool:
    # Imported only if the user has done so: who has a model class has pydantic.
    base = getattr(sys.modules.get("pydantic"), "BaseModel", None)
    return base is not None and issubclass(cls, base)


def _pydantic(cls: Any, path: str, above: tuple[Any, ...]) -> Fields:
    if not hasattr(cls, "model_fields"):
        refuse(path, f"is {cls.__name__}, a model of pydantic 1.", "use pydantic 2, a dataclass or a dict.")
    if not cls.__pydantic_complete__:
        cls.model_rebuild(raise_errors=False)
    if not cls.__pydantic_complete__:
        refuse(path, f"is {cls.__name__}, whose annotations cannot be resolved.", _RESOLVE)
    fields = [_pydantic_field(own, field, path, above) for own, field in cls.model_fields.items()]
    return _filled(fields, cls, path)


def _pydantic_field(own: str, field: Any, path: str, above: tuple[Any, ...]) -> tuple[str, Shape]:
    """Its alias, if it has one, and its shape."""
    name = own if field.validation_alias is None else field.validation_alias
    where = dtypes.named(path, name)
    notes = [*field.metadata, field]
    inner, more = _unwrapped(field.annotation)
    shape = _named_type(inner, where, above, [*more, *notes])
    return name, _described(shape, [*notes, *more])


def _filled(fields: list[tuple[str, Shape]], cls: type, path: str) -> Fields:
    if not fields:
        refuse(path, f"is {cls.__name__}, which has no fields.", "name at least one.")
    names = [name for name, _ in fields]
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    if twice is not None:
        refuse(path, f"is {cls.__name__}, with two fields named {twice!r}.", "give them other aliases.")
    return Fields(fields=tuple(fields))
