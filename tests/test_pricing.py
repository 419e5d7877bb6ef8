"""Costs of whole columns, against genai-prices asked row by row and against published figures."""

from __future__ import annotations

import datetime
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import polars as pl
import pytest
from genai_prices import Usage, calc_price
from genai_prices.data import providers
from genai_prices.data_snapshot import DataSnapshot, set_custom_snapshot
from genai_prices.types import ClauseEquals, ModelInfo, ModelPrice, Provider, Tier, TieredPrices
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.errors import InvalidRequest
from polars_llm.pricing import Mode, Prices, cost_usd, is_known, upper_bound_usd

MODES: tuple[Mode, ...] = ("batch", "realtime")
BUNDLED = [
    (p.id, m.match.starts_with if m.id.startswith("ft:") else m.id)  # fine-tunes are no names
    for p in providers
    if p.id in ("openai", "anthropic")
    for m in p.models
]
UNITS = ("input_mtok", "output_mtok", "cache_read_mtok", "cache_write_mtok", "cache_write_1h_mtok")

# The sizes at which a bundled price changes, and those next to them.
STARTS = {
    tier.start
    for p in providers
    for m in p.models
    if isinstance(m.prices, ModelPrice) and p.id in ("openai", "anthropic")
    for price in m.prices.__dict__.values()
    if isinstance(price, TieredPrices)
    for tier in price.tiers
}
EDGES = sorted({0, 1, 1023, 1024, 1_000_000} | {s + d for s in STARTS for d in (-1, 0, 1)})

Row = dict[str, int]
rows = st.builds(
    lambda size, read, write, hour, output: {
        "input_tokens": size,
        "cached_input_tokens": (first := int(read * size)),
        "cache_write_tokens": (second := int(write * (size - first))),
        "cache_write_1h_tokens": int(hour * second),
        "output_tokens": output,
    },
    st.sampled_from(EDGES) | st.integers(0, 1_200_000),
    *[st.sampled_from([0.0, 1.0]) | st.floats(0, 1)] * 3,
    st.integers(0, 200_000),
)


def _frame(*given_rows: dict[str, int | None], **column: Any) -> pl.DataFrame:
    names = list(given_rows[0]) if given_rows else list(column)
    data = pl.DataFrame(column) if column else pl.DataFrame(given_rows)
    return data.select(pl.col(names).cast(pl.Int64))


def _one(size: int, output: int = 0, **more: int) -> pl.DataFrame:
    return _frame({"input_tokens": size, "cached_input_tokens": 0, "output_tokens": output, **more})


def _asked(row: Row, provider: str, model: str, mode: Mode) -> float | None:
    """The library's own price of one request; None where it has none."""
    usage = Usage(
        input_tokens=row["input_tokens"],
        cache_read_tokens=row["cached_input_tokens"],
        cache_write_tokens=row.get("cache_write_tokens", 0),
        cache_write_1h_tokens=row.get("cache_write_1h_tokens", 0),
        output_tokens=row["output_tokens"],
    )
    found = calc_price(usage, model, provider_id=provider)
    standard = found.model_price
    if standard.input_mtok is None or (standard.output_mtok is None and row["output_tokens"]):
        return None
    if mode == "realtime":
        return float(found.total_price)
    batch = calc_price(usage, model, provider_id=provider, price_context={"processing": "batch"})
    unlisted = all(getattr(batch.model_price, u) == getattr(standard, u) for u in UNITS)
    return float(found.total_price / 2 if unlisted else batch.total_price)


def _same(ours: list[float | None], theirs: list[float | None]) -> None:
    for mine, asked in zip(ours, theirs, strict=True):
        if mine is None or asked is None:
            assert mine is asked
        else:
            assert math.isclose(mine, asked, rel_tol=1e-12, abs_tol=1e-18)


def _cost(usage: pl.DataFrame, provider: str, model: str, mode: Mode, **more: Any) -> float | None:
    return cost_usd(usage, provider=provider, model=model, mode=mode, **more).item()


