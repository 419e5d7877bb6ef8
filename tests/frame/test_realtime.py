"""``mode="realtime"``, as a user has it, on both protocols; counted on the provider's bill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends.realtime import Realtime
from tests.conftest import MODEL

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]
PROMPTS = [f"Statement number {n} is about thing {n}." for n in range(12)]
FRAME = pl.DataFrame({"id": range(12), "prompt": PROMPTS})
_ANSWERING = "chat.completions.create|messages.create"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses after failures as short as tests need them."""
    monkeypatch.setattr(Realtime, "first_backoff", 0.02)


@pytest.fixture(params=MODELS, ids=["openai", "anthropic"])
def model(request: pytest.FixtureRequest) -> str:
    """Tests that ask for it run on both protocols."""
    return str(request.param)


@pytest.fixture
def provider() -> Iterator[testing.Provider]:
    """Answers with the prompt's own sentence; many requests at once."""
    with testing.provider() as running:
        yield running


def asked(frame: Any = FRAME, **options: Any) -> Any:
    return frame.llm.generate("prompt", **{"model": MODEL, "mode": "realtime", **options})


def check(provider: testing.Provider, out: pl.DataFrame) -> None:
    """Every answer on its row, every request billed once."""
    assert [f"{n}" in text for n, text in zip(out["id"], out["response"], strict=True)] == [True] * out.height
    bill = provider.bill()
    assert (bill.realtime, bill.batches) == (out.height, 0)
    assert bill.duplicate_bodies == {}


def said(n: int) -> str:
    return f"[[say:answer {n}]] Statement number {n}."


SAYING = pl.DataFrame({"id": range(12), "prompt": [said(n) for n in range(12)]})


def test_answers_come_at_once_and_are_kept(provider: testing.Provider, model: str) -> None:
    out = asked(SAYING, model=model)
    assert out["response"].to_list() == [f"answer {n}" for n in range(12)]
    check(provider, out)
    provider.clear_log()
    assert_frame_equal(asked(SAYING, model=model), out)
    assert provider.log() == []


def test_batch_and_realtime_are_one_cache(provider: testing.Provider, model: str) -> None:
    asked(SAYING.head(5), model=model)
    out = SAYING.llm.generate("prompt", model=model, on_pending="wait")
    assert out["response"].to_list() == [f"answer {n}" for n in range(12)]
    assert_frame_equal(asked(SAYING, model=model), out)
    bill = provider.bill()
    assert (bill.realtime, bill.accepted, bill.billed) == (5, 7, 12)
    assert bill.duplicate_bodies == {}


def test_bodies_are_those_of_batches(provider: testing.Provider, model: str) -> None:
    options = {"system": "Be brief.", "max_tokens": 50, "model": model}
    asked(SAYING.head(1), **options)
    with pytest.raises(pllm.JobsPending):
        SAYING.head(1).llm.generate("prompt", sample=1, **options)
    (line,) = provider.requests(provider.batches()[0]["id"])
    live = next(e for e in provider.exchanges() if e["operation"] in _ANSWERING)
    assert json.loads(live["body"]) == line.get("body", line.get("params"))


def test_what_is_pending_in_a_batch_stays_there(model: str) -> None:
    with testing.provider(auto=False) as provider:
        with pytest.raises(pllm.JobsPending):
            SAYING.head(5).llm.generate("prompt", model=model)
        with pytest.raises(pllm.JobsPending, match="5 answers pending in 1 batch job"):
            asked(SAYING, model=model)
        assert provider.bill().realtime == 7
        provider.finish()
        assert asked(SAYING, model=model)["response"].to_list() == [f"answer {n}" for n in range(12)]
        assert (provider.bill().realtime, provider.bill().accepted) == (7, 5)


def test_all_forms_are_the_same_requests(provider: testing.Provider) -> None:
    eager = asked(SAYING)
    expr = pl.col("prompt").llm.generate(model=MODEL, mode="realtime")
    assert_frame_equal(asked(SAYING.lazy()).collect(), eager)
    assert_frame_equal(SAYING.with_columns(expr), eager)
    assert_frame_equal(SAYING.lazy().with_columns(expr).collect(), eager)
    series = SAYING["prompt"].llm.generate(model=MODEL, mode="realtime")
    assert_frame_equal(series.to_frame(), eager.select("response"))
    assert provider.bill().realtime == 12


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_a_lazy_frame_asks_when_it_is_collected(provider: testing.Provider, engine: Any) -> None:
    lf = asked(SAYING.lazy())
    lf.collect_schema()
    lf.explain()
    assert provider.log() == []
    out = lf.filter(pl.col("id") < 3).collect(engine=engine)
    assert out["response"].to_list() == ["answer 0", "answer 1", "answer 2"]
    assert provider.bill().realtime == 3


