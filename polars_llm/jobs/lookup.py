"""Looking up: what is answered, what is in flight, what is missing."""

from __future__ import annotations

import dataclasses
from datetime import datetime

import polars as pl

from polars_llm.answer import FAILED, RETRY
from polars_llm.errors import CacheCorrupt
from polars_llm.job import Job
from polars_llm.request import Requests
from polars_llm.store import Store

__all__ = ["Policy", "in_flight", "prefixes", "unanswered", "with_attempts"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How an evaluation behaves.

    Parameters
    ----------
    wait
        Stay until everything is answered.
    poll_interval
        Longest time between two looks, seconds.
    quiet_period
        How long an empty list of batches must have been empty before a lost create counts as never
        done, in seconds beyond the create call's own timeout.
    max_attempts
        How often a request is sent that failed for a passing reason, the first time included.
    retry_failed
        Send again what failed for good, unless something of the evaluation is in flight: then it collects.
    max_cost
        The most that one evaluation may cost, in flight included, in USD.
    spent
        What the evaluation has cost before this part of it, in USD; None if that is not known.
    budget, budget_since
        The most that everything under this cache may cost, in flight and spent since that time, in USD.
    """

    wait: bool = False
    poll_interval: float = 30.0
    quiet_period: float = 120.0
    max_attempts: int = 3
    retry_failed: bool = False
    max_cost: float | None = None
    spent: float | None = 0.0
    budget: float | None = None
    budget_since: datetime | None = None

    @property
    def limited(self) -> bool:
        """Is there a limit on money?"""
        return self.max_cost is not None or self.budget is not None


def prefixes(frame: pl.DataFrame) -> pl.Series:
    """Binary keys as they are looked up: the first 16 bytes as UInt128."""
    return frame.select(
        pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")
    ).to_series()


def unanswered(found: pl.DataFrame, policy: Policy) -> pl.DataFrame:
    """Rows of `ResultStore.find` that must be sent: never answered, or to be tried again."""
    again = (pl.col("state") == RETRY) & (pl.col("attempt") < policy.max_attempts)
    if policy.retry_failed:
        again = again | (pl.col("state") >= FAILED)
    return found.filter(pl.col("key").is_not_null() & (pl.col("state").is_null() | again))


def in_flight(store: Store) -> tuple[list[Job], pl.DataFrame]:
    """The open jobs, and which key prefixes each of them holds (``key``, ``job_id``)."""
    while True:
        jobs = store.ledger.jobs(open_only=True)
        try:
            return jobs, store.spool.key_prefixes([job.id for job in jobs])
        except CacheCorrupt:
            # Somebody may have closed a job, and removed its files, since we read the list.
            if {job.id for job in store.ledger.jobs(open_only=True)} >= {job.id for job in jobs}:
                raise


def with_attempts(requests: Requests, found: pl.DataFrame) -> Requests:
    """The same requests, numbered by how often each was answered before."""
    attempts = found["attempt"].fill_null(0) + 1
    return dataclasses.replace(
        requests, frame=requests.frame.with_columns(attempts.cast(pl.UInt16).alias("attempt"))
    )
