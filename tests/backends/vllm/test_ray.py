"""What a cluster is given, and how its replies are read. No Ray and no vLLM needed."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm.answer import FAILED, RETRY
from polars_llm.backends.options import Options
from polars_llm.backends.vllm import cluster, on_nodes
from polars_llm.backends.vllm.ray import _refusal
from polars_llm.errors import ProviderError
from polars_llm.request import Requests

SECRET = "hf_NotForAnybody"


def test_keys_are_those_of_local_mode(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    engine = {"max_model_len": 512, "tensor_parallel_size": 2, "chat_template": "{{ messages }}"}
    facts: dict[str, Any] = {"engine": engine, "dtype": "float16", "revision": "abc", "quantization": "awq"}
    cluster_only: dict[str, Any] = {
        "concurrency": (2, 8),
        "accelerator_type": "H100",
        "batch_size": 7,
        "runtime_env": {"env_vars": {"A": "b"}},
        "ray_address": "192.0.2.1:6379",
        "processor": {"max_concurrent_batches": 2},
    }
    asked = Options(max_tokens=5, seed=3, schema='{"type":"object"}')
    for name in ("Qwen/Qwen3-8B", str(tmp_path)):
        for raw in (False, True):
            here = pllm.VLLM(name, raw=raw, **facts)
            there = pllm.RayVLLM(name, raw=raw, **facts, **cluster_only)
            assert there.backend().header(asked) == here.backend().header(asked)
            assert there.backend().header(asked).provider == "vllm"
    vectors, vectors_there = pllm.VLLM(str(tmp_path)), pllm.RayVLLM(tmp_path)
    assert vectors_there.embedding(None)[1:] == vectors.embedding(None)[1:] == (None, 8)
    header = vectors_there.embedding(None)[0].backend().header(Options())
    assert header == vectors.embedding(None)[0].backend().header(Options())


def test_a_model_string() -> None:
    frame = pl.DataFrame({"q": ["a"]})
    assert frame.llm.estimate("q", model="ray/org/name")["to_send"].item() == 1


def test_without_ray_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'polars-llm-batch\[ray\]'"):
        pl.DataFrame({"q": ["a"]}).llm.generate("q", model="ray/org/name")
    assert pllm.jobs()["state"].to_list() == ["released"]


class FakeRay:
    """What joining a cluster calls of Ray."""

    class exceptions:
        class RayError(Exception): ...

        class AuthenticationError(RayError): ...

    def __init__(
        self, *, joined: bool = False, by_client: bool = False, fails: Exception | None = None
    ) -> None:
        self.joined = joined
        self.fails = fails
        self.inits: list[str] = []
        self.cloudpickle = SimpleNamespace(register_pickle_by_value=lambda _: None)
        self.util = SimpleNamespace(
            client=SimpleNamespace(ray=SimpleNamespace(is_connected=lambda: by_client))
        )

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, *, address: str, **_: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.inits.append(address)
        self.joined = True

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address="192.0.2.2:6379")

    def shutdown(self) -> None:
        self.joined = False


def joining(monkeypatch: pytest.MonkeyPatch, ray: FakeRay, *addresses: str | None) -> None:
    monkeypatch.setattr(cluster, "_import", lambda: ray)
    monkeypatch.setattr(cluster, "_knock", lambda _: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        for address in addresses:
            assert cluster.connect(address, 1) is ray
    finally:
        cluster.disconnect()


def test_the_same_address_joins_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    # Ray says the address of the node, which is not what was said.
    joining(monkeypatch, ray, "head-node:6379", "head-node:6379", None)
    assert ray.inits == ["head-node:6379"]
    assert not ray.joined
    with pytest.raises(pllm.InvalidRequest, match="has joined the cluster at"):
        joining(monkeypatch, FakeRay(), "head-node:6379", "another:6379")


def test_the_thread_that_starts_a_cluster_lives_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []

    class Ray(FakeRay):
        def init(self, *, address: str, **settings: Any) -> None:
            started.append(threading.current_thread())
            super().init(address=address, **settings)

    ray = Ray()
    monkeypatch.setattr(cluster, "_import", lambda: ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    user = threading.Thread(target=cluster.connect, args=(None, 1))
    user.start()
    user.join()
    (thread,) = started
    assert thread.is_alive()
    assert thread.daemon
    cluster.disconnect()
    thread.join(5)
    assert not thread.is_alive()
    cluster.connect(None, 1)
    assert started[1] is threading.main_thread()
    cluster.disconnect()


def test_the_thread_of_a_cluster_that_the_user_ended_goes_with_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[threading.Thread] = []

    class Ray(FakeRay):
        def init(self, **_: Any) -> None:
            started.append(threading.current_thread())

    monkeypatch.setattr(cluster, "_left", threading.Event())
    for _ in range(3):
        user = threading.Thread(target=cluster._init, args=(Ray(),))
        user.start()
        user.join()
    for gone in started[:2]:
        gone.join(5)
    assert [thread.is_alive() for thread in started] == [False, False, True]
    cluster._init(Ray())  # on the main thread, which stays by itself
    started[2].join(5)
    assert not started[2].is_alive()


def test_what_keeps_a_cluster_from_starting_is_told_on_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_import", lambda: FakeRay(fails=RuntimeError("no room")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ProviderError, match="no room"):
        pool.submit(cluster.connect, None, 1).result()


def test_a_cluster_that_wants_a_token_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "Authentication token is missing or incorrect"
    # What Ray 2.60 raises where the address is given and RAY_AUTH_MODE is not.
    trace = f"Traceback (most recent call last):\n  File x\nray.exceptions.AuthenticationError: {wanted}\n"
    failed = ConnectionError("Failed to connect to Ray cluster at 192.0.2.2:6379")
    failed.__cause__ = RuntimeError(f"Failed to connect to GCS. Last connection error: {trace}")
    for error in (failed, FakeRay.exceptions.AuthenticationError(wanted)):
        with pytest.raises(pllm.ProviderError, match=wanted) as caught:
            joining(monkeypatch, FakeRay(fails=error), "192.0.2.2:6379")
        assert "RAY_AUTH_MODE=token" in str(caught.value)


@pytest.mark.parametrize("address", [None, "ray://192.0.2.1:10001"])
def test_ray_client_is_refused_also_where_the_program_joined_by_it(
    monkeypatch: pytest.MonkeyPatch, address: str | None
) -> None:
    with pytest.raises(pllm.InvalidRequest, match="Ray Client"):
        joining(monkeypatch, FakeRay(joined=address is None, by_client=address is None), address)


def test_what_others_warn_of_while_engines_start_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: Any) -> Any:
        warnings.warn("of another thread", UserWarning, stacklevel=1)
        raise pllm.InvalidRequest("no", hint="no")

    backend = pllm.RayVLLM("org/name").backend()
    monkeypatch.setattr(backend, "_dataset", start)
    monkeypatch.setattr(cluster, "_import", FakeRay)
    with pytest.warns(UserWarning, match="of another thread"), pytest.raises(pllm.InvalidRequest):
        list(backend.run([]))
    cluster.disconnect()


def test_images_are_refused_as_locally() -> None:
    frame = pl.DataFrame({"q": ["a"], "i": [b"x"]})
    with pytest.raises(pllm.InvalidRequest, match="images"):
        frame.llm.generate("q", model="ray/org/name", images="i")


def test_what_is_said_elsewhere_or_is_no_value_is_refused_at_call() -> None:
    wrong: list[dict[str, Any]] = [
        {"processor": {"engine_kwargs": {}}},
        {"processor": {"tokenize_stage": True}},
        {"processor": {"chat_template_stage": {"chat_template": "x"}}},
        {"processor": {"chat_template_stage": False}},
        {"engine": {"hf_token": SECRET}},
        {"engine": {"dtype": "float16"}},
        {"concurrency": 0},
        {"concurrency": (3, 2)},
        {"batch_size": True},
        {"runtime_env": {"env_vars": {"N": 1}}},
        {"runtime_env": {"env_vars": [SECRET]}},
        {"runtime_env": {"env_vars": SECRET}},
        {"runtime_env": f"HF_TOKEN={SECRET}"},
        {"processor": ["max_concurrent_batches"]},
        {"processor": {"chat_template_stage": {"concurrency": (1, 2, 3)}}},
        {"processor": {"chat_template_stage": {"concurrency": "two"}}},
        {"concurrency": "4"},
        {"accelerator_type": 100},
        {"ray_address": 6379},
        {"order": "random"},
        {"price_per_hour": -1.0},
    ]
    for options in wrong:
        with pytest.raises(pllm.InvalidRequest) as caught:
            pllm.RayVLLM("org/name", **options)
        assert SECRET not in str(caught.value)
        assert "Nothing was sent" in str(caught.value)


def test_values_of_the_environment_are_not_shown_and_do_not_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HF_TOKEN": SECRET, "PLAIN": "plain-value"}
    model = pllm.RayVLLM("org/name", runtime_env={"env_vars": env, "working_dir": "."})
    frame = pl.LazyFrame({"q": ["a"]}).llm.generate("q", model=model)
    for shown in (repr(model), str(model), repr(model.backend()), pickle.dumps(model), repr(frame)):
        for value in env.values():
            assert value not in str(shown)
    assert "HF_TOKEN" in repr(model)
    # The other side has them of its own.
    monkeypatch.setenv("HF_TOKEN", "another")
    monkeypatch.delenv("PLAIN", raising=False)
    read = pickle.loads(pickle.dumps(model))
    backend = read.backend()
    assert backend._secrets == {"HF_TOKEN": "another"}
    assert "PLAIN" not in backend._runtime_env["env_vars"]
    # Ray writes runtime environments to its logs: what is secret by its name is not in it.
    backend = model.backend()
    assert SECRET not in str(backend._runtime_env)
    assert backend._runtime_env["env_vars"]["PLAIN"] == "plain-value"
    assert backend._runtime_env["working_dir"] == "."


def test_an_empty_variable_is_not_replaced_by_the_one_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://192.0.2.1:3128")
    model = pllm.RayVLLM("org/name", runtime_env={"env_vars": {"HTTP_PROXY": ""}})
    assert model.backend()._runtime_env["env_vars"]["HTTP_PROXY"] == ""


def test_secrets_are_set_where_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "before")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    secrets = on_nodes.Secrets({"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": "s3"})
    assert SECRET not in repr(secrets)
    assert repr(copy.deepcopy([secrets])) == repr([secrets])
    assert os.environ["HF_TOKEN"] == "before"
    assert pickle.loads(pickle.dumps(secrets)) == SECRET
    assert os.environ["HF_TOKEN"] == SECRET
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "s3"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "")  # so that monkeypatch removes it


def test_blocks_hold_neighbours_and_only_what_a_row_needs() -> None:
    backend = pllm.RayVLLM("org/name", batch_size=4).backend()
    heads = [letter * 400 for letter in "abc"]
    prompts = [f"{heads[i % 3]} {i}" for i in range(12)]

    def requests(first: int, **options: Any) -> Requests:
        frame = pl.DataFrame({"key": [bytes([first + i]) * 32 for i in range(12)], "prompt": prompts})
        frame = frame.with_columns(
            attempt=pl.lit(1), kind=pl.lit("t"), system=pl.lit(None, pl.String), sample=pl.lit(0)
        )
        return Requests(backend.header(Options(**options)), frame)

    keys, tables = backend._tables([requests(0), requests(100, max_tokens=5)])
    assert [table.num_rows for table in tables] == [4] * 6
    assert set(tables[0].column_names) == {"prompt", "kind", "system", "sample", "row", "column"}
    for table in tables:
        assert len({prompt[0] for prompt in table["prompt"].to_pylist()}) == 1
    rows = [row for table in tables for row in table["row"].to_pylist()]
    assert rows == list(range(24))
    assert sorted(keys) == sorted(bytes([first + i]) * 32 for first in (0, 100) for i in range(12))
    for table in tables:
        for row, column, prompt in zip(
            *(table[c].to_pylist() for c in ("row", "column", "prompt")), strict=True
        ):
            assert prompts[keys[row][0] - 100 * column] == prompt


def test_a_template_in_a_file_travels_as_its_text(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages }}")
    by_file = pllm.RayVLLM("org/name", engine={"chat_template": str(tmp_path / "template.jinja")}).backend()
    by_text = pllm.RayVLLM("org/name", engine={"chat_template": "{{ messages }}"}).backend()
    assert by_file._template == by_text._template == "{{ messages }}"
    assert by_file.header(Options()) == by_text.header(Options())
    assert "chat_template" not in by_file._engine  # the engine's constructor does not know it


def test_parameters_reach_the_engine_as_they_are() -> None:
    columns = [{"max_tokens": 5, "seed": 7, "logit_bias": {65: 1}}, {"max_tokens": 6}]
    asks = on_nodes.Asks(columns, "sampling_params")
    row = {"row": 0, "column": 0, "sample": 2, "tokens": [1, 2], "error": ""}
    made = asks(row)["sampling_params"]
    assert not isinstance(made, dict)  # a table of dicts would make a float of the seed
    assert dict(**made) == {"max_tokens": 5, "seed": 9, "logit_bias": {65: 1}}
    assert "structured_outputs" not in made
    assert dict(**asks({**row, "column": 1})["sampling_params"]) == {"max_tokens": 6}
    assert columns[0]["seed"] == 7
    assert asks({"column": 1, "sample": 0, "prompt": ""})[on_nodes.ERROR].startswith("EmptyPrompt")
    assert asks({"column": 1, "sample": 0, "prompt": "a"})[on_nodes.ERROR] == ""


def test_why_an_answer_ended() -> None:
    columns: list[dict[str, Any]] = [
        {"max_tokens": 3},
        {"max_tokens": 3, "ignore_eos": True},
        {"max_tokens": 3, "stop_token_ids": [9]},
    ]
    answers = on_nodes.Answers(columns, [2], 100)

    def reason(tokens: list[int], column: int = 0, before: int = 10) -> str:
        row = {"column": column, "num_input_tokens": before}
        return answers._finish(row, tokens)

    assert reason([5, 6, 7]) == "length"
    assert reason([5, 6, 2]) == "stop"
    assert reason([5, 6, 2], 1) == "length"
    assert reason([5, 9], 2) == "stop"
    assert reason([5, 6]) == "stop"  # by a text
    assert reason([5, 6], before=98) == "length"  # of the context


def test_why_a_row_failed() -> None:
    long = "VLLMValidationError: This model's maximum context length is 10 tokens."
    state, kind, message = _refusal(f"{long} (parameter=a, value=my prompt)")
    assert (state, kind) == (FAILED, "prompt_too_long")
    assert "my prompt" not in message
    assert _refusal("VLLMValidationError: The decoder prompt cannot be empty")[:2] == (FAILED, "empty_prompt")
    assert _refusal("ValueError: Grammar error: Unimplemented keys")[:2] == (FAILED, "invalid_request")
    assert _refusal("TemplateError: roles must alternate") == (
        FAILED,
        "invalid_request",
        "roles must alternate",
    )
    assert _refusal("EngineGenerateError: boom")[:2] == (RETRY, "engine_error")


def test_a_cluster_without_room_or_gpus_is_refused() -> None:
    gpus = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0}
    cluster.check_accelerators(gpus, kind="H100", cpu_build=False)
    cluster.check_room(gpus, [{"GPU": 1.0}] * 2, 1)
    cluster.check_accelerators({"CPU": 2.0}, kind=None, cpu_build=True)
    cluster.check_room({"CPU": 2.0}, [{"CPU": 1.0}], 1)
    with pytest.raises(pllm.InvalidRequest, match=r"2 GPU, and 4 are needed") as caught:
        cluster.check_room(gpus, [{"GPU": 1.0}] * 2, 2)
    assert "placement_group_config" in str(caught.value)
    with pytest.raises(pllm.InvalidRequest, match="no GPU"):
        cluster.check_accelerators({"CPU": 8.0}, kind=None, cpu_build=False)
    with pytest.raises(pllm.InvalidRequest, match="'A100'; it has H100"):
        cluster.check_accelerators(gpus, kind="A100", cpu_build=False)