@pytest.fixture
def listed() -> Iterator[Any]:
    """Install a price list of one provider and one model, as genai-prices' updater would."""

    def install(prices: ModelPrice, provider: str = "openai") -> None:
        model = ModelInfo(id="m", match=ClauseEquals(equals="m"), prices=prices)
        known = Provider(id=provider, name=provider, api_pattern="https://p", models=[model])
        set_custom_snapshot(DataSnapshot([known], from_auto_update=False))

    yield install
    set_custom_snapshot(None)


# The library's own price, row by row


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_bundled_model_at_every_edge(provider: str, mode: Mode) -> None:
    sizes = [s for s in EDGES if s]
    given_rows: list[Row] = [
        {
            "input_tokens": size,
            "cached_input_tokens": size // 3,
            "cache_write_tokens": size // 4,
            "cache_write_1h_tokens": size // 8,
            "output_tokens": 77 if size % 2 else 0,
        }
        for size in sizes
    ]
    models = [model for p, model in BUNDLED if p == provider]
    assert len(models) > 20
    for model in models:
        ours = cost_usd(_frame(*given_rows), provider=provider, model=model, mode=mode)
        _same(ours.to_list(), [_asked(row, provider, model, mode) for row in given_rows])


@given(
    model=st.sampled_from(BUNDLED),
    mode=st.sampled_from(MODES),
    given_rows=st.lists(rows, min_size=1, max_size=5),
)
def test_it_equals_the_library(model: tuple[str, str], mode: Mode, given_rows: list[Row]) -> None:
    ours = cost_usd(_frame(*given_rows), provider=model[0], model=model[1], mode=mode)
    assert (ours.name, ours.dtype) == ("cost_usd", pl.Float64)
    _same(ours.to_list(), [_asked(row, *model, mode) for row in given_rows])


# Figures that the providers publish


@pytest.mark.parametrize(
    ("provider", "model", "input", "output"),
    [  # batch, USD per million tokens, small requests
        ("openai", "gpt-6-luna", 0.05, 0.25),
        ("openai", "gpt-6.1-terra", 0.5, 2.5),
        ("openai", "gpt-6.1-sol", 1, 5),
        ("openai", "gpt-5.4-mini", 0.375, 2.25),
        ("anthropic", "claude-haiku-5-5", 0.05, 0.25),
        ("anthropic", "claude-sonnet-5-5", 1, 5),
        ("anthropic", "claude-opus-5-5", 2, 10),
    ],
)
def test_published_batch_prices(provider: str, model: str, input: float, output: float) -> None:
    assert _cost(_one(1000), provider, model, "batch") == pytest.approx(input / 1000)
    assert _cost(_one(0, 1000), provider, model, "batch") == pytest.approx(output / 1000)
    assert _cost(_one(1000), provider, model, "realtime") == pytest.approx(2 * input / 1000)


def test_each_request_has_its_own_tier() -> None:
    # gpt-6-luna: 0.10 USD up to 272,000 input tokens, 0.20 above, for all tokens of the request.
    usage = pl.concat([_one(272_000), _one(272_001), _one(200_000), _one(200_000)])
    spent = cost_usd(usage, provider="openai", model="gpt-6-luna", mode="realtime").to_list()
    assert spent == pytest.approx([0.0272, 0.0544002, 0.02, 0.02])


@pytest.mark.parametrize(("model", "usd"), [("small", 0.01), ("large", 0.065)])
def test_embeddings_have_the_documented_batch_price(model: str, usd: float) -> None:
    # Published: 0.01 and 0.065 USD per million; genai-prices lists no batch rate for them.
    name = f"text-embedding-3-{model}"
    assert _cost(_one(1_000_000), "openai", name, "batch") == pytest.approx(usd)
    assert _cost(_one(1_000_000), "openai", name, "realtime") == pytest.approx(2 * usd)
    without = _one(1_000_000).with_columns(output_tokens=pl.lit(None, pl.Int64))
    assert _cost(without, "openai", name, "batch") == pytest.approx(usd)
    assert _cost(_one(1_000_000, 1), "openai", name, "batch") is None


