"""docs/schema.md says what the code does: its tables and texts are written from the code here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polars_llm.frame.labels import Labels
from polars_llm.schema import classes, dtypes
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
