"""Which requests are ours to send, decided in one transaction.

A claim is a job record with its keys file: from then on nobody else sends these keys. Files are
written first and mean nothing without the record, and what is answered or claimed is looked up before: so the
transaction itself is short, and Polars does nothing in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime

import polars as pl

from polars_llm.answer import FAILED, complete
from polars_llm.backends.base import BatchBackend, LiveBackend
from polars_llm.errors import BudgetExceeded, CacheError
from polars_llm.job import Job
from polars_llm.jobs.budget import bound, check_all, output_tokens_max, sizes
from polars_llm.jobs.lookup import Policy, in_flight, prefixes, unanswered
from polars_llm.jobs.packing import Pack, pack
from polars_llm.jobs.submit import check_durable
from polars_llm.request import Requests
from polars_llm.store import Store

__all__ = ["batches", "claim", "one_run"]

# Where others claim all the time, looking up may take longer than any of them leaves: then they wait.
_MOST_LOOKS = 10


def claim(
    requests: Sequence[Requests],
    draft: Callable[[list[Requests]], Iterable[Job]],
    store: Store,
    policy: Policy,
) -> tuple[list[Job], list[Requests]]:
    """Make jobs in state planned of all requests that nobody has answered or claimed by now.

    Parameters
    ----------
    requests
        What is wanted.
    draft
        Writes the files of the jobs that would hold some requests: `batches` or `one_run`.
    store, policy
        Where, and how often a request is tried.

    Returns
    -------
    tuple
        The jobs, and the requests that they hold.
    """
    check_durable(store)
    wanted = [r for r in requests if r.height]
    while wanted:
        jobs = list(draft(wanted))
        taken = _claimed(jobs, wanted, store, policy)
        if taken is None:
            return jobs, wanted
        # Somebody was quicker with some of them: leave those, and pack the rest again.
        for job in jobs:
            store.spool.remove(job.id)
        wanted = [_without(r, taken) for r in wanted]
        wanted = [r for r in wanted if r.height]
    return [], []


def _claimed(
    jobs: Sequence[Job], wanted: Sequence[Requests], store: Store, policy: Policy
) -> pl.Series | None:
    """Enter the jobs into the ledger; or key prefixes that somebody else has by now, and nothing is entered.

    It is not looked up inside of the transaction: Polars may need a thread that waits for that one, and may
    run another verb on this thread meanwhile, which would be inside of it as well. What was looked up before
    holds if the jobs that came since hold other keys, and those are compared without Polars.
    """
    keys = pl.concat([prefixes(r.frame) for r in wanted])
    for number in itertools.count():
        with contextlib.ExitStack() as alone:
            if number >= _MOST_LOOKS:
                alone.enter_context(store.ledger.transaction())
            before = _jobs_now(store)
            taken = _taken(keys, store, policy)
            if not taken.is_empty():
                return taken
            try:
                _check_budget(jobs, store, policy)
            except BudgetExceeded:
                if store.ledger.count() != before[0]:
                    continue  # what another has claimed since may be these requests, and was counted twice
                for job in jobs:
                    store.spool.remove(job.id)
                raise
            with store.ledger.transaction():
                if _still_holds(before, keys, store, policy):
                    for job in jobs:
                        _check_files(job, store)
                        store.ledger.put(job)
                    return None
    raise AssertionError("unreachable")


def _jobs_now(store: Store) -> tuple[int, set[str]]:
    """How often a job was opened, and which are open; what comes in between counts as come since."""
    count = store.ledger.count()
    return count, {job.id for job in store.ledger.jobs(open_only=True)}


def _still_holds(before: tuple[int, set[str]], keys: pl.Series, store: Store, policy: Policy) -> bool:
    """Has nobody claimed any of these keys since? False also where that is not known."""
    count, names = before
    more = store.ledger.count() - count
    if not more:
        return True
    new = {job.id for job in store.ledger.jobs(open_only=True)} - names
    if policy.budget is not None or len(new) != more:
        return False  # one was closed since, what it held is in the results; or it was open before
    held = store.spool.prefixes_in_memory(new)
    # Lists of Python: whatever else Polars does, it does on its own threads.
    return held is not None and set(keys.to_list()).isdisjoint(itertools.chain.from_iterable(held))


def _check_budget(jobs: Sequence[Job], store: Store, policy: Policy) -> None:
    """If nobody else claims meanwhile, what is reserved now stays within the budget."""
    cost = _sum(job.cost_max_usd for job in jobs)
    check_all(cost, sum(job.requests for job in jobs), store, policy)


def _check_files(job: Job, store: Store) -> None:
    # A job without its files would hold keys that nobody knows.
    if not store.spool.has_keys(job.id):
        raise CacheError(
            f"The working files of {job.id} disappeared while it was being planned.",
            path=str(store.spool.requests_path(job.id)),
            hint="run the same line again. Nothing was sent.",
        )


def _taken(keys: pl.Series, store: Store, policy: Policy) -> pl.Series:
    """Those that have an answer, or are in an open job, by now."""
    # The jobs come first: one that is closed in between has its answers in the results by then.
    claimed = in_flight(store)[1]["key"]
    free = unanswered(store.results.find(keys), policy)
    answered = keys.filter(~keys.is_in(free["key"].implode()))
    return pl.concat([answered, keys.filter(keys.is_in(claimed.implode()))]).unique()


def _without(requests: Requests, taken: pl.Series) -> Requests:
    keys = prefixes(requests.frame)
    return dataclasses.replace(requests, frame=requests.frame.filter(~keys.is_in(taken.implode())))


def one_run(
    backend: LiveBackend, wanted: Sequence[Requests], store: Store, owner: str, *, limited: bool
) -> Iterator[Job]:
    """One job of them all for a live backend; nothing is claimed yet.

    With `limited` there is a limit on money, and the most that it can cost is noted.
    """
    keys = pl.concat([r.frame.select("key", "attempt") for r in wanted])
    bytes_of = [sizes(backend, r) for r in wanted]
    header = wanted[0].header
    job = Job.plan(
        provider=backend.provider,
        base_url=backend.base_url,
        endpoint=header.endpoint,
        model=header.model,
        mode=backend.mode,
        requests=keys.height,
        owner=owner,
        size_bytes=sum(int(s.sum() or 0) for s in bytes_of),
        output_tokens_max=_longest(wanted),
        cost_max_usd=_sum(bound(backend, r.header, s) for r, s in zip(wanted, bytes_of, strict=True))
        if limited
        else None,
    )
    store.spool.write_keys(job.id, keys)
    yield job


def batches(
    backend: BatchBackend, wanted: Sequence[Requests], store: Store, owner: str, *, limited: bool
) -> Iterator[Job]:
    """Jobs for a provider's batches, with keys and request files, pack by pack; nothing is claimed yet.

    Several headers share a batch where they share endpoint and model. With `limited` there is a limit on
    money, and the most that each can cost is noted.
    """
    keys = pl.concat([r.frame.select("key", "attempt") for r in wanted])
    lines = itertools.chain.from_iterable(backend.render(r) for r in wanted)
    header = wanted[0].header
    for batch in pack(lines, backend.limits):
        if batch.oversized:
            store.results.add(_too_large(backend, keys[batch.rows], batch, header.model))
            continue
        job = Job.plan(
            provider=backend.provider,
            base_url=backend.base_url,
            endpoint=header.endpoint,
            model=header.model,
            requests=len(batch.rows),
            size_bytes=batch.size_bytes,
            headers=dict(header.headers) or None,
            owner=owner,
            output_tokens_max=_longest(wanted),
            cost_max_usd=_sum(_bounds(batch, backend, wanted)) if limited else None,
        )
        store.spool.write_keys(job.id, keys[batch.rows])
        store.spool.write_requests(job.id, _joined(batch.lines))
        yield job


def _longest(wanted: Sequence[Requests]) -> int | None:
    # An image may be more tokens than its bytes, or its address: then nothing bounds the job.
    limits = [None if r.has_images else output_tokens_max(r.header) for r in wanted]
    return None if None in limits else max(limit for limit in limits if limit is not None)


def _sum(bounds: Iterable[float | None]) -> float | None:
    known = list(bounds)
    return None if None in known else sum(b for b in known if b is not None)


def _bounds(batch: Pack, backend: BatchBackend, wanted: Sequence[Requests]) -> Iterator[float | None]:
    """The most that a batch can cost, header by header."""
    lines = pl.DataFrame({"row": batch.rows, "size": [len(line) for line in batch.lines]})
    start = 0
    for r in wanted:
        end = start + r.height
        size = lines.filter(pl.col("row").is_between(start, end, "left"))["size"]
        yield None if r.has_images else bound(backend, r.header, size)
        start = end


def _joined(lines: Sequence[bytes]) -> Iterator[bytes]:
    """Lines with their ends, many at a time: writing them one by one takes twice as long."""
    for start in range(0, len(lines), 1_000):
        yield b"\n".join(lines[start : start + 1_000]) + b"\n"


def _too_large(backend: BatchBackend, keys: pl.DataFrame, batch: Pack, model: str) -> pl.DataFrame:
    limit = backend.limits.size_bytes
    return keys.select(
        "key",
        "attempt",
        state=pl.lit(FAILED, pl.UInt8),
        error=pl.lit("request_too_large"),
        error_message=pl.lit(f"{batch.size_bytes:,} bytes; a batch takes {limit:,}. Not sent."),
        provider=pl.lit(backend.provider),
        model=pl.lit(model),
        received_at=pl.lit(datetime.now(UTC)),
    ).pipe(complete)
