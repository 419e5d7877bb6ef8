"""What a model's tokens cost: the rates that genai-prices bundles, or the user's own.

genai-prices (0.2.3 and newer; Pydantic, MIT) has the providers' price pages in its wheel and is asked once
for a column, never per row. `genai_prices.UpdatePrices`, where the application runs it, is honoured.

Providers price a request by its size: past a threshold (272,000 input tokens for gpt-6-luna, 100,000
for claude-haiku-5-5) the higher rate holds for all of its tokens, so sums of tokens cannot be priced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import polars as pl

from polars_llm.errors import InvalidRequest

if TYPE_CHECKING:
    from genai_prices.types import ModelPrice, PriceCalculation

__all__ = ["PER", "TIERS", "Mode", "Prices", "Rate", "Rates", "rates_of"]

Mode: TypeAlias = Literal["batch", "realtime"]

PER = 1_000_000
"""Tokens that a rate is for."""

TIERS = frozenset({"flex", "priority", "fast", "scale"})
"""Service tiers with a price of their own; the other names that hosts report are the standard one's."""

# Anthropic's multiplier on all its rates where inference is kept in the United States
# (https://platform.claude.com/docs/en/manage-claude/data-residency); genai-prices has none.
_GEO_SHARE = {"global": 1.0, "not_available": 1.0, "us": 1.1}

_LOCAL = frozenset({"vllm", "ray"})

# Both document one discount for everything that their batch service takes, and genai-prices lists it
# model by model, not for all (text-embedding-3-*, retired models, cyber and rosalind models).
# https://developers.openai.com/api/docs/guides/batch (50 % off, embeddings included)
# https://platform.claude.com/docs/en/build-with-claude/batch-processing#pricing (50 %, cache included)
_DOCUMENTED_BATCH_SHARE = {"openai": 0.5, "anthropic": 0.5}

# From which prompt size a provider may bill cache writes that nobody asked for. OpenAI caches by
# itself from 1,024 tokens on, and bills writes at 1.25 times the input rate since gpt-5.6
# (https://developers.openai.com/api/docs/guides/prompt-caching). Anthropic writes only on request.
_WRITES_FROM: dict[str, int | None] = {"openai": 1024, "anthropic": None}


@dataclasses.dataclass(frozen=True)
class Prices:
    """Your own prices for a model, in USD per million tokens at the standard (realtime) rate.

    For models that the bundled price list doesn't know, for negotiated prices, and for machines of
    your own. They hold for all service tiers and regions.

    Parameters
    ----------
    input
        Per million input tokens.
    output
        Per million output tokens; 0 for embeddings.
    cached_input
        Per million input tokens read from the provider's prompt cache. Default: the input price.
    batch_multiplier
        What a batch job costs of that: OpenAI's and Anthropic's 50 % by default; 1 where batches
        have no discount.
    cache_write
        Per million input tokens written to the provider's prompt cache. Default: the input price.

    Raises
    ------
    InvalidRequest
        At call: a price that is negative or not a finite number.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> pllm.Prices(input=1, output=5)
    Prices(input=1, output=5, cached_input=None, batch_multiplier=0.5, cache_write=None)
    """

    input: float
    output: float
    cached_input: float | None = None
    batch_multiplier: float = 0.5
    cache_write: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                what = "a factor" if field.name == "batch_multiplier" else "USD per million tokens"
                raise InvalidRequest(
                    f"Prices: {field.name} is {value!r}, not {what} of 0 or more",
                    hint="for example pllm.Prices(input=1, output=5). Nothing was sent.",
                )


@dataclasses.dataclass(frozen=True, slots=True)
class Rate:
    """USD per million tokens; each tier holds for requests of more than `start` input tokens."""

    base: float
    tiers: tuple[tuple[int, float], ...] = ()

    def scaled(self, share: float) -> Rate:
        return Rate(self.base * share, tuple((start, usd * share) for start, usd in self.tiers))

    def ceiling(self) -> Rate:
        """The highest rate for any request of at most this size."""
        highest, tiers = self.base, []
        for start, usd in self.tiers:
            highest = max(highest, usd)
            tiers.append((start, highest))
        return Rate(self.base, tuple(tiers))

    def at(self, size: pl.Expr) -> pl.Expr:
        rate = pl.lit(self.base)
        for start, usd in self.tiers:
            rate = pl.when(size > start).then(pl.lit(usd)).otherwise(rate)
        return rate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """All that a request's price depends on; None where the provider has no price of its own."""

    input: Rate
    output: Rate | None
    cache_read: Rate | None = None
    cache_write: Rate | None = None
    cache_write_1h: Rate | None = None
    request: Rate | None = None
    writes_from: int | None = 0

    def named(self) -> Iterator[tuple[str, Rate]]:
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if isinstance(rate, Rate):
                yield field.name, rate

    def scaled(self, share: float) -> Rates:
        scaled: dict[str, Any] = {name: rate.scaled(share) for name, rate in self.named()}
        return dataclasses.replace(self, **scaled)


