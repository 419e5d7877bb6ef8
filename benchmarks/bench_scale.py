"""How time, memory and disk grow with the rows, up to what this machine holds, and on paper to a billion.

    python benchmarks/bench_scale.py [--rows N] [--memory GB] [--seconds S] [--quick]

No provider and no network: prompts and answers of 64 characters are made up. From 100,000 rows on, by factors
of about three, up to ``--rows``: planning, packing, pending, collecting, the index, looking up, reading. A
step is left out where the sizes before say that it would pass ``--memory`` or ``--seconds``. What each step
does: `scale_steps.py`. What grows with the number of batches is measured apart, on batches of one request.

Each step is a fresh process; its peak is the system's own figure (VmHWM; Linux only). Printed as well:

- ``b`` of ``time = a * rows ** b``, least squares on logarithms over the last four sizes, for the clock and
  for processor time; 1e8 and 1e9 rows by the larger of b and 1 (below 1 it is a fixed cost that fades), from
  the largest size that was measured;
- memory as ``fixed + bytes a row``, a line through the last two sizes: it is a sum, and the fixed part would
  spoil a power; ``b`` of what is above an empty process says whether it is a line.

Others who use the machine slow the clock, less so the processor time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rounds

SIZES = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000]
FAR = [100_000_000, 1_000_000_000]
STEEP = 1.1
BATCH = 50_000
_BATCHES = [20, 60, 200, 600, 2_000]
_FITTED = 4
_NOISE_S = 0.01

# In this order: each stands on what the ones before left in the cache.
STEPS = {
    "plan": "plan: keys, look-up, distinct requests",
    "pack": "pack: lines, batches, spool, claim",
    "pending": "pending: the same line, all in flight",
    "collect": "collect: result lines to merged segments",
    "rebuild": "index: rebuilt from the segments",
    "load": "index: loaded",
    "save": "index: saved",
    "extend": "index: with one more batch",
    "find_known": "find: all known",
    "find_unknown": "find: none known",
    "find_sample": "find: a sample of 1%",
    "again": "again: answers in stored order",
    "scattered": "again: rows in another order",
    "sample": "again: a sample of 1%",
}
_BATCHES_STEP = "batches of one request: listed, moved, removed"
_NEEDED = ("plan", "pack", "collect")  # without it nothing after it can be measured
_DISK = {"pack": "spool, while in flight", "collect": "segments", "rebuild": "key index"}
_RATES = {"submitted": ("pack", "plan"), "collected": ("collect",), "re-evaluated": ("again",)}


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    """One step on so many rows."""

    rows: int
    seconds: float
    cpu: float
    peak: int | None
    empty: int | None
    disk: int | None

    @property
    def grown(self) -> float:
        """Peak memory above that of the empty process."""
        return float((self.peak or 0) - (self.empty or 0))


def measure(step: str, rows: int, cache: Path) -> dict[str, Any]:
    """One step in a process of its own."""
    command = [sys.executable, str(rounds.HERE / "scale_steps.py"), step, str(rows)]
    env = {**os.environ, "POLARS_LLM_CACHE_DIR": str(cache), "OPENAI_BASE_URL": ""}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} on {rows:,} rows failed")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def points(rows: int, facts: dict[str, Any], step: str, name: str) -> dict[str, Point]:
    """A step and its parts, under their names."""
    memory = (facts["peak_bytes"], facts["empty"], facts.get("disk"))
    found = {name: Point(rows, facts["seconds"], facts["cpu"], *memory)}
    for part, seconds in facts.get("split", {}).items():
        found[f"- {step}: {part}"] = Point(rows, seconds, math.nan, None, None, None)
    return found


def power(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent of y = a * x ** b, by least squares on logarithms; nan where there is nothing to fit."""
    pairs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if y > _NOISE_S]
    if len(pairs) < 2:
        return math.nan
    mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)


def line(known: Sequence[Point]) -> tuple[float, float]:
    """Memory as (fixed, bytes a row), through the last two sizes."""
    a, b = known[-2:]
    slope = max(0.0, (b.grown - a.grown) / (b.rows - a.rows))
    return (b.peak or 0) - slope * b.rows, slope


def would_pass(known: Sequence[Point], rows: int, *, memory: float, seconds: float) -> bool:
    """Would the step, on so many rows, take more than it may?"""
    if len(known) < 2:
        return False
    b = max(1.0, power([p.rows for p in known[-2:]], [p.seconds for p in known[-2:]]))
    fixed, slope = line(known)
    return known[-1].seconds * (rows / known[-1].rows) ** b > seconds or fixed + slope * rows > memory


def run(sizes: Sequence[int], place: Path, *, memory: float, seconds: float) -> dict[str, list[Point]]:
    """All steps on all sizes."""
    measured: dict[str, list[Point]] = {}
    for rows in sizes:
        cache = place / str(rows)
        for step, name in STEPS.items():
            if would_pass(measured.get(name, []), rows, memory=memory, seconds=seconds):
                print(f"left out, too much for this machine: {name}, {rows:,} rows", flush=True)
                if step in _NEEDED:
                    return measured
                continue
            facts = measure(step, rows, cache)
            print(f"{rows:,} rows, {name}: {json.dumps(facts)}", file=sys.stderr, flush=True)
            for part, point in points(rows, facts, step, name).items():
                measured.setdefault(part, []).append(point)
        shutil.rmtree(cache)
    return measured


