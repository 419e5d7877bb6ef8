"""What an engine in this process and a cluster of them have in common: keys, order, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.options import Options
from polars_llm.backends.replies import REPLY_SCHEMA
from polars_llm.backends.vllm import sampling
from polars_llm.backends.vllm.order import Order, arrange, expected_lengths
from polars_llm.errors import InvalidRequest
from polars_llm.job import Mode
from polars_llm.request import Json, RequestHeader, Requests
from polars_llm.schema.rules import VLLM, worded

__all__ = ["LIVE_SCHEMA", "VLLMBackend", "messages"]

# Earlier answers that say how long the next ones will be.
_HISTORY = 10_000

LIVE_SCHEMA: Mapping[str, pl.DataType] = {
    **REPLY_SCHEMA,
    "cost_usd": pl.Float64(),
    "vector": pl.List(pl.Float32()),
}
"""Columns of a block of replies."""


class VLLMBackend:
    """A model of one's own and its settings; who runs it is for the subclass to say."""

    provider = "vllm"
    base_url: str | None = None
    mode: Mode = "local"
    prices = None
    writes_cache = False
    batch = None
    note = ""
    """What is going on, for the progress bar."""

    def __init__(
        self,
        model: str,
        *,
        key_name: str,
        settings: Mapping[str, Json],
        endpoint: str = sampling.CHAT,
        order: Order = "auto",
        price_per_hour: float | None = None,
    ) -> None:
        """`model` is what vLLM gets; `key_name` and `settings` stand for it in keys."""
        self._model = model
        self._shown = Path(model).name if model != key_name else model
        self._key_name = key_name
        self._settings = settings
        self._endpoint = endpoint
        self._order = order
        self._price = price_per_hour
        self._answered = pl.DataFrame(schema={"input_tokens": pl.Int64, "output_tokens": pl.Int64})

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._model!r})"

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column."""
        embeds = self._endpoint == sampling.EMBEDDINGS
        body = sampling.embedding_body if embeds else sampling.body
        return RequestHeader(
            provider=self.provider,
            base_url=None,
            endpoint=self._endpoint,
            model=self._key_name,
            body=body(options, self._settings),
            schema=worded(options.schema, VLLM) if options.schema else None,
        )

    def learn(self, answers: pl.LazyFrame) -> None:
        """How long the newest answers of this model were, for the order of the next run."""
        if self._order not in {"input", "length"} and self._endpoint != sampling.EMBEDDINGS:
            ours = (pl.col("provider") == self.provider) & (pl.col("model") == self._shown)
            known = answers.filter(ours & (pl.col("state") == DONE))
            self._answered = known.select("input_tokens", "output_tokens").tail(_HISTORY).collect()

    def close(self) -> None:
        """Nothing: what is running stays for the next evaluation."""

    def _check(self, requests: Requests) -> None:
        if self._endpoint == sampling.CHAT:
            return
        if requests.frame["system"].null_count() < requests.height or (requests.frame["kind"] != "t").any():
            raise InvalidRequest(
                "raw=True sends a text as it is: there is no place for a system prompt or for messages",
                hint="write all of it into the prompt, or leave raw out. classify writes a system prompt:"
                " with raw=True use generate and params={'structured_outputs': {'choice': [...]}}."
                " Nothing was asked.",
            )

    def _arranged(self, requests: Requests, budget: int) -> tuple[pl.DataFrame, pl.Series]:
        """``key``, ``prompt``, ``kind``, ``system``, ``sample`` in order, and how many rows each pack has."""
        order = self._order
        if order == "auto" and self._endpoint == sampling.EMBEDDINGS:
            order = "length"  # for builds that pad to the longest of a batch; others do not mind
        guess = expected_lengths(requests.frame, self._answered)
        plan = arrange(requests.frame, order, budget=budget, expected=guess)
        rows = requests.frame.select("key", "prompt", "kind", "system", "sample")[plan.rows]
        return rows, plan.packs.rle().struct.field("len")

    def _block(self, replies: pl.DataFrame, seconds: float) -> pl.DataFrame:
        """A block of replies with the model's name and their costs; `seconds` is what it took."""
        block = replies.with_columns(model=pl.lit(self._shown))
        if block.height:
            self.note = f"{int(block['output_tokens'].sum()) / max(seconds, 1e-3):,.0f} tokens/s"
        if self._price is None:
            return block
        # The machine's time, shared by the tokens that it computed.
        cached = pl.col("cached_input_tokens").fill_null(0)
        computed = pl.col("input_tokens") - cached + pl.col("output_tokens")
        total = max(int(block.select(computed.sum()).item() or 0), 1)
        cost = computed * (self._price / 3_600 * seconds / total)
        return block.with_columns(cost_usd=pl.when(pl.col("state") == DONE).then(cost))


def messages(prompt: str, kind: str, system: str | None) -> list[dict[str, Any]]:
    """A request as messages for a chat template."""
    said: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    if kind == "m":
        said.extend(msgspec.json.decode(prompt, type=list[dict[str, Any]]))
    else:
        said.append({"role": "user", "content": prompt})
    return said
