"""Runs of a live backend: what is kept, what is free again, who asks, and how often."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends import realtime
from polars_llm.backends.realtime import Realtime
from polars_llm.jobs import live
from polars_llm.jobs.lookup import prefixes
from polars_llm.store import open_store
from tests.conftest import MODEL

COUNT = 60
FRAME = pl.DataFrame({"prompt": [f"[[say:answer {n}]] Statement number {n}." for n in range(COUNT)]})
ANSWERS = [f"answer {n}" for n in range(COUNT)]
_ANSWERING = "chat.completions.create"

_CHILD = """
import polars as pl, polars_llm as pllm
frame = pl.DataFrame({"prompt": [f"[[say:answer {n}]] Statement number {n}." for n in range(60)]})
out = frame.llm.generate("prompt", model="MODEL", mode="realtime", max_concurrency=4, on_pending="wait")
assert out["response"].to_list() == [f"answer {n}" for n in range(60)]
""".replace("MODEL", MODEL)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Realtime, "first_backoff", 0.02)


@pytest.fixture
def provider() -> Iterator[testing.Provider]:
    with testing.provider(latency=0.1) as running:
        yield running


def asked(**options: Any) -> pl.DataFrame:
    return FRAME.llm.generate("prompt", **{"model": MODEL, "mode": "realtime", **options})


def child(provider: testing.Provider) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", _CHILD], env={**os.environ, **provider.env}, cwd=root)


def wait_for(provider: testing.Provider, count: int) -> None:
    deadline = time.monotonic() + 60
    while provider.bill().realtime < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def states() -> list[str]:
    return sorted(pllm.jobs()["state"].to_list())


def test_a_run_is_one_job_that_ends_ingested(provider: testing.Provider) -> None:
    assert asked()["response"].to_list() == ANSWERS
    (job,) = pllm.jobs().to_dicts()
    assert (job["state"], job["requests"], job["done"], job["failed"]) == ("ingested", COUNT, COUNT, 0)
    store = open_store()
    assert list(store.directory.spool.iterdir()) == []
    assert pllm.results().collect()["job_id"].unique().to_list() == [job["job"]]


def test_killed_its_answers_are_kept_and_the_rest_is_free_at_once(provider: testing.Provider) -> None:
    running = child(provider)
    wait_for(provider, 50)
    running.kill()
    running.wait()
    kept = pllm.results().collect().height
    assert kept > 0
    assert states() == ["running"]
    started = time.monotonic()
    assert asked()["response"].to_list() == ANSWERS
    assert time.monotonic() - started < 10
    assert states() == ["ingested", "released"]
    released = pllm.jobs().filter(state="released")
    assert "its process stopped" in released["reason"].item()


def test_while_one_asks_another_waits_and_pays_nothing(provider: testing.Provider) -> None:
    running = child(provider)
    wait_for(provider, 1)
    with pytest.raises(pllm.JobsPending, match="in 1 job, "):
        asked()
    assert asked(on_pending="wait")["response"].to_list() == ANSWERS
    assert running.wait(30) == 0
    assert provider.bill().realtime == COUNT
    assert provider.bill().duplicate_bodies == {}


def test_two_processes_ask_each_request_once(provider: testing.Provider) -> None:
    both = [child(provider) for _ in range(2)]
    assert [one.wait(60) for one in both] == [0, 0]
    assert provider.bill().realtime == COUNT
    assert provider.bill().duplicate_bodies == {}


def test_one_that_waits_takes_over_from_one_that_was_killed(provider: testing.Provider) -> None:
    both = [child(provider) for _ in range(2)]
    wait_for(provider, 30)
    store = open_store()
    (job,) = store.ledger.jobs(open_only=True)
    assert job.owner is not None
    # Which of the two is at work cannot be seen; either way the other one ends it.
    both[0].kill()
    both[0].wait()
    assert both[1].wait(60) == 0
    assert asked()["response"].to_list() == ANSWERS
    assert states()[0] == "ingested"


def test_killed_at_its_first_request_everything_is_free(provider: testing.Provider) -> None:
    provider.fault("kill", operation=_ANSWERING)
    assert child(provider).wait(30) == -signal.SIGKILL
    assert states() == ["running"]
    assert asked()["response"].to_list() == ANSWERS
    assert states() == ["ingested", "released"]


def test_ctrl_c_keeps_what_came_and_says_so(provider: testing.Provider) -> None:
    code = _CHILD.replace("out = ", "try:\n    out = ").split("assert")[0]
    code += "except KeyboardInterrupt as stop:\n    print(*stop.__notes__)\n"
    root = Path(__file__).parents[2]
    running = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **provider.env},
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(provider, 20)
    running.send_signal(signal.SIGINT)
    told, _ = running.communicate(timeout=30)
    kept = pllm.results().collect().height
    assert f"{kept} answers of {COUNT} are kept" in told
    (job,) = pllm.jobs().to_dicts()
    assert (job["state"], job["done"]) == ("released", kept)
    assert f"{COUNT - kept} requests unanswered" in job["reason"]


def test_attempts_are_counted_over_evaluations(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["[[fail:500]] never"]})
    with pytest.warns(pllm.LLMWarning):
        frame.llm.generate("prompt", model=MODEL, mode="realtime")
    assert len(provider.log()) == 3
    store = open_store()
    found = store.results.find(prefixes(store.results.scan().select("key").collect()))
    assert found["attempt"].to_list() == [3]
    # Asked for by name, it is one more try.
    with pytest.warns(pllm.LLMWarning):
        frame.llm.generate("prompt", model=MODEL, mode="realtime", retry_failed=True)
    assert len(provider.log()) == 4
    with pytest.warns(pllm.LLMWarning):
        frame.llm.generate("prompt", model=MODEL, on_pending="wait")
    assert provider.bill().batches == 0


def test_refusals_for_the_account_are_not_remembered(provider: testing.Provider) -> None:
    provider.fault("status", operation=_ANSWERING, status=402, times=None)
    with pytest.raises(pllm.AccountError, match="402"):
        asked()
    assert pllm.results().collect().is_empty()
    assert states() == ["released"]
    provider.clear_faults()
    assert asked()["response"].to_list() == ANSWERS
    assert provider.bill().realtime == COUNT


def test_an_answer_that_cannot_be_kept_ends_the_run(provider: testing.Provider) -> None:
    held = provider.fault("hold", operation=_ANSWERING, after=10, seconds=30)
    results = open_store().directory.results

    def take_the_directory_away() -> None:
        assert provider.held(held, seconds=30) == 1
        results.rename(results.with_name("aside"))
        results.write_text("a file where a directory is needed")
        provider.release(held)

    thread = threading.Thread(target=take_the_directory_away)
    thread.start()
    with pytest.raises(pllm.CacheError, match="Hint:"):
        asked(max_concurrency=4)
    thread.join()
    results.unlink()
    results.with_name("aside").rename(results)
    assert asked()["response"].to_list() == ANSWERS
    assert "released" in states()


def test_a_long_run_is_noted_in_the_ledger_and_tidied(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_NOTE_EVERY", 0.0)
    monkeypatch.setattr(live, "_COMPACT_EVERY", 0.0)
    monkeypatch.setattr(realtime, "_BLOCK_REPLIES", 5)
    assert asked(max_concurrency=5)["response"].to_list() == ANSWERS
    (job,) = pllm.jobs().to_dicts()
    assert job["done"] == COUNT
