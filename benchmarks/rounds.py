"""Fresh processes, run in turn: A B C A B C, never A A B B, so that a noisy machine is noisy for all.

Both ends of one run are here: `report`, which a contestant's process calls at its end, and `race`,
which starts the processes and gathers what they reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DATA = HERE / ".data"


class Stopwatch:
    """Runs from its making until `stop`: wall-clock time, and processor time of all threads.

    Processor time is the steadier of the two on a machine that others use as well.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()
        self.seconds = self.cpu = 0.0

    def stop(self) -> None:
        """Take the time."""
        wall, cpu = self._start
        self.seconds, self.cpu = time.perf_counter() - wall, time.process_time() - cpu


def report(watch: Stopwatch, **facts: Any) -> None:
    """Say how long the measured part took, and how much memory the process ever had."""
    known = {"seconds": watch.seconds, "cpu": watch.cpu, "peak_bytes": _peak_bytes()}
    print(json.dumps({**known, **facts}))


def _peak_bytes() -> int | None:
    with contextlib.suppress(OSError):
        # Not getrusage: on Linux a process starts with the peak of the one that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One fresh process.

    Attributes
    ----------
    seconds
        The measured part: data in memory and modules imported, to the result.
    cpu
        Processor time of that part.
    process
        The whole process, interpreter start and imports included.
    """

    seconds: float
    cpu: float
    process: float
    peak_bytes: int | None
    facts: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of what came out."""
        return str(self.facts["digest"])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """Something that is measured.

    Parameters
    ----------
    rows
        How many rows it works on.
    command
        What is run each time.
    runs
        How often; the slow ones run less often than there are rounds.
    before
        Called before each run, outside the measurement; gives environment variables.
    after
        Called after each run, outside the measurement; gives more facts.
    """

    name: str
    rows: int
    command: Sequence[str]
    runs: int
    before: Callable[[], Mapping[str, str]] = dict
    after: Callable[[], Mapping[str, Any]] = dict

    def run(self) -> Run:
        """One fresh process."""
        env = {**os.environ, **self.before()}
        start = time.perf_counter()
        done = subprocess.run(self.command, env=env, stdout=subprocess.PIPE, check=False)
        process = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(f"{self.name} failed: {' '.join(self.command)}")
        facts = json.loads(done.stdout.decode().splitlines()[-1])
        own = {name: facts.pop(name) for name in ("seconds", "cpu", "peak_bytes")}
        return Run(process=process, facts={**facts, **self.after()}, **own)


def race(contestants: Sequence[Contestant]) -> dict[str, list[Run]]:
    """All runs of all contestants, in rounds."""
    runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
    rounds = max(c.runs for c in contestants)
    for number in range(rounds):
        for contestant in contestants:
            if number < contestant.runs:
                _show(f"round {number + 1} of {rounds}: {contestant.name}")
                runs[contestant.name].append(contestant.run())
    _show("")
    return runs


def _show(progress: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{progress:<60}\r", end="", file=sys.stderr, flush=True)


def standings(contestants: Sequence[Contestant], runs: Mapping[str, Sequence[Run]]) -> str:
    """A table: medians, and the fastest and slowest run."""
    lines = [["", "rows", "runs", "seconds", "min", "max", "us a row", "cpu", "process", "peak MB"]]
    for contestant in contestants:
        done = runs[contestant.name]
        times = [run.seconds for run in done]
        peaks = [run.peak_bytes for run in done if run.peak_bytes is not None]
        middle = statistics.median(times)
        lines.append(
            [
                contestant.name,
                f"{contestant.rows:,}",
                str(len(done)),
                f"{middle:.2f}",
                f"{min(times):.2f}",
                f"{max(times):.2f}",
                f"{middle / contestant.rows * 1e6:,.2f}",
                f"{statistics.median(run.cpu for run in done):.2f}",
                f"{statistics.median(run.process for run in done):.2f}",
                f"{statistics.median(peaks) / 1e6:,.0f}" if peaks else "?",
            ]
        )
    return aligned(lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def against_floor(runs: Mapping[str, Sequence[Run]]) -> str:
    """How the library compares with its floor: what the aim is about, and two more views of it."""
    ours, floor = runs["polars_llm"], runs["floor"]
    seconds = ratio([run.seconds for run in ours], [run.seconds for run in floor])
    cpu = ratio([run.cpu for run in ours], [run.cpu for run in floor])
    process = ratio([run.process for run in ours], [run.process for run in floor])
    return (
        f"polars_llm / floor: {seconds}, aim at most 1.5\n"
        f"  processor time: {cpu}\n  whole processes: {process}"
    )


def ratio(slow: Sequence[float], fast: Sequence[float]) -> str:
    """Ratio of the medians; behind it, the lowest and highest of the ratios round by round."""
    middle = statistics.median(slow) / statistics.median(fast)
    each = [a / b for a, b in zip(slow, fast, strict=False)]
    return f"{middle:.2f} (rounds {min(each):.2f} to {max(each):.2f})"


def same_digest(runs: Mapping[str, Sequence[Run]], names: Sequence[str]) -> None:
    """Stop if two contestants did not produce the same thing."""
    digests = {name: {run.digest for run in runs[name]} for name in names}
    if len(set().union(*digests.values())) != 1:
        raise SystemExit(f"the outputs differ: {digests}")
    print(f"digests equal: {' and '.join(names)} gave the same output in every run")
