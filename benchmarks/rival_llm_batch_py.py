"""llm-batch-py at the same tasks; runs in its own environment (`rivals.py`).

python rival_llm_batch_py.py warm|cold INPUT CACHE
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import llm_batch_py as rival
import polars as pl
from llm_batch_py.providers import openai as rival_openai
from pydantic import BaseModel, ConfigDict
from rounds import Stopwatch, report

# The data module's name of it; that module needs polars_llm, which is not installed here.
_MODEL = "gpt-6-luna"


class Reply(BaseModel):
    """What it asks for: it only knows structured output."""

    model_config = ConfigDict(extra="forbid")  # OpenAI's strict schemas demand it

    response: str


def job(source: str, cache: str) -> Any:
    """One job over the whole input."""
    return rival.StructuredOutputJob(
        name="benchmark",
        key_cols=["id"],
        input_df=pl.read_parquet(source),
        prompt_builder=rival.structured_template(messages="{{ row.prompt }}", version="v1"),
        output_model=Reply,
        provider=rival.OpenAIConfig(model=_MODEL),
        result_cache=rival.ResultCacheStoreConfig(root_uri=cache),
    )


def without_counting() -> str | None:
    """Leave out the token count where its vocabulary cannot be had; says so."""
    import requests
    import tiktoken

    try:
        tiktoken.get_encoding("o200k_base")
    except (OSError, requests.RequestException):
        rival_openai.estimate_openai_batch_tokens = lambda _, bodies: [0 for _ in bodies]
        return "its token count was left out, for its vocabulary could not be downloaded: that favours it"
    return None


def main(task: str, source: str, cache: str) -> None:
    """Run it once."""
    logging.disable()
    note = without_counting() if task == "cold" else None
    work, runner = job(source, cache), rival.Runner()
    watch = Stopwatch()
    frame = runner.run(work, metadata_columns=[])
    watch.stop()
    assert runner.last_summary is not None
    if task == "warm" and (frame["response"].null_count() or runner.last_summary.submitted_rows):
        raise SystemExit("it was not warm")
    report(watch, digest="", note=note)


if __name__ == "__main__":
    main(*sys.argv[1:])
