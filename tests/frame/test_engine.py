"""Driven evaluations: `lf.llm.collect()`, `lf.llm.sink_parquet()` and `pllm.Engine`."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from polars_llm.frame import calls, scope
from tests.conftest import MODEL

OTHER_MODEL = "openai/gpt-6-sol"


def label(request: testing.ModelRequest) -> str:
    """'spam' for what has the word in it, else 'ham'; other prompts come back in capitals."""
    if request.prompt.startswith("Label: "):
        return "spam" if "money" in request.prompt else "ham"
    return request.prompt.upper()


@pytest.fixture(scope="module")
def server() -> Iterator[testing.Provider]:
    with testing.provider(model=label) as running:
        yield running


@pytest.fixture
def labelling(server: testing.Provider, monkeypatch: pytest.MonkeyPatch) -> testing.Provider:
    server.reset()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.fixture(autouse=True)
def model() -> Iterator[None]:
    with pllm.Config(model=MODEL):
        yield


def sent(provider: testing.Provider) -> list[int]:
    """Requests in each batch, the oldest first."""
    return [len(provider.requests(batch["id"])) for batch in provider.batches()]


def mails() -> pl.LazyFrame:
    texts = ["send money", "hello", "more money", None, "good bye", "hello"]
    return pl.LazyFrame({"id": range(6), "text": texts})


def labelled() -> pl.LazyFrame:
    return mails().llm.generate(pl.format("Label: {}", "text"), name="label")


# --- a null that only stands for an answer to come ------------------------------------------------------

SPAM = pl.col("label") == "spam"
TRAPS: dict[str, tuple[Any, int]] = {
    # What reads the label, and how many prompts it makes when the labels are known.
    "when/otherwise": (
        lambda lf: lf.llm.generate(
            pl.when(SPAM).then(pl.format("warn {}", "id")).otherwise(pl.format("greet {}", "id")),
            name="letter",
        ),
        6,
    ),
    "fill_null": (
        lambda lf: lf.llm.generate(
            pl.format("{} {}", "id", pl.col("label").fill_null("unknown")), name="letter"
        ),
        6,
    ),
    "join": (
        lambda lf: lf.join(
            pl.LazyFrame({"label": ["spam", "ham"], "tone": ["cold", "warm"]}),
            on="label",
            how="left",
            maintain_order="left",
        ).llm.generate(pl.format("{} {}", "id", pl.col("tone").fill_null("none")), name="letter"),
        6,
    ),
    "anti join": (
        lambda lf: lf.join(pl.LazyFrame({"label": ["spam"]}), on="label", how="anti").llm.generate(
            pl.format("letter {}", "id"), name="letter"
        ),
        4,
    ),
    "count": (
        lambda lf: lf.select(n=SPAM.sum()).llm.generate(pl.format("{} spam mails", "n"), name="letter"),
        1,
    ),
    "str.join": (
        lambda lf: lf.select(all=pl.col("label").str.join(" ")).llm.generate("all", name="letter"),
        1,
    ),
    "filter": (
        lambda lf: lf.filter(SPAM.fill_null(False).not_()).llm.generate(
            pl.format("letter {}", "id"), name="letter"
        ),
        4,
    ),
    "group_by": (
        lambda lf: (
            lf.group_by("label", maintain_order=True)
            .agg(pl.col("text").str.join(" "))
            .llm.generate("text", name="letter")
        ),
        3,
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_nothing_is_asked_about_what_is_not_answered(labelling: testing.Provider, trap: str) -> None:
    reads, prompts = TRAPS[trap]
    out = reads(labelled()).llm.collect()
    assert out.height
    assert out["letter"].null_count() == 0
    bill = labelling.bill()
    assert (bill.billed, bill.duplicates, bill.batches) == (4 + prompts, {}, 2)


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_the_same_with_null_for_what_is_pending(trap: str, engine: Any, own_cache: Path) -> None:
    reads, prompts = TRAPS[trap]
    with testing.provider(model=label, auto=False) as provider, pllm.Config(on_pending="null"):
        query = reads(labelled())
        for _ in range(3):
            assert query.collect(engine=engine)["letter"].null_count() == query.collect().height
        assert sent(provider) == [4]
        provider.finish()
        query.collect(engine=engine)
        assert sent(provider) == [4, prompts]
        provider.finish()
        assert query.collect(engine=engine)["letter"].null_count() == 0
        assert sent(provider) == [4, prompts]


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_an_expression_on_a_pending_answer_sends_nothing(engine: Any) -> None:
    with testing.provider(model=label, auto=False) as provider, pllm.Config(on_pending="null"):
        query = labelled().with_columns(
            letter=pl.format("{} {}", "id", pl.col("label").fill_null("?")).llm.generate()
        )
        for _ in range(2):
            assert query.collect(engine=engine)["letter"].null_count() == 6
        assert sent(provider) == [4]
        provider.finish()
        query.collect(engine=engine)
        assert sent(provider) == [4, 6]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_a_lazy_frame_goes_on_however_often_it_is_collected(labelling: testing.Provider, engine: Any) -> None:
    """Each collect is an evaluation of its own, though its call may lie where the last one lay in memory."""
    for sample in range(8):
        with pllm.Config(on_pending="null"):
            first = mails().with_columns(label=pl.col("text").llm.generate(sample=sample))
            query = first.with_columns(letter=pl.col("label").fill_null("?").llm.generate(sample=sample))
            missing = [query.collect(engine=engine)["letter"].null_count() for _ in range(4)]
        assert missing == [6, 6, 0, 0]
        assert labelling.bill().batches == 2 * (sample + 1)


@pytest.mark.filterwarnings("ignore:.*stands in a group_by")
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("known", ["a", "b"])
@pytest.mark.parametrize("form", ["frame", "expression"])
def test_what_reads_groups_waits_for_the_last_of_them(engine: Any, known: str, form: str) -> None:
    """Groups are asked one by one, on other threads: that one is answered says nothing of the others."""
    with testing.provider(model=label, auto=False) as provider, pllm.Config(on_pending="null"):
        pl.DataFrame({"text": [known]}).llm.generate("text")
        provider.finish()
        groups = pl.LazyFrame({"group": [1, 2], "text": ["a", "b"]}).group_by("group", maintain_order=True)
        query = groups.agg(label=pl.col("text").llm.generate().first())
        prompt = pl.format("{}!", pl.col("label").fill_null("?"))
        if form == "frame":
            query = query.llm.generate(prompt, name="letter")
        else:
            query = query.with_columns(letter=prompt.llm.generate())
        assert query.collect(engine=engine)["letter"].null_count() == 2
        assert sent(provider) == [1, 1]
        provider.finish()
        query.collect(engine=engine)
        assert sent(provider) == [1, 1, 2]


async def _awaited(query: pl.LazyFrame) -> pl.DataFrame:
    return await query.collect_async()


IN_BACKGROUND: dict[str, Any] = {
    "async": lambda query: asyncio.run(_awaited(query)),
    "batches": lambda query: pl.concat(query.collect_batches()),
    "background": lambda query: query.collect(background=True).fetch_blocking(),
}


@pytest.mark.filterwarnings("ignore:.*considered unstable")
@pytest.mark.parametrize("how", IN_BACKGROUND)
def test_where_nothing_tells_what_an_expression_reads_null_is_refused(how: str) -> None:
    refused = (pllm.UnansweredInput, pl.exceptions.ComputeError)  # which it is before Polars 2.0
    with testing.provider(model=label, auto=False) as provider, pllm.Config(on_pending="null"):
        first = mails().with_columns(label=pl.col("text").llm.generate())
        query = first.with_columns(letter=pl.col("label").fill_null("?").llm.generate())
        with pytest.raises(refused, match="in the background"):
            IN_BACKGROUND[how](query)
        assert sent(provider) == []
        frame = mails().llm.generate("text", name="label").llm.generate(pl.col("label").fill_null("?"))
        IN_BACKGROUND[how](frame)
        assert sent(provider) == [4]


@pytest.mark.filterwarnings("ignore:.*considered unstable")
@pytest.mark.parametrize("how", IN_BACKGROUND)
def test_in_the_background_an_expression_waits_for_whatever_waits_there(how: str) -> None:
    refused = (pllm.UnansweredInput, pl.exceptions.ComputeError)  # which it is before Polars 2.0
    run = IN_BACKGROUND[how]
    with testing.provider(model=label, auto=False) as provider:
        first = mails().llm.generate("text", name="label", on_pending="null")
        query = first.with_columns(letter=pl.col("label").fill_null("?").llm.generate(on_pending="raise"))
        for _ in range(2):
            with pytest.raises(refused, match="may read answers that are not there yet"):
                run(query)
            assert sent(provider) == [4]
        # Whose plan is gone, nobody reads.
        other = pl.LazyFrame({"text": ["x"]}).with_columns(pl.col("text").llm.generate(on_pending="raise"))
        with pytest.raises(refused, match="may read"):
            run(other)
        provider.finish()
        del first, query
        gc.collect()
        pending = (pllm.JobsPending, pl.exceptions.ComputeError)
        with pytest.raises(pending, match="run the same line again"):
            run(other)
        assert sent(provider) == [4, 1]
        provider.finish()
        assert run(other)["response"].to_list() == ["X"]
        # What was answered since does not hold anything up.
        first = mails().llm.generate("text", name="label", on_pending="null")
        query = first.with_columns(letter=pl.col("label").fill_null("?").llm.generate(on_pending="raise"))
        with pytest.raises(pending, match="run the same line again"):
            run(query)
        assert len(sent(provider)) == 3


def _read_beside(first: pl.LazyFrame) -> pl.LazyFrame:
    """An expression that raises while it may read an answer that is still to come."""
    return first.with_columns(letter=pl.col("label").fill_null("?").llm.generate(on_pending="raise"))


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that other tests have left in the background."""
    monkeypatch.setattr(scope, "_background", scope._Background())


