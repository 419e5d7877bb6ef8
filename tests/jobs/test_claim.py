"""Claims beside other claims: each request once, and nobody waits for a thread that waits for him."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import operate, testing
from polars_llm.job import Job, State
from polars_llm.jobs import claim
from polars_llm.store import open_store

MODEL = "openai/gpt-6-luna"


def ask(*texts: str, **options: Any) -> pl.DataFrame:
    options = {"on_pending": "null", "model": MODEL, **options}
    return pl.DataFrame({"text": texts}).llm.generate("text", **options)


def abandoned(text: str) -> None:
    """Sent, and given up by its user while the batch goes on."""
    ask(text)
    (job,) = pllm.jobs()["job"]
    pllm.abandon(job)


def elsewhere(call: Callable[[], object]) -> None:
    """Call it on another thread; it has to come back soon."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


@pytest.fixture
def between(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[int]]:
    """Something happens after a claim has looked up for the first time; counts how often it looks."""

    def install(call: Callable[[], object]) -> list[int]:
        looks: list[int] = []
        look = claim._taken

        def taken(*arguments: Any) -> pl.Series:
            looks.append(len(looks))
            found = look(*arguments)
            if len(looks) == 1:
                elsewhere(call)
            return found

        monkeypatch.setattr(claim, "_taken", taken)
        return looks

    return install


def test_nothing_is_looked_up_inside_of_the_transaction(
    provider: testing.Provider, between: Callable[[Callable[[], object]], list[int]]
) -> None:
    looks = between(lambda: open_store().ledger.put_fact("meanwhile", True))
    ask("a", "b", on_pending="wait")
    assert looks == [0]
    assert open_store().ledger.get_fact("meanwhile")


def test_what_another_claims_meanwhile_is_left_to_him(
    provider: testing.Provider, between: Callable[[Callable[[], object]], list[int]]
) -> None:
    between(lambda: ask("b", "c"))
    assert ask("a", "b", on_pending="wait")["response"].to_list() == ["a", "b"]
    ask("c", on_pending="wait")
    assert provider.bill().billed == 3
    assert len(provider.batches()) == 2


def test_what_another_is_answered_meanwhile_is_not_asked_again(
    provider: testing.Provider, between: Callable[[Callable[[], object]], list[int]]
) -> None:
    between(lambda: ask("b", "c", on_pending="wait"))
    assert ask("a", "b", on_pending="wait")["response"].to_list() == ["a", "b"]
    assert provider.bill().billed == 3


def test_other_claims_do_not_make_it_look_again(
    provider: testing.Provider, between: Callable[[Callable[[], object]], list[int]]
) -> None:
    looks = between(lambda: ask("c", "d"))
    ask("a", "b")
    assert looks.count(1) == 1  # the one that came between looked once, and so did this one
    assert len(looks) == 2
    assert len(provider.batches()) == 2


def test_a_budget_is_checked_again_after_another_claim(
    provider: testing.Provider, between: Callable[[Callable[[], object]], list[int]]
) -> None:
    options: dict[str, Any] = {
        "model": pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4)),
        "max_tokens": 60,
    }
    most = pl.DataFrame({"text": ["a"]}).llm.estimate("text", **options)["cost_usd_max"].item()
    with pllm.Config(max_cost=2.5 * most):
        ask("a", **options)
        between(lambda: ask("b", **options))
        with pytest.raises(pllm.BudgetExceeded):
            ask("c", **options)
    assert len(provider.batches()) == 2


