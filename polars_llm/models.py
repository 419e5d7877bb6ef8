"""Model strings and option objects -> backends."""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeAlias, overload

from polars_llm.backends.base import BatchBackend, LiveBackend
from polars_llm.backends.hosts import ANTHROPIC, Host, host_of, normalise_base_url
from polars_llm.backends.wire import chat, embeddings, messages, responses
from polars_llm.errors import InvalidRequest, ModelNotChosen
from polars_llm.job import Job
from polars_llm.local import VLLM, check, is_length
from polars_llm.pricing import Prices
from polars_llm.ray_cluster import RayVLLM

if TYPE_CHECKING:
    from polars_llm.backends.anthropic import AnthropicBatch
    from polars_llm.backends.openai import OpenAIBatch

__all__ = ["VLLM", "Anthropic", "Model", "OpenAI", "RayVLLM", "for_job", "of_provider", "resolve"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hosted:
    """What all hosted models share; the key is held here and nowhere else."""

    name: str
    base_url: str | None = dataclasses.field(default=None, repr=False)
    api_key: str | None = dataclasses.field(default=None, repr=False, compare=False)
    cache_as: str | None = None
    prices: Prices | None = dataclasses.field(default=None, compare=False)

    _own: ClassVar[str]
    _base_url_variable: ClassVar[str]

    def __getstate__(self) -> dict[str, Any]:
        # A pickled plan travels and is stored; the other side reads the key from its environment.
        return {**self.__dict__, "api_key": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _set(
        self,
        name: str,
        base_url: str | None,
        api_key: str | None,
        cache_as: str | None,
        prices: Prices | None,
    ) -> None:
        _check_name(name)
        normalise_base_url(base_url, own=self._own)
        facts = {
            "name": name,
            "base_url": base_url,
            "api_key": api_key,
            "prices": prices,
            "cache_as": (normalise_base_url(cache_as, own=self._own) or self._own) if cache_as else None,
        }
        for field, value in facts.items():
            object.__setattr__(self, field, value)

    @property
    def _address(self) -> str | None:
        return self.base_url or os.environ.get(self._base_url_variable) or None

    @property
    def _key_url(self) -> str | None:
        """What stands for the host in keys."""
        return normalise_base_url(self.cache_as or self._address, own=self._own)

    @property
    def _kind(self) -> Host:
        """What the host can do."""
        raise NotImplementedError

    @property
    def _path(self) -> str:
        """The endpoint that is asked."""
        raise NotImplementedError

    def _client(self) -> OpenAIBatch | AnthropicBatch:
        raise NotImplementedError

    @overload
    def backend(self) -> BatchBackend: ...

    @overload
    def backend(
        self, mode: Literal["batch", "realtime"], *, max_concurrency: int | None = None
    ) -> BatchBackend | LiveBackend: ...

    def backend(
        self, mode: Literal["batch", "realtime"] = "batch", *, max_concurrency: int | None = None
    ) -> BatchBackend | LiveBackend:
        """The backend as the environment stands now.

        Raises
        ------
        InvalidRequest
            At call: ``mode="batch"``, and the host has no batches.
        """
        if mode == "batch":
            self._kind.check_batch(self._path)
            return self._client()
        from polars_llm.backends.realtime import Realtime

        client = self._client()
        batch = client if self._path in self._kind.batch_endpoints else None
        return Realtime(client, batch=batch, max_concurrency=max_concurrency)


_ENDPOINTS = {"chat": chat.ENDPOINT, "responses": responses.ENDPOINT, "embeddings": embeddings.ENDPOINT}


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class OpenAI(_Hosted):
    """A model behind OpenAI's Batch service, or a host that speaks it.

    Parameters
    ----------
    name
        The model's name there, for example ``"gpt-6-luna"``.
    base_url
        Another host's address, ending in ``/v1`` as a rule. Default: ``OPENAI_BASE_URL``, else
        OpenAI's own. Takes part in the key, without user info and query.
    api_key
        Default: ``OPENAI_API_KEY``. Never written to disk, shown in a repr, or pickled.
    cache_as
        Enters the key in place of `base_url`: give it the old address when a host moves, and the
        answers from there stay valid.
    prices
        Your own prices (`pllm.Prices`), where the bundled list does not know the model or the host.
    host
        What kind of server answers there, where its address does not tell: ``"vllm"``, ``"sglang"``,
        ``"tgi"``, ``"ollama"``, ``"azure"`` and so on (docs/hosts.md). Not part of the key.
    endpoint
        ``"chat"``: Chat Completions, which every compatible host has. ``"responses"``: the Responses
        API, with ``store: false``. Part of the key.
    vector_length
        How long the model's embeddings are, for `embed` without ``dimensions=`` where the library does
        not know it. Not part of the key.

    Raises
    ------
    InvalidRequest
        At call: an empty name, a `base_url` that is not an http address, an unknown `host` or `endpoint`,
        a `vector_length` that is no length.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> pllm.OpenAI("gpt-6-luna")
    OpenAI('gpt-6-luna')
    """

    host: str | None = None
    endpoint: str = "chat"
    vector_length: int | None = dataclasses.field(default=None, repr=False, compare=False)

    _own: ClassVar[str] = "https://api.openai.com/v1"
    _base_url_variable: ClassVar[str] = "OPENAI_BASE_URL"

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        cache_as: str | None = None,
        prices: Prices | None = None,
        host: str | None = None,
        endpoint: Literal["chat", "responses"] = "chat",
        vector_length: int | None = None,
    ) -> None:
        self._set(name, base_url, api_key, cache_as, prices)
        host_of(None, host)
        object.__setattr__(self, "host", host)
        if endpoint not in ("chat", "responses"):
            raise InvalidRequest(
                f"endpoint is {endpoint!r}; it takes 'chat' or 'responses'",
                hint="for embeddings call .llm.embed. Nothing was sent.",
            )
        object.__setattr__(self, "endpoint", endpoint)
        check("vector_length", vector_length, is_length(vector_length), "a whole number from 1 on")
        object.__setattr__(self, "vector_length", vector_length)

    def __repr__(self) -> str:
        facts = {
            "base_url": normalise_base_url(self.base_url, own=self._own),
            "host": self.host,
            "endpoint": self.endpoint if self.endpoint != "chat" else None,
        }
        said = "".join(f", {field}={value!r}" for field, value in facts.items() if value)
        return f"OpenAI({self.name!r}{said})"

    def embedding(self, dimensions: int | None) -> tuple[Self, int | None, int]:
        """The same model at the embeddings endpoint, what to ask for there, and the vectors' length."""
        sent, length = embeddings.lengths(self.name, dimensions, self.vector_length)
        asked = copy.copy(self)
        object.__setattr__(asked, "endpoint", "embeddings")
        return asked, sent, length

    @property
    def _kind(self) -> Host:
        return host_of(normalise_base_url(self._address, own=self._own), self.host)

    @property
    def _path(self) -> str:
        return _ENDPOINTS[self.endpoint]

    def _client(self) -> OpenAIBatch:
        from polars_llm.backends.openai import OpenAIBatch

        address = self._address
        made = OpenAIBatch(
            self.name,
            base_url=normalise_base_url(address, own=self._own),
            address=address,
            key_url=self._key_url,
            api_key=self.api_key,
            host=self._kind,
            endpoint=self._path,
        )
        made.prices = self.prices
        return made


@dataclasses.dataclass(frozen=True, kw_only=True, init=False)
class Anthropic(_Hosted):
    """A model behind Anthropic's Message Batches, or a host that speaks them.

    The API wants a limit for every answer: where a verb sets no ``max_tokens`` it is 4,096 tokens.
    Thinking counts as part of the answer, so give it more room where a model thinks
    (``reasoning_effort``, ``params={"thinking": ...}``).

    Parameters
    ----------
    name
        The model's name there, for example ``"claude-haiku-5-5"``.
    base_url
        Another host's address, without ``/v1``. Default: ``ANTHROPIC_BASE_URL``, else Anthropic's
        own. Takes part in the key, without user info and query. The API key is sent to this host
        only: results that it says are elsewhere are asked for here.
    api_key
        Default: ``ANTHROPIC_API_KEY``, then whatever else the SDK finds. Never written to disk,
        shown in a repr, or pickled.
    cache_as
        Enters the key in place of `base_url`: give it the old address when a host moves, and the
        answers from there stay valid.
    api_version
        Version of the API (header ``anthropic-version``), part of the key. The default knows no
        ``temperature``, ``top_p`` and ``top_k``; older models still take them under
        ``"2023-06-01"``.
    betas
        Names of beta features (header ``anthropic-beta``), part of the key.
    prices
        Your own prices (`pllm.Prices`), where the bundled list does not know the model or the host.
    cache_system
        ``"5m"`` or ``"1h"``: ask for the system prompt to be kept that long in Anthropic's prompt cache,
        where the other rows of the column find it: read at a tenth of the input price, written at 1.25
        (``"5m"``) or 2 times of it; in a batch half of either. Whether a row finds it is up to the
        provider: in a batch 30 to 98 % do, by its documentation. A prompt below the model's minimum (1,024
        tokens or more) is not kept, and costs no more than before. It changes no answer, and is not part
        of the key: answers from before stay valid. ``max_cost`` counts every row as a write.

    Raises
    ------
    InvalidRequest
        At call: an empty name, a `base_url` that is not an http address, an `api_version` that is
        not a date, another `cache_system`.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> pllm.Anthropic("claude-haiku-5-5")
    Anthropic('claude-haiku-5-5')
    """

    api_version: str = messages.API_VERSION
    betas: tuple[str, ...] = ()
    cache_system: Literal["5m", "1h"] | None = None

    _own: ClassVar[str] = "https://api.anthropic.com"
    _base_url_variable: ClassVar[str] = "ANTHROPIC_BASE_URL"

    def __init__(
        self,
        name: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        cache_as: str | None = None,
        api_version: str = messages.API_VERSION,
        betas: Sequence[str] = (),
        prices: Prices | None = None,
        cache_system: Literal["5m", "1h"] | None = None,
    ) -> None:
        self._set(name, base_url, api_key, cache_as, prices)
        messages.headers(api_version, betas)
        messages.cache_mark(cache_system)
        object.__setattr__(self, "cache_system", cache_system)
        object.__setattr__(self, "api_version", api_version)
        object.__setattr__(self, "betas", tuple(betas))

    def __repr__(self) -> str:
        host = normalise_base_url(self.base_url, own=self._own)
        version = self.api_version if self.api_version != messages.API_VERSION else None
        facts = {
            "base_url": host,
            "api_version": version,
            "betas": list(self.betas),
            "cache_system": self.cache_system,
        }
        said = "".join(f", {field}={value!r}" for field, value in facts.items() if value)
        return f"Anthropic({self.name!r}{said})"

    def embedding(self, dimensions: int | None) -> tuple[Self, int | None, int]:
        """Anthropic has no embeddings: always raises InvalidRequest."""
        raise InvalidRequest(
            "Anthropic has no embeddings",
            hint="for example model='openai/text-embedding-3-small'. Nothing was sent.",
        )

    @property
    def _kind(self) -> Host:
        return ANTHROPIC

    @property
    def _path(self) -> str:
        return messages.ENDPOINT

    def _client(self) -> AnthropicBatch:
        from polars_llm.backends.anthropic import AnthropicBatch

        address = self._address
        made = AnthropicBatch(
            self.name,
            base_url=normalise_base_url(address, own=self._own),
            address=address,
            key_url=self._key_url,
            api_key=self.api_key,
            headers=messages.headers(self.api_version, self.betas),
        )
        made.prices = self.prices
        made.cache_system = self.cache_system
        return made


Hosted: TypeAlias = OpenAI | Anthropic
Model: TypeAlias = Hosted | VLLM | RayVLLM

_HOSTED: dict[str, type[OpenAI] | type[Anthropic]] = {"openai": OpenAI, "anthropic": Anthropic}
_OWN: dict[str, type[VLLM] | type[RayVLLM]] = {"vllm": VLLM, "ray": RayVLLM}
_BY_PREFIX: dict[str, type[OpenAI] | type[Anthropic] | type[VLLM] | type[RayVLLM]] = {**_HOSTED, **_OWN}


def resolve(model: str | Model | None) -> Model:
    """A model object from what the user gave, or what is configured.

    Raises
    ------
    ModelNotChosen
        At call: None was given and none is configured.
    InvalidRequest
        At call: a string that names no provider, or an unknown one.
    """
    if model is None:
        raise ModelNotChosen(
            "No model was given and none is configured.",
            hint="pass model='openai/gpt-6-luna', or call pllm.Config(model=...), or set"
            " POLARS_LLM_MODEL. Nothing was sent.",
        )
    if not isinstance(model, str):
        if isinstance(model, tuple(_BY_PREFIX.values())):
            return model
        raise InvalidRequest(
            f"model is a {type(model).__name__}, not a string or a model object",
            hint="for example model='openai/gpt-6-luna'. Nothing was sent.",
        )
    prefix, slash, name = model.partition("/")
    if not slash or prefix not in _BY_PREFIX:
        known = ", ".join(f"'{p}/NAME'" for p in _BY_PREFIX)
        raise InvalidRequest(
            f"model={model!r} does not name a provider that this library knows",
            hint=f"write it as one of {known}. Nothing was sent.",
        )
    return _BY_PREFIX[prefix](name)


def of_provider(provider: str | Model) -> Hosted:
    """A model object for calls that concern an account, not a model.

    Raises
    ------
    InvalidRequest
        At call: not a provider with batches.
    """
    if isinstance(provider, (OpenAI, Anthropic)):
        return provider
    if isinstance(provider, (VLLM, RayVLLM)) or provider not in _HOSTED:
        known = ", ".join(repr(p) for p in _HOSTED)
        raise InvalidRequest(
            f"{provider!r} is not a provider with batches", hint=f"write one of {known}. Nothing was sent."
        )
    return _HOSTED[provider]("any")


def for_job(job: Job, model: Model | None = None) -> BatchBackend:
    """The backend that can reach a job: the environment's own address if it is the job's."""
    if model is not None:
        return of_provider(model).backend()
    name = job.model or "any"
    if job.provider == "anthropic":
        return _reaching(job, functools.partial(Anthropic, name, **messages.versions(job.headers or {})))
    return _reaching(job, functools.partial(OpenAI, name))


def _reaching(job: Job, make: Callable[..., Hosted]) -> BatchBackend:
    """The environment's own address (it may hold what a normalised one does not), if it is the job's."""
    model = make()
    here = normalise_base_url(model._address, own=model._own)
    return (model if here == job.base_url else make(base_url=job.base_url or model._own)).backend()


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise InvalidRequest(
            "The model has no name.",
            hint="for example pllm.OpenAI('gpt-6-luna'). Nothing was sent.",
        )
