"""A column through the real engine: answers, failures, parameters, order, two threads, closing."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import warnings
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import polars as pl
import pytest

import polars_llm as pllm
from tests.vllm.conftest import make_model, tiny


def questions(n: int) -> pl.DataFrame:
    return pl.DataFrame({"q": [f"Question {i}: what is {i} and {i * 7919 % 101}?" for i in range(n)]})


def test_each_row_gets_its_answer_once(model: pllm.VLLM) -> None:
    asked = questions(40)
    frame = pl.concat([asked, pl.DataFrame({"q": [None]}, schema={"q": pl.String}), asked])
    out = frame.llm.generate("q", model=model, max_tokens=8, temperature=0, output="full")
    answers = out.unnest("response")
    assert out["q"].equals(frame["q"])
    assert answers["value"].null_count() == 1
    assert answers["value"][:40].equals(answers["value"][41:])
    assert answers["value"].n_unique() > 20
    assert set(answers["finish_reason"].drop_nulls()) <= {"length", "stop"}
    assert answers["input_tokens"].drop_nulls().min() > 10
    assert answers["output_tokens"].drop_nulls().max() == 8
    assert answers["cost_usd"].null_count() == answers.height
    assert pllm.jobs().select("state", "requests", "done", "failed").rows() == [("ingested", 40, 40, 0)]


def test_alone_or_in_a_column_a_row_has_the_same_answer(
    model: pllm.VLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = questions(20).llm.generate("q", model=model, max_tokens=8, temperature=0)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
    one = questions(20)[7:8].llm.generate("q", model=model, max_tokens=8, temperature=0)
    assert one["response"].item() == together["response"][7]


def test_what_was_answered_is_not_asked_again(model: pllm.VLLM) -> None:
    first = questions(10).llm.generate("q", model=model, max_tokens=4)
    again = questions(12).llm.generate("q", model=model, max_tokens=4)
    assert again["response"][:10].equals(first["response"])
    assert pllm.jobs()["requests"].to_list() == [10, 2]


def test_a_prompt_that_is_too_long_fails_alone(model: pllm.VLLM) -> None:
    frame = pl.DataFrame({"q": ["short", "long " * 2_000, "also short"]})
    with pytest.warns(pllm.LLMWarning, match="prompt_too_long 1"):
        out = frame.llm.generate("q", model=model, max_tokens=4, output="full").unnest("response")
    assert out["status"].to_list() == ["done", "failed", "done"]
    assert "1024" in out["error"][1]
    assert len(out["error"][1]) < 1_000


def test_an_empty_raw_prompt_fails_alone(model_dir: str) -> None:
    frame = pl.DataFrame({"q": ["The quick", "", "brown fox"]})
    with pytest.warns(pllm.LLMWarning, match="empty_prompt 1"):
        out = frame.llm.generate("q", model=tiny(model_dir, raw=True), max_tokens=4)
    assert out["response"].is_null().to_list() == [False, True, False]


def test_raw_sends_the_text_without_the_template(model: pllm.VLLM, model_dir: str) -> None:
    frame = questions(2)
    chat = frame.llm.generate("q", model=model, max_tokens=2, output="full").unnest("response")
    raw = frame.llm.generate("q", model=tiny(model_dir, raw=True), max_tokens=2, output="full")
    raw = raw.unnest("response")
    assert (raw["input_tokens"] < chat["input_tokens"]).all()
    with pytest.raises(pllm.InvalidRequest, match="no place for a system prompt"):
        frame.llm.generate("q", model=tiny(model_dir, raw=True), system="Be brief.", max_tokens=2)


def test_system_prompts_reach_the_model(model: pllm.VLLM) -> None:
    frame = questions(2)
    plain = frame.llm.generate("q", model=model, max_tokens=2, output="full").unnest("response")
    system = frame.llm.generate("q", model=model, system="x" * 100, max_tokens=2, output="full")
    system = system.unnest("response")
    assert (system["input_tokens"] > plain["input_tokens"]).all()


def test_typed_answers(model: pllm.VLLM) -> None:
    frame = pl.DataFrame({"q": ["Is it?", None, "Was it?", "Is it?"]})
    schema = {"mood": pl.Enum(["good", "bad"]), "sure": bool, "stars": pl.UInt8, "seen": pl.Date}
    out = frame.llm.generate("q", model=model, schema=schema, max_tokens=100)["response"]
    assert out.dtype == pl.Struct(schema)
    assert out.null_count() == 1
    assert out[0] == out[3]
    labels = frame.llm.classify("q", ["yes", "no"], model=model, max_tokens=30)["label"]
    assert labels.dtype == pl.Enum(["yes", "no"])
    assert labels.null_count() == 1


def test_answers_keep_to_a_schema(model: pllm.VLLM) -> None:
    @dataclasses.dataclass
    class Review:
        label: Literal["good", "bad"]
        stars: Annotated[int, msgspec.Meta(ge=1, le=5)]

    out = questions(12).llm.generate("q", model=model, max_tokens=40, schema=Review, name="r")
    assert out["r"].null_count() == 0
    fields = out["r"].struct.unnest()
    assert set(fields["label"]) <= {"good", "bad"}
    assert fields["stars"].is_between(1, 5).all()
    labels = questions(12).llm.classify("q", ["spam", "ham"], model=model)
    assert labels["label"].null_count() == 0
    assert set(labels["label"].cast(pl.String)) <= {"spam", "ham"}


def test_typed_answers_where_warnings_are_errors(model: pllm.VLLM) -> None:
    # What an engine's libraries warn of in its threads would fail every row.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = questions(3).llm.classify("q", ["yes", "no"], model=model)
    assert out["label"].null_count() == 0


def test_structured_outputs_by_vllms_own_names(model: pllm.VLLM) -> None:
    choice = {"structured_outputs": {"choice": ["yes", "no"]}}
    out = questions(12).llm.generate("q", model=model, max_tokens=4, params=choice)
    assert set(out["response"]) <= {"yes", "no"}


def test_a_schema_that_the_engine_cannot_keep_fails_its_rows_alone(model: pllm.VLLM) -> None:
    unique = {
        "structured_outputs": {"json": {"type": "array", "uniqueItems": True, "items": {"type": "string"}}}
    }
    with pytest.warns(pllm.LLMWarning, match="invalid_request 2"):
        questions(2).llm.generate("q", model=model, max_tokens=4, params=unique)
    assert questions(2).llm.generate("q", model=model, max_tokens=4)["response"].null_count() == 0


def test_with_a_seed_samples_differ_and_repeat(
    model: pllm.VLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(seed: int, sample: int) -> list[str]:
        out = questions(5).llm.generate("q", model=model, max_tokens=8, seed=seed, sample=sample)
        return out["response"].to_list()

    assert ask(7, 0) != ask(7, 1)
    assert ask(7, 1) == ask(8, 0)
    before = ask(7, 0)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
    assert ask(7, 0) == before


def test_lazy_frames_and_expressions(model: pllm.VLLM) -> None:
    frame = questions(8)
    whole = frame.llm.generate("q", model=model, max_tokens=4)
    lazy = frame.lazy().llm.generate("q", model=model, max_tokens=4)
    assert lazy.collect().equals(whole)
    assert lazy.collect(engine="streaming").equals(whole)
    model.close()
    new = frame.with_columns(pl.col("q") + "!").lazy().llm.generate("q", model=model, max_tokens=4)
    assert new.collect(engine="streaming")["response"].null_count() == 0
    other = frame.with_columns(pl.col("q") + "?").lazy().llm.generate("q", model=model, max_tokens=4)
    assert other.llm.collect()["response"].null_count() == 0
    by_expression = frame.select(pl.col("q").llm.generate(model=model, max_tokens=4))
    assert by_expression.to_series().equals(whole["response"])


def test_polars_llms_engine_and_a_running_loop(model: pllm.VLLM) -> None:
    """A notebook evaluates its cells while an event loop runs on the same thread."""
    frame = questions(6)
    driven = frame.lazy().llm.generate("q", model=model, max_tokens=4).collect(engine=pllm.Engine())

    async def cell() -> tuple[pl.DataFrame, pl.DataFrame]:
        marked = frame.with_columns(pl.format("{} {}", "q", pl.lit("now")))
        eager = frame.llm.generate("q", model=model, max_tokens=4)
        return eager, marked.lazy().llm.generate("q", model=model, max_tokens=4).collect()

    eager, lazy = asyncio.run(cell())
    assert driven["response"].null_count() == lazy["response"].null_count() == 0
    assert eager.equals(driven)
    assert pllm.jobs()["requests"].to_list() == [6, 6]


def test_two_threads_share_one_engine(model: pllm.VLLM) -> None:
    out: dict[str, pl.DataFrame] = {}

    def ask(name: str) -> None:
        frame = questions(60).select(q=pl.lit(name) + pl.col("q"))
        out[name] = frame.llm.generate("q", model=model, max_tokens=16, temperature=0)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [out[name]["response"].null_count() for name in ("a", "b", "c")] == [0, 0, 0]
    assert pllm.jobs()["state"].to_list() == ["ingested"] * 3


def test_closing_and_asking_again(model: pllm.VLLM) -> None:
    first = questions(3).llm.generate("q", model=model, max_tokens=4, temperature=0)
    before = threads()
    model.close()
    assert len(threads()) == len(before) - 1
    model.close()  # nothing to close: no error
    again = questions(6).llm.generate("q", model=model, max_tokens=4, temperature=0)
    assert again["response"][:3].equals(first["response"])
    assert again["response"].null_count() == 0


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "polars_llm vllm"]


def test_rows_that_begin_alike_are_read_once(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    heads = ["".join(rng.choices("abcdefgh ", k=600)) for _ in range(12)]
    rows = [head + f" {i}: what follows?" for head in heads for i in range(8)]
    rng.shuffle(rows)
    frame = pl.DataFrame({"q": rows})
    cached = {}
    answers = {}
    for order in ("auto", "input"):
        # 64 blocks of 32 tokens hold three of the beginnings, not twelve; a few rows at a time.
        small = tiny(model_dir, {"num_gpu_blocks_override": 64, "max_num_seqs": 4}, order=order)
        monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / order))
        out = frame.llm.generate("q", model=small, max_tokens=2, temperature=0, output="full")
        full = out.unnest("response")
        cached[order] = full["cached_input_tokens"].sum() / full["input_tokens"].sum()
        answers[order] = full["value"]
        small.close()
    assert answers["auto"].equals(answers["input"])
    assert cached["auto"] > 0.7
    assert cached["input"] < 0.4


def test_the_machines_price_is_shared_by_tokens(model_dir: str) -> None:
    priced = tiny(model_dir, price_per_hour=3_600.0)
    out = questions(30).llm.generate("q", model=priced, max_tokens=8, output="full").unnest("response")
    assert (out["cost_usd"] > 0).all()
    assert out["cost_usd"].sum() < 60  # a dollar a second, and it took less than a minute
    assert pllm.jobs()["cost_usd"].item() == pytest.approx(out["cost_usd"].sum())


def test_not_enough_memory_names_the_two_settings(model_dir: str) -> None:
    huge = tiny(model_dir, {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 16})
    with pytest.raises(pllm.ProviderError) as caught:
        questions(2).llm.generate("q", model=huge, max_tokens=2)
    assert caught.value.kind == "out_of_memory"
    assert "max_model_len" in str(caught.value)
    assert "kv_cache_memory_bytes" in str(caught.value)
    assert pllm.jobs()["state"].to_list() == ["released"]
    assert threads() == []  # those that nobody used made room, and it was tried again


@pytest.mark.parametrize(
    ("name", "engine", "hint"),
    [
        ("", {"max_modle_len": 8}, "settings of vllm.LLM"),
        ("org/nobody-has-this", {}, "looked up at the hub"),
    ],
)
def test_what_cannot_start_says_what_to_change(
    model_dir: str, name: str, engine: dict[str, int], hint: str
) -> None:
    model = pllm.VLLM(name or model_dir, dtype="float32", engine=engine)
    with pytest.raises(pllm.ProviderError, match="could not start") as caught:
        questions(1).llm.generate("q", model=model)
    assert hint in str(caught.value)
    assert "memory" not in str(caught.value)


def test_a_model_without_a_template_says_raw(tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain", "--no-template")
    with pytest.raises(pllm.InvalidRequest, match="no chat template"):
        questions(2).llm.generate("q", model=tiny(plain), max_tokens=2)
    raw = tiny(plain, raw=True)
    assert questions(2).llm.generate("q", model=raw, max_tokens=2)["response"].null_count() == 0
    raw.close()
