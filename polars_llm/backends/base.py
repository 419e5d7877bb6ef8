"""What the heart asks of a batch provider, and the one table of its errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar, runtime_checkable

import polars as pl

from polars_llm.backends.options import Options
from polars_llm.errors import AccountError, ProviderError
from polars_llm.job import Job, Mode
from polars_llm.pricing import Prices
from polars_llm.request import RequestHeader, Requests

if TYPE_CHECKING:
    import tenacity
    from typing_extensions import TypeIs

__all__ = [
    "BatchBackend",
    "BatchStatus",
    "CallFailed",
    "Found",
    "IsOurs",
    "Learns",
    "Limits",
    "ListedBatch",
    "LiveBackend",
    "Phase",
    "Verdict",
    "is_batch",
    "retrying",
    "verdict",
]

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What one batch may hold. Sources: facts in each backend's docstring."""

    requests: int
    size_bytes: int


class Phase(StrEnum):
    """How far a batch is, in words that all providers share."""

    RUNNING = "running"
    ENDED = "ended"  # completed, expired or cancelled: answers can be fetched
    REFUSED = "refused"  # the whole batch failed validation; nothing was billed
    QUEUE_FULL = "queue_full"  # never started; the same file may be sent again later
    MISSING = "missing"  # the provider does not know the id: another key or project, or too early


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatus:
    """One look at a batch.

    Parameters
    ----------
    why
        How it ended: ``"completed"``, ``"expired"``, ``"cancelled"``; or the provider's reason.
    kind
        The provider's code for a refusal.
    counted
        False if the provider does not say how many are done.
    bad_lines
        1-based lines of the request file that the provider named, with its reason.
    sources
        What `download` needs (file ids, a results address).
    endpoint
        What the batch asked, where the provider says it: its result lines have that form.
    """

    phase: Phase
    done: int = 0
    failed: int = 0
    why: str = ""
    kind: str | None = None
    counted: bool = True
    bad_lines: Mapping[int, str] = dataclasses.field(default_factory=dict)
    sources: tuple[str, ...] = ()
    endpoint: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    """What looking for a lost batch gave.

    Parameters
    ----------
    batch_id
        The batch that is certainly this job's.
    candidates
        Batches that may be: wait until they can be told apart.
    """

    batch_id: str | None = None
    candidates: tuple[str, ...] = ()


IsOurs: TypeAlias = Callable[[Iterable[str]], bool | None]
"""Whether custom_ids of a batch, any order, are the job's; None if that can't be said."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ListedBatch:
    """A batch in the account's list.

    Parameters
    ----------
    job_id
        Our job, where the provider keeps that with the batch.
    """

    batch_id: str
    status: BatchStatus
    requests: int = 0
    job_id: str | None = None
    model: str | None = None
    endpoint: str | None = None
    input_file_id: str | None = None


class BatchBackend(Protocol):
    """A provider's batch service. Every method but `create` may be called again after a failure."""

    @property
    def provider(self) -> str:
        """For example ``"openai"``."""

    @property
    def base_url(self) -> str | None:
        """Normalised host, None for the provider's own."""

    @property
    def prices(self) -> Prices | None:
        """The user's own prices, None for the bundled list."""

    @property
    def writes_cache(self) -> bool:
        """True if requests ask the provider to write its prompt cache, which may cost more than input."""

    @property
    def mode(self) -> Mode:
        """``"batch"``."""

    @property
    def limits(self) -> Limits:
        """What one batch may hold."""

    @property
    def create_timeout(self) -> float:
        """Seconds after which a create call without a reply counts as lost."""

    @property
    def uploads(self) -> bool:
        """True if the request file is uploaded before the batch is created."""

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column; raises InvalidRequest for what can't be sent."""

    def render(self, requests: Requests) -> Iterator[bytes]:
        """Request lines, in the order of the rows, without line ends."""

    def upload(self, job: Job, path: Path) -> str:
        """Upload the request file; returns its id."""

    def newest_batch(self) -> str | None:
        """Id of the newest batch, where `find` needs a mark."""

    def create(self, job: Job, path: Path) -> str:
        """Create the batch, exactly one call on the wire; returns its id."""

    def find(self, job: Job, known: Collection[str], is_ours: IsOurs) -> Found:
        """Look for the batch of a job whose create reply was lost.

        `known` are batches of other jobs; `is_ours` is for providers that can only be asked what was
        in a batch.
        """

    def status(self, job: Job) -> BatchStatus:
        """One look at the batch."""

    def download(self, job: Job, status: BatchStatus, target: Path) -> None:
        """Write all result lines to `target`."""

    def parse(self, lines: Iterable[bytes], status: BatchStatus) -> pl.DataFrame:
        """Result lines as answers (ANSWER_SCHEMA less what the ingest adds), dirty lines skipped."""

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""

    def cancel(self, job: Job) -> None:
        """Ask the provider to stop; answers that are done are kept and billed."""

    def list_batches(self) -> Iterator[ListedBatch]:
        """All batches of the account that may be ours; for recover."""

    def sent_custom_ids(self, batch: ListedBatch, target: Path) -> Iterator[str] | None:
        """The custom_ids of a batch that still runs, None where the provider does not give them back."""


