"""Frozen schemas: any value of any schema survives JSON and lands in its dtype; the text never changes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import json
import pickle
import subprocess
import sys
import typing
from decimal import Decimal
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, TypedDict
from uuid import UUID

import polars as pl
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polars_llm.errors import InvalidRequest
from polars_llm.schema import Schema, freeze
from polars_llm.schema.rules import ANTHROPIC, OPENAI, worded
from polars_llm.testing.schema_rules import _anthropic_complaint, _openai_complaint
from polars_llm.testing.structured import conforming
from tests.schema.strategies import NAMES, SCHEMAS, TEXT, Kind, schemas_with_values


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Line(pydantic.BaseModel):
    """A docstring is for readers of the code."""

    item: str = pydantic.Field(description="What was bought", min_length=2)
    count: int = pydantic.Field(1, ge=1, le=99)


class Receipt(pydantic.BaseModel):
    shop: str | None = None
    lines: list[Line]
    total: Decimal = pydantic.Field(max_digits=8, decimal_places=2)
    paid: dt.datetime
    mood: Mood


@dataclasses.dataclass
class LineClass:
    item: Annotated[str, "What was bought", pydantic.Field(min_length=2)]
    count: Annotated[int, pydantic.Field(ge=1, le=99)] = 1


@dataclasses.dataclass
class ReceiptClass:
    shop: Optional[str]  # noqa: UP045 (the older spelling is the point)
    lines: list[LineClass]
    total: Annotated[Decimal, pydantic.Field(max_digits=8, decimal_places=2)]
    paid: dt.datetime
    mood: Literal["good", "bad"]


class LineDict(TypedDict):
    item: Annotated[str, "What was bought", pydantic.Field(min_length=2)]
    count: Annotated[int, pydantic.Field(ge=1, le=99)]


class ReceiptDict(TypedDict):
    shop: NotRequired[str]
    lines: list[LineDict]
    total: Annotated[Decimal, pydantic.Field(max_digits=8, decimal_places=2)]
    paid: dt.datetime
    mood: Mood


RECEIPT = (
    '{"type":"object","properties":{"shop":{"anyOf":[{"type":"string"},{"type":"null"}]},'
    '"lines":{"type":"array","items":{"type":"object","properties":{"item":{"description":"What was bought",'
    '"type":"string","minLength":2},"count":{"type":"integer","minimum":1,"maximum":99}},'
    '"required":["item","count"],"additionalProperties":false}},'
    '"total":{"description":"(at most 2 decimal places)","type":"number"},'
    '"paid":{"type":"string","format":"date-time"},"mood":{"type":"string","enum":["good","bad"]}},'
    '"required":["shop","lines","total","paid","mood"],"additionalProperties":false}'
)
RECEIPT_DTYPE = pl.Struct(
    {
        "shop": pl.String,
        "lines": pl.List(pl.Struct({"item": pl.String, "count": pl.Int64})),
        "total": pl.Decimal(8, 2),
        "paid": pl.Datetime("us", "UTC"),
        "mood": pl.Enum(["good", "bad"]),
    }
)


def one(schema: Any, text: str | None) -> tuple[Any, str | None]:
    """What a single answer reads as."""
    values, reasons = freeze(schema).read(pl.Series("t", [text], dtype=pl.String))
    return values.to_list()[0], reasons[0]


# --- the frozen form -----------------------------------------------------------------------------


@pytest.mark.parametrize("schema", [Receipt, ReceiptClass, ReceiptDict, json.loads(RECEIPT)])
def test_however_it_is_written_a_schema_has_one_text(schema: Any) -> None:
    frozen = freeze(schema)
    assert json.loads(frozen.json)["properties"].keys() == json.loads(RECEIPT)["properties"].keys()
    if not isinstance(schema, dict):  # JSON Schema has no decimals
        assert frozen.json == RECEIPT
        assert frozen.dtype == RECEIPT_DTYPE


def test_dtypes_have_the_same_text_as_types() -> None:
    fields = {"a": pl.String, "b": pl.List(pl.Int64), "c": pl.Struct({"d": pl.Date, "e": pl.Enum(["x"])})}
    inner = {"d": dt.date, "e": Literal["x"]}
    texts = {
        freeze(schema).json
        for schema in (
            fields,
            pl.Schema(fields),
            pl.Struct(fields),
            {"a": str, "b": list[int], "c": inner},
            {"a": str, "b": tuple[int, ...], "c": pl.Struct(fields["c"].fields)},  # type: ignore[attr-defined]
        )
    }
    assert len(texts) == 1


@given(SCHEMAS)
def test_our_own_text_reads_back_as_itself(kind: Kind) -> None:
    frozen = freeze(kind.annotation)
    assert json.dumps(json.loads(frozen.json), separators=(",", ":"), ensure_ascii=False) == frozen.json
    assert frozen.dtype == kind.dtype
    assert pickle.loads(pickle.dumps(frozen)) == frozen
    # JSON Schema does not know narrow integers and decimals; the wire form is the same all the same.
    assert freeze(json.loads(frozen.json)).json == frozen.json


@given(SCHEMAS)
def test_what_is_frozen_is_taken_by_both_providers(kind: Kind) -> None:
    text = freeze(kind.annotation).json
    assert _openai_complaint(worded(text, OPENAI).encode()) is None
    if text.count("anyOf") <= 16:
        assert _anthropic_complaint(worded(text, ANTHROPIC).encode()) is None


def test_what_a_provider_does_not_enforce_is_said_in_words() -> None:
    lines = json.loads(worded(RECEIPT, ANTHROPIC))["properties"]["lines"]["items"]["properties"]
    assert lines == {
        "item": {"description": "What was bought (minLength 2)", "type": "string"},
        "count": {"description": "(minimum 1, maximum 99)", "type": "integer"},
    }
    lines = json.loads(worded(RECEIPT, OPENAI))["properties"]["lines"]["items"]["properties"]
    assert lines == {
        "item": {"description": "What was bought (minLength 2)", "type": "string"},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    }


def test_defaults_and_docstrings_do_not_change_the_text() -> None:
    class Plain(pydantic.BaseModel):
        n: int

    class Dressed(pydantic.BaseModel):
        """What this is for."""

        n: int = 3

    assert freeze(Plain).json == freeze(Dressed).json


def test_property_order_is_kept() -> None:
    assert freeze({"b": int, "a": int}).json != freeze({"a": int, "b": int}).json
    assert freeze({"b": int, "a": int}).dtype == pl.Struct({"b": pl.Int64, "a": pl.Int64})


def test_wrapped_annotations_are_seen_through() -> None:
    user = NewType("user", int)
    frozen = freeze({"id": user, "key": UUID, "pair": tuple[float, float]})
    assert frozen.dtype == pl.Struct({"id": pl.Int64, "key": pl.String, "pair": pl.Array(pl.Float64, 2)})


def test_an_alias_is_the_name() -> None:
    class Aliased(pydantic.BaseModel):
        kind: str = pydantic.Field(alias="type")

    assert freeze(Aliased).dtype == pl.Struct({"type": pl.String})


def test_constraints_on_a_dtype_count_and_do_not_widen_it() -> None:
    found = freeze(
        {
            "a": Annotated[pl.Int8, pydantic.Field(ge=-1_000, le=5), "How many"],
            "b": Annotated[pl.List(pl.String), pydantic.Field(min_length=1)],
        }
    )
    fields = json.loads(found.json)["properties"]
    assert fields["a"] == {"description": "How many", "type": "integer", "minimum": -128, "maximum": 5}
    assert fields["b"] == {"type": "array", "items": {"type": "string"}, "minItems": 1}
    assert found.dtype == pl.Struct({"a": pl.Int8, "b": pl.List(pl.String)})


@pydantic.dataclasses.dataclass
class LineOfPydantic:
    item: str = pydantic.Field(description="What was bought", min_length=2)
    count: int = pydantic.Field(default=1, alias="n", ge=1, le=99)


def test_fields_of_a_pydantic_dataclass_are_those_of_a_model() -> None:
    class Model(pydantic.BaseModel):
        item: str = pydantic.Field(description="What was bought", min_length=2)
        n: int = pydantic.Field(default=1, ge=1, le=99)

    assert freeze(LineOfPydantic).json == freeze(Model).json


def test_references_and_wrappers_of_json_schema() -> None:
    schema = Receipt.model_json_schema()
    del schema["properties"]["total"]  # pydantic prints a decimal as a number or a text
    schema["required"].remove("total")
    frozen = freeze(schema)
    assert frozen.dtype == pl.Struct([f for f in RECEIPT_DTYPE.fields if f.name != "total"])


def test_pydantic_is_not_needed() -> None:
    code = (
        "import sys\nfrom polars_llm.schema import freeze\n"
        "freeze({'a': int, 'b': list[str]})\nassert 'pydantic' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- reading -------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(schemas_with_values())
def test_any_value_of_any_schema_survives_json(drawn: tuple[Kind, list[tuple[str, Any]]]) -> None:
    kind, rows = drawn
    text = pl.Series("answer", [None, *(text for text, _ in rows)], dtype=pl.String)
    values, reasons = freeze(kind.annotation).read(text)
    assert values.dtype == kind.dtype
    assert values.name == "answer"
    assert reasons.to_list() == [None] * (len(rows) + 1)
    assert values.to_list() == [None, *(value for _, value in rows)]


@given(schemas_with_values())
def test_chunks_and_order_do_not_matter(drawn: tuple[Kind, list[tuple[str, Any]]]) -> None:
    kind, rows = drawn
    schema: Schema = freeze(kind.annotation)
    text = pl.Series("t", [text for text, _ in rows] + ["{", None], dtype=pl.String)
    whole, _ = schema.read(text)
    parts = [schema.read(text.slice(i, 1))[0] for i in range(len(text))]
    assert pl.concat(parts).to_list() == whole.to_list()


MISFITS: list[tuple[Any, str, str]] = [
    (int, "1.5", "Expected `int`, got `float`"),
    (int, "true", "Expected `int`, got `bool`"),
    (int, str(2**63), "Expected `int` <="),
    (pl.UInt8, "256", "Expected `int` <= 255"),
    (pl.Float32, "1e39", "maximum"),
    (float, "1e999", "out of range"),
    (str, "1", "Expected `str`"),
    (str, "null", "Expected `str`, got `null`"),
    (dt.date, '"2026-13-01"', "date"),
    (dt.datetime, '"yesterday"', "datetime"),
    (dt.datetime, '"0001-01-01T00:00:00+14:00"', "out of range"),
    (pl.Datetime("ns"), '"2300-01-01T00:00:00Z"', "nanoseconds"),
    (pl.Decimal(5, 2), "1.234", "more than 2 decimal places"),
    (pl.Decimal(5, 2), "1000", "more than 5 digits"),
    (Decimal, '"NaN"', "not a number"),
    (UUID, '"x"', "not of format uuid"),
    (Literal["a", "A"], '"á"', "Invalid enum value"),
    (Annotated[float, pydantic.Field(multiple_of=0.1)], "0.35", "multipleOf"),
    (Annotated[int, pydantic.Field(gt=1, ge=0, lt=3, multiple_of=2)], "1", ">= 2"),
    (Annotated[int, pydantic.Field(gt=1.5, multiple_of=2)], "3", "multiple of 2"),
    (Annotated[Decimal, pydantic.Field(multiple_of=0.1, ge=0)], "0.35", "multipleOf"),
    (Annotated[Decimal, pydantic.Field(gt=0)], "0", "exclusiveMinimum"),
    (Decimal, "12345678901234567890123456789.1234567891", "more than 9 decimal places"),
    (Decimal, "1e999999", "digits"),
    (dt.timedelta, '"P999999999D"', "out of range"),
    (pl.Duration("ns"), '"P106752D"', "out of range"),
    (int, "1e9999999999", "out of range"),
    (int, "1e-9999999", "int"),
    (Annotated[list[int], pydantic.Field(min_length=1)], "[]", "length >= 1"),
    (tuple[int, int], "[1]", "length"),
]


@pytest.mark.parametrize(("annotation", "value", "reason"), MISFITS)
def test_what_does_not_fit_is_null_with_its_reason(annotation: Any, value: str, reason: str) -> None:
    found, said = one({"field": annotation}, f'{{"field": {value}}}')
    assert found is None
    assert said is not None
    assert reason in said
    assert "field" in said or annotation is float


@pytest.mark.parametrize("text", ["", "no", "[]", "3", "null", "{}", '{"n": 1', '{"n": 1} {"n": 1}'])
def test_text_that_is_not_such_an_object(text: str) -> None:
    found, said = one({"n": int}, text)
    assert found is None
    assert said


def test_all_digits_of_a_wide_decimal_are_kept() -> None:
    value = "12345678901234567890123456789.123456789"
    assert one({"d": Decimal}, f'{{"d": {value}}}') == ({"d": Decimal(value)}, None)
    assert one({"d": Decimal}, '{"d": 100.10000000000000}') == ({"d": Decimal("100.1")}, None)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["P999999999D", "PT1S", "0001-01-01", "9999-12-31T23:59:59-14:00", "24:00:00Z", ""])
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150)
@given(SCHEMAS, st.lists(JSON.map(json.dumps) | TEXT, max_size=4), st.data())
def test_whatever_a_model_writes_is_a_value_or_a_reason(
    kind: Kind, texts: list[str], data: st.DataObject
) -> None:
    # Objects with the right names reach the fields, whatever they hold.
    names = list(dict(kind.dtype))
    texts += [json.dumps({name: data.draw(JSON) for name in names}) for _ in range(3)]
    values, reasons = freeze(kind.annotation).read(pl.Series(texts))
    assert values.dtype == kind.dtype
    assert (values.is_null() == reasons.is_not_null()).all()


@given(SCHEMAS, TEXT)
def test_what_a_provider_is_held_to_fits(kind: Kind, prompt: str) -> None:
    frozen = freeze(kind.annotation)
    for rules in (OPENAI, ANTHROPIC):
        try:
            wire = json.loads(worded(frozen.json, rules))
        except InvalidRequest:
            continue  # more nullable fields than it takes
        if rules is OPENAI or "minimum" not in frozen.json:
            _, reasons = frozen.read(pl.Series([conforming(wire, prompt)]))
            assert reasons.to_list() == [None]


def test_a_misfit_deep_down_names_its_path() -> None:
    _, said = one({"a": {"b": list[int]}}, '{"a": {"b": [1, "x"]}}')
    assert said == "Expected `int`, got `str` - at `$.a.b[1]`"


def test_letter_case_of_labels_is_forgiven_and_exact_labels_win() -> None:
    assert one({"m": Mood | None}, '{"m": "GOOD"}') == ({"m": "good"}, None)
    assert one({"m": list[Literal["STRASSE"]]}, '{"m": ["Straße"]}') == ({"m": ["STRASSE"]}, None)
    assert one({"m": Mood, "N": {"k": int}}, '{"M": "good", "n": {"K": 1}}') == (
        {"m": "good", "N": {"k": 1}},
        None,
    )
    both = {"m": Literal["a", "A"]}
    assert one(both, '{"m": "A"}') == ({"m": "A"}, None)


def test_whole_numbers_may_have_a_point_and_nothing_else_is_lost_with_them() -> None:
    schema = {"n": int, "d": pl.Decimal(20, 18), "f": float}
    text = '{"n": 3.0, "d": 0.123456789012345678, "f": 0.1}'
    assert one(schema, text) == ({"n": 3, "d": Decimal("0.123456789012345678"), "f": 0.1}, None)


def test_properties_that_nobody_asked_for_are_ignored() -> None:
    assert one({"n": int}, '{"why": "because", "n": 1}') == ({"n": 1}, None)


def test_times_with_a_zone_and_without() -> None:
    schema = {"utc": dt.datetime, "local": pl.Datetime("ms", "Europe/Berlin"), "wall": pl.Datetime("us")}
    stamp = '"2026-07-01T12:00:00+02:00"'
    found, _ = one(schema, f'{{"utc": {stamp}, "local": {stamp}, "wall": {stamp}}}')
    assert found["utc"].isoformat() == "2026-07-01T10:00:00+00:00"
    assert found["local"].isoformat() == "2026-07-01T12:00:00+02:00"
    assert found["wall"] == dt.datetime(2026, 7, 1, 12)


def test_no_rows() -> None:
    values, reasons = freeze(Receipt).read(pl.Series("x", [], dtype=pl.String))
    assert (values.dtype, values.len(), reasons.dtype) == (RECEIPT_DTYPE, 0, pl.String)


# --- what cannot be mapped -------------------------------------------------------------------------


class Tree(pydantic.BaseModel):
    children: list[Tree]


class Root(pydantic.RootModel[list[int]]):
    pass


class Open(pydantic.BaseModel):
    scores: dict[str, float]


class Mixed(enum.Enum):
    A = "a"
    B = 1


class Nothing(pydantic.BaseModel):
    pass


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {"a": int}


class Unresolved(pydantic.BaseModel):
    a: NotThere  # type: ignore[name-defined]  # noqa: F821


@dataclasses.dataclass
class UnresolvedClass:
    a: NotThere  # type: ignore[name-defined]  # noqa: F821


@dataclasses.dataclass
class Misspelt:
    a: dt.Date  # type: ignore[name-defined]


class Twins(pydantic.BaseModel):
    a: int = pydantic.Field(alias="n")
    b: int = pydantic.Field(alias="n")


def in_json(field: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": field}, "$defs": {"n": {"type": "integer"}}}


INSIDE_ITSELF: dict[str, Any] = {}
INSIDE_ITSELF["a"] = INSIDE_ITSELF

REFUSED: list[tuple[Any, str, str]] = [
    (int, "The schema is not an object", ""),
    (list[Receipt], "The schema is not an object", ""),
    (None, "", ""),
    ("Receipt", "", ""),
    ({"a": "string"}, "'a'", "pl.String"),
    ({"a": Line(item="pear", count=1)}, "'a'", "the class itself"),
    (LineClass("pear"), "LineClass", "the class itself"),
    ({}, "has no fields", ""),
    (Nothing, "has no fields", ""),
    (Tree, "'children[]'", "inside itself"),
    (Open, "'scores'", "closed"),
    (Unresolved, "Unresolved", "module level"),
    (UnresolvedClass, "NotThere", "module level"),
    ({"a": {"b": list[int | str]}}, "'a.b[]'", "one type"),
    ({"a": Any}, "'a'", "no dtype"),
    ({"a": bytes}, "'a'", "bytes"),
    ({"a": set[str]}, "'a'", "no dtype"),
    ({"a": list}, "'a'", "list[str]"),
    ({"a": tuple[int, str]}, "'a'", "places differ"),
    ({"a": Mixed}, "'a'", "one kind"),
    ({"a": Literal[True]}, "'a'", "one kind"),
    ({"a": pl.UInt64}, "'a'", "Int64"),
    ({"a": pl.List(pl.Categorical)}, "'a[]'", "Enum"),
    ({"a": pl.Object}, "'a'", "dtype"),
    ({"a": pl.List}, "'a'", "parts"),
    ({"a": pl.Enum([])}, "'a'", "categories"),
    ({"a": Annotated[int, pydantic.Field(multiple_of=0.5)]}, "'a'", "whole number"),
    ({'a"b': int}, "named", ""),
    ({"": int}, "named", ""),
    ({1: int}, "names in JSON are strings", ""),
    ({"a": Annotated[str, pydantic.Field(pattern="(")]}, "'a'", "pattern"),
    ({"a": Annotated[int, pydantic.Field(min_length=1)]}, "'a'", "minLength"),
    ({"type": "array", "items": {"type": "string"}}, "The schema is not an object", ""),
    ({"type": "object", "properties": {}}, "no properties", ""),
    ({"type": "object", "properties": {"a": {}}}, "'a'", "no type"),
    ({"type": "object", "properties": {"a": {"type": "string", "not": {}}}}, "'a'", "'not'"),
    ({"type": "object", "properties": {"a": {"type": ["string", "integer"]}}}, "'a'", "several types"),
    ({"type": "object", "properties": {"a": {"type": "array"}}}, "'a'", "items"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/no"}}}, "'a'", "not there"),
    ({"type": "object", "properties": {"a": {"$ref": "https://x.example/a"}}}, "'a'", "outside"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "'a'", ""),
    ({"type": "object", "properties": {"a": {"type": "object", "additionalProperties": True}}}, "'a'", ""),
    ({"type": "object", "properties": {"a": {"type": "number", "minimum": "x"}}}, "'a'", "not a number"),
    # What would be lost without a word, or paid for in vain.
    (in_json({"$ref": "#/$defs/n", "minimum": 3}), "'a'", "'minimum' beside '$ref'"),
    (in_json({"anyOf": [{"type": "integer"}, {"type": "null"}], "maximum": 3}), "'a'", "beside 'anyOf'"),
    ({**in_json({"type": "integer"}), "allOf": [{"$ref": "#/$defs/n"}]}, "The schema", "beside 'allOf'"),
    (in_json({"allOf": [{"type": "integer"}, {"minimum": 1}]}), "'a'", "several schemas at once"),
    ({**in_json({"type": "integer"}), "required": ["b"]}, "requires 'b'", "mend the name"),
    ({**in_json({"type": "integer"}), "required": "a"}, "required 'a'", "no list"),
    (in_json({"type": "integer", "minimum": 2, "maximum": 1}), "'a'", "nothing fits"),
    ({"a": Annotated[float, pydantic.Field(gt=1, le=1)]}, "'a'", "nothing fits"),
    ({"a": Annotated[str, pydantic.Field(min_length=2, max_length=1)]}, "'a'", "nothing fits"),
    ({"a": Annotated[pl.Int8, pydantic.Field(ge=200)]}, "'a'", "minimum 200 and maximum 127"),
    ({"a": Annotated[Decimal, pydantic.Field(max_digits=5)]}, "'a'", "no decimal_places"),
    ({"a": Annotated[Decimal, pydantic.Field(max_digits=3, decimal_places=4)]}, "'a'", "4 are decimal"),
    ({"a": Annotated[Decimal, pydantic.Field(max_digits=39, decimal_places=4)]}, "'a'", "1 to 38"),
    ({"a": pl.Decimal(39, 2)}, "'a'", "1 to 38"),
    (Twins, "Twins", "'n'"),
    # What is no schema at all.
    (in_json({"enum": [[1]]}), "'a'", "lists or objects"),
    (in_json({"enum": 5}), "'a'", "no list"),
    (in_json({"type": "integer", "enum": ["x"]}), "'a'", "values that are strings"),
    (in_json({"anyOf": 5}), "'a'", "no list"),
    (in_json({"type": 5}), "'a'", "type 5"),
    (in_json({"type": "string", "format": ["date"]}), "'a'", "no text"),
    ({"type": "object", "properties": ["a"]}, "properties ['a']", "no dict"),
    ({"type": "object", "properties": {1: {"type": "integer"}}}, "names in JSON are strings", ""),
    ({"name": "a", "strict": True, "schema": {}}, "response_format", "under 'schema'"),
    ({"type": "json_schema", "json_schema": {}}, "response_format", "under 'schema'"),
    ({"a": typing.List}, "'a'", "list[str]"),  # noqa: UP006 (the older spelling is the point)
    (INSIDE_ITSELF, "'a'", "inside itself"),
    (Misspelt, "cannot be resolved", "module level"),
    ({"a": pydantic.AnyUrl}, "'a'", "str for an address"),
]


@pytest.mark.parametrize(("schema", "where", "why"), REFUSED)
def test_what_cannot_be_mapped_is_refused_with_path_and_reason(schema: Any, where: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        freeze(schema)
    assert where in str(refused.value)
    assert why in str(refused.value)
    assert str(refused.value).endswith("Nothing was sent.")


@pytest.mark.parametrize(
    ("schema", "rules", "why"),
    [
        (nested(10), OPENAI, "levels deep"),
        ({f"f{i}": int | None for i in range(17)}, ANTHROPIC, "17 fields that may be null"),
        ({f"f{i}": int for i in range(5_001)}, OPENAI, "5,001 properties"),
        ({"f": Literal[tuple(f"v{i}" for i in range(1_001))]}, OPENAI, "1,001 labels"),
        ({"f": Literal[tuple(f"{i:0100}" for i in range(251))]}, OPENAI, "'f' has 251 labels"),
        ({"f" * 120_001: int}, OPENAI, "characters"),
    ],
)
def test_limits_of_providers(schema: Any, rules: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        worded(freeze(schema).json, rules)


def test_what_only_one_provider_cannot_take() -> None:
    worded(freeze({f"f{i}": int | None for i in range(16)}).json, ANTHROPIC)
    worded(freeze({f"f{i}": int | None for i in range(17)}).json, OPENAI)
    worded(freeze(nested(9)).json, OPENAI)
    worded(freeze(nested(12)).json, ANTHROPIC)
