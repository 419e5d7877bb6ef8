"""Realtime: a column asked one call a row, beside the ideal, rows x latency / concurrency.

    python benchmarks/bench_realtime.py [--rows N] [--runs N] [--concurrency N] [--latency S] [--quick]

A local provider answers after `latency` seconds, on the same machine and its cores. The contestants
take turns: the library, and the bare SDK (an asyncio.gather over as many calls at once, nothing kept).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import rounds
from data import MODEL
from rounds import Contestant, Stopwatch, report

from polars_llm.testing import Provider, provider


def prompts(rows: int) -> list[str]:
    """Distinct prompts whose answers say which they are."""
    return [f"[[say:answer {n}]] Review number {n}: it was good, and it came on time." for n in range(rows)]


def digest(answers: list[str | None]) -> str:
    """Of the answers and their order."""
    return hashlib.sha256("\n".join(map(str, answers)).encode()).hexdigest()


def library(rows: int, concurrency: int) -> None:
    """As a user writes it."""
    import openai  # noqa: F401  # the SDK's import is no part of either
    import polars as pl

    import polars_llm  # noqa: F401

    frame = pl.DataFrame({"prompt": prompts(rows)})
    watch = Stopwatch()
    out = frame.llm.generate("prompt", model=f"openai/{MODEL}", mode="realtime", max_concurrency=concurrency)
    watch.stop()
    report(watch, digest=digest(out["response"].to_list()))


def bare(rows: int, concurrency: int) -> None:
    """The SDK alone."""
    import openai

    async def ask_all() -> list[str | None]:
        turn = asyncio.Semaphore(concurrency)

        async def ask(prompt: str) -> str | None:
            async with turn:
                reply = await client.chat.completions.create(
                    model=MODEL, messages=[{"role": "user", "content": prompt}]
                )
            return reply.choices[0].message.content

        async with openai.AsyncOpenAI(max_retries=0) as client:
            return list(await asyncio.gather(*map(ask, prompts(rows))))

    watch = Stopwatch()
    answers = asyncio.run(ask_all())
    watch.stop()
    report(watch, digest=digest(answers))


def fresh(place: Path, server: Provider) -> Callable[[], Mapping[str, str]]:
    """Before each run: an empty cache."""

    def before() -> Mapping[str, str]:
        shutil.rmtree(place, ignore_errors=True)
        return {**server.env, "POLARS_LLM_CACHE_DIR": str(place)}

    return before


def measure(rows: int, runs: int, concurrency: int, latency: float) -> None:
    """Race, compare the answers, print."""
    place = Path(tempfile.mkdtemp(prefix="pllm-realtime-"))
    sizes = ["--rows", str(rows), "--concurrency", str(concurrency)]
    try:
        with provider(set_env=False, latency=latency) as server:
            contestants = [
                Contestant(
                    name=name,
                    rows=rows,
                    command=[sys.executable, __file__, "--contestant", name, *sizes],
                    runs=runs,
                    before=fresh(place / "cache", server),
                )
                for name in ("polars_llm", "bare SDK")
            ]
            done = rounds.race(contestants)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    ideal = rows * latency / concurrency
    print(f"Realtime, {rows:,} rows, {latency * 1000:.0f} ms latency, {concurrency} at once")
    print(f"ideal: {ideal:.2f} s")
    print(rounds.standings(contestants, done))
    rounds.same_digest(done, ["polars_llm", "bare SDK"])
    for name in ("polars_llm", "bare SDK"):
        times = [run.seconds for run in done[name]]
        aim = ", aim at most 1.3" if name == "polars_llm" else ""
        print(f"{name} / ideal: {rounds.ratio(times, [ideal] * len(times))}{aim}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--quick", action="store_true", help="tiny, only compares the answers")
    parser.add_argument("--contestant", choices=["polars_llm", "bare SDK"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.contestant:
        {"polars_llm": library, "bare SDK": bare}[chosen.contestant](chosen.rows, chosen.concurrency)
    elif chosen.quick:
        measure(100, 1, chosen.concurrency, chosen.latency)
    else:
        measure(chosen.rows, chosen.runs, chosen.concurrency, chosen.latency)


if __name__ == "__main__":
    main()