REFUSED = (pllm.UnansweredInput, pl.exceptions.ComputeError)  # which it is before Polars 2.0


@pytest.mark.filterwarnings("ignore:.*considered unstable")
@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
@pytest.mark.parametrize("how", IN_BACKGROUND)
def test_in_the_background_it_does_not_matter_how_it_was_collected_before(how: str, engine: Any) -> None:
    with testing.provider(model=label, auto=False) as provider:
        query = _read_beside(mails().llm.generate("text", name="label", on_pending="null"))
        with pytest.raises(REFUSED, match="reads answers that are not there yet"):
            query.collect(engine=engine)
        for _ in range(2):
            with pytest.raises(REFUSED, match="may read answers that are not there yet"):
                IN_BACKGROUND[how](query)
        assert sent(provider) == [4]


@pytest.mark.usefixtures("nobody_waits")
@pytest.mark.filterwarnings("ignore:.*considered unstable")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("how", IN_BACKGROUND)
def test_in_the_background_a_source_that_is_read_twice_waits_for_all_of_it(how: str, turned: bool) -> None:
    with testing.provider(model=label, auto=False) as provider:
        mails().head(1).llm.generate("text", name="label", on_pending="null").collect()
        provider.finish()
        first = mails().llm.generate("text", name="label", on_pending="null")
        parts = [first.filter(pl.col("id") != 0), first.filter(pl.col("id") == 0)]
        query = _read_beside(pl.concat(parts[::-1] if turned else parts))
        for _ in range(2):
            with pytest.raises(REFUSED, match="may read answers that are not there yet"):
                IN_BACKGROUND[how](query)
            assert sent(provider) == [1, 3]
        provider.finish()
        for _ in range(2):  # the first one collects
            with pytest.raises((pllm.JobsPending, pl.exceptions.ComputeError)):
                IN_BACKGROUND[how](query)
        assert len(sent(provider)) == 3
        provider.finish()
        assert IN_BACKGROUND[how](query)["letter"].null_count() == 0