class LiveBackend(Protocol):
    """Who answers while the process waits: realtime calls, an engine in this process, a cluster."""

    @property
    def provider(self) -> str:
        """As in the key: ``"openai"``, ``"vllm"``."""

    @property
    def base_url(self) -> str | None:
        """Normalised host, None for the provider's own and for engines."""

    @property
    def mode(self) -> Mode:
        """``"realtime"`` or ``"local"``; also how its answers are priced."""

    @property
    def prices(self) -> Prices | None:
        """The user's own prices, None for the bundled list."""

    @property
    def writes_cache(self) -> bool:
        """See `BatchBackend.writes_cache`."""

    @property
    def batch(self) -> BatchBackend | None:
        """What reads batches of the same host: it collects those that hold wanted keys."""

    @property
    def note(self) -> str:
        """What holds a run up now, for the progress bar; empty as a rule."""

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column; raises InvalidRequest for what can't be sent."""

    def run(self, requests: Sequence[Requests]) -> Generator[pl.DataFrame, None, None]:
        """Answer them all, in any order, a block of replies (REPLY_SCHEMA) at a time.

        Each block is made durable before the next one is asked for, so blocks come every second or so,
        while the next requests are at work. Every request gets one reply, which may be a failure;
        `CallFailed` or an error of ours stops the run, and what was yielded stays. A block may have
        ``vector`` and ``cost_usd`` besides, and may be empty: that is the time to show `note`. Closing
        the iterator ends all work in flight. A KeyboardInterrupt, raised in it or thrown into it, ends it
        as well: the block `replies.STOPPED` follows, as often as Polars cannot work yet, and one more of
        what had come until then; it may hold replies that were yielded before.
        """

    def close(self) -> None:
        """Close connections; the next call opens new ones. An engine that others may use stays."""


@runtime_checkable
class Learns(Protocol):
    """A live backend that makes use of how long earlier answers were."""

    def learn(self, answers: pl.LazyFrame) -> None:
        """Look at `ResultStore.scan` before a run."""


def is_batch(backend: BatchBackend | LiveBackend) -> TypeIs[BatchBackend]:
    """Tell the two kinds of backend apart."""
    return backend.mode == "batch"


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What an error means: may it pass by itself, is it the account's, may the call have worked?"""

    transient: bool
    account: bool
    uncertain: bool


