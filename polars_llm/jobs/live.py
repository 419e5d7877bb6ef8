"""Answers while the process waits: realtime calls, an engine in this process, a cluster.

The same claim as for batches keeps others from asking the same; it lives as long as this process. Each
block of replies is durable before the next is asked for, so that an interrupted run goes on where it
stopped, and at most what was in flight, or came in the last second, is paid for twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Generator, Sequence

import polars as pl

from polars_llm.answer import ACCOUNT, FAILED, RETRY
from polars_llm.backends.base import CallFailed, Learns, LiveBackend
from polars_llm.backends.replies import STOPPED
from polars_llm.interrupts import check
from polars_llm.job import Job, State
from polars_llm.jobs.claim import claim, one_run
from polars_llm.jobs.ingest import blame_account, keep
from polars_llm.jobs.lookup import Policy, prefixes
from polars_llm.jobs.submit import release
from polars_llm.progress import Progress
from polars_llm.request import Requests
from polars_llm.store import Store

__all__ = ["run_live"]

_logger = logging.getLogger("polars_llm")

# Seconds between two notes in the ledger of how far a run is (each is a durable write), and between two
# looks at whether its many small segments should be merged.
_NOTE_EVERY = 5.0
_COMPACT_EVERY = 60.0
# Seconds between two looks at whether a query that Ctrl+C has stopped has returned.
_LOOK_EVERY = 0.02


def run_live(backend: LiveBackend, missing: Sequence[Requests], store: Store, policy: Policy) -> int:
    """Claim what nobody has answered or claimed, and answer it; the number of requests asked.

    What failed for a passing reason is asked again, as often as the policy says.

    Raises
    ------
    ProviderError, AccountError
        The run stopped. What was answered before is kept; the message says so.
    """
    asked = 0
    wanted = list(missing)
    while any(r.height for r in wanted):
        with contextlib.ExitStack() as held:
            owner = held.enter_context(store.directory.submitter())
            make = functools.partial(one_run, backend, store=store, owner=owner, limited=policy.limited)
            jobs, claimed = claim(wanted, make, store, policy)
            if not jobs:
                break
            failed = _run(jobs[0], backend, claimed, store, held)
        asked = asked or jobs[0].requests
        wanted = _again(claimed, failed, policy)
    return asked


def _run(
    job: Job,
    backend: LiveBackend,
    requests: Sequence[Requests],
    store: Store,
    held: contextlib.ExitStack,
) -> pl.DataFrame:
    """One run; returns the keys that failed for a passing reason. `held` is what must stay until it ends."""
    job = store.ledger.move(job, State.RUNNING)
    run = _Run(job, backend, store, pl.concat([r.frame.select("key", "attempt") for r in requests]))
    if isinstance(backend, Learns):
        backend.learn(store.results.scan())
    blocks = held.enter_context(contextlib.closing(backend.run(requests)))
    try:
        with Progress(job.requests, "LLM answers") as bar:
            _take_all(run, blocks, bar)
    except CallFailed as error:
        mend = "check the API key, the address, the billing and the model's name; then run"
        kept = f"the {run.done:,} answers that came are kept" if run.done else "nothing was answered yet"
        raise error.public(
            f"asking {job.requests:,} requests",
            hint=f"{mend if error.verdict.account else 'later run'} the same line again: {kept}, and only"
            " what has no answer is asked.",
        ) from error
    except KeyboardInterrupt as stop:
        _interrupted(run, blocks, held, stop)
        raise
    finally:
        if not run.handed_over:
            try:
                blocks.close()
            finally:
                run.end()
    store.results.compact()
    blame_account(run.refused, backend)
    return run.retry


def _take_all(run: _Run, blocks: Generator[pl.DataFrame, None, None], bar: Progress) -> None:
    for run.block in blocks:
        check()
        if run.block is STOPPED:
            raise KeyboardInterrupt
        run.take(run.block)
        bar.update(run.done + run.failed, run.backend.note)


def _interrupted(
    run: _Run,
    blocks: Generator[pl.DataFrame, None, None],
    held: contextlib.ExitStack,
    stop: KeyboardInterrupt,
) -> None:
    """Keep what had come by now: it is paid for."""
    if run.block is not STOPPED:
        with contextlib.suppress(KeyboardInterrupt, StopIteration):
            blocks.throw(stop)
    # One Ctrl+C comes twice where Polars was at work, which has seen it as well: perhaps just now.
    if not (_take_the_rest(run, blocks) or _take_the_rest(run, blocks)):
        # Inside of a query: Polars works again when that has returned, and so have we.
        run.handed_over = True
        threading.Thread(
            target=_take_later, args=(run, blocks, held.pop_all()), name="polars_llm-interrupted"
        ).start()
        stop.add_note("polars_llm: stopped; the answers that had come are being written.")
    else:
        stop.add_note(_kept(run))


def _take_the_rest(run: _Run, blocks: Generator[pl.DataFrame, None, None]) -> bool:
    """Make durable what was in hand and what had come; False: Polars cannot work yet, so ask again."""
    try:
        run.take(run.block)
        block = next(blocks, None)
        if block is STOPPED:
            return False
        if block is not None:
            run.block = block
            run.take(block)
    except KeyboardInterrupt:
        return False
    return True


def _take_later(run: _Run, blocks: Generator[pl.DataFrame, None, None], held: contextlib.ExitStack) -> None:
    with held:
        try:
            while not _take_the_rest(run, blocks):
                time.sleep(_LOOK_EVERY)
        finally:
            run.end()
    _logger.warning(_kept(run))  # the exception that this was about has gone by


def _kept(run: _Run) -> str:
    return (
        f"polars_llm: stopped; {run.done:,} answers of {run.job.requests:,} are kept. Run the same line"
        " again to go on: only what was in flight may be paid for a second time."
    )


@dataclasses.dataclass(slots=True)
class _Run:
    """How far a run is."""

    job: Job
    backend: LiveBackend
    store: Store
    waiting: pl.DataFrame
    block: pl.DataFrame = dataclasses.field(default_factory=pl.DataFrame)
    done: int = 0
    failed: int = 0
    handed_over: bool = False
    noted: float = dataclasses.field(default_factory=time.monotonic)
    tidied: float = dataclasses.field(default_factory=time.monotonic)
    retry: pl.DataFrame = dataclasses.field(default_factory=lambda: pl.DataFrame(schema={"key": pl.Binary}))
    refused: pl.DataFrame = dataclasses.field(default_factory=pl.DataFrame)

    def take(self, replies: pl.DataFrame) -> None:
        """Make a block durable."""
        if replies.is_empty():
            return
        answers = self.waiting.join(replies, on="key", how="inner").unique("key", maintain_order=True)
        refused = answers.filter(pl.col("state") == ACCOUNT)
        keep(answers.filter(pl.col("state") != ACCOUNT), self.job, self.backend, self.store)
        failed = answers.filter(pl.col("state") >= FAILED).height
        done = answers.height - failed
        retry = pl.concat([self.retry, answers.filter(pl.col("state") == RETRY).select("key")])
        refused = pl.concat([self.refused, refused], how="diagonal") if refused.height else self.refused
        waiting = self.waiting.join(answers, on="key", how="anti", maintain_order="left")
        # All of it or nothing: no call, and so no Ctrl+C, in between.
        self.waiting, self.retry, self.refused = waiting, retry, refused
        self.failed += failed
        self.done += done
        self._note()

    def _note(self) -> None:
        now = time.monotonic()
        if now - self.noted > _NOTE_EVERY:
            self.noted = now
            self.job = self.store.ledger.move(self.job, State.RUNNING, done=self.done, failed=self.failed)
        if now - self.tidied > _COMPACT_EVERY:  # a block a second makes many small files
            self.tidied = now
            self.store.results.compact()

    def end(self) -> None:
        """Close the job, whatever happened; what was not answered is free again."""
        facts = {"done": self.done, "failed": self.failed}
        if self.waiting.is_empty():
            self.store.ledger.move(self.job, State.INGESTED, **facts)
            self.store.spool.remove(self.job.id)
        else:
            job = self.store.ledger.move(self.job, State.RUNNING, **facts)
            release(job, self.store, reason=f"it stopped with {self.waiting.height:,} requests unanswered")


def _again(requests: Sequence[Requests], failed: pl.DataFrame, policy: Policy) -> list[Requests]:
    """Those of the requests that failed for a passing reason and may be asked once more."""
    keys = prefixes(failed)
    again = []
    for r in requests:
        frame = r.frame.filter(
            prefixes(r.frame).is_in(keys.implode()), pl.col("attempt") < policy.max_attempts
        )
        frame = frame.with_columns(pl.col("attempt") + 1)
        if frame.height:
            again.append(dataclasses.replace(r, frame=frame))
    return again
