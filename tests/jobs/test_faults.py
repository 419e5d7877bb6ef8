"""The job's life under faults, on both protocols: bill / need is one, answers on their rows.

Assumption: the provider's list of batches lags at most as long as the quiet period.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.base import Limits
from polars_llm.backends.openai import OpenAIBatch
from tests.conftest import MODEL

PROMPTS = [f"Statement number {n} is about thing {n}." for n in range(8)]
FRAME = pl.DataFrame({"id": range(8), "prompt": PROMPTS})


MODELS = [MODEL, "anthropic/claude-haiku-5-5"]


@pytest.fixture(autouse=True)
def short_create_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIBatch, "create_timeout", 0.5)
    monkeypatch.setattr(AnthropicBatch, "create_timeout", 0.5)


@pytest.fixture(params=MODELS, ids=["openai", "anthropic"])
def model(request: pytest.FixtureRequest) -> str:
    """Tests that ask for it run on both protocols."""
    return str(request.param)


def collected(**options: Any) -> pl.DataFrame:
    return FRAME.llm.generate("prompt", **{"model": MODEL, "on_pending": "wait", **options})


def check(provider: testing.Provider, out: pl.DataFrame) -> None:
    """Every answer on its row, every request billed once; and what was to go wrong did."""
    assert [fault["kind"] for fault in provider.faults() if not fault["struck"]] == []
    assert out["response"].to_list() == PROMPTS
    bill = provider.bill()
    assert bill.billed == len(PROMPTS)
    assert bill.duplicates == {}


@pytest.mark.parametrize("fault", ["create-then-500", "create-then-drop", "create-then-garbage"])
def test_a_reply_lost_after_create_is_one_batch(model: str, provider: testing.Provider, fault: str) -> None:
    provider.fault(fault)
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@pytest.mark.parametrize("fault", ["create-then-500", "create-then-drop"])
def test_a_lost_reply_is_settled_although_the_list_lags(
    model: str, provider: testing.Provider, fault: str
) -> None:
    provider.fault("list-lag", seconds=0.4)
    provider.fault(fault)
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


def test_a_create_that_never_was_is_sent_again_after_the_quiet_period(
    model: str, provider: testing.Provider
) -> None:
    provider.fault("drop", operation="*batches.create")
    started = time.monotonic()
    check(provider, collected(model=model))
    assert time.monotonic() - started > 0.7  # create timeout and quiet period
    released = pllm.jobs().filter(state="released")
    assert released["reason"].to_list() == ["the provider never had this batch"]


def test_an_undecided_job_stays_pending_and_says_why(
    model: str, provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "60")
    provider.fault("drop", operation="*batches.create")
    with pytest.raises(pllm.JobsPending, match="unknown"):
        collected(model=model, on_pending="raise")
    with pytest.raises(pllm.JobsPending):
        collected(model=model, on_pending="raise")
    assert provider.bill().accepted == 0


def test_a_server_error_without_a_batch_is_not_paid_twice(model: str, provider: testing.Provider) -> None:
    provider.fault("status", operation="*batches.create", status=503)
    check(provider, collected(model=model))


def test_a_lost_reply_and_a_list_that_cannot_be_read(
    model: str, provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.fault("create-then-500")
    provider.fault(
        "status", operation="*batches.list", after=int(model != MODEL), status=529, retry_after=0, times=5
    )
    with pytest.raises(pllm.JobsPending, match="unknown"):
        collected(model=model, on_pending="raise")
    provider.fault("status", operation="*batches.list", status=401)
    with pytest.raises(pllm.AccountError, match="looking at job_"):
        collected(model=model, on_pending="raise")
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@pytest.mark.parametrize("retry_after", [None, 0])
def test_a_full_queue_on_create_is_tried_again_later(provider: testing.Provider, retry_after: Any) -> None:
    provider.fault("status", operation="*batches.create", status=429, retry_after=retry_after, times=2)
    check(provider, collected())
    assert provider.bill().files == 1


def test_a_refused_create_frees_the_keys(model: str, provider: testing.Provider) -> None:
    provider.fault("status", operation="*batches.create", status=400)
    with pytest.raises(pllm.ProviderError, match="400"):
        collected(model=model)
    check(provider, collected(model=model))


@pytest.mark.parametrize(
    "operation", ["files.create", "files.content", "batches.retrieve", "batches.list", "files.retrieve"]
)
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 429, "retry_after": 0}, {"status": 529}])
def test_storms_pass(provider: testing.Provider, operation: str, fault: dict[str, Any]) -> None:
    if operation in {"batches.list", "files.retrieve"}:
        provider.fault("create-then-500")  # only then is the list read
    provider.fault("status", operation=operation, times=2, **fault)
    check(provider, collected())


@pytest.mark.parametrize("operation", ["*batches.retrieve", "*batches.results", "*batches.list"])
@pytest.mark.parametrize("fault", ["status", "drop"])
def test_storms_pass_on_anthropic(provider: testing.Provider, operation: str, fault: str) -> None:
    provider.fault("create-then-500")
    options = {"status": 529, "retry_after": 0} if fault == "status" else {}
    provider.fault(fault, operation=operation, times=2, **options)
    check(provider, collected(model=MODELS[1]))


@pytest.mark.parametrize("operation", ["files.create", "files.content", "batches.retrieve"])
def test_dropped_connections_pass(provider: testing.Provider, operation: str) -> None:
    provider.fault("drop", operation=operation, times=2)
    check(provider, collected())


def test_a_long_retry_after_is_not_obeyed_for_hours(model: str, provider: testing.Provider) -> None:
    provider.fault("status", operation="*batches.retrieve", status=429, retry_after=86_400, times=1)
    started = time.monotonic()
    check(provider, collected(model=model))
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("fault", ["expire", "cancel"])
@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_half_done_batches_keep_what_was_paid(
    model: str, provider: testing.Provider, fault: str, fraction: float
) -> None:
    provider.fault(fault, fraction=fraction)
    check(provider, collected(model=model))
    assert provider.bill().batches == 2
    assert provider.bill().accepted == 8 + round(8 * (1 - fraction))


@pytest.mark.parametrize("fault", ["expire", "cancel"])
@pytest.mark.parametrize("sparse", [False, True])
def test_half_done_batches_are_read_whole(
    model: str, provider: testing.Provider, fault: str, sparse: bool
) -> None:
    provider.fault(fault, fraction=0.5)
    provider.fault("truncate", framing="close", share=0.3)
    if sparse:
        provider.fault("sparse", times=None)
    check(provider, collected(model=model))
    assert provider.bill().batches == 2


def test_lines_of_another_job_do_not_stand_for_answers_that_are_missing(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provider counts four answers; two came, and two of somebody who uses this library as well."""
    real = OpenAIBatch.parse

    def with_others(*arguments: Any) -> pl.DataFrame:
        found = real(*arguments)
        theirs = found.with_columns(pl.Series("key", [bytes(key)[::-1] for key in found["key"]], pl.Binary))
        return pl.concat([theirs, found])

    monkeypatch.setattr(OpenAIBatch, "parse", with_others)
    provider.fault("expire", fraction=0.5)
    provider.fault("truncate", framing="close", share=0.6)
    check(provider, collected())
    assert provider.bill().batches == 2


