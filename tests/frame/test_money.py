"""What things cost before they are sent: `estimate`, `max_cost` and the budget of the cache."""

from __future__ import annotations

import dataclasses
import datetime
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import polars as pl
import pytest
from genai_prices.data import providers
from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import polars_llm as pllm
from polars_llm import testing

# The local provider bills 1 USD a million input tokens and 4 a million output tokens, half in batches.
PRICES = pllm.Prices(input=1, output=4)
MODEL = pllm.OpenAI("gpt-6-luna", prices=PRICES)


def frame(rows: int = 40) -> pl.DataFrame:
    texts = [f"Statement number {n}. {'It goes on. ' * (n % 7)}" for n in range(rows)]
    return pl.DataFrame({"text": [*texts, None, texts[0]]})


def asked(df: Any, **options: Any) -> Any:
    return df.llm.generate("text", **{"model": MODEL, "max_tokens": 50, **options})


def estimated(df: Any, **options: Any) -> dict[str, Any]:
    row: dict[str, Any] = df.llm.estimate("text", **{"model": MODEL, "max_tokens": 50, **options}).row(
        0, named=True
    )
    return row


@pytest.mark.parametrize("lazy", [False, True])
def test_the_estimate_counts_what_an_evaluation_would_send(provider: testing.Provider, lazy: bool) -> None:
    df = frame().lazy() if lazy else frame()
    before = estimated(df)
    assert [before[name] for name in ("rows", "nulls", "unique", "to_send")] == [42, 1, 40, 40]
    assert [before[name] for name in ("cached", "in_flight", "failed")] == [0, 0, 0]
    assert before["batches"] == 1
    assert before["output_tokens_max"] == 40 * 50
    assert provider.log() == []
    asked(frame().head(10), on_pending="wait")
    after = estimated(df)
    assert (after["cached"], after["to_send"]) == (10, 30)
    assert after["input_tokens_method"] == "10 answers of this column"


def test_in_flight_and_failed(own_cache: Any) -> None:
    with testing.provider(auto=False) as provider:
        with pytest.raises(pllm.JobsPending):
            asked(frame(4))
        row = estimated(frame(5))
        assert (row["cached"], row["in_flight"], row["to_send"]) == (0, 4, 1)
        provider.finish()
        asked(frame(4))
        assert estimated(frame(5))["cached"] == 4
        bad = pl.DataFrame({"text": ["[[fail:400]] no"]})
        with pytest.raises(pllm.JobsPending):
            asked(bad)
        provider.finish()
        with pytest.warns(pllm.LLMWarning):
            asked(bad)
        row = estimated(bad)
        assert (row["failed"], row["to_send"]) == (1, 0)
        assert estimated(bad, retry_failed=True)["to_send"] == 1


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 60), max_tokens=st.integers(1, 300))
def test_the_bound_holds(provider: testing.Provider, rows: int, max_tokens: int) -> None:
    provider.reset()
    df = frame(rows).with_columns(pl.format("{} {}", "text", pl.lit(max_tokens)))
    row = estimated(df, max_tokens=max_tokens)
    out = asked(df, max_tokens=max_tokens, on_pending="wait", output="full", name="r")
    paid = out.select(pl.col("r").struct.unnest()).unique("key")["cost_usd"].sum()
    bill = provider.bill()
    if row["to_send"] == rows:
        assert paid == pytest.approx(bill.cost_usd, rel=0.05)
    assert paid <= row["cost_usd_max"] or row["to_send"] < rows
    assert row["cost_usd"] <= row["cost_usd_max"]


def test_calibrated_on_what_was_answered(provider: testing.Provider) -> None:
    system = "Answer in one word. " * 20
    asked(frame(30), system=system, on_pending="wait")
    before = provider.bill()
    row = estimated(frame(60), system=system)
    asked(frame(60), system=system, on_pending="wait")
    spent = provider.bill()
    assert row["input_tokens"] == pytest.approx(spent.input_tokens - before.input_tokens, rel=0.1)
    assert row["cost_usd"] == pytest.approx(spent.cost_usd - before.cost_usd, rel=0.3)


def test_the_users_own_counter(provider: testing.Provider) -> None:
    row = estimated(frame(3), count_tokens=lambda text: len(text.split()), system="one two")
    words = sum(len(text.split()) for text in frame(3)["text"].head(3)) + 3 * 2
    assert row["input_tokens"] == words + 3 * 7
    assert row["input_tokens_method"].startswith("count_tokens")


