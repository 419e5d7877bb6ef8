"""Warm re-evaluation: every row was answered before; a fresh process asks again.

    python benchmarks/bench_warm.py [--rows N] [--runs N] [--rival-rows N] [--no-rival] [--quick]

Prints the library beside its floor (`floor.py`) and beside llm-batch-py, with ratios.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import data
import rivals
import rounds
from rounds import Contestant


def ours(rows: int, runs: int, place: Path, *, tag: str = "") -> list[Contestant]:
    """The floor and the library on one cache, which is filled here."""
    place.mkdir()
    source, cache = place / "input.parquet", place / "cache"
    data.fill_cache(cache, data.write_input(rows, source))
    env = {"POLARS_LLM_CACHE_DIR": str(cache), "OPENAI_BASE_URL": ""}

    def here() -> Mapping[str, str]:
        return env

    floor = [str(rounds.HERE / "floor.py"), "warm", str(source), str(cache / "results"), data.key_head()]
    library = [str(rounds.HERE / "library.py"), "warm", str(source)]
    return [
        Contestant(name=name + tag, rows=rows, command=[sys.executable, *command], runs=runs, before=here)
        for name, command in (("floor", floor), ("polars_llm", library))
    ]


def warm(rows: int, runs: int, rival_rows: int) -> None:
    """Measure, compare the outputs, print."""
    rounds.DATA.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="warm-", dir=rounds.DATA))
    try:
        contestants = ours(rows, runs, place / "full")
        small: Sequence[Contestant] = []
        if rival_rows:
            small = [*ours(rival_rows, runs, place / "small", tag=f" on {rival_rows:,}")][1:]
            small += rivals.warm(rival_rows, min(runs, 3), place / "rival")
        runs_of = rounds.race([*contestants, *small])
    finally:
        shutil.rmtree(place)
    print(f"Warm re-evaluation, texts of {data.CHARACTERS} characters")
    print(rounds.standings([*contestants, *small], runs_of))
    rounds.same_digest(runs_of, ["floor", "polars_llm"])
    print(rounds.against_floor(runs_of))
    for rival in small[1:]:
        _compare(rival, runs_of, rows, small[0])


def _compare(
    rival: Contestant, runs: Mapping[str, Sequence[rounds.Run]], rows: int, small: Contestant
) -> None:
    theirs = [run.seconds / rival.rows for run in runs[rival.name]]
    ours_large = [run.seconds / rows for run in runs["polars_llm"]]
    ours_small = [run.seconds / small.rows for run in runs[small.name]]
    print(f"{rival.name} / polars_llm, a row: {rounds.ratio(theirs, ours_large)}, aim at least 100")
    print(f"  both on {rival.rows:,} rows: {rounds.ratio(theirs, ours_small)}")
    for note in {str(run.facts.get("note") or "") for run in runs[rival.name]} - {""}:
        print(f"  {note}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rival-rows", type=int, default=20_000)
    parser.add_argument("--no-rival", action="store_true", help="only the floor")
    parser.add_argument("--quick", action="store_true", help="few rows, no rival: compares the outputs only")
    given = parser.parse_args()
    if given.quick:
        warm(2_000, 1, 0)
    else:
        warm(given.rows, given.runs, 0 if given.no_rival else given.rival_rows)


if __name__ == "__main__":
    main()