def test_cached_input_and_one_hour_writes_have_prices_of_their_own() -> None:
    # claude-sonnet-5-5, realtime: 2 in, 0.1 read, 2.5 written for 5 minutes, 4 for an hour.
    usage = _one(10_000, 0, cache_write_tokens=5_000, cache_write_1h_tokens=2_000).with_columns(
        cached_input_tokens=1_000
    )
    spent = _cost(usage, "anthropic", "claude-sonnet-5-5", "realtime")
    assert spent == pytest.approx((4000 * 2 + 1000 * 0.1 + 3000 * 2.5 + 2000 * 4) / 1e6)


# What is not known


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-6.2-sol"),  # newer than the price list
        ("openai", "no-such-model"),
        ("openai", "omni-moderation-latest"),  # listed, with no price at all
        ("openai", "whisper-1"),  # priced by the hour
        ("nobody", "gpt-6-luna"),
        ("my-openai-proxy", "gpt-6-luna"),  # matched loosely by the library
        ("litellm", "openai/gpt-6-luna"),
        ("vllm", "gpt-6-luna"),
        ("ray", "claude-haiku-5-5"),
    ],
)
def test_unknown_is_null_and_never_zero(provider: str, model: str, mode: Mode) -> None:
    usage = pl.concat([_one(0), _one(100, 5)])
    spent = cost_usd(usage, provider=provider, model=model, mode=mode)
    assert (spent.to_list(), spent.dtype) == ([None, None], pl.Float64)
    assert not is_known(provider=provider, model=model, mode=mode)
    bound = upper_bound_usd(usage["input_tokens"], 5, provider=provider, model=model, mode=mode)
    assert bound is None


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
        ("azure", "gpt-6-luna"),
        ("aws", "global.moonshotai.kimi-k3"),
    ],
)
def test_a_batch_price_is_not_made_up_for_other_providers(provider: str, model: str) -> None:
    assert not is_known(provider=provider, model=model, mode="batch")
    assert is_known(provider=provider, model=model, mode="realtime")


def test_a_listed_batch_price_of_another_provider_is_used() -> None:
    model = "gemini-2.5-flash"
    batch = calc_price(
        Usage(input_tokens=1000, output_tokens=10),
        model,
        provider_id="google",
        price_context={"processing": "batch"},
    )
    assert _cost(_one(1000, 10), "google", model, "batch") == pytest.approx(float(batch.total_price))


@pytest.mark.parametrize("column", ["input_tokens", "cached_input_tokens", "output_tokens"])
def test_a_null_count_is_a_null_cost(column: str) -> None:
    usage = pl.concat([_one(100, 5), _one(100, 5)])
    usage = usage.with_columns(pl.when(pl.int_range(pl.len()) == 0).then(pl.col(column)).alias(column))
    spent = cost_usd(usage, provider="openai", model="gpt-6-luna", mode="batch")
    assert spent.is_null().to_list() == [False, True]


def test_a_null_that_has_no_price_does_not_matter() -> None:
    usage = _one(100, 5).with_columns(cached_input_tokens=pl.lit(None, pl.Int64))
    assert _cost(usage, "openai", "gpt-4", "realtime") == pytest.approx((100 * 30 + 5 * 60) / 1e6)


@pytest.mark.parametrize(
    "usage",
    [
        _one(-1),
        _one(1, -1),
        _one(10).with_columns(cached_input_tokens=11),
        _one(10).with_columns(cached_input_tokens=-1),
        _one(10, cache_write_tokens=6).with_columns(cached_input_tokens=5),
        _one(10, cache_write_tokens=3, cache_write_1h_tokens=4),
    ],
)
def test_contradictory_counts_are_null(usage: pl.DataFrame) -> None:
    assert _cost(usage, "anthropic", "claude-haiku-5-5", "batch") is None


