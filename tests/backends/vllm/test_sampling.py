"""What enters the key of a local answer, and what the engine is given. No vLLM needed."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm.backends.options import Options
from polars_llm.backends.vllm import sampling
from polars_llm.backends.vllm.weights import directory_digest
from polars_llm.request import RequestHeader

SCHEMA = (
    '{"type":"object","properties":{"n":{"type":"integer","multipleOf":2,"minimum":1}},"required":["n"],'
    '"additionalProperties":false}'
)


def header(model: pllm.VLLM, **options: Any) -> RequestHeader:
    return model.backend().header(Options(**options))


def key(model: pllm.VLLM, **options: Any) -> str:
    return header(model, **options).digest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as a model has them; the weights are larger than what is read of them in full."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "tokenizer.json").write_text("{}")
    (made / "README.md").write_text("hello")
    head = b'{"w": {"dtype": "F32"}}'
    weights = len(head).to_bytes(8, "little") + head + bytes(range(256)) * 20_000
    (made / "model.safetensors").write_bytes(weights)
    return made


def test_keys_are_frozen() -> None:
    # A key that changes between releases costs users hours of machine time.
    assert header(pllm.VLLM("Qwen/Qwen3-8B")) == RequestHeader(
        provider="vllm",
        base_url=None,
        endpoint="/v1/chat/completions",
        model="Qwen/Qwen3-8B",
        body={"max_tokens": 4096, "engine": {"dtype": "auto"}},
    )
    assert key(pllm.VLLM("Qwen/Qwen3-8B")) == GOLDEN_PLAIN
    full = pllm.VLLM(
        "Qwen/Qwen3-8B", revision="abc", dtype="float16", quantization="awq", engine={"max_model_len": 8192}
    )
    said = {"max_tokens": 64, "temperature": 0.0, "seed": 7, "params": {"top_k": 20}}
    assert header(full, **said).body == {
        "max_tokens": 64,
        "temperature": 0,
        "seed": 7,
        "top_k": 20,
        "engine": {"dtype": "float16", "max_model_len": 8192, "quantization": "awq", "revision": "abc"},
    }
    assert key(full, **said) == GOLDEN_FULL


GOLDEN_PLAIN = "5154f6ad67c124157e456df095b42fda20bf0c9be3476bdc2406f71c424c63db"
GOLDEN_FULL = "551f657b108d797083dcf7a788c56c57d53f5b7b153472df23f6b78c1f66169a"


@pytest.mark.parametrize(
    "same",
    [
        pllm.VLLM("org/name", order="length"),
        pllm.VLLM("org/name", price_per_hour=3.0),
        pllm.VLLM("org/name", engine={"gpu_memory_utilization": 0.5, "max_num_seqs": 8}),
        pllm.VLLM("org/name", engine={"tensor_parallel_size": 4, "hf_token": "hf_secret"}),
    ],
    ids=repr,
)
def test_what_changes_no_answer_changes_no_key(same: pllm.VLLM) -> None:
    assert key(same) == key(pllm.VLLM("org/name"))


@pytest.mark.parametrize(
    "other",
    [
        pllm.VLLM("org/other"),
        pllm.VLLM("org/name", revision="main"),
        pllm.VLLM("org/name", dtype="float32"),
        pllm.VLLM("org/name", quantization="fp8"),
        pllm.VLLM("org/name", raw=True),
        pllm.VLLM("org/name", engine={"max_model_len": 2048}),
        pllm.VLLM("org/name", engine={"tokenizer": "org/another"}),
        pllm.VLLM("org/name", engine={"a_setting_of_tomorrow": 1}),
    ],
    ids=repr,
)
def test_what_may_change_an_answer_changes_the_key(other: pllm.VLLM) -> None:
    assert key(other) != key(pllm.VLLM("org/name"))


def test_a_directory_is_what_is_in_it(folder: Path, tmp_path: Path) -> None:
    first = key(pllm.VLLM(str(folder)))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("changed")
    assert key(pllm.VLLM(str(moved))) == first
    (moved / "tokenizer.json").write_text("{ }")
    assert key(pllm.VLLM(str(moved))) != first


def test_a_path_may_be_a_path(folder: Path) -> None:
    assert key(pllm.VLLM(folder)) == key(pllm.VLLM(str(folder)))


def test_a_dtype_may_be_named_as_torch_does() -> None:
    assert key(pllm.VLLM("org/name", dtype="torch.float32")) == key(pllm.VLLM("org/name", dtype="float32"))


def test_a_model_that_has_been_moved_can_still_be_closed(folder: Path) -> None:
    model = pllm.VLLM(str(folder))
    shutil.rmtree(folder)
    model.close()


def test_a_fine_tuned_copy_of_the_same_shape_is_another_model(folder: Path) -> None:
    before = directory_digest(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40_000] = b"\x01" * 40_000
    weights.write_bytes(bytes(data))
    assert directory_digest(folder) != before


def test_a_chat_template_in_a_file_enters_as_its_text(tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    by_file = pllm.VLLM("org/name", engine={"chat_template": str(template)})
    by_text = pllm.VLLM("org/name", engine={"chat_template": "{{ messages }}"})
    assert key(by_file) == key(by_text) != key(pllm.VLLM("org/name"))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"params": {"top_q": 1}}, "top_q"),
        ({"params": {"n": 2}}, "n"),
        ({"params": {"top_k": "many"}}, "top_k"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 0.5, "params": {"temperature": 1.0}}, "set by the verb"),
        ({"reasoning_effort": "low"}, "chat_template_kwargs"),
        ({"schema": SCHEMA, "params": {"structured_outputs": {"choice": ["a"]}}}, "contradict"),
    ],
)
def test_unknown_and_wrong_parameters_are_refused_at_the_call(options: dict[str, Any], word: str) -> None:
    with pytest.raises(pllm.InvalidRequest, match=word):
        header(pllm.VLLM("org/name"), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: pllm.VLLM(""),
        lambda: pllm.VLLM("org/name", order="random"),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", price_per_hour=-1),
        lambda: pllm.VLLM("org/name", price_per_hour="3"),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", raw="no"),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", revision=3),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", vector_length=0),
        lambda: pllm.VLLM("org/name", vector_length=7.5),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", engine="max_model_len=8"),  # type: ignore[arg-type]
        lambda: pllm.VLLM("org/name", engine={"dtype": "half"}),
        lambda: pllm.VLLM("org/name", engine={"hf_overrides": print}),
    ],
)
def test_a_model_that_cannot_be_is_refused_when_it_is_made(make: Any) -> None:
    with pytest.raises(pllm.InvalidRequest, match="Hint"):
        make()


def test_a_path_that_is_not_there_is_no_name_of_the_hub() -> None:
    with pytest.raises(pllm.InvalidRequest, match="There is no model at"):
        pl.DataFrame({"q": ["a"]}).llm.generate("q", model="vllm/./nowhere")


def test_the_hubs_token_is_not_shown_or_pickled() -> None:
    model = pllm.VLLM("org/name", engine={"hf_token": "hf_secret", "max_num_seqs": 4})
    assert "hf_secret" not in repr(model)
    assert b"hf_secret" not in pickle.dumps(model)
    assert pickle.loads(pickle.dumps(model)).engine == {"max_num_seqs": 4}
    assert "hf_secret" not in repr(model.backend())
    plan = pl.LazyFrame({"q": ["a"]}).select(pl.col("q").llm.generate(model=model))
    with pytest.raises(pl.exceptions.ComputeError, match="cannot be pickled") as refused:
        pickle.dumps(plan)
    assert "hf_secret" not in str(refused.value)


def test_samples_count_up_from_the_seed() -> None:
    with_seed = header(pllm.VLLM("org/name"), seed=7, params={"logit_bias": {"5": -1}})
    assert sampling.arguments(with_seed, 2) == {"max_tokens": 4096, "seed": 9, "logit_bias": {5: -1}}
    assert sampling.arguments(header(pllm.VLLM("org/name")), 2) == {"max_tokens": 4096}


def test_template_arguments_go_to_the_template_alone() -> None:
    asked = header(pllm.VLLM("org/name"), params={"chat_template_kwargs": {"enable_thinking": False}})
    assert sampling.template_arguments(asked) == {"enable_thinking": False}
    assert sampling.arguments(asked, 0) == {"max_tokens": 4096}
    assert sampling.template_arguments(header(pllm.VLLM("org/name"))) == {}


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'polars-llm-batch\[vllm\]'"):
        pl.DataFrame({"q": ["a"]}).llm.generate("q", model="vllm/org/name")
    assert pllm.jobs()["state"].to_list() == ["released"]


def test_a_package_that_is_broken_is_not_called_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"cannot be imported.*torchvision::nms.*\n\n.*local.md"):
        pl.DataFrame({"q": ["a"]}).llm.generate("q", model="vllm/org/name")


def test_a_schema_holds_what_the_engine_can_keep_to() -> None:
    asked = header(pllm.VLLM("org/name"), schema=SCHEMA)
    assert asked.schema is not None
    assert '"minimum":1' in asked.schema
    assert '"multipleOf"' not in asked.schema
    assert sampling.arguments(asked, 0)["structured_outputs"] == {"json": asked.schema}
