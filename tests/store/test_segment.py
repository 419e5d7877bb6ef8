"""Which segments are merged, and what one that is asked for the wrong rows does."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.store.segment import Moved, due, merge, replaced, take, unfinished, write
from tests.store.results_contract import answers, keys

KIB = 1024
MIB = 1024 * KIB


def named(*sizes: int) -> dict[str, int]:
    return {f"{order:020d}-00000000.parquet": size for order, size in enumerate(sizes)}


def merged(sizes: dict[str, int]) -> list[int]:
    """Their orders."""
    return [int(name.split("-")[0]) for name in due(sizes)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([KIB] * 7, []),
        ([KIB] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([KIB] * 30, list(range(30))),
        ([40 * MIB, *[KIB] * 7], []),  # not 40 MiB again for 7 KiB
        ([40 * MIB, *[KIB] * 8], [1, 2, 3, 4, 5, 6, 7, 8]),
        ([*[KIB] * 8, 40 * MIB], [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ([6 * MIB] * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        ([10 * MIB] * 20, []),
        ([100 * MIB] * 20, []),
        ([400 * MIB] * 20, []),
        ([KIB, 400 * MIB] * 8, []),
        ([400 * MIB, *[KIB] * 9, 400 * MIB], [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    ],
)
def test_what_is_merged(sizes: list[int], expected: list[int]) -> None:
    assert merged(named(*sizes)) == expected


def test_what_is_fixed_stays_and_parts_its_neighbours() -> None:
    sizes = named(*[KIB] * 16)
    middle = sorted(sizes)[8]
    assert due(sizes, {middle}) == sorted(sizes)[:8]
    assert due({**named(*[KIB] * 7), "by-hand.parquet": KIB}) == []


@given(st.lists(st.sampled_from([4 * KIB, 30 * KIB, MIB, 60 * MIB]), min_size=250, max_size=250))
def test_each_byte_is_written_again_a_few_times_only(sizes: list[int]) -> None:
    held: dict[str, int] = {}
    written = 0
    for order, size in enumerate(sizes):
        held[f"{order:020d}-00000000.parquet"] = size
        while names := due(held):
            total = sum(held.pop(name) for name in names)
            held[f"{names[0][:29]}-00000000.parquet"] = total
            written += total
    assert written <= 8 * sum(sizes)
    assert len(held) <= 60 + sum(sizes) // (8 * MIB)


def test_rows_that_hold_other_keys_are_not_given_out(tmp_path: Path) -> None:
    write(tmp_path, answers([1, 2, 3], text=["one", "two", "three"]), list)
    (path,) = tmp_path.iterdir()

    def rows(*numbers: int) -> pl.Series:
        return pl.Series(numbers, dtype=pl.UInt32)

    assert take(path, rows(1, 2), keys([2, 3]), ["text"])["text"].to_list() == ["two", "three"]
    assert take(path, rows(0, 0, 2), keys([1, 1, 3]), ["text"])["text"].to_list() == ["one", "one", "three"]
    for wrong, asked in [
        (rows(0, 1), keys([2, 1])),
        (rows(2, 3), keys([3, 4])),
        (rows(0, 3), keys([1, 4])),
        (rows(7), keys([1])),
        (rows(20_000), keys([1])),
        (rows(0, 20_000), keys([1, 2])),
    ]:
        with pytest.raises(Moved):
            take(path, wrong, asked, ["text"])


def test_segments_that_are_no_neighbours_any_more_are_not_merged(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, answers([number]), lambda: [path.name for path in tmp_path.iterdir()])
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Moved):
        merge(tmp_path, names, lambda: False)
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with pytest.raises(Moved):
        merge(tmp_path, [*names, f"{10**19}-00000000.parquet"], lambda: True)
    merge(tmp_path, names, lambda: True)
    (merged,) = {path.name for path in tmp_path.iterdir()} - set(names)
    assert replaced(tmp_path / merged) == names
    assert unfinished([merged, *names]) == [merged]
    assert unfinished([merged, *names[1:]]) == []