def test_no_rows_and_unsigned_counts() -> None:
    spent = cost_usd(_one(1).clear(), provider="openai", model="gpt-6-luna", mode="batch")
    assert (spent.len(), spent.dtype) == (0, pl.Float64)
    unsigned = _one(10).cast(pl.UInt32).with_columns(cached_input_tokens=pl.lit(11, pl.UInt32))
    assert _cost(unsigned, "openai", "gpt-6-luna", "batch") is None


# Hosts


def test_another_host_has_its_own_prices_or_none() -> None:
    groq = "https://api.groq.com/openai/v1"
    host: dict[str, Any] = {"provider": "openai", "model": "openai/gpt-oss-120b", "base_url": groq}
    there = _cost(_one(1000), mode="realtime", **host)
    assert there == _cost(_one(1000), "groq", "openai/gpt-oss-120b", "realtime")
    for address in ("http://localhost:8000/v1", "https://eu.api.openai.com/v1"):
        assert not is_known(provider="openai", model="gpt-6-luna", mode="batch", base_url=address)


# The user's own prices


def test_own_prices_win_and_need_no_list() -> None:
    own = Prices(input=1, output=5, cached_input=0.1)
    usage = _one(1000, 100).with_columns(cached_input_tokens=400)
    full = (600 * 1 + 400 * 0.1 + 100 * 5) / 1e6
    for provider, model in (("vllm", "x"), ("openai", "gpt-6-luna"), ("openai", "gpt-6.2-sol")):
        assert _cost(usage, provider, model, "realtime", prices=own) == pytest.approx(full)
        assert _cost(usage, provider, model, "batch", prices=own) == pytest.approx(full / 2)
        assert is_known(provider=provider, model=model, mode="batch", prices=own)


def test_own_prices_without_discounts() -> None:
    own = Prices(input=1, output=5, batch_multiplier=1)
    usage = _one(1000, 100).with_columns(cached_input_tokens=400)
    assert _cost(usage, "openai", "x", "batch", prices=own) == pytest.approx(1500 / 1e6)
    dear = Prices(input=1, output=5, cache_write=2)
    written = _one(1000, 0, cache_write_tokens=1000)
    assert _cost(written, "openai", "x", "realtime", prices=dear) == pytest.approx(2000 / 1e6)
    assert _cost(_one(5), "vllm", "x", "batch", prices=Prices(0, 0)) == 0.0


def test_prices_are_values() -> None:
    own = Prices(1, 5)
    assert own == pickle.loads(pickle.dumps(own))
    assert repr(own) == (
        "Prices(input=1, output=5, cached_input=None, batch_multiplier=0.5, cache_write=None)"
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": -1, "output": 0},
        {"input": 1, "output": math.nan},
        {"input": math.inf, "output": 1},
        {"input": None, "output": 1},
        {"input": 1, "output": "5"},
        {"input": True, "output": 1},
        {"input": 1, "output": 1, "cached_input": -0.1},
        {"input": 1, "output": 1, "batch_multiplier": None},
    ],
)
def test_impossible_prices_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"Prices: \w+ is .*\n\nHint: .*Nothing was sent"):
        Prices(**wrong)


# The upper bound


@given(
    model=st.sampled_from([m for m in BUNDLED if is_known(provider=m[0], model=m[1], mode="batch")]),
    mode=st.sampled_from(MODES),
    given_rows=st.lists(rows, min_size=1, max_size=4),
    slack=st.integers(0, 300_000),
)
def test_nothing_costs_more_than_the_bound(
    model: tuple[str, str], mode: Mode, given_rows: list[Row], slack: int
) -> None:
    usage = _frame(*given_rows)
    if model[0] == "openai":  # no writes below 1,024 tokens, and none for an hour
        few = pl.col("input_tokens") < 1024
        writes = pl.when(few).then(0).otherwise("cache_write_tokens").cast(pl.Int64)
        usage = usage.with_columns(cache_write_tokens=writes, cache_write_1h_tokens=0)
    spent = cost_usd(usage, provider=model[0], model=model[1], mode=mode)
    bound = upper_bound_usd(
        usage["input_tokens"] + slack,
        usage["output_tokens"] + slack,
        provider=model[0],
        model=model[1],
        mode=mode,
        body={"cache_control": {"type": "ephemeral"}},
    )
    if bound is None:  # embeddings: output has no price
        assert usage["output_tokens"].sum() + slack > 0
    else:
        assert spent.sum() <= bound * (1 + 1e-12)