def test_what_is_not_known_is_null(provider: testing.Provider) -> None:
    row = estimated(frame(3), max_tokens=None)
    assert (row["output_tokens_max"], row["cost_usd"], row["cost_usd_max"]) == (None, None, None)
    unknown = pllm.OpenAI("some-model", base_url="https://models.example.com/v1", api_key="x")
    with pytest.warns(pllm.LLMWarning, match="The price of openai/some-model is not known"):
        row = estimated(frame(3), model=unknown)
    assert row["cost_usd_max"] is None
    assert estimated(frame(3), model=unknown)["cost_usd"] is None  # said once


def test_an_empty_frame_and_a_wrong_verb(provider: testing.Provider) -> None:
    row = estimated(pl.DataFrame({"text": []}, schema={"text": pl.String}))
    assert (row["rows"], row["to_send"], row["cost_usd"], row["cost_usd_max"]) == (0, 0, 0.0, 0.0)
    with pytest.raises(pllm.InvalidRequest, match="verb is 'sing'"):
        frame(1).llm.estimate("text", verb="sing", model=MODEL)


# --- max_cost -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["frame", "lazy", "driven", "expression"])
def test_nothing_is_sent_that_may_cost_more(provider: testing.Provider, form: str) -> None:
    most = estimated(frame())["cost_usd_max"]

    def run(max_cost: float) -> Any:
        if form == "expression":
            verb = pl.col("text").llm.generate(model=MODEL, max_tokens=50, max_cost=max_cost)
            return frame().with_columns(response=verb)
        made = asked(frame() if form == "frame" else frame().lazy(), max_cost=max_cost)
        return made if form == "frame" else made.collect() if form == "lazy" else made.llm.collect()

    with pytest.raises(pllm.BudgetExceeded) as exceeded:
        run(most * 0.99)
    assert exceeded.value.cost_usd == pytest.approx(most)
    assert exceeded.value.max_cost == most * 0.99
    assert provider.log() == []
    if form == "driven":
        assert run(most * 1.01)["response"].null_count() == 1
    else:
        with pytest.raises(pllm.JobsPending):
            run(most * 1.01)
    assert provider.bill().batches == 1


def test_what_is_in_flight_counts() -> None:
    with testing.provider(auto=False) as provider:
        first, both = (estimated(frame(n))["cost_usd_max"] for n in (20, 40))
        with pytest.raises(pllm.JobsPending):
            asked(frame(20), max_cost=first * 1.01)
        with pytest.raises(pllm.BudgetExceeded) as exceeded:
            asked(frame(40), max_cost=both * 0.99)
        assert exceeded.value.reserved_usd == pytest.approx(first)
        with pytest.raises(pllm.JobsPending):
            asked(frame(40), max_cost=both * 1.01)
        assert provider.bill().batches == 2


def test_a_cost_that_is_not_known_is_a_refusal(provider: testing.Provider) -> None:
    with pytest.raises(pllm.BudgetExceeded, match="What these requests can cost is not known") as exceeded:
        asked(frame(2), max_tokens=None, max_cost=100)
    assert exceeded.value.cost_usd is None
    with pytest.raises(pllm.BudgetExceeded, match="not known"):
        asked(frame(2), model="openai/gpt-6-luna", max_cost=100)  # this host's prices are known to nobody
    assert provider.log() == []


@pytest.mark.parametrize("value", [-1, float("nan"), True, "5"])
def test_wrong_amounts(provider: testing.Provider, value: Any) -> None:
    with pytest.raises(pllm.InvalidRequest, match="max_cost"):
        asked(frame(2), max_cost=value)
    with pytest.raises(pllm.InvalidRequest, match="max_cost"):
        pllm.Config(max_cost=value)


# --- what else changes a price ------------------------------------------------------------------------


@pytest.fixture
def list_prices() -> Iterator[Callable[[str], None]]:
    """Let the bundled prices of a provider hold for the local one."""

    def here(name: str) -> None:
        known = next(p for p in providers if p.id == name)
        local = dataclasses.replace(known, api_pattern=r"http://127\.0\.0\.1")
        set_custom_snapshot(DataSnapshot([local], from_auto_update=False))

    yield here
    set_custom_snapshot(None)


