"""One evaluation: look up, advance what is under way, claim and submit what is missing, wait.

Everything an evaluation does can be cut off at any point and done again: what is durable is in the
ledger and the results, and each chapter (`claim`, `submit`, `settle`, `ingest`) leaves a state that
the next evaluation understands.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence

import polars as pl

from polars_llm.backends.base import BatchBackend, CallFailed, LiveBackend, Phase, is_batch
from polars_llm.errors import JobsPending
from polars_llm.interrupts import pause
from polars_llm.job import Job, State
from polars_llm.jobs.budget import check_evaluation
from polars_llm.jobs.claim import batches, claim
from polars_llm.jobs.ingest import ingest, refuse
from polars_llm.jobs.live import run_live
from polars_llm.jobs.lookup import Policy, in_flight, prefixes, unanswered, with_attempts
from polars_llm.jobs.settle import settle
from polars_llm.jobs.submit import create, put_off, release, submit
from polars_llm.progress import Progress
from polars_llm.request import Requests
from polars_llm.store import Store

__all__ = ["Need", "Pending", "advance", "check_money", "evaluate"]


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """Distinct requests that had no answer when the frame was looked up, for one backend."""

    backend: BatchBackend | LiveBackend
    requests: Sequence[Requests]

    @property
    def keys(self) -> pl.Series:
        """Key prefixes of all of them."""
        return pl.concat([prefixes(r.frame) for r in self.requests])


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """What is not there yet after an evaluation.

    Parameters
    ----------
    held
        ``key`` (prefix) and ``job_id`` of each request in flight.
    jobs
        The open jobs that hold them.
    sent
        Requests that this evaluation submitted.
    """

    held: pl.DataFrame
    jobs: Sequence[Job]
    sent: int

    @property
    def keys(self) -> pl.Series:
        """Key prefixes in flight."""
        return self.held["key"]

    def error(self, next_poll: float) -> JobsPending:
        """The exception for ``on_pending="raise"``."""
        done = sum(min(job.requests, job.done + job.failed) for job in self.jobs)
        total = sum(job.requests for job in self.jobs)
        count = len(self.jobs)
        kind = "batch job" if all(job.mode == "batch" for job in self.jobs) else "job"
        batches = f"1 {kind}" if count == 1 else f"{count} {kind}s"
        said = f"{self.sent:,} requests sent now, " if self.sent else ""
        stuck = [j for j in self.jobs if j.reason]
        why = f" ({stuck[0].id} is {stuck[0].state}: {stuck[0].reason})" if stuck else ""
        return JobsPending(
            f"{said}{len(self.keys):,} answers pending in {batches}, {done:,} of {total:,} requests"
            f" done{why}; run the same line again to collect.",
            jobs=[job.id for job in self.jobs],
            requests=len(self.keys),
            done=done,
            next_poll=next_poll,
            hint="on_pending='wait' waits for it; pllm.jobs() shows it. Nothing is sent or paid twice.",
        )


def evaluate(needs: Sequence[Need], store: Store, policy: Policy) -> Pending:
    """Bring all requests as far as they get now, or, with ``policy.wait``, to the end.

    Raises
    ------
    ProviderError, AccountError
        The provider refused; the message says what happened to the money.
    CacheError
        The cache directory cannot be used; raised before anything is sent.
    """
    store.directory.prepare()
    try:
        pending = _step(needs, store, policy)
        if not policy.wait or not pending.jobs:
            return pending
        # What fails from here on has failed in this evaluation: it isn't "retried" a second time.
        return _wait(needs, store, dataclasses.replace(policy, retry_failed=False), pending)
    except KeyboardInterrupt as stop:
        _note_jobs(stop, needs, store)
        raise
    finally:
        for need in needs:
            need.backend.close()


def _wait(needs: Sequence[Need], store: Store, policy: Policy, pending: Pending) -> Pending:
    import tenacity  # here and not above: `import polars_llm` stays quick

    total = len(pending.keys)
    longest = policy.poll_interval
    again = tenacity.Retrying(
        retry=tenacity.retry_if_result(lambda still: bool(still.jobs)),
        wait=tenacity.wait_exponential(multiplier=min(1.0, 0.9 * longest), max=0.9 * longest)
        + tenacity.wait_random(0, min(1.0, 0.1 * longest)),
        sleep=pause,
    )
    with Progress(total, "LLM answers") as bar:

        def look() -> Pending:
            still = _step(needs, store, policy)
            done = sum(job.done + job.failed for job in still.jobs)
            bar.update(min(total, total - len(still.keys) + done))
            return still

        pause(min(0.05, policy.poll_interval))
        return again(look)


def _note_jobs(stop: KeyboardInterrupt, needs: Sequence[Need], store: Store) -> None:
    """Say on the exception which jobs go on."""
    keys = pl.concat([need.keys for need in needs])
    names = ", ".join(job.id for job in _holding(keys, store)[0])
    if names:
        stop.add_note(
            f"polars_llm: stopped waiting, not the work: {names} go on at the provider. Run the same line"
            " again to collect; nothing is paid twice."
        )


def _step(needs: Sequence[Need], store: Store, policy: Policy) -> Pending:
    """One round: nothing in it waits for a provider to finish."""
    policies = [_advance_all(need, store, policy) for need in needs]
    missing = [_missing(need, store, p) for need, p in zip(needs, policies, strict=True)]
    _check_money(needs, missing, store, policy)
    # Batches first: they are at work at the provider while live backends answer here.
    turns = sorted(zip(needs, missing, policies, strict=True), key=lambda turn: not is_batch(turn[0].backend))
    sent = sum(_send(need, wanted, store, its) for need, wanted, its in turns)
    holding = [_holding(need.keys, store) for need in needs]
    if not any(jobs for jobs, _ in holding):
        store.directory.prepare()  # nothing is open: done, unless the directory was removed just now
    return Pending(
        held=pl.concat([held for _, held in holding]).unique("key"),
        jobs=list({job.id: job for jobs, _ in holding for job in jobs}.values()),
        sent=sent,
    )


def _advance_all(need: Need, store: Store, policy: Policy) -> Policy:
    """Look at the open jobs that hold wanted keys; the policy for what is missing after that."""
    before, _ = _holding(need.keys, store)
    for job in before:
        advance(job, need.backend, store, policy)
    # A failure that came in just now was not there to be retried when this evaluation began; and while one
    # of several jobs is still open, whoever runs the line again to collect must not retry each time.
    return dataclasses.replace(policy, retry_failed=False) if before else policy


def check_money(needs: Sequence[Need], store: Store, policy: Policy) -> None:
    """What `evaluate` checks before it sends anything, alone.

    Raises
    ------
    BudgetExceeded
        It may cost more than it may.
    """
    if policy.limited:
        _check_money(needs, [_missing(need, store, policy) for need in needs], store, policy)


def _check_money(
    needs: Sequence[Need], missing: Sequence[Sequence[Requests]], store: Store, policy: Policy
) -> None:
    new = [(n.backend, r) for n, requests in zip(needs, missing, strict=True) for r in requests if r.height]
    if new and policy.limited:
        jobs, held = _holding(pl.concat([n.keys for n in needs]), store)
        counts = dict(held.unique("key")["job_id"].value_counts().iter_rows())
        check_evaluation(new, [(job, counts.get(job.id, 0)) for job in jobs], store, policy)


def _send(need: Need, missing: Sequence[Requests], store: Store, policy: Policy) -> int:
    """Claim and submit what nobody has answered or claimed; the number of requests sent."""
    if not any(r.height for r in missing):
        return 0
    backend = need.backend
    if not is_batch(backend):
        return run_live(backend, missing, store, policy)
    with store.directory.submitter() as owner:
        draft = functools.partial(_draft, backend, store, owner, policy)
        jobs, _ = claim(missing, draft, store, policy)
        for job in jobs:
            submit(job, backend, store, policy, owner=owner)
    return sum(job.requests for job in jobs)


def _draft(
    backend: BatchBackend, store: Store, owner: str, policy: Policy, wanted: list[Requests]
) -> Iterator[Job]:
    return batches(backend, wanted, store, owner, limited=policy.limited)


def _missing(need: Need, store: Store, policy: Policy) -> list[Requests]:
    claimed = in_flight(store)[1]["key"]
    missing = []
    for requests in need.requests:
        found = store.results.find(prefixes(requests.frame))
        free = unanswered(found, policy)["key"]
        wanted = found["key"].is_in(free.implode()) & ~found["key"].is_in(claimed.implode())
        numbered = with_attempts(requests, found)
        missing.append(dataclasses.replace(numbered, frame=numbered.frame.filter(wanted)))
    return missing


def _holding(keys: pl.Series, store: Store) -> tuple[list[Job], pl.DataFrame]:
    """Open jobs that hold any of these keys, and which (``key``, ``job_id``)."""
    jobs, held = in_flight(store)
    held = held.filter(pl.col("key").is_in(keys.implode()))
    names = set(held["job_id"].unique())
    return [job for job in jobs if job.id in names], held


def advance(
    job: Job, backend: BatchBackend | LiveBackend | None, store: Store, policy: Policy
) -> CallFailed | None:
    """Move one open job as far as it gets without waiting; gives what the provider did not answer now.

    A backend of None reaches no provider, only this machine.
    """
    if job.owner is not None and store.directory.is_alive(job.owner):
        return None  # its submitter is at work
    elsewhere = backend is not None and (job.provider, job.base_url) != (backend.provider, backend.base_url)
    if elsewhere and job.state not in {State.PLANNED, State.UPLOADED, State.RUNNING}:
        return None  # sent through another host; only that one knows it
    with store.directory.try_lock(job.id) as ours:
        if not ours:
            return None  # somebody else is advancing it
        current = store.ledger.get(job.id)
        if current is None or not current.state.is_open:
            return None
        try:
            _move_on(current, backend, store, policy)
        except CallFailed as error:
            # No news is no news: the job stays where it is, and the next look tries again.
            if not error.verdict.transient:
                raise error.public(f"looking at {job.id}") from error
            return error
        return None


def _move_on(job: Job, backend: BatchBackend | LiveBackend | None, store: Store, policy: Policy) -> None:
    if job.state in {State.PLANNED, State.UPLOADED}:
        release(job, store, reason="its submitter stopped before the batch was created")
        return
    if job.state is State.RUNNING:
        release(job, store, reason="its process stopped; what it had been answered is kept")
        return
    if backend is not None and not is_batch(backend):
        backend = backend.batch
    if backend is not None:
        _move_batch(job, backend, store, policy)


def _move_batch(job: Job, backend: BatchBackend, store: Store, policy: Policy) -> None:
    match job.state:
        case State.CREATING | State.UNKNOWN:
            job = settle(job, backend, store, policy)
            if job.state is State.SUBMITTED:
                _poll(job, backend, store, policy)
        case State.DEFERRED if _is_due(job):
            with store.directory.submitter() as owner:
                create(job, backend, store, policy, owner=owner)
        case State.SUBMITTED | State.ENDED:
            _poll(job, backend, store, policy)


def _is_due(job: Job) -> bool:
    # A clock that was set back since must not put it off for days.
    return not job.updated_at <= time.time() < (job.not_before or 0.0)


def _poll(job: Job, backend: BatchBackend, store: Store, policy: Policy) -> None:
    status = backend.status(job)
    match status.phase:
        case Phase.RUNNING if (status.done, status.failed) != (job.done, job.failed):
            store.ledger.move(job, job.state, done=status.done, failed=status.failed, reason=None)
        case Phase.MISSING:
            reason = f"the provider does not know {job.batch_id} with this key and project"
            store.ledger.move(job, job.state, reason=reason)
        case Phase.QUEUE_FULL:
            put_off(job, store, policy, reason=status.why)
        case Phase.REFUSED:
            refuse(job, status, backend, store)
        case Phase.ENDED:
            if job.state is State.SUBMITTED:
                job = store.ledger.move(job, State.ENDED, done=status.done, failed=status.failed, reason=None)
            ingest(job, status, backend, store)