def test_the_bound_is_the_cost_without_cache() -> None:
    sizes = pl.Series([10, 500, 272_001])
    told = {"provider": "openai", "model": "gpt-6.1-terra", "mode": "batch"}
    # 0.5 and 2.5 USD per million, 1 and 3.75 for the long one, whose input may be written at 1.25.
    short = (510 * 0.5 + 2 * 100 * 2.5) / 1e6
    long = (272_001 * 1.25 + 100 * 3.75) / 1e6
    assert upper_bound_usd(sizes, 100, **told) == pytest.approx(short + long)
    limits = pl.Series([100, 100, 0])
    assert upper_bound_usd(sizes, limits, **told) == pytest.approx(short + 272_001 * 1.25 / 1e6)


def test_openai_caches_unasked_from_1024_tokens_on() -> None:
    told = {"provider": "openai", "model": "gpt-6-luna", "mode": "batch"}
    for size, usd in ((1023, 0.05), (1024, 0.0625)):
        assert upper_bound_usd(pl.Series([size]), 0, **told) == pytest.approx(size * usd / 1e6)


def test_anthropic_writes_only_on_request() -> None:
    told = {"provider": "anthropic", "model": "claude-sonnet-5-5", "mode": "batch"}
    sizes = pl.Series([1_000_000])
    assert upper_bound_usd(sizes, 0, **told) == pytest.approx(1)
    mark = {"type": "ephemeral", "ttl": "1h"}
    for body in ({"cache_control": mark}, {"tools": [{"name": "f", "cache_control": mark}]}):
        assert upper_bound_usd(sizes, 0, body=body, **told) == pytest.approx(2)


# What a request or a reply says that changes its price


def _tiered(*tiers: str | None, output: int = 10) -> pl.DataFrame:
    usage = pl.concat([_one(1000, output)] * len(tiers))
    return usage.with_columns(service_tier=pl.Series(tiers, dtype=pl.String))


def test_each_reply_is_priced_at_the_tier_that_it_names() -> None:
    # gpt-6-luna, realtime, USD per million: 0.10 in and 0.50 out; flex is half of it, priority twice.
    usage = _tiered("default", "flex", None, "priority", "on_demand", "fast", "scale")
    spent = cost_usd(usage, provider="openai", model="gpt-6-luna", mode="realtime").to_list()
    standard = (1000 * 0.1 + 10 * 0.5) / 1e6
    known = [standard, standard / 2, standard, standard * 2, standard, standard * 2]
    assert spent[:-1] == pytest.approx(known)
    assert spent[-1] is None  # bought in advance


@pytest.mark.parametrize("tier", ["flex", "priority", "fast"])
def test_a_tier_costs_what_the_library_says(tier: str) -> None:
    for provider, model in BUNDLED:
        if provider != "openai":
            continue
        usage = Usage(input_tokens=1000, output_tokens=10)
        standard = calc_price(usage, model, provider_id=provider)
        if standard.model_price.input_mtok is None or standard.model_price.output_mtok is None:
            continue
        tiered = calc_price(usage, model, provider_id=provider, price_context={"service_tier": tier})
        unlisted = all(getattr(tiered.model_price, u) == getattr(standard.model_price, u) for u in UNITS)
        ours = _cost(_tiered(tier), provider, model, "realtime")
        _same([ours], [None if unlisted else float(tiered.total_price)])


def test_a_batch_has_no_tier() -> None:
    usage = _tiered("priority", "flex", None)
    spent = cost_usd(usage, provider="openai", model="gpt-6-luna", mode="batch").to_list()
    assert spent == pytest.approx([(1000 * 0.05 + 10 * 0.25) / 1e6] * 3)


