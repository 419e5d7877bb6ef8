"""Local mode: vLLM in this process answers a column, block by block."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE, FAILED, RETRY
from polars_llm.backends import engines, sampling
from polars_llm.backends.base import Options
from polars_llm.backends.engines import Ask, Finished, Refused
from polars_llm.backends.order import Order, arrange, expected_lengths
from polars_llm.backends.replies import REPLY_SCHEMA, Reply, after_ctrl_c
from polars_llm.errors import InvalidRequest
from polars_llm.job import Mode
from polars_llm.request import Json, RequestHeader, Requests
from polars_llm.schema.rules import VLLM, worded

__all__ = ["VLLMLocal"]

# How much is lost at most when the process is killed, beside what was in flight.
_BLOCK_SECONDS = 1.0
# Tokens of prompts that the engine is handed at a time; between two it takes a step.
_PACK_TOKENS = 4_096
# Earlier answers that say how long the next ones will be.
_HISTORY = 10_000

_SCHEMA: Mapping[str, pl.DataType] = {
    **REPLY_SCHEMA,
    "cost_usd": pl.Float64(),
    "vector": pl.List(pl.Float32()),
}


class VLLMLocal:
    """One model and its settings; the engine is shared by all of this process that have the same."""

    provider = "vllm"
    base_url: str | None = None
    mode: Mode = "local"
    prices = None
    batch = None
    note = ""
    """Tokens a second, for the progress bar."""

    def __init__(
        self,
        model: str,
        *,
        key_name: str,
        settings: Mapping[str, Json],
        arguments: Mapping[str, Any],
        endpoint: str = sampling.CHAT,
        order: Order = "auto",
        price_per_hour: float | None = None,
    ) -> None:
        """`model` is what vLLM gets; `key_name` and `settings` stand for it in keys."""
        self._model = model
        self._shown = Path(model).name if model != key_name else model
        self._key_name = key_name
        self._settings = settings
        self._arguments = arguments
        self._endpoint = endpoint
        self._order = order
        self._price = price_per_hour
        self._answered = pl.DataFrame(schema={"input_tokens": pl.Int64, "output_tokens": pl.Int64})

    def __repr__(self) -> str:
        return f"VLLMLocal({self._model!r})"

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

    def run(self, requests: Sequence[Requests]) -> Generator[pl.DataFrame, None, None]:
        """Answer them all; a block about every second, while the engine goes on."""
        self._check(requests)
        packs = chain.from_iterable(self._packs(r) for r in requests)
        self.note = "starting the engine"
        yield pl.DataFrame(schema=_SCHEMA)  # the time to show it
        chat = self._endpoint == sampling.CHAT
        rows: list[Reply] = []
        handed: list[Reply] = []
        since, took = time.monotonic(), 0.0
        try:
            with engines.running(self._model, self._arguments, packs, chat=chat) as run:
                since = time.monotonic()
                while not run.over:
                    for event in run.events(_BLOCK_SECONDS):
                        rows.append(_reply(event))
                    block = self._block(rows, time.monotonic() - since)
                    if rows:  # else the time goes on to those that come next
                        since, took = time.monotonic(), time.monotonic() - since
                        handed, rows = rows, []
                    yield block
        except KeyboardInterrupt:
            last = time.monotonic() - since
            yield from after_ctrl_c(lambda: pl.concat([self._block(handed, took), self._block(rows, last)]))

    def _check(self, requests: Sequence[Requests]) -> None:
        if self._endpoint == sampling.CHAT:
            return
        for r in requests:
            if r.frame["system"].null_count() < r.height or (r.frame["kind"] != "t").any():
                raise InvalidRequest(
                    "raw=True sends a text as it is: there is no place for a system prompt or for messages",
                    hint="write all of it into the prompt, or leave raw out. Nothing was asked.",
                )

    def _packs(self, requests: Requests) -> Iterator[Sequence[Ask]]:
        """Asks in order, a pack at a time."""
        order = self._order
        if order == "auto" and self._endpoint == sampling.EMBEDDINGS:
            order = "length"  # for builds that pad to the longest of a batch; others do not mind
        guess = expected_lengths(requests.frame, self._answered)
        plan = arrange(requests.frame, order, budget=_PACK_TOKENS, expected=guess)
        template = sampling.template_arguments(requests.header)
        by_sample: dict[int, dict[str, Any]] = {}
        ordered = requests.frame.select("key", "prompt", "kind", "system", "sample")[plan.rows]
        start = 0
        for length in plan.packs.rle().struct.field("len"):
            asks = []
            for row in ordered.slice(start, length).iter_rows():
                key, prompt, kind, system, sample = row
                if sample not in by_sample:
                    by_sample[sample] = sampling.arguments(requests.header, sample)
                chat = self._endpoint == sampling.CHAT
                said = _messages(prompt, kind, system) if chat else prompt
                asks.append(Ask(key, said, by_sample[sample], template))
            yield asks
            start += length

    def _block(self, rows: list[Reply], seconds: float) -> pl.DataFrame:
        block = pl.DataFrame(rows, schema=_SCHEMA).with_columns(model=pl.lit(self._shown))
        if rows:
            self.note = f"{int(block['output_tokens'].sum()) / max(seconds, 1e-3):,.0f} tokens/s"
        if self._price is None:
            return block
        # The machine's time, shared by the tokens that it computed.
        computed = pl.col("input_tokens") - pl.col("cached_input_tokens") + pl.col("output_tokens")
        total = max(int(block.select(computed.sum()).item() or 0), 1)
        cost = computed * (self._price / 3_600 * seconds / total)
        return block.with_columns(cost_usd=pl.when(pl.col("state") == DONE).then(cost))

    def close(self) -> None:
        """Nothing: the engine stays for the next evaluation."""

    def close_engine(self) -> None:
        """Close the engine of this configuration, if there is one."""
        engines.close(self._model, self._arguments)


def _messages(prompt: str, kind: str, system: str | None) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    if kind == "m":
        said.extend(msgspec.json.decode(prompt, type=list[dict[str, Any]]))
    else:
        said.append({"role": "user", "content": prompt})
    return said


def _reply(event: Finished | Refused) -> Reply:
    if isinstance(event, Refused):
        return {"key": event.key, "state": FAILED, "error": event.kind, "error_message": event.message}
    output = event.output
    if not hasattr(output.outputs, "__len__"):
        return _vector(event)
    answer = output.outputs[0]
    done = answer.finish_reason not in {"abort", "error"}
    return {
        "key": event.key,
        "state": DONE if done else RETRY,
        "text": answer.text if done else None,
        "error": None if done else f"engine_{answer.finish_reason}",
        "finish_reason": answer.finish_reason,
        "input_tokens": len(output.prompt_token_ids or ()),
        "cached_input_tokens": output.num_cached_tokens,
        "output_tokens": len(answer.token_ids),
    }


def _vector(event: Finished) -> Reply:
    return {
        "key": event.key,
        "state": DONE,
        "finish_reason": "stop",
        "input_tokens": len(event.output.prompt_token_ids or ()),
        "cached_input_tokens": event.output.num_cached_tokens or 0,
        "output_tokens": 0,
        "vector": event.output.outputs.data.float().cpu().numpy(),
    }
