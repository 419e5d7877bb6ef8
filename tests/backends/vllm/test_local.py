"""What the local backend hands to its engine, and in which order. No vLLM needed."""

from __future__ import annotations

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm.answer import DONE
from polars_llm.backends.base import Learns
from polars_llm.backends.options import Options
from polars_llm.backends.vllm import sampling
from polars_llm.request import Requests
from polars_llm.schema import freeze


def rows_of(texts: list[str]) -> pl.DataFrame:
    return pl.DataFrame({"key": [bytes([i]) * 32 for i in range(len(texts))], "prompt": texts}).with_columns(
        attempt=pl.lit(1), kind=pl.lit("t"), system=pl.lit(None, pl.String), sample=pl.lit(0)
    )


def test_texts_to_embed_of_about_one_length_are_together() -> None:
    """Builds that pad a batch to its longest text compute what is padded."""
    model, _, _ = pllm.VLLM("org/name", vector_length=8).embedding(None)
    backend = model.backend()
    texts = ["x" * (1 + i * 37 % 200) for i in range(100)]
    requests = Requests(backend.header(Options()), rows_of(texts))
    lengths = [len(str(ask.prompt)) for pack in backend._packs(requests) for ask in pack]
    assert sorted(lengths) == sorted(map(len, texts))
    assert lengths == sorted(lengths, reverse=True)


def test_where_answers_grow_with_prompts_the_longest_come_first() -> None:
    backend = pllm.VLLM("org/name").backend()
    assert isinstance(backend, Learns)
    header = backend.header(Options())
    texts = [chr(97 + i) * (20 * i + 10) for i in range(20)]
    frame = rows_of(texts)
    earlier = pl.LazyFrame(
        {"input_tokens": range(300), "output_tokens": [i * i for i in range(300)]}
    ).with_columns(provider=pl.lit("vllm"), model=pl.lit(backend._shown), state=pl.lit(DONE))

    def keys() -> list[int]:
        return [ask.key[0] for pack in backend._packs(Requests(header, frame)) for ask in pack]

    assert keys() == list(range(20))
    backend.learn(earlier.with_columns(model=pl.lit("another")))
    assert keys() == list(range(20))
    backend.learn(earlier)
    assert keys() == list(reversed(range(20)))


def test_a_schema_is_kept_to_by_the_engine_and_part_of_the_key() -> None:
    backend = pllm.VLLM("org/name").backend()
    schema = freeze({"b": str, "a": int | None}).json
    header = backend.header(Options(schema=schema))
    assert header.schema == schema
    assert sampling.arguments(header, 0)["structured_outputs"] == {"json": schema}
    assert header.digest() != backend.header(Options()).digest()
    assert "structured_outputs" not in sampling.arguments(backend.header(Options()), 0)
    with pytest.raises(pllm.InvalidRequest, match="contradict"):
        backend.header(Options(schema=schema, params={"structured_outputs": {"choice": ["a"]}}))
