"""A cluster on this machine, vLLM on the CPU, a tiny model. Skipped where Ray or vLLM is not installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import polars_llm as pllm
from tests.vllm.conftest import ENGINE, make_model

TOKEN = "hf_ThisMustNotBeReadAnywhere"

INSTALLED = all(importlib.util.find_spec(name) is not None for name in ("ray", "vllm"))
if INSTALLED:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.ray)
            # What others warn of while they are imported is not ours to mend; what we warn of is.
            item.add_marker(pytest.mark.filterwarnings("ignore", "error::polars_llm.LLMWarning"))
            item.add_marker(pytest.mark.timeout(400))
            if not INSTALLED:
                item.add_marker(pytest.mark.skip(reason="Ray or vLLM is not installed"))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def tiny(path: str, engine: dict[str, Any] | None = None, **options: Any) -> pllm.RayVLLM:
    """As `tests.vllm.conftest.tiny`: the same keys."""
    options = {"batch_size": 16, "dtype": "float32", **options}
    return pllm.RayVLLM(path, engine={**ENGINE, **(engine or {})}, **options)


@pytest.fixture(scope="session", autouse=True)
def no_cluster_is_left() -> Iterator[None]:
    yield
    if INSTALLED:
        pllm.RayVLLM("any").close()
