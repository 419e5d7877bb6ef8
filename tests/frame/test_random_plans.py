"""Any plan with verbs in it gives the rows that the same steps give on eager frames, however it is run.

The provider answers with the prompt, so that a verb is, for the rows, a column like another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import polars as pl
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import store, testing
from polars_llm.frame import nodes
from tests.conftest import MODEL

Frame = TypeVar("Frame", pl.DataFrame, pl.LazyFrame)
Step: TypeAlias = tuple[Any, ...]
Verb: TypeAlias = Callable[[Any, pl.Expr, str], Any]

BASE = pl.DataFrame(
    {
        "n": range(12),
        "g": ["a", "b", "c"] * 4,
        "prompt": ["one", "two", None, "four", "one", "six", "two", "eight", None, "ten", "one", "twelve"],
    }
)
OTHER = pl.DataFrame({"g": ["a", "c"], "told": ["A", "C"]})

# What a verb reads, by columns that may be there: rows by themselves, rows beside others, constants.
INPUTS: dict[str, pl.Expr] = {
    "prompt": pl.col("prompt"),
    "g": pl.col("g"),
    "format": pl.format("{} of {}", "prompt", "n"),
    "shift": pl.col("prompt").shift(1),
    "len": pl.format("{} in {}", "g", pl.len()),
    "when": pl.when(pl.col("n") % 3 == 0).then(pl.col("prompt")).otherwise(pl.lit("other")),
    "r0": pl.col("r0"),
    "filled": pl.col("r0").fill_null("none"),
}
PREDICATES: dict[str, pl.Expr] = {
    "even": pl.col("n") % 2 == 0,
    "late": pl.col("n") > 3,
    "answer": pl.col("r0").str.contains("o"),
    "answered": pl.col("r0").is_not_null(),
    "unanswered": pl.col("r0").is_null(),
    "both": (pl.col("n") % 2 == 0) & (pl.col("r0").str.len_chars() > 3),
    "either": (pl.col("n") > 8) | (pl.col("r0") == "one"),
    "group": pl.col("g") != "b",
}

small = st.integers(0, 9)
steps = st.one_of(
    st.tuples(st.just("verb"), st.sampled_from(list(INPUTS)), st.sampled_from(["r0", "r0", "r1", "prompt"])),
    st.tuples(st.just("filter"), st.sampled_from(list(PREDICATES))),
    st.tuples(st.sampled_from(["head", "tail"]), small),
    st.tuples(st.just("slice"), small, small),
    st.tuples(st.just("column"), st.sampled_from(list(INPUTS)), st.sampled_from(["r1", "x", "prompt"])),
    st.tuples(st.just("sort"), st.booleans()),
    st.tuples(st.just("select"), st.sets(st.sampled_from(["n", "g", "prompt", "r0", "r1", "x"]), min_size=1)),
    st.tuples(st.just("index")),
    st.tuples(st.just("unique")),
    st.tuples(st.just("concat")),
    st.tuples(st.sampled_from(["left", "semi", "inner"])),
    st.tuples(st.just("groups")),
)


NEEDS = {
    "sort": {"n"},
    "unique": {"prompt"},
    "left": {"g"},
    "semi": {"g"},
    "inner": {"g"},
    "groups": {"g", "n"},
}


def needs(step: Step) -> set[str]:
    """Columns without which a step is left out."""
    read = {"verb": INPUTS, "column": INPUTS, "filter": PREDICATES}.get(step[0])
    return set(read[step[1]].meta.root_names()) if read else NEEDS.get(step[0], set())


def joined(frame: Any, how: Any, number: int) -> Any:
    # Each time another name: a second join would make it anew.
    other = OTHER.rename({"told": f"told{number}"})
    right: Any = other.lazy() if isinstance(frame, pl.LazyFrame) else other
    return frame.join(right, on="g", how=how, maintain_order="left")


def chosen(frame: Any, names: set[str]) -> Any:
    there = frame.collect_schema().names()
    return frame.select([n for n in there if n in names] or there)


# What each step does to either kind of frame; the number is the step's own.
STEPS: dict[str, Callable[..., Any]] = {
    "filter": lambda frame, _, name: frame.filter(PREDICATES[name]),
    "head": lambda frame, _, count: frame.head(count),
    "tail": lambda frame, _, count: frame.tail(count),
    "slice": lambda frame, _, start, count: frame.slice(start, count),
    "column": lambda frame, _, name, target: frame.with_columns(INPUTS[name].alias(target)),
    "sort": lambda frame, _, descending: frame.sort("n", descending=descending, maintain_order=True),
    "select": lambda frame, _, names: chosen(frame, names),
    "index": lambda frame, number: frame.with_row_index(f"i{number}"),
    "unique": lambda frame, _: frame.unique("prompt", keep="first", maintain_order=True),
    "concat": lambda frame, _: pl.concat([frame, frame]),
    "left": lambda frame, number: joined(frame, "left", number),
    "semi": lambda frame, number: joined(frame, "semi", number),
    "inner": lambda frame, number: joined(frame, "inner", number),
    "groups": lambda frame, _: frame.group_by("g", maintain_order=True).agg(pl.all().exclude("g").first()),
}


def taken(frame: Frame, step: Step, verb: Verb, number: int) -> Frame:
    """`frame` after one step."""
    name, *arguments = step
    if not needs(step) <= set(frame.collect_schema().names()):
        return frame
    if name == "verb":
        return verb(frame, INPUTS[arguments[0]], arguments[1])  # type: ignore[no-any-return]
    return STEPS[name](frame, number, *arguments)  # type: ignore[no-any-return]


def built(frame: Frame, plan: list[Step], verb: Verb) -> Frame:
    for number, step in enumerate(plan):
        frame = taken(frame, step, verb, number)
    return frame


def told(frame: Any, prompt: pl.Expr, name: str) -> Any:
    return frame.with_columns(prompt.cast(pl.String).alias(name))


def asked(frame: Any, prompt: pl.Expr, name: str, **options: Any) -> Any:
    return frame.llm.generate(prompt, name=name, model=MODEL, **options)


def pushed(frame: Any, prompt: pl.Expr, name: str) -> Any:
    return frame.with_columns(prompt.llm.generate(model=MODEL, pushdown=True).alias(name))


def again_and_again(lf: pl.LazyFrame, **options: Any) -> pl.DataFrame:
    """Plain evaluations, as a cron job makes them."""
    for _ in range(20):
        try:
            return lf.collect(**options)
        except pllm.JobsPending:
            continue
    raise AssertionError("it never ended")


RUNS: dict[str, tuple[Verb, Callable[[pl.LazyFrame], pl.DataFrame]]] = {
    "driven": (asked, lambda lf: lf.llm.collect()),
    "driven, 3 rows at a time": (asked, lambda lf: lf.llm.collect()),
    "pushed": (pushed, lambda lf: lf.llm.collect()),
    "streaming": (asked, lambda lf: again_and_again(lf, engine="streaming")),
    "in-memory": (asked, lambda lf: again_and_again(lf, engine="in-memory")),
    "waiting": (lambda *a: asked(*a, on_pending="wait"), lambda lf: lf.collect()),
}


caches = itertools.count()


@pytest.mark.parametrize("run", RUNS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(steps, min_size=1, max_size=7))
def test_a_plan_gives_the_rows_of_eager_frames(
    run: str, plan: list[Step], provider: testing.Provider, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = [("verb", "prompt", "r0"), *plan]
    expected = built(BASE, plan, told)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / str(next(caches))))
    store._open.clear()
    verb, collect = RUNS[run]
    if "3 rows" in run:
        monkeypatch.setattr(nodes, "_BATCH", 3)
    provider.reset()
    lf = built(BASE.lazy(), plan, verb)
    note(f"{plan}\n{lf.explain(optimized=False)}")
    assert_frame_equal(collect(lf), expected)
    sent = provider.bill().billed
    assert_frame_equal(collect(built(BASE.lazy(), plan, verb)), expected)
    assert provider.bill().billed == sent, "answered requests were sent again"
    assert not provider.bill().duplicates
    assert sent <= 12 * 2 ** sum(step == ("concat",) for step in plan) * len(plan)


@pytest.mark.parametrize("shape", ["chain", "join"])
def test_parts_of_a_pushed_column_are_sent_together(shape: str, provider: testing.Provider) -> None:
    """A verb further up in the plan holds nothing back of the column below it."""
    lf = pl.LazyFrame({"n": range(3_000)}).with_columns(prompt=pl.format("Fact {}.", "n"))
    below = pushed(lf, pl.col("prompt"), "r0")
    if shape == "join":
        below = below.join(lf.select("n", other="prompt"), on="n", maintain_order="left")
    out = pushed(below, pl.col("prompt").shift(1), "r1").llm.collect()
    assert out["r0"].to_list() == out["prompt"].to_list()
    assert out["r1"].to_list() == out["prompt"].shift(1).to_list()
    assert provider.bill().batches == 1 and provider.bill().billed == 3_000  # shifted, they are the same