def _dropped(rows: pl.DataFrame) -> pl.DataFrame:
    time.sleep(0.2)
    gc.collect()
    return rows


@pytest.mark.usefixtures("nobody_waits")
@pytest.mark.filterwarnings("ignore:.*considered unstable")
@pytest.mark.parametrize("how", IN_BACKGROUND)
def test_in_the_background_a_part_of_a_plan_that_polars_has_dropped_is_not_forgotten(how: str) -> None:
    """Nobody else has the lazy frame, and what has run of it is gone before the rest is."""

    def query() -> pl.LazyFrame:
        first = mails().llm.generate("text", name="label", on_pending="null").sort("id")
        return _read_beside(first.map_batches(_dropped, schema=first.collect_schema()))

    with testing.provider(model=label, auto=False) as provider:
        with pytest.raises(REFUSED, match="may read answers that are not there yet"):
            IN_BACKGROUND[how](query())
        assert sent(provider) == [4]
        provider.finish()
        with pytest.raises((pllm.JobsPending, pl.exceptions.ComputeError), match="run the same line again"):
            IN_BACKGROUND[how](query())


@pytest.mark.filterwarnings("ignore:.*considered unstable", "ignore:.*stands in a group_by")
def test_in_the_background_groups_are_not_taken_for_an_evaluation_that_is_told() -> None:
    """A call for one group had the mark in a plan of its own, in which that for another one found it."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with testing.provider(model=label, auto=False) as provider:
            for turn in range(6):
                rows = pl.LazyFrame({"n": range(16), "text": [f"{turn} {n}" for n in range(16)]})
                answers = rows.llm.generate("text", name="label", on_pending="null")
                prompt = pl.format("{} {}", "n", pl.col("label").fill_null("?"))
                query: Any = answers.group_by("n").agg(prompt.llm.generate(on_pending="raise"))
                with pytest.raises(REFUSED, match="may read answers that are not there yet"):
                    query.collect(background=True).fetch_blocking()
            assert sent(provider) == [16] * 6
    finally:
        sys.setswitchinterval(interval)


def test_a_verb_that_raises_says_what_it_waits_for() -> None:
    with testing.provider(model=label, auto=False) as provider:
        pending = mails().llm.generate(pl.format("Label: {}", "text"), name="label", on_pending="null")
        query = pending.llm.generate(pl.format("{} {}", "id", pl.col("label").fill_null("?")), name="letter")
        with pytest.raises(pllm.UnansweredInput, match="'letter' reads answers that are not there yet"):
            query.collect()
        assert sent(provider) == [4]


# --- rounds ---------------------------------------------------------------------------------------------


def test_one_job_for_each_model_and_round(labelling: testing.Provider) -> None:
    with_labels = labelled().with_columns(n=pl.col("id") + 1)
    other = with_labels.llm.generate("text", name="other", model=OTHER_MODEL)
    both = other.with_columns(m=pl.col("id") * 2).llm.generate(
        pl.format("{} {} {}", "label", "other", "id"), name="both"
    )
    out = both.llm.collect()
    assert out["both"].drop_nulls().len() == 5
    luna, sol = MODEL.removeprefix("openai/"), OTHER_MODEL.removeprefix("openai/")
    assert sorted((b["model"], b["total"]) for b in labelling.batches()) == [(luna, 4), (luna, 5), (sol, 4)]


def test_raise_goes_on_where_it_stopped(labelling: testing.Provider) -> None:
    query = TRAPS["when/otherwise"][0](labelled())
    with pytest.raises(pllm.JobsPending) as first:
        query.llm.collect(on_pending="raise")
    assert first.value.requests == 4
    with pytest.raises(pllm.JobsPending) as second:
        query.llm.collect(on_pending="raise")
    assert second.value.requests == 6
    assert query.llm.collect(on_pending="raise")["letter"].null_count() == 0
    assert labelling.bill().batches == 2


def test_null_gives_what_is_there(labelling: testing.Provider) -> None:
    out = TRAPS["when/otherwise"][0](labelled()).llm.collect(on_pending="null")
    assert out["label"].null_count() == out["letter"].null_count() == 6
    assert labelling.bill().batches == 1


@pytest.mark.filterwarnings("error")
def test_failures_are_reported_once_and_at_the_end(labelling: testing.Provider) -> None:
    lf = pl.LazyFrame({"text": ["[[fail:400]] a", "b", "[[fail:400]] c"]})
    query = lf.llm.generate("text", name="x").llm.generate(pl.format("{}!", "x"), name="y")
    with pytest.warns(pllm.LLMWarning, match="2 of 3 requests failed") as warned:
        out = query.llm.collect()
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert out["y"].to_list() == [None, "B!", None]


def test_on_error_raise(labelling: testing.Provider) -> None:
    lf = pl.LazyFrame({"text": ["[[fail:400]] a", "b"]})
    with pytest.raises(pllm.RequestsFailed) as failed:
        lf.llm.generate("text", on_error="raise").llm.collect()
    assert failed.value.failed == 1


def test_retry_failed_sends_again_once(labelling: testing.Provider) -> None:
    lf = pl.LazyFrame({"text": ["[[fail:400]] a", "b"]}).llm.generate("text", retry_failed=True)
    for _ in range(2):
        with pytest.warns(pllm.LLMWarning):
            lf.llm.collect()
    assert sent(labelling) == [2, 1]


def test_a_plan_that_samples_is_not_asked_for_ever(labelling: testing.Provider) -> None:
    lf = mails().map_batches(lambda df: df.with_columns(text=pl.lit(str(time.perf_counter_ns()))))
    with pytest.raises(pllm.UnansweredInput, match="asks for other rows in every evaluation"):
        lf.llm.generate("text").llm.collect()
    assert labelling.bill().billed <= 2


# --- expressions with pushdown ------------------------------------------------------------------------

PUSHED = pl.format("ask {}", "id")
MASKED: dict[str, tuple[Any, int]] = {
    "when/then": (lambda lf, e: lf.with_columns(x=pl.when(pl.col("id") > 3).then(e)), 2),
    "filter after": (lambda lf, e: lf.with_columns(x=e).filter(pl.col("id") > 3), 2),
    "filter before": (lambda lf, e: lf.filter(pl.col("id") > 3).with_columns(x=e), 2),
    "in a filter": (lambda lf, e: lf.filter(pl.col("id") > 3).filter(e == "ASK 4"), 6),
    "head": (lambda lf, e: lf.with_columns(x=e).head(1), 1),
    "dropped": (lambda lf, e: lf.with_columns(x=e).select("id"), 0),
    "group_by": (
        lambda lf, e: lf.group_by(g=pl.col("id") % 2, maintain_order=True).agg(x=e),
        6,
    ),
    "over": (lambda lf, e: lf.with_columns(x=e.over(pl.col("id") % 2)), 6),
    "two side by side": (
        lambda lf, e: lf.with_columns(x=e, y=pl.format("other {}", "id").llm.generate(pushdown=True)),
        12,
    ),
    "one in another": (
        lambda lf, e: lf.with_columns(x=pl.format("again {}", e).llm.generate(pushdown=True)),
        12,
    ),
}


@pytest.mark.parametrize("plan", MASKED)
def test_pushed_expressions_pay_for_rows_that_count(labelling: testing.Provider, plan: str) -> None:
    build, requests = MASKED[plan]
    out = build(mails(), PUSHED.llm.generate(pushdown=True)).llm.collect()
    bill = labelling.bill()
    rounds = 2 if plan == "one in another" else min(requests, 1)
    assert (bill.billed, bill.duplicates, bill.batches) == (requests, {}, rounds)
    if "x" in out.columns and plan != "one in another":
        assert_frame_equal(out.select("x"), build(mails(), PUSHED.str.to_uppercase()).collect().select("x"))


@pytest.mark.parametrize("as_column", [True, False])
def test_a_filter_on_an_answer_after_others_asks_what_passes_those(
    labelling: testing.Provider, as_column: bool
) -> None:
    some, spam = mails().filter(pl.col("id") > 3), pl.col("x") == "ASK 4"
    if as_column:
        query = mails().llm.generate(PUSHED, name="x").filter(spam).filter(pl.col("id") > 3)
    else:
        query = some.filter(PUSHED.llm.generate() == "ASK 4")
    assert query.llm.collect()["id"].to_list() == [4]
    assert labelling.bill().billed == 2


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_a_plain_collect_of_one_sends_nothing_and_says_how(labelling: testing.Provider, engine: Any) -> None:
    query = mails().with_columns(x=PUSHED.llm.generate(pushdown=True))
    with pytest.raises(pllm.UnansweredInput, match=r"lf\.llm\.collect\(\)"):
        query.collect(engine=engine)
    assert labelling.bill().accepted == 0
    query.llm.collect()
    assert query.collect(engine=engine)["x"].null_count() == 0


# --- the engine -----------------------------------------------------------------------------------------


def letters() -> pl.LazyFrame:
    query: pl.LazyFrame = TRAPS["when/otherwise"][0](labelled())
    return query


EXPECTED = ["WARN 0", "GREET 1", "WARN 2", "GREET 3", "GREET 4", "GREET 5"]


async def _gathered(lf: pl.LazyFrame, engine: pl.Engine) -> pl.DataFrame:
    return await lf.collect_async(engine=engine)


ENGINE_RUNS: dict[str, Any] = {
    "collect": lambda lf, e, path: lf.collect(engine=e),
    "collect_all": lambda lf, e, path: pl.collect_all([lf, lf.select("id")], engine=e)[0],
    "collect_async": lambda lf, e, path: asyncio.run(_gathered(lf, e)),
    "collect_batches": lambda lf, e, path: pl.concat(lf.collect_batches(engine=e)),
    "collect_batches lazy": lambda lf, e, path: pl.concat(lf.collect_batches(engine=e, lazy=True)),
    "sink_parquet": lambda lf, e, path: (lf.sink_parquet(path, engine=e), pl.read_parquet(path))[1],
    "sink_ipc": lambda lf, e, path: (lf.sink_ipc(path, engine=e), pl.read_ipc(path))[1],
    "sink_csv": lambda lf, e, path: (lf.sink_csv(path, engine=e), pl.read_csv(path))[1],
    "sink_ndjson": lambda lf, e, path: (lf.sink_ndjson(path, engine=e), pl.read_ndjson(path))[1],
    "lazy sink": lambda lf, e, path: (
        pl.collect_all([lf.sink_parquet(path, lazy=True)], engine=e),
        pl.read_parquet(path),
    )[1],
}


@pytest.mark.parametrize("run", ENGINE_RUNS)
def test_every_way_to_run_on_the_engine(labelling: testing.Provider, run: str, tmp_path: Path) -> None:
    out = ENGINE_RUNS[run](letters(), pllm.Engine(), tmp_path / "out")
    assert out["letter"].to_list() == EXPECTED
    bill = labelling.bill()
    assert (bill.billed, bill.duplicates, bill.batches) == (10, {}, 2)


def _waiting() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "polars_llm-async"]


def test_ctrl_c_in_asyncio_run_stops_waiting_at_once() -> None:
    with testing.provider(auto=False) as provider:

        def stop_when_sent() -> None:
            while not provider.bill().batches:
                time.sleep(0.05)
            stopped.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

        stopped: list[float] = []
        threading.Thread(target=stop_when_sent).start()
        with pytest.raises(KeyboardInterrupt):
            asyncio.run(_gathered(labelled(), pllm.Engine()))
        assert time.monotonic() - stopped[0] < 2


@pytest.mark.parametrize("mode", ["batch", "realtime"])
def test_a_cancelled_query_leaves_nothing_that_waits(mode: Any) -> None:
    async def cancelled() -> None:
        query = asyncio.ensure_future(_gathered(lf, pllm.Engine()))
        while not (provider.bill().batches or provider.held()):
            await asyncio.sleep(0.05)
        query.cancel()
        with pytest.raises(asyncio.CancelledError):
            await query

    lf = pl.LazyFrame({"text": ["a", "b"]}).llm.generate("text", mode=mode)
    with testing.provider(auto=False) as provider:
        if mode == "realtime":
            provider.fault("hold", operation="*completions*", times=None)
        asyncio.run(cancelled())
        deadline = time.monotonic() + 5
        while _waiting() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _waiting()


def test_queries_that_wait_leave_the_loops_threads_to_others() -> None:
    async def many() -> list[pl.DataFrame]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        made = (pl.LazyFrame({"text": [text]}).llm.generate("text") for text in "abc")
        queries = [asyncio.ensure_future(_gathered(lf, pllm.Engine())) for lf in made]
        while provider.bill().batches < 3:
            await asyncio.sleep(0.05)
        assert await asyncio.wait_for(asyncio.to_thread(lambda: "free"), 2) == "free"
        provider.finish()
        return list(await asyncio.gather(*queries))

    with testing.provider(model=label, auto=False) as provider:
        outs = asyncio.run(asyncio.wait_for(many(), 20))
    assert [out["response"].item() for out in outs] == ["A", "B", "C"]


@pytest.mark.parametrize("run", ENGINE_RUNS)
def test_no_file_is_made_of_rows_that_are_missing(
    labelling: testing.Provider, run: str, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    with pytest.raises(pllm.JobsPending) as pending:
        ENGINE_RUNS[run](letters(), pllm.Engine(on_pending="raise"), target)
    assert pending.value.requests == 4
    # Polars makes an empty file when a plan that writes is cut off.
    assert not target.exists() or pl.read_parquet(target).is_empty()


def test_as_the_active_affinity(labelling: testing.Provider, tmp_path: Path) -> None:
    with pl.Config() as config:
        config.set_engine_affinity(pllm.Engine())
        query = mails().with_columns(x=PUSHED.llm.generate()).filter(pl.col("id") > 3)
        assert query.collect()["x"].to_list() == ["ASK 4", "ASK 5"]
        query.sink_parquet(tmp_path / "x.parquet")
    assert labelling.bill().billed == 2
    with pytest.raises(pllm.UnansweredInput):  # built while it was
        mails().with_columns(x=PUSHED.llm.generate(pushdown=True)).collect()


def test_two_eager_expressions_while_it_is_the_affinity_say_how(labelling: testing.Provider) -> None:
    with pl.Config() as config:
        config.set_engine_affinity(pllm.Engine())
        two = {name: pl.format(name + " {}", "id").llm.generate(on_pending="wait") for name in "ab"}
        frame = mails().collect()
        with pytest.raises(pllm.UnansweredInput, match=r"(?s)was the affinity.*df\.lazy\(\)"):
            frame.select(**two)
        assert labelling.bill().batches == 0
        assert frame.lazy().select(**two).collect()["b"][0] == "B 0"
    assert labelling.bill().batches == 1


def test_two_lazy_sinks_pay_once_and_write_whole_files(labelling: testing.Provider, tmp_path: Path) -> None:
    first, second = tmp_path / "some.parquet", tmp_path / "all.parquet"
    few = labelled().filter(pl.col("id") < 2)
    sinks = [few.sink_parquet(first, lazy=True), labelled().sink_parquet(second, lazy=True)]
    pl.collect_all(sinks, engine=pllm.Engine())
    assert [pl.read_parquet(path)["label"].null_count() for path in (first, second)] == [
        0,
        1,
    ]  # of a null prompt
    assert (labelling.bill().billed, labelling.bill().duplicates) == (4, {})


def test_a_pushed_expression_in_a_lazy_sink_says_how(labelling: testing.Provider, tmp_path: Path) -> None:
    query = mails().with_columns(x=PUSHED.llm.generate(pushdown=True))
    sink = query.sink_parquet(tmp_path / "x.parquet", lazy=True)
    with pytest.raises(pllm.UnansweredInput, match=r"(?s)lazy=True.*without lazy=True"):
        pl.collect_all([sink], engine=pllm.Engine())
    assert labelling.bill().batches == 0
    query.sink_parquet(tmp_path / "x.parquet", engine=pllm.Engine())
    assert sent(labelling) == [6]
    pl.collect_all([sink], engine=pllm.Engine())
    assert pl.read_parquet(tmp_path / "x.parquet")["x"].to_list() == [f"ASK {n}" for n in range(6)]


LIMITED: dict[str, Any] = {
    "filter, head": lambda lf: lf.filter(pl.col("id") >= 0).head(5),
    "filter on the answer, head": lambda lf: lf.filter(pl.col("x").is_null() | True).head(150_000),
}


@pytest.mark.parametrize("plan", LIMITED)
def test_a_lazy_sink_that_needs_only_the_first_rows_writes_no_row_without_its_answer(
    labelling: testing.Provider, tmp_path: Path, plan: str
) -> None:
    rows = pl.LazyFrame({"id": range(400_000)})  # several batches, so that Polars stops in the middle
    query = LIMITED[plan](rows.llm.generate(pl.format("n {}", pl.col("id") // 100_000), name="x"))
    target = tmp_path / "x.parquet"
    pl.collect_all([query.sink_parquet(target, lazy=True)], engine=pllm.Engine())
    written = pl.read_parquet(target)
    assert written.height in {5, 150_000}
    assert written["x"].to_list() == [f"N {n // 100_000}" for n in range(written.height)]
    assert labelling.bill().duplicates == {}


@pytest.mark.parametrize("cut", ["slice", "head"])
def test_a_query_that_ends_in_the_middle_of_its_input(labelling: testing.Provider, cut: str) -> None:
    """Polars lets go of a source when it likes, that is after the query has returned."""
    rows = pl.LazyFrame({"id": range(400_000)})
    query = rows.llm.generate(pl.format("n {}", pl.col("id") // 100_000), name="x")
    if cut == "slice":
        out = query.slice(150_000, 2).llm.collect()
    else:
        out = query.with_row_index().filter(pl.col("index") >= 150_000).head(2).llm.collect()
    assert out["x"].to_list() == ["N 1", "N 1"]
    assert sent(labelling) == [4]


def test_sink_parquet_of_the_namespace(labelling: testing.Provider, tmp_path: Path) -> None:
    target = tmp_path / "letters.parquet"
    with pytest.raises(pllm.JobsPending):
        letters().llm.sink_parquet(target, on_pending="raise")
    assert not target.exists()
    letters().llm.sink_parquet(target)
    assert pl.read_parquet(target)["letter"].to_list() == EXPECTED


def test_queries_without_a_verb_run_as_ever(labelling: testing.Provider, own_cache: Path) -> None:
    lf = pl.LazyFrame({"n": range(1000)}).filter(pl.col("n") % 2 == 0)
    assert_frame_equal(lf.collect(engine=pllm.Engine()), lf.collect())
    assert lf.explain(engine=pllm.Engine()) == lf.explain(engine="streaming")
    assert not own_cache.exists()


def test_the_base_is_the_one_this_was_written_for() -> None:
    """`polars.Engine` may change: then this fails, and `lf.llm.collect()` goes on working."""
    base = inspect.signature(pl.StreamingEngine.collect).parameters
    assert list(base) == ["self", "lf", "optimizations", "background", "post_opt_callback"]
    ours = {name for name, value in vars(pl.StreamingEngine.__mro__[1]).items() if callable(value)}
    runs = {name for name in ours if name.startswith(("collect", "sink", "execute"))}
    assert runs <= set(vars(pllm.Engine)) | {"execute"}


_WITHOUT = """
import polars as pl
del pl.StreamingEngine
import polars_llm as pllm
query = pl.LazyFrame({"t": ["a", "b"]}).llm.generate("t").llm.generate(pl.format("{}!", "response"), name="r")
print(query.llm.collect()["r"].to_list())
try:
    pllm.Engine()
