"""What requests cost: token counts -> USD, offline, one expression for a whole column.

Rates come from genai-prices (0.2.3 and newer; Pydantic, MIT), which bundles the providers' price
pages in its wheel and is asked once per call, never per row. `genai_prices.UpdatePrices`, where the
application runs it, is honoured. What is not known is null (or None), never 0.

Providers price a request by its size: past a threshold (272,000 input tokens for gpt-6-luna, 100,000
for claude-haiku-5-5) the higher rate holds for all of its tokens, so sums of tokens cannot be priced.

Not in any figure here: tools that a provider bills per call (web search, file search), regional and
``inference_geo`` surcharges, priority, flex and fast service tiers, taxes and negotiated prices.
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

__all__ = ["Mode", "Prices", "cost_usd", "is_known", "upper_bound_usd"]

Mode: TypeAlias = Literal["batch", "realtime"]

_PER = 1_000_000
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
    your own.

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
class _Rate:
    """USD per million tokens; each tier holds for requests of more than `start` input tokens."""

    base: float
    tiers: tuple[tuple[int, float], ...] = ()

    def scaled(self, share: float) -> _Rate:
        return _Rate(self.base * share, tuple((start, usd * share) for start, usd in self.tiers))

    def ceiling(self) -> _Rate:
        """The highest rate for any request of at most this size."""
        highest, tiers = self.base, []
        for start, usd in self.tiers:
            highest = max(highest, usd)
            tiers.append((start, highest))
        return _Rate(self.base, tuple(tiers))

    def at(self, size: pl.Expr) -> pl.Expr:
        rate = pl.lit(self.base)
        for start, usd in self.tiers:
            rate = pl.when(size > start).then(pl.lit(usd)).otherwise(rate)
        return rate


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    """All that a request's price depends on; None where the provider has no price of its own."""

    input: _Rate
    output: _Rate | None
    cache_read: _Rate | None = None
    cache_write: _Rate | None = None
    cache_write_1h: _Rate | None = None
    request: _Rate | None = None
    writes_from: int | None = 0

    def named(self) -> Iterator[tuple[str, _Rate]]:
        for field in dataclasses.fields(self):
            rate = getattr(self, field.name)
            if isinstance(rate, _Rate):
                yield field.name, rate

    def scaled(self, share: float) -> _Rates:
        scaled: dict[str, Any] = {name: rate.scaled(share) for name, rate in self.named()}
        return dataclasses.replace(self, **scaled)


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
        ``cache_write_tokens`` and, of these, ``cache_write_1h_tokens``. Without the optional columns
        writes are priced as ordinary input, which is too low for Anthropic with ``cache_control`` and
        for gpt-5.6 and newer from 1,024 tokens on.
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
    rates = _rates(provider, model, mode, prices, base_url)
    if rates is None:
        return pl.Series("cost_usd", [None] * usage.height, dtype=pl.Float64)
    parts, sound = _parts(usage.columns, rates)
    size = _count("input_tokens")
    spent = pl.sum_horizontal(*(parts[name] * rate.at(size) for name, rate in rates.named()))
    return usage.select(cost_usd=pl.when(sound).then(spent / _PER)).to_series()


