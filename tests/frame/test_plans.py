"""What a plan costs: requests and batches on the provider's bill, for each way of running it.

docs/lazy.md shows this table to users; a test holds the two together.
"""

from __future__ import annotations

import asyncio
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from tests.conftest import MODEL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[testing.Provider]:
    with testing.provider(model=lambda request: request.prompt.upper()) as running:
        yield running


@pytest.fixture
def shouting(server: testing.Provider, monkeypatch: pytest.MonkeyPatch) -> testing.Provider:
    """A provider that answers with the prompt in capitals, with an empty bill."""
    server.reset()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(autouse=True)
def model() -> Iterator[None]:
    with pllm.Config(model=MODEL):
        yield


def frame() -> pl.LazyFrame:
    """12 rows, 10 distinct texts, one of them null; another text column; a group."""
    n = pl.int_range(12, eager=True).alias("n")
    return (
        pl.DataFrame([n])
        .with_columns(
            text=pl.when(pl.col("n") == 5).then(None).otherwise(pl.format("text {}", pl.col("n") % 10)),
            other=pl.format("other {}", pl.col("n") % 4),
            group=pl.col("n") % 3,
        )
        .lazy()
    )


def asked(lf: pl.LazyFrame, prompt: Any = "text", name: str = "answer") -> pl.LazyFrame:
    return lf.llm.generate(prompt, name=name)


def said(lf: pl.LazyFrame, prompt: Any = "text", name: str = "answer") -> pl.LazyFrame:
    """What `asked` must give."""
    prompt = pl.col(prompt) if isinstance(prompt, str) else prompt
    return lf.with_columns(prompt.str.to_uppercase().alias(name))


Ask = Callable[..., pl.LazyFrame]
Plan = Callable[[Ask], pl.LazyFrame]


def _expr(ask: Ask, expr: pl.Expr, **options: Any) -> pl.Expr:
    """The verb as an expression, or what it must give."""
    return expr.llm.generate(name="answer", **options) if ask is asked else expr.str.to_uppercase()


# Name: plan, requests, batches of the plain evaluations, batches of the driven one.
PLANS: dict[str, tuple[Plan, int, int, int]] = {
    "generate": (lambda ask: ask(frame()), 9, 1, 1),
    "generate, filter(group == 1)": (lambda ask: ask(frame()).filter(pl.col("group") == 1), 4, 1, 1),
    "generate, filter(answer == 'TEXT 1')": (
        lambda ask: ask(frame()).filter(pl.col("answer") == "TEXT 1"),
        9,
        1,
        1,
    ),
    "generate, filter((group == 1) & (answer == 'TEXT 1'))": (
        lambda ask: ask(frame()).filter((pl.col("group") == 1) & (pl.col("answer") == "TEXT 1")),
        4,
        1,
        1,
    ),
    "generate, head(3)": (lambda ask: ask(frame()).head(3), 3, 1, 1),
    "generate, filter(group == 1), head(2)": (
        lambda ask: ask(frame()).filter(pl.col("group") == 1).head(2),
        4,
        1,
        1,
    ),
    "filter(group == 1), head(2), generate": (
        lambda ask: ask(frame().filter(pl.col("group") == 1).head(2)),
        2,
        1,
        1,
    ),
    "generate, drop('answer')": (lambda ask: ask(frame()).drop("answer"), 0, 0, 0),
    "generate, select('n')": (lambda ask: ask(frame()).select("n"), 0, 0, 0),
    "generate, tail(3)": (lambda ask: ask(frame()).tail(3), 9, 1, 1),
    "tail(3), generate": (lambda ask: ask(frame().tail(3)), 3, 1, 1),
    "generate, slice(2, 3)": (lambda ask: ask(frame()).slice(2, 3), 9, 1, 1),
    "generate, semi join": (
        lambda ask: ask(frame()).join(
            frame().filter(pl.col("n") < 2), on="n", how="semi", maintain_order="left"
        ),
        9,
        1,
        1,
    ),
    "semi join, generate": (
        lambda ask: ask(
            frame().join(frame().filter(pl.col("n") < 2), on="n", how="semi", maintain_order="left")
        ),
        2,
        1,
        1,
    ),
    "two verbs, one after the other": (
        lambda ask: ask(ask(frame()), "other", "second"),
        9 + 4,
        1,
        1,
    ),
    "two verbs, something between": (
        lambda ask: ask(ask(frame()).with_columns(m=pl.col("n") * 2), "other", "second"),
        9 + 4,
        2,
        1,
    ),
    "a verb on another's answer": (
        lambda ask: ask(ask(frame()), pl.format("again {}", "answer"), "second"),
        9 + 9,
        2,
        2,
    ),
    "the same verb twice": (lambda ask: ask(ask(frame()), "text", "second"), 9, 1, 1),
    "self-join": (
        lambda ask: ask(frame()).join(ask(frame()), on="n", maintain_order="left"),
        9,
        1,
        1,
    ),
    "concat of two that share prompts": (
        lambda ask: pl.concat([ask(frame().head(6)), ask(frame().tail(8))]),
        9,
        2,
        1,
    ),
    "concat of the same frame": (lambda ask: pl.concat([ask(frame())] * 2), 9, 1, 1),
    "group_by, then generate": (
        lambda ask: ask(
            frame().group_by("group", maintain_order=True).agg(pl.col("text").str.join(" ")), "text"
        ),
        3,
        1,
        1,
    ),
    "with_columns(expression)": (
        lambda ask: frame().with_columns(answer=_expr(ask, pl.col("text"))),
        9,
        1,
        1,
    ),
    "with_columns(expression, pushdown=False), filter(group == 1)": (
        lambda ask: frame().with_columns(answer=_expr(ask, pl.col("text"))).filter(pl.col("group") == 1),
        9,
        1,
        1,
    ),
    "group_by.agg(expression)": (
        lambda ask: (
            frame().group_by("group", maintain_order=True).agg(answer=_expr(ask, pl.col("text").sort()))
        ),
        9,
        3,
        1,
    ),
}


