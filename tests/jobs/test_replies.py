"""Replies that carry no text, all the way to the user's column: documented, and never a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from tests.conftest import MODEL

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]


@pytest.fixture(params=MODELS, ids=["openai", "anthropic"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def asked(prompts: list[str], **options: Any) -> pl.DataFrame:
    frame = pl.DataFrame({"prompt": prompts})
    return frame.llm.generate("prompt", on_pending="wait", output="full", **options)[
        "response"
    ].struct.unnest()


def test_replies_without_text_are_done_with_their_reason(model: str) -> None:
    marks = ["plain", "[[refuse]] a", "[[content_filter]] b", "[[length]] a rather long prompt", "[[tool]] c"]
    with testing.provider() as provider:
        full = asked([*marks, "[[empty]] d"], model=model)
        assert full["status"].to_list() == ["done"] * 6
        assert full["finish_reason"].n_unique() >= 4
        assert full["finish_reason"].null_count() == 0
        plain, _, filtered, cut, tool, empty = full["value"]
        assert plain
        assert cut
        assert not any((filtered, tool, empty))
        assert provider.bill().billed == 6
        again = asked([*marks, "[[empty]] d"], model=model)
        assert again.equals(full)
        assert provider.bill().billed == 6  # an answer is an answer: it was billed


def test_error_lines_without_a_response() -> None:
    with testing.provider() as running:
        running.fault("no-response", times=None)
        with pytest.warns(pllm.LLMWarning, match="1 of 2 requests failed"):
            full = asked(["fine", "[[fail:400]] not fine"], model=MODEL)
        assert full["status"].to_list() == ["done", "failed"]
        assert full["error"].to_list()[0] is None
        assert full["error"].to_list()[1]
        assert running.bill().duplicates == {}


def test_working_files_are_gone_once_the_answers_are_stored(
    model: str, provider: testing.Provider, own_cache: Path
) -> None:
    prompt = "a secret of the user"
    with pytest.raises(pllm.JobsPending):
        pl.DataFrame({"prompt": [prompt]}).llm.generate("prompt", model=model)
    assert any(prompt.encode() in path.read_bytes() for path in (own_cache / "spool").iterdir())
    asked([prompt], model=model)
    assert list((own_cache / "spool").iterdir()) == []
    assert list((own_cache / "locks").iterdir()) == []


def test_the_limits_are_the_documented_ones() -> None:
    openai, anthropic = (pllm.OpenAI("x").backend().limits, pllm.Anthropic("x").backend().limits)
    assert (openai.requests, anthropic.requests) == (50_000, 100_000)
    assert openai.size_bytes <= 200_000_000
    assert anthropic.size_bytes <= 256_000_000