def times(measured: dict[str, list[Point]], far: Sequence[int], *, of: str) -> str:
    """Seconds by size, `of` the clock or the processor; the law, and what it says of larger sizes."""
    known_of = {
        name: [(p.rows, p.seconds if of == "clock" else p.cpu) for p in known]
        for name, known in measured.items()
    }
    whole = {name: known for name, known in known_of.items() if not math.isnan(known[0][1])}
    sizes = sorted({rows for known in whole.values() for rows, _ in known})
    lines = [[f"seconds, {of}", *(f"{n:.0e}" for n in sizes), "b", *(f"{n:.0e}" for n in far)]]
    for name, known in whole.items():
        b = power(*zip(*known[-_FITTED:], strict=True))
        least = 0.0 if name in _FLAT else 1.0
        grows = least if math.isnan(b) else max(least, b)
        (rows, last), by_rows = known[-1], dict(known)
        there = [_duration(last * (n / rows) ** grows) for n in far]
        measured_here = [f"{by_rows[n]:.2f}" if n in by_rows else "-" for n in sizes]
        lines.append([name, *measured_here, f"{b:.2f}", *there])
    return rounds.aligned(lines)


_FLAT = {STEPS["extend"]}  # always 50,000 keys


def memories(measured: dict[str, list[Point]], far: Sequence[int]) -> str:
    """Peak memory by size, its line, and what that says of larger sizes."""
    whole = {name: known for name, known in measured.items() if known[0].peak is not None}
    sizes = sorted({p.rows for known in whole.values() for p in known})
    lines = [["peak MB", *(f"{n:.0e}" for n in sizes), "b", "bytes a row", *(f"{n:.0e}" for n in far)]]
    for name, known in whole.items():
        by_rows = {p.rows: f"{(p.peak or 0) / 1e6:,.0f}" for p in known}
        b = power([p.rows for p in known[-_FITTED:]], [p.grown for p in known[-_FITTED:]])
        fixed, slope = line(known) if len(known) > 1 else (math.nan, math.nan)
        there = [f"{(fixed + slope * n) / 1e9:,.1f} GB" for n in far]
        lines.append([name, *(by_rows.get(n, "-") for n in sizes), f"{b:.2f}", f"{slope:.0f}", *there])
    return rounds.aligned(lines)


def disk(measured: dict[str, list[Point]], far: Sequence[int]) -> str:
    """Bytes on disk a row."""
    lines = [["disk", "bytes a row", *(f"{n:.0e}" for n in far)]]
    for step, what in _DISK.items():
        known = [p for p in measured.get(STEPS[step], []) if p.disk]
        if known:
            each = (known[-1].disk or 0) / known[-1].rows
            lines.append([what, f"{each:.0f}", *(f"{each * n / 1e9:,.1f} GB" for n in far)])
    return rounds.aligned(lines)


def rates(measured: dict[str, list[Point]]) -> str:
    """Rows an hour, at the largest size."""
    said = []
    for what, steps in _RATES.items():
        last = [measured[STEPS[step]][-1] for step in steps]
        hour = 3600 / sum(p.seconds / p.rows for p in last)
        said.append(f"{what} {hour / 1e6:,.0f} million")
    return "rows an hour: " + ", ".join(said)


def steep(measured: dict[str, list[Point]]) -> list[str]:
    """Names of what grows faster than its rows, by processor time where that is known."""
    found = []
    for name, known in measured.items():
        last = known[-_FITTED:]
        clock = [p.seconds if math.isnan(p.cpu) else p.cpu for p in last]
        if power([p.rows for p in last], clock) > STEEP:
            found.append(name)
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:,.1f} h"


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="the largest size")
    parser.add_argument("--memory", type=float, default=10.0, help="the most that a step may take, in GB")
    parser.add_argument("--seconds", type=float, default=600.0, help="the longest that a step may take")
    parser.add_argument("--quick", action="store_true", help="few rows: checks what comes out only")
    given = parser.parse_args()
    sizes = [1_000, 3_000] if given.quick else [n for n in SIZES if n <= given.rows]
    batches = [2, 5] if given.quick else [n for n in _BATCHES if n * BATCH <= 10 * given.rows]
    if not sizes:
        parser.error(f"--rows: at least {SIZES[0]:,}")
    rounds.DATA.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="scale-", dir=rounds.DATA))
    try:
        measured = run(sizes, place, memory=given.memory * 1e9, seconds=given.seconds)
        by_batch: dict[str, list[Point]] = {}
        for count in batches:
            facts = measure("jobs", count, place / f"batches-{count}")
            for part, point in points(count * BATCH, facts, "batches", _BATCHES_STEP).items():
                by_batch.setdefault(part, []).append(point)
    finally:
        shutil.rmtree(place)
    for table in (
        *(times(of_what, FAR, of=clock) for of_what in (measured, by_batch) for clock in ("clock", "cpu")),
        memories(measured, FAR),
        disk(measured, FAR),
    ):
        print(f"\n{table}")
    print(f"\n{rates(measured)}")
    print(f"faster than b = {STEEP}: {', '.join(steep({**measured, **by_batch})) or 'nothing'}")


if __name__ == "__main__":
    main()
