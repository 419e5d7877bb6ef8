"""Typed answers: texts become values when they are laid on rows, and what does not fit may be asked again.

The stored text stays as it came: another schema's reading, or none, finds it as it was. An answer that does
not fit counts as failed from here up; the store, and the heart, know it as done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import polars as pl

from polars_llm.answer import DONE, FAILED
from polars_llm.errors import InvalidRequest
from polars_llm.jobs.lookup import prefixes
from polars_llm.request import Requests, key_prefix, retry_key
from polars_llm.schema import Schema, freeze
from polars_llm.store.results import ResultStore

__all__ = ["INVALID_OUTPUT", "SEED_STEP", "Typed", "nth_retry"]

INVALID_OUTPUT = "invalid_output"

SEED_STEP = 1_000_003
"""A retry raises a set seed by so much: beyond what samples reach."""

# Reasons to stop at which a text is not whole, in both protocols' words.
_CUT = ("length", "max_tokens", "model_context_window_exceeded")


@dataclasses.dataclass(frozen=True, slots=True)
class Typed:
    """How texts become values.

    Parameters
    ----------
    schema
        What they must fit.
    retries
        How often a request is asked again whose answer does not fit.
    field
        The one property that is the value; None for the whole object.
    """

    schema: Schema
    retries: int = 0
    field: str | None = None

    @classmethod
    def of(cls, schema: Any, retries: int) -> Typed | None:
        """What the arguments of a verb say; None without a schema.

        Raises
        ------
        InvalidRequest
            At call: a schema that cannot be mapped, or retries that are not a number of attempts.
        """
        wrong = None
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            wrong = f"retries_on_invalid is {retries!r}, not a number of attempts"
        elif schema is None and retries:
            wrong = "retries_on_invalid is for answers that do not fit a schema, and there is none"
        if wrong:
            raise InvalidRequest(wrong, hint="for example schema=S, retries_on_invalid=1. Nothing was sent.")
        if schema is None:
            return None
        return cls(schema if isinstance(schema, Schema) else freeze(schema), retries)

    @property
    def dtype(self) -> pl.DataType:
        """Of the values."""
        whole = self.schema.dtype
        return whole if self.field is None else pl.Series([], dtype=whole).struct.field(self.field).dtype

    def settled(
        self, found: pl.DataFrame, hexes: Callable[[pl.Series], pl.Series], results: ResultStore
    ) -> pl.DataFrame:
        """What is known of each row, read: the first attempt that fits, or the last one there is.

        Parameters
        ----------
        found
            What `results` has for the rows themselves.
        hexes
            Gives the keys of the rows that a mask marks, as hex.

        Returns
        -------
        DataFrame
            Columns of `ResultStore.find`, with state failed where the answer does not fit; ``value``;
            ``reason``, why it does not fit; ``retry``, which attempt it is.
        """
        found = self._read(found, 0, results)
        for retry in range(1, self.retries + 1):
            wrong = found["reason"].is_not_null()
            if not wrong.any():
                break
            key = key_prefix(nth_retry(pl.col("key"), pl.lit(retry), retry))
            keys = hexes(wrong).to_frame("key").select(key.alias("key")).to_series()
            found = _replaced(found, wrong, self._read(results.find(keys), retry, results))
        return found

    def again(self, asked: Requests, results: ResultStore) -> Requests | None:
        """Those requests and the ones that follow on answers which do not fit; None if none do by now."""
        frame = asked.frame
        if not self.retries or frame.is_empty():
            return None
        found = self._read(results.find(prefixes(frame)), 0, results)
        wrong = frame.filter(found["reason"].is_not_null(), pl.col("retry") < self.retries)
        new = wrong.with_columns(
            key=retry_key(pl.col("key").bin.encode("hex")).str.decode("hex"),
            attempt=pl.lit(1, pl.UInt16),
            sample=pl.col("sample") + SEED_STEP,
            retry=pl.col("retry") + 1,
        ).join(frame, on="key", how="anti")
        return None if new.is_empty() else Requests(asked.header, pl.concat([frame, new]))

    def _read(self, found: pl.DataFrame, retry: int, results: ResultStore) -> pl.DataFrame:
        done = (found["state"] == DONE).fill_null(False)
        shown = found.with_columns(pl.when(done).then(pl.col(c)).alias(c) for c in ("segment", "row"))
        text = results.read(shown, ["text"]).to_series()
        value, reason = self.schema.read(text)
        wrong = done & (text.is_null() | reason.is_not_null())
        if wrong.any():
            facts = results.read(found.filter(wrong), ["finish_reason", "error_message"])
            said = facts.with_columns(reason.filter(wrong).alias("reason")).select(_explained()).to_series()
            reason = reason.scatter(wrong.arg_true(), said)
        return found.with_columns(
            state=pl.when(wrong).then(pl.lit(FAILED, pl.UInt8)).otherwise("state"),
            value=value if self.field is None else value.struct.field(self.field),
            reason=reason,
            retry=pl.lit(retry, pl.Int64),
        )


def nth_retry(key_as_hex: pl.Expr, times: pl.Expr, most: int) -> pl.Expr:
    """The key of each row's nth retry: the key itself where that is 0; `most` is the highest n."""
    made = key_as_hex
    for n in range(1, most + 1):
        made = pl.when(times >= n).then(retry_key(made)).otherwise(made)
    return made


def _explained() -> pl.Expr:
    """Why it does not fit; a text that was refused or cut off says so first."""
    silent = pl.concat_str(
        pl.lit("no text"), "finish_reason", "error_message", separator=": ", ignore_nulls=True
    )
    cut = pl.format("cut off ({}): {}", "finish_reason", "reason")
    return (
        pl.when(pl.col("reason").is_null())
        .then(silent)
        .when(pl.col("finish_reason").is_in(_CUT))
        .then(cut)
        .otherwise("reason")
    )


def _replaced(found: pl.DataFrame, which: pl.Series, others: pl.DataFrame) -> pl.DataFrame:
    """`found` with `others`, in their order, in place of the rows that `which` marks."""
    numbered = found.with_row_index("at")
    kept = numbered.filter(~which)
    moved = others.with_columns(numbered.filter(which)["at"])
    return pl.concat([kept, moved.select(kept.columns)]).sort("at").drop("at")