def until_there(collect: Callable[[], Any]) -> Any:
    """Run the same line again until it gives something."""
    for _ in range(12):
        try:
            return collect()
        except pllm.JobsPending:
            continue
    raise AssertionError("it never ends")


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.filterwarnings("ignore:'answer' stands in a group_by:polars_llm.errors.LLMWarning")
def test_plain_plans(shouting: testing.Provider, name: str, engine: Any) -> None:
    plan, requests, batches, _ = PLANS[name]
    query = plan(asked)
    out = until_there(lambda: query.collect(engine=engine))
    assert_frame_equal(out, plan(said).collect(engine=engine))
    bill = shouting.bill()
    assert (bill.billed, bill.duplicates) == (requests, {})
    # With both engines at most these: the in-memory one runs branches of a plan at once.
    assert bill.batches <= batches if "concat" in name else bill.batches == batches


@pytest.mark.parametrize("name", PLANS)
def test_driven_plans(shouting: testing.Provider, name: str) -> None:
    plan, requests, _, batches = PLANS[name]
    out = plan(asked).llm.collect()
    assert_frame_equal(out, plan(said).collect())
    bill = shouting.bill()
    assert (bill.billed, bill.duplicates, bill.batches) == (requests, {}, batches)


def test_the_documentation_shows_this_table() -> None:
    shown = re.findall(
        r"^\| `(.+?)` \| (\d+) \| (\d+) \| (\d+) \|", (ROOT / "docs" / "lazy.md").read_text(), re.M
    )
    assert {name: tuple(map(int, counts)) for name, *counts in shown} == {
        name: counts
        for name, (_, *counts) in ((n, p) for n, p in PLANS.items())
        for counts in [tuple(counts)]
    }


# --- ways to run ----------------------------------------------------------------------------------------


def batches_of(lf: pl.LazyFrame) -> pl.DataFrame:
    return pl.concat(lf.collect_batches(chunk_size=3))


def through(sink: str, read: str) -> Callable[[pl.LazyFrame, Path], pl.DataFrame]:
    def run(lf: pl.LazyFrame, path: Path) -> pl.DataFrame:
        getattr(lf, sink)(path)
        made: pl.DataFrame = getattr(pl, read)(path)
        return made

    return run


RUNS: dict[str, Callable[[pl.LazyFrame, Path], pl.DataFrame]] = {
    "collect": lambda lf, path: lf.collect(),
    "collect_async": lambda lf, path: asyncio.run(_async(lf)),
    "collect_batches": lambda lf, path: batches_of(lf),
    "collect_all": lambda lf, path: pl.collect_all([lf, lf.select("n")])[0],
    "sink_parquet": through("sink_parquet", "read_parquet"),
    "sink_ipc": through("sink_ipc", "read_ipc"),
    "sink_csv": through("sink_csv", "read_csv"),
    "sink_ndjson": through("sink_ndjson", "read_ndjson"),
}


async def _async(lf: pl.LazyFrame) -> pl.DataFrame:
    return await lf.collect_async()


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_run_gives_the_rows(shouting: testing.Provider, run: str, tmp_path: Path) -> None:
    query = asked(frame()).filter(pl.col("group") == 1).select("n", "answer")
    expected = said(frame()).filter(pl.col("group") == 1).select("n", "answer").collect()
    out = until_there(lambda: RUNS[run](query, tmp_path / "out"))
    assert_frame_equal(out, expected)
    assert (shouting.bill().billed, shouting.bill().batches) == (4, 1)


@pytest.mark.parametrize("run", RUNS)
def test_every_way_to_run_keeps_the_exception(shouting: testing.Provider, run: str, tmp_path: Path) -> None:
    if run in {"collect_batches", "collect_async"} and pl.__version__.startswith("1."):
        pytest.skip("Polars 1 does not pass exceptions of sources on there")
    with pytest.raises(pllm.JobsPending) as pending:
        RUNS[run](asked(frame()), tmp_path / "out")
    assert (pending.value.requests, len(pending.value.jobs)) == (9, 1)
    assert pending.value.next_poll > 0