# The one table. `uncertain` matters for create: True means that a batch may exist all the same.
_BY_STATUS: Mapping[int, Verdict] = {
    401: Verdict(transient=False, account=True, uncertain=False),
    402: Verdict(transient=False, account=True, uncertain=False),
    403: Verdict(transient=False, account=True, uncertain=False),
    408: Verdict(transient=True, account=False, uncertain=True),
    409: Verdict(transient=True, account=False, uncertain=True),
    425: Verdict(transient=True, account=False, uncertain=False),
    429: Verdict(transient=True, account=False, uncertain=False),
    499: Verdict(transient=True, account=False, uncertain=True),
}
_OTHER_4XX = Verdict(transient=False, account=False, uncertain=False)
_5XX = Verdict(transient=True, account=False, uncertain=True)
_NOT_CONNECTED = Verdict(transient=True, account=False, uncertain=False)
_REPLY_LOST = Verdict(transient=True, account=False, uncertain=True)
_ACCOUNT = Verdict(transient=False, account=True, uncertain=False)

# Codes that speak of the account whatever the status, from OpenAI's and Anthropic's pages on errors.
_ACCOUNT_KINDS = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_error",
        "billing_not_active",
        "account_deactivated",
        "invalid_api_key",
        "authentication_error",
        "permission_error",
        "model_not_found",
        "unsupported_country_region_territory",
        "enforced_spend_limit_reached",
        "contract_spend_limit_reached",
        "linked_organization_spend_limit_reached",
        "organization_on_hold",
    }
)


def verdict(status: int | None, *, kind: str | None = None, connected: bool = True) -> Verdict:
    """What an error means.

    Parameters
    ----------
    status
        HTTP status, None if no reply came.
    kind
        The provider's code or type.
    connected
        False if it is certain that no request left this machine.
    """
    if kind in _ACCOUNT_KINDS:
        return _ACCOUNT
    if status is None:
        return _REPLY_LOST if connected else _NOT_CONNECTED
    if status in _BY_STATUS:
        return _BY_STATUS[status]
    return _5XX if status >= 500 else _OTHER_4XX


class CallFailed(Exception):
    """A call to a provider failed; SDK exceptions never leave their backend.

    Attributes
    ----------
    status, kind, message
        As the provider gave them; None where there was no reply.
    retry_after
        Seconds that the provider asks to wait.
    verdict
        What it means.
    """

    def __init__(
        self,
        message: str = "",
        *,
        provider: str = "",
        status: int | None = None,
        kind: str | None = None,
        connected: bool = True,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.provider = provider
        self.status = status
        self.kind = kind
        self.retry_after = retry_after
        self.verdict = verdict(status, kind=kind, connected=connected)

    def public(self, doing: str, *, hint: str | None = None) -> ProviderError:
        """The error for the user; `hint` where the usual one, of batches, does not fit."""
        cls = AccountError if self.verdict.account else ProviderError
        said = f" ({self.kind})" if self.kind else ""
        number = f" with status {self.status}" if self.status else ""
        fact = f"{self.provider}: {doing} failed{number}{said}: {self}"
        return cls(
            fact, provider=self.provider, status=self.status, kind=self.kind, hint=hint or self._hint()
        )

    def _hint(self) -> str:
        if self.verdict.account:
            return (
                "check the API key, the project, the billing and the model's name, then run the same"
                " line again. Nothing was remembered against your rows. This call made no batch that runs;"
                " what was sent before is still there."
            )
        if self.verdict.transient:
            return "run the same line again later; what was sent before is still there."
        return "the provider refused the call; what was sent before is still there."


_LONGEST_RETRY_AFTER = 60.0


def _wait(state: tenacity.RetryCallState) -> float:
    import tenacity

    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, CallFailed) else None
    if asked is not None and 0 <= asked <= _LONGEST_RETRY_AFTER:
        return asked
    return tenacity.wait_random_exponential(multiplier=0.5, max=8.0)(state)


def retrying(call: Callable[[], T]) -> T:
    """Call a provider; transient failures again, with jitter, obeying Retry-After up to a minute.

    Never for create: a second create is a second batch.
    """
    import tenacity  # here and not above: `import polars_llm` stays quick

    policy = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, CallFailed) and e.verdict.transient),
        stop=tenacity.stop_after_attempt(5),
        wait=_wait,
        reraise=True,
    )
    return policy(call)
