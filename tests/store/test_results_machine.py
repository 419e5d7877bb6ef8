"""ParquetResults against a list in memory, through any order of events and several objects at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polars_llm.answer import DONE, RETRY
from polars_llm.errors import CacheCorrupt
from polars_llm.store import results
from polars_llm.store.results import ParquetResults
from tests.store.results_contract import answers, key, keys

NUMBER = st.integers(0, 12)
STORE = st.integers(0, 1)
ANSWER = st.tuples(NUMBER, st.integers(DONE, RETRY), st.integers(1, 5))


class ResultsMachine(RuleBasedStateMachine):
    """The oracle keeps every answer in written order, and knows nothing of segments or an index."""

    @initialize()
    def begin(self) -> None:
        self.path = Path(tempfile.mkdtemp()) / "results"
        self.stores = [ParquetResults(self.path), ParquetResults(self.path)]
        self.written: list[tuple[int, int, int, str]] = []
        self.found: list[tuple[list[int | None], pl.DataFrame, list[str | None]]] = []

    def teardown(self) -> None:
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def best(self, number: int | None) -> tuple[int | None, int | None, str | None]:
        of_it = [row for row in self.written if row[0] == number]
        if not of_it:
            return None, None, None
        winner = min(of_it, key=lambda row: row[1])  # the first of them
        return winner[1], max(row[2] for row in of_it), winner[3]

    @rule(store=STORE, rows=st.lists(ANSWER, max_size=6), times=st.integers(1, 6))
    def add(self, store: int, rows: list[tuple[int, int, int]], times: int) -> None:
        for _ in range(times):
            texts = [str(len(self.written) + n) for n in range(len(rows))]
            numbers, states, attempts = (
                (list(column) for column in zip(*rows, strict=True)) if rows else ([],) * 3
            )
            self.stores[store].add(answers(numbers, state=states, attempt=attempts, text=texts))
            self.written += [(*row, text) for row, text in zip(rows, texts, strict=True)]

    @rule(store=STORE, asked=st.lists(st.none() | NUMBER, max_size=30))
    def find_and_read(self, store: int, asked: list[int | None]) -> None:
        found = self.stores[store].find(keys(asked))
        expected = [self.best(number) for number in asked]
        assert found["key"].equals(keys(asked))
        assert found["state"].to_list() == [state for state, _, _ in expected]
        assert found["attempt"].to_list() == [attempt for _, attempt, _ in expected]
        read = self.stores[store].read(found, ["text", "key"])
        assert read["text"].to_list() == [text for _, _, text in expected]
        assert read["key"].to_list() == [
            None if text is None else key(number)  # type: ignore[arg-type]
            for number, (_, _, text) in zip(asked, expected, strict=True)
        ]
        self.found.append((asked, found, read["text"].to_list()))

    @rule(store=STORE, order=st.randoms())
    def read_what_was_found_before(self, store: int, order: Any) -> None:
        if not self.found:
            return
        asked, found, texts = order.choice(self.found)
        rows = list(range(len(asked)))
        order.shuffle(rows)
        now = self.stores[store].read(found[rows], ["text"])["text"].to_list()
        # An answer that came since may count instead, where the old place is not there any more.
        for row, text in zip(rows, now, strict=True):
            assert text in {texts[row], self.best(asked[row])[2] if texts[row] is not None else None}

    @rule(store=STORE)
    def scan(self, store: int) -> None:
        rows = self.stores[store].scan().select("key", "state", "text").collect().rows()
        best = {number: self.best(number) for number, *_ in self.written}
        expected = [(key(n), state, text) for n, (state, _, text) in best.items()]
        assert rows == sorted(expected, key=lambda row: int(row[2] or 0))

    @rule(store=STORE)
    def compact(self, store: int) -> None:
        self.stores[store].compact()

    @rule(store=STORE)
    def merge_dies_before_it_removes(self, store: int) -> None:
        old = {file: file.read_bytes() for file in self.path.glob("*.parquet")}
        self.stores[store].compact()
        for file, data in old.items():
            file.write_bytes(data)

    @rule(store=STORE)
    def open_again(self, store: int) -> None:
        self.stores[store] = ParquetResults(self.path)

    @rule(cut=st.integers(0, 400))
    def write_dies(self, cut: int) -> None:
        self.path.mkdir(exist_ok=True)
        for file in sorted(self.path.glob("*.parquet"))[:1]:
            (self.path / f".{file.name}.{cut}.tmp").write_bytes(file.read_bytes()[:cut])

    @rule(harm=st.sampled_from(["gone", "cut", "flipped", "noise"]))
    def index_is_harmed(self, harm: str) -> None:
        for file in self.path.glob("*.index"):
            data = file.read_bytes()
            if harm == "gone":
                file.unlink()
            else:
                half = len(data) // 2
                flipped = data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :]
                file.write_bytes({"cut": data[:half], "flipped": flipped, "noise": os.urandom(99)}[harm])

    @rule(store=STORE, which=st.integers(0, 50))
    def segment_is_damaged_and_mended(self, store: int, which: int) -> None:
        there = sorted(self.path.glob("*.parquet"))
        if not there:
            return
        victim = there[which % len(there)]
        data = victim.read_bytes()
        victim.write_bytes(data[: len(data) // 2])
        with pytest.raises(CacheCorrupt):
            ParquetResults(self.path).find(keys([1]))
        self.stores[store].compact()
        victim.write_bytes(data)

    @invariant()
    def one_segment_at_least_holds_each_answer(self) -> None:
        if not hasattr(self, "path") or not self.written:
            return
        plain = pl.read_parquet(self.path / "*.parquet", columns=["text"])["text"]
        assert set(plain) == {text for *_, text in self.written}


@pytest.fixture(autouse=True)
def eager_index(monkeypatch: pytest.MonkeyPatch) -> None:
    # The index file is for large stores; here it shall play along from the first rows on.
    monkeypatch.setattr(results, "_UNSAVED_ROWS", 3)


TestResultsMachine = ResultsMachine.TestCase
TestResultsMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
