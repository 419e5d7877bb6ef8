"""embed, as a user has it: a column of text becomes a column of vectors, counted on the provider's bill."""

from __future__ import annotations

import struct
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing

MODEL = "openai/text-embedding-3-small"
TEXTS = ["Iron rusts.", None, "Ice melts.", "Iron rusts."]


def vector(text: str, size: int = 8) -> list[float]:
    """Numbers whose bits show whether they were rounded on the way."""
    return [struct.unpack("<f", struct.pack("<f", (len(text) + n) / 7))[0] for n in range(size)]


@pytest.fixture
def provider() -> Any:
    def model(request: testing.ModelRequest) -> list[float]:
        return vector(request.inputs[0], request.body.get("dimensions", 1536))

    with testing.provider(model=model) as running:
        yield running


@pytest.fixture
def df() -> pl.DataFrame:
    return pl.DataFrame({"id": [1, 2, 3, 4], "text": TEXTS})


def collected(frame: Any, **options: Any) -> Any:
    return frame.llm.embed("text", **{"model": MODEL, "dimensions": 8, "on_pending": "wait", **options})


def test_first_submits_then_the_same_line_collects(provider: testing.Provider, df: pl.DataFrame) -> None:
    with pytest.raises(pllm.JobsPending):
        df.llm.embed("text", model=MODEL, dimensions=8)
    out = df.llm.embed("text", model=MODEL, dimensions=8)
    assert out.columns == ["id", "text", "embedding"]
    assert out.schema["embedding"] == pl.Array(pl.Float32, 8)
    want = [None if t is None else vector(t) for t in TEXTS]
    assert out["embedding"].to_list() == want
    assert provider.bill().billed == 2
    assert provider.bill().batches == 1


def test_all_forms_are_the_same_requests(provider: testing.Provider, df: pl.DataFrame) -> None:
    eager = collected(df)
    assert_frame_equal(collected(df.lazy()).collect(), eager)
    assert_frame_equal(collected(df.lazy(), on_pending="raise").collect(engine="streaming"), eager)
    expr = pl.col("text").llm.embed(model=MODEL, dimensions=8)
    assert_frame_equal(df.with_columns(expr), eager)
    assert_frame_equal(df.lazy().with_columns(expr).collect(), eager)
    assert_frame_equal(df["text"].llm.embed(model=MODEL, dimensions=8).to_frame(), eager.select("embedding"))
    assert provider.bill().billed == 2


def test_a_driven_query_asks_both_verbs(provider: testing.Provider, df: pl.DataFrame) -> None:
    lf = df.lazy().llm.embed("text", model=MODEL, dimensions=8).filter(pl.col("id") != 3)
    assert lf.llm.collect()["embedding"].to_list() == [vector(TEXTS[0] or ""), None, vector(TEXTS[3] or "")]
    assert provider.bill().billed == 1
    expr = pl.col("text").llm.embed(model=MODEL, dimensions=8, pushdown=True)
    assert df.lazy().select(expr).llm.collect()["embedding"].null_count() == 1
    assert provider.bill().billed == 2


def test_a_models_own_length_is_not_another_request(provider: testing.Provider, df: pl.DataFrame) -> None:
    own = collected(df, dimensions=None)
    assert own.schema["embedding"] == pl.Array(pl.Float32, 1536)
    assert_frame_equal(collected(df, dimensions=1536), own)
    assert provider.bill().billed == 2
    collected(df)
    assert provider.bill().billed == 4


def test_base64_on_the_wire_gives_the_same_bits(provider: testing.Provider, df: pl.DataFrame) -> None:
    out = collected(df, params={"encoding_format": "base64"})
    assert out["embedding"].to_list() == [None if t is None else vector(t) for t in TEXTS]
    assert_frame_equal(collected(df), out)


def test_lazy_schemas_send_nothing(provider: testing.Provider, df: pl.DataFrame) -> None:
    lf = df.lazy().llm.embed("text", model=MODEL, name="v")
    assert lf.collect_schema()["v"] == pl.Array(pl.Float32, 1536)
    full = df.lazy().llm.embed("text", model=MODEL, dimensions=2, output="full")
    struct_ = full.collect_schema()["embedding"]
    assert isinstance(struct_, pl.Struct)
    assert struct_.fields[0].dtype == pl.Array(pl.Float32, 2)
    assert provider.log() == []


def test_realtime_gives_the_same_vectors_for_the_same_keys(
    provider: testing.Provider, df: pl.DataFrame
) -> None:
    own = pllm.OpenAI("text-embedding-3-small", cache_as="https://api.openai.com/v1")
    for model in (MODEL, own):
        out = collected(df, mode="realtime", model=model)
        assert out["embedding"].to_list() == [None if t is None else vector(t) for t in TEXTS]
        assert_frame_equal(collected(df, model=model), out)
    assert (provider.bill().realtime, provider.bill().billed, provider.bill().batches) == (4, 4, 0)


def test_hosts_whose_batches_take_no_embeddings_say_so(df: pl.DataFrame) -> None:
    groq = pllm.OpenAI("m", base_url="https://api.groq.com/openai/v1", vector_length=4)
    with pytest.raises(pllm.InvalidRequest, match="do not take /v1/embeddings"):
        df.llm.embed("text", model=groq)


