"""What operators do, in a notebook and in the CLI: jobs, results, cancel, abandon, recover, watch."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from polars_llm.answer import ANSWER_SCHEMA, DONE, FAILED, complete
from polars_llm.backends.base import BatchBackend, CallFailed, ListedBatch, Phase
from polars_llm.config import settings
from polars_llm.errors import CacheError, InvalidRequest, ProviderError
from polars_llm.frame.column import warn
from polars_llm.job import Job, State
from polars_llm.jobs.evaluate import advance
from polars_llm.jobs.ingest import answered, best, fetch, priced
from polars_llm.jobs.lookup import Policy, prefixes
from polars_llm.models import Model, for_job, of_provider
from polars_llm.progress import Progress
from polars_llm.request import custom_ids, key_from_custom_id
from polars_llm.store import Store, open_store
from polars_llm.store.directory import os_errors

__all__ = ["abandon", "cancel", "jobs", "recover", "results", "watch"]

_JOBS: dict[str, pl.DataType] = {
    "job": pl.String(),
    "provider": pl.String(),
    "model": pl.String(),
    "state": pl.String(),
    "requests": pl.Int64(),
    "done": pl.Int64(),
    "failed": pl.Int64(),
    "created": pl.Datetime("us", "UTC"),
    "age": pl.Duration("us"),
    "batch_id": pl.String(),
    "reason": pl.String(),
    "cost_usd": pl.Float64(),
}


def _store() -> Store:
    return open_store(*settings().cache)


def jobs(*, open_only: bool = False) -> pl.DataFrame:
    """All jobs that this cache knows, oldest first. Asks no provider and costs nothing.

    Parameters
    ----------
    open_only
        Leave out what is finished.

    Returns
    -------
    DataFrame
        job, provider, model, state, requests, done, failed (as last seen), created (UTC), age,
        batch_id (the provider's), reason (why it waits or ended), cost_usd (of its stored answers;
        null while there are none, or if a price is not known, or where the results cannot be read: then
        it warns).

    Raises
    ------
    CacheError
        The ledger cannot be read.
    """
    store = _store()
    now = datetime.now(UTC)
    rows = []
    for job in store.ledger.jobs(open_only=open_only):
        created = datetime.fromtimestamp(job.created_at, UTC)
        facts = {name: getattr(job, name) for name in ("provider", "model", "requests", "done", "failed")}
        rows.append(
            {
                "job": job.id,
                **facts,
                "state": job.state.value,
                "created": created,
                "age": now - created,
                "batch_id": job.batch_id,
                "reason": job.reason,
            }
        )
    frame = pl.DataFrame(rows, schema={n: t for n, t in _JOBS.items() if n != "cost_usd"})
    try:
        costs = _costs(store)
    except CacheError as error:
        # The ledger is of this host: an outage of the store is no reason to hide what is in flight.
        warn(f"What the jobs cost is not known now: {error}")
        costs = pl.DataFrame(schema={"job": pl.String, "cost_usd": pl.Float64})
    return frame.join(costs, on="job", how="left", maintain_order="left").select(*_JOBS)


def _costs(store: Store) -> pl.DataFrame:
    answers = store.results.scan().select("job_id", "cost_usd", "state")
    known = pl.col("cost_usd").filter(pl.col("state") == DONE)
    cost = pl.when(known.is_null().any() | (known.len() == 0)).then(None).otherwise(known.sum())
    return (
        answers.group_by("job_id")
        .agg(cost.alias("cost_usd"))
        .rename({"job_id": "job"})
        .filter(pl.col("job").is_not_null())
        .collect(engine="streaming")
    )


def results(*, body: bool = False) -> pl.LazyFrame:
    """Everything ever answered and kept, one row a request. Costs nothing.

    Parameters
    ----------
    body
        Add the raw reply, as it came (Binary).

    Returns
    -------
    LazyFrame
        key (the custom_id), status (done, failed, retry), text, error, error_message, finish_reason,
        input_tokens, cached_input_tokens, output_tokens, cost_usd, provider, model, job_id,
        received_at (UTC), vector (of an embedding), and body if asked for. Prompts are not kept: join
        on the key that ``output="full"`` gives.

    Raises
    ------
    CacheError
        At call or at collect: the results cannot be read.
    """
    status = pl.col("state").replace_strict(
        {DONE: "done", FAILED: "failed"}, default="retry", return_dtype=pl.String
    )
    left_out = {"key", "state", "attempt", "body"}
    shown = [name for name in ANSWER_SCHEMA if name not in left_out] + (["body"] if body else [])
    return (
        _store().results.scan().select(custom_ids(pl.col("key")).alias("key"), status.alias("status"), *shown)
    )


def cancel(job: str, *, model: Model | None = None) -> None:
    """Ask the provider to stop a job. Answers that are done by then are billed, kept and collected.

    The rest is sent again when a frame that needs it is evaluated.

    Parameters
    ----------
    job
        Its id, as `jobs` shows it.
    model
        A model object, where key or address do not come from the environment.

    Raises
    ------
    InvalidRequest
        No such job, or it has no batch that could be cancelled.
    ProviderError
        The provider refused.
    """
    found = _find(job)
    if found.state is not State.SUBMITTED:
        raise InvalidRequest(
            f"{job} is {found.state}: there is no running batch to cancel",
            hint="pllm.jobs() shows the states; pllm.abandon(job) gives up a job that is stuck.",
        )
    backend = for_job(found, model)
    try:
        backend.cancel(found)
    except CallFailed as error:
        raise error.public(f"cancelling {job}") from error
    finally:
        backend.close()


def abandon(job: str) -> None:
    """Give a job up: its requests are free to be sent again. The way out where nothing else is.

    A batch that it made goes on at the provider and is billed; sending the same requests again is
    then paid a second time. `recover` can still read its answers.

    Parameters
    ----------
    job
        Its id, as `jobs` shows it.

    Raises
    ------
    InvalidRequest
        No such job, it is closed already, or a live process is submitting it.
    """
    store = _store()
    found = _find(job)
    if not found.state.is_open:
        raise InvalidRequest(f"{job} is {found.state} already", hint="there is nothing to give up.")
    if found.owner is not None and store.directory.is_alive(found.owner):
        raise InvalidRequest(
            f"{job} belongs to a process that is at work",
            hint="wait until it is done, or stop that process first.",
        )
    nothing_sent = {State.PLANNED, State.UPLOADED}
    target = State.RELEASED if found.state in nothing_sent else State.ABANDONED
    moved = store.ledger.move(found, target, owner=None, reason="given up by the user")
    if moved.state is target:
        store.spool.remove(job)


def _find(job: str) -> Job:
    found = _store().ledger.get(job)
    if found is None:
        raise InvalidRequest(f"There is no job {job!r} in this cache", hint="pllm.jobs() lists them.")
    return found


def watch(*, model: Model | None = None) -> pl.DataFrame:
    """One look at every open job: poll, fetch what has ended. What cron calls.

    Parameters
    ----------
    model
        A model object, where key or address do not come from the environment.

    Returns
    -------
    DataFrame
        The jobs that are still open, as `jobs` gives them. Where a provider does not answer now, one
        `LLMWarning` says so.

    Raises
    ------
    ProviderError, AccountError
        A provider refused; the jobs of the others were looked at first.
    """
    store = _store()
    problems: list[ProviderError] = []
    unanswered: dict[str, list[CallFailed]] = {}
    policy = Policy(poll_interval=settings().poll_interval, quiet_period=settings().quiet_period)
    for job in store.ledger.jobs(open_only=True):
        backend = for_job(job, model) if job.mode == "batch" else None
        try:
            failed = advance(job, backend, store, policy)
            if failed is not None:
                unanswered.setdefault(job.base_url or job.provider, []).append(failed)
        except ProviderError as error:
            problems.append(error)
        finally:
            if backend is not None:
                backend.close()
    for host, failures in unanswered.items():
        count = "1 job" if len(failures) == 1 else f"{len(failures):,} jobs"
        warn(
            f"{host} did not answer about {count}: {failures[-1]}\n\n"
            "Hint: nothing to do: the next look asks again. What was sent is still there."
        )
    if store.directory.jobs.exists():
        _clean(store)
    if problems:
        raise problems[0]
    return jobs(open_only=True)


def _clean(store: Store) -> None:
    """Remove working files of jobs that are closed: a crash between closing and removing."""
    with store.ledger.transaction():  # nobody claims meanwhile
        open_jobs = {job.id for job in store.ledger.jobs(open_only=True)}
        for job_id in store.spool.leftovers(open_jobs):
            store.spool.remove(job_id)


def recover(provider: str | Model) -> pl.DataFrame:
    """Read back from the provider everything that this library sent, and fill the cache with it.

    For a lost cache directory. Batches that still run become jobs again where the provider gives
    back what was sent (OpenAI); others are collected by a later recover. Nothing is sent. Doing it
    twice changes nothing.

    Parameters
    ----------
    provider
        ``"openai"``, ``"anthropic"``, or a model object (its name does not matter) with the address
        and the key of the account.

    Returns
    -------
    DataFrame
        batch_id, outcome and answers (how many were new). Outcomes: recovered; incomplete (the provider's
        files have fewer answers than it counts, also after several downloads; what is missing was billed:
        recover again before sending it again); resumed (a job again); running (recover again when it has
        ended); known (an open job has it, or it was refused as a whole); foreign (not of this library);
        gone (the provider no longer has its results).

    Raises
    ------
    ProviderError, AccountError
        The provider refused; what was read until then is kept.
    """
    store = _store()
    store.directory.prepare(anew=True)
    backend = of_provider(provider).backend()
    known = {job.batch_id: job for job in store.ledger.jobs() if job.batch_id}
    rows = []
    try:
        listed = list(backend.list_batches())
        with Progress(len(listed), "batches") as bar:
            for number, batch in enumerate(listed):
                job = known.get(batch.batch_id)
                open_job = job is not None and job.state.is_open
                outcome, new = ("known", 0) if open_job else _recover_one(batch, backend, store)
                rows.append({"batch_id": batch.batch_id, "outcome": outcome, "answers": new})
                bar.update(number + 1)
    except CallFailed as error:
        raise error.public("reading the batches back") from error
    finally:
        backend.close()
    return pl.DataFrame(rows, schema={"batch_id": pl.String, "outcome": pl.String, "answers": pl.Int64})


def _recover_one(batch: ListedBatch, backend: BatchBackend, store: Store) -> tuple[str, int]:
    name = _name_of(batch)
    if batch.status.phase is Phase.RUNNING:
        return ("resumed", 0) if _resume(batch, backend, store) else ("running", 0)
    if batch.status.phase is not Phase.ENDED:
        return "known", 0
    # A file of one's own: others may recover, or collect, the same batch.
    own = f"recover_{secrets.token_hex(8)}"
    target = store.spool.download_path(own, "jsonl")

    def complete(replies: pl.DataFrame) -> bool:
        return answered(replies) >= batch.status.done or (
            replies.is_empty() and _lines_in(target) >= batch.status.done  # all of it is somebody else's
        )

    try:
        replies = fetch(_as_job(batch, backend, State.ENDED, 0), batch.status, backend, target, complete)
    except CallFailed as error:
        if error.status in {404, 410}:
            return "gone", 0
        raise
    finally:
        store.spool.remove(own)
    if replies.is_empty():
        return "foreign", 0
    whole = answered(replies) >= batch.status.done
    return "recovered" if whole else "incomplete", _keep_new(best(replies), name, batch, backend, store)


def _lines_in(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _name_of(batch: ListedBatch) -> str:
    # What a list says may be anybody's: only a plain name becomes a file's.
    name = batch.job_id or f"recovered_{batch.batch_id}"
    plain = re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name)
    return name if plain else f"recovered_{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"


def _keep_new(
    replies: pl.DataFrame, name: str, batch: ListedBatch, backend: BatchBackend, store: Store
) -> int:
    """Store what is not known yet; passing failures are not answers."""
    found = store.results.find(prefixes(replies))
    better = found["state"].is_null() | (replies["state"] < found["state"])
    new = replies.filter(better & (replies["state"] <= FAILED))
    facts = new.with_columns(
        attempt=pl.lit(1, pl.UInt16),
        provider=pl.lit(backend.provider),
        model=pl.coalesce("model", pl.lit(batch.model, pl.String)),
        job_id=pl.lit(name),
        received_at=pl.lit(datetime.now(UTC)),
    )
    store.results.add(complete(priced(facts, batch.model or "", backend.base_url, backend)))
    if new.height:
        store.ledger.counted(name)
    return new.height


def _resume(batch: ListedBatch, backend: BatchBackend, store: Store) -> bool:
    """Make a running batch a job again, so that evaluating its frame waits for it and doesn't pay."""
    name = _name_of(batch)
    own = f"recover_{secrets.token_hex(8)}"
    target = store.spool.download_path(own, "jsonl")
    try:
        with os_errors(target):
            sent = backend.sent_custom_ids(batch, target)
            keys = [key for key in map(key_from_custom_id, sent or ()) if key is not None]
    finally:
        store.spool.remove(own)
    if not keys:
        return False
    frame = pl.DataFrame({"key": keys}, schema={"key": pl.Binary}).with_columns(attempt=pl.lit(1, pl.UInt16))
    store.spool.write_keys(name, frame)
    store.ledger.put(_as_job(batch, backend, State.SUBMITTED, len(keys)))
    return True


def _as_job(batch: ListedBatch, backend: BatchBackend, state: State, requests: int) -> Job:
    now = time.time()
    return Job(
        id=_name_of(batch),
        state=state,
        provider=backend.provider,
        base_url=backend.base_url,
        endpoint=batch.endpoint or "",
        model=batch.model or "",
        requests=requests,
        batch_id=batch.batch_id,
        input_file_id=batch.input_file_id,
        created_at=now,
        updated_at=now,
    )
