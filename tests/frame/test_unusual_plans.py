"""Plans as people write them, of which no other test has the like: right rows, and paid for once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl
import polars.selectors as cs
import pytest
from polars.testing import assert_frame_equal

from polars_llm import testing
from tests.frame.test_plans import Ask, Plan, asked, frame, model, said, server, shouting, until_there

__all__ = ["model", "server", "shouting"]  # fixtures


def timed() -> pl.LazyFrame:
    return frame().with_columns(at=pl.datetime(2026, 1, 1) + pl.duration(hours=pl.col("n"))).set_sorted("at")


def sql(query: str) -> Plan:
    return lambda ask: pl.SQLContext(t=ask(frame())).execute(query)


def _twice_cached(ask: Ask) -> pl.LazyFrame:
    once = ask(frame()).cache()
    return pl.concat([once.filter(pl.col("n") < 3), once.filter(pl.col("n") > 8)])


# Name: plan, requests.
UNUSUAL: dict[str, tuple[Callable[[Ask], pl.LazyFrame], int]] = {
    "SQL": (sql('SELECT n, answer FROM t WHERE "group" = 1 ORDER BY n LIMIT 3'), 4),
    "SQL, grouped by the answer": (
        sql("SELECT answer, COUNT(*) c FROM t WHERE n < 4 GROUP BY answer ORDER BY answer"),
        4,
    ),
    "asof join": (
        lambda ask: ask(timed()).join_asof(timed().select("at", m="n").gather_every(3), on="at"),
        9,
    ),
    "group_by_dynamic": (lambda ask: ask(timed()).group_by_dynamic("at", every="3h").agg("answer"), 9),
    "group_by_dynamic, then ask": (
        lambda ask: ask(timed().group_by_dynamic("at", every="3h").agg(pl.col("text").str.join("|"))),
        4,
    ),
    "rolling": (lambda ask: ask(timed()).rolling("at", period="2h").agg(pl.col("answer").last()), 9),
    "window over the answer": (
        lambda ask: ask(frame()).with_columns(first=pl.col("answer").first().over("group")),
        9,
    ),
    "prompt from a window": (
        lambda ask: ask(frame(), pl.format("{} {}", pl.col("text").first().over("group"), "n")).filter(
            pl.col("n") < 3
        ),
        3,
    ),
    "explode, then ask": (
        lambda ask: ask(
            frame().with_columns(each=pl.concat_list("text", "other")).explode("each", empty_as_null=True),
            "each",
        ),
        13,
    ),
    "diagonal": (
        lambda ask: pl.concat([ask(frame().head(3)), ask(frame().tail(3), "other", "b")], how="diagonal"),
        6,
    ),
    "merge_sorted": (
        lambda ask: (
            ask(frame())
            .select("n", "answer")
            .merge_sorted(ask(frame(), "other").select("n", "answer"), key="n")
        ),
        13,
    ),
    "cache": (_twice_cached, 4),
    "update": (lambda ask: frame().update(ask(frame().head(4)).select("n", text="answer"), on="n"), 4),
    "selectors and prefixes": (
        lambda ask: ask(frame()).select(cs.string().name.prefix("p_"), cs.integer().sum()),
        9,
    ),
    "renamed and filtered": (
        lambda ask: (
            ask(frame()).rename({"answer": "b", "text": "answer"}).filter(pl.col("answer") == "text 1")
        ),
        1,
    ),
    "overwrites what it reads": (
        lambda ask: ask(frame(), "text", "text").filter(pl.col("text") == "TEXT 3"),
        9,
    ),
    "three in a row": (
        lambda ask: ask(
            ask(ask(frame()), pl.format("x {}", "answer"), "b"), pl.format("y {} {}", "answer", "b"), "c"
        ).filter(pl.col("group") == 0),
        12,
    ),
    "categorical": (lambda ask: ask(frame().with_columns(pl.col("text").cast(pl.Categorical))), 9),
    "only nulls": (lambda ask: ask(frame().with_columns(no=pl.lit(None, pl.String)), "no"), 0),
    "no rows": (lambda ask: ask(frame().filter(pl.col("n") > 99)), 0),
    "number of rows": (lambda ask: ask(frame()).select(pl.len()), 0),
}


@pytest.mark.parametrize("plan", UNUSUAL)
@pytest.mark.parametrize("driven", [False, True])
def test_unusual_plans(shouting: testing.Provider, plan: str, driven: bool) -> None:
    build, requests = UNUSUAL[plan]
    query = build(asked)
    out = query.llm.collect() if driven else until_there(query.collect)
    expected = build(lambda lf, prompt="text", name="answer": said(lf, _text(prompt), name)).collect()
    assert_frame_equal(out, expected)
    bill = shouting.bill()
    assert (bill.billed, bill.duplicates) == (requests, {})


def _text(prompt: Any) -> pl.Expr:
    return (pl.col(prompt) if isinstance(prompt, str) else prompt).cast(pl.String)
