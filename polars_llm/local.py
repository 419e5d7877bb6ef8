"""The option object of models that run here, `pllm.VLLM`, and what it shares with `pllm.RayVLLM`."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, get_args

from polars_llm.backends.vllm import sampling
from polars_llm.backends.vllm.order import Order
from polars_llm.backends.vllm.weights import directory_digest, model_path
from polars_llm.errors import InvalidRequest

if TYPE_CHECKING:
    from polars_llm.backends.vllm.local import VLLMLocal

__all__ = ["VLLM", "OwnModel", "check", "is_length"]


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False)
class OwnModel:
    """A model of one's own: what is said of it, and what stands for it in keys."""

    name: str
    engine: Mapping[str, Any]
    revision: str | None
    dtype: str
    quantization: str | None
    raw: bool
    order: Order
    price_per_hour: float | None
    vector_length: int | None
    endpoint: str

    def _set(
        self,
        name: str | os.PathLike[str],
        *,
        engine: Mapping[str, Any] | None,
        dtype: str,
        raw: bool,
        order: Order,
        price_per_hour: float | None,
        **others: Any,
    ) -> None:
        if isinstance(name, os.PathLike):
            name = os.fspath(name)
        if not isinstance(name, str) or not name.strip():
            raise InvalidRequest(
                "The model has no name.",
                hint=f"for example pllm.{type(self).__name__}('Qwen/Qwen3-8B'), or the path of a directory."
                " Nothing was sent.",
            )
        if order not in get_args(Order):
            raise InvalidRequest(
                f"order is {order!r}",
                hint=f"it takes {', '.join(map(repr, get_args(Order)))}. Nothing was sent.",
            )
        check("engine", engine, isinstance(engine, Mapping), "a mapping like {'max_model_len': 8192}")
        check("raw", raw, isinstance(raw, bool), "True or False")
        check("price_per_hour", price_per_hour, _is_price(price_per_hour), "USD of 0 or more, like 2.5")
        for field in ("revision", "quantization"):
            check(field, others.get(field), isinstance(others.get(field), str), "text")
        length = others.get("vector_length")
        check("vector_length", length, is_length(length), "a whole number from 1 on")
        facts = {
            "name": name,
            "engine": dict(engine or {}),
            "dtype": str(dtype).removeprefix("torch."),
            "raw": raw,
            "order": order,
            "price_per_hour": price_per_hour,
            "endpoint": sampling.RAW if raw else sampling.CHAT,
            **others,
        }
        for field, value in facts.items():
            object.__setattr__(self, field, value)
        self._declared()

    def __repr__(self) -> str:
        said = "".join(f", {field}={value!r}" for field, value in self._shown().items() if value)
        return f"{type(self).__name__}({self.name!r}{said})"

    def _shown(self) -> dict[str, Any]:
        """What a repr says beside the name, where it is not empty."""
        return {
            "engine": {k: v for k, v in self.engine.items() if k != "hf_token"},
            "revision": self.revision,
            "dtype": self.dtype if self.dtype != "auto" else None,
            "quantization": self.quantization,
            "raw": self.raw,
        }

    def __hash__(self) -> int:
        return hash((self.name, self.revision, self.dtype, self.quantization, self.raw))

    def __getstate__(self) -> dict[str, Any]:
        # A pickled plan travels and is stored; the other side reads the hub's token from its environment.
        engine = {k: v for k, v in self.engine.items() if k != "hf_token"}
        return {**self.__dict__, "engine": engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _declared(self) -> dict[str, Any]:
        facts = {"dtype": self.dtype, "revision": self.revision, "quantization": self.quantization}
        return sampling.declared(self.engine, **facts)

    def _arguments(self) -> dict[str, Any]:
        """What the engine is made with."""
        return {
            **self.engine,
            "dtype": self.dtype,
            "revision": self.revision,
            "quantization": self.quantization,
        }

    def _facts(self, max_concurrency: int | None) -> tuple[str, dict[str, Any]]:
        """What the engine gets as its model, and what the backends of all own models are made with."""
        if max_concurrency is not None:
            raise InvalidRequest(
                "max_concurrency is for realtime calls; an engine schedules by itself",
                hint=f"pass engine={{'max_num_seqs': ...}} to pllm.{type(self).__name__}. Nothing was sent.",
            )
        path = model_path(self.name)
        return str(path or self.name), {
            "key_name": self.name if path is None else f"path-{directory_digest(path)}",
            "settings": self._declared(),
            "endpoint": self.endpoint,
            "order": self.order,
            "price_per_hour": self.price_per_hour,
        }

    def embedding(self, dimensions: int | None) -> tuple[Self, int | None, int]:
        """The same model for embeddings, what to ask it for, and the vectors' length."""
        check("dimensions", dimensions, is_length(dimensions), "a whole number from 1 on")
        own = self.vector_length or _hidden_size(model_path(self.name))
        if dimensions is None and own is None:
            raise InvalidRequest(
                f"The length of the vectors of {self.name!r} is not known before it is loaded",
                hint=f"pllm.{type(self).__name__}({self.name!r}, vector_length=1024) says it."
                " Nothing was asked.",
            )
        asked = copy.copy(self)
        object.__setattr__(asked, "endpoint", sampling.EMBEDDINGS)
        sent = None if dimensions == own else dimensions
        return asked, sent, dimensions or own or 0


@dataclasses.dataclass(frozen=True, kw_only=True, init=False, repr=False)
class VLLM(OwnModel):
    """A model that vLLM runs in this process: no provider, no server, no key.

    The engine is made when the first answer is missing, once for each configuration and process, and
    stays for the next evaluation. It is closed by `close`, at exit, or when another model needs its
    memory. Answers are durable about once a second: a killed run loses what was in flight.

    Where a verb sets no ``max_tokens`` it is 4,096 tokens; what else is not set is as the model's own
    generation config says. With ``seed``, sample n is drawn with seed + n.

    Parameters
    ----------
    name
        A name of the hub, or the path of a directory. A path enters the key as a digest of what is
        there (config and tokenizer in full, weights by header, size and samples), so that a model may
        be moved; a name enters as it is, with `revision`.
    engine
        Settings for vLLM's engine, by its own names, for example ``{"max_model_len": 8192,
        "gpu_memory_utilization": 0.8}``. Those that can change an answer are part of the key
        (``max_model_len``, ``tokenizer``, ``hf_overrides``, ...); speed and memory are not.
    revision
        Of the hub's model: declare it, and a changed model is another key.
    dtype
        As vLLM calls it. ``"auto"`` stays ``"auto"`` in the key. On a CPU without bfloat16 say
        ``"float32"``: it is several times as fast.
    quantization
        As vLLM calls it.
    raw
        Send the text as it is, without the model's chat template.
    order
        ``"auto"``, ``"prefix"`` (rows that begin alike together), ``"length"`` (longest first) or
        ``"input"``. Changes no answer; docs/local.md has figures.
    price_per_hour
        What the machine costs, in USD: ``cost_usd`` is then each answer's share of the time, by tokens
        computed. Default: null costs.
    vector_length
        How many numbers an embedding has, for `embed` with a name of the hub; the config of a model on
        disk says it. Not part of the key.

    Raises
    ------
    InvalidRequest
        At call: an empty name, a path that is not there, an unknown `order`, a setting of the engine
        that cannot be part of a key, a price below 0.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> pllm.VLLM("Qwen/Qwen3-8B", engine={"max_model_len": 8192})
    VLLM('Qwen/Qwen3-8B', engine={'max_model_len': 8192})
    """

    def __init__(
        self,
        name: str | os.PathLike[str],
        *,
        engine: Mapping[str, Any] | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        raw: bool = False,
        order: Order = "auto",
        price_per_hour: float | None = None,
        vector_length: int | None = None,
    ) -> None:
        self._set(
            name,
            engine=engine,
            revision=revision,
            dtype=dtype,
            quantization=quantization,
            raw=raw,
            order=order,
            price_per_hour=price_per_hour,
            vector_length=vector_length,
        )

    __hash__ = OwnModel.__hash__

    def backend(self, mode: str = "batch", *, max_concurrency: int | None = None) -> VLLMLocal:
        """The backend; the engine is made when it is first needed, and answers in every mode."""
        model, facts = self._facts(max_concurrency)
        from polars_llm.backends.vllm.local import VLLMLocal

        pooling = {"runner": "pooling"} if self.endpoint == sampling.EMBEDDINGS else {}
        return VLLMLocal(model, arguments={**self._arguments(), **pooling}, **facts)

    def close(self) -> None:
        """Close the engines of this configuration, if this process has any, and free their memory."""
        from polars_llm.backends.vllm import engines

        # As they were made: also where the directory has been moved since.
        for model in {self.name, str(Path(self.name).expanduser().resolve())}:
            for arguments in (self._arguments(), {**self._arguments(), "runner": "pooling"}):
                engines.close(model, arguments)


def check(name: str, value: object, fits: bool, wanted: str) -> None:
    """Raise InvalidRequest unless a setting is None or `fits`."""
    if value is not None and not fits:
        raise InvalidRequest(f"{name} is {value!r}", hint=f"it takes {wanted}. Nothing was sent.")


def _is_price(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


def is_length(value: object) -> bool:
    """Can a vector have so many numbers?"""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _hidden_size(path: Path | None) -> int | None:
    config = path and path / "config.json"
    if not config or not config.is_file():
        return None
    size = json.loads(config.read_text()).get("hidden_size")
    return size if isinstance(size, int) else None
