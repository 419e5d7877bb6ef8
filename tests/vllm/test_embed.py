"""Embeddings by a pooling model in this process."""

from __future__ import annotations

import math

import polars as pl
import pytest

import polars_llm as pllm
from tests.vllm.conftest import make_model, tiny

pytestmark = pytest.mark.skipif(
    not hasattr(pl.DataFrame().llm, "embed"), reason="the verb embed comes with another change"
)

TEXTS = ["The quick brown fox.", "A fox.", "Polars runs a model.", None, "The quick brown fox."]


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("encoder"), "--bert")


def encoder(path: str) -> pllm.VLLM:
    return tiny(path, {"max_model_len": 512})


def test_a_vector_a_row(encoder_dir: str) -> None:
    model = encoder(encoder_dir)
    out = pl.DataFrame({"t": TEXTS}).llm.embed("t", model=model)
    vectors = out["embedding"]
    assert vectors.dtype == pl.Array(pl.Float32, 64)
    assert vectors.is_null().to_list() == [False, False, False, True, False]
    assert vectors[0].to_list() == vectors[4].to_list() != vectors[1].to_list()
    assert pllm.jobs()["requests"].to_list() == [3]
    again = pl.DataFrame({"t": TEXTS[:2]}).lazy().llm.embed("t", model=model).collect()
    assert again["embedding"].equals(vectors[:2])
    assert pllm.jobs().height == 1
    model.close()


def test_a_text_that_is_too_long_fails_alone(encoder_dir: str) -> None:
    frame = pl.DataFrame({"t": ["short", "long " * 1_000]})
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        out = frame.llm.embed("t", model=encoder(encoder_dir))
    assert out["embedding"].is_null().to_list() == [False, True]


def test_asked_for_text_a_pooling_model_is_refused_once(encoder_dir: str) -> None:
    # Not row by row: those failures would be remembered.
    for raw in (False, True):
        model = tiny(encoder_dir, {"max_model_len": 512}, raw=raw)
        with pytest.raises(pllm.InvalidRequest, match="vectors, not text"):
            pl.DataFrame({"t": ["a", "b"]}).llm.generate("t", model=model, max_tokens=2)
    assert pllm.results().collect().height == 0
    model.close()


def test_a_language_model_made_to_embed(model_dir: str) -> None:
    model = tiny(model_dir, {"convert": "embed"})
    out = pl.DataFrame({"t": ["some text", "another"]}).llm.embed("t", model=model, output="full")
    full = out["embedding"].struct.unnest()
    assert full["input_tokens"].min() > 0
    assert full["output_tokens"].to_list() == [0, 0]
    for vector in full["value"]:
        assert math.sqrt(sum(x * x for x in vector)) == pytest.approx(1, abs=1e-4)
    model.close()


def test_of_a_hubs_model_the_length_has_to_be_said() -> None:
    with pytest.raises(pllm.InvalidRequest, match="vector_length"):
        pl.DataFrame({"t": ["a"]}).llm.embed("t", model="vllm/org/name")