def test_answers_of_a_half_done_batch_that_never_come_are_not_paid_again(provider: testing.Provider) -> None:
    provider.fault("expire", fraction=0.75)
    # Lines of the answers: those of the requests that never ran are in the other file.
    provider.fault("missing-lines", count=5, operation="files.content", times=None)
    with pytest.warns(pllm.LLMWarning, match="missing_result 7"):
        out = collected()
    assert out["response"].null_count() == 7
    assert provider.bill().batches == 1


def test_a_refused_batch_is_not_taken_for_the_one_that_was_lost(provider: testing.Provider) -> None:
    """The queue was full; the second try is made, but its reply is lost and the list lags."""
    provider.fault("token-limit")
    for _ in range(2):
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
    assert pllm.jobs()["state"].to_list() == ["deferred"]
    provider.fault("list-lag", seconds=0.4)
    provider.fault("create-then-500")
    check(provider, collected())
    assert provider.bill().batches == 2


def test_batches_that_always_expire_end_as_failures(model: str, provider: testing.Provider) -> None:
    provider.fault("expire", fraction=0.0, times=None)
    with pytest.warns(pllm.LLMWarning, match="expired 8"):
        out = collected(model=model)
    assert out["response"].null_count() == 8
    assert provider.bill().batches == 3


def test_a_batch_that_fails_validation_is_tried_again_then_fails_with_its_reason(
    provider: testing.Provider,
) -> None:
    provider.fault("fail", times=1)
    check(provider, collected())
    provider.fault("fail", times=None, message="no such luck")
    with pytest.warns(pllm.LLMWarning, match="batch_refused 8"):
        out = collected(sample=1, output="full")
    assert out["response"].struct.field("error").str.contains("no such luck").all()