def test_describing_a_plan_opens_and_sends_nothing(shouting: testing.Provider, own_cache: Path) -> None:
    query = asked(asked(frame()), pl.format("again {}", "answer"), "second")
    query.collect_schema()
    query.explain()
    query.explain(optimized=False)
    repr(query)
    query._repr_html_()  # what a notebook shows
    assert "digraph" in str(query.show_graph(raw_output=True, plan_stage="ir"))
    query.llm  # noqa: B018 (the namespace itself)
    assert shouting.log() == []
    assert not own_cache.exists()


def test_show_pays_for_what_it_shows(shouting: testing.Provider, capsys: pytest.CaptureFixture[str]) -> None:
    until_there(lambda: asked(frame()).show(3))
    assert "TEXT 2" in capsys.readouterr().out
    assert shouting.bill().billed == 3


def test_a_struct_answer_can_be_unnested(shouting: testing.Provider) -> None:
    query = frame().llm.generate("text", name="answer", output="full").unnest("answer")
    out = until_there(query.collect)
    assert out["value"].to_list() == said(frame()).collect()["answer"].to_list()
    assert shouting.bill().billed == 9


def test_a_group_by_warns_and_names_the_better_way(shouting: testing.Provider) -> None:
    for query in (
        frame().group_by("group").agg(pl.col("text").llm.generate()),
        frame().with_columns(pl.col("other").llm.generate().over("group")),
    ):
        with pytest.warns(pllm.LLMWarning, match="stands in a group_by or an over"):
            with pytest.raises(pllm.JobsPending):
                query.collect()


def test_a_plain_expression_does_not_warn(shouting: testing.Provider) -> None:
    query = frame().with_columns(
        pl.col("n").sum().over("group").alias("s"), answer=pl.col("text").llm.generate()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert until_there(query.collect)["answer"].drop_nulls().len() == 11


# --- where the rows of a prompt come from ---------------------------------------------------------------

ORDERS: dict[str, tuple[Any, int]] = {
    "head, filter": (lambda lf: lf.head(6).filter(pl.col("group") != 1), 3),
    "head, filter on the answer": (lambda lf: lf.head(4).filter(pl.col("answer") != "TEXT 1"), 4),
    "head, filter, dropped": (lambda lf: lf.head(6).filter(pl.col("group") != 1).drop("answer"), 0),
    "rows without columns": (lambda lf: lf.with_row_index().select(pl.len()), 0),
    "the index alone": (lambda lf: lf.with_row_index().select("index").head(3), 0),
}


@pytest.mark.parametrize("engine", ["in-memory", "streaming", "driven"])
@pytest.mark.parametrize("name", ORDERS)
def test_what_comes_first_is_first(shouting: testing.Provider, name: str, engine: Any) -> None:
    plan, requests = ORDERS[name]
    if requests == 0 and "head, " not in name and pl.__version__.startswith("1."):
        pytest.skip("Polars 1 does not count rows without columns")
    query = plan(asked(frame()))
    out = query.llm.collect() if engine == "driven" else until_there(lambda: query.collect(engine=engine))
    assert_frame_equal(out, plan(said(frame())).collect())
    assert shouting.bill().billed == requests


OTHER_ROWS = {
    "shift": pl.format("{}<{}", "other", pl.col("other").shift(1).fill_null("-")),
    "len": pl.format("{}/{}", "other", pl.len()),
}


@pytest.mark.parametrize("options", [{}, {"on_pending": "wait"}, {"mode": "realtime"}], ids=str)
@pytest.mark.parametrize("name", OTHER_ROWS)
def test_prompts_that_look_at_other_rows_are_made_before_a_filter(
    shouting: testing.Provider, name: str, options: Any
) -> None:
    prompt = OTHER_ROWS[name]
    query = frame().llm.generate(prompt, name="answer", **options).filter(pl.col("n") > 8)
    out = until_there(query.collect)
    assert_frame_equal(out, said(frame(), prompt).filter(pl.col("n") > 8).collect())


def test_any_dtype_waits_on_disk(shouting: testing.Provider) -> None:
    import datetime
    import decimal

    columns = {
        "cat": pl.Series(["a", "b"], dtype=pl.Categorical),
        "enum": pl.Series(["a", "b"], dtype=pl.Enum(["a", "b"])),
        "decimal": [decimal.Decimal("1.10"), None],
        "when": [datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), None],
        "bytes": [b"\x00", None],
        "list": [[1, None], []],
        "struct": [{"a": [1]}, None],
        "array": pl.Series([[1.0, 2.0], [3.0, 4.0]], dtype=pl.Array(pl.Float32, 2)),
        "object": pl.Series([object(), object()], dtype=pl.Object),
        "nothing": [None, None],
    }
    lf = pl.DataFrame({"text": ["a", "b"], **columns}).lazy()
    out = until_there(asked(lf).collect)
    assert out["answer"].to_list() == ["A", "B"]
    kept = [name for name in columns if name != "object"]
    assert_frame_equal(out.select(kept), lf.select(kept).collect())
    assert out["object"].to_list() == columns["object"].to_list()  # type: ignore[attr-defined]


def test_one_column_at_a_time(shouting: testing.Provider) -> None:
    with pytest.raises(pllm.InvalidRequest, match="one column at a time"):
        pl.col("text", "other").llm.generate()
