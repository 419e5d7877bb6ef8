"""The gate of one run in realtime: lets requests out, learns from their replies, ends the run if it must."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from typing import Protocol

from polars_llm.answer import ACCOUNT, DONE, RETRY
from polars_llm.backends.base import CallFailed
from polars_llm.backends.clients import HttpReply, retry_after
from polars_llm.backends.pace import Breaker, Pace, allowances
from polars_llm.backends.replies import Reply

__all__ = ["NOT_TAKEN", "Gate", "Patience", "Sent"]

_logger = logging.getLogger("polars_llm")

NOT_TAKEN = frozenset({425, 429, 503, 529})
"""Statuses with which a host says that it did nothing."""

_REFUSALS_IN_A_ROW = 3


class Patience(Protocol):
    """What a gate is told; see `polars_llm.backends.realtime.Realtime`."""

    @property
    def provider(self) -> str:
        """For errors."""

    @property
    def first_backoff(self) -> float:
        """Seconds of the first pause after a failure."""

    @property
    def patience(self) -> float:
        """Seconds without one request that the host took, after which the run ends."""

    @property
    def patience_unreachable(self) -> float:
        """The same while no connection was ever made."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sent:
    """A request in flight."""

    amounts: dict[str, float]
    at: float
    trying: bool


class Gate:
    """Lets requests out one by one, as fast as limits, pauses and the breaker allow. One loop's own.

    Attributes
    ----------
    note
        What it waits for; empty while requests go out.
    problem
        What ended the run.
    """

    def __init__(self, settings: Patience, width: int, breaker: Breaker) -> None:
        self._settings = settings
        self._pace = Pace(width, first_backoff=settings.first_backoff)
        self._breaker = breaker
        self._turn = asyncio.Lock()
        self._started = time.monotonic()
        self._taken: float | None = None
        self._refused = 0
        self._last: CallFailed | None = None
        self.note = ""
        self.problem: Exception | None = None
        breaker.begin()

    def halt(self, problem: Exception) -> None:
        """Let no more requests out."""
        self.problem = self.problem or problem

    async def enter(self, size_bytes: int) -> Sent | None:
        """Wait until a request may go; None: no more do."""
        async with self._turn:  # first come, first served
            while self.problem is None:
                now = time.monotonic()
                amounts = self._pace.amounts(size_bytes)
                stopped, full = self._breaker.wait(now), self._pace.wait(amounts, now)
                if stopped <= 0 and full <= 0:
                    self.note = "trying whether it goes again" if self._breaker.is_open else ""
                    self._pace.sent(amounts)
                    return Sent(amounts, now, self._breaker.sent())
                self._say(stopped, full)
                self._check_patience(now)
                await asyncio.sleep(min(max(stopped, full), 0.5))
        return None

    def _say(self, stopped: float, full: float) -> None:
        if stopped > 0.5:
            failures, seen = self._breaker.failed
            self.note = f"{failures} of the last {seen} requests failed; trying again in {stopped:.0f} s"
        elif full > 0.5:
            self.note = f"the host takes no more for {full:.0f} s"

    def _check_patience(self, now: float) -> None:
        if self._pace.flying or self._last is None:
            return
        never = self._taken is None
        unreachable = never and self._last.status is None
        patience = self._settings.patience_unreachable if unreachable else self._settings.patience
        if now - (self._started if never or self._taken is None else self._taken) > patience:
            self.halt(self._last)

    def left(self, sent: Sent) -> None:
        """It was cut off."""
        self._pace.landed(sent.amounts, {}, time.monotonic())
        self._breaker.undecided(sent.trying)

    def failed(self, sent: Sent, error: CallFailed) -> None:
        """No reply came."""
        now = time.monotonic()
        self._pace.landed(sent.amounts, {}, now)
        self._last = error
        if not error.verdict.uncertain:
            self._pace.brake(sent.at, None, now)
        self._bad(sent, now, str(error))

    def answered(self, sent: Sent, http: HttpReply, reply: Reply) -> None:
        """A reply came, of whatever kind."""
        now = time.monotonic()
        self._pace.landed(sent.amounts, allowances(http.headers), now)
        if reply["state"] not in (ACCOUNT, RETRY):
            self._good(sent, reply, now)
            return
        self._last = problem = self._problem(http, reply)
        if reply["state"] == ACCOUNT:
            self._refused += 1
            if self._refused >= _REFUSALS_IN_A_ROW:
                self.halt(problem)
        elif http.status in NOT_TAKEN:
            self._brake(sent, problem, now)
        if reply["state"] == ACCOUNT or http.status == 429:
            self._breaker.undecided(sent.trying)
        else:
            unread = 200 <= http.status < 300 and reply.get("error")
            self._bad(sent, now, str(unread or f"status {http.status}"))

    def _brake(self, sent: Sent, problem: CallFailed, now: float) -> None:
        asked = problem.retry_after
        if asked is not None and asked > self._settings.patience:
            self.halt(problem)
        else:
            self._pace.brake(sent.at, asked, now)

    def _good(self, sent: Sent, reply: Reply, now: float) -> None:
        if sent.trying:
            _logger.warning("requests are answered again; going on")
        self._taken, self._refused, self._last = now, 0, None
        self._breaker.good(sent.trying)
        self._pace.taken(reply.get("output_tokens") if reply["state"] == DONE else None)

    def _bad(self, sent: Sent, now: float, why: str) -> None:
        if self._breaker.bad(sent.trying, now):
            failures, seen = self._breaker.failed
            _logger.warning("stopped sending: %d of the last %d requests failed (%s)", failures, seen, why)

    def _problem(self, http: HttpReply, reply: Reply) -> CallFailed:
        problem = CallFailed(
            reply.get("error_message") or "no message",
            provider=self._settings.provider,
            status=http.status,
            kind=reply.get("error"),
            retry_after=retry_after(http.headers),
        )
        if reply["state"] == ACCOUNT:
            problem.verdict = dataclasses.replace(problem.verdict, account=True)
        return problem
