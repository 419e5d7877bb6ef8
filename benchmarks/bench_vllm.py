"""Local mode beside bare vLLM, and what the order of requests does.

    python benchmarks/bench_vllm.py [--quick] [--rows 300] [--runs 3] [--kv-tokens 8192]
    python benchmarks/bench_vllm.py --kv-tokens 0 --rows 5000 --seats 256 --hidden 4096 --layers 32 \\
        --dtype bfloat16                                            # one large GPU, random weights
    python benchmarks/bench_vllm.py --kv-tokens 0 --model NAME-OR-PATH

Needs an environment with vLLM (docs/local.md). One engine does all the work, with an empty prefix cache
and an empty cache directory for each run: first bare (`LLM.generate` on the whole list), then as a column
through the library in each order. All contestants must give the same answers. `cpu` is the processor time
of this process: look at that where others use the machine, and at `wall` on a GPU.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The bare engine is asked on the thread of the library's: both in this process.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import polars as pl

import polars_llm as pllm
from polars_llm.backends.vllm import engines, sampling

HERE = Path(__file__).parent
ORDERS = ("input", "length", "prefix", "auto")
OUT = 16


def words(rng: random.Random, characters: int) -> str:
    return "".join(rng.choices("abcdefgh ", k=characters))


def shuffled(rows: list[str], rng: random.Random) -> list[str]:
    return rng.sample(rows, len(rows))


def easy(rows: int, rng: random.Random) -> list[str]:
    """One template, short texts of about the same length."""
    template = "Say in one word what this is about, and nothing else. Text: "
    return [template + words(rng, rng.randint(40, 80)) for _ in range(rows)]


def mixed(rows: int, rng: random.Random) -> list[str]:
    """Lengths from 5 to 800 tokens, nothing in common."""
    return [words(rng, min(800, int(rng.lognormvariate(4.2, 1.0)) + 5)) for _ in range(rows)]


def prefix_heavy(rows: int, rng: random.Random) -> list[str]:
    """Fifteen questions about each document of 640 tokens, as a join gives them, in no order."""
    documents = [words(rng, 640) for _ in range(max(1, rows // 15))]
    return shuffled(
        [documents[i % len(documents)] + words(rng, rng.randint(10, 40)) for i in range(rows)], rng
    )


# Columns that the rules of order="auto" were not made on.
def two_levels(rows: int, rng: random.Random) -> list[str]:
    """Three instructions, five documents under each, short questions."""
    heads = [i + d for i in [words(rng, 200) for _ in range(3)] for d in [words(rng, 500) for _ in range(5)]]
    return shuffled([heads[i % 15] + words(rng, 20) for i in range(rows)], rng)


def pairs(rows: int, rng: random.Random) -> list[str]:
    """Each document twice (two questions), lengths from 50 to 800."""
    documents = [words(rng, rng.randint(50, 800)) for _ in range(rows // 2)]
    return shuffled([d + words(rng, 15) for d in documents for _ in range(2)], rng)


def log_lines(rows: int, rng: random.Random) -> list[str]:
    """A date and a level in front, 30 characters; no block of the cache holds them alone."""
    return [f"2026-11-{rng.randint(1, 30):02} INFO request " + words(rng, 150) for _ in range(rows)]


def some_share(rows: int, rng: random.Random) -> list[str]:
    """A fifth of the rows about three documents, the others about nothing in common."""
    documents = [words(rng, 700) for _ in range(3)]
    shared = [rng.choice(documents) + words(rng, 20) for _ in range(rows // 5)]
    return shuffled(shared + mixed(rows - len(shared), rng), rng)


COLUMNS: list[Callable[[int, random.Random], list[str]]] = [easy, mixed, prefix_heavy]
UNSEEN: list[Callable[[int, random.Random], list[str]]] = [two_levels, pairs, log_lines, some_share]


class Bench:
    """One engine, asked in several ways."""

    def __init__(self, given: argparse.Namespace, path: str) -> None:
        self.path = path
        self.given = given
        self.engine = {"enable_prefix_caching": True, "max_num_seqs": given.seats}
        if given.kv_tokens:
            self.engine |= {"enforce_eager": True, "kv_cache_memory_bytes": 96 << 20, "max_model_len": 1024}
            self.engine |= {"block_size": 32, "num_gpu_blocks_override": given.kv_tokens // 32}
        self.steps = 0
        model = self.model("input")
        backend = model.backend()
        self.llm = engines.engine_for(backend._model, backend._arguments, endpoint=sampling.RAW)._llm
        step = self.llm.llm_engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        self.llm.llm_engine.step = counted

    def model(self, order: str) -> pllm.VLLM:
        dtype = self.given.dtype
        return pllm.VLLM(self.path, dtype=dtype, engine=self.engine, raw=True, order=order)  # type: ignore[arg-type]

    def run(self, who: str, prompts: list[str]) -> tuple[dict[str, float], list[str]]:
        assert self.llm.reset_prefix_cache()
        self.steps = 0
        wall, cpu = time.perf_counter(), time.process_time()
        full = self.bare(prompts) if who == "vllm" else self.column(who, prompts)
        seconds = time.perf_counter() - wall
        facts = {
            "wall": seconds,
            "cpu": time.process_time() - cpu,
            "steps": self.steps,
            "out": full["output_tokens"].sum(),
            "cached": full["cached_input_tokens"].sum() / full["input_tokens"].sum(),
        }
        return facts, full["value"].to_list()

    def bare(self, prompts: list[str]) -> pl.DataFrame:
        import vllm

        parameters = vllm.SamplingParams(temperature=0, max_tokens=OUT, ignore_eos=True)
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        return pl.DataFrame(
            {
                "value": [o.outputs[0].text for o in outputs],
                "input_tokens": [len(o.prompt_token_ids) for o in outputs],
                "cached_input_tokens": [o.num_cached_tokens for o in outputs],
                "output_tokens": [len(o.outputs[0].token_ids) for o in outputs],
            }
        )

    def column(self, order: str, prompts: list[str]) -> pl.DataFrame:
        with tempfile.TemporaryDirectory() as place, pllm.Config(cache_dir=Path(place) / "cache"):
            out = pl.DataFrame({"q": prompts}).llm.generate(
                "q",
                model=self.model(order),
                max_tokens=OUT,
                temperature=0,
                params={"ignore_eos": True},
                output="full",
            )
        return out["response"].struct.unnest()


def measure(
    bench: Bench, column: Callable[[int, random.Random], list[str]], given: argparse.Namespace
) -> None:
    prompts = column(given.rows, random.Random(0))
    names = ("vllm", *ORDERS)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    answers = {}
    for _ in range(given.runs):
        for name in names:  # in turn: who else uses the machine does so for all of them
            facts, answers[name] = bench.run(name, prompts)
            runs[name].append(facts)
    different = [name for name in names if answers[name] != answers["vllm"]]
    if different:
        sys.exit(f"{column.__name__}: the answers of {different} are not those of vllm")
    base = min(r["cpu"] for r in runs["vllm"])
    print(f"\n{column.__name__}: {column.__doc__} {len(prompts)} rows")
    print("| order | wall s | cpu s | output tokens/s | of vllm's (cpu) | cached | steps | mean batch |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        best = min(runs[name], key=lambda r: r["cpu"])
        wall = statistics.median(r["wall"] for r in runs[name])
        print(
            f"| {'vllm, bare' if name == 'vllm' else name} | {wall:.2f} | {best['cpu']:.2f}"
            f" | {best['out'] / wall:,.0f} | {base / best['cpu']:.2f} | {best['cached']:.0%}"
            f" | {best['steps']:.0f} | {best['out'] / best['steps']:.1f} |",
            flush=True,
        )


def main() -> None:
    """Make the model and the engine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a name or a path; default: random weights of the size below")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seats", type=int, default=32, help="requests that the engine works on at once")
    parser.add_argument("--kv-tokens", type=int, default=8_192, help="size of its cache; 0: as it likes")
    parser.add_argument("--columns", nargs="*", default=[], help="only these, by name")
    parser.add_argument("--quick", action="store_true", help="tiny: compares the answers only")
    given = parser.parse_args()
    if given.quick:
        given.hidden, given.layers, given.rows, given.runs = 64, 2, 45, 1
    place = Path(tempfile.mkdtemp())
    try:
        path = given.model or str(place / "model")
        if not given.model:
            size = ["--hidden", str(given.hidden), "--layers", str(given.layers), "--dtype", given.dtype]
            subprocess.run([sys.executable, str(HERE / "random_model.py"), path, *size], check=True)
        bench = Bench(given, path)
        bench.run("vllm", easy(20, random.Random(1)))  # warm
        for column in [*COLUMNS, *UNSEEN]:
            if not given.columns or column.__name__ in given.columns:
                measure(bench, column, given)
        bench.model("input").close()
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
