"""What was found -> the user's column, and the report of what failed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence

import polars as pl

from polars_llm.answer import DONE, FAILED, RETRY
from polars_llm.config import OnError
from polars_llm.errors import InvalidRequest, LLMWarning, RequestsFailed
from polars_llm.frame.typed import INVALID_OUTPUT
from polars_llm.jobs.evaluate import Pending
from polars_llm.jobs.lookup import Policy
from polars_llm.request import custom_ids
from polars_llm.store import Store

__all__ = ["FULL", "STATUS", "Failures", "column", "full", "warn"]

# Failures of which nobody knows whether they were answered, and therefore paid for.
_MAY_BE_BILLED = frozenset({"connection_lost", "missing_result", "results_gone", "unreadable_reply"})

STATUS = pl.Enum(["done", "pending", "failed"])

FULL: Mapping[str, pl.DataType] = {
    "value": pl.String(),
    "status": STATUS,
    "error": pl.String(),
    "finish_reason": pl.String(),
    "input_tokens": pl.Int64(),
    "cached_input_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "cost_usd": pl.Float64(),
    "model": pl.String(),
    "job_id": pl.String(),
    "key": pl.String(),
}


def full(value: pl.DataType, *, raw: bool = False) -> dict[str, pl.DataType]:
    """Fields of ``output="full"``; answers with a schema have ``raw`` too: their text."""
    return {**FULL, "value": value, **({"raw": pl.String()} if raw else {})}


def column(
    found: pl.DataFrame,
    rows: pl.DataFrame,
    store: Store,
    policy: Policy,
    pending: Pending | None,
    full_key: pl.Expr | None,
    value: pl.DataType,
) -> pl.Series:
    """Answers in the order of `found`; with `full_key` as the struct of ``output="full"``.

    A `value` of dtype Array is the answers' vectors, any other their texts.
    """
    source = "vector" if isinstance(value, pl.Array) else "text"
    if full_key is None and "value" in found.columns:
        return found["value"]
    if full_key is None:
        return _values(store.results.read(_only_done(found), [source]).to_series(), value)
    status = _status(found, policy, pending)
    # What is under way again shows as pending, not as the failure that it had before.
    known = _mask(found, status != "pending")
    facts = store.results.read(known, [source, "error", "error_message", *list(FULL)[3:-1]])
    facts = facts.with_columns(_values(facts[source], value).alias("value"), status=status)
    keyed = rows.lazy().select(key=full_key).select(key=custom_ids(pl.col("key"))).collect(engine="streaming")
    return _struct(facts, keyed["key"], found, pending)


def _values(answers: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Stored answers as the user's dtype."""
    if not isinstance(dtype, pl.Array):
        return answers
    lengths = answers.list.len()
    wrong = answers.filter(lengths != dtype.size)
    if wrong.len():
        raise InvalidRequest(
            f"The model answered with {wrong.list.len()[0]:,} numbers, not {dtype.size:,}",
            hint="vector_length= of the model object says how many there are. The answers are kept: asking"
            " the same again costs nothing.",
        )
    return answers.list.to_array(dtype.size)


def _struct(facts: pl.DataFrame, key: pl.Series, found: pl.DataFrame, pending: Pending | None) -> pl.Series:
    fields = facts.with_columns(
        key.alias("key"),
        found["key"].is_not_null().alias("asked"),
        _job_ids(found, pending, facts["job_id"]).alias("job_id"),
        value=pl.when(pl.col("status") == "done").then("value"),
        error=pl.when(pl.col("status") == "failed").then(_said()),
    )
    dtypes = full(facts["value"].dtype)
    if "value" in found.columns:
        dtypes = full(found["value"].dtype, raw=True)
        wrong = pl.format(f"{INVALID_OUTPUT}: {{}}", found["reason"])
        fields = fields.with_columns(
            found["value"],
            raw="text",
            error=pl.when(found["reason"].is_null()).then("error").otherwise(wrong),
        )
    whole = pl.struct(pl.col(n).cast(t) for n, t in dtypes.items())
    # A null prompt has a null answer, not a struct of nulls.
    return fields.select(pl.when("asked").then(whole).alias("full")).to_series()


def _said() -> pl.Expr:
    return pl.concat_str("error", "error_message", separator=": ", ignore_nulls=True)


def _only_done(found: pl.DataFrame) -> pl.DataFrame:
    if (found["state"].max() or DONE) == DONE:  # nothing to hide: the common case costs nothing
        return found
    return _mask(found, (found["state"] == DONE).fill_null(False))


