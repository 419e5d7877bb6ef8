"""The real engine, on the CPU, with a tiny model made on the spot. Skipped where vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polars_llm as pllm

ROOT = Path(__file__).parents[2]

INSTALLED = importlib.util.find_spec("vllm") is not None
if INSTALLED:
    # Before torch is imported. One thread: two that spin beside other processes take ten times as long.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ENGINE = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "block_size": 32,
}


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            # What others warn of while they are imported is not ours to mend; what we warn of is.
            item.add_marker(pytest.mark.filterwarnings("ignore", "error::polars_llm.LLMWarning"))
            item.add_marker(pytest.mark.timeout(300))
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed"))


def make_model(out: Path, *options: str) -> str:
    subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "random_model.py"), str(out), *options],
        check=True,
        capture_output=True,
    )
    return str(out)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_dir: str) -> pllm.VLLM:
    """Its engine is made once and lives over the tests, as it does over evaluations."""
    return tiny(model_dir)


def tiny(path: str, engine: dict[str, Any] | None = None, **options: Any) -> pllm.VLLM:
    return pllm.VLLM(path, dtype="float32", engine={**ENGINE, **(engine or {})}, **options)


@pytest.fixture(scope="session", autouse=True)
def no_engine_is_left() -> Iterator[None]:
    yield
    from polars_llm.backends.vllm import engines

    engines.close_all()
