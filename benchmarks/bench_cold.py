"""Cold submit: nothing was asked before; from a frame of distinct prompts to accepted batches.

    python benchmarks/bench_cold.py [--rows N] [--runs N] [--rival-rows N] [--no-rival] [--quick]

Prints the library beside its floor (`floor.py`) and beside llm-batch-py, with ratios. All of them
talk to a local provider, which accepts batches and does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import data
import rivals
import rounds
from rounds import Contestant

from polars_llm.testing import Provider, provider


class Watch:
    """What reached the provider since the last look."""

    def __init__(self, server: Provider) -> None:
        self._server = server
        self._seen: set[str] = set()

    def uploaded(self) -> Mapping[str, Any]:
        """Digest of the request lines of new batches, and how many batches there were."""
        new = [batch for batch in self._server.batches() if batch["id"] not in self._seen]
        self._seen.update(batch["id"] for batch in new)
        files = [batch["input_file_id"] for batch in new]
        digest = data.digest_of_files(self._server, files)
        return {"digest": digest, "batches": len(new)}


def fresh(place: Path, server: Provider) -> Callable[[], Mapping[str, str]]:
    """Before each run: an empty directory, under the one name that the command knows."""

    def before() -> Mapping[str, str]:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        return {**server.env, "POLARS_LLM_CACHE_DIR": str(place)}

    return before


def ours(rows: int, runs: int, place: Path, server: Provider, watch: Watch) -> list[Contestant]:
    """The floor and the library."""
    source = place / "input.parquet"
    data.write_input(rows, source)
    head = data.key_head(server.openai_base_url)
    floor = [str(rounds.HERE / "floor.py"), "cold", str(source), str(place / "floor"), head]
    library = [str(rounds.HERE / "library.py"), "cold", str(source)]
    return [
        Contestant(
            name=name,
            rows=rows,
            command=[sys.executable, *command],
            runs=runs,
            before=fresh(place / name, server),
            after=watch.uploaded,
        )
        for name, command in (("floor", floor), ("polars_llm", library))
    ]


def cold(rows: int, runs: int, rival_rows: int) -> None:
    """Measure, compare the outputs, print."""
    rounds.DATA.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="cold-", dir=rounds.DATA))
    try:
        with provider(set_env=False, auto=False) as server:
            watch = Watch(server)
            contestants = ours(rows, runs, place, server, watch)
            rival = rivals.cold(rival_rows, min(runs, 2), place / "rival", server) if rival_rows else []
            rival = [dataclasses.replace(one, after=watch.uploaded) for one in rival]
            runs_of = rounds.race([*contestants, *rival])
    finally:
        shutil.rmtree(place)
    print(f"Cold submit, prompts of {data.CHARACTERS} characters, to accepted batches")
    print(rounds.standings([*contestants, *rival], runs_of))
    rounds.same_digest(runs_of, ["floor", "polars_llm"])
    print(rounds.against_floor(runs_of))
    for one in rival:
        theirs = [run.seconds / one.rows for run in runs_of[one.name]]
        here = [run.seconds / rows for run in runs_of["polars_llm"]]
        print(f"{one.name} / polars_llm, a row: {rounds.ratio(theirs, here)}")
        for note in {str(run.facts.get("note") or "") for run in runs_of[one.name]} - {""}:
            print(f"  {note}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rival-rows", type=int, default=20_000)
    parser.add_argument("--no-rival", action="store_true", help="only the floor")
    parser.add_argument("--quick", action="store_true", help="few rows, no rival: compares the outputs only")
    given = parser.parse_args()
    if given.quick:
        cold(2_000, 1, 0)
    else:
        cold(given.rows, given.runs, 0 if given.no_rival else given.rival_rows)


if __name__ == "__main__":
    main()