except pllm.InvalidRequest as error:
    print(str(error).splitlines()[0])
"""


def test_a_polars_without_engines_takes_nothing_else_away(labelling: testing.Provider) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT],
        env={**os.environ, **labelling.env, "POLARS_LLM_MODEL": MODEL},
        capture_output=True,
        text=True,
        check=True,
    )
    answers, refusal = done.stdout.splitlines()
    assert answers == "['A!', 'B!']"
    assert "has no polars.StreamingEngine" in refusal


def test_the_call_that_collects_is_found_on_the_stack() -> None:
    """A Polars that moves `Engine.collect` fails this: then plain queries know less of each other."""
    found: list[Any] = []

    def look(column: pl.Series) -> pl.Series:
        found.append(calls.collecting())
        return column

    lf = pl.LazyFrame({"n": [1]}).with_columns(pl.col("n").map_batches(look, return_dtype=pl.Int64))
    for engine in ("in-memory", "streaming"):
        lf.collect(engine=engine)  # type: ignore[call-overload]
    assert [type(frame.f_locals["lf"]) for frame in found] == [pl.LazyFrame] * 2


def test_batches_are_sent_before_realtime_answers(labelling: testing.Provider) -> None:
    now = mails().llm.generate("text", name="answer", mode="realtime")
    later = mails().llm.generate(pl.format("{}?", "text"), name="answer")
    assert pl.concat([now, later]).llm.collect()["answer"].null_count() == 2
    calls = [seen.path for seen in labelling.log() if seen.method == "POST"]
    assert calls.index("/v1/batches") < calls.index("/v1/chat/completions")


def test_bad_arguments(labelling: testing.Provider, own_cache: Path) -> None:
    with pytest.raises(pllm.InvalidRequest, match="on_pending is 'later'"):
        pllm.Engine(on_pending="later")  # type: ignore[arg-type]
    query = mails().llm.generate("text")
    with pytest.raises(pllm.InvalidRequest, match="on_pending is 'nul'"):
        query.llm.collect(on_pending="nul")
    with pytest.raises(pllm.InvalidRequest, match="on_pending is 'nul'"):
        query.llm.sink_parquet(own_cache / "out.parquet", on_pending="nul")
    assert labelling.log() == []


# --- threads and signals ------------------------------------------------------------------------------


def test_driving_and_plain_collecting_at_once_never_gives_wrong_rows(own_cache: Path) -> None:
    """Two threads on the same lazy frame: whoever gets rows gets the right ones."""
    with testing.provider(model=label) as provider:
        wrong: list[Any] = []
        for number in range(15):
            texts = [f"Label: {number} money {i}" if i % 2 else f"Label: {number} {i}" for i in range(40)]
            query = pl.LazyFrame({"t": texts}).llm.generate("t", name="label")
            expected = ["spam" if i % 2 else "ham" for i in range(40)]

            def plain(query: pl.LazyFrame = query, expected: list[str] = expected) -> None:
                for _ in range(5):
                    try:
                        out = query.collect()["label"].to_list()
                    except (pllm.JobsPending, pllm.UnansweredInput):
                        continue
                    if out != expected:
                        wrong.append(out)

            thread = threading.Thread(target=plain)
            thread.start()
            out = query.llm.collect()["label"].to_list()
            if out != expected:
                wrong.append(out)
            thread.join()
        assert wrong == []
        assert provider.bill().duplicates == {}
        assert provider.bill().billed == 15 * 40


def test_threads_drive_different_frames(own_cache: Path) -> None:
    with testing.provider(model=label) as provider:
        found: dict[int, list[str]] = {}

        def run(number: int) -> None:
            lf = pl.LazyFrame({"t": [f"n{number} {i % 5}" for i in range(20)]})
            query = lf.llm.generate("t", name="x").llm.generate(pl.format("{} again", "x"), name="y")
            found[number] = query.llm.collect()["y"].to_list()

        threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {n: [f"N{n} {i % 5} AGAIN" for i in range(20)] for n in range(6)}
        assert provider.bill().duplicates == {}


@pytest.mark.parametrize(
    "line",
    [
        "lf.llm.generate('t').llm.collect()",
        "lf.llm.generate('t').collect(engine=pllm.Engine())",
        "lf.llm.generate('t', on_pending='wait').collect()",
        "lf.collect().llm.generate('t', on_pending='wait')",
    ],
)
def test_ctrl_c_while_waiting(own_cache: Path, line: str) -> None:
    with testing.provider(auto=False) as provider:
        script = f"""
            import polars as pl, polars_llm as pllm, signal, sys
            signal.signal(signal.SIGINT, signal.default_int_handler)
            lf = pl.LazyFrame({{"t": ["a", "b"]}})
            print("ready", flush=True)
            try:
                {line}
            except KeyboardInterrupt as stop:
                print(stop.__notes__[0], flush=True)
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, **provider.env, "POLARS_LLM_MODEL": MODEL},
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 30
            while not provider.bill().batches and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(0.3)
            for _ in range(3):
                sent = time.monotonic()
                child.send_signal(signal.SIGINT)
                # Python drops what a handler raises inside a finalizer (the SDK's clients have one): the
                # user presses again.
                if select.select([child.stdout], [], [], 5)[0]:
                    break
            note = child.stdout.readline()
            assert time.monotonic() - sent < 2
            assert "stopped waiting, not the work: job_" in note
            # Polars 1 may raise one Ctrl+C a second time, where the first came inside of a query of ours.
            assert child.wait(timeout=20) in (0, -signal.SIGINT)
        finally:
            child.kill()
            child.communicate()