def test_a_local_model_says_its_length_without_being_loaded(df: pl.DataFrame) -> None:
    lf = df.lazy().llm.embed("text", model=pllm.VLLM("org/name", vector_length=4))
    assert lf.collect_schema()["embedding"] == pl.Array(pl.Float32, 4)
    with pytest.raises(pllm.InvalidRequest, match="not known"):
        df.lazy().llm.embed("text", model="vllm/org/name")
    with pytest.raises(pllm.InvalidRequest, match="dimensions is 0"):
        df.lazy().llm.embed("text", model="vllm/org/name", dimensions=0)


@pytest.mark.parametrize("length", [0, -3, 2.5, "8", True])
def test_a_length_that_no_vector_has_is_said_at_once(length: Any) -> None:
    with pytest.raises(pllm.InvalidRequest, match="vector_length is"):
        pllm.OpenAI("own", vector_length=length)


def test_full_says_what_each_cost(provider: testing.Provider, df: pl.DataFrame) -> None:
    priced = pllm.OpenAI("text-embedding-3-small", prices=pllm.Prices(input=0.02, output=0))
    full = collected(df, output="full", model=priced)["embedding"]
    assert (
        full.dtype
        == df.lazy().llm.embed("text", model=MODEL, dimensions=8, output="full").collect_schema()["embedding"]
    )
    first = full[0]
    assert first["value"] == vector("Iron rusts.")
    assert (first["status"], first["input_tokens"], first["output_tokens"]) == ("done", 3, 0)
    assert first["cost_usd"] == pytest.approx(3 * 0.02e-6 / 2)
    assert full[1] is None
    frame = pllm.results().collect()
    assert frame["vector"].list.len().to_list() == [8, 8]


def test_estimate_and_max_cost(provider: testing.Provider, df: pl.DataFrame) -> None:
    priced = pllm.OpenAI("text-embedding-3-small", prices=pllm.Prices(input=0.02, output=0))
    told = df.llm.estimate("text", verb="embed", model=priced, dimensions=8)
    assert told.select("rows", "to_send", "batches", "output_tokens_max").row(0) == (4, 2, 1, 0)
    assert 0 < told["cost_usd"][0] < told["cost_usd_max"][0] < 1e-5
    with pytest.raises(pllm.BudgetExceeded):
        collected(df, model=priced, max_cost=1e-9)
    collected(df, model=priced, max_cost=1e-5)
    assert provider.bill().billed == 2


def test_pending_rows_are_null(df: pl.DataFrame) -> None:
    with testing.provider(auto=False):
        out = collected(df, on_pending="null")
        assert out.schema["embedding"] == pl.Array(pl.Float32, 8)
        assert out["embedding"].null_count() == 4
        full = collected(df, on_pending="null", output="full")["embedding"]
        assert full.struct.field("status").to_list() == ["pending", None, "pending", "pending"]


@pytest.mark.parametrize("texts", [[], [None, None]])
def test_empty_and_all_null_frames(provider: testing.Provider, texts: list[None]) -> None:
    out = collected(pl.DataFrame({"text": texts}, schema={"text": pl.String}))
    assert out.schema["embedding"] == pl.Array(pl.Float32, 8)
    assert out["embedding"].to_list() == texts
    assert provider.log() == []


def test_another_length_than_said_loses_nothing(provider: testing.Provider, df: pl.DataFrame) -> None:
    wrong = pllm.OpenAI("some-model", vector_length=100)
    with pytest.raises(pllm.InvalidRequest, match="answered with 1,536 numbers, not 100"):
        collected(df, model=wrong, dimensions=None)
    right = pllm.OpenAI("some-model", vector_length=1536)
    assert collected(df, model=right, dimensions=None)["embedding"].null_count() == 1
    assert provider.bill().billed == 2


def test_failed_rows_are_null(df: pl.DataFrame) -> None:
    def model(request: testing.ModelRequest) -> Any:
        return {"error": 400} if "Ice" in request.prompt else vector(request.prompt)

    with testing.provider(model=model):
        with pytest.warns(pllm.LLMWarning, match="1 of 2"):
            out = collected(df)
    assert out["embedding"].null_count() == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "anthropic/claude-haiku-5-5"}, "Anthropic has no embeddings"),
        ({"model": "openai/unheard-of", "dimensions": None}, "not known"),
        ({"dimensions": 0}, "dimensions"),
        ({"output": "all"}, "output"),
        ({"params": {"input": "x"}}, "input"),
    ],
)
def test_what_cannot_be_had_is_said_at_call(
    provider: testing.Provider, df: pl.DataFrame, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(pllm.InvalidRequest, match=said):
        collected(df.lazy(), **options)
    assert provider.log() == []


def test_only_text_has_a_vector(provider: testing.Provider) -> None:
    for column in ([1], [[{"role": "user", "content": "a"}]]):
        with pytest.raises(pllm.InvalidRequest, match="dtype"):
            collected(pl.DataFrame({"text": column}))


def test_generate_and_embed_are_different_requests(provider: testing.Provider, df: pl.DataFrame) -> None:
    collected(df)
    with pytest.raises(pllm.JobsPending) as pending:
        df.llm.generate("text", model=MODEL)
    assert pending.value.requests == 2


def test_a_lost_cache_is_read_back(provider: testing.Provider, df: pl.DataFrame, tmp_path: Any) -> None:
    want = collected(df)
    pllm.Config(cache_dir=tmp_path / "other")
    assert pllm.recover("openai")["answers"].to_list() == [2]
    assert_frame_equal(collected(df), want)
    assert provider.bill().billed == 2