def test_a_refusal_of_the_account_is_not_remembered(provider: testing.Provider) -> None:
    provider.fault("fail", code="billing_hard_limit_reached", message="pay first", times=1)
    with pytest.raises(pllm.AccountError, match="pay first"):
        collected()
    check(provider, collected())


def test_the_token_limit_waits_and_sends_the_same_file(provider: testing.Provider) -> None:
    provider.fault("token-limit", times=2)
    check(provider, collected())
    assert provider.bill().files == 1
    assert provider.bill().batches == 3


def test_several_batches_go_one_after_another_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIBatch, "limits", Limits(requests=2, size_bytes=10_000))
    echo = testing.provider(
        model=lambda request: request.prompt, batch_seconds=0.1, limits={"openai_enqueued_tokens": 250}
    )
    with echo as provider:
        check(provider, collected())


def test_more_batches_than_an_hour_takes_are_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIBatch, "limits", Limits(requests=4, size_bytes=10_000))
    echo = testing.provider(model=lambda request: request.prompt, limits={"openai_batches_per_hour": 1})
    with echo as provider:
        for _ in range(2):
            with pytest.raises(pllm.JobsPending, match=r"deferred: .*per hour"):
                collected(on_pending="raise")
        assert sorted(pllm.jobs()["state"]) == ["deferred", "ingested"]
        bill = provider.bill()
        assert (bill.batches, bill.files, bill.billed, bill.duplicates) == (1, 2, 4, {})


DIRT: list[tuple[str, dict[str, Any]]] = [
    ("truncate", {"framing": "chunked"}),
    ("truncate", {"framing": "close"}),
    ("crlf", {}),
    ("blank-lines", {}),
    ("duplicate-lines", {}),
    ("foreign-ids", {}),
    ("raw-separators", {}),
    ("lone-surrogates", {}),
    ("string-body", {}),
    ("garbage-line", {}),
    ("no-final-newline", {}),
    ("missing-lines", {"count": 2}),
]


@pytest.mark.parametrize(("fault", "options"), DIRT, ids=lambda value: str(value))
def test_dirty_downloads(model: str, provider: testing.Provider, fault: str, options: dict[str, Any]) -> None:
    provider.fault(fault, times=1, **options)
    if fault == "raw-separators":
        out = collected(model=model)
        assert out["response"].null_count() == 0
        assert provider.bill().billed == len(PROMPTS)
        return
    if fault == "lone-surrogates":
        assert collected(model=model)["response"].to_list() == [f"{prompt}\ufffd" for prompt in PROMPTS]
        assert provider.bill().billed == len(PROMPTS)
        return
    check(provider, collected(model=model))


def test_a_line_that_never_comes_is_a_visible_failure_and_not_paid_again(
    model: str, provider: testing.Provider
) -> None:
    provider.fault("missing-lines", count=1, times=None)
    with pytest.warns(pllm.LLMWarning, match="missing_result 1"):
        out = collected(model=model)
    assert out["response"].null_count() == 1
    with pytest.warns(pllm.LLMWarning):
        collected(model=model)
    assert provider.bill().accepted == 8


def test_results_that_are_gone_are_a_failure_and_not_paid_again(provider: testing.Provider) -> None:
    provider.fault("gone", times=None)
    with pytest.warns(pllm.LLMWarning, match="results_gone 8"):
        collected()
    assert provider.bill().accepted == 8
    provider.clear_faults()
    pllm.recover("openai")  # they were there after all: success beats failure
    check(provider, collected())


def test_an_unknown_batch_id_is_never_a_reason_to_send_again(model: str, provider: testing.Provider) -> None:
    with pytest.raises(pllm.JobsPending):
        collected(model=model, on_pending="raise")
    provider.fault("not-found", times=2)
    for _ in range(2):
        with pytest.raises(pllm.JobsPending, match="does not know"):
            collected(model=model, on_pending="raise")
    check(provider, collected(model=model))


@pytest.mark.parametrize("fault", ["sparse", "odd-status"])
def test_odd_views_of_a_batch(model: str, provider: testing.Provider, fault: str) -> None:
    provider.fault(fault, times=2)
    check(provider, collected(model=model))