# --- what a new user found ------------------------------------------------------------------------------


def chain(**options: Any) -> pl.LazyFrame:
    """Two verbs; the second one reads the first one's answer."""
    first = mails().llm.generate("text", name="a", **options)
    return first.llm.generate(pl.format("again {}", "a"), name="b")


CHAINED = ["AGAIN SEND MONEY", "AGAIN HELLO", "AGAIN MORE MONEY", None, "AGAIN GOOD BYE", "AGAIN HELLO"]


@pytest.mark.parametrize("options", [{}, {"on_pending": "wait"}, {"mode": "realtime"}], ids=str)
@pytest.mark.parametrize("how", ["collect", "engine", "affinity"])
def test_any_verb_below_another_is_driven(labelling: testing.Provider, options: Any, how: str) -> None:
    query = chain(**options)
    with pl.Config() as config:
        if how == "affinity":
            config.set_engine_affinity(pllm.Engine())
        runs = {
            "collect": query.llm.collect,
            "engine": lambda: query.collect(engine=pllm.Engine()),
            "affinity": query.collect,
        }
        out = runs[how]()
    assert out["b"].to_list() == CHAINED
    assert (labelling.bill().billed, labelling.bill().duplicates) == (8, {})


def test_the_driver_decides_what_happens_to_pending(own_cache: Path) -> None:
    with testing.provider(model=label, auto=False) as provider:
        started = time.monotonic()
        with pytest.raises(pllm.JobsPending):
            chain(on_pending="wait").llm.collect(on_pending="raise")
        assert time.monotonic() - started < 20
        assert sent(provider) == [4]


