"""Summarise the help texts of the Python language: submit, look, collect, each in a process of its own.

    python examples/quickstart.py                            # no key, no network: the local provider
    python examples/quickstart.py --model openai/gpt-6-luna  # the real one; needs OPENAI_API_KEY, costs cents

The three processes run the same line of code. The first submits one batch job, the second finds it
pending, the last collects the answers. At the end the local provider's bill must show each request once.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import polars as pl

import polars_llm as pllm

LOCAL_MODEL = "openai/gpt-6-luna"
SYSTEM = "Summarise this help text in one sentence."


def help_texts() -> pl.DataFrame:
    """Real input that every Python has: the help topics of the language."""
    from pydoc_data.topics import topics

    return pl.DataFrame({"topic": list(topics), "text": list(topics.values())}).sort("topic")


def summarise(model: str) -> pl.DataFrame:
    """The line that this example is about; run again, it resumes."""
    return help_texts().llm.generate("text", system=SYSTEM, model=model, name="summary")


def step(name: str, model: str) -> int:
    """What one process does; 75 says that the answers are not there yet."""
    print(f"\n[{name}] df.llm.generate('text', system=..., model={model!r})")
    try:
        frame = summarise(model)
    except pllm.JobsPending as pending:
        print(f"JobsPending: {str(pending).splitlines()[0]}")
        return 75
    with pl.Config(tbl_rows=6, fmt_str_lengths=60, tbl_width_chars=110):
        print(frame.select("topic", "summary"))
    return 0


def run(name: str, model: str) -> int:
    """Run a step in a fresh process."""
    return subprocess.run(
        [sys.executable, __file__, "--step", name, "--model", model], check=False
    ).returncode


def check(model: str, bill: object | None) -> None:
    """Fail if an answer stands on the wrong row, or a request was billed twice."""
    frame = summarise(model)
    texts = help_texts()
    assert frame["topic"].equals(texts["topic"]), "rows moved"
    assert frame["summary"].null_count() == 0, "answers are missing"
    if bill is None:
        return
    # The local model's summary is taken from the text: it must come from the text of its own row.
    for topic, text, summary in frame.iter_rows():
        words = summary.rstrip(".…").split()
        assert all(word in text for word in words), f"the answer of {topic!r} is another row's"
    needed = texts["text"].n_unique()
    assert bill.billed == needed, f"{bill.billed} requests billed, {needed} needed"
    assert not bill.duplicates, f"billed twice: {bill.duplicates}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--model", help="openai/NAME for the real provider; default: the local one")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.step:
        return step(chosen.step, chosen.model)
    with ExitStack() as stack:
        provider = None
        model = chosen.model or LOCAL_MODEL
        if chosen.model is None:
            from polars_llm import testing

            cache = stack.enter_context(tempfile.TemporaryDirectory())
            os.environ["POLARS_LLM_CACHE_DIR"] = str(Path(cache) / "cache")
            provider = stack.enter_context(testing.provider(batch_seconds=2.0))
        if run("submit", model) == 0:
            print("Everything was in the cache already: nothing was sent.")
        code = run("look", model)
        while code == 75:
            time.sleep(1.0 if provider else 60.0)
            code = run("collect", model)
        if code:
            return code
        bill = provider.bill() if provider else None
        check(model, bill)
        print("\npllm.jobs()")
        with pl.Config(tbl_cols=-1, tbl_width_chars=160):
            print(pllm.jobs().select("job", "model", "state", "requests", "done", "failed"))
        if bill is not None:
            print(f"\nThe provider's bill: {bill.billed} requests, each once; {bill.cost_usd:.4f} USD.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
