"""docs/schema.md says what the code does: its tables and texts are written from the code here."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import polars as pl
import pytest

from polars_llm.frame.labels import Labels
from polars_llm.schema import classes, dtypes, freeze, json_schema
from polars_llm.schema.rules import ANTHROPIC, OPENAI, Rules

PAGE = Path(__file__).parent.parent.parent / "docs" / "schema.md"


def said(kind: str, format_: str | None) -> str:
    return f"`{kind}`, format `{format_}`" if format_ else f"`{kind}`"


def spelled(dtype: Any) -> str:
    text = repr(dtype).replace("time_unit=", "").replace("time_zone=", "").replace("'", '"')
    return "pl." + text.replace("precision=", "").replace("scale=", "")


def python_types() -> str:
    modules = {"datetime": "dt.", "builtins": ""}
    return "\n".join(
        f"| `{modules.get(cls.__module__, '')}{cls.__name__}` | {said(kind, format_)} | `{spelled(dtype)}` |"
        for cls, (kind, format_, dtype) in classes._LEAVES.items()
    )


def polars_dtypes() -> str:
    return "\n".join(
        f"| `pl.{dtype.__name__}` | {said(kind, format_)} |"
        for dtype, (kind, format_) in dtypes._LEAVES.items()
    )


def limits() -> str:
    def number(rules: Rules, name: str) -> str:
        value = getattr(rules, name)
        return "-" if value is None else f"{value:,}"

    rows = {
        "levels of objects": "depth",
        "properties": "properties",
        "characters of names and labels": "characters",
        "labels in all enums": "enum_values",
        "fields that may be null": "unions",
    }
    lines = [f"| {what} | {number(OPENAI, n)} | {number(ANTHROPIC, n)} |" for what, n in rows.items()]
    for what, name in (("enforced constraints", "constraints"), ("enforced formats", "formats")):
        both = [", ".join(sorted(getattr(rules, name) - {"format"})) for rules in (OPENAI, ANTHROPIC)]
        lines.append(f"| {what} | {both[0]} | {both[1]} |")
    return "\n".join(lines)


def system() -> str:
    task = Labels.of({"spam": "unwanted mail", "ham": None}).system("Your own system prompt.")
    assert isinstance(task, str)
    return task


@pytest.mark.parametrize("part", [python_types, polars_dtypes, limits, system])
def test_the_page_says_what_the_code_does(part: Any) -> None:
    assert part() in PAGE.read_text()


@pytest.mark.parametrize(("given", "dtype"), json_schema._LEAVES.items())
def test_a_type_of_json_lands_in_the_dtype_beside_it(
    given: tuple[str, str | None], dtype: pl.DataType
) -> None:
    kind, format_ = given
    assert f"| {said(kind, format_)} | `{spelled(dtype)}` |" in PAGE.read_text()
    field = {"type": kind} if format_ is None else {"type": kind, "format": format_}
    schema = {"type": "object", "properties": {"a": field}, "required": ["a"]}
    assert freeze(schema).dtype == pl.Struct({"a": dtype})


class Ints(enum.Enum):
    ONE = 1
    TWO = 2


class Texts(enum.Enum):
    B = "b"
    A = "a"


class May(TypedDict):
    a: NotRequired[int]


INTEGERS = pl.List(pl.Int64)


@pytest.mark.parametrize(
    ("line", "annotations", "dtype"),
    [
        ("enum class of texts | `enum` of strings | `pl.enum` of", [Literal["b", "a"], Texts], pl.Enum("ba")),
        ("enum class of ints | `enum` of integers | `pl.int64`", [Literal[1, 2], Ints], pl.Int64),
        (
            "| `list[t]`, `tuple[t, ...]`, `sequence[t]` | `array` | `pl.list`",
            [list[int], tuple[int, ...], Sequence[int]],
            INTEGERS,
        ),
        ("| `tuple[t, t]` | `array` of 2 | `pl.array(..., 2)`", [tuple[int, int]], pl.Array(pl.Int64, 2)),
        ("| a class, a dict of fields | `object` | `pl.struct`", [{"b": int}], pl.Struct({"b": pl.Int64})),
        ("| the same dtype, with nulls", [int | None], pl.Int64),
    ],
)
def test_what_is_made_of_others_lands_in_the_dtype_beside_it(
    line: str, annotations: list[Any], dtype: Any
) -> None:
    assert line in PAGE.read_text().lower()
    for annotation in annotations:
        assert freeze({"a": annotation}).dtype == pl.Struct({"a": dtype})


def test_what_may_be_left_out_may_be_null() -> None:
    assert freeze(May).json == freeze({"a": int | None}).json
