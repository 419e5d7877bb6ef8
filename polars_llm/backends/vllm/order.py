"""In which order requests reach an engine, and in which packs. Pure; no engine, no tokenizer.

An engine keeps the attention states of what it has read (its prefix cache) for as long as they fit. Rows
that begin alike must therefore come one after the other; that is where the time is (docs/local.md has
figures). Lengths are those of the texts in bytes: what is compared is like with like, and no tokenizer
has to run before the order is known.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

import polars as pl

__all__ = ["Arrangement", "Order", "arrange", "expected_lengths"]

Order: TypeAlias = Literal["auto", "prefix", "length", "input"]

_BYTES_PER_TOKEN = 4
# vLLM keeps and finds prefixes in blocks of 16 tokens: less than that in common saves nothing.
_STEP = 64
# From which share of all bytes on that only grouping can save, rows are grouped. Grouping costs a sort.
_WORTH_GROUPING = 0.02
# Outputs that are expected to differ by this factor (9th to 5th decile) are worth starting longest first.
_WIDE = 2.0
# Answers from which on earlier ones say something, and into how many classes of size they are put.
_ENOUGH, _CLASSES = 100, 10


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """An order of requests.

    Parameters
    ----------
    rows
        Positions in the input, UInt32, a permutation.
    packs
        Number of the pack that each of `rows` belongs to, UInt32, from 0, ascending. A pack is what is
        handed to the engine at once; it is no barrier.
    order
        What was done: never ``"auto"``.
    shared
        Share of all bytes that a row has in common with an earlier one, and that only grouping brings
        together: what all rows have in common is found in any order and does not count.
    """

    rows: pl.Series
    packs: pl.Series
    order: Order
    shared: float


def arrange(
    requests: pl.DataFrame,
    order: Order = "auto",
    *,
    budget: int = 16_384,
    expected: pl.Series | None = None,
) -> Arrangement:
    """Order and pack requests.

    Parameters
    ----------
    requests
        ``system`` String or null, ``prompt`` String, as in `Requests.frame`.
    order
        ``"prefix"``: rows that begin alike together, what shares nothing after them, as it comes.
        ``"length"``: longest first, so that no long one is left to run alone at the end. ``"input"``: as
        they come. ``"auto"``: by prefix where that can save anything; else by length where outputs are
        expected to differ much; else as they come.
    budget
        Tokens of prompts in a pack (four bytes count as one): packs are cut at its multiples, so that only
        the last row of one may pass it.
    expected
        Tokens that each answer is expected to have, where history says. Longest first, within what
        shares a prefix and otherwise.
    """
    facts = _facts(requests, expected)
    if order in {"auto", "prefix"}:
        grouped, shared = _grouped(facts, requests)
    else:
        grouped, shared = facts, 0.0
    if order == "auto":
        order = _choose(shared, expected)
    if order == "prefix":
        facts = grouped
    elif order == "length":
        facts = facts.sort("expected", "tokens", "row", descending=[True, True, False])
    return Arrangement(facts["row"], _packs(facts["tokens"], budget), order, shared)


def expected_lengths(requests: pl.DataFrame, answered: pl.DataFrame) -> pl.Series | None:
    """Tokens that each answer is expected to have; None if too little is known.

    A row is expected to do as earlier ones of its rank: the tenth of the prompts that are longest as the
    tenth of the earlier prompts that were longest, and so on. Ranks need no tokenizer.

    Parameters
    ----------
    requests
        As for `arrange`.
    answered
        ``input_tokens``, ``output_tokens`` of earlier answers of the model.
    """
    answered = answered.drop_nulls()
    if answered.height < _ENOUGH:
        return None
    means = (
        answered.select(_class_of("input_tokens"), "output_tokens")
        .group_by("class")
        .agg(pl.mean("output_tokens"))
    )
    ranked = _facts(requests, None).select(_class_of("tokens"))
    return ranked.join(means, on="class", how="left", maintain_order="left")["output_tokens"]


def _class_of(size: str) -> pl.Expr:
    rank = pl.col(size).rank("ordinal").cast(pl.Int64) - 1
    return (rank * _CLASSES // pl.len()).alias("class")


def _choose(shared: float, expected: pl.Series | None) -> Order:
    if shared >= _WORTH_GROUPING:
        return "prefix"
    if expected is not None and expected.len():
        middle, high = expected.quantile(0.5) or 0.0, expected.quantile(0.9) or 0.0
        if high > _WIDE * max(middle, 1.0):
            return "length"
    return "input"


def _facts(requests: pl.DataFrame, expected: pl.Series | None) -> pl.DataFrame:
    size = pl.col("prompt").str.len_bytes() + pl.col("system").str.len_bytes().fill_null(0)
    return requests.select(
        row=pl.int_range(pl.len(), dtype=pl.UInt32),
        tokens=(size // _BYTES_PER_TOKEN + 1).cast(pl.Int64),
        expected=pl.lit(0.0) if expected is None else expected.cast(pl.Float64).fill_null(0.0),
    )


def _grouped(facts: pl.DataFrame, requests: pl.DataFrame) -> tuple[pl.DataFrame, float]:
    """Rows that begin alike together, and the share of bytes that this brings together."""
    if facts.height < 2:
        return facts, 0.0
    by_text = facts.with_columns(text=_text(requests)).sort("text", "row")
    common = _in_common(by_text["text"])
    size = by_text["text"].bin.size()
    everywhere = int(common[1:].min() or 0)  # type: ignore[arg-type]
    beyond = (common - everywhere).clip(0)[1:].sum()
    by_text = by_text.drop("text").with_columns(
        group=(common < everywhere + _STEP).fill_null(True).cum_sum().cast(pl.UInt32)
    )
    return _in_groups(by_text), float(beyond) / max(int(size.sum()), 1)


def _in_groups(by_text: pl.DataFrame) -> pl.DataFrame:
    """Groups by the longest answer expected in them; within one by its text, which keeps deeper
    prefixes together; after them what shares nothing, as it comes.
    """
    # Not longest first: long ones together fill the cache, so that fewer run at once (docs/local.md).
    alone = pl.len().over("group") == 1
    return by_text.with_columns(
        alone=alone,
        longest=pl.col("expected").max().over("group"),
        place=pl.when(alone).then("row").otherwise(pl.int_range(pl.len(), dtype=pl.UInt32)),
    ).sort("alone", "longest", "place", descending=[False, True, False])


def _text(requests: pl.DataFrame) -> pl.Series:
    """What a row begins with, as bytes; one system for all rows begins nothing."""
    prompt = pl.col("prompt").cast(pl.Binary)
    if requests["system"].n_unique() > 1:
        system = pl.col("system").fill_null("") + "\x00"
        prompt = (system + pl.col("prompt")).cast(pl.Binary)
    return requests.select(prompt.alias("text")).to_series()


def _in_common(text: pl.Series) -> pl.Series:
    """Bytes that each text, in sorted order, has in common with the one before it, in whole steps."""
    rows = text.to_frame("text").select(
        "text", before=pl.col("text").shift(1), size=pl.col("text").bin.size(), common=pl.lit(0, pl.UInt32)
    )
    step = _STEP
    while step * 2 <= int(rows["size"].max() or 0):  # type: ignore[arg-type]
        step *= 2
    while step >= _STEP:
        # Binary search, all rows at once: does the next stretch of this length agree too?
        ahead = (pl.col(side).bin.slice(pl.col("common"), step) for side in ("text", "before"))
        agrees = (pl.col("size") >= pl.col("common") + step) & next(ahead).eq(next(ahead))
        rows = rows.with_columns(common=pl.col("common") + pl.when(agrees).then(step).otherwise(0))
        step //= 2
    return rows["common"].cast(pl.Int64)


def _packs(tokens: pl.Series, budget: int) -> pl.Series:
    before = tokens.cum_sum() - tokens
    return (before // budget).rle_id().cast(pl.UInt32)
