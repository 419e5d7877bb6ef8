"""The numbers and the table in docs/realtime.md are those of the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from polars_llm.backends import gate, pace, realtime
from polars_llm.backends.base import verdict
from polars_llm.jobs.lookup import Policy

TEXT = (Path(__file__).parents[1] / "docs" / "realtime.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (?!---|the host says)(.+?) \| (.+?) \|$", TEXT, re.MULTILINE))
WORDS = {"two": 2, "three": 3, "five": 5, "ten": 10, "twenty": 20}


def row(start: str) -> tuple[str, str]:
    (found,) = [(host, what) for host, what in ROWS.items() if host.startswith(start)]
    return found


def codes(text: str) -> set[int]:
    return {int(code) for code in re.findall(r"\b\d{3}\b", text)}


def number(pattern: str, text: str = TEXT) -> int:
    (found,) = re.findall(pattern, text)
    return WORDS.get(found) or int(found)


def test_what_was_not_taken_goes_again() -> None:
    host, what = row("429")
    assert codes(host) <= gate.NOT_TAKEN
    assert all(verdict(code).transient for code in codes(host))
    assert number(r"up to (\w+) times", what) == realtime._NOT_TAKEN_TRIES


def test_what_failed_in_passing_is_tried_so_often() -> None:
    host, what = row("500")
    assert all(verdict(code).transient for code in codes(host))
    attempts = inspect.signature(Policy).parameters["max_attempts"].default
    assert number(r"up to (\w+) times in all", what) == attempts


def test_what_is_the_accounts_ends_the_run() -> None:
    host, what = row("401")
    assert all(verdict(code).account or code in realtime._WRONG_ADDRESS for code in codes(host))
    assert number(r"^(\w+) in a row", what) == gate._REFUSALS_IN_A_ROW


def test_what_is_one_prompts_is_remembered() -> None:
    host, _ = row("400")
    assert not any(verdict(code).account or verdict(code).transient for code in codes(host))


def test_the_breaker() -> None:
    host, _ = row("more than half")
    assert number(r"last (\w+)", host) == pace._LOOKS_AT
    assert number(r"once there are (\w+)", host) == pace._NEEDS


def test_patience() -> None:
    host, _ = row("nothing taken")
    assert number(r"for (\w+) minutes", host) * 60 == realtime.Realtime.patience
    assert number(r"first (\d+) seconds", host) == realtime.Realtime.patience_unreachable


@pytest.mark.parametrize(
    ("pattern", "value"),
    [(r"\(default (\d+)\)", realtime.MAX_CONCURRENCY), (r"every second, or every (\d+)", 250)],
)
def test_other_numbers(pattern: str, value: int) -> None:
    assert number(pattern) == value
    assert realtime._BLOCK_REPLIES == 250
    assert realtime._BLOCK_SECONDS == 1
