"""Packing: every line once, in order, under the limits, and no batch fuller than it may be."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polars_llm.backends.base import Limits
from polars_llm.jobs.packing import Pack, pack

LINES = st.lists(st.binary(max_size=12), max_size=40)
LIMITS = st.builds(Limits, st.integers(1, 7), st.integers(1, 40))


@given(lines=LINES, limits=LIMITS)
def test_every_line_is_in_exactly_one_pack_and_no_pack_passes_the_limits(
    lines: list[bytes], limits: Limits
) -> None:
    packs = list(pack(lines, limits))
    assert sorted(row for p in packs for row in p.rows) == list(range(len(lines)))
    for p in packs:
        if p.oversized:
            assert len(lines[p.rows[0]]) + 1 > limits.size_bytes
            assert p.lines == []
            continue
        assert p.lines == [lines[row] for row in p.rows]
        assert p.rows == sorted(p.rows)
        assert p.size_bytes == sum(len(line) + 1 for line in p.lines) <= limits.size_bytes
        assert 0 < len(p.rows) <= limits.requests


@given(lines=LINES, limits=LIMITS)
def test_a_pack_is_closed_only_when_the_next_line_does_not_fit(lines: list[bytes], limits: Limits) -> None:
    packs = [p for p in pack(lines, limits) if not p.oversized]
    for full, following in pairwise(packs):
        first = len(following.lines[0]) + 1
        assert len(full.rows) == limits.requests or full.size_bytes + first > limits.size_bytes


def test_limits_are_inclusive() -> None:
    (only,) = pack([b"x" * 9, b"y" * 9], Limits(requests=2, size_bytes=20))
    assert only == Pack([0, 1], [b"x" * 9, b"y" * 9], 20)
    big, rest = pack([b"z" * 20, b"y"], Limits(requests=2, size_bytes=20))
    assert big.oversized
    assert rest.rows == [1]


def test_nothing_gives_nothing() -> None:
    assert list(pack([], Limits(requests=1, size_bytes=1))) == []