def test_eager_expressions_under_the_affinity_ask_plainly(labelling: testing.Provider) -> None:
    df = mails().collect()
    with pl.Config() as config:
        config.set_engine_affinity(pllm.Engine())
        with pytest.raises(pllm.JobsPending):
            df.with_columns(x=PUSHED.llm.generate())
        assert df.with_columns(x=PUSHED.llm.generate())["x"].null_count() == 0
    assert labelling.bill().batches == 1


def test_an_estimate_sends_nothing_whatever_it_reads(labelling: testing.Provider) -> None:
    first = mails().llm.generate("text", name="a")
    assert first.llm.estimate("text", max_tokens=5)["to_send"].item() == 4
    for options in ({}, {"on_pending": "wait"}, {"mode": "realtime"}):
        below = mails().llm.generate("text", name="a", **options)  # type: ignore[arg-type]
        with pytest.raises(pllm.UnansweredInput, match="what it would send is not known"):
            below.llm.estimate("a")
    assert labelling.bill().batches == 0
    assert labelling.bill().billed == 0


def test_a_limit_of_any_verb_refuses_before_anything_is_sent(labelling: testing.Provider) -> None:
    priced = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4))
    query = mails().llm.generate("text", name="a", model=priced, max_tokens=5)
    query = query.llm.generate(pl.format("{}!", "text"), name="b", model=priced, max_tokens=5, max_cost=1e-12)
    with pytest.raises(pllm.BudgetExceeded, match="1e-12 USD"):
        query.llm.collect()
    query = mails().llm.generate("text", name="a", model=priced, max_tokens=5)
    with pllm.Config(max_cost=0.00001):
        query = query.llm.generate(
            pl.format("{}!", "text"), name="b", model=priced, max_tokens=5, retry_failed=True
        )
        with pytest.raises(pllm.BudgetExceeded):
            query.llm.collect()
    assert labelling.log() == []


