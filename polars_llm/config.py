"""Settings: what `pllm.Config` and the environment say, resolved when a verb is called."""

from __future__ import annotations

import dataclasses
import os
import threading
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeAlias, get_args

from polars_llm.address import store_url
from polars_llm.errors import InvalidRequest

if TYPE_CHECKING:
    from polars_llm.models import Model

__all__ = ["CacheLocation", "Config", "OnError", "OnPending", "Settings", "settings", "usd"]

OnPending: TypeAlias = Literal["raise", "wait", "null"]
OnError: TypeAlias = Literal["null", "raise"]

_DEFAULT_POLL_INTERVAL = 30.0

# How long a provider's list of batches may lag behind a create, in seconds. Only an empty list that
# is older than this (and than the create call's own timeout) proves that a lost create never was.
_QUIET_PERIOD = 120.0


class CacheLocation(NamedTuple):
    """Where the cache is: a directory or an address of an object store; and a local directory beside it.

    None is the default of either.
    """

    results: Path | str | None = None
    ledger: Path | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for one call: explicit `Config`, else the environment, else the default."""

    model: str | Model | None
    cache: CacheLocation
    poll_interval: float
    on_pending: OnPending
    on_error: OnError
    quiet_period: float
    max_cost: float | None
    max_cost_since: datetime | None


_lock = threading.RLock()  # re-entrant: a signal's handler may come in between
_chosen: dict[str, Any] = {}


class Config:
    """Set defaults for all verbs; as a call it stays, as a context manager it is undone at exit.

    Parameters
    ----------
    model
        ``"openai/NAME"`` and so on, or a model object. Environment: ``POLARS_LLM_MODEL``.
    cache_dir
        Directory for jobs and results. Environment: ``POLARS_LLM_CACHE_DIR``; default: the
        platform's cache directory. Or an object store for the results (``"s3://BUCKET/PREFIX"``,
        ``gs://``, ``az://``), which several hosts may share: docs/scale.md says what then holds.
    ledger_dir
        Local directory for all but the results, which makes `cache_dir` a place that several hosts may
        share, such as a mounted directory. Environment: ``POLARS_LLM_LEDGER_DIR``; default, where
        `cache_dir` is an object store: one under the platform's cache directory.
    poll_interval
        Longest time between two looks at a pending job while waiting, in seconds. Environment:
        ``POLARS_LLM_POLL_INTERVAL``; default 30.
    on_pending
        ``"raise"`` (default), ``"wait"`` or ``"null"``; see `generate`.
    on_error
        ``"null"`` (default) or ``"raise"``; see `generate`.
    max_cost
        The most that may be in flight and spent under this cache directory, in USD. What would pass it
        is not sent: `BudgetExceeded`. What is in flight counts at the most that it can cost, what was
        answered at what it did cost.
    max_cost_since
        A date or datetime (without a time zone: local time): what was answered before is not counted.
        Set it to begin a new budget.

    Raises
    ------
    InvalidRequest
        At call: a value that no verb would take; a URL that may hold a secret.

    Examples
    --------
    >>> import polars_llm as pllm
    >>> with pllm.Config(model="openai/gpt-6-luna", on_pending="wait"):
    ...     pass

    Notes
    -----
    Settings are read when a verb is called, not when Polars runs the plan, and are the same for all
    threads of the process. None means: as if it had not been set.
    """

    def __init__(
        self,
        *,
        model: str | Model | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        ledger_dir: str | os.PathLike[str] | None = None,
        poll_interval: float | None = None,
        on_pending: OnPending | None = None,
        on_error: OnError | None = None,
        max_cost: float | None = None,
        max_cost_since: date | datetime | None = None,
    ) -> None:
        given = {
            "model": model,
            "cache_dir": None if cache_dir is None else _place(cache_dir),
            "ledger_dir": None if ledger_dir is None else _local(ledger_dir),
            "poll_interval": None if poll_interval is None else _seconds(poll_interval, "poll_interval"),
            "on_pending": _one_of(on_pending, get_args(OnPending), "on_pending"),
            "on_error": _one_of(on_error, get_args(OnError), "on_error"),
            "max_cost": usd(max_cost),
            "max_cost_since": _moment(max_cost_since),
        }
        with _lock:
            self._before = dict(_chosen)
            _chosen.update({name: value for name, value in given.items() if value is not None})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            _chosen.clear()
            _chosen.update(self._before)

    @staticmethod
    def restore_defaults() -> None:
        """Forget everything that `Config` was told in this process."""
        with _lock:
            _chosen.clear()


def settings(*, on_pending: OnPending | None = None, on_error: OnError | None = None) -> Settings:
    """The settings that hold now; arguments of a verb win."""
    with _lock:
        chosen = dict(_chosen)
    cache_dir = chosen.get("cache_dir") or os.environ.get("POLARS_LLM_CACHE_DIR") or None
    ledger_dir = chosen.get("ledger_dir") or os.environ.get("POLARS_LLM_LEDGER_DIR") or None
    interval = chosen.get("poll_interval")
    if interval is None:
        text = os.environ.get("POLARS_LLM_POLL_INTERVAL")
        interval = _seconds(text, "POLARS_LLM_POLL_INTERVAL") if text else _DEFAULT_POLL_INTERVAL
    quiet = os.environ.get("POLARS_LLM_QUIET_PERIOD")
    return Settings(
        model=chosen.get("model") or os.environ.get("POLARS_LLM_MODEL") or None,
        cache=CacheLocation(
            _place(cache_dir) if cache_dir else None, _local(ledger_dir) if ledger_dir else None
        ),
        poll_interval=interval,
        on_pending=_one_of(on_pending, get_args(OnPending), "on_pending")
        or chosen.get("on_pending", "raise"),
        on_error=_one_of(on_error, get_args(OnError), "on_error") or chosen.get("on_error", "null"),
        quiet_period=_seconds(quiet, "POLARS_LLM_QUIET_PERIOD") if quiet else _QUIET_PERIOD,
        max_cost=chosen.get("max_cost"),
        max_cost_since=chosen.get("max_cost_since"),
    )


def _place(value: str | os.PathLike[str]) -> Path | str:
    return store_url(os.fspath(value)) or Path(value).expanduser()


def _local(value: str | os.PathLike[str]) -> Path:
    if store_url(os.fspath(value)) is not None:
        raise InvalidRequest(
            "ledger_dir is a URL; the ledger needs locks and transactions, so it lies on a local disk",
            hint="give a directory of this host. Nothing was sent.",
        )
    return Path(value).expanduser()


def usd(value: float | None) -> float | None:
    """An amount of money, checked.

    Raises
    ------
    InvalidRequest
        At call: not a number of 0 or more.
    """
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < float("inf"):
        raise InvalidRequest(
            f"max_cost is {value!r}, not an amount in USD of 0 or more",
            hint="for example max_cost=5.00. Nothing was sent.",
        )
    return float(value)


def _moment(value: date | datetime | None) -> datetime | None:
    if value is None:
        return None
    if not isinstance(value, date):
        raise InvalidRequest(
            f"max_cost_since is a {type(value).__name__}, neither a date nor a datetime",
            hint="for example max_cost_since=datetime.date(2026, 12, 1). Nothing was sent.",
        )
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    return moment.astimezone(UTC)


def _seconds(value: float | str, name: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InvalidRequest(
            f"{name} is {value!r}, not a number of seconds above 0",
            hint=f"for example {name}=30. Nothing was sent.",
        )
    return seconds


def _one_of(value: Any, known: tuple[str, ...], name: str) -> Any:
    if value is not None and value not in known:
        raise InvalidRequest(
            f"{name} is {value!r}",
            hint=f"{name} takes {', '.join(repr(k) for k in known)}. Nothing was sent.",
        )
    return value
