"""The library at the same tasks, as a user writes them.

    python benchmarks/library.py warm INPUT
    python benchmarks/library.py cold INPUT

Where the cache and the provider are, the environment says.
"""

from __future__ import annotations

import sys

import polars as pl
from data import MODEL, digest_of
from rounds import Stopwatch, report

import polars_llm


def warm(source: str) -> None:
    """Everything was answered before."""
    frame = pl.read_parquet(source)
    watch = Stopwatch()
    answered = frame.llm.generate("prompt", model=f"openai/{MODEL}")
    watch.stop()
    report(watch, digest=digest_of(answered["response"]), nulls=answered["response"].null_count())


def cold(source: str) -> None:
    """Nothing was asked before: to the accepted batches."""
    frame = pl.read_parquet(source)
    watch = Stopwatch()
    try:
        frame.llm.generate("prompt", model=f"openai/{MODEL}")
    except polars_llm.JobsPending as pending:
        watch.stop()
        report(watch, jobs=len(pending.jobs))


if __name__ == "__main__":
    {"warm": warm, "cold": cold}[sys.argv[1]](*sys.argv[2:])
