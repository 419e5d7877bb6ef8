"""`pllm.Config`: what it refuses, before anything is kept of it."""

from __future__ import annotations

import datetime
from typing import Any

import pytest

import polars_llm as pllm
from polars_llm.config import settings


@pytest.mark.parametrize("interval", [0, -1, float("nan"), "soon", datetime.timedelta(seconds=5)])
def test_an_interval_that_is_no_number_of_seconds_is_refused(interval: Any) -> None:
    before = settings()
    with pytest.raises(pllm.InvalidRequest, match="not a number of seconds"):
        pllm.Config(model="openai/gpt-6-luna", poll_interval=interval)
    assert settings() == before
