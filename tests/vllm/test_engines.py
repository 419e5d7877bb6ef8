"""The thread of an engine: what happens to those who wait when it stops, fails or runs out of memory."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import polars as pl
import pytest

import polars_llm as pllm
from tests.vllm.conftest import tiny


def questions(n: int) -> pl.DataFrame:
    return pl.DataFrame({"q": [f"Question {i}: what is {i}?" for i in range(n)]})


def engine_of(model: pllm.VLLM):  # type: ignore[no-untyped-def]
    from polars_llm.backends.vllm import engines, sampling

    backend = model.backend()
    return engines.engine_for(backend._model, backend._arguments, endpoint=sampling.CHAT)


def test_whoever_waits_for_an_engine_that_is_closed_is_told_so(model_dir: str) -> None:
    model = tiny(model_dir, {"max_num_seqs": 2})
    engine_of(model)
    said: list[BaseException] = []

    def ask() -> None:
        try:
            questions(300).llm.generate("q", model=model, max_tokens=200, params={"ignore_eos": True})
        except pllm.ProviderError as error:
            said.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not pllm.results().collect().height and thread.is_alive():
        time.sleep(0.05)
    model.close()
    thread.join(60)
    assert not thread.is_alive()
    assert "closed while it worked" in str(said[0])
    kept = pllm.results().collect().height
    assert 0 < kept < 300
    assert pllm.jobs()["state"].to_list() == ["released"]


def test_out_of_memory_at_work_goes_on_with_half(model_dir: str) -> None:
    import torch

    model = tiny(model_dir, {"max_num_seqs": 8})
    engine = engine_of(model)
    real = engine._llm.llm_engine.step
    steps = 0

    def step():  # type: ignore[no-untyped-def]
        nonlocal steps
        steps += 1
        if steps == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real()

    engine._llm.llm_engine.step = step
    ask = {"max_tokens": 20, "temperature": 0, "params": {"ignore_eos": True}}
    out = questions(30).llm.generate("q", model=model, **ask)
    assert out["response"].null_count() == 0
    assert engine._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs == 4
    assert pllm.jobs().select("state", "done").rows() == [("ingested", 30)]
    model.close()


def test_an_engine_that_dies_says_so_and_the_next_evaluation_has_another(model_dir: str) -> None:
    model = tiny(model_dir, {"max_num_seqs": 3})
    engine = engine_of(model)

    def broken():  # type: ignore[no-untyped-def]
        raise RuntimeError("the device fell off the bus")

    engine._llm.llm_engine.step = broken
    with pytest.raises(pllm.ProviderError, match="fell off the bus"):
        questions(3).llm.generate("q", model=model, max_tokens=4)
    assert questions(3).llm.generate("q", model=model, max_tokens=4)["response"].null_count() == 0
    model.close()


def test_the_users_random_numbers_go_on_as_if_no_engine_had_been_made(model_dir: str) -> None:
    import random

    random.seed(5)
    expected = [random.random() for _ in range(2)]
    random.seed(5)
    first = random.random()
    model = tiny(model_dir, {"max_num_seqs": 5})
    engine_of(model)
    model.close()
    assert [first, random.random()] == expected


def test_an_engine_closed_before_it_is_asked_takes_nothing(model_dir: str) -> None:
    from polars_llm.backends.vllm import engines

    model = tiny(model_dir, {"max_num_seqs": 6})
    closed = engine_of(model)
    model.close()
    assert not closed.take(engines.Run(iter([])))
    assert questions(2).llm.generate("q", model=model, max_tokens=4)["response"].null_count() == 0
    model.close()


def test_two_engines_at_once_answer_as_each_alone(
    model_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Steps of two engines at the same time read each other's attention states: wrong answers, or a crash.
    models = [tiny(model_dir, {"max_model_len": length}) for length in (768, 512)]
    frame = questions(100)
    answers: dict[int, pl.Series] = {}

    def ask(i: int) -> None:
        out = frame.llm.generate("q", model=models[i], max_tokens=30, temperature=0)
        answers[i] = out["response"]

    ask(0)
    alone = answers.pop(0)
    for turn in range(3):
        monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / str(turn)))
        threads = [threading.Thread(target=ask, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [answers[i].equals(alone) for i in (0, 1)] == [True, True]
        answers.clear()
    for model in models:
        model.close()
