"""What an engine of one's own is asked: what enters the key, what the engine gets. Pure; no vLLM.

Local mode and the cluster share it: a request has one key wherever it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from polars_llm.backends.options import Options
from polars_llm.backends.vllm.weights import directory_digest
from polars_llm.errors import InvalidRequest
from polars_llm.request import Json, RequestHeader, canonical

__all__ = [
    "CHAT",
    "EMBEDDINGS",
    "MAX_TOKENS",
    "RAW",
    "arguments",
    "body",
    "declared",
    "embedding_body",
    "template_arguments",
]

CHAT = "/v1/chat/completions"
RAW = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"

MAX_TOKENS = 4_096
"""Where a verb sets none. Frozen, and part of the key: the engine's own 16 would cut answers in silence."""

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Sampling(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of vllm.SamplingParams that change an answer, and the chat template's arguments.

    Left out on purpose: n and best_of (a request has one answer: use `sample`), logprobs (nothing
    would read them), and what concerns streaming and tracing.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    min_p: _Share | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[_Count] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[_Count] | None = None
    logit_bias: dict[str, float] | None = None
    thinking_token_budget: _Count | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Settings of an engine that change how fast and how large it is, or how it is reached, and no answer.
# Anything that is not named here enters the key: a wrong guess may cost time, never a wrong answer.
# fmt: off
_NOT_IN_KEY = frozenset(
    {
        "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
        "data_parallel_size_local", "enable_expert_parallel", "distributed_executor_backend",
        "max_parallel_loading_workers", "disable_custom_all_reduce", "gpu_memory_utilization",
        "kv_cache_memory_bytes", "num_gpu_blocks_override", "cpu_offload_gb", "swap_space",
        "block_size", "max_num_seqs", "max_num_batched_tokens", "max_num_partial_prefills",
        "max_long_partial_prefills", "long_prefill_token_threshold", "scheduling_policy",
        "scheduler_cls", "async_scheduling", "enable_chunked_prefill", "enable_prefix_caching",
        "prefix_caching_hash_algo", "enforce_eager", "compilation_config", "optimization_level",
        "performance_mode", "load_format", "model_loader_extra_config", "download_dir", "hf_token",
        "trust_remote_code", "disable_log_stats", "stream_interval", "enable_sleep_mode",
        "mm_processor_cache_gb", "max_num_queued_reqs",
    }
)
# fmt: on

# What an option of the model object says already.
_OURS = {
    "model": "the model's name",
    "revision": "revision=",
    "dtype": "dtype=",
    "quantization": "quantization=",
}


def body(options: Options, settings: Mapping[str, Json]) -> dict[str, Json]:
    """What enters the key of a generated answer: parameters that are set, and `declared` settings.

    Raises
    ------
    InvalidRequest
        At call: a parameter that engines do not know, that is set twice, or with a wrong value.
    """
    fields: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "stop": options.stop,
        "seed": options.seed,
    }
    chosen = {name: value for name, value in fields.items() if value is not None}
    if options.schema is not None and "structured_outputs" in options.params:
        raise InvalidRequest(
            "schema and params={'structured_outputs': ...} contradict each other",
            hint="leave one of them out. Nothing was sent.",
        )
    if options.reasoning_effort is not None:
        raise InvalidRequest(
            "reasoning_effort is for hosted models; a model of your own takes it through its chat template",
            hint="params={'chat_template_kwargs': {'enable_thinking': False}}, or what the template of your"
            " model calls it. Nothing was sent.",
        )
    ours = chosen.keys() | ({"structured_outputs"} if options.schema else set())
    for name in options.params:
        if name in ours:
            raise InvalidRequest(
                f"params={{{name!r}: ...}} is set by the verb itself",
                hint=f"leave {name!r} out of params. Nothing was sent.",
            )
    asked = canonical({**chosen, **options.params})
    try:
        msgspec.convert(asked, _Sampling)
    except msgspec.ValidationError as error:
        raise InvalidRequest(
            f"This parameter cannot be sent to an engine: {error}",
            hint=f"it takes {', '.join(_Sampling.__struct_fields__)}. Nothing was sent.",
        ) from None
    assert isinstance(asked, dict)
    return {"max_tokens": MAX_TOKENS, **asked, "engine": dict(settings)}


def embedding_body(options: Options, settings: Mapping[str, Json]) -> dict[str, Json]:
    """What enters the key of a vector.

    Raises
    ------
    InvalidRequest
        At call: a parameter; pooling is a setting of the engine.
    """
    if options.params:
        raise InvalidRequest(
            f"params={dict(options.params)!r}: an embedding by an engine takes none",
            hint="pooling is a setting: pllm.VLLM(..., engine={'pooler_config': ...}). Nothing was asked.",
        )
    asked = {} if options.dimensions is None else {"dimensions": options.dimensions}
    return {**asked, "engine": dict(settings)}


def declared(engine: Mapping[str, Any], **own: Json) -> dict[str, Json]:
    """What the key says of an engine: what was declared and may change an answer.

    Parameters
    ----------
    engine
        Settings as vLLM calls them.
    own
        ``dtype``, ``revision``, ``quantization``; None is left out.
    """
    for name in engine:
        if name in _OURS:
            raise InvalidRequest(
                f"engine={{{name!r}: ...}} is said elsewhere",
                hint=f"use {_OURS[name]} of the model object. Nothing was sent.",
            )
    facts = {name: _content(value) for name, value in engine.items() if name not in _NOT_IN_KEY}
    result = canonical({**facts, **{k: v for k, v in own.items() if v is not None}}, "engine")
    assert isinstance(result, dict)
    return result


def _content(value: Any) -> Any:
    """A path (of a tokenizer, a chat template) stands for what is there, as a model's does."""
    if isinstance(value, (str, Path)) and len(str(value)) < 4_096 and "\n" not in str(value):
        path = Path(value).expanduser()
        if path.is_dir():
            return directory_digest(path)
        if path.is_file():
            return path.read_text()
    return value


def arguments(header: RequestHeader, sample: int) -> dict[str, Any]:
    """Keyword arguments of vllm.SamplingParams for one request; ``structured_outputs`` as a dict.

    What is not set is for the model's own generation config to say
    (``ModelConfig.get_diff_sampling_param()``). With a set seed, sample n is drawn with seed + n.
    """
    made: dict[str, Any] = {
        name: value for name, value in header.body.items() if name not in {"engine", "chat_template_kwargs"}
    }
    if made.get("seed") is not None:
        made["seed"] += sample
    if isinstance(made.get("logit_bias"), dict):
        made["logit_bias"] = {int(token): bias for token, bias in made["logit_bias"].items()}
    if header.schema is not None:
        made["structured_outputs"] = {"json": header.schema}
    return made


def template_arguments(header: RequestHeader) -> dict[str, Any]:
    """Arguments of the chat template."""
    given = header.body.get("chat_template_kwargs")
    return dict(given) if isinstance(given, dict) else {}
