"""Everything that polars_llm raises or warns.

::

    PolarsLLMError
    ├── JobsPending              the work is at the provider; the same line collects it later
    ├── RequestsFailed           on_error="raise": some requests failed for good
    ├── UnansweredInput          a verb reads an answer that is not there yet, or cannot be sent from here
    ├── BudgetExceeded           max_cost would be passed; nothing was sent
    ├── InvalidRequest           an argument, a dtype or a parameter that no provider would take
    ├── ModelNotChosen           no model given, none configured
    ├── ProviderError            the provider, or the way to it, said no
    │   └── AccountError         401, 402, 403, quota, unknown model: the account, not the request
    └── CacheError               the cache directory
        ├── CacheUnsafe          a file system on which locks or SQLite cannot be trusted
        └── CacheCorrupt         a file that is truncated, foreign or damaged

    LLMWarning                   failures by kind, costs that are not known, a group_by that costs more

Every message is: the fact, a blank line, and ``Hint:`` with what to type next and what happened to the
money. Facts are keyword attributes. The constructor takes one positional message and can be called with
nothing else, because Polars' engines and pickle rebuild an exception as ``type(e)(message)``.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AccountError",
    "BudgetExceeded",
    "CacheCorrupt",
    "CacheError",
    "CacheUnsafe",
    "InvalidRequest",
    "JobsPending",
    "LLMWarning",
    "ModelNotChosen",
    "PolarsLLMError",
    "ProviderError",
    "RequestsFailed",
    "UnansweredInput",
]


class PolarsLLMError(Exception):
    """Base of all errors of this library.

    Parameters
    ----------
    message
        The fact, in one sentence.
    hint
        What to type next, and what happened to the money. It becomes the ``Hint:`` paragraph.
    """

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        super().__init__(f"{message}\n\nHint: {hint}" if hint else message)

    def __reduce__(self) -> tuple[Any, ...]:
        # The facts travel in __dict__; the message, hint included, is the one positional argument.
        return type(self), self.args, self.__dict__


class JobsPending(PolarsLLMError):
    """The requests are with the provider; evaluating the same frame again collects the answers.

    Attributes
    ----------
    jobs
        Ids of the jobs that hold requests of this frame (``pllm.jobs()`` lists them).
    requests
        Requests of this frame that have no answer yet.
    done
        Requests of those jobs that the provider reports as finished.
    next_poll
        Seconds after which looking again makes sense.
    """

    def __init__(
        self,
        message: str = "",
        *,
        jobs: list[str] | None = None,
        requests: int = 0,
        done: int = 0,
        next_poll: float = 0.0,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.jobs = jobs or []
        self.requests = requests
        self.done = done
        self.next_poll = next_poll


class RequestsFailed(PolarsLLMError):
    """Some requests failed for good and ``on_error="raise"`` was asked for.

    Attributes
    ----------
    failed
        Unique requests that failed.
    kinds
        Error kind -> number of unique requests.
    """

    def __init__(
        self,
        message: str = "",
        *,
        failed: int = 0,
        kinds: dict[str, int] | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.failed = failed
        self.kinds = kinds or {}


class UnansweredInput(PolarsLLMError):
    """An answer that is not there yet is needed where nothing may be sent; nothing was sent."""


class BudgetExceeded(PolarsLLMError):
    """Sending would pass ``max_cost``; nothing was sent.

    Attributes
    ----------
    cost_usd
        Upper bound of what sending would cost, in USD; None if it cannot be computed.
    max_cost
        The limit that was set, in USD.
    reserved_usd
        What is already in flight or spent against the same limit, in USD.
    """

    def __init__(
        self,
        message: str = "",
        *,
        cost_usd: float | None = None,
        max_cost: float = 0.0,
        reserved_usd: float = 0.0,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.cost_usd = cost_usd
        self.max_cost = max_cost
        self.reserved_usd = reserved_usd


class InvalidRequest(PolarsLLMError, ValueError):
    """An argument, a dtype or a parameter that cannot be sent; nothing was sent."""


class ModelNotChosen(PolarsLLMError, ValueError):
    """No model was given and none is configured; nothing was sent."""


class ProviderError(PolarsLLMError):
    """The provider, or the way to it, said no.

    Attributes
    ----------
    provider
        For example ``"openai"``.
    status
        The HTTP status, None if no reply came.
    kind
        The provider's own word for the error, if it gave one.
    """

    def __init__(
        self,
        message: str = "",
        *,
        provider: str = "",
        status: int | None = None,
        kind: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.provider = provider
        self.status = status
        self.kind = kind


class AccountError(ProviderError):
    """The account, not the request: credentials, payment, permission, quota, an unknown model.

    It is never remembered per request: once the account is mended the same line goes on.
    """


class CacheError(PolarsLLMError):
    """The cache directory cannot be used as asked.

    Attributes
    ----------
    path
        The file or directory.
    """

    def __init__(self, message: str = "", *, path: str = "", hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.path = path


class CacheUnsafe(CacheError):
    """The file system does not keep the promises that SQLite and locks need; nothing was sent."""


class CacheCorrupt(CacheError):
    """A file in the cache is truncated, foreign or damaged; its requests are not sent again."""


class LLMWarning(UserWarning):
    """Something that a user should see, but that did not stop the work."""
