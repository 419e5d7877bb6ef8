"""The key index against a plain dictionary, and its file against harm."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.errors import CacheError
from polars_llm.store import index as key_index
from polars_llm.store.index import INDEX_SCHEMA, KeyIndex, load, save

KEY = st.sampled_from([0, 1, 2, 3, 2**64 - 1, 2**64, 2**127, 2**128 - 2, 2**128 - 1])
ENTRY = st.tuples(KEY, st.integers(0, 2), st.integers(1, 2**16 - 1))
SEGMENTS = st.lists(st.lists(ENTRY, max_size=8), max_size=12)


def entries(segment: int, rows: list[tuple[int, int, int]]) -> pl.DataFrame:
    return pl.DataFrame(
        [(*row, segment, number) for number, row in enumerate(rows)], schema=dict(INDEX_SCHEMA), orient="row"
    )


def ranks(written: list[int]) -> pl.Series:
    """`written[n]` is the number of the segment that was written as the nth."""
    return pl.Series([written.index(number) for number in range(len(written))], dtype=pl.UInt32)


def best(segments: dict[int, list[tuple[int, int, int]]], written: list[int], key: int) -> tuple[int, ...]:
    all_of_it = [
        (state, written.index(segment), row, attempt, segment)
        for segment, rows in segments.items()
        for row, (k, state, attempt) in enumerate(rows)
        if k == key
    ]
    if not all_of_it:
        return (None,) * 4  # type: ignore[return-value]
    state, _, row, _, segment = min(all_of_it)
    return state, max(attempt for *_, attempt, _ in all_of_it), segment, row


@pytest.mark.parametrize("sparse", [0, 512], ids=["searched", "joined"])
@given(parts=SEGMENTS, data=st.data())
def test_it_says_what_a_dictionary_says(
    parts: list[list[tuple[int, int, int]]], data: st.DataObject, sparse: int
) -> None:
    written = data.draw(st.permutations(range(len(parts))))
    steps = data.draw(st.lists(st.integers(0, len(parts)), max_size=3).map(sorted))
    index = KeyIndex()
    for start, stop in zip([0, *steps], [*steps, len(parts)], strict=True):
        new = [entries(number, parts[number]) for number in range(start, stop)]
        if new:
            index = index.extended(pl.concat(new), ranks(written))
    asked = data.draw(st.lists(st.none() | KEY, max_size=20))
    segments = dict(enumerate(parts))
    expected = [(None,) * 5 if k is None else (k, *best(segments, written, k)) for k in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_index, "_SPARSE", sparse)
        for each in (index, index.merged()):
            found = each.find(pl.Series(asked, dtype=pl.UInt128))
            assert found.schema == INDEX_SCHEMA
            assert found.rows() == expected


@pytest.mark.parametrize("chunks", [1, 7])
def test_few_keys_in_many(chunks: int) -> None:
    """As many as it takes to search instead of joining; between, before and behind those that are there."""
    rows = entries(0, [(1_000 + 2 * n, n % 3, 1 + n % 9) for n in range(4_097)])
    part = -(-rows.height // chunks)
    run = pl.concat([rows.slice(start, part) for start in range(0, rows.height, part)], rechunk=False)
    keys = [None, 1_000, 1_001, 999, 0, None, 9_192, 9_193]
    found = KeyIndex((run,)).find(pl.Series(keys, dtype=pl.UInt128))
    assert run.height > key_index._SPARSE * len(keys)
    assert found["row"].to_list() == [None, 0, None, None, None, None, 4_096, None]
    assert found["key"].to_list() == keys


def test_a_merged_segment_takes_over_from_those_that_are_gone() -> None:
    index = KeyIndex().extended(entries(0, [(1, 0, 1), (2, 2, 1)]), ranks([0]))
    index = index.extended(entries(1, [(1, 0, 9), (2, 2, 9)]), ranks([0, 1]))
    gone = pl.Series([2**32 - 1, 1, 0], dtype=pl.UInt32)
    index = index.extended(entries(2, [(3, 0, 1), (1, 0, 1), (2, 2, 1)]), gone)
    assert index.find(pl.Series([1, 2, 3], dtype=pl.UInt128)).drop("key").rows() == [
        (0, 9, 2, 1),
        (2, 9, 2, 2),
        (0, 1, 2, 0),
    ]


def test_many_small_extensions_make_few_runs() -> None:
    index = KeyIndex()
    for number in range(200):
        index = index.extended(entries(number, [(number, 0, 1)]), ranks(list(range(number + 1))))
        assert len(index.runs) <= 8
    assert index.find(pl.Series(range(200), dtype=pl.UInt128))["segment"].to_list() == list(range(200))


def test_a_long_index_is_loaded_in_one_piece(tmp_path: Path) -> None:
    """Every look-up would put the pieces together again, as many times as there are batches of rows."""
    rows = pl.select(
        key=pl.int_range(300_000).cast(pl.UInt128),
        state=pl.lit(0, pl.UInt8),
        attempt=pl.lit(1, pl.UInt16),
        segment=pl.lit(0, pl.UInt32),
        row=pl.int_range(300_000, dtype=pl.UInt32),
    )
    path = tmp_path / "keys.index"
    save(path, KeyIndex((rows,)), COVERED)
    loaded = load(path)
    assert loaded is not None
    (run,) = loaded[0].runs
    assert run.equals(rows)
    assert set(run.n_chunks("all")) == {1}


COVERED = [("a.parquet", "10 5"), ("ümlaut.parquet", "7 3")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "keys.index"
    parts = [entries(0, [(5, 0, 1), (2**128 - 1, 1, 2)]), entries(1, [(0, 2, 65535), (5, 0, 3)])]
    save(path, KeyIndex().extended(pl.concat(parts), ranks([0, 1])), COVERED)
    return path


ASKED = pl.Series([0, 5, 2**128 - 1, 7, None], dtype=pl.UInt128)


def test_it_comes_back_as_it_was_saved(saved: Path) -> None:
    loaded = load(saved)
    assert loaded is not None
    assert loaded[1] == COVERED
    assert loaded[0].find(ASKED).drop("key").rows() == [
        (2, 65535, 1, 0),
        (0, 3, 0, 0),
        (1, 2, 0, 1),
        (None,) * 4,
        (None,) * 4,
    ]


@given(data=st.data())
def test_no_harm_to_the_file_makes_it_lie(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sound = saved.read_bytes()
    at = data.draw(st.integers(0, len(sound) - 1))
    harmed = data.draw(
        st.sampled_from(
            [
                sound[:at],
                sound[:at] + bytes([sound[at] ^ data.draw(st.integers(1, 255))]) + sound[at + 1 :],
                sound[:at] + sound[at + 1 :],
                sound[:at] + b"\0" * 8 + sound[at:],
                sound[at:],
            ]
        )
    )
    path = tmp_path_factory.getbasetemp() / "harmed.index"
    path.write_bytes(harmed)
    loaded = load(path)
    # What it covers is compared with the directory; where things are must be right.
    assert loaded is None or loaded[0].find(ASKED).equals(load(saved)[0].find(ASKED))  # type: ignore[index]


def test_a_file_that_is_not_there_is_no_index(tmp_path: Path) -> None:
    assert load(tmp_path / "keys.index") is None
    assert load(tmp_path) is None


def test_saving_where_it_cannot_be_saved_says_so(tmp_path: Path, saved: Path) -> None:
    loaded = load(saved)
    assert loaded is not None
    with pytest.raises(CacheError):
        save(tmp_path / "missing" / "keys.index", loaded[0], [])