def test_an_expression_on_a_thread_of_polars_sends_nothing(provider: testing.Provider) -> None:
    # Elementwise functions run on Polars' own threads; there nobody could wait, or press Ctrl+C.
    def ask(column: pl.Series) -> pl.Series:
        return column.llm.generate(model=MODEL, mode="realtime")  # type: ignore[attr-defined, no-any-return]

    expr = pl.col("prompt").map_batches(ask, return_dtype=pl.String, is_elementwise=True)
    with pytest.raises(Exception, match=r"lf\.llm\.collect\(\)"):
        SAYING.lazy().select(expr).collect(engine="streaming")
    assert provider.log() == []
    asked(SAYING)
    assert SAYING.lazy().select(expr).collect(engine="streaming").height == 12


def test_a_driven_query_asks_verb_after_verb(provider: testing.Provider) -> None:
    second = pl.format("[[say:again {}]]", pl.col("response")).llm.generate(
        model=MODEL, mode="realtime", name="second", pushdown=True
    )
    lf = asked(SAYING.lazy()).with_columns(second).filter(pl.col("id") < 5)
    with pytest.raises(pllm.UnansweredInput, match=r"lf\.llm\.collect\(\)"):
        lf.collect()
    out = lf.llm.collect()
    assert out["second"].to_list() == [f"again answer {n}" for n in range(5)]
    assert provider.bill().realtime == 10


def test_nulls_and_duplicates_are_not_asked(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["[[say:a]]", None, "[[say:a]]"]})
    assert asked(frame)["response"].to_list() == ["a", None, "a"]
    assert provider.bill().realtime == 1


def test_typed_answers_come_in_realtime(provider: testing.Provider, model: str) -> None:
    frame = pl.DataFrame({"prompt": ["I have 7 apples.", "[[not_json]] I have 8 pears.", None]})
    schema = {"count": pl.Int64}
    with pytest.warns(pllm.LLMWarning, match="invalid_output"):
        out = asked(frame, model=model, schema=schema, retries_on_invalid=1)
    assert out["response"].struct.field("count").to_list() == [7, None, None]
    assert provider.bill().realtime == 3
    options = {"model": model, "mode": "realtime"}
    labelled = frame.head(1).llm.classify("prompt", ["spam", "ham"], **options)  # type: ignore[attr-defined]
    assert labelled["label"].dtype == pl.Enum(["spam", "ham"])
    assert labelled["label"].null_count() == 0


def test_costs_are_those_of_realtime(provider: testing.Provider) -> None:
    priced = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4))
    out = asked(SAYING, model=priced, output="full").unnest("response")
    assert out["cost_usd"].sum() == pytest.approx(provider.bill().cost_usd)
    batch = SAYING.llm.generate("prompt", model=priced, sample=1, output="full", on_pending="wait")
    assert batch.unnest("response")["cost_usd"].sum() == pytest.approx(provider.bill().cost_usd / 3)


def test_a_limit_on_money_is_checked_at_the_price_of_realtime(provider: testing.Provider) -> None:
    priced = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4))
    options = {"model": priced, "max_tokens": 50}
    live = SAYING.llm.estimate("prompt", mode="realtime", **options)  # type: ignore[attr-defined]
    batch = SAYING.llm.estimate("prompt", **options)  # type: ignore[attr-defined]
    assert live["cost_usd_max"].item() > 1.5 * batch["cost_usd_max"].item()
    assert live["batches"].item() == 0
    with pytest.raises(pllm.BudgetExceeded):
        asked(SAYING, max_cost=batch["cost_usd_max"].item(), **options)
    assert provider.log() == []
    check(provider, asked(SAYING, max_cost=live["cost_usd_max"].item(), **options))


def test_what_is_in_the_body_counts_against_the_limit(provider: testing.Provider) -> None:
    model = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=0))
    options = {"model": model, "mode": "realtime", "max_tokens": 1}
    plain = SAYING.llm.estimate("prompt", **options)  # type: ignore[attr-defined]
    more = SAYING.llm.estimate("prompt", params={"metadata": {"long": "x" * 400}}, **options)  # type: ignore[attr-defined]
    assert more["cost_usd_max"].item() >= plain["cost_usd_max"].item() + 12 * 400e-6


# --- faults


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 429},
        {"kind": "status", "status": 429, "retry_after": 0.1},
        {"kind": "status", "status": 503},
        {"kind": "status", "status": 529},
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 502, "html": True},
        {"kind": "drop"},
    ],
    ids=lambda f: f"{f['kind']}-{f.get('status', '')}{'-after' if 'retry_after' in f else ''}",
)
def test_storms_pass(provider: testing.Provider, model: str, fault: dict[str, Any]) -> None:
    provider.fault(operation=_ANSWERING, times=15, **fault)
    check(provider, asked(SAYING, model=model))