def test_where_others_claim_all_the_time_they_wait(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = claim._taken
    seen: list[int] = []

    def taken(*arguments: Any) -> pl.Series:
        seen.append(len(seen))
        return look(*arguments)

    monkeypatch.setattr(claim, "_still_holds", lambda *_: len(seen) > claim._MOST_LOOKS)

    monkeypatch.setattr(claim, "_taken", taken)
    assert ask("a", on_pending="wait")["response"].to_list() == ["a"]
    assert len(seen) == claim._MOST_LOOKS + 1
    assert provider.bill().billed == 1


def test_a_job_that_recover_opens_again_meanwhile_keeps_its_requests(
    between: Callable[[Callable[[], object]], list[int]],
) -> None:
    """Its record is there already: there are no more of them, and yet its requests are taken."""
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        abandoned("a")
        between(lambda: pllm.recover("openai"))
        ask("a", "b")
        assert pllm.jobs(open_only=True)["requests"].to_list() == [1, 1]
        assert len(provider.batches()) == 2
        provider.finish()
        assert ask("a", "b", on_pending="wait")["response"].to_list() == ["a", "b"]
        assert provider.bill().billed == 2


def test_what_came_back_and_was_answered_meanwhile_is_not_asked_again(
    between: Callable[[Callable[[], object]], list[int]],
) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        abandoned("a")

        def recovered() -> None:
            pllm.recover("openai")
            provider.finish()
            operate.watch()

        between(recovered)
        assert ask("a")["response"].to_list() == ["a"]
        assert len(provider.batches()) == 1


def test_what_recover_reads_back_meanwhile_is_not_asked_again(
    provider: testing.Provider,
    between: Callable[[Callable[[], object]], list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask("a", on_pending="wait")
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "after the loss"))
    between(lambda: pllm.recover("openai"))
    assert ask("a", "b", on_pending="wait")["response"].to_list() == ["a", "b"]
    assert provider.bill().duplicates == {}
    assert provider.bill().billed == 2


def test_what_another_claims_meanwhile_does_not_count_twice_against_a_budget(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same frame on two threads: the one that comes second has nothing to send, so nothing to refuse."""
    options: dict[str, Any] = {
        "model": pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4)),
        "max_tokens": 60,
    }
    most = pl.DataFrame({"text": ["a"]}).llm.estimate("text", **options)["cost_usd_max"].item()
    check = claim._check_budget
    checks: list[int] = []

    def checked(*arguments: Any) -> None:
        checks.append(len(checks))
        if len(checks) == 1:
            elsewhere(lambda: ask("a", **options))
        check(*arguments)

    monkeypatch.setattr(claim, "_check_budget", checked)
    with pllm.Config(max_cost=1.5 * most):
        ask("a", **options)
        assert ask("a", on_pending="wait", **options)["response"].to_list() == ["a"]
    assert len(provider.batches()) == 1


def test_a_claim_ends_where_other_jobs_come_faster_than_they_are_listed(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = open_store().ledger
    listed = type(ledger).jobs

    def jobs(self: Any, *, open_only: bool = False) -> list[Job]:
        found = listed(self, open_only=open_only)
        elsewhere_job = Job.plan(
            provider="openai", base_url=None, endpoint="/v1", model="m", requests=1, mode="realtime"
        )
        if not self._here().local.writing:
            self.put(dataclasses.replace(elsewhere_job, state=State.INGESTED))
        return found

    monkeypatch.setattr(type(ledger), "jobs", jobs)
    elsewhere(lambda: ask("a"))
    assert len(provider.batches()) == 1


@pytest.mark.parametrize("mode", ["batch", "realtime"])
def test_nothing_is_sent_on_top_of_a_claim_that_holds_the_ledger(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """The eleventh look is inside of the transaction: what Polars runs on top of it would not be durable."""
    refused: list[pllm.CacheError] = []
    look = claim._taken

    def taken(*arguments: Any) -> pl.Series:
        if not refused:
            with pytest.raises(pllm.CacheError, match="on top of another evaluation") as caught:
                ask("b", mode=mode)
            refused.append(caught.value)
        return look(*arguments)

    monkeypatch.setattr(claim, "_MOST_LOOKS", 0)
    monkeypatch.setattr(claim, "_taken", taken)
    assert ask("a", mode=mode, on_pending="wait")["response"].to_list() == ["a"]
    assert provider.bill().billed == 1
    assert ask("b", mode=mode, on_pending="wait")["response"].to_list() == ["b"]
    assert provider.bill().billed == 2


# Threads of Polars that waited for the ledger, held by a thread that waited for Polars, stood still for a
# minute and more.
_BESIDE = """
import threading, warnings
import polars as pl, polars_llm

def frames(n):
    for turn in range(6):
        texts = pl.DataFrame({"c": [f"frame {n} {turn} {row}" for row in range(200)]})
        texts.llm.generate("c", model="openai/gpt-6-luna", on_pending="null")

def side_by_side(n):
    for turn in range(12):
        names = [f"c{i}" for i in range(3)]
        texts = pl.DataFrame({name: [f"{name} {n} {turn} {row}" for row in range(200)] for name in names})
        texts.select(
            pl.col(name).llm.generate(model="openai/gpt-6-luna", on_pending="null").alias(name)
            for name in names
        )

threads = [threading.Thread(target=work, args=(n,)) for n in range(2) for work in (frames, side_by_side)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done")
"""


def test_a_frame_and_expressions_side_by_side_on_several_threads(provider: testing.Provider) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _BESIDE],
        env={**os.environ, "POLARS_MAX_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == ("done\n", "")
    assert not provider.bill().duplicates
