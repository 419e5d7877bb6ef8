"""The option object of models that run on a Ray cluster: `pllm.RayVLLM`."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polars_llm.backends.vllm.order import Order
from polars_llm.errors import InvalidRequest
from polars_llm.local import OwnModel, check

if TYPE_CHECKING:
    from polars_llm.backends.vllm.ray import RayCluster

__all__ = ["RayVLLM"]

# Settings of the processor that are said elsewhere, or that would make answers other than their keys.
_SAID_ELSEWHERE: Mapping[str, str] = {
    "model_source": "it is the model's name",
    "engine_kwargs": "use engine=",
    "task_type": "the verb says it",
    "concurrency": "use concurrency=",
    "batch_size": "use batch_size=",
    "accelerator_type": "use accelerator_type=",
    "runtime_env": "use runtime_env=",
    "should_continue_on_error": "it is always on",
    "tokenize_stage": "prompts become tokens as in local mode",
    "detokenize_stage": "the engine gives text",
    "prepare_multimodal_stage": "images are not sent to models of your own",
    "dynamic_lora_loading_path": "adapters would not be part of the key",
}
_OF_RENDERING = frozenset({"num_cpus", "memory", "concurrency", "batch_size"})
# Environment variables that no log may show.
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|KEY", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False)
class RayVLLM(OwnModel):
    """A model that vLLM runs on a Ray cluster, through Ray Data's own LLM processor.

    The same keys as `VLLM`: answers made on one machine are valid on the cluster and the reverse. An
    evaluation is one execution of the processor, which starts its engines anew; answers are durable as blocks
    of rows are done. An engine that is lost is started again by Ray; a run that stops goes on with what is
    missing when the same line is run again.

    Parameters
    ----------
    name
        A name of the hub, or the path of a directory that all nodes see as this machine does.
    engine
        Settings for vLLM's engine, by its own names; those that can change an answer are part of the key.
    concurrency
        Engines at work at once: a number (Ray begins with one and adds more up to it), or a pair: from, to.
    accelerator_type
        As Ray calls it, for example ``"H100"``.
    batch_size
        Rows in a block: what a lost engine may have to answer again, and what becomes durable at once.
    runtime_env
        Of Ray, for all workers. A variable of ``env_vars`` that is None has its value from this process.
        Values are never shown or pickled. Those whose names speak of a token, key, secret or password
        reach the workers outside of Ray's own runtime environment, which Ray writes to its logs.
    ray_address
        Of the cluster, ``"HOST:6379"`` or ``"auto"``. Default: a Ray that is initialised already, else
        ``RAY_ADDRESS``, else a cluster on this machine, which ends with the process or with `close`.
    processor
        Other settings of ``vLLMEngineProcessorConfig``, by its own names, for example
        ``{"max_concurrent_batches": 16, "placement_group_config": {...}}``. ``chat_template_stage`` may
        hold ``num_cpus``, ``memory``, ``concurrency`` and ``batch_size`` of the stage that renders prompts.
    order, price_per_hour, revision, dtype, quantization, raw, vector_length
        As for `VLLM`. The price is of all machines together.

    Raises
    ------
    InvalidRequest
        At call: what `VLLM` refuses; a `concurrency` or `batch_size` below 1; a setting of the processor
        that is said elsewhere; a token in `engine`. When it runs: a cluster that has no GPU, no vLLM, no
        room, or not this model.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> pllm.RayVLLM("Qwen/Qwen3-8B", engine={"max_model_len": 8192}, concurrency=4)
    RayVLLM('Qwen/Qwen3-8B', engine={'max_model_len': 8192}, concurrency=4)
    """

    concurrency: int | tuple[int, int]
    accelerator_type: str | None
    batch_size: int
    runtime_env: Mapping[str, Any]
    ray_address: str | None
    processor: Mapping[str, Any]

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        engine: Mapping[str, Any] | None = None,
        concurrency: int | tuple[int, int] = 1,
        accelerator_type: str | None = None,
        batch_size: int = 64,
        runtime_env: Mapping[str, Any] | None = None,
        ray_address: str | None = None,
        processor: Mapping[str, Any] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        raw: bool = False,
        order: Order = "auto",
        price_per_hour: float | None = None,
        vector_length: int | None = None,
    ) -> None:
        for field, value in {"accelerator_type": accelerator_type, "ray_address": ray_address}.items():
            check(field, value, isinstance(value, str), "text")
        check("processor", processor, isinstance(processor, Mapping), "a mapping of settings")
        self._set(
            name,
            engine=engine,
            concurrency=_engines("concurrency", concurrency),
            accelerator_type=accelerator_type,
            batch_size=_whole("batch_size", batch_size),
            runtime_env=_environment(runtime_env),
            ray_address=ray_address,
            processor=_checked(processor or {}),
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            raw=raw,
            order=order,
            price_per_hour=price_per_hour,
            vector_length=vector_length,
        )
        if "hf_token" in self.engine:
            raise InvalidRequest(
                "engine={'hf_token': ...} would be sent to the cluster with everything else",
                hint="use runtime_env={'env_vars': {'HF_TOKEN': ...}}. Nothing was sent.",
            )

    __hash__ = OwnModel.__hash__

    def _shown(self) -> dict[str, Any]:
        env = {**self.runtime_env, "env_vars": dict.fromkeys(self.runtime_env["env_vars"], "...")}
        return {
            **super()._shown(),
            "concurrency": self.concurrency if self.concurrency != 1 else None,
            "accelerator_type": self.accelerator_type,
            "runtime_env": {name: value for name, value in env.items() if value},
            "processor": self.processor,
        }

    def __getstate__(self) -> dict[str, Any]:
        # None: the other side reads the values from its environment.
        env = {**self.runtime_env, "env_vars": dict.fromkeys(self.runtime_env["env_vars"])}
        return {**super().__getstate__(), "runtime_env": env}

    def backend(self, mode: str = "batch", *, max_concurrency: int | None = None) -> RayCluster:
        """The backend; the cluster is joined when the first answer is missing. It answers in every mode."""
        model, facts = self._facts(max_concurrency)
        from polars_llm.backends.vllm.ray import RayCluster

        said = self.runtime_env["env_vars"].items()
        given = {name: os.environ.get(name) if value is None else value for name, value in said}
        env = {name: value for name, value in given.items() if value is not None}
        return RayCluster(
            model,
            digest=facts["key_name"].removeprefix("path-") if model != facts["key_name"] else None,
            engine=self._arguments(),
            concurrency=self.concurrency,
            batch_size=self.batch_size,
            accelerator_type=self.accelerator_type,
            runtime_env={
                **self.runtime_env,
                "env_vars": {name: value for name, value in env.items() if not _SECRET.search(name)},
            },
            secrets={name: value for name, value in env.items() if _SECRET.search(name)},
            ray_address=self.ray_address,
            processor=self.processor,
            **facts,
        )

    def close(self) -> None:
        """Leave the cluster if this library joined it; one on this machine that it started ends.

        A Ray that you initialised stays. Engines end with each evaluation in any case.
        """
        from polars_llm.backends.vllm import cluster

        cluster.disconnect()


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(
            f"{name} is {value!r}", hint="it is a whole number, 1 or more. Nothing was sent."
        )
    return value


def _engines(name: str, value: Any) -> int | tuple[int, int]:
    if not isinstance(value, (tuple, list)):
        return _whole(name, value)
    pair = [_whole(name, part) for part in value]
    if len(pair) != 2 or pair[0] > pair[1]:
        raise InvalidRequest(
            f"{name} is {value!r}",
            hint="a whole number, or a pair: from, to. Nothing was sent.",
        )
    return pair[0], pair[1]


def _environment(runtime_env: Any) -> dict[str, Any]:
    # What is wrong is not repeated: it may hold a value that nobody may read.
    given = _mapping("runtime_env", runtime_env)
    variables = _mapping("env_vars of runtime_env", given.get("env_vars"))
    for name, value in variables.items():
        if not isinstance(name, str) or not (value is None or isinstance(value, str)):
            raise InvalidRequest(
                f"runtime_env: the value of {name!r} in env_vars is a {type(value).__name__}",
                hint="names and values are strings; None takes the value of this process. Nothing was sent.",
            )
    return {**given, "env_vars": variables}


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise InvalidRequest(
            f"{name} is a {type(value).__name__}",
            hint="it takes a mapping: runtime_env={'env_vars': {'HF_TOKEN': None}}. Nothing was sent.",
        )
    return dict(value or {})


def _checked(processor: Mapping[str, Any]) -> dict[str, Any]:
    for name in processor:
        if name in _SAID_ELSEWHERE:
            raise InvalidRequest(
                f"processor={{{name!r}: ...}} cannot be set here: {_SAID_ELSEWHERE[name]}",
                hint=f"leave {name!r} out of processor. Nothing was sent.",
            )
    stage = processor.get("chat_template_stage", {})
    if not isinstance(stage, Mapping) or stage.keys() - _OF_RENDERING:
        raise InvalidRequest(
            f"processor={{'chat_template_stage': {stage!r}}}: it takes a dict of"
            f" {', '.join(sorted(_OF_RENDERING))}",
            hint="the template is a setting of the engine: engine={'chat_template': ...}; its arguments are"
            " params={'chat_template_kwargs': ...} of the verb. Nothing was sent.",
        )
    if "concurrency" in stage:
        _engines("concurrency of the chat_template_stage", stage["concurrency"])
    return dict(processor)