def upper_bound_usd(
    input_tokens: pl.Series,
    output_tokens_max: pl.Series | int | None,
    *,
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None = None,
    base_url: str | None = None,
    cache_control: bool = False,
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
    cache_control
        True if the requests ask Anthropic to cache: then all input may be billed as writes, at up to
        twice the input rate.

    Returns
    -------
    float or None
        USD; 0.0 for no requests. None if the price is not known, a count is null or negative, or
        the output is paid for and has no limit.
    """
    if not len(input_tokens):
        return 0.0
    rates = _rates(provider, model, mode, prices, base_url)
    if rates is None:
        return None
    if rates.output is not None and output_tokens_max is None:
        return None
    given = pl.select(
        input_tokens=input_tokens,
        output_tokens=0 if output_tokens_max is None else output_tokens_max,
    ).cast(pl.Int64)
    size, output = pl.col("input_tokens"), pl.col("output_tokens")
    # Without a price for output (embeddings) there can't be any; it wouldn't be free.
    sound = (size >= 0) & ((output == 0) if rates.output is None else (output >= 0))
    if not given.select(sound.fill_null(False).all()).item():
        return None
    usd = size * _input_ceiling(rates, size, cache_control)
    if rates.output is not None:
        usd += output * rates.output.ceiling().at(size)
    if rates.request is not None:
        usd += rates.request.ceiling().at(size)
    return float(given.select((usd / _PER).sum()).item())


def is_known(
    *,
    provider: str,
    model: str,
    mode: Mode,
    prices: Prices | None = None,
    base_url: str | None = None,
) -> bool:
    """Whether `cost_usd` can price answers of this model; if not, all that it gives is null."""
    return _rates(provider, model, mode, prices, base_url) is not None


def _input_ceiling(rates: _Rates, size: pl.Expr, cache_control: bool) -> pl.Expr:
    plain = rates.input.ceiling().at(size)
    writes = [r for r in (rates.cache_write, rates.cache_write_1h) if r is not None]
    since = 0 if cache_control else rates.writes_from
    if not writes or since is None:
        return plain
    written = pl.max_horizontal(plain, *(r.ceiling().at(size) for r in writes))
    return pl.when(size >= since).then(written).otherwise(plain)


def _count(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64)


def _parts(columns: list[str], rates: _Rates) -> tuple[dict[str, pl.Expr], pl.Expr]:
    """Disjoint token counts, one per rate, and whether they make sense.

    As in genai-prices, a kind of token that has no price of its own is billed as the kind that it
    is a part of: reads and writes as input, one-hour writes as writes.
    """
    nothing = pl.lit(0, dtype=pl.Int64)

    def part(name: str, rate: _Rate | None) -> pl.Expr:
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


def _rates(
    provider: str, model: str, mode: Mode, prices: Prices | None, base_url: str | None
) -> _Rates | None:
    if prices is not None:
        return _own(prices, provider, mode)
    if provider in _LOCAL:
        return None
    # Asked anew each time (about 1 ms): prices change by date and by the hour in a process that lives on.
    now = datetime.now(UTC)
    found = _look_up(provider, model, base_url, now, batch=False)
    standard = None if found is None else _read(found)
    if found is None or standard is None or mode == "realtime":
        return standard
    batch = _look_up(provider, model, base_url, now, batch=True)
    listed = None if batch is None else _read(batch)
    if listed != standard:
        return listed
    share = _DOCUMENTED_BATCH_SHARE.get(found.provider.id)
    return None if share is None else standard.scaled(share)


def _own(prices: Prices, provider: str, mode: Mode) -> _Rates:
    def rate(usd: float | None) -> _Rate | None:
        return None if usd is None else _Rate(float(usd))

    rates = _Rates(
        input=_Rate(float(prices.input)),
        output=rate(prices.output),
        cache_read=rate(prices.cached_input),
        cache_write=rate(prices.cache_write),
        writes_from=_WRITES_FROM.get(provider, 0),
    )
    return rates.scaled(prices.batch_multiplier) if mode == "batch" else rates


def _look_up(
    provider: str, model: str, base_url: str | None, now: datetime, *, batch: bool
) -> PriceCalculation | None:
    from genai_prices import Usage, calc_price  # 0.7 s the first time: not at import

    # Batch rates are dated; with an earlier time than they were verified the library gives the
    # standard price without a word. Hence today's prices, whenever the job was sent.
    context = {"processing": "batch"} if batch else None
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


def _read(found: PriceCalculation) -> _Rates | None:
    """The rates of a look-up; None for models that aren't priced by tokens (speech, moderation)."""
    listed = found.model_price
    base = _rate(listed, "input_mtok")
    if base is None:
        return None
    request = _rate(listed, "requests_kcount")
    return _Rates(
        input=base,
        output=_rate(listed, "output_mtok"),
        cache_read=_rate(listed, "cache_read_mtok"),
        cache_write=_rate(listed, "cache_write_mtok"),
        cache_write_1h=_rate(listed, "cache_write_1h_mtok"),
        request=None if request is None else request.scaled(_PER / 1000),
        writes_from=_WRITES_FROM.get(found.provider.id, 0),
    )


def _rate(listed: ModelPrice, name: str) -> _Rate | None:
    from genai_prices.types import TieredPrices

    price = getattr(listed, name)
    if price is None:
        return None
    if isinstance(price, TieredPrices):
        tiers = sorted((tier.start, float(tier.price)) for tier in price.tiers)
        return _Rate(float(price.base), tuple(tiers))
    return _Rate(float(price))
