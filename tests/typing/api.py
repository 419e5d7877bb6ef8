"""What type checkers must accept. They cannot see `.llm` on Polars' own classes; these can be named."""

from __future__ import annotations

import polars as pl

import polars_llm as pllm
from polars_llm.namespace import LLMDataFrame, LLMExpr, LLMLazyFrame, LLMSeries

df = pl.DataFrame({"prompt": ["a"]})

eager: pl.DataFrame = LLMDataFrame(df).generate("prompt", model="openai/gpt-6-luna", max_tokens=10)
lazy: pl.LazyFrame = LLMLazyFrame(df.lazy()).generate(pl.col("prompt"), system="Be brief.", output="full")
expr: pl.Expr = LLMExpr(pl.col("prompt")).generate(on_pending="wait", sample=pl.col("n"))
series: pl.Series = LLMSeries(df["prompt"]).generate(params={"service_tier": "flex"}, stop=["\n"])
vectors: pl.DataFrame = LLMDataFrame(df).embed("text", model="openai/text-embedding-3-small", dimensions=8)
lazy_vectors: pl.LazyFrame = LLMLazyFrame(df.lazy()).embed(pl.col("text"), output="full", name="v")
vector_expr: pl.Expr = LLMExpr(pl.col("text")).embed(on_pending="wait")
vector_series: pl.Series = LLMSeries(df["prompt"]).embed(on_error="raise", params={"user": "u"})
seen: pl.DataFrame = LLMDataFrame(df).generate("prompt", images="photo")
seen_too: pl.Series = LLMSeries(df["prompt"]).generate(images=df["photo"])
responses = pllm.OpenAI("gpt-6-luna", endpoint="responses", vector_length=None)

typed: pl.DataFrame = LLMDataFrame(df).generate("prompt", schema={"a": pl.Int64}, retries_on_invalid=1)
labelled: pl.DataFrame = LLMDataFrame(df).classify("prompt", ["spam", "ham"], system="Be strict.")
lazily: pl.LazyFrame = LLMLazyFrame(df.lazy()).classify(
    "prompt", {"spam": "unwanted", "ham": None}, name="kind"
)
labels: pl.Expr = LLMExpr(pl.col("prompt")).classify(pl.Enum(["spam", "ham"]), output="full")
column: pl.Series = LLMSeries(df["prompt"]).classify(("spam", "ham"), on_error="raise")

live: pl.Series = LLMSeries(df["prompt"]).generate(mode="realtime", max_concurrency=8)

model = pllm.OpenAI("gpt-6-luna", base_url="https://host.example/v1", api_key="k", host="vllm")
own = pllm.VLLM("org/name", engine={"max_model_len": 8_192}, order="prefix", price_per_hour=2.5)
local: pl.DataFrame = LLMDataFrame(df).generate("prompt", model=own)
with pllm.Config(model=model, poll_interval=5.0, on_pending="null", on_error="raise"):
    pass

frame: pl.DataFrame = pllm.jobs(open_only=True)
answers: pl.LazyFrame = pllm.results(body=True)

try:
    pass
except pllm.JobsPending as pending:
    names: list[str] = pending.jobs
    seconds: float = pending.next_poll
