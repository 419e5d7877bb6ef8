"""A job: one batch, or one run of a live backend, from the plan to the answers; and its transitions.

The record is a frozen value; the ledger keeps it (`polars_llm.store.ledger`), the heart moves it
(`polars_llm.jobs`). Each arrow is one durable write::

    planned ─► uploaded ─► creating ─► submitted ─► ended ─► ingested
    creating ─► unknown ─► submitted               the reply was lost; the batch was found at the provider
    creating, submitted ─► deferred ─► creating    the provider's queue is full: the same file, later
    submitted ─► failed                            the provider refused the whole batch
    planned, uploaded, creating, unknown, deferred ─► released    nothing was created; the keys are free again
    planned ─► running ─► ingested     no batch: answered while the process waits (realtime, an engine)
    running ─► released                it stopped; what was answered is kept, the other keys are free
    creating, unknown, deferred, submitted, running, ended ─► abandoned    the user's way out

Providers without an upload step go from planned to creating.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from enum import StrEnum
from typing import Any, Literal, Self, TypeAlias

__all__ = ["Job", "Mode", "State"]

Mode: TypeAlias = Literal["batch", "realtime", "local"]


class State(StrEnum):
    """Where a job stands. The value is what the ledger and `pllm.jobs()` show."""

    PLANNED = "planned"
    UPLOADED = "uploaded"
    CREATING = "creating"
    UNKNOWN = "unknown"
    DEFERRED = "deferred"
    SUBMITTED = "submitted"
    RUNNING = "running"
    ENDED = "ended"
    INGESTED = "ingested"
    FAILED = "failed"
    RELEASED = "released"
    ABANDONED = "abandoned"

    @property
    def is_open(self) -> bool:
        """True while the job holds its keys: nobody else may send them."""
        return bool(_TRANSITIONS[self])


_TRANSITIONS: dict[State, frozenset[State]] = {
    State.PLANNED: frozenset({State.UPLOADED, State.CREATING, State.RUNNING, State.RELEASED}),
    State.UPLOADED: frozenset({State.CREATING, State.RELEASED}),
    State.CREATING: frozenset(
        {State.SUBMITTED, State.UNKNOWN, State.DEFERRED, State.RELEASED, State.ABANDONED}
    ),
    State.UNKNOWN: frozenset({State.SUBMITTED, State.RELEASED, State.ABANDONED}),
    State.DEFERRED: frozenset({State.CREATING, State.RELEASED, State.ABANDONED}),
    State.SUBMITTED: frozenset({State.ENDED, State.DEFERRED, State.FAILED, State.ABANDONED}),
    State.RUNNING: frozenset({State.INGESTED, State.RELEASED, State.ABANDONED}),
    State.ENDED: frozenset({State.INGESTED, State.ABANDONED}),
    State.INGESTED: frozenset(),
    State.FAILED: frozenset(),
    State.RELEASED: frozenset(),
    State.ABANDONED: frozenset(),
}


# A provider's error can be a whole page; a record is small.
_LONGEST_REASON = 2_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One batch at one provider, or one run of a live backend. Times are Unix seconds of this machine.

    Parameters
    ----------
    id
        Our name for it; on OpenAI it is in the batch's metadata.
    provider, base_url, endpoint, model
        Where it goes. `base_url` is None for the provider's own, and never holds a secret.
    mode
        How it is answered: ``"batch"``, ``"realtime"`` or ``"local"``.
    requests, size_bytes
        Number of requests, and bytes of the request file.
    owner
        Name of the lock that its submitter holds; the lock dies with the process.
    headers
        Headers of its requests that change answers (API version, betas).
    marker
        The provider's newest batch before create, where that is needed to find an orphan (Anthropic).
    create_called
        When create was last called, as a `polars_llm.clock` stamp.
    quiet_since
        A moment after which that call was certainly not at work here any more, as a stamp: only from
        then on does an empty list say anything.
    attempts
        How often the batch was put off because the provider's queue was full.
    not_before
        When to try again, Unix seconds.
    reason
        Why it is where it is, in the provider's words or ours.
    output_tokens_max
        The longest answer to any of its requests, None if nothing limits it.
    cost_max_usd
        Upper bound reserved against a budget, None if not known.
    """

    id: str
    state: State
    provider: str
    base_url: str | None
    endpoint: str
    model: str
    requests: int
    mode: Mode = "batch"
    size_bytes: int = 0
    owner: str | None = None
    input_file_id: str | None = None
    batch_id: str | None = None
    marker: str | None = None
    headers: dict[str, str] | None = None
    done: int = 0
    failed: int = 0
    attempts: int = 0
    created_at: float = 0.0
    create_called: str | None = None
    quiet_since: str | None = None
    updated_at: float = 0.0
    not_before: float | None = None
    reason: str | None = None
    output_tokens_max: int | None = None
    cost_max_usd: float | None = None

    @classmethod
    def plan(cls, **facts: Any) -> Self:
        """A new job in state planned, with an id of its own."""
        now = time.time()
        return cls(
            id=f"job_{secrets.token_hex(8)}",
            state=State.PLANNED,
            created_at=now,
            updated_at=now,
            **facts,
        )

    def to(self, state: State, **facts: Any) -> Self:
        """The same job in another state.

        Raises
        ------
        ValueError
            If the table of transitions has no such arrow: a bug here, never a user's mistake.
        """
        stays = state is self.state and state.is_open  # new facts, same place
        if state not in _TRANSITIONS[self.state] and not stays:
            raise ValueError(f"{self.id}: no transition {self.state} -> {state}")
        if facts.get("reason"):
            facts["reason"] = facts["reason"][:_LONGEST_REASON]
        return dataclasses.replace(self, state=state, updated_at=time.time(), **facts)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able facts; unset ones are left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Self:
        """Inverse of `to_dict`; facts that a newer version wrote are ignored."""
        known = {f.name for f in dataclasses.fields(cls)}
        read = {k: v for k, v in facts.items() if k in known}
        return cls(**{**read, "base_url": read.get("base_url"), "state": State(read["state"])})
