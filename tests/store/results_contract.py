"""What every ResultStore does. Subclass `ResultStoreContract`, say how to open one, and run it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from polars_llm.answer import ANSWER_SCHEMA, DONE, FAILED, RETRY
from polars_llm.store.results import ResultStore


def key(number: int) -> bytes:
    """A key; as random as real ones."""
    return hashlib.blake2b(str(number).encode(), digest_size=32).digest()


def prefix(number: int) -> int:
    """What `find` is asked for `key(number)`."""
    return int.from_bytes(key(number)[:16], "big")


def keys(numbers: Iterable[int | None]) -> pl.Series:
    """The same as a Series."""
    return pl.Series([None if n is None else prefix(n) for n in numbers], dtype=pl.UInt128)


def answers(numbers: Sequence[int], **columns: Any) -> pl.DataFrame:
    """Answers to those keys: done at the first attempt, with no other facts than those given.

    A value that is not a list holds for all rows.
    """
    given = {"key": [key(n) for n in numbers], "state": DONE, "attempt": 1, **columns}
    height = len(numbers)
    return pl.DataFrame(
        {
            name: pl.Series(
                value if isinstance(value := given.get(name), list) else [value] * height, dtype=dtype
            )
            for name, dtype in ANSWER_SCHEMA.items()
        }
    )


class ResultStoreContract:
    """Behaviour, told by `open` alone."""

    def open(self, path: Path) -> ResultStore:
        """A store over what is kept at `path`; several may be open at once."""
        raise NotImplementedError

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "results"

    @pytest.fixture
    def store(self, path: Path) -> ResultStore:
        return self.open(path)

    def read(self, store: ResultStore, numbers: Iterable[int | None], column: str = "text") -> list[Any]:
        return store.read(store.find(keys(numbers)), [column])[column].to_list()

    # --- nothing there ---------------------------------------------------------------------------------

    def test_an_empty_store_knows_nothing(self, store: ResultStore) -> None:
        found = store.find(keys([1, None, 1]))
        assert found.schema == {
            "key": pl.UInt128,
            "state": pl.UInt8,
            "attempt": pl.UInt16,
            "segment": pl.UInt32,
            "row": pl.UInt32,
        }
        assert found["key"].to_list() == [prefix(1), None, prefix(1)]
        assert found.drop("key").null_count().row(0) == (3, 3, 3, 3)
        assert store.read(found, ["text"])["text"].to_list() == [None, None, None]
        assert_frame_equal(store.scan().collect(), pl.DataFrame(schema=ANSWER_SCHEMA))
        store.compact()

    def test_asking_for_nothing_gives_nothing(self, store: ResultStore) -> None:
        store.add(answers([1]))
        found = store.find(keys([]))
        assert found.height == 0
        assert store.read(found, ["text", "vector"]).schema == {
            "text": pl.String,
            "vector": pl.List(pl.Float32),
        }

    def test_adding_no_answers_changes_nothing(self, store: ResultStore) -> None:
        store.add(answers([]))
        assert store.scan().collect().is_empty()

    # --- what was added is found -------------------------------------------------------------------------

    def test_answers_come_in_the_order_that_is_asked_for(self, store: ResultStore) -> None:
        store.add(answers([1, 2, 3], text=["one", "two", "three"]))
        store.add(answers([4, 5], text=["four", "five"]))
        assert self.read(store, [1, 2, 3, 4, 5]) == ["one", "two", "three", "four", "five"]
        assert self.read(store, [5, 2, None, 9, 2, 1, 4]) == ["five", "two", None, None, "two", "one", "four"]
        assert self.read(store, [2, 3]) == ["two", "three"]
        assert self.read(store, [9]) == [None]

    def test_every_column_comes_back_as_it_was(self, store: ResultStore) -> None:
        whole = answers(
            [1, 2],
            state=[DONE, FAILED],
            attempt=[1, 65535],
            text=["naïve \u2028 \0 🦀", ""],
            error=[None, "invalid_request"],
            error_message=[None, "no"],
            finish_reason=["stop", None],
            input_tokens=[2**40, None],
            cached_input_tokens=[0, None],
            output_tokens=[7, 0],
            cost_usd=[1e-9, None],
            provider="openai",
            model=["m", None],
            job_id="j",
            received_at=datetime(2026, 11, 21, 4, 3, 2, 123456, tzinfo=UTC),
            vector=[[0.1, -0.0, None], []],
            body=[b'{"a": "\xff\x00"}', b""],
        )
        store.add(whole)
        found = store.find(keys([2, 1]))
        assert_frame_equal(store.read(found, list(ANSWER_SCHEMA)), whole.reverse())
        assert_frame_equal(store.read(found, ["body", "text"]), whole.reverse().select("body", "text"))

    def test_another_store_object_sees_what_add_returned_from(self, path: Path, store: ResultStore) -> None:
        other = self.open(path)
        for number in range(5):
            store.add(answers([number], text=str(number)))
            assert self.read(other, [number]) == [str(number)]
            assert self.read(self.open(path), range(number + 1)) == [str(n) for n in range(number + 1)]

    def test_one_store_serves_many_threads(self, path: Path, store: ResultStore) -> None:
        def work(thread: int) -> None:
            for number in range(thread, 80, 8):
                store.add(answers([number], text=str(number)))
                assert self.read(store, [number, thread]) == [str(number), str(thread)]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert self.read(self.open(path), range(80)) == [str(n) for n in range(80)]

    @pytest.mark.parametrize("step", [1, 2, 3, 40, 25_000])
    def test_a_part_of_many_rows(self, store: ResultStore, step: int) -> None:
        numbers = list(range(60_000))
        store.add(answers(numbers, text=[str(n) for n in numbers]))
        store.add(answers([-1, -2], text=["a", "b"]))
        some = [*numbers[100::step], -2]
        assert self.read(store, some) == [*(str(n) for n in some[:-1]), "b"]
        assert self.read(store, [*some[::-1], *some]) == [
            *("b" if n < 0 else str(n) for n in some[::-1]),
            *("b" if n < 0 else str(n) for n in some),
        ]

    # --- of several answers, one counts --------------------------------------------------------------

    @pytest.mark.parametrize(
        ("states", "winner"),
        [
            ((DONE, DONE), 0),
            ((FAILED, DONE), 1),
            ((RETRY, FAILED, DONE, DONE), 2),
            ((RETRY, RETRY), 0),
            ((FAILED, RETRY), 0),
            ((DONE, RETRY, FAILED), 0),
            ((RETRY, FAILED, FAILED), 1),
        ],
    )
    @pytest.mark.parametrize("at_once", [True, False], ids=["in one add", "one by one"])
    def test_the_best_state_counts_then_the_first(
        self, path: Path, store: ResultStore, states: tuple[int, ...], winner: int, at_once: bool
    ) -> None:
        texts = [f"answer {n}" for n in range(len(states))]
        if at_once:
            store.add(answers([7] * len(states), state=list(states), text=texts))
        for state, text in zip(states, texts, strict=True):
            if not at_once:
                store.add(answers([7], state=state, text=text))
                store.find(keys([7]))  # so that it is settled step by step, too
        for each in (store, self.open(path)):
            assert each.find(keys([7]))["state"].to_list() == [min(states)]
            assert self.read(each, [7]) == [texts[winner]]
            assert each.scan().collect()["text"].to_list() == [texts[winner]]

    def test_attempts_are_counted_over_all_answers(self, path: Path, store: ResultStore) -> None:
        store.add(answers([1, 2], state=RETRY, attempt=[1, 1]))
        store.add(answers([1], state=DONE, attempt=2))
        store.add(answers([1, 2], state=RETRY, attempt=[5, 2]))
        for each in (store, self.open(path)):
            found = each.find(keys([1, 2]))
            assert found["attempt"].to_list() == [5, 2]
            assert self.read(each, [1, 2], "attempt") == [2, 1]

    # --- reading what find gave ----------------------------------------------------------------------

    def test_what_the_caller_blanked_out_stays_blank(self, store: ResultStore) -> None:
        store.add(answers([1, 2, 3], text=["one", "two", "three"]))
        found = store.find(keys([3, 1, 2])).with_columns(
            pl.when(pl.Series([True, False, True])).then(pl.col(name)).alias(name)
            for name in ("state", "segment", "row")
        )
        assert store.read(found, ["text"])["text"].to_list() == ["three", None, "two"]
        assert store.read(found.filter(pl.col("state").is_not_null()), ["text"])["text"].to_list() == [
            "three",
            "two",
        ]

    def test_what_was_found_is_read_also_after_a_merge(self, path: Path, store: ResultStore) -> None:
        for number in range(50):
            store.add(answers([number], text=str(number)))
        found = store.find(keys([*range(50), None, 99]))
        self.open(path).compact()
        assert store.read(found, ["text"])["text"].to_list() == [*(str(n) for n in range(50)), None, None]

    def test_what_another_object_found_is_read_right(self, path: Path, store: ResultStore) -> None:
        store.add(answers([1], text="one"))
        store.find(keys([1]))
        store.add(answers([2], text="two"))
        other = self.open(path)
        other.add(answers([3], text="three"))
        for finder, reader in ((store, other), (other, store)):
            found = finder.find(keys([3, 2, 1]))
            assert reader.read(found, ["text"])["text"].to_list() == ["three", "two", "one"]

    # --- everything --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("engine", ["in-memory", "streaming"])
    def test_scan_gives_each_key_once_in_written_order(self, store: ResultStore, engine: Any) -> None:
        store.add(answers([3, 1, 2], state=[DONE, RETRY, FAILED], text=["c", "x", "y"]))
        store.add(answers([1, 4], text=["a", "d"], output_tokens=[10, 20]))
        lazy = store.scan()
        assert lazy.collect_schema() == ANSWER_SCHEMA
        assert lazy.select("text").collect(engine=engine)["text"].to_list() == ["c", "y", "a", "d"]
        assert lazy.filter(pl.col("output_tokens") > 5).select("text").collect(engine=engine).rows() == [
            ("a",),
            ("d",),
        ]
        assert lazy.head(2).select("key").collect(engine=engine)["key"].to_list() == [key(3), key(2)]
        assert lazy.select(pl.len()).collect(engine=engine).item() == 4
        store.add(answers([5], text="e"))
        assert lazy.tail(1).collect(engine=engine)["text"].to_list() == ["e"]

    def test_compacting_changes_nothing_that_is_seen(self, path: Path, store: ResultStore) -> None:
        for round_ in range(40):
            store.add(
                answers(
                    [round_, round_ % 7, -round_],
                    state=[round_ % 3, RETRY, DONE],
                    attempt=round_ + 1,
                    text=[f"{round_} {n}" for n in range(3)],
                )
            )
        asked = keys(range(-40, 50))
        seen = ["key", "state", "attempt"]
        before = store.find(asked).select(seen), store.scan().collect()
        store.compact()
        for each in (store, self.open(path)):
            assert_frame_equal(each.find(asked).select(seen), before[0])
            assert_frame_equal(each.scan().collect(), before[1])

    # --- what is refused ---------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        "wrong",
        [
            answers([1]).drop("body"),
            answers([1]).with_columns(more=pl.lit(1)),
            answers([1]).with_columns(pl.col("state").cast(pl.Int64)),
            answers([1]).select(reversed(list(ANSWER_SCHEMA))),
            answers([1], key=[b"too short"]),
            answers([1], key=[None]),
            answers([1], state=[None]),
            answers([1], state=RETRY + 1),
            answers([1], attempt=[None]),
            answers([1], attempt=0),
        ],
        ids=[
            "column missing",
            "column too many",
            "dtype",
            "order",
            "short key",
            "no key",
            "no state",
            "unknown state",
            "no attempt",
            "attempt 0",
        ],
    )
    def test_what_are_no_answers_is_refused(self, store: ResultStore, wrong: pl.DataFrame) -> None:
        with pytest.raises(ValueError, match="answer"):
            store.add(wrong)
        assert store.scan().collect().is_empty()

    def test_keys_of_another_type_are_refused(self, store: ResultStore) -> None:
        with pytest.raises(TypeError, match="UInt128"):
            store.find(pl.Series([key(1)]))

    def test_columns_that_answers_do_not_have_are_refused(self, store: ResultStore) -> None:
        store.add(answers([1]))
        with pytest.raises(ValueError, match="nonsense"):
            store.read(store.find(keys([1])), ["text", "nonsense"])
