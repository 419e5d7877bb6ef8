"""Money: the most that requests can cost, and the limits that are checked before anything is sent.

The bound is one that holds: a request has no more tokens than its JSON has bytes, and no answer is longer
than its limit. What is in flight counts at its bound, what is answered at what it cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import msgspec
import polars as pl

from polars_llm.backends.base import BatchBackend, LiveBackend, is_batch
from polars_llm.errors import BudgetExceeded
from polars_llm.job import Job
from polars_llm.jobs.lookup import Policy
from polars_llm.pricing import upper_bound_usd
from polars_llm.request import RequestHeader, Requests
from polars_llm.store import Store

__all__ = ["bound", "check_all", "check_evaluation", "output_tokens_max", "sizes"]

# What a live backend puts around the texts of a request is shorter than this.
_ENVELOPE = 512
_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_EMBEDDINGS = "/v1/embeddings"

_UNKNOWN_COST = (
    "set max_tokens (an answer without a limit has no price limit), give the model's prices"
    " (pllm.OpenAI(NAME, prices=pllm.Prices(...))), or leave max_cost out (images, and tools that the"
    " provider runs, have no bound)."
)
# Prices that are given now change nothing about answers that are stored, or jobs that are under way.
_UNKNOWN_BEFORE = (
    "jobs whose cost has no bound (pllm.jobs(open_only=True)) count at what they did cost once they are"
    " collected. Answers whose price is not known (cost_usd is null in pllm.results()) stay so:"
    " pllm.Config(max_cost=..., max_cost_since=datetime.datetime.now()) begins a budget without them."
)


def output_tokens_max(header: RequestHeader) -> int | None:
    """The longest answer, None if nothing limits it."""
    if header.endpoint == _EMBEDDINGS:
        return 0
    limits = [header.body[name] for name in _OUTPUT_LIMITS if name in header.body]
    return next((limit for limit in limits if isinstance(limit, int)), None)


def sizes(backend: BatchBackend | LiveBackend, requests: Requests) -> pl.Series:
    """Bytes of each request: at least as many as it has tokens; null where there are images among them."""
    if requests.has_images:
        return pl.Series([None] * requests.height, dtype=pl.Int64)
    if is_batch(backend):
        return pl.Series([len(line) for line in backend.render(requests)], dtype=pl.Int64)
    text = pl.col("prompt").str.len_bytes() + pl.col("system").str.len_bytes().fill_null(0)
    # A schema is in the body, and is read with every request.
    header = requests.header
    around = _ENVELOPE + len(msgspec.json.encode(header.body)) + len((header.schema or "").encode())
    return requests.frame.select(text.cast(pl.Int64) + around).to_series()


def bound(
    backend: BatchBackend | LiveBackend, header: RequestHeader, input_tokens: pl.Series
) -> float | None:
    """The most that these requests can cost, in USD; None if that can't be said."""
    if backend.mode == "local":
        return 0.0  # no provider bills it
    return upper_bound_usd(
        input_tokens=input_tokens,
        output_tokens_max=output_tokens_max(header),
        provider=backend.provider,
        model=header.model,
        mode="batch" if is_batch(backend) else "realtime",
        prices=backend.prices,
        base_url=backend.base_url,
        body={**header.body, "cache_control": True} if backend.writes_cache else header.body,
    )


def check_evaluation(
    new: Sequence[tuple[BatchBackend | LiveBackend, Requests]],
    in_flight: Sequence[tuple[Job, int]],
    store: Store,
    policy: Policy,
) -> None:
    """Check everything that one evaluation would send, before any of it is claimed.

    Parameters
    ----------
    new
        What would be sent.
    in_flight
        Open jobs that hold requests of this evaluation, and how many.

    Raises
    ------
    BudgetExceeded
        It may cost more than the evaluation, or the cache as a whole, may spend.
    """
    if not policy.limited:
        return
    count = sum(requests.height for _, requests in new)
    bounds = [bound(backend, r.header, sizes(backend, r)) for backend, r in new]
    cost = None if None in bounds else sum(b for b in bounds if b is not None)
    if policy.max_cost is not None:
        shares = [(_reserved(job), n / max(job.requests, 1)) for job, n in in_flight]
        known = [usd * share for usd, share in shares if usd is not None]
        known_all = policy.spent is not None and len(known) == len(shares)
        reserved = sum(known, policy.spent or 0.0) if known_all else None
        _compare(cost, reserved, policy.max_cost, f"{count:,} requests", "max_cost of this evaluation")
    check_all(cost, count, store, policy)


def check_all(cost: float | None, count: int, store: Store, policy: Policy) -> None:
    """Check the budget of the whole cache: what is in flight and what was spent since its date.

    Raises
    ------
    BudgetExceeded
        It may be passed.
    """
    if policy.budget is None:
        return
    open_jobs = store.ledger.jobs(open_only=True)
    # Answers of a job that is being read in are counted once: at the job's bound.
    spent = _spent(store, policy.budget_since, {job.id for job in open_jobs})
    bounds = [_reserved(job) for job in open_jobs]
    reserved = None if spent is None or None in bounds else spent + sum(b for b in bounds if b is not None)
    _compare(cost, reserved, policy.budget, f"{count:,} requests", "budget in pllm.Config(max_cost=...)")


def _reserved(job: Job) -> float | None:
    """The most that an open job can cost."""
    if job.mode == "local":
        return 0.0
    if job.cost_max_usd is not None:
        return job.cost_max_usd
    # It was made while there was no limit. As if all its text were one request, and all of it were
    # written to the provider's cache: the highest rate.
    return upper_bound_usd(
        input_tokens=pl.Series([job.size_bytes]),
        output_tokens_max=None if job.output_tokens_max is None else job.output_tokens_max * job.requests,
        provider=job.provider,
        model=job.model,
        mode="batch" if job.mode == "batch" else "realtime",
        base_url=job.base_url,
        body={"cache_control": True},
    )


def _spent(store: Store, since: datetime | None, open_jobs: set[str]) -> float | None:
    paid = store.results.scan().filter(
        (pl.col("state") == 0)
        & ~pl.col("job_id").is_in(list(open_jobs)).fill_null(False)
        & (pl.col("provider") != "vllm")
        & (pl.lit(True) if since is None else pl.col("received_at") >= since)
    )
    total, unknown = (
        paid.select(pl.col("cost_usd").sum(), pl.col("cost_usd").null_count().alias("n")).collect().row(0)
    )
    return None if unknown else float(total)


def _compare(cost: float | None, reserved: float | None, limit: float, what: str, name: str) -> None:
    if cost is None or reserved is None:
        missing = "What these requests can cost" if cost is None else "What is in flight or was spent before"
        raise BudgetExceeded(
            f"{missing} is not known, and the {name} is {limit:,g} USD.",
            cost_usd=cost,
            max_cost=limit,
            reserved_usd=reserved or 0.0,
            hint=f"{_UNKNOWN_COST if cost is None else _UNKNOWN_BEFORE} Nothing was sent.",
        )
    if cost + reserved <= limit:
        return
    beside = f" beside {reserved:,.4f} USD in flight or spent" if reserved else ""
    raise BudgetExceeded(
        f"{what} may cost up to {cost:,.4f} USD{beside}; the {name} is {limit:,g} USD.",
        cost_usd=cost,
        max_cost=limit,
        reserved_usd=reserved,
        hint="lf.llm.estimate(...) shows the whole estimate; fewer rows cost less, and so does a smaller"
        " max_tokens where the answers are text; a larger max_cost allows it. Nothing was sent.",
    )