def costs(frame: pl.DataFrame) -> tuple[float, int, int]:
    """USD, input and output tokens of all answers."""
    full = frame["response"].struct.unnest()
    assert full["cost_usd"].null_count() == 0
    return full["cost_usd"].sum(), full["input_tokens"].sum(), full["output_tokens"].sum()


@pytest.mark.parametrize(("tier", "factor"), [("flex", 0.5), ("priority", 2.0), ("default", 1.0)])
@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_a_tier_has_its_price(
    provider: testing.Provider,
    list_prices: Callable[[str], None],
    tier: str,
    factor: float,
    endpoint: Literal["chat", "responses"],
) -> None:
    list_prices("openai")
    rows = frame(5).head(5)
    how = {
        "model": pllm.OpenAI("gpt-6-luna", endpoint=endpoint),
        "mode": "realtime",
        "params": {"service_tier": tier},
        "output": "full",
    }
    before = estimated(rows, **how)
    # gpt-6-luna: 0.10 USD a million tokens in, 0.50 out.
    expected = (before["input_tokens"] * 0.1 + before["output_tokens_max"] * 0.5) / 1e6 * factor
    assert before["cost_usd"] == pytest.approx(expected)
    spent, taken, given = costs(asked(rows, max_cost=before["cost_usd_max"], **how))
    assert spent == pytest.approx((taken * 0.1 + given * 0.5) / 1e6 * factor)
    assert spent <= before["cost_usd_max"]


def test_cache_writes_for_an_hour_and_a_region_have_their_price(
    provider: testing.Provider, list_prices: Callable[[str], None]
) -> None:
    list_prices("anthropic")
    rows = frame(5).head(5)
    how = {
        "model": "anthropic/claude-sonnet-5-5",
        "params": {"cache_control": {"type": "ephemeral", "ttl": "1h"}, "inference_geo": "us"},
        "output": "full",
        "on_pending": "wait",
    }
    before = estimated(rows, **how)
    plain = estimated(rows, **{**how, "params": {}})
    assert before["cost_usd_max"] > 1.5 * plain["cost_usd_max"]
    with pytest.raises(pllm.BudgetExceeded):
        asked(rows, max_cost=plain["cost_usd_max"], **how)
    spent, taken, given = costs(asked(rows, max_cost=before["cost_usd_max"], **how))
    # claude-sonnet-5-5 in a batch: 1 USD a million tokens in, 2 written for an hour, 5 out.
    assert spent == pytest.approx(1.1 * (taken * 2 + given * 5) / 1e6)


def test_tools_that_the_provider_runs_are_refused_where_there_is_a_limit(provider: testing.Provider) -> None:
    search = {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}
    with pytest.raises(pllm.BudgetExceeded, match="not known"):
        asked(frame(2), params=search, max_cost=100)
    assert provider.log() == []


# --- the provider's prompt cache ----------------------------------------------------------------------

LONG = "Answer as a careful reader of statements would. " * 60


def claude(**options: Any) -> pllm.Anthropic:
    return pllm.Anthropic("claude-haiku-5-5", **options)


@pytest.mark.parametrize("mode", ["batch", "realtime"])
def test_a_marked_system_prompt_is_paid_once_and_then_read(
    provider: testing.Provider, list_prices: Callable[[str], None], mode: Literal["batch", "realtime"]
) -> None:
    list_prices("anthropic")

    def paid(model: pllm.Anthropic, system: str) -> pl.DataFrame:
        options = {"model": model, "system": system, "mode": mode, "on_pending": "wait", "max_concurrency": 1}
        if mode == "batch":
            del options["max_concurrency"]
        return asked(frame(), output="full", **options).unnest("response").drop_nulls("key").unique("key")

    plain, marked = paid(claude(), LONG), paid(claude(cache_system="1h"), LONG + "Please.")
    assert plain["cached_input_tokens"].sum() == 0
    assert (marked["cached_input_tokens"] > 0).sum() == 39  # all but the one that wrote it
    assert marked["cost_usd"].sum() < 0.3 * plain["cost_usd"].sum()
    written = marked.filter(pl.col("cached_input_tokens") == 0)["cost_usd"].item()
    assert written > 1.5 * plain["cost_usd"].max()  # an hour's write is twice the input


