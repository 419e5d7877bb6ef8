"""How fast requests may go to a host: its own limits, pauses that it asks for, and a breaker. Pure.

Times are seconds of one monotonic clock that the caller reads; nothing here sleeps or sends.

Why not a library: those for limits (aiolimiter, pyrate-limiter) hold a limit that the program knows and
count by themselves; here the host tells limit and level with every reply, and they change. Those for
breakers (purgatory, aiobreaker) open after so many failures in a row and raise; here one request in two
may fail for a reason of its own, and what is stopped shall wait, not fail.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections import deque
from collections.abc import Iterator, Mapping

__all__ = ["Allowance", "Breaker", "Pace", "allowances", "backoff"]


def backoff(number: int, *, first: float = 1.0, longest: float = 60.0) -> float:
    """Seconds before the next try, the `number`-th time (from 0): doubling, with jitter."""
    return float(random.uniform(0.5, 1.0) * min(longest, first * 2.0 ** min(number, 20)))


# --- what a host says of its limits --------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Allowance:
    """One limit as a reply tells it: how much, what is left of it, and how fast it comes back."""

    limit: float
    remaining: float
    per_second: float


_RESOURCES = ("requests", "tokens", "input-tokens", "output-tokens")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_UNITS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def allowances(headers: Mapping[str, str]) -> dict[str, Allowance]:
    """The limits that a reply's headers tell, by resource; OpenAI's and Anthropic's names.

    OpenAI's (and Groq's) reset is how long the whole of it takes to come back, which also tells a limit
    a day from one a minute. Anthropic's is a date in whole seconds, and its limits are a minute's.
    """
    found = {}
    for name in _RESOURCES:
        for limit, remaining, reset in (
            (f"x-ratelimit-limit-{name}", f"x-ratelimit-remaining-{name}", f"x-ratelimit-reset-{name}"),
            (f"anthropic-ratelimit-{name}-limit", f"anthropic-ratelimit-{name}-remaining", ""),
        ):
            try:
                whole, left = float(headers[limit]), float(headers[remaining])
            except (KeyError, ValueError):
                continue
            if whole > 0 and left >= 0:
                rate = _rate(whole, left, headers.get(reset, ""))
                found[name] = Allowance(whole, min(left, whole), rate)
    return found


def _rate(limit: float, remaining: float, reset: str) -> float:
    parts = _DURATION.findall(reset) if _DURATION.match(reset) else []
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    return (limit - remaining) / seconds if seconds > 0 and limit > remaining else limit / 60.0


class _Bucket:
    """One limit: what may be sent now, and what comes back with time."""

    def __init__(self, told: Allowance, flying: float, now: float) -> None:
        self.limit = self.level = self.per_second = self._at = 0.0
        self.tell(told, flying, now)

    def tell(self, told: Allowance, flying: float, now: float) -> None:
        """Take the host's word; what is in flight may not be counted in it yet."""
        self.limit, self.per_second = told.limit, told.per_second
        self.level, self._at = told.remaining - flying, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until `amount` is there; more than the limit is sent when the bucket is full."""
        self.level = min(self.limit, self.level + (now - self._at) * self.per_second)
        self._at = now
        return max(0.0, (min(amount, self.limit) - self.level) / self.per_second)


_BYTES_PER_TOKEN = 4


class Pace:
    """When the next request may go: limits, pauses that the host asked for, and how many at once.

    Parameters
    ----------
    width
        Most requests at once. It is halved when the host says that there are too many, and grows back
        with its answers.
    """

    def __init__(self, width: int, *, first_backoff: float = 1.0) -> None:
        self._widest = self._width = float(width)
        self._first_backoff = first_backoff
        self._buckets: dict[str, _Bucket] = {}
        self._flying: dict[str, float] = dict.fromkeys(_RESOURCES, 0.0)
        self._output_tokens = 0.0
        self._resume = self._braked = float("-inf")
        self._brakes = 0

    @property
    def flying(self) -> int:
        """Requests in flight."""
        return round(self._flying["requests"])

    def amounts(self, size_bytes: int) -> dict[str, float]:
        """What a request will take of each resource, as far as can be told before its answer."""
        read = size_bytes / _BYTES_PER_TOKEN
        written = self._output_tokens
        return dict(zip(_RESOURCES, (1.0, read + written, read, written), strict=True))

    def wait(self, amounts: Mapping[str, float], now: float) -> float:
        """Seconds until a request may go; 0: now."""
        if self.flying >= max(1.0, self._width):
            return 0.02  # until one of them is answered: nobody knows when
        return max([self._resume - now, *self._waits(amounts, now), 0.0])

    def _waits(self, amounts: Mapping[str, float], now: float) -> Iterator[float]:
        for name, bucket in self._buckets.items():
            yield bucket.wait(amounts[name], now)

    def sent(self, amounts: Mapping[str, float]) -> None:
        """A request goes now."""
        for name, amount in amounts.items():
            self._flying[name] += amount
        for name, bucket in self._buckets.items():
            bucket.level -= amounts[name]

    def landed(self, amounts: Mapping[str, float], told: Mapping[str, Allowance], now: float) -> None:
        """It is no longer in flight; `told` are the limits in its reply."""
        for name, amount in amounts.items():
            self._flying[name] = max(0.0, self._flying[name] - amount)
        for name, allowance in told.items():
            if name in self._buckets:
                self._buckets[name].tell(allowance, self._flying[name], now)
            else:
                self._buckets[name] = _Bucket(allowance, self._flying[name], now)

    def taken(self, output_tokens: int | None) -> None:
        """The host took a request, whatever it thought of it."""
        self._brakes = 0
        self._width = min(self._widest, self._width + 1 / self._width)
        if output_tokens is not None:
            self._output_tokens += 0.1 * (output_tokens - self._output_tokens)

    def brake(self, sent: float, asked: float | None, now: float) -> None:
        """The host said that it is too much, of a request that went at `sent`.

        What was in flight together is one such word, however many requests heard it.
        """
        if sent > self._braked:
            self._brakes += 1
            self._braked = now
            self._width = max(1.0, self._width / 2)
        pause = max(0.0, asked or 0.0) or backoff(self._brakes - 1, first=self._first_backoff)
        self._resume = max(self._resume, now + pause)


# --- the breaker ---------------------------------------------------------------------------------

_LOOKS_AT = 20
_NEEDS = 5


class Breaker:
    """Stops everything while most requests fail, and tries one now and then until it goes again.

    It opens when more than half of the last twenty requests failed for a reason of the host (five of
    them at least), and closes with the first one that does not.
    """

    def __init__(self, *, first_backoff: float = 1.0) -> None:
        self._outcomes: deque[bool] = deque(maxlen=_LOOKS_AT)
        self._first_backoff = first_backoff
        self._until: float | None = None
        self._trying = False
        self._openings = 0

    @property
    def is_open(self) -> bool:
        """True while nothing is sent but a try now and then."""
        return self._until is not None

    @property
    def failed(self) -> tuple[int, int]:
        """(failures, requests) of those that it looks at."""
        return self._outcomes.count(False), len(self._outcomes)

    def begin(self) -> None:
        """A run begins: no try of an earlier one is under way."""
        self._trying = False

    def wait(self, now: float) -> float:
        """Seconds until a request may go; 0: now."""
        if self._until is None:
            return 0.0
        return 0.02 if self._trying else max(0.0, self._until - now)

    def sent(self) -> bool:
        """A request goes now; True if it is the one that tries whether it goes again."""
        self._trying = self.is_open
        return self._trying

    def good(self, trying: bool) -> None:
        """The host dealt with a request."""
        self._outcomes.append(True)
        if trying:
            self._outcomes.clear()
            self._until, self._trying, self._openings = None, False, 0

    def bad(self, trying: bool, now: float) -> bool:
        """A request failed for a reason of the host; True if sending stops now."""
        self._outcomes.append(False)
        failures, seen = self.failed
        opens = self._until is None and failures >= _NEEDS and failures > seen / 2
        if opens or trying:
            self._openings += 1
            self._until = now + backoff(self._openings - 1, first=self._first_backoff)
            self._trying = False
        return opens

    def undecided(self, trying: bool) -> None:
        """A request says nothing of the host's health."""
        self._trying = self._trying and not trying
