"""What requests cost: token counts -> USD, offline, one expression for a whole column.

What a token costs is in `price_list.py`. What is not known is null (or None), never 0.

Not in any figure here: tools that a provider bills per call (web search, file search), taxes and negotiated
prices. Tiers and regions that an account has as its default count where the reply names them, so in what
was spent, and not in what may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec
import polars as pl

from polars_llm.price_list import PER, TIERS, Mode, Prices, Rate, Rates, rates_of

__all__ = ["Mode", "Prices", "cost_usd", "is_known", "upper_bound_usd"]

# Tools that the caller runs; all others run at the provider, are billed per call, and put into the prompt
# what they find.
_CALLERS_TOOLS = (None, "function", "custom")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


def cost_usd(
    usage: pl.DataFrame,
    *,
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None = None,
    base_url: str | None = None,
) -> pl.Series:
    """What each answered request cost, at the rates of today.

    Parameters
    ----------
    usage
        A row per request: ``input_tokens`` (the total, cache reads and writes included: for Anthropic
        the sum of its three counters), ``cached_input_tokens``, ``output_tokens``, and optionally
        ``cache_write_tokens`` and, of these, ``cache_write_1h_tokens``, ``service_tier`` and
        ``inference_geo`` as the reply names them. Without the counts writes are priced as ordinary input,
        which is too low for Anthropic with ``cache_control`` and for gpt-5.6 and newer from 1,024 tokens on.
    provider
        genai-prices' id, for example ``"openai"``; ``"vllm"`` and ``"ray"`` have no price but `prices`.
    model
        The model's name at the provider.
    mode
        ``"batch"`` or ``"realtime"``.
    prices
        The user's own prices; they win.
    base_url
        Another host's address, if it isn't the provider's own: the host's prices hold, if known.

    Returns
    -------
    pl.Series
        ``cost_usd``, Float64. Null where the price is not known, where a count that has a price is
        null, and where the counts contradict each other (more cached than sent, a negative count).

    Notes
    -----
    A batch is priced at the batch rate that genai-prices lists for the model. Where it lists none, and
    would return the standard price in silence, OpenAI's and Anthropic's documented 50 % is applied to
    all rates of theirs; for any other provider the batch price is not known.
    """
    cost = pl.repeat(None, pl.len(), dtype=pl.Float64)
    kinds = usage.select(_tier(usage.columns), _geo(usage.columns))
    for tier, geo in kinds.unique().rows():
        rates = rates_of(provider, model, mode, prices, base_url, service_tier=tier, inference_geo=geo)
        if rates is None:
            continue
        parts, sound = _parts(usage.columns, rates)
        size = _count("input_tokens")
        spent = pl.sum_horizontal(*(parts[name] * rate.at(size) for name, rate in rates.named()))
        of_kind = _tier(usage.columns).eq_missing(tier) & _geo(usage.columns).eq_missing(geo)
        cost = pl.when(of_kind & sound).then(spent / PER).otherwise(cost)
    return usage.select(cost_usd=cost).to_series()


def upper_bound_usd(
    input_tokens: pl.Series,
    output_tokens_max: pl.Series | int | None,
    *,
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None = None,
    base_url: str | None = None,
    body: Mapping[str, Any] = _NOTHING,
) -> float | None:
    """The most that these requests can cost together, if none has more tokens than stated.

    No cache discount is counted on. Input that the provider may write to its cache unasked (OpenAI's
    gpt-5.6 and newer, from 1,024 tokens on) is priced at the dearer write rate.

    Parameters
    ----------
    input_tokens
        A row per request.
    output_tokens_max
        The limit per request or for all of them; None if there is no limit.
    provider, model, mode, prices, base_url
        As for `cost_usd`.
    body
        Fields of the request body; some change the price: ``cache_control`` (all input may be billed as
        writes, at up to twice the input rate), ``service_tier``, ``inference_geo``, and tools that the
        provider runs (no bound).

    Returns
    -------
    float or None
        USD; 0.0 for no requests. None if the price is not known, a count is null or negative, or
        the output is paid for and has no limit.
    """
    if not len(input_tokens):
        return 0.0
    if _has_providers_tools(body):
        return None
    caching = b'"cache_control"' in msgspec.json.encode(dict(body))
    geo, tier = _text(body, "inference_geo"), _text(body, "service_tier")
    asked = tier if mode == "realtime" and tier in TIERS else None
    given = pl.select(
        input_tokens=input_tokens,
        output_tokens=0 if output_tokens_max is None else output_tokens_max,
    ).cast(pl.Int64)
    size, output = pl.col("input_tokens"), pl.col("output_tokens")
    bounds = []
    for served in {None, asked}:  # a tier that is full is served as the standard one
        rates = rates_of(provider, model, mode, prices, base_url, service_tier=served, inference_geo=geo)
        if rates is None or (rates.output is not None and output_tokens_max is None):
            return None
        # Without a price for output (embeddings) there can't be any; it wouldn't be free.
        sound = (size >= 0) & ((output == 0) if rates.output is None else (output >= 0))
        if not given.select(sound.fill_null(False).all()).item():
            return None
        usd = size * _input_ceiling(rates, size, caching)
        if rates.output is not None:
            usd += output * rates.output.ceiling().at(size)
        if rates.request is not None:
            usd += rates.request.ceiling().at(size)
        bounds.append(usd)
    return float(given.select((pl.max_horizontal(bounds) / PER).sum()).item())


def is_known(
    *,
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None = None,
    base_url: str | None = None,
) -> bool:
    """Whether `cost_usd` can price answers of this model; if not, all that it gives is null."""
    return rates_of(provider, model, mode, prices, base_url) is not None


def _has_providers_tools(body: Mapping[str, Any]) -> bool:
    tools = body.get("tools") or []
    known = isinstance(tools, list) and all(
        isinstance(tool, Mapping) and tool.get("type") in _CALLERS_TOOLS for tool in tools
    )
    return bool(not known or body.get("web_search_options") or body.get("mcp_servers"))


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    return None if value is None else str(value)


def _tier(columns: list[str]) -> pl.Expr:
    """The service tier where it has a price of its own, else null."""
    if "service_tier" not in columns:
        return pl.lit(None, pl.String).alias("service_tier")
    tier = pl.col("service_tier")
    return pl.when(tier.is_in(list(TIERS))).then(tier)


def _geo(columns: list[str]) -> pl.Expr:
    if "inference_geo" not in columns:
        return pl.lit(None, pl.String).alias("inference_geo")
    return pl.col("inference_geo")


def _input_ceiling(rates: Rates, size: pl.Expr, cache_control: bool) -> pl.Expr:
    plain = rates.input.ceiling().at(size)
    writes = [r for r in (rates.cache_write, rates.cache_write_1h) if r is not None]
    since = 0 if cache_control else rates.writes_from
    if not writes or since is None:
        return plain
    written = pl.max_horizontal(plain, *(r.ceiling().at(size) for r in writes))
    return pl.when(size >= since).then(written).otherwise(plain)


def _count(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64)


def _parts(columns: list[str], rates: Rates) -> tuple[dict[str, pl.Expr], pl.Expr]:
    """Disjoint token counts, one per rate, and whether they make sense.

    As in genai-prices, a kind of token that has no price of its own is billed as the kind that it
    is a part of: reads and writes as input, one-hour writes as writes.
    """
    nothing = pl.lit(0, dtype=pl.Int64)

    def part(name: str, rate: Rate | None) -> pl.Expr:
        return _count(name) if rate is not None and name in columns else nothing

    read = part("cached_input_tokens", rates.cache_read)
    hour = part("cache_write_1h_tokens", rates.cache_write_1h)
    write = part("cache_write_tokens", rates.cache_write)
    if rates.cache_write is not None:
        write = write - hour
    parts = {
        "input": _count("input_tokens") - read - write - hour,
        "cache_read": read,
        "cache_write": write,
        "cache_write_1h": hour,
        "output": _count("output_tokens"),
        "request": pl.lit(1),
    }
    sound = pl.all_horizontal(*(parts[name] >= 0 for name, _ in rates.named()))
    if rates.output is None:  # embeddings; output that nobody has a price for is not free
        sound = sound & (_count("output_tokens").fill_null(0) == 0)
    return parts, sound
