"""What cannot run says so soon, and costs nothing; a Ray of the user's own stays as it is."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from tests.ray.conftest import tiny
from tests.vllm.conftest import make_model

FRAME = pl.DataFrame({"q": ["one", "two"]})


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """Initialised by the user, not by the library."""
    import ray

    pllm.RayVLLM("any").close()
    ray.init(
        address="local",
        num_cpus=3,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 << 20,
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


def refused(model: pllm.RayVLLM) -> str:
    with pytest.raises(pllm.InvalidRequest) as caught:
        FRAME.llm.generate("q", model=model, max_tokens=2)
    assert pllm.jobs()["state"].to_list()[-1] == "released"
    return str(caught.value)


def test_a_cluster_that_is_too_small_is_not_waited_for(ray: Any, model_dir: str) -> None:
    began = time.monotonic()
    assert "no accelerator of type 'H100'" in refused(tiny(model_dir, accelerator_type="H100"))
    assert "whole number" in refused(tiny(model_dir, {"tensor_parallel_size": "two"}))
    assert "4.6 are needed" in refused(tiny(model_dir, {"tensor_parallel_size": 4}))
    assert "3 CPU" in refused(tiny(model_dir, concurrency=(8, 8)))
    assert "does not take this" in refused(tiny(model_dir, processor={"max_concurrent_batches": "many"}))
    assert "joined the cluster at" in refused(tiny(model_dir, ray_address="192.0.2.1:6379"))
    assert "Ray Client" in refused(tiny(model_dir, ray_address="ray://192.0.2.1:10001"))
    assert time.monotonic() - began < 60
    assert pllm.results().collect().is_empty()


def test_a_model_that_the_nodes_do_not_have_or_have_otherwise(ray: Any, tmp_path: Path) -> None:
    from polars_llm.backends.vllm import cluster, on_nodes

    plain = make_model(tmp_path / "plain", "--no-template")
    assert "no chat template" in refused(tiny(plain))

    def look(model: str, digest: str) -> None:
        others: dict[str, Any] = {"runtime_env": {}, "secrets": on_nodes.Secrets({}), "gpu": None}
        cluster.look(ray, model, {}, digest=digest, chat=False, **others)

    with pytest.raises(pllm.InvalidRequest, match="have no /nowhere"):
        look("/nowhere", "0" * 32)
    with pytest.raises(pllm.InvalidRequest, match="another model"):
        look(plain, "0" * 32)
    with pytest.raises(pllm.ProviderError, match="nobody/nothing") as caught:
        FRAME.llm.generate("q", model=tiny("nobody/nothing"), max_tokens=2)
    assert "was answered is kept" in str(caught.value)


def test_nodes_need_no_installation_of_this_library(ray: Any, tmp_path: Path) -> None:
    from polars_llm.backends.vllm import cluster, on_nodes, weights

    assert cluster.connect(None, 1) is ray
    secrets = on_nodes.Secrets({"PLLM_TOKEN": "arrived"})
    asks = on_nodes.Asks([{"max_tokens": 5}], "sampling_params")
    functions = (on_nodes.look, on_nodes.last_words, weights.directory_digest, on_nodes.Rendering)
    travels = (*functions, secrets, asks, on_nodes.Answers([{}], [2], None))
    (tmp_path / "sent").write_bytes(ray.cloudpickle.dumps(travels))
    script = """
import os, pickle, sys
look, words, digest, rendering, secrets, asks, answers = pickle.load(open(sys.argv[1], "rb"))
assert os.environ["PLLM_TOKEN"] == "arrived"
print(dict(**asks({"column": 0, "sample": 0, "prompt": "a"})["sampling_params"]), words(0), digest)
assert "polars_llm" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(tmp_path / "sent")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("{'max_tokens': 5} None <function directory_digest"), done.stderr


def test_an_engine_without_memory_names_the_settings_and_ray_stays_initialised(
    ray: Any, model_dir: str
) -> None:
    model = tiny(model_dir, {"max_model_len": 4096, "kv_cache_memory_bytes": 1 << 16})
    began = time.monotonic()
    with pytest.raises(pllm.ProviderError) as caught:
        FRAME.llm.generate("q", model=model, max_tokens=2)
    assert caught.value.kind == "out_of_memory", str(caught.value)
    assert "kv_cache_memory_bytes" in str(caught.value)
    assert time.monotonic() - began < 120
    assert pllm.jobs()["state"].to_list() == ["released"]
    model.close()
    assert ray.is_initialized()


def test_nobody_answers_at_the_address(model_dir: str) -> None:
    import ray

    ray.shutdown()
    with pytest.raises(pllm.ProviderError, match="No Ray cluster could be joined"):
        FRAME.llm.generate("q", model=tiny(model_dir, ray_address="127.0.0.1:1"), max_tokens=2)
    assert not ray.is_initialized()