def test_another_account_neither_sees_nor_repeats_the_job(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with testing.provider(model=lambda request: request.prompt, scoped=True) as provider:
        with pytest.raises(pllm.JobsPending):
            collected(model=model, on_pending="raise")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-else")
        monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-somebody-else")
        with pytest.raises(pllm.JobsPending, match="does not know"):
            collected(model=model, on_pending="raise")
        assert provider.bill().accepted == 8


def test_a_clock_that_went_back_does_not_defer_for_days(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider.fault("token-limit")
    for _ in range(2):
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
    assert pllm.jobs()["state"].to_list() == ["deferred"]
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 2 * 86_400)
    check(provider, collected())


# --- processes ----------------------------------------------------------------------------------

CHILD = f"""
import sys
import polars as pl, polars_llm as pllm
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.openai import OpenAIBatch
AnthropicBatch.create_timeout = OpenAIBatch.create_timeout = float(sys.argv[2])
frame = pl.DataFrame({{"prompt": {PROMPTS!r}}})
print(frame.llm.generate("prompt", model=sys.argv[1], on_pending="wait")["response"].null_count())
"""


def child(model: str = MODEL, create_timeout: float = 0.5) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, model, str(create_timeout)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)


def test_a_submitter_killed_after_create_is_taken_over(model: str, provider: testing.Provider) -> None:
    held = provider.fault("create-then-hold", seconds=30)
    victim = child(model, create_timeout=30)
    assert provider.held(held, seconds=20) == 1
    with pytest.raises(pllm.JobsPending):  # its submitter is alive: nobody touches the job
        collected(model=model, on_pending="raise")
    assert pllm.jobs()["state"].to_list() == ["creating"]
    victim.kill()
    victim.communicate()
    provider.release(held)
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


def test_the_quiet_period_counts_from_the_first_look_at_a_dead_submitter(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It had called create long ago, but the call was held up; the batch is quite new, and the list lags.
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "1")
    pllm.recover("openai")  # imports the SDK, so that the first look comes at once
    provider.fault("list-lag", seconds=0.8)
    held = provider.fault("hold", operation="*batches.create")
    victim = child(create_timeout=60)
    assert provider.held(held, seconds=20) == 1
    time.sleep(2.0)
    provider.release(held)
    while not provider.batches():
        time.sleep(0.005)
    victim.kill()
    victim.communicate()
    check(provider, collected())
    assert provider.bill().batches == 1


def test_many_processes_on_one_frame_make_one_job(model: str) -> None:
    with testing.provider(model=lambda request: request.prompt, batch_seconds=0.5) as provider:
        children = [child(model) for _ in range(4)]
        assert [c.communicate(timeout=60)[0].strip() for c in children] == ["0"] * 4
        assert provider.bill().batches == 1
        check(provider, collected(model=model))


def test_many_threads_on_one_frame_make_one_job(model: str, provider: testing.Provider) -> None:
    with ThreadPoolExecutor(6) as pool:
        for out in pool.map(lambda _: collected(model=model), range(6)):
            check(provider, out)
    assert provider.bill().batches == 1


def test_interrupted_while_submitting(provider: testing.Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    real = OpenAIBatch.create

    def interrupted(self: OpenAIBatch, job: Any, path: Path) -> str:
        real(self, job, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(OpenAIBatch, "create", interrupted)
        with pytest.raises(KeyboardInterrupt):
            collected()
    check(provider, collected())
    assert provider.bill().batches == 1


def test_interrupted_while_waiting_names_the_jobs(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt) as stop:
            collected(model=model)
        assert time.monotonic() - started < 3
        assert "job_" in stop.value.__notes__[0]
        provider.finish()
        check(provider, collected(model=model))


def test_evaluations_under_random_faults_bill_once(provider: testing.Provider) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    kinds = [
        "create-then-500",
        "create-then-drop",
        "truncate",
        "duplicate-lines",
        "crlf",
        "expire",
        "token-limit",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sample in range(12):
            for kind in dice.sample(kinds, 2):
                provider.fault(kind)
            out = collected(sample=sample)
            assert out["response"].to_list() == PROMPTS, f"seed {seed}"
    bill = provider.bill()
    assert bill.billed == 12 * len(PROMPTS), f"seed {seed}"
    assert bill.duplicates == {}, f"seed {seed}"
