"""Larger than memory: peak memory of lazy queries over many rows, from Parquet to Parquet.

    python benchmarks/bench_memory.py [--rows N] [--cold-rows N] [--quick]

- warm: all answers cached, ``scan_parquet -> llm.generate -> sink_parquet``, with the input in the order in
  which the answers were stored, and shuffled;
- cold: distinct prompts, ``scan_parquet -> llm.generate -> collect``, to accepted batches;
- no verb: the same file through ``scan_parquet -> sink_parquet``; what `pllm.Engine` adds to a query.

Each is a fresh process. Peak memory is the system's own figure (VmHWM; Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import data
import polars as pl
import pyarrow as pa
import pyarrow.parquet
import rounds

_SCHEMA = pa.schema({"id": pa.int64(), "prompt": pa.large_string()})
_CHUNK = 500_000
_SHARES = 20
_ROW_GROUP = 122_880  # what `sink_parquet` of Polars writes

_RUN = r"""
import json, re, time
from pathlib import Path
import polars as pl
import polars_llm as pllm
started = time.perf_counter()
facts = {{}}
source = pl.scan_parquet({source!r})
try:
    {line}
except pllm.JobsPending as pending:
    facts["jobs"] = len(pending.jobs)
seconds = time.perf_counter() - started
peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
print(json.dumps({{**facts, "seconds": seconds, "peak": peak}}))
"""


def run(line: str, source: Path, env: Mapping[str, str]) -> dict[str, Any]:
    """One query in a process of its own."""
    script = _RUN.format(line=line, source=str(source))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def prepare(place: Path, rows: int, *, fill: bool) -> None:
    """Input, and a cache that holds its answers; some rows at a time, for this machine may be small."""
    with pyarrow.parquet.ParquetWriter(place / "input.parquet", _SCHEMA) as file:
        for first in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - first)
            prompts = data.texts(count, seed=1, mark="p", first=first)
            ids = pl.int_range(first, first + count, eager=True)
            part = pl.DataFrame({"id": ids, "prompt": prompts}).to_arrow().cast(_SCHEMA)
            file.write_table(part, _ROW_GROUP)
            if fill:
                data.fill_cache(place / "cache", prompts, first=first)


def shuffle(place: Path) -> None:
    """The same rows in random order."""
    share = pl.col("id").hash(1) % _SHARES
    with pyarrow.parquet.ParquetWriter(place / "shuffled.parquet", _SCHEMA) as file:
        for number in range(_SHARES):
            part = pl.scan_parquet(place / "input.parquet").filter(share == number)
            rows = part.collect(engine="streaming").sample(fraction=1, shuffle=True, seed=number)
            file.write_table(rows.to_arrow().cast(_SCHEMA), _ROW_GROUP)


def warm(rows: int, place: Path) -> None:
    """Everything was answered before."""
    prepare(place, rows, fill=True)
    shuffle(place)
    env = {"POLARS_LLM_CACHE_DIR": str(place / "cache"), "OPENAI_BASE_URL": ""}
    target = place / "out.parquet"
    verb = f"source.llm.generate('prompt', model='openai/{data.MODEL}')"
    for name, source in (("stored order", "input"), ("shuffled", "shuffled")):
        facts = run(f"{verb}.sink_parquet({str(target)!r})", place / f"{source}.parquet", env)
        _check(target, rows)
        _say(f"warm, {rows:,} rows, {name}", facts)
    _say("no verb", run(f"source.sink_parquet({str(target)!r})", place / "input.parquet", env))


def _check(target: Path, rows: int) -> None:
    # The answer to the nth prompt has the number n in it.
    out = pl.scan_parquet(target).select(
        pl.len().alias("rows"),
        (pl.col("response").str.slice(1, 10) == pl.col("prompt").str.slice(1, 10)).sum().alias("right"),
    )
    counts = out.collect(engine="streaming").row(0)
    if counts != (rows, rows):
        raise SystemExit(f"rows, right rows: {counts}, not {rows:,}")


def cold(rows: int, place: Path) -> None:
    """Nothing was asked before: to the accepted batches."""
    from polars_llm.testing import provider

    prepare(place, rows, fill=False)
    with provider(auto=False) as server:
        env = {**server.env, "POLARS_LLM_CACHE_DIR": str(place / "cold")}
        line = f"source.llm.generate('prompt', model='openai/{data.MODEL}').collect()"
        facts = run(line, place / "input.parquet", env)
        batches = len(server.batches())
    if batches != facts["jobs"] or not batches:
        raise SystemExit(f"{batches} batches for {facts['jobs']} jobs")
    _say(f"cold, {rows:,} rows to {batches} batches", facts)


def engine(runs: int) -> None:
    """What `pllm.Engine` adds to queries without a verb."""
    import polars_llm as pllm

    lf = pl.LazyFrame({"n": range(1000)}).filter(pl.col("n") % 2 == 0).group_by(pl.col("n") % 7).len()
    ours, theirs = pllm.Engine(), pl.StreamingEngine()
    spent: dict[str, list[float]] = {"polars": [], "polars_llm": []}
    for _ in range(runs):
        for name, one in (("polars", theirs), ("polars_llm", ours)):
            started = time.perf_counter()
            lf.collect(engine=one)
            spent[name].append(time.perf_counter() - started)
    base, with_us = (statistics.median(s) for s in spent.values())
    print(
        f"a query without a verb: {base * 1e6:,.0f} us on Polars' engine, {with_us * 1e6:,.0f} us on"
        f" pllm.Engine, ratio {with_us / base:.2f} (medians of {runs:,})"
    )


def _say(what: str, facts: Mapping[str, Any]) -> None:
    print(f"{what}: {facts['seconds']:.1f} s, peak {facts['peak'] / 1e9:.2f} GB", flush=True)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--cold-rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="few rows: compares the outputs only")
    given = parser.parse_args()
    rows, cold_rows, runs = (2_000, 500, 20) if given.quick else (given.rows, given.cold_rows, 2_000)
    rounds.DATA.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="memory-", dir=rounds.DATA))
    try:
        engine(runs)
        cold(cold_rows, place)
        warm(rows, place)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