@pytest.mark.parametrize("mode", MODES)
def test_inference_in_the_united_states_costs_a_tenth_more(mode: Mode) -> None:
    geos = [None, "global", "not_available", "us", "mars"]
    usage = pl.concat([_one(1000, 10)] * len(geos)).with_columns(inference_geo=pl.Series(geos))
    told: dict[str, Any] = {"provider": "anthropic", "model": "claude-sonnet-5-5", "mode": mode}
    first, *others = cost_usd(usage, **told).to_list()
    assert others == [first, first, pytest.approx(first * 1.1), None]
    bound = upper_bound_usd(pl.Series([1000]), 10, **told)
    assert bound is not None
    for body, share in (({"inference_geo": "us"}, 1.1), ({"inference_geo": "global"}, 1.0)):
        assert upper_bound_usd(pl.Series([1000]), 10, body=body, **told) == pytest.approx(bound * share)


def test_own_prices_hold_for_every_tier_and_region() -> None:
    own = Prices(input=1, output=5)
    usage = _tiered("priority", "scale").with_columns(inference_geo=pl.lit("us"))
    spent = cost_usd(usage, provider="openai", model="x", mode="realtime", prices=own)
    assert spent.to_list() == pytest.approx([1050 / 1e6] * 2)


def test_the_bound_of_a_dear_tier_is_dear_and_of_a_cheap_one_is_not_cheap() -> None:
    told: dict[str, Any] = {"provider": "openai", "model": "gpt-6-luna", "mode": "realtime"}
    sizes = pl.Series([1000, 300_000])

    def bound(body: dict[str, Any], **more: Any) -> float | None:
        return upper_bound_usd(sizes, 10, body=body, **{**told, **more})

    standard = bound({})
    assert standard is not None
    assert bound({"service_tier": "priority"}) == pytest.approx(2 * standard)
    assert bound({"service_tier": "flex"}) == standard  # what is full is served as the standard one
    assert bound({"service_tier": "auto"}) == standard
    assert bound({"service_tier": "scale"}) is None
    batch = bound({}, mode="batch")
    assert bound({"service_tier": "priority"}, mode="batch") == batch


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}, {"type": "web_search"}]},
        {"tools": {"type": "function"}},
        {"tools": [{"type": ["function"]}]},
        {"web_search_options": {"search_context_size": "low"}},
        {"mcp_servers": [{"url": "https://example.com"}]},
    ],
)
def test_tools_that_the_provider_runs_have_no_bound(body: dict[str, Any]) -> None:
    told: dict[str, Any] = {"provider": "openai", "model": "gpt-6-luna", "mode": "batch"}
    assert upper_bound_usd(pl.Series([10]), 10, body=body, **told) is None
    assert upper_bound_usd(pl.Series([10]), 10, body=body, prices=Prices(1, 5), **told) is None


def test_tools_of_the_caller_have_one() -> None:
    body = {"tools": [{"type": "function", "function": {"name": "f"}}, {"name": "g", "input_schema": {}}]}
    told: dict[str, Any] = {"provider": "openai", "model": "gpt-6-luna", "mode": "batch"}
    plain = upper_bound_usd(pl.Series([10]), 10, **told)
    assert upper_bound_usd(pl.Series([10]), 10, body=body, **told) == plain


def test_columns_without_a_price_keep_their_height() -> None:
    for usage in (_tiered("flex", "flex"), _tiered("flex").clear(), _one(1).clear()):
        spent = cost_usd(usage, provider="openai", model="no-such-model", mode="realtime")
        assert spent.to_list() == [None] * usage.height


