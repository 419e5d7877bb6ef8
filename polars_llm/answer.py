"""An answer: what is kept of a reply, as one row of a results segment."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

__all__ = ["ACCOUNT", "ANSWER_SCHEMA", "DONE", "FAILED", "RETRY", "complete"]

# Ranks, best first: of two answers for one key the lower state wins, then the earlier one.
DONE = 0
FAILED = 1
"""Failed for good: remembered, not sent again."""
RETRY = 2
"""Failed for a passing reason: sent again, until `attempt` reaches the bound."""
ACCOUNT = 3
"""Refused for a reason of the account (credentials, quota): reported, never stored."""

ANSWER_SCHEMA: Mapping[str, pl.DataType] = {
    "key": pl.Binary(),  # 32 bytes, blake3 of the canonical request
    "state": pl.UInt8(),
    "attempt": pl.UInt16(),  # how often this key was answered, this answer included; 1 the first time
    "text": pl.String(),  # null where the reply carries no text
    "error": pl.String(),  # kind, for counting; null if done
    "error_message": pl.String(),
    "finish_reason": pl.String(),
    "input_tokens": pl.Int64(),
    "cached_input_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "cost_usd": pl.Float64(),  # null if the price is not known
    "provider": pl.String(),
    "model": pl.String(),
    "job_id": pl.String(),
    "received_at": pl.Datetime("us", "UTC"),
    "vector": pl.List(pl.Float32()),  # embeddings only
    "body": pl.Binary(),  # the raw reply, as it came
}


def complete(answers: pl.DataFrame) -> pl.DataFrame:
    """`answers` with exactly the columns of ANSWER_SCHEMA; what is not there is null."""
    missing = [pl.lit(None, t).alias(n) for n, t in ANSWER_SCHEMA.items() if n not in answers.columns]
    return answers.with_columns(missing).select(pl.col(n).cast(t) for n, t in ANSWER_SCHEMA.items())
