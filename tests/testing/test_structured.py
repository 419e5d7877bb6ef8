"""Structured outputs: what the built-in model answers obeys the schema, as pydantic judges it."""

from __future__ import annotations

import datetime as dt
import enum
import ipaddress
import json
import uuid
from collections.abc import Callable
from typing import Annotated, Any, Literal

import anthropic
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from polars_llm.testing import Provider
from polars_llm.testing.structured import conforming

from .conftest import ask, by_id, chat_line, raises, results, rows, submit


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Colour(enum.Enum):
    RED = "red"
    GREEN = "green"


class Address(Closed):
    street: str
    number: int | None


class Person(Closed):
    name: str
    born: dt.date
    seen: dt.datetime
    colour: Colour
    kind: Literal["human"]
    address: Address
    others: list[Address]
    score: float
    happy: bool
    mark: Literal[1, 2, 3]
    either: int | str
    mail: Annotated[str, Field(json_schema_extra={"format": "email"})]
    key: uuid.UUID
    ip: ipaddress.IPv4Address


class Tree(Closed):
    value: int
    children: list[Tree]
    parent: Tree | None


class Bounded(Closed):
    percent: Annotated[int, Field(ge=10, le=20)]
    share: Annotated[float, Field(gt=0, lt=1)]
    even: Annotated[int, Field(multiple_of=4, ge=101)]
    tags: Annotated[list[str], Field(min_length=3, max_length=4)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{3}-\d{4}$")]


TEXT = "A red house. Anna was born here and she is 12 years old."


def test_openai_parses_every_kind_of_field(p: Provider, oai: openai.OpenAI) -> None:
    completion = oai.chat.completions.parse(
        model="gpt-6-luna", messages=[{"role": "user", "content": TEXT}], response_format=Person
    )
    person = completion.choices[0].message.parsed
    assert person is not None
    assert person.colour is Colour.RED
    assert person.address.number == 12
    response = oai.responses.parse(model="gpt-6-luna", input=TEXT, text_format=Person)
    assert response.output_parsed == person
    assert p.bill().billed == 2


def test_recursion_ends_and_bounds_hold(oai: openai.OpenAI) -> None:
    for kind in (Tree, Bounded):
        response = oai.responses.parse(model="gpt-6-luna", input=TEXT, text_format=kind)
        assert isinstance(response.output_parsed, kind)


def test_anthropic_parses_every_kind_of_field(ant: anthropic.Anthropic) -> None:
    message = ant.messages.parse(
        model="claude-haiku-5-5",
        max_tokens=4_000,
        messages=[{"role": "user", "content": TEXT}],
        output_format=Person,
    )
    assert message.parsed_output is not None
    assert message.parsed_output.colour is Colour.RED


LABELS = {"type": "string", "enum": ["positive", "negative", "neutral"]}
ONE_LABEL = {
    "type": "object",
    "properties": {"label": LABELS},
    "required": ["label"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("prompt", "label"),
    [
        ("This is positive.", "positive"),
        ("Perfect, I love it, works great!", "positive"),
        ("It broke after a day. Terrible.", "negative"),
        ("It is positive, negative or neutral: the screen died, awful.", "negative"),
        ("The parcel came on Tuesday.", "neutral"),
    ],
)
def test_labels_follow_the_prompt(prompt: str, label: str) -> None:
    assert json.loads(conforming(ONE_LABEL, prompt)) == {"label": label}


def test_schemas_work_in_batches_on_both_protocols(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    named = {"name": "label", "schema": ONE_LABEL, "strict": True}
    format_ = {"type": "json_schema", "json_schema": named}
    line = chat_line("a", "I love it.", response_format=format_)
    done = oai.batches.retrieve(submit(oai, [line]).id)
    assert done.output_file_id is not None
    body = by_id(rows(oai, done.output_file_id))["a"]["response"]["body"]
    assert json.loads(body["choices"][0]["message"]["content"]) == {"label": "positive"}
    config = {"format": {"type": "json_schema", "schema": ONE_LABEL}}
    request: Any = ask("a", "I love it.", output_config=config)
    batch = ant.messages.batches.create(requests=[request])
    ant.messages.batches.retrieve(batch.id)
    message = results(ant, batch.id)["a"].message
    assert json.loads(message.content[0].text) == {"label": "positive"}


def test_markers_spoil_a_structured_answer(oai: openai.OpenAI) -> None:
    named: Any = {"name": "label", "schema": ONE_LABEL, "strict": True}

    def answer(prompt: str) -> str:
        completion = oai.chat.completions.create(
            model="gpt-6-luna",
            messages=[{"role": "user", "content": prompt}],
            response_format={"type": "json_schema", "json_schema": named},
        )
        return completion.choices[0].message.content or ""

    assert answer("I love it. [[case]]") == '{"LABEL":"POSITIVE"}'
    for marker in ("not_json", "length"):
        with pytest.raises(json.JSONDecodeError):
            json.loads(answer(f"I love it. [[{marker}]]"))


def _with(**change: Any) -> dict[str, Any]:
    return {**ONE_LABEL, **change}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string"},
        {"anyOf": [ONE_LABEL]},
        _with(additionalProperties=True),
        _with(required=[]),
        _with(properties={"label": {**LABELS, "default": "neutral"}}),
        _with(properties={"label": {"allOf": [LABELS]}}),
        _with(properties={"label": {"type": "object", "additionalProperties": LABELS}}),
        _with(properties={"label": {"$ref": "#/$defs/nowhere"}}),
    ],
)
def test_what_strict_mode_refuses(oai: openai.OpenAI, schema: dict[str, Any]) -> None:
    named: Any = {"name": "label", "schema": schema, "strict": True}
    error = raises(openai.BadRequestError)(
        lambda: oai.chat.completions.create(
            model="gpt-6-luna",
            messages=[{"role": "user", "content": "Hello."}],
            response_format={"type": "json_schema", "json_schema": named},
        )
    )
    assert error.code == "invalid_json_schema" or "resolve" in str(error)


def _many(count: int, schema: dict[str, Any]) -> dict[str, Any]:
    return {f"p{i}": schema for i in range(count)}


NULLABLE = {"anyOf": [{"type": "string"}, {"type": "null"}]}


@pytest.mark.parametrize(
    "schema",
    [
        _with(additionalProperties=True),
        _with(properties={"label": {"type": "integer", "minimum": 0}}),
        _with(properties={"label": {"type": "array", "items": LABELS, "minItems": 2}}),
        _with(properties=_many(17, NULLABLE), required=list(_many(17, NULLABLE))),
        _with(properties=_many(25, LABELS), required=[]),
        _with(properties={"label": {"$ref": "#/$defs/nowhere"}}),
        _with(
            properties={"label": {"$ref": "#/$defs/node"}},
            **{"$defs": {"node": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}},
        ),
    ],
)
def test_what_anthropic_refuses(ant: anthropic.Anthropic, schema: dict[str, Any]) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    error = raises(anthropic.BadRequestError)(
        lambda: ant.messages.create(
            model="m",
            max_tokens=100,
            messages=[{"role": "user", "content": "Hello."}],
            output_config=config,
        )
    )
    assert error.type == "invalid_request_error"


# ---- any schema at all: each is drawn together with what it means

Drawn = tuple[dict[str, Any], Callable[[Any], bool]]


def _one_of(values: list[Any]) -> Drawn:
    return {"enum": values}, lambda value: value in values


def _integers(bounds: tuple[int, int]) -> Drawn:
    low, high = sorted(bounds)
    schema = {"type": "integer", "minimum": low, "maximum": high}
    return schema, lambda value: type(value) is int and low <= value <= high


def _strings(bounds: tuple[int, int]) -> Drawn:
    low, high = sorted(bounds)
    schema = {"type": "string", "minLength": low, "maxLength": high}
    return schema, lambda value: isinstance(value, str) and low <= len(value) <= high


def _nullable(inner: Drawn) -> Drawn:
    schema, means = inner
    return {"anyOf": [{"type": "null"}, schema]}, lambda value: value is None or means(value)


def _list_of(inner: Drawn, bounds: tuple[int, int]) -> Drawn:
    (schema, means), (low, high) = inner, sorted(bounds)
    whole = {"type": "array", "items": schema, "minItems": low, "maxItems": high}
    return whole, lambda value: low <= len(value) <= high and all(map(means, value))


def _object_of(fields: dict[str, Drawn]) -> Drawn:
    whole = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in fields.items()},
        "required": list(fields),
        "additionalProperties": False,
    }
    return (
        whole,
        lambda value: (
            value.keys() == fields.keys() and all(fields[name][1](inner) for name, inner in value.items())
        ),
    )


_pairs = st.tuples(st.integers(0, 6), st.integers(0, 6))
_leaves = st.one_of(
    st.lists(st.text(min_size=1), min_size=1, unique=True).map(_one_of),
    st.tuples(st.integers(-50, 50), st.integers(-50, 50)).map(_integers),
    _pairs.map(_strings),
    st.just(({"type": "boolean"}, lambda value: isinstance(value, bool))),
    st.just(({"type": "number"}, lambda value: isinstance(value, int | float))),
    st.just(({"type": ["null", "string"]}, lambda value: isinstance(value, str | None))),
)
_schemas = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        inner.map(_nullable),
        st.builds(_list_of, inner, _pairs),
        st.dictionaries(st.text(min_size=1), inner, max_size=3).map(_object_of),
    ),
    max_leaves=6,
)


@given(drawn=_schemas, prompt=st.text())
@settings(max_examples=200, deadline=None)
def test_any_schema_is_obeyed(drawn: Drawn, prompt: str) -> None:
    schema, means = drawn
    assert means(json.loads(conforming(schema, prompt)))
    assert conforming(schema, prompt) == conforming(schema, prompt)
