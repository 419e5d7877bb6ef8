"""Order: a permutation whatever comes in, rows that begin alike together, packs under the budget."""

from __future__ import annotations

import random
from itertools import pairwise

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.backends.vllm.order import Order, arrange, expected_lengths

ORDERS: list[Order] = ["auto", "prefix", "length", "input"]
# Few letters and long repeats, so that texts share beginnings of all lengths.
TEXTS = st.lists(
    st.builds(
        lambda head, times, tail: head * times + tail,
        st.sampled_from(["a", "ab", "ü", "文字", ""]),
        st.integers(0, 90),
        st.text("abü文 ", max_size=12),
    ),
    max_size=40,
)


def column(texts: list[str], system: list[str | None] | None = None) -> pl.DataFrame:
    return pl.DataFrame(
        {"prompt": texts, "system": system or [None] * len(texts)},
        schema={"prompt": pl.String, "system": pl.String},
    )


def grouped(prefixes: int, each: int, *, seed: int = 0, template: str = "") -> tuple[list[str], list[int]]:
    """Shuffled texts, and which prefix each has."""
    rng = random.Random(seed)
    heads = [template + "".join(rng.choices("abcdefgh ", k=rng.randint(200, 900))) for _ in range(prefixes)]
    rows = [(heads[i] + str(rng.random()), i) for i in range(prefixes) for _ in range(each)]
    rng.shuffle(rows)
    return [text for text, _ in rows], [i for _, i in rows]


def runs(values: list[int]) -> int:
    return sum(a != b for a, b in pairwise(values)) + 1


@given(texts=TEXTS, order=st.sampled_from(ORDERS), budget=st.integers(1, 200), data=st.data())
def test_nothing_is_lost_and_the_same_input_gives_the_same_order(
    texts: list[str], order: Order, budget: int, data: st.DataObject
) -> None:
    systems = data.draw(
        st.lists(st.sampled_from([None, "", "s" * 70]), min_size=len(texts), max_size=len(texts))
    )
    expected = data.draw(
        st.none() | st.lists(st.floats(0, 1e6) | st.none(), min_size=len(texts), max_size=len(texts))
    )
    guess = None if expected is None else pl.Series(expected, dtype=pl.Float64)
    first = arrange(column(texts, systems), order, budget=budget, expected=guess)
    again = arrange(column(texts, systems), order, budget=budget, expected=guess)
    assert sorted(first.rows) == list(range(len(texts)))
    assert (first.rows.to_list(), first.packs.to_list(), first.order) == (
        again.rows.to_list(),
        again.packs.to_list(),
        again.order,
    )
    assert first.order != "auto"
    assert 0 <= first.shared <= 1


@given(texts=TEXTS, order=st.sampled_from(ORDERS), budget=st.integers(1, 200))
def test_packs_are_stretches_of_the_order_and_passed_only_by_their_last_row(
    texts: list[str], order: Order, budget: int
) -> None:
    plan = arrange(column(texts), order, budget=budget)
    packs = plan.packs.to_list()
    assert packs == sorted(packs)
    assert sorted(set(packs)) == list(range(len(set(packs))))
    tokens = [len(texts[row].encode()) // 4 + 1 for row in plan.rows]
    for pack in set(packs):
        held = [t for t, p in zip(tokens, packs, strict=True) if p == pack]
        assert sum(held[:-1]) < budget


@given(prefixes=st.integers(2, 8), each=st.integers(2, 6), seed=st.integers(0, 1000), template=st.booleans())
def test_rows_that_begin_alike_come_one_after_the_other(
    prefixes: int, each: int, seed: int, template: bool
) -> None:
    texts, which = grouped(prefixes, each, seed=seed, template="Answer this. " * 40 if template else "")
    plan = arrange(column(texts), "auto")
    assert plan.order == "prefix"
    assert runs([which[row] for row in plan.rows]) == prefixes


def test_a_system_of_the_row_is_part_of_what_it_begins_with() -> None:
    systems = ["be brief " * 30, "be kind " * 30] * 10
    plan = arrange(column([f"{i} question" for i in range(20)], systems))
    assert plan.order == "prefix"
    assert runs([row % 2 for row in plan.rows]) == 2


def test_one_template_for_all_rows_needs_no_order() -> None:
    texts = ["Summarise in five words, and in English: " * 10 + str(i * 7919 % 100) for i in range(100)]
    plan = arrange(column(texts))
    assert plan.order == "input"
    assert plan.rows.to_list() == list(range(100))


def test_what_shares_nothing_comes_after_the_groups_as_it_comes() -> None:
    texts, _ = grouped(2, 3)
    alone = [letter * n for letter, n in (("x", 70), ("y", 900), ("z", 300))]
    plan = arrange(column(alone + texts), "prefix")
    assert plan.rows.to_list()[-3:] == [0, 1, 2]


@pytest.mark.parametrize("order", ["prefix", "length"])
def test_the_longest_expected_answer_comes_first(order: Order) -> None:
    texts, which = grouped(3, 3)
    expected = pl.Series([float([5, 500, 50][group]) for group in which])
    plan = arrange(column(texts), order, expected=expected)
    assert [which[row] for row in plan.rows] == [1] * 3 + [2] * 3 + [0] * 3


def test_answers_expected_to_differ_much_start_longest_first() -> None:
    texts = [chr(97 + i % 26) * (i + 1) for i in range(26)]
    wide = pl.Series([1000.0 if i % 5 == 0 else 10.0 for i in range(26)])
    assert arrange(column(texts), expected=wide).order == "length"
    assert arrange(column(texts), expected=wide.clip(500)).order == "input"


def test_longest_first_without_history() -> None:
    plan = arrange(column(["a" * 8, "b" * 80, "c", "d" * 40]), "length", budget=15)
    assert plan.rows.to_list() == [1, 3, 0, 2]
    assert plan.packs.to_list() == [0, 1, 2, 2]


def test_answers_are_expected_to_be_as_long_as_those_of_earlier_prompts_of_their_rank() -> None:
    earlier = pl.DataFrame({"input_tokens": range(200), "output_tokens": [i * i for i in range(200)]})
    asked = column([chr(97 + i) * (40 * i) for i in reversed(range(20))])
    guess = expected_lengths(asked, earlier.sample(fraction=1, shuffle=True, seed=1))
    assert guess is not None
    assert guess.to_list() == sorted(guess, reverse=True)
    assert guess.to_list()[0] == pytest.approx(sum(i * i for i in range(180, 200)) / 20)
    assert guess.to_list()[-1] == pytest.approx(sum(i * i for i in range(20)) / 20)
    assert arrange(asked, expected=guess).order == "length"


def test_little_history_says_nothing() -> None:
    few = pl.DataFrame({"input_tokens": range(50), "output_tokens": range(50)})
    assert expected_lengths(column(["a", "b"]), few) is None
    unknown = few.with_columns(output_tokens=pl.lit(None, pl.Int64))
    assert expected_lengths(column(["a"]), pl.concat([unknown] * 10)) is None
