"""What a verb would send and cost, in one row. Nothing is sent, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import polars as pl

from polars_llm.answer import DONE, FAILED
from polars_llm.backends.base import is_batch
from polars_llm.errors import InvalidRequest
from polars_llm.frame.embeddings import embed
from polars_llm.frame.inputs import PROMPT
from polars_llm.frame.sending import warn_of_unknown_prices
from polars_llm.frame.verbs import Verb, classify, generate
from polars_llm.jobs.budget import bound, output_tokens_max, sizes
from polars_llm.jobs.lookup import in_flight, prefixes, unanswered
from polars_llm.jobs.packing import pack
from polars_llm.pricing import cost_usd
from polars_llm.request import Requests

__all__ = ["ESTIMATE", "CountTokens", "estimate", "resolve_verb"]

CountTokens = Callable[[str], int]

ESTIMATE: dict[str, pl.DataType] = {
    "rows": pl.Int64(),
    "nulls": pl.Int64(),
    "unique": pl.Int64(),
    "cached": pl.Int64(),
    "in_flight": pl.Int64(),
    "failed": pl.Int64(),
    "to_send": pl.Int64(),
    "batches": pl.Int64(),
    "input_tokens": pl.Int64(),
    "input_tokens_method": pl.String(),
    "output_tokens_max": pl.Int64(),
    "cost_usd": pl.Float64(),
    "cost_usd_max": pl.Float64(),
}

# English text has about 4 bytes a token (OpenAI's help page "What are tokens and how to count them"); chat
# templates add a few tokens a message (tiktoken's cookbook counts 3 and 3 for the reply).
_BYTES_PER_TOKEN = 4.0
_TOKENS_PER_REQUEST = 7
# So many answers of this column tell more than a rule of thumb.
_ENOUGH = 10
_SAMPLE = 20_000


_VERBS: dict[str, Callable[..., Verb]] = {"generate": generate, "classify": classify, "embed": embed}


def resolve_verb(name: str) -> Callable[..., Verb]:
    """A verb by its name.

    Raises
    ------
    InvalidRequest
        At call: there is none of that name.
    """
    if name not in _VERBS:
        known = ", ".join(repr(known) for known in _VERBS)
        raise InvalidRequest(f"verb is {name!r}", hint=f"verb takes {known}. Nothing was sent.")
    return _VERBS[name]


def estimate(batches: Iterator[pl.DataFrame], verb: Verb, count_tokens: CountTokens | None) -> pl.DataFrame:
    """One row of ESTIMATE for the rows of `batches`, which hold the verb's inputs."""
    warn_of_unknown_prices([verb])
    seen = _Seen(verb)
    for batch in batches:
        seen.add(verb.checked(batch))
    facts = seen.counts()
    new = seen.to_send()
    usage = _Usage(verb, seen.known(), count_tokens)
    facts |= _tokens(verb, new, usage)
    return pl.DataFrame([facts], schema=ESTIMATE)


class _Seen:
    """The distinct requests among all rows, and what is known of them."""

    def __init__(self, verb: Verb) -> None:
        self._verb = verb
        self._rows = self._nulls = 0
        self._found: list[pl.DataFrame] = []
        self._missing: list[pl.DataFrame] = []
        self._known: list[pl.DataFrame] = []

    def add(self, rows: pl.DataFrame) -> None:
        found = self._verb.find(rows, self._verb.keys(rows))
        missing = self._verb.requests(rows, found).frame
        # Answered, and does not fit its schema: no retry_failed sends it again.
        misfit = found["reason"].is_not_null() if "reason" in found.columns else pl.lit(False)
        found = found.with_columns(misfit=misfit).drop("value", "reason", "retry", strict=False)
        self._rows += rows.height
        self._nulls += found["key"].null_count()
        self._found.append(found.drop_nulls("key").unique("key"))
        self._missing.append(missing)
        if sum(map(len, self._known)) < _SAMPLE and rows[PROMPT].dtype == pl.String:
            done = (found["state"] == DONE).fill_null(False)
            self._known.append(found.with_columns(prompt=rows[PROMPT]).filter(done).unique("key"))

    def counts(self) -> dict[str, object]:
        found = pl.concat(self._found).unique("key")
        open_keys = in_flight(self._verb.store)[1]["key"]
        waiting = found["key"].is_in(open_keys.implode())
        again = unanswered(found.filter(~pl.col("misfit")), self._verb.policy)["key"].implode()
        final = found.filter(pl.col("state") >= FAILED, ~waiting)
        return {
            "rows": self._rows,
            "nulls": self._nulls,
            "unique": found.height,
            "cached": found.filter(pl.col("state") == DONE, ~waiting).height,
            "in_flight": int(waiting.sum()),
            "failed": final.filter(~pl.col("key").is_in(again)).height,
        }

    def to_send(self) -> Requests:
        verb = self._verb
        frame = pl.concat(self._missing).unique("key", maintain_order=True)
        open_keys = in_flight(verb.store)[1]["key"]
        return verb.distinct(frame.filter(~prefixes(frame).is_in(open_keys.implode())))

    def known(self) -> pl.DataFrame:
        """Prompts that were answered, with their usage."""
        if not self._known:
            schema = {"prompt": pl.String, "input_tokens": pl.Int64, "output_tokens": pl.Int64}
            return pl.DataFrame(schema=schema)
        found = pl.concat(self._known).head(_SAMPLE)
        used = self._verb.store.results.read(found, ["input_tokens", "output_tokens"])
        return found.select("prompt").hstack(used)