def rates_of(
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None,
    base_url: str | None,
    *,
    service_tier: str | None = None,
    inference_geo: str | None = None,
) -> Rates | None:
    """What one model costs now; None where that is not known.

    Parameters
    ----------
    service_tier
        One of `TIERS`; batches have none.
    inference_geo
        As Anthropic reports it.
    """
    if prices is not None:
        return _own(prices, provider, mode)
    if provider in _LOCAL:
        return None
    # Asked anew each time (about 1 ms): prices change by date and by the hour in a process that lives on.
    now = datetime.now(UTC)
    found = _look_up(provider, model, base_url, now, None)
    standard = None if found is None else _read(found)
    if found is None or standard is None:
        return None
    rates: Rates | None = standard
    if mode == "batch" or service_tier is not None:
        context = {"processing": "batch"} if mode == "batch" else {"service_tier": str(service_tier)}
        other = _look_up(provider, model, base_url, now, context)
        rates = None if other is None else _read(other)
        if rates == standard:  # not listed: the library gives the standard price without a word
            share = _DOCUMENTED_BATCH_SHARE.get(found.provider.id) if mode == "batch" else None
            rates = None if share is None else standard.scaled(share)
    if rates is None or inference_geo is None:
        return rates
    extra = _GEO_SHARE.get(inference_geo)
    return None if extra is None else rates.scaled(extra)


def _own(prices: Prices, provider: str, mode: Mode) -> Rates:
    def rate(usd: float | None) -> Rate | None:
        return None if usd is None else Rate(float(usd))

    rates = Rates(
        input=Rate(float(prices.input)),
        output=rate(prices.output),
        cache_read=rate(prices.cached_input),
        cache_write=rate(prices.cache_write),
        writes_from=_WRITES_FROM.get(provider, 0),
    )
    return rates.scaled(prices.batch_multiplier) if mode == "batch" else rates


def _look_up(
    provider: str, model: str, base_url: str | None, now: datetime, context: dict[str, str] | None
) -> PriceCalculation | None:
    from genai_prices import Usage, calc_price  # 0.7 s the first time: not at import

    # Batch rates are dated; with an earlier time than they were verified the library gives the
    # standard price without a word. Hence today's prices, whenever the job was sent.
    try:
        if base_url is not None:
            return calc_price(
                Usage(),
                model,
                provider_api_url=base_url,
                genai_request_timestamp=now,
                price_context=context,
            )
        found = calc_price(
            Usage(),
            model,
            provider_id=provider,
            genai_request_timestamp=now,
            price_context=context,
        )
    except LookupError:
        return None
    # Provider ids are matched loosely there ("my-openai-proxy" is openai); a guess is not a price.
    return found if found.provider.id == provider else None


def _read(found: PriceCalculation) -> Rates | None:
    """The rates of a look-up; None for models that aren't priced by tokens (speech, moderation)."""
    listed = found.model_price
    base = _rate(listed, "input_mtok")
    if base is None:
        return None
    request = _rate(listed, "requests_kcount")
    return Rates(
        input=base,
        output=_rate(listed, "output_mtok"),
        cache_read=_rate(listed, "cache_read_mtok"),
        cache_write=_rate(listed, "cache_write_mtok"),
        cache_write_1h=_rate(listed, "cache_write_1h_mtok"),
        request=None if request is None else request.scaled(PER / 1000),
        writes_from=_WRITES_FROM.get(found.provider.id, 0),
    )


def _rate(listed: ModelPrice, name: str) -> Rate | None:
    from genai_prices.types import TieredPrices

    price = getattr(listed, name)
    if price is None:
        return None
    if isinstance(price, TieredPrices):
        tiers = sorted((tier.start, float(tier.price)) for tier in price.tiers)
        return Rate(float(price.base), tuple(tiers))
    return Rate(float(price))
