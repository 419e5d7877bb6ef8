"""What every ledger promises. Subclass `LedgerContract` in a test module and give it a `ledger` fixture."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from polars_llm.errors import CacheError
from polars_llm.job import Job, State
from polars_llm.store.ledger import Ledger


def a_job(**facts: Any) -> Job:
    """A planned job, with facts of one's own."""
    usual = {"provider": "openai", "base_url": None, "endpoint": "/v1/responses", "model": "m", "requests": 3}
    return Job.plan(**{**usual, **facts})


def in_thread(work: Any, *arguments: Any) -> Any:
    """Do it in another thread, and wait for it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *arguments).result()


class LedgerContract:
    """Behaviour that callers rely on, whatever the ledger is made of."""

    @pytest.fixture
    def ledger(self) -> Ledger:
        """An empty ledger that waits at least 10 s for a transaction."""
        raise NotImplementedError

    def test_empty(self, ledger: Ledger) -> None:
        assert ledger.jobs() == []
        assert ledger.jobs(open_only=True) == []
        assert ledger.get("job_0") is None
        assert ledger.get_fact("spent") is None

    def test_what_was_put_is_read_back(self, ledger: Ledger) -> None:
        job = a_job(
            base_url="https://host/v1",
            owner="submitter-1",
            not_before=1.5e9 + 1 / 3,
            cost_max_usd=0.1 + 0.2,
            reason="Zürich\0\n\udc80\N{PILE OF POO}'\"\\",
        )
        ledger.put(job)
        assert ledger.get(job.id) == job
        assert ledger.jobs() == [job]

    def test_put_replaces(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        moved = job.to(State.CREATING, owner="submitter-1")
        ledger.put(moved)
        assert ledger.get(job.id) == moved
        assert ledger.jobs() == ledger.jobs(open_only=True) == [moved]

    def test_a_closed_job_is_not_open(self, ledger: Ledger) -> None:
        job, other = a_job(), a_job()
        ledger.put(job)
        ledger.put(other)
        closed = job.to(State.RELEASED)
        ledger.put(closed)
        assert ledger.get(job.id) == closed
        assert ledger.jobs(open_only=True) == [other]
        assert closed in ledger.jobs()
        assert len(ledger.jobs()) == 2

    def test_a_closed_job_can_be_opened_again(self, ledger: Ledger) -> None:
        # pllm.recover does this with a batch that still runs.
        job = a_job()
        ledger.put(job.to(State.RELEASED))
        ledger.put(job)
        assert ledger.jobs() == ledger.jobs(open_only=True) == [job]

    def test_jobs_are_in_order_of_creation_then_id(self, ledger: Ledger) -> None:
        jobs = [
            Job(**{**_facts(a_job()), "id": f"job_{name}", "created_at": when, "state": state})
            for name, when, state in [
                ("d", 1.0, State.RELEASED),
                ("b", 2.0, State.PLANNED),
                ("c", 2.0, State.RELEASED),
                ("a", 10.0, State.PLANNED),
            ]
        ]
        for job in reversed(jobs):
            ledger.put(job)
        assert ledger.jobs() == jobs
        assert ledger.jobs(open_only=True) == [jobs[1], jobs[3]]

    def test_move(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        moved = ledger.move(job, State.CREATING, owner="submitter-1")
        assert (moved.id, moved.state, moved.owner) == (job.id, State.CREATING, "submitter-1")
        assert moved.updated_at > job.updated_at
        assert ledger.get(job.id) == moved

    def test_a_stale_move_changes_nothing(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        moved = ledger.move(job, State.CREATING, owner="first")
        assert ledger.move(job, State.CREATING, owner="second") == moved
        assert ledger.move(job, State.RELEASED) == moved
        assert ledger.get(job.id) == moved

    def test_a_move_that_stays_wins_once_too(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        first = ledger.move(job, job.state, owner="first")
        assert ledger.move(job, job.state, owner="second") == first
        again = ledger.move(first, job.state)  # no fact changes, but somebody was there
        assert ledger.move(first, job.state, owner="third") == again
        assert again.owner == "first"

    @pytest.mark.parametrize("now", [0.0, 1e9])
    def test_a_clock_that_stands_or_goes_back_does_not_let_two_win(
        self, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, now: float
    ) -> None:
        job = dataclasses.replace(a_job(), updated_at=1e9)
        ledger.put(job)
        monkeypatch.setattr(time, "time", lambda: now)
        first = ledger.move(job, job.state)
        assert ledger.move(job, job.state, owner="second") == first
        assert first.updated_at > job.updated_at

    def test_an_illegal_move_raises_and_changes_nothing(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        with pytest.raises(ValueError, match="no transition"):
            ledger.move(job, State.INGESTED)
        assert ledger.get(job.id) == job

    def test_a_move_of_an_unknown_job_is_an_error(self, ledger: Ledger) -> None:
        with pytest.raises(CacheError, match="recover"):
            ledger.move(a_job(), State.CREATING)
        assert ledger.jobs() == []

    @pytest.mark.parametrize("value", [None, True, 1, 0.1, "é", [1, {"a": None}], {"since": 1.5, "usd": 0.3}])
    def test_facts(self, ledger: Ledger, value: Any) -> None:
        ledger.put_fact("other", "before")
        ledger.put_fact("spent", 0)
        ledger.put_fact("spent", value)
        assert ledger.get_fact("spent") == value
        assert type(ledger.get_fact("spent")) is type(value)
        assert ledger.get_fact("other") == "before"
        assert ledger.jobs() == []

    def test_a_transaction_is_all_or_nothing(self, ledger: Ledger) -> None:
        kept, job = a_job(), a_job()
        ledger.put(kept)
        with pytest.raises(KeyboardInterrupt), ledger.transaction():
            ledger.put(job)
            moved = ledger.move(kept, State.RELEASED)
            ledger.put_fact("spent", 1)
            assert ledger.jobs() == sorted([moved, job], key=_order)
            raise KeyboardInterrupt
        assert ledger.jobs() == ledger.jobs(open_only=True) == [kept]
        assert ledger.get_fact("spent") is None
        ledger.put(job)
        assert ledger.get(job.id) == job

    def test_transactions_nest(self, ledger: Ledger) -> None:
        one, two = a_job(), a_job()
        with ledger.transaction():
            with ledger.transaction():
                ledger.put(one)
            ledger.put(two)
            assert in_thread(ledger.get, one.id) is None  # the inner end commits nothing
        assert in_thread(ledger.get, one.id) == one
        assert in_thread(ledger.get, two.id) == two

    def test_an_inner_error_that_is_caught_undoes_nothing(self, ledger: Ledger) -> None:
        job = a_job()
        with ledger.transaction():
            ledger.put(job)
            with contextlib.suppress(RuntimeError), ledger.transaction():
                raise RuntimeError
        assert ledger.get(job.id) == job

    def test_others_read_the_state_before_while_a_transaction_lasts(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        with ledger.transaction():
            ledger.move(job, State.RELEASED)
            assert in_thread(ledger.get, job.id) == job
            assert in_thread(ledger.jobs) == [job]

    def test_each_new_job_is_counted_and_none_is_forgotten(self, ledger: Ledger) -> None:
        assert ledger.count() == 0
        one, two = a_job(), a_job()
        ledger.put(one)
        with ledger.transaction():
            ledger.put(two)
            assert ledger.count() == 2
        ledger.move(one, State.RELEASED)
        ledger.put_fact("n", 1)
        assert ledger.count() == 2
        with pytest.raises(KeyboardInterrupt), ledger.transaction():
            ledger.put(a_job())
            raise KeyboardInterrupt
        assert ledger.count() == 2

    def test_a_job_that_is_opened_again_is_counted_again(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        for times in (2, 3):
            ledger.put(dataclasses.replace(job, state=State.ABANDONED))
            ledger.put(job)
            assert ledger.count() == times
        ledger.put(dataclasses.replace(job, reason="still open"))
        assert ledger.count() == 3
        assert [found.id for found in ledger.jobs()] == [job.id]

    def test_a_transaction_keeps_other_threads_out(self, ledger: Ledger) -> None:
        inside, entered = threading.Event(), threading.Event()

        def other() -> None:
            inside.wait()
            with ledger.transaction():
                entered.set()

        thread = threading.Thread(target=other)
        thread.start()
        with ledger.transaction():
            inside.set()
            assert not entered.wait(0.2)
        assert entered.wait(10)
        thread.join()

    def test_threads_count_without_losing_one(self, ledger: Ledger) -> None:
        def count(_: int) -> None:
            with ledger.transaction():
                ledger.put_fact("n", (ledger.get_fact("n") or 0) + 1)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count, range(40)))
        assert ledger.get_fact("n") == 40

    def test_of_threads_that_move_the_same_job_one_wins(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        barrier = threading.Barrier(4)

        def move(name: str) -> Job:
            barrier.wait()
            return ledger.move(job, State.CREATING, owner=name)

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(move, "abcd"))
        assert len(set(results)) == 1
        assert ledger.get(job.id) == results[0]

    def test_reading_never_sees_a_job_twice_or_not_at_all(self, ledger: Ledger) -> None:
        jobs = [a_job() for _ in range(20)]
        for job in jobs:
            ledger.put(job)
        done = threading.Event()

        def close_all() -> None:
            for job in jobs:
                ledger.move(job, State.RELEASED)
            done.set()

        thread = threading.Thread(target=close_all)
        thread.start()
        deadline = time.monotonic() + 60
        while not done.is_set() and time.monotonic() < deadline:
            assert [job.id for job in ledger.jobs()] == [job.id for job in sorted(jobs, key=_order)]
            assert ledger.get(jobs[-1].id) is not None
        thread.join()

    def test_close_is_not_the_end(self, ledger: Ledger) -> None:
        job = a_job()
        ledger.put(job)
        ledger.close()
        ledger.close()
        assert ledger.get(job.id) == job


def _facts(job: Job) -> dict[str, Any]:
    return {"base_url": None, **job.to_dict()}


def _order(job: Job) -> tuple[float, str]:
    return job.created_at, job.id