def test_a_bound_needs_limits_and_counts() -> None:
    told = {"provider": "openai", "model": "gpt-6-luna", "mode": "batch"}
    assert upper_bound_usd(pl.Series([10]), None, **told) is None
    assert upper_bound_usd(pl.Series([10, None]), 5, **told) is None
    assert upper_bound_usd(pl.Series([10, -1]), 5, **told) is None
    assert upper_bound_usd(pl.Series([10, 10]), pl.Series([5, None]), **told) is None
    embed = {**told, "model": "text-embedding-3-small"}
    assert upper_bound_usd(pl.Series([1_000_000]), None, **embed) == pytest.approx(0.01)
    assert upper_bound_usd(pl.Series([1_000_000]), 5, **embed) is None


@pytest.mark.parametrize("model", ["gpt-6-luna", "no-such-model"])
def test_nothing_costs_nothing(model: str) -> None:
    none = pl.Series([], dtype=pl.Int64)
    assert upper_bound_usd(none, None, provider="openai", model=model, mode="batch") == 0.0


# Price lists that change


def test_a_new_price_list_holds_at_once(listed: Any) -> None:
    told: dict[str, Any] = {"provider": "openai", "model": "m", "mode": "realtime"}
    assert not is_known(**told)
    for usd in (3, 7):
        listed(ModelPrice(input_mtok=Decimal(usd), output_mtok=Decimal(1)))
        assert _cost(_one(1_000_000), **told) == pytest.approx(usd)


def test_a_bound_holds_where_larger_requests_are_cheaper(listed: Any) -> None:
    falling = TieredPrices(base=Decimal(9), tiers=[Tier(start=100, price=Decimal(1))])
    listed(ModelPrice(input_mtok=falling, output_mtok=Decimal(0)))
    # A request said to have at most 101 tokens may have 100, at 9 USD per million.
    bound = upper_bound_usd(pl.Series([101]), 0, provider="openai", model="m", mode="realtime")
    assert bound is not None
    assert bound >= 100 * 9 / 1e6


def test_a_charge_per_request_is_part_of_the_cost(listed: Any) -> None:
    listed(
        ModelPrice(input_mtok=Decimal(1), output_mtok=Decimal(1), requests_kcount=Decimal(12)),
        provider="perplexity",
    )
    told: dict[str, Any] = {"provider": "perplexity", "model": "m", "mode": "realtime"}
    assert _cost(_one(1000, 500), **told) == pytest.approx(0.0135)
    assert upper_bound_usd(pl.Series([1000]), 500, **told) == pytest.approx(0.0135)


def test_today_is_later_than_the_day_from_which_batch_rates_are_listed() -> None:
    # Before it genai-prices gives the standard price for a batch without a word.
    day = datetime.datetime(2026, 10, 13, tzinfo=datetime.UTC)
    before = calc_price(
        Usage(input_tokens=1000),
        "gpt-6-luna",
        provider_id="openai",
        genai_request_timestamp=day,
        price_context={"processing": "batch"},
    )
    assert float(before.total_price) == pytest.approx(0.0001)
    assert _cost(_one(1000), "openai", "gpt-6-luna", "batch") == pytest.approx(0.00005)


# Speed and imports


def test_a_million_rows_take_less_than_a_fifth_of_a_second() -> None:
    row = pl.int_range(1_000_000)
    usage = pl.select(
        input_tokens=row % 300_000,
        cached_input_tokens=row % 7 * 0,
        cache_write_tokens=row * 0,
        output_tokens=row % 1000,
    )
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        cost_usd(usage, provider="openai", model="gpt-6-luna", mode="batch")
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.2


def test_the_price_list_is_read_when_first_needed_and_without_network() -> None:
    source = """
        import sys, socket
        import polars as pl
        from polars_llm.pricing import Prices, cost_usd, is_known
        is_known(provider="vllm", model="m", mode="batch")
        is_known(provider="openai", model="m", mode="batch", prices=Prices(1, 1))
        assert not [name for name in sys.modules if name.startswith("genai_prices")]
        def refuse(*args, **more): raise AssertionError("the network")
        socket.socket.connect = socket.getaddrinfo = refuse
        assert is_known(provider="openai", model="gpt-6-luna", mode="batch")
    """
    subprocess.run(
        [sys.executable, "-c", "\n".join(line[8:] for line in source.splitlines())],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