def test_a_failure_for_a_passing_reason_is_tried_three_times(provider: testing.Provider, model: str) -> None:
    frame = pl.DataFrame({"prompt": ["[[fail:500:2]] Iron rusts.", "[[fail:500]] Snow melts."]})
    with pytest.warns(pllm.LLMWarning, match="1 of 2 requests failed"):
        out = asked(frame, model=model, output="full").unnest("response")
    assert out["status"].to_list() == ["done", "failed"]
    assert len(provider.log()) == 6
    with pytest.warns(pllm.LLMWarning):
        asked(frame, model=model)
    assert len(provider.log()) == 6


def test_a_reply_that_is_lost_three_times_may_have_been_billed(
    provider: testing.Provider, model: str
) -> None:
    provider.fault("create-then-drop", operation=_ANSWERING, times=3)
    with pytest.warns(pllm.LLMWarning, match="may have billed those with connection_lost"):
        assert asked(SAYING.head(1), model=model)["response"].to_list() == [None]
    assert provider.bill().realtime == 3


def test_a_bad_request_fails_alone_and_once(provider: testing.Provider, model: str) -> None:
    frame = pl.DataFrame({"prompt": ["[[fail:400]] x", "[[say:fine]]"]})
    for _ in range(2):
        with pytest.warns(pllm.LLMWarning, match="1 of 2 requests failed"):
            assert asked(frame, model=model)["response"].to_list() == [None, "fine"]
    assert len(provider.log()) == 2


def test_slow_replies_are_waited_for(provider: testing.Provider, model: str) -> None:
    provider.fault("slow", operation=_ANSWERING, times=3, seconds=1.5)
    check(provider, asked(SAYING, model=model))


def test_a_reply_that_never_comes_is_asked_again(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polars_llm.backends.openai import OpenAIBatch

    monkeypatch.setattr(OpenAIBatch, "reply_timeout", 0.5)
    provider.fault("hold", operation=_ANSWERING, seconds=5)
    assert asked(SAYING)["response"].null_count() == 0


def test_a_wrong_key_stops_the_run_and_is_not_remembered(provider: testing.Provider, model: str) -> None:
    kind = pllm.OpenAI if model.startswith("openai") else pllm.Anthropic
    many = pl.DataFrame({"prompt": [said(n) for n in range(300)]})
    wrong = kind(model.partition("/")[2], api_key="sk-invalid-secret-1234567890")
    with pytest.raises(pllm.AccountError, match="401") as caught:
        asked(many, model=wrong, max_concurrency=4)
    assert "secret" not in str(caught.value)
    assert len(provider.log()) < 20
    asked(SAYING, model=model)
    assert provider.bill().realtime == 12


def test_one_refusal_for_the_account_stops_nothing_else(provider: testing.Provider) -> None:
    provider.fault("status", operation=_ANSWERING, status=403)
    with pytest.raises(pllm.AccountError):
        asked(SAYING)
    assert provider.bill().realtime == 11
    check(provider, asked(SAYING))


def test_a_wrong_address_says_so(provider: testing.Provider) -> None:
    lost = pllm.OpenAI("gpt-6-luna", base_url=f"{provider.url}/v2")
    with pytest.raises(pllm.AccountError, match="404"):
        asked(SAYING, model=lost)
    assert pllm.results().collect().is_empty()


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Realtime, "patience_unreachable", 0.3)
    nobody = pllm.OpenAI("m", base_url="http://127.0.0.1:9/v1", api_key="sk-x")
    with pytest.raises(pllm.ProviderError, match="run the same line again"):
        asked(SAYING, model=nobody)


def test_no_key_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pllm.AccountError, match="No API key"):
        asked(SAYING)
    assert pllm.jobs(open_only=True).is_empty()


def test_an_outage_stops_the_sending_and_is_survived(
    provider: testing.Provider, caplog: pytest.LogCaptureFixture
) -> None:
    many = pl.DataFrame({"id": range(200), "prompt": [said(n) for n in range(200)]})
    provider.fault("status", operation=_ANSWERING, status=500, after=40, times=16)
    out = asked(many, max_concurrency=8)
    assert out["response"].null_count() == 0
    assert provider.bill().realtime == 200
    assert "stopped sending" in caplog.text
    assert "going on" in caplog.text


def test_replies_that_cannot_be_read_stop_the_sending_by_that_name(
    provider: testing.Provider, caplog: pytest.LogCaptureFixture
) -> None:
    provider.fault("create-then-garbage", operation=_ANSWERING, times=6)
    out = asked(pl.DataFrame({"id": range(12), "prompt": [said(n) for n in range(12)]}), max_concurrency=6)
    assert out["response"].null_count() == 0
    assert "requests failed (unreadable_reply)" in caplog.text


