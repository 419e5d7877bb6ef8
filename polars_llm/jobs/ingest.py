"""Result lines -> durable answers, reconciled against the keys that were sent.

The answers are durable before the job is closed, and writing them twice changes nothing: a crash in
between is repaired by reading the batch again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import polars as pl

from polars_llm.answer import ACCOUNT, DONE, FAILED, RETRY, complete
from polars_llm.backends.base import BatchBackend, BatchStatus, CallFailed, LiveBackend, is_batch
from polars_llm.errors import AccountError
from polars_llm.job import Job, State
from polars_llm.pricing import cost_usd
from polars_llm.store import Store
from polars_llm.store.directory import os_errors

__all__ = ["answered", "best", "blame_account", "fetch", "ingest", "keep", "priced", "reconcile", "refuse"]

_DOWNLOADS = 3
_PAUSE = 0.5
_GONE = {404, 410}
_PARTS_OF_INPUT = ("cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens")
_BILLED = ("input_tokens", *_PARTS_OF_INPUT, "output_tokens", "service_tier", "inference_geo")


def ingest(job: Job, status: BatchStatus, backend: BatchBackend, store: Store) -> Job:
    """Fetch, reconcile, write, close.

    Raises
    ------
    AccountError
        Some requests were refused for a reason of the account. The answers of the others are kept.
    """
    keys = store.spool.keys([job.id])

    def ours(found: pl.DataFrame) -> pl.DataFrame:
        # Lines of other jobs must not be counted for answers that the provider has and we have not.
        return found.join(keys, on="key", how="semi", maintain_order="left")

    try:
        target = store.spool.download_path(job.id, "results.jsonl")
        replies = ours(
            fetch(job, status, backend, target, lambda found: _is_whole(ours(found), keys, status))
        )
    except CallFailed as error:
        if error.status not in _GONE:
            raise
        answers = _all(keys, FAILED, "results_gone", f"the provider no longer has them: {error}")
    else:
        # Answers that are counted but were never seen may be any of those without a line: all may be billed.
        seen = not status.counted or answered(replies) >= status.done
        answers = reconcile(keys, replies, status.why if seen else "completed")
    refused = answers.filter(pl.col("state") == ACCOUNT)
    keep(answers.filter(pl.col("state") != ACCOUNT), job, backend, store)
    job = _close(job, State.INGESTED, answers, store)
    store.results.compact()  # many small jobs would become many small files
    blame_account(refused, backend)
    return job


def refuse(job: Job, status: BatchStatus, backend: BatchBackend, store: Store) -> Job:
    """The provider refused the whole batch before it ran; nothing was billed.

    Requests that it named fail for good; the others are tried again, a bounded number of times.

    Raises
    ------
    AccountError
        It was refused for a reason of the account; then nothing is remembered against the rows.
    """
    error = CallFailed(status.why, provider=backend.provider, status=400, kind=status.kind)
    if error.verdict.account:
        _close(job, State.FAILED, None, store, reason=status.why)
        raise error.public("validating the batch")
    keys = store.spool.keys([job.id]).with_row_index("line", offset=1)
    bad = pl.col("line").is_in(list(status.bad_lines))
    answers = keys.select(
        "key",
        "attempt",
        state=pl.when(bad).then(pl.lit(FAILED)).otherwise(pl.lit(RETRY)).cast(pl.UInt8),
        error=pl.when(bad).then(pl.lit("invalid_request")).otherwise(pl.lit("batch_refused")),
        error_message=pl.col("line")
        .replace_strict(dict(status.bad_lines), default=None, return_dtype=pl.String)
        .fill_null(status.why),
    )
    keep(answers, job, backend, store)
    return _close(job, State.FAILED, answers, store, reason=status.why)


def reconcile(keys: pl.DataFrame, replies: pl.DataFrame, why: str) -> pl.DataFrame:
    """One answer for each key that was sent: the best reply, or a failure that says what is missing.

    Parameters
    ----------
    keys
        ``key``, ``attempt``: what was sent.
    replies
        REPLY_SCHEMA, any order; foreign and duplicate keys are harmless.
    why
        How the batch ended; a request that never ran is sent again, one that vanished is not: it
        may have been billed.
    """
    joined = keys.select("key", "attempt").join(best(replies), on="key", how="left", maintain_order="left")
    never_ran = why in {"expired", "cancelled"}
    absent = pl.col("state").is_null()
    return joined.with_columns(
        state=pl.col("state").fill_null(RETRY if never_ran else FAILED),
        error=pl.when(absent).then(pl.lit(why if never_ran else "missing_result")).otherwise(pl.col("error")),
        error_message=pl.when(absent)
        .then(
            pl.lit(
                f"the batch {why} before this request ran"
                if never_ran
                else "the provider's files have no line for this request; it may have been billed"
            )
        )
        .otherwise(pl.col("error_message")),
    )


def best(replies: pl.DataFrame) -> pl.DataFrame:
    """One reply for each key: a success if there is one, and the first of several."""
    return replies.sort("state", maintain_order=True).unique("key", keep="first", maintain_order=True)


def priced(
    answers: pl.DataFrame, model: str, base_url: str | None, backend: BatchBackend | LiveBackend
) -> pl.DataFrame:
    """Answers with what each cost; null where that is not known, and for failures: they are not billed."""
    if not set(_BILLED) <= set(answers.columns) or "cost_usd" in answers.columns:
        return answers  # nothing was answered, or whoever answered says what it cost
    cost = cost_usd(
        answers.select(_BILLED).with_columns(pl.col(_PARTS_OF_INPUT).fill_null(0)),
        provider=backend.provider,
        model=model,
        mode="batch" if is_batch(backend) else "realtime",
        prices=backend.prices,
        base_url=base_url,
    )
    return answers.with_columns(pl.when(pl.col("state") == DONE).then(cost).alias("cost_usd"))


def answered(replies: pl.DataFrame) -> int:
    """How many requests have an answer among these replies."""
    return replies.filter(pl.col("state") == DONE)["key"].n_unique()


def _is_whole(replies: pl.DataFrame, keys: pl.DataFrame, status: BatchStatus) -> bool:
    """Nothing is missing but what never ran."""
    if keys.join(replies, on="key", how="anti").is_empty():
        return True
    return status.why != "completed" and status.counted and answered(replies) >= status.done


def fetch(
    job: Job,
    status: BatchStatus,
    backend: BatchBackend,
    target: Path,
    complete: Callable[[pl.DataFrame], bool],
) -> pl.DataFrame:
    """Download, to `target`, until nothing is missing, a few times: a cut download can look complete."""
    found = []
    for attempt in range(_DOWNLOADS):
        if attempt:
            time.sleep(_PAUSE * 2**attempt)
        with os_errors(target):  # a full disk
            backend.download(job, status, target)
            found.append(backend.parse(_lines(target), status))
            if complete(pl.concat(found)):
                break
    return pl.concat(found)


def _lines(path: Path) -> Iterator[bytes]:
    # Binary files split on LF alone: U+2028, U+2029 and U+0085 are text inside a JSON string.
    with path.open("rb") as file:
        yield from file


def _all(keys: pl.DataFrame, state: int, kind: str, message: str) -> pl.DataFrame:
    return keys.select(
        "key",
        "attempt",
        state=pl.lit(state, pl.UInt8),
        error=pl.lit(kind),
        error_message=pl.lit(message),
    )


def keep(answers: pl.DataFrame, job: Job, backend: BatchBackend | LiveBackend, store: Store) -> None:
    """Make answers durable, with what they cost and the job that they came by."""
    facts = answers.with_columns(
        provider=pl.lit(job.provider),
        job_id=pl.lit(job.id),
        model=pl.coalesce("model", pl.lit(job.model)) if "model" in answers.columns else pl.lit(job.model),
        received_at=pl.lit(datetime.now(UTC)),
    )
    store.results.add(complete(priced(facts, job.model, job.base_url, backend)))


def _close(
    job: Job, state: State, answers: pl.DataFrame | None, store: Store, reason: str | None = None
) -> Job:
    failed = 0 if answers is None else answers.filter(pl.col("state") >= FAILED).height
    done = 0 if answers is None else answers.height - failed
    job = store.ledger.move(job, state, done=done, failed=failed, reason=reason)
    # Prompt files hold users' data: once the answers are durable nothing needs them.
    store.spool.remove(job.id)
    return job


def blame_account(refused: pl.DataFrame, backend: BatchBackend | LiveBackend) -> None:
    """Raise AccountError if any request was refused for a reason of the account."""
    if refused.is_empty():
        return
    kind, message = refused.select("error", "error_message").row(0)
    raise AccountError(
        f"{backend.provider} refused {refused.height:,} requests for a reason of the"
        f" account ({kind}): {message}",
        provider=backend.provider,
        kind=kind,
        hint="mend the account, then run the same line again: these requests, and only these, are"
        " sent again. They were not billed; the answers of the others are kept.",
    )
