"""The Responses API end to end: the same verb at another endpoint."""

from __future__ import annotations

import base64
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing

MODEL = pllm.OpenAI("gpt-6-luna", endpoint="responses")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(40))


def collected(frame: Any, **options: Any) -> Any:
    return frame.llm.generate("q", **{"model": MODEL, "on_pending": "wait", **options})


def test_answers_come_back_and_nothing_is_kept_there(provider: testing.Provider) -> None:
    df = pl.DataFrame({"q": ["Iron rusts.", None, "Ice melts."]})
    out = collected(df, system="Repeat.", max_tokens=50)
    assert out["response"].to_list() == df["q"].to_list()
    assert provider.bill().billed == 2
    assert pllm.jobs()["requests"].to_list() == [2]


def test_the_endpoint_is_part_of_the_key(provider: testing.Provider) -> None:
    df = pl.DataFrame({"q": ["Iron rusts."]})
    collected(df)
    collected(df, model="openai/gpt-6-luna")
    collected(df.lazy()).collect()
    assert provider.bill().billed == 2


def test_what_is_sent() -> None:
    bodies: list[Any] = []

    def model(request: testing.ModelRequest) -> str:
        bodies.append(request.body)
        return "ok"

    talk = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "a"), ("assistant", "b"))]
    df = pl.DataFrame({"q": [[*talk, {"role": "user", "content": "c"}]], "image": [PNG]})
    with testing.provider(model=model):
        collected(df, images="image", reasoning_effort="low")
    (body,) = bodies
    assert (body["store"], body["instructions"], body["reasoning"]) == (False, "s", {"effort": "low"})
    data = base64.b64encode(PNG).decode()
    assert [m["role"] for m in body["input"]] == ["user", "assistant", "user"]
    assert body["input"][-1]["content"] == [
        {"type": "input_text", "text": "c"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{data}"},
    ]


def test_cut_off_and_refused_answers_say_so() -> None:
    def model(request: testing.ModelRequest) -> Any:
        return {"refusal": "No."} if "bad" in request.prompt else "word " * 100

    with testing.provider(model=model):
        full = collected(pl.DataFrame({"q": ["long", "bad"]}), max_tokens=16, output="full")["response"]
    assert full.struct.field("finish_reason").to_list() == ["length", "refusal"]
    assert full.struct.field("value").null_count() == 1
    assert full.struct.field("output_tokens")[0] == 16


def test_an_interrupted_run_is_collected_by_watch_and_recover(
    provider: testing.Provider, tmp_path: Any
) -> None:
    df = pl.DataFrame({"q": ["Iron rusts."]})
    with pytest.raises(pllm.JobsPending):
        df.llm.generate("q", model=MODEL)
    pllm.Config(cache_dir=tmp_path / "other")
    assert pllm.recover("openai")["answers"].to_list() == [1]
    assert collected(df)["response"].to_list() == ["Iron rusts."]
    pllm.Config.restore_defaults()
    from polars_llm import operate

    assert operate.watch().height == 0
    assert collected(df)["response"].to_list() == ["Iron rusts."]
    assert provider.bill().billed == 1


def test_schemas_and_labels() -> None:
    with testing.provider():
        df = pl.DataFrame({"q": ["Iron rusts."]})
        out = collected(df, schema={"metal": pl.String, "mass": pl.Float64})
        assert out.schema["response"] == pl.Struct({"metal": pl.String, "mass": pl.Float64})
        assert out["response"].null_count() == 0
        sorted_ = df.llm.classify("q", ["metal", "gas"], model=MODEL, on_pending="wait")
        assert sorted_["label"].null_count() == 0


def test_realtime_shares_its_answers_with_batches(provider: testing.Provider) -> None:
    df = pl.DataFrame({"q": [[{"role": "user", "content": "Iron rusts."}]], "image": [PNG]})
    for model in (MODEL, pllm.OpenAI("gpt-6-luna"), pllm.Anthropic("claude-haiku-5-5")):
        for mode in ("realtime", "batch"):
            out = collected(df, images="image", mode=mode, model=model)
            assert out["response"].to_list() == ["Iron rusts."]
    assert (provider.bill().realtime, provider.bill().billed) == (3, 3)


def test_unknown_endpoints_are_refused() -> None:
    with pytest.raises(pllm.InvalidRequest, match="'chat' or 'responses'"):
        pllm.OpenAI("m", endpoint="embeddings")  # type: ignore[arg-type]
    assert repr(MODEL) == "OpenAI('gpt-6-luna', endpoint='responses')"
