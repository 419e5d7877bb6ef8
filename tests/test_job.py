"""A job's transitions and its record."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.job import Job, State


def planned() -> Job:
    return Job.plan(
        provider="openai", base_url=None, endpoint="/v1/chat/completions", model="gpt-6-luna", requests=3
    )


def at(state: State) -> Job:
    """A job in `state`, however it came there."""
    return Job.from_dict({**planned().to_dict(), "state": state.value})


HOW_IT_WORKS = Path(__file__).parent.parent / "docs" / "how-it-works.md"


def test_the_table_is_the_diagram() -> None:
    diagram = HOW_IT_WORKS.read_text().partition("```mermaid")[2].partition("```")[0]
    drawn = {(State(a), State(b)) for a, b in re.findall(r"^\s*(\w+) --> (\w+)", diagram, re.MULTILINE)}
    allowed = set()
    for a, b in itertools.permutations(State, 2):
        try:
            at(a).to(b)
        except ValueError:
            continue
        allowed.add((a, b))
    assert allowed == drawn


@pytest.mark.parametrize("state", [s for s in State if not s.is_open])
def test_closed_jobs_never_move(state: State) -> None:
    for target in State:
        with pytest.raises(ValueError, match="no transition"):
            at(state).to(target)


@pytest.mark.parametrize("state", [s for s in State if s.is_open])
def test_open_jobs_may_learn_facts_where_they_are(state: State) -> None:
    assert at(state).to(state, done=2).done == 2


@given(
    state=st.sampled_from(State),
    done=st.integers(0, 10**6),
    reason=st.none() | st.text(max_size=20),
    base_url=st.none() | st.just("https://host.example/v1"),
)
def test_record_round_trip(state: State, done: int, reason: str | None, base_url: str | None) -> None:
    job = Job.from_dict(
        {**planned().to_dict(), "state": state.value, "done": done, "reason": reason, "base_url": base_url}
    )
    assert Job.from_dict(job.to_dict()) == job


def test_facts_of_a_newer_version_are_ignored() -> None:
    job = planned()
    assert Job.from_dict({**job.to_dict(), "colour": "blue"}) == job