def test_patience_ends(provider: testing.Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Realtime, "patience", 1.0)
    provider.fault("status", operation=_ANSWERING, status=503, times=None)
    with pytest.raises(pllm.ProviderError, match="503"):
        asked(SAYING)
    provider.clear_faults()
    check(provider, asked(SAYING))


def test_a_wait_for_longer_than_patience_is_not_begun(provider: testing.Provider) -> None:
    provider.fault("status", operation=_ANSWERING, status=429, retry_after=86_400, times=None)
    started = time.monotonic()
    with pytest.raises(pllm.ProviderError, match="429"):
        asked(SAYING)
    assert time.monotonic() - started < 20


def test_the_hosts_own_limits_are_kept(model: str) -> None:
    # 600 a minute: ten more every second. All at once would be refused after the first 600.
    with testing.provider(rpm=600) as provider:
        many = pl.DataFrame({"id": range(640), "prompt": [said(n) for n in range(640)]})
        out = asked(many, model=model, max_concurrency=16)
        assert out["response"].null_count() == 0
        refused = [seen for seen in provider.log() if seen.status == 429]
        assert len(refused) < 16


# --- interruptions

_CHILD = """
import polars as pl, polars_llm as pllm
prompts = [f"[[say:answer {n}]] Statement number {n}." for n in range(100)]
frame = pl.DataFrame({"id": range(100), "prompt": prompts})
try:
    frame.llm.generate("prompt", model="MODEL", mode="realtime", max_concurrency=4)
except KeyboardInterrupt as stop:
    print(*stop.__notes__)
"""


def _child(provider: testing.Provider, model: str, code: str = _CHILD) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code.replace("MODEL", model)],
        env={**os.environ, **provider.env},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for_answers(provider: testing.Provider, count: int) -> None:
    deadline = time.monotonic() + 60
    while provider.bill().realtime < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_it_goes_on_where_it_stopped(model: str, how: signal.Signals) -> None:
    with testing.provider(latency=0.2) as provider:
        child = _child(provider, model)
        _wait_for_answers(provider, 40)
        child.send_signal(how)
        told, _ = child.communicate(timeout=30)
        billed = provider.bill().realtime
        kept = pllm.results().collect().height
        # In flight, and what came in the last second.
        assert billed - kept <= 4 + (0 if how == signal.SIGINT else 4 * 5 + 8)
        assert (f"{kept} answers of 100 are kept" in told) == (how == signal.SIGINT)
        many = pl.DataFrame({"id": range(100), "prompt": [said(n) for n in range(100)]})
        out = asked(many, model=model)
        assert out["response"].to_list() == [f"answer {n}" for n in range(100)]
        # Those that were in flight when it was stopped may reach the bill after we looked.
        assert provider.bill().realtime <= 100 + (billed - kept) + 4


_LAZY = _CHILD.split("try:", maxsplit=1)[0] + (
    'frame.lazy().llm.generate("prompt", model="MODEL", mode="realtime", max_concurrency=4).collect()\n'
)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT")
def test_ctrl_c_in_a_plain_query_keeps_what_came(model: str) -> None:
    # Until the query has returned each call of Polars raises KeyboardInterrupt again.
    with testing.provider(latency=0.2) as provider:
        child = _child(provider, model, _LAZY)
        _wait_for_answers(provider, 40)
        child.send_signal(signal.SIGINT)
        told, _ = child.communicate(timeout=30)
        assert child.returncode == -signal.SIGINT
        kept = pllm.results().collect().height
        assert provider.bill().realtime - kept <= 4
        assert f"{kept} answers of 100 are kept" in told
        (job,) = pllm.jobs().to_dicts()
        assert (job["state"], job["done"]) == ("released", kept)


def test_it_works_where_a_loop_is_running(provider: testing.Provider) -> None:
    async def notebook() -> pl.DataFrame:
        return asked(SAYING)  # type: ignore[no-any-return]

    check(provider, asyncio.run(notebook()))


def test_two_threads_ask_each_request_once(provider: testing.Provider) -> None:
    outs: list[pl.DataFrame] = []

    def run() -> None:
        outs.append(asked(SAYING, on_pending="wait"))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 3
    for out in outs:
        check(provider, out)


def test_no_thread_and_no_connection_is_left(provider: testing.Provider) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(SAYING)
    assert [t.name for t in threading.enumerate() if "polars_llm" in t.name] == []


# --- arguments


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "now"},
        {"max_concurrency": 0},
        {"max_concurrency": True},
        {"max_concurrency": 2.5},
        {"mode": "batch", "max_concurrency": 5},
    ],
)
def test_what_cannot_be_is_refused_at_call(options: dict[str, Any]) -> None:
    with pytest.raises(pllm.InvalidRequest, match="Nothing was sent"):
        asked(FRAME.lazy(), **options)
