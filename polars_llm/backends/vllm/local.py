"""Local mode: vLLM in this process answers a column, block by block."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import polars as pl

from polars_llm.answer import DONE, FAILED, RETRY
from polars_llm.backends.replies import Reply, after_ctrl_c
from polars_llm.backends.vllm import engines, sampling
from polars_llm.backends.vllm.backend import LIVE_SCHEMA, VLLMBackend, messages
from polars_llm.backends.vllm.engines import Ask, Finished, Refused
from polars_llm.request import Requests

__all__ = ["VLLMLocal"]

# How much is lost at most when the process is killed, beside what was in flight.
_BLOCK_SECONDS = 1.0
# Tokens of prompts that the engine is handed at a time; between two it takes a step.
_PACK_TOKENS = 4_096


class VLLMLocal(VLLMBackend):
    """One model and its settings; the engine is shared by all of this process that have the same.

    Its note is in tokens a second.
    """

    def __init__(self, model: str, *, arguments: Mapping[str, Any], **facts: Any) -> None:
        """`arguments` are the engine's own; for the others see `VLLMBackend`."""
        super().__init__(model, **facts)
        self._arguments = arguments

    def __getstate__(self) -> dict[str, Any]:
        # An expression carries its backend when it is pickled; the other side reads the hub's token from
        # its environment.
        arguments = {k: v for k, v in self._arguments.items() if k != "hf_token"}
        return {**self.__dict__, "_arguments": arguments}

    def run(self, requests: Sequence[Requests]) -> Generator[pl.DataFrame, None, None]:
        """Answer them all; a block about every second, while the engine goes on."""
        for r in requests:
            self._check(r)
        packs = chain.from_iterable(self._packs(r) for r in requests)
        self.note = "starting the engine"
        yield pl.DataFrame(schema=LIVE_SCHEMA)  # the time to show it
        rows: list[Reply] = []
        handed: list[Reply] = []
        since, took = time.monotonic(), 0.0
        try:
            with engines.running(self._model, self._arguments, packs, endpoint=self._endpoint) as run:
                since = time.monotonic()
                while not run.over:
                    for event in run.events(_BLOCK_SECONDS):
                        rows.append(_reply(event))
                    block = self._block(_frame(rows), time.monotonic() - since)
                    if rows:  # else the time goes on to those that come next
                        since, took = time.monotonic(), time.monotonic() - since
                        handed, rows = rows, []
                    yield block
        except KeyboardInterrupt:
            last = time.monotonic() - since
            yield from after_ctrl_c(
                lambda: pl.concat([self._block(_frame(handed), took), self._block(_frame(rows), last)])
            )

    def _packs(self, requests: Requests) -> Iterator[Sequence[Ask]]:
        """Asks in order, a pack at a time."""
        rows, lengths = self._arranged(requests, _PACK_TOKENS)
        template = sampling.template_arguments(requests.header)
        by_sample: dict[int, dict[str, Any]] = {}
        start = 0
        for length in lengths:
            asks = []
            for row in rows.slice(start, length).iter_rows():
                key, prompt, kind, system, sample = row
                if sample not in by_sample:
                    by_sample[sample] = sampling.arguments(requests.header, sample)
                chat = self._endpoint == sampling.CHAT
                said = messages(prompt, kind, system) if chat else prompt
                asks.append(Ask(key, said, by_sample[sample], template))
            yield asks
            start += length


def _frame(rows: Sequence[Reply]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=LIVE_SCHEMA)


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
