"""Columns through a real cluster of one machine: one execution, equal keys and answers, failures alone."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import polars as pl
import pytest

import polars_llm as pllm
from tests.ray.conftest import TOKEN, tiny
from tests.vllm.conftest import make_model
from tests.vllm.conftest import tiny as local

MOOD = {"mood": pl.Enum(["good", "bad"]), "stars": pl.UInt8}


def texts() -> pl.DataFrame:
    said: list[str | None] = [f"Question {i}: what is {i * 7919 % 101}?" for i in range(36)]
    said += [None, "long " * 2_000, said[0]]
    return pl.DataFrame({"q": said, "n": range(len(said))}).with_columns(
        talk=pl.concat_list(
            pl.struct(role=pl.lit("user"), content=pl.lit("Hello")),
            pl.struct(role=pl.lit("assistant"), content=pl.lit("Good day")),
            pl.struct(role=pl.lit("user"), content=pl.col("q").fill_null("?").str.head(60)),
        )
    )


def query(model: pllm.VLLM | pllm.RayVLLM) -> pl.DataFrame:
    """Six verbs: headers that differ in all that a header can hold, and one engine for all."""
    short = pl.col("q").str.head(60)
    return (
        texts()
        .lazy()
        .llm.generate("q", model=model, max_tokens=8, temperature=0, name="plain", output="full")
        .llm.generate(short, model=model, system="Be brief.", max_tokens=8, temperature=0, name="system")
        .llm.generate("talk", model=model, max_tokens=8, temperature=0, name="talk")
        .llm.generate(short, model=model, max_tokens=8, seed=7, sample=pl.col("n") % 3, name="drawn")
        .llm.generate(short, model=model, max_tokens=60, seed=1, schema=MOOD, name="typed")
        .llm.classify(short, ["spam", "ham"], model=model, seed=1, max_tokens=20)
        .llm.collect()
    )


def session_logs() -> Path:
    return Path("/tmp/ray/session_latest").resolve()


def test_one_evaluation_is_one_execution_with_the_keys_and_answers_of_local_mode(
    model_dir: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(model_dir, runtime_env={"env_vars": {"HF_TOKEN": TOKEN, "PLAIN": "shown"}})
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        out = query(model)
    jobs = pllm.jobs()
    assert jobs.height == 1
    assert jobs.select("state", "provider", "failed").rows() == [("ingested", "vllm", 1)]
    plain = out.unnest("plain")
    assert plain["status"].to_list() == ["done"] * 36 + [None, "failed", "done"]
    assert "1024" in plain["error"][37]
    assert len(plain["error"][37]) < 500
    assert plain["value"][0] == plain["value"][38]
    assert plain["input_tokens"].drop_nulls().min() > 10
    assert plain["output_tokens"].drop_nulls().max() == 8
    assert set(plain["finish_reason"].drop_nulls()) <= {"length", "stop"}
    assert plain["cached_input_tokens"].null_count() == out.height  # the processor does not say it
    assert out["typed"].dtype == pl.Struct(MOOD)
    assert out.filter(pl.col("q").is_not_null())["typed"].null_count() == 0
    assert out.filter(pl.col("q").is_not_null())["label"].null_count() == 0

    # What the cluster answered is answered here, and what it answered is what an engine here says.
    here = local(model_dir)
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        again = query(here)
    assert pllm.jobs().height == 1
    assert again.equals(out)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        fresh = query(here)
    for column in ("talk", "system", "drawn", "typed", "label"):
        assert fresh[column].equals(out[column]), column
    same = ("value", "status", "finish_reason", "input_tokens", "output_tokens", "key")
    assert fresh.unnest("plain").select(same).equals(plain.select(same))

    # And the reverse: an answer made here costs the cluster nothing.
    before = pllm.jobs().height
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        assert query(model).equals(fresh)
    assert pllm.jobs().height == before
    here.close()

    # The token went to the workers (tests/ray/test_lost.py) and was written nowhere.
    for place in (own_cache, tmp_path, session_logs()):
        command = ["grep", "-rla", TOKEN, str(place)]
        found = subprocess.run(command, check=False, capture_output=True, text=True)
        assert found.stdout == ""
        assert found.returncode == 1


def test_vectors_and_raw_texts(tmp_path: Path, model_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_model(tmp_path / "encoder", "--bert")
    frame = pl.DataFrame({"t": ["The quick brown fox.", "A fox.", None, "long " * 1_000, "A fox."]})
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        out = frame.llm.embed("t", model=tiny(encoder, {"max_model_len": 512}))["embedding"]
    assert out.dtype == pl.Array(pl.Float32, 64)
    assert out.is_null().to_list() == [False, False, True, True, False]
    here = local(encoder, {"max_model_len": 512})
    assert pllm.jobs().height == 1
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        assert frame.llm.embed("t", model=here)["embedding"].equals(out)
    assert pllm.jobs().height == 1

    texts = pl.DataFrame({"q": ["The quick", "", "brown fox"]})
    asked = {"max_tokens": 4, "temperature": 0, "params": {"logit_bias": {"65": 2}}}
    priced = tiny(model_dir, raw=True, price_per_hour=3_600.0)
    with pytest.warns(pllm.LLMWarning, match="empty_prompt 1") as said:
        raw = texts.llm.generate("q", model=priced, **asked, output="full")
    assert not [warning for warning in said if "concurrent tasks" in str(warning.message)]
    full = raw.unnest("response")
    assert full["value"].is_null().to_list() == [False, True, False]
    assert (full["cost_usd"].drop_nulls() > 0).all()
    assert full["cost_usd"].sum() < 30  # a dollar a second, and no start of an engine in it
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
    with pytest.warns(pllm.LLMWarning, match="empty_prompt 1"):
        there = texts.llm.generate("q", model=local(model_dir, raw=True), **asked)
    assert there["response"].equals(full["value"])


def test_threads_share_one_cluster_which_outlives_them(model_dir: str, own_cache: Path) -> None:
    pllm.RayVLLM("any").close()  # the first of the threads starts it
    given: dict[str, pl.Series] = {}

    def ask(name: str, numbers: range) -> None:
        questions = pl.DataFrame({"q": [f"What is {n} times {n}?" for n in numbers]})
        model = tiny(model_dir)
        given[name] = questions.llm.generate(
            "q", model=model, max_tokens=8, temperature=0, on_pending="wait"
        )["response"]

    threads = [
        threading.Thread(target=ask, args=("first", range(40))),
        threading.Thread(target=ask, args=("second", range(30, 60))),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ask("third", range(50, 70))  # Ray would have ended the process here
    assert {name: answers.null_count() for name, answers in given.items()} == dict.fromkeys(given, 0)
    assert given["first"][30:].to_list() == given["second"][:10].to_list()
    assert given["second"][20:].to_list() == given["third"][:10].to_list()
    # What two of them want is asked by one.
    assert pllm.jobs().select(pl.col("requests").sum(), pl.col("done").sum()).row(0) == (70, 70)
