"""The steps of `bench_scale.py`, each run in a process of its own: the library's own code on synthetic rows.

    python benchmarks/scale_steps.py STEP ROWS      # POLARS_LLM_CACHE_DIR says where

Prompts and answers have 64 characters. Rows come in parts of 100,000, as a lazy frame hands them to a verb.
No provider takes part: a batch that was planned counts as ended, and its result lines are written here. A
step ends the process with an error if it did not give what it must.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from data import MODEL
from rounds import Stopwatch, report

from polars_llm.backends.base import BatchStatus, Phase
from polars_llm.backends.openai import OpenAIBatch
from polars_llm.frame.asking import Asked
from polars_llm.frame.nodes import _Asking
from polars_llm.frame.sending import needs
from polars_llm.frame.verbs import Verb, generate
from polars_llm.job import Job, State
from polars_llm.jobs.claim import batches, claim
from polars_llm.jobs.evaluate import Need, _holding, _missing
from polars_llm.jobs.ingest import ingest
from polars_llm.jobs.lookup import in_flight
from polars_llm.request import custom_ids
from polars_llm.store import index

PART = 100_000
EVERY = 100
"""Where a sample is looked up, one row in so many."""

_NO_KEYS = pl.Series("key", [], pl.UInt128)


def parts(rows: int, *, mark: str = "p", every: int = 1, scattered: bool = False) -> Iterator[pl.DataFrame]:
    """The frame, part by part: distinct prompts of 64 characters."""
    # A multiple near the golden section, without a common factor with rows, visits each row once, far apart.
    leap = next(n for n in range(int(rows * 0.618), 2 * rows) if n % 2 and n % 3 and n % 5)
    for first in range(0, rows, PART * every):
        number = pl.int_range(first, min(first + PART * every, rows), every, dtype=pl.UInt64)
        number = number * leap % rows if scattered else number
        hashes = [number.hash(seed).cast(pl.String).str.zfill(20) for seed in (1, 2)]
        text = pl.concat_str(pl.lit(mark), number.cast(pl.String).str.zfill(12), *hashes, separator=" ")
        yield pl.select(text.str.pad_end(64, ".").alias("prompt"))


def verb() -> Verb:
    """What is asked."""
    return generate("prompt", model=f"openai/{MODEL}")


def _planned(rows: int) -> Need:
    """Every prompt looked up, and the requests of those without an answer, as a lazy frame gathers them."""
    asking = _Asking(verb(), 0)
    for part in parts(rows):
        asking.look(part.select(asking.inputs))
    (need,) = needs(asking.wanted())
    _must(sum(r.height for r in need.requests) == rows, "every row is a request of its own")
    return need


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"{' '.join(sys.argv)}: it does not hold that {what}")


# --- to the provider ------------------------------------------------------------------------------------


def plan(rows: int) -> dict[str, Any]:
    """Prompts -> keys -> looked up -> distinct requests."""
    watch = _Watch()
    _planned(rows)
    return watch.facts()


def pack(rows: int) -> dict[str, Any]:
    """Requests -> lines -> batches in the spool, claimed in the ledger."""
    need, asked = _planned(rows), verb()
    store = asked.store
    store.directory.prepare()
    watch = _Watch()
    with store.directory.submitter() as owner:
        draft = lambda wanted: batches(need.backend, wanted, store, owner, limited=False)  # noqa: E731
        jobs, _ = claim(need.requests, draft, store, asked.policy)
    facts = watch.facts()
    _must(sum(job.requests for job in jobs) == rows, "every request is in a batch")
    return {**facts, "disk": _size(store.directory.spool)}


def pending(rows: int) -> dict[str, Any]:
    """The same line while all of it is in flight: what is missing, and who holds it. Planning left out."""
    need, asked = _planned(rows), verb()
    watch = _Watch()
    missing = _missing(need, asked.store, asked.policy)
    _, held = _holding(need.keys, asked.store)
    facts = watch.facts()
    _must(sum(r.height for r in missing) == 0 and held.height == rows, "all requests are in flight")
    return facts


# --- back from it ---------------------------------------------------------------------------------------


class _Played(OpenAIBatch):
    """A provider that has answered everything: each answer is its key as 64 characters."""

    keys = pl.DataFrame()
    off_clock = (0.0, 0.0)

    def download(self, job: Job, status: BatchStatus, target: Path) -> None:
        """Write the result lines, off the clock."""
        watch = Stopwatch()
        parts_of_line = (
            pl.lit('{"id":"batch_req_1","custom_id":"'),
            custom_ids(pl.col("key")),
            pl.lit(
                '","response":{"status_code":200,"request_id":"r","body":{"id":"chatcmpl-1","object":'
                '"chat.completion","created":1795227726,"model":"' + MODEL + '","choices":[{"index":0,'
                '"message":{"role":"assistant","content":"'
            ),
            pl.col("key").bin.encode("hex"),
            pl.lit(
                '","refusal":null},"finish_reason":"stop"}],"usage":{"prompt_tokens":20,'
                '"completion_tokens":20,"total_tokens":40}}},"error":null}'
            ),
        )
        lines = self.keys.select(pl.concat_str(parts_of_line)).to_series().to_list()
        target.write_text("\n".join(lines) + "\n")
        watch.stop()
        self.off_clock = (self.off_clock[0] + watch.seconds, self.off_clock[1] + watch.cpu)


class _Clocked:
    """A results store that says where its time went."""

    def __init__(self, results: Any) -> None:
        self._results = results
        self.spent = {"add": 0.0, "compact": 0.0}

    def add(self, answers: pl.DataFrame) -> None:
        self._clocked("add", answers)

    def compact(self) -> None:
        self._clocked("compact")

    def _clocked(self, name: str, *arguments: Any) -> None:
        began = time.perf_counter()
        getattr(self._results, name)(*arguments)
        self.spent[name] += time.perf_counter() - began


def collect(_: int) -> dict[str, Any]:
    """Result lines -> answers -> segments, merged as they come; job by job."""
    store = verb().store
    clocked = _Clocked(store.results)
    backend = _Played(MODEL)
    ended = [dataclasses.replace(job, state=State.ENDED) for job in in_flight(store)[0]]
    for job in ended:
        store.ledger.put(job)
    watch = _Watch()
    for job in ended:
        backend.keys = store.spool.keys([job.id])
        status = BatchStatus(phase=Phase.ENDED, done=job.requests, why="completed")
        closed = ingest(job, status, backend, dataclasses.replace(store, results=clocked))
        _must((closed.state, closed.done) == (State.INGESTED, job.requests), "every request has its answer")
    facts = watch.facts(without=backend.off_clock)
    add, compact = clocked.spent["add"], clocked.spent["compact"]
    split = {"add": add, "merge": compact, "parse": facts["seconds"] - add - compact}
    segments = len(list(store.directory.results.glob("*.parquet")))
    return {**facts, "split": split, "disk": _size(store.directory.results), "segments": segments}


def jobs(count: int) -> dict[str, Any]:
    """What grows with the number of batches: so many with one request each; listed with keys, then closed."""
    store = verb().store
    store.directory.prepare()
    header = verb().header
    facts = {"provider": header.provider, "base_url": None, "endpoint": header.endpoint, "model": MODEL}
    planned = [Job.plan(**facts, requests=1) for _ in range(count)]
    store.spool.write_keys(planned[0].id, pl.DataFrame({"key": [bytes(32)], "attempt": [1]}))
    keys = next(store.directory.spool.iterdir()).read_bytes()
    for job in planned:  # not by the spool itself, which waits for the disk
        (store.directory.spool / f"{job.id}.keys.arrow").write_bytes(keys)
        store.spool.requests_path(job.id).write_bytes(b"")
    with store.ledger.transaction():
        for job in planned:
            store.ledger.put(job)
    watch = _Watch()
    held = in_flight(store)[1]
    listed = time.perf_counter()
    for job in planned:
        store.ledger.move(job, State.RELEASED)
    moved = time.perf_counter()
    for job in planned:
        store.spool.remove(job.id)
    removed = time.perf_counter()
    whole = watch.facts()
    gone = not list(store.directory.spool.iterdir())
    _must(held.height == count and gone, "all jobs are listed, then gone")
    list_s = whole["seconds"] - (removed - listed)
    return {**whole, "split": {"list": list_s, "move": moved - listed, "remove": removed - moved}}


# --- the index ------------------------------------------------------------------------------------------


def rebuild(_: int) -> dict[str, Any]:
    """The key index from the segments alone, and written."""
    store = verb().store
    path = store.directory.results / "keys.index"
    path.unlink(missing_ok=True)
    watch = _Watch()
    store.results.find(_NO_KEYS)
    facts = watch.facts()
    return {**facts, "disk": path.stat().st_size if path.exists() else None}


def load(_: int) -> dict[str, Any]:
    """The key index from its file, as the first look of a process does it."""
    store = verb().store
    watch = _Watch()
    store.results.find(_NO_KEYS)
    return watch.facts()


def save(_: int) -> dict[str, Any]:
    """The key index to its file."""
    held, covered, path = _loaded()
    watch = _Watch()
    index.save(path.with_suffix(".copy"), held, covered)
    facts = watch.facts()
    path.with_suffix(".copy").unlink()
    return facts


def extend(rows: int) -> dict[str, Any]:
    """The key index with the 50,000 answers of one more batch."""
    held, covered, _ = _loaded()
    new = min(rows, 50_000)
    hashes = pl.int_range(new, dtype=pl.UInt64).hash(7)
    entries = pl.select(
        key=hashes.cast(pl.UInt128) * 2**64 + hashes,
        state=pl.lit(0, pl.UInt8),
        attempt=pl.lit(1, pl.UInt16),
        segment=pl.lit(len(covered), pl.UInt32),
        row=pl.int_range(new, dtype=pl.UInt32),
    )
    ranks = pl.Series(range(len(covered) + 1), dtype=pl.UInt32)
    watch = _Watch()
    longer = held.extended(entries, ranks)
    facts = watch.facts()
    _must(longer.height == rows + new, "the index has all keys")
    return facts


def _loaded() -> tuple[index.KeyIndex, list[tuple[str, str]], Path]:
    path = verb().store.directory.results / "keys.index"
    if not path.exists():  # too few rows for one
        store = verb().store
        store.results.find(_NO_KEYS)
        view = store.results._view
        index.save(path, view.index, [(name, "") for name in store.results._names])
    loaded = index.load(path)
    assert loaded is not None
    return *loaded, path


# --- looking up and reading -----------------------------------------------------------------------------


def find_known(rows: int) -> dict[str, Any]:
    """All keys looked up, all of them known."""
    return _found(parts(rows), expected=rows)


def find_unknown(rows: int) -> dict[str, Any]:
    """As many keys looked up, none of them known."""
    return _found(parts(rows, mark="q"), expected=0)


def find_sample(rows: int) -> dict[str, Any]:
    """One key in a hundred looked up, all known."""
    return _found(parts(rows, every=EVERY), expected=-(-rows // EVERY))


def _found(frame: Iterator[pl.DataFrame], *, expected: int) -> dict[str, Any]:
    asked = verb()
    asked.store.results.find(_NO_KEYS)
    found, looked_up = 0, [0.0, 0.0]
    for keys in (asked.keys(_Asking(asked, 0).rows(_inputs(asked, part))) for part in frame):
        part_watch = Stopwatch()
        states = asked.store.results.find(keys)["state"]
        part_watch.stop()
        looked_up = [looked_up[0] + part_watch.seconds, looked_up[1] + part_watch.cpu]
        found += states.count()
    _must(found == expected, f"{expected:,} keys are known, not {found:,}")
    return {"seconds": looked_up[0], "cpu": looked_up[1]}


def _inputs(asked: Verb, part: pl.DataFrame) -> pl.DataFrame:
    return part.select(_Asking(asked, 0).inputs)


def again(rows: int) -> dict[str, Any]:
    """The same line when all is answered: keys, look-up, answers on their rows, in stored order."""
    return _read_again(parts(rows), expected=rows)


def scattered(rows: int) -> dict[str, Any]:
    """The same with the rows in an order far from the stored one."""
    return _read_again(parts(rows, scattered=True), expected=rows)


def sample(rows: int) -> dict[str, Any]:
    """The same for one row in a hundred."""
    return _read_again(parts(rows, every=EVERY), expected=-(-rows // EVERY))


def _read_again(frame: Iterator[pl.DataFrame], *, expected: int) -> dict[str, Any]:
    asked, right, read = verb(), 0, 0.0
    asking = _Asking(asked, 0)
    asked.store.results.find(_NO_KEYS)
    watch = _Watch()
    for part in frame:
        look = asking.look(part.select(asking.inputs))
        began = time.perf_counter()
        answers = asked.lay(look.found, look.rows, None)
        read += time.perf_counter() - began
        right += _right(look, answers)
    facts = watch.facts()
    _must(right == expected, f"every row has its own answer: {right:,} have")
    return {**facts, "split": {"read": read, "look up": facts["seconds"] - read}}


def _right(look: Asked, answers: pl.Series) -> int:
    # An answer is its key in hex, and a key that is looked up is the first half of it.
    half = answers.str.slice(0, 32).str.to_integer(base=16, dtype=pl.UInt128)
    return int((half == look._keys).sum())


# --- one process ----------------------------------------------------------------------------------------


class _Watch:
    """Times the part of a step that counts; `without` is time of it that does not."""

    def __init__(self) -> None:
        self._watch = Stopwatch()

    def facts(self, *, without: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
        self._watch.stop()
        return {"seconds": self._watch.seconds - without[0], "cpu": self._watch.cpu - without[1]}


def _resident() -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmRSS"))


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def main(arguments: Sequence[str]) -> None:
    """One step."""
    step, rows = arguments
    empty = _resident()
    report(Stopwatch(), **globals()[step](int(rows)), empty=empty)


if __name__ == "__main__":
    main(sys.argv[1:])
