"""What `import polars_llm` costs, beside `import polars, pyarrow`.

    python benchmarks/bench_import.py [--runs N] [--quick]

Prints the ratio, what the import loads beyond those two, and which heavy modules it loads.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import rounds

FLOOR = "import polars, pyarrow"
LIBRARY = "import polars_llm"
# Needed only when something is sent or shown, or not at all.
HEAVY = (
    "anthropic",
    "asyncio",
    "diskcache",
    "genai_prices",
    "httpx2",
    "numpy",
    "openai",
    "pandas",
    "pyarrow",
    "pydantic",
    "rich",
    "sqlite3",
    "urllib3",
)


def seconds(statement: str) -> tuple[float, float]:
    """The import alone, and the whole process, in a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return float(done.stdout), time.perf_counter() - start


def modules(statement: str) -> set[str]:
    """Everything that is loaded after it."""
    code = f"import sys; {statement}; print('\\n'.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return set(done.stdout.decode().split())


def costs(statement: str) -> dict[str, float]:
    """Milliseconds that each module took, without what it imported in turn."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    done = subprocess.run(command, stderr=subprocess.PIPE, check=True)
    lines = [line.split("|") for line in done.stderr.decode().splitlines() if line.count("|") == 2]
    own = [(name.strip(), took.removeprefix("import time:").strip()) for took, _, name in lines]
    return {name: int(took) / 1000 for name, took in own if took.isdigit()}


def compare(runs: int) -> None:
    """Measure in turn, print."""
    times: dict[str, list[tuple[float, float]]] = {FLOOR: [], LIBRARY: []}
    for _ in range(runs + 1):
        for statement, done in times.items():
            done.append(seconds(statement))
    lines = [["", "runs", "ms", "min", "max", "process ms"]]
    for statement, done in times.items():
        del done[0]  # it may have compiled modules, and read them from the disk
        alone = [import_ * 1000 for import_, _ in done]
        whole = statistics.median(process for _, process in done) * 1000
        middle = statistics.median(alone)
        lines.append(
            [statement, str(runs), f"{middle:.0f}", f"{min(alone):.0f}", f"{max(alone):.0f}", f"{whole:.0f}"]
        )
    print(rounds.aligned(lines))
    ours, theirs = ([one for one, _ in times[statement]] for statement in (LIBRARY, FLOOR))
    print(f"{LIBRARY} / {FLOOR}: {rounds.ratio(ours, theirs)}, aim at most 1.3")


def explain() -> None:
    """Say what is loaded beyond Polars and pyarrow, the dearest first."""
    loaded = modules(LIBRARY)
    print("heavy modules loaded:", ", ".join(name for name in HEAVY if name in loaded) or "none")
    took = costs(LIBRARY)
    extra = {name: took.get(name, 0.0) for name in loaded - modules(FLOOR)}
    packages: dict[str, float] = {}
    for name, cost in extra.items():
        packages[name.split(".")[0]] = packages.get(name.split(".")[0], 0.0) + cost
    dearest = sorted(packages.items(), key=lambda item: -item[1])[:10]
    print(f"beyond the floor, {len(extra)} modules, {sum(extra.values()):.0f} ms:")
    print("  " + ", ".join(f"{name} {cost:.0f} ms" for name, cost in dearest))


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="one run: only that it works")
    given = parser.parse_args()
    compare(1 if given.quick else given.runs)
    explain()


if __name__ == "__main__":
    main()
