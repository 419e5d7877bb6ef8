"""Reconciling replies against what was sent: right, or pending, or failed with a reason."""

from __future__ import annotations

from typing import Any

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.answer import DONE, FAILED, RETRY
from polars_llm.backends.replies import REPLY_SCHEMA
from polars_llm.jobs.ingest import reconcile


def key(n: int) -> bytes:
    return n.to_bytes(32, "big")


def sent(*numbers: int) -> pl.DataFrame:
    rows = {"key": [key(n) for n in numbers], "attempt": [1] * len(numbers)}
    return pl.DataFrame(rows, schema={"key": pl.Binary, "attempt": pl.UInt16})


def replies(*rows: tuple[int, int, str | None]) -> pl.DataFrame:
    facts: list[dict[str, Any]] = [{"key": key(n), "state": state, "text": text} for n, state, text in rows]
    return pl.DataFrame(facts, schema=REPLY_SCHEMA)


@given(
    numbers=st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=12),
    lines=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([DONE, FAILED, RETRY])), max_size=30),
    why=st.sampled_from(["completed", "expired", "cancelled"]),
)
def test_one_answer_for_each_key_on_its_own_key(
    numbers: list[int], lines: list[tuple[int, int]], why: str
) -> None:
    answers = reconcile(sent(*numbers), replies(*[(n, s, f"text {n}") for n, s in lines]), why)
    assert answers["key"].to_list() == [key(n) for n in numbers]
    for number, state, text in zip(numbers, answers["state"], answers["text"], strict=True):
        states = [s for n, s in lines if n == number]
        if states:
            assert state == min(states)
            assert text == f"text {number}"
        else:
            assert state == (FAILED if why == "completed" else RETRY)
            assert text is None


def test_the_first_of_two_successes_wins() -> None:
    answers = reconcile(
        sent(1), replies((1, FAILED, "no"), (1, DONE, "first"), (1, DONE, "second")), "completed"
    )
    assert answers["text"].to_list() == ["first"]


def test_what_vanished_is_not_sent_again_and_says_why() -> None:
    answers = reconcile(sent(1), replies(), "completed")
    assert answers.select("state", "error").row(0) == (FAILED, "missing_result")
    assert "may have been billed" in answers["error_message"][0]


def test_what_never_ran_is_sent_again() -> None:
    answers = reconcile(sent(1, 2), replies((2, DONE, "paid")), "expired")
    assert answers["state"].to_list() == [RETRY, DONE]
    assert answers["error"].to_list() == ["expired", None]