class _Usage:
    """Tokens of requests that were not answered yet, learnt from those that were."""

    def __init__(self, verb: Verb, known: pl.DataFrame, count_tokens: CountTokens | None) -> None:
        self._count = count_tokens
        known = known.with_columns(size=pl.col("prompt").str.len_bytes().cast(pl.Int64))
        read = known.drop_nulls("input_tokens")
        written = known.drop_nulls("output_tokens")
        self.output = float(written["output_tokens"].mean()) if written.height >= _ENOUGH else None  # type: ignore[arg-type]
        self._per_byte, self._fixed = 1 / _BYTES_PER_TOKEN, float(_TOKENS_PER_REQUEST)
        self.method = "4 bytes of UTF-8 a token, 7 tokens a request"
        if count_tokens is not None:
            self.method = "count_tokens, 7 tokens a request"
        elif read.height >= _ENOUGH:
            self._per_byte, self._fixed = _line(read["size"], read["input_tokens"])
            self.method = f"{read.height:,} answers of this column"
        self._learnt = count_tokens is None and read.height >= _ENOUGH
        self._system = verb.system if isinstance(verb.system, str) and read.height < _ENOUGH else ""

    def input_tokens(self, requests: Requests) -> pl.Series:
        """Of each request; null where it has images and nothing is known of such."""
        # Nobody here knows how many tokens an image is; what came back for others of the column tells.
        seen = requests.frame["attachments"] if "attachments" in requests.frame.columns else None
        tokens = self._of_texts(requests)
        if seen is None or self._learnt:
            return tokens
        return pl.select(pl.when(seen.is_null()).then(tokens)).to_series()

    def _of_texts(self, requests: Requests) -> pl.Series:
        prompts = requests.frame["prompt"]
        systems = requests.frame["system"]
        if self._count is not None:
            count = self._count
            tokens = [count(p) + (count(s) if s else 0) for p, s in zip(prompts, systems, strict=True)]
            return pl.Series(tokens, dtype=pl.Float64) + _TOKENS_PER_REQUEST
        size = prompts.str.len_bytes().cast(pl.Float64)
        if self._system or systems.n_unique() > 1:
            size = size + systems.str.len_bytes().fill_null(0).cast(pl.Float64)
        return (size * self._per_byte + self._fixed).ceil()


def _line(size: pl.Series, tokens: pl.Series) -> tuple[float, float]:
    """Tokens = slope * bytes + constant, least squares; what is constant over a column (system prompt,
    schema) is in the constant."""
    x, y = size.cast(pl.Float64), tokens.cast(pl.Float64)
    mean_x, mean_y = float(x.mean()), float(y.mean())  # type: ignore[arg-type]
    spread = float(((x - mean_x) ** 2).sum())
    slope = float(((x - mean_x) * (y - mean_y)).sum()) / spread if spread else 0.0
    if slope < 0:
        slope = 0.0
    return slope, mean_y - slope * mean_x


def _tokens(verb: Verb, new: Requests, usage: _Usage) -> dict[str, object]:
    tokens = usage.input_tokens(new)
    longest = output_tokens_max(verb.header)
    backend = verb.backend
    batches = 0
    if is_batch(backend):
        batches = sum(not batch.oversized for batch in pack(backend.render(new), backend.limits))
    expected = usage.output if usage.output is not None else longest
    return {
        "to_send": new.height,
        "batches": batches,
        "input_tokens": None if tokens.has_nulls() else math.ceil(tokens.sum()),
        "input_tokens_method": usage.method,
        "output_tokens_max": None if longest is None else longest * new.height,
        "cost_usd": _expected(verb, tokens, expected) if new.height else 0.0,
        "cost_usd_max": bound(backend, verb.header, sizes(backend, new)),
    }


def _expected(verb: Verb, tokens: pl.Series, output: float | None) -> float | None:
    if output is None:
        return None
    asked = {name: verb.header.body.get(name) for name in ("service_tier", "inference_geo")}
    usage = pl.DataFrame({"input_tokens": tokens.cast(pl.Int64)}).with_columns(
        cached_input_tokens=pl.lit(0, pl.Int64),
        output_tokens=pl.lit(math.ceil(output), pl.Int64),
        **{name: pl.lit(None if value is None else str(value), pl.String) for name, value in asked.items()},
    )
    price = cost_usd(
        usage,
        provider=verb.backend.provider,
        model=verb.header.model,
        mode="batch" if is_batch(verb.backend) else "realtime",
        prices=verb.backend.prices,
        base_url=verb.backend.base_url,
    )
    return None if price.has_nulls() else float(price.sum())