def test_marking_the_system_prompt_is_no_other_request(provider: testing.Provider) -> None:
    first = asked(frame(), model=claude(), system=LONG, on_pending="wait")
    again = asked(frame(), model=claude(cache_system="5m"), system=LONG, max_cost=0)
    assert first.equals(again)
    assert provider.bill().billed == 40


@pytest.mark.parametrize("mode", ["batch", "realtime"])
def test_the_bound_counts_every_row_as_a_write(
    provider: testing.Provider, list_prices: Callable[[str], None], mode: Literal["batch", "realtime"]
) -> None:
    list_prices("anthropic")

    def most(**options: Any) -> float:
        row = estimated(frame(), model=claude(**options), system=LONG, mode=mode)
        return float(row["cost_usd_max"])

    plain, marked = most(), most(cache_system="1h")
    assert 1.5 * plain < marked <= 2.2 * plain
    with pytest.raises(pllm.BudgetExceeded):
        asked(frame(), model=claude(cache_system="1h"), system=LONG, mode=mode, max_cost=1.2 * plain)
    assert provider.bill().billed == 0


def test_another_duration_is_refused() -> None:
    with pytest.raises(pllm.InvalidRequest, match="'5m' or '1h'"):
        claude(cache_system=True)
    assert repr(claude(cache_system="1h")) == "Anthropic('claude-haiku-5-5', cache_system='1h')"


# --- the budget of the cache --------------------------------------------------------------------------


def test_everything_in_flight_and_spent_counts_against_the_budget(provider: testing.Provider) -> None:
    asked(frame(20), on_pending="wait")
    spent = provider.bill().cost_usd
    most = estimated(frame(40))["cost_usd_max"]
    with pllm.Config(max_cost=spent + most * 0.99), pytest.raises(pllm.BudgetExceeded) as exceeded:
        asked(frame(40))
    assert exceeded.value.reserved_usd == pytest.approx(spent, rel=0.05)
    assert provider.bill().batches == 1
    with pllm.Config(max_cost=(spent + most) * 1.05):
        asked(frame(40), on_pending="wait")
    # A budget for what comes: what was answered before its date is not counted.
    tomorrow = datetime.datetime.now() + datetime.timedelta(seconds=1)
    most = estimated(frame(50))["cost_usd_max"]
    with pllm.Config(max_cost=most * 1.01, max_cost_since=tomorrow):
        asked(frame(50), on_pending="wait")


def test_a_job_made_without_a_limit_counts_as_well() -> None:
    with testing.provider(auto=False):
        with pytest.raises(pllm.JobsPending):
            asked(frame(20), model=pllm.OpenAI("gpt-6-luna"))
        # Its price cannot be known: a host on this machine, and no prices with it.
        with pllm.Config(max_cost=100), pytest.raises(pllm.BudgetExceeded, match="spent before is not known"):
            asked(frame(30))


def test_what_cost_an_unknown_sum_is_left_out_by_a_date_as_the_hint_says(provider: testing.Provider) -> None:
    asked(frame(5), model=pllm.OpenAI("gpt-6-luna"), on_pending="wait")  # a host here, and no prices
    with pllm.Config(max_cost=100), pytest.raises(pllm.BudgetExceeded, match="max_cost_since=") as exceeded:
        asked(frame(6))
    assert "prices=" not in str(exceeded.value)  # they would change nothing
    with pllm.Config(max_cost=100, max_cost_since=datetime.datetime.now()):
        assert asked(frame(6), on_pending="wait")["response"].null_count() == 1


_TWO = """
import sys, polars as pl, polars_llm as pllm
model = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4))
# Many rows: between the first check and the claim lies the writing of their files.
df = pl.DataFrame({"text": [f"Text {sys.argv[1]} {n}" for n in range(20_000)]})
most = df.llm.estimate("text", model=model, max_tokens=50)["cost_usd_max"].item()
print("ready", flush=True)
sys.stdin.readline()
with pllm.Config(max_cost=1.5 * most):
    try:
        df.llm.generate("text", model=model, max_tokens=50)
    except pllm.JobsPending:
        print("sent")
    except pllm.BudgetExceeded:
        print("refused")
"""


def test_two_processes_share_one_budget() -> None:
    with testing.provider(auto=False) as provider:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", _TWO, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for n in range(3)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        for child in children:
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
        said = [child.communicate(timeout=60)[0].strip() for child in children]
        assert sorted(said) == ["refused", "refused", "sent"]
        assert provider.bill().batches == 1