def test_pending_jobs_of_all_verbs_are_named(labelling: testing.Provider) -> None:
    query = mails().llm.generate("text", name="a")
    query = query.llm.generate(pl.format("{}!", "text"), name="b", retry_failed=True)
    with pytest.raises(pllm.JobsPending) as pending:
        query.llm.collect(on_pending="raise")
    assert (pending.value.requests, len(pending.value.jobs)) == (8, 2)
    assert str(pending.value).startswith("8 requests sent now")


@pytest.mark.filterwarnings("ignore::polars.exceptions.UnstableWarning", "ignore:background mode")
def test_in_the_background_everything_is_there(labelling: testing.Provider) -> None:
    query: Any = chain().llm.collect(background=True)
    assert query.fetch_blocking()["b"].to_list() == CHAINED


def test_two_threads_that_drive_one_frame_get_the_rows_or_are_told(own_cache: Path) -> None:
    with testing.provider(model=label) as provider:
        query, found, told = chain(), [], []

        def run() -> None:
            try:
                found.append(query.llm.collect()["b"].to_list())
            except pllm.UnansweredInput as error:
                told.append(str(error))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [CHAINED] * len(found)
        assert all("being driven" in message for message in told)
        assert query.llm.collect()["b"].to_list() == CHAINED
        assert (provider.bill().billed, provider.bill().duplicates) == (8, {})