def _mask(found: pl.DataFrame, shown: pl.Series) -> pl.DataFrame:
    return found.with_columns(pl.when(shown).then(pl.col(c)).alias(c) for c in ("state", "segment", "row"))


def _failed(found: pl.DataFrame, policy: Policy, pending: Pending | None) -> pl.Series:
    """Rows whose last word is a failure, and which nobody is trying again."""
    final = (found["state"] == FAILED) | (
        (found["state"] == RETRY) & (found["attempt"] >= policy.max_attempts)
    )
    if pending is not None:
        final = final & ~found["key"].is_in(pending.keys.implode())
    return final.fill_null(False)


def _status(found: pl.DataFrame, policy: Policy, pending: Pending | None) -> pl.Series:
    failed = _failed(found, policy, pending)
    done = (found["state"] == DONE).fill_null(False)
    return pl.select(
        pl.when(done)
        .then(pl.lit("done"))
        .when(failed)
        .then(pl.lit("failed"))
        .otherwise(pl.lit("pending"))
        .cast(STATUS)
        .alias("status")
    ).to_series()


def _job_ids(found: pl.DataFrame, pending: Pending | None, stored: pl.Series) -> pl.Series:
    if pending is None or not pending.jobs:
        return stored
    held = pending.held.unique("key")
    joined = found.select("key").join(held, on="key", how="left", maintain_order="left")
    return stored.fill_null(joined["job_id"]) if stored.len() else stored


class Failures:
    """Counts failed requests by kind, over as many batches of rows as an evaluation has."""

    def __init__(self, store: Store, policy: Policy) -> None:
        self._store = store
        self._policy = policy
        self._failed: list[pl.DataFrame] = []
        self._asked = 0

    @classmethod
    def together(cls, parts: Sequence[Failures]) -> Failures:
        """Counts of several parts of one column as one."""
        first = parts[0]
        whole = cls(first._store, first._policy)
        whole._failed = [frame for part in parts for frame in part._failed]
        whole._asked = sum(part._asked for part in parts)
        return whole

    def count(self, found: pl.DataFrame, pending: Pending | None) -> None:
        """Note the failures among `found`, each request once."""
        self._asked += found["key"].drop_nulls().n_unique()
        failed = found.filter(_failed(found, self._policy, pending)).unique("key")
        if failed.height:
            kinds = self._store.results.read(failed, ["error"])
            if "reason" in failed.columns:
                invalid = failed["reason"].is_not_null()
                kinds = kinds.select(pl.when(~invalid).then("error").otherwise(pl.lit(INVALID_OUTPUT)))
            self._failed.append(failed.select("key").with_columns(kinds))

    def report(self, on_error: OnError) -> None:
        """One warning, or RequestsFailed; nothing if nothing failed."""
        if not self._failed:
            return
        failed = pl.concat(self._failed).unique("key")
        kinds = failed.group_by("error").len().sort("len", "error", descending=[True, False])
        counts = {str(kind): int(n) for kind, n in kinds.rows()}
        listed = ", ".join(f"{kind} {n:,}" for kind, n in counts.items())
        fact = f"{failed.height:,} of {self._asked:,} requests failed: {listed}."
        hint = _hint(counts)
        if on_error == "raise":
            raise RequestsFailed(fact, failed=failed.height, kinds=counts, hint=hint)
        warn(f"{fact}\n\nHint: {hint}")


def _hint(kinds: Mapping[str, int]) -> str:
    said = []
    if kinds.keys() != {INVALID_OUTPUT}:
        money = "Providers do not bill failed requests"
        if lost := _MAY_BE_BILLED & kinds.keys():
            money += f" (but may have billed those with {' or '.join(sorted(lost))})"
        said.append(
            f"output='full' shows each error; retry_failed=True sends them again. {money}, and they are not"
            " sent again by themselves."
        )
    if INVALID_OUTPUT in kinds:
        said.append(
            "Answers that do not fit their schema were billed: output='full' shows why, and their text;"
            " a higher retries_on_invalid asks for them again."
        )
    return " ".join(said)


def warn(message: str) -> None:
    """Warn at the user's line."""
    warnings.warn(LLMWarning(message), stacklevel=_users_line())


def _users_line() -> int:
    """How many frames up the first one lies that is neither ours nor Polars'."""
    ours = (os.path.dirname(os.path.dirname(__file__)), os.path.dirname(pl.__file__))  # noqa: PTH120
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame, level = frame.f_back, level + 1
    return level
