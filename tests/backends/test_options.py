"""What is set for a verb, before any provider sees it."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends.options import Options


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": [0.5]},
        {"seed": 1.5},
        {"seed": "a"},
        {"stop": 3},
        {"stop": ["END", None]},
        {"reasoning_effort": 3},
        {"params": ["service_tier"]},
        {"params": {1: 2}},
        {"sample": 2**70},
    ],
)
def test_another_kind_of_value_is_refused_before_anything_is_sent(
    provider: testing.Provider, given: dict[str, Any]
) -> None:
    (name,) = given
    with pytest.raises(pllm.InvalidRequest, match=rf"(?s)^{name} is .*Nothing was sent"):
        pl.DataFrame({"t": ["a"]}).llm.generate("t", model="openai/gpt-6-luna", **given)
    assert provider.log() == []


def test_params_are_not_shown() -> None:
    for given in (["sk-secret"], {1: "sk-secret"}):
        with pytest.raises(
            pllm.InvalidRequest, match=r"^params is of type (list|dict), not a mapping"
        ) as refused:
            Options(params=given)  # type: ignore[arg-type]
        assert "sk-secret" not in str(refused.value)


def test_what_fits_stays_as_it_is() -> None:
    given: dict[str, Any] = {
        "temperature": 0,
        "top_p": 0.5,
        "seed": -1,
        "stop": ["a", "b"],
        "params": {"n": None},
    }
    assert {name: getattr(Options(**given), name) for name in given} == given
    assert Options(stop="END", reasoning_effort="low").stop == "END"
