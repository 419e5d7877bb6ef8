"""Random histories of a ledger, seen through two handles, against a plain dict."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from polars_llm.job import Job, State
from polars_llm.store.ledger import DiskcacheLedger
from tests.store.ledger_contract import a_job

HANDLES = st.integers(0, 1)
FACTS = st.fixed_dictionaries(
    {},
    optional={
        "owner": st.none() | st.text(max_size=5),
        "reason": st.none() | st.text(max_size=5),
        "done": st.integers(0, 2**63 - 1),
        "not_before": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


class LedgerMachine(RuleBasedStateMachine):
    """The oracle is a dict of records; it knows nothing of keys, prefixes or transactions."""

    versions = Bundle("versions")  # every record that ever was, stale ones too

    def __init__(self) -> None:
        super().__init__()
        self._home = tempfile.TemporaryDirectory()
        self._ledgers = [self._open(), self._open()]
        self._jobs: dict[str, Job] = {}
        self._facts: dict[str, Any] = {}

    def _open(self) -> DiskcacheLedger:
        return DiskcacheLedger(Path(self._home.name) / "jobs", timeout=10)

    @rule(target=versions, handle=HANDLES, facts=FACTS)
    def put_new(self, handle: int, facts: dict[str, Any]) -> Job:
        job = a_job(**facts)
        self._ledgers[handle].put(job)
        self._jobs[job.id] = job
        return job

    @rule(handle=HANDLES, job=versions)
    def put_again(self, handle: int, job: Job) -> None:
        self._ledgers[handle].put(job)
        self._jobs[job.id] = job

    @rule(target=versions, handle=HANDLES, job=versions, state=st.sampled_from(State), facts=FACTS)
    def move(self, handle: int, job: Job, state: State, facts: dict[str, Any]) -> Any:
        stands = self._jobs[job.id]
        try:
            wanted = job.to(state, **facts)
        except ValueError:
            with pytest.raises(ValueError, match="no transition"):
                self._ledgers[handle].move(job, state, **facts)
            return multiple()
        moved = self._ledgers[handle].move(job, state, **facts)
        if stands != job:
            assert moved == stands
            return multiple()
        assert moved.updated_at > stands.updated_at
        assert {**moved.to_dict(), "updated_at": 0} == {**wanted.to_dict(), "updated_at": 0}
        self._jobs[job.id] = moved
        return moved

    @rule(handle=HANDLES, name=st.sampled_from(["spent", "open/x", "é"]), value=JSON)
    def put_fact(self, handle: int, name: str, value: Any) -> None:
        self._ledgers[handle].put_fact(name, value)
        self._facts[name] = value

    @rule(handle=HANDLES, steps=st.lists(st.tuples(versions, FACTS), max_size=3), fails=st.booleans())
    def transact(self, handle: int, steps: list[tuple[Job, dict[str, Any]]], fails: bool) -> None:
        ledger, jobs, facts = self._ledgers[handle], dict(self._jobs), copy.copy(self._facts)
        try:
            with ledger.transaction():
                for job, changes in steps:
                    stands = ledger.get(job.id)
                    assert stands == jobs[job.id]
                    if stands.state.is_open:
                        jobs[job.id] = ledger.move(stands, stands.state, **changes)
                ledger.put_fact("steps", len(steps))
                facts["steps"] = len(steps)
                if fails:
                    raise _Undone
        except _Undone:
            return
        self._jobs, self._facts = jobs, facts

    @rule(handle=HANDLES)
    def reopen(self, handle: int) -> None:
        self._ledgers[handle].close()
        self._ledgers[handle] = self._open()

    @rule(job=consumes(versions))
    def forget(self, job: Job) -> None:
        """Make the bundle smaller, so that young records are drawn more often."""

    @invariant()
    def both_handles_agree_with_the_oracle(self) -> None:
        expected = sorted(self._jobs.values(), key=lambda job: (job.created_at, job.id))
        for ledger in self._ledgers:
            assert ledger.jobs() == expected
            assert ledger.jobs(open_only=True) == [job for job in expected if job.state.is_open]
            assert {job.id: ledger.get(job.id) for job in expected} == self._jobs
            assert {name: ledger.get_fact(name) for name in self._facts} == self._facts

    def teardown(self) -> None:
        self._home.cleanup()


class _Undone(Exception):
    pass


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)
