"""Rate limits in realtime: a bucket of requests and one of tokens, and the headers that tell."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

from .dialogue import Failure, Refused

_SHOWN_REQUESTS = 10_000
_SHOWN_TOKENS = 10_000_000


class _Bucket:
    """Holds one minute's worth, refilled evenly."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left = float(size)
        self._at = time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.left = min(self.size, self.left + (now - self._at) * self.size / 60)
        self._at = now

    def wait(self, amount: int) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (min(amount, self.size) - self.left) * 60 / self.size)

    @property
    def reset(self) -> float:
        return (self.size - self.left) * 60 / self.size


class RateLimits:
    """Both protocols draw from buckets of their own."""

    def __init__(self, rpm: int | None, tpm: int | None) -> None:
        self._enforced = {"requests": rpm is not None, "tokens": tpm is not None}
        self._sizes = {"requests": rpm or _SHOWN_REQUESTS, "tokens": tpm or _SHOWN_TOKENS}
        self._buckets: dict[str, dict[str, _Bucket]] = {}
        self._lock = threading.Lock()

    def draw(self, protocol: str, model: str, tokens: int) -> dict[str, str]:
        """Take one request from the buckets: the headers that say what is left, or 429."""
        amounts = {"requests": 1, "tokens": tokens}
        with self._lock:
            buckets = self._buckets.setdefault(
                protocol, {name: _Bucket(size) for name, size in self._sizes.items()}
            )
            for name, bucket in buckets.items():
                bucket.refill()
                wait = bucket.wait(amounts[name])
                if wait > 0 and self._enforced[name]:
                    headers = _headers(protocol, buckets)
                    raise _limited(protocol, model, name, bucket.size, wait, headers)
            for name, bucket in buckets.items():
                bucket.left = max(0.0, bucket.left - amounts[name])
            return _headers(protocol, buckets)


def _limited(
    protocol: str, model: str, name: str, size: int, wait: float, headers: dict[str, str]
) -> Refused:
    short = {"requests": "RPM", "tokens": "TPM"}[name]
    message = (
        f"Rate limit reached for {model} in organization org-emulated on {name} per min "
        f"({short}): Limit {size}. Please try again in {wait:.3f}s."
    )
    headers = {**headers, "retry-after": f"{max(1, round(wait + 0.5))}"}
    if protocol == "openai":
        headers["retry-after-ms"] = f"{max(1, int(wait * 1000))}"
    type_ = name if protocol == "openai" else None
    return Refused(Failure(status=429, message=message, type=type_), headers)


def _headers(protocol: str, buckets: dict[str, _Bucket]) -> dict[str, str]:
    headers: dict[str, str] = {}
    if protocol == "openai":
        for name, bucket in buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.size)
            headers[f"x-ratelimit-remaining-{name}"] = str(int(bucket.left))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.reset:.3f}s"
        return headers
    for name, bucket in buckets.items():
        names = ("tokens", "input-tokens", "output-tokens") if name == "tokens" else (name,)
        reset = datetime.now(UTC) + timedelta(seconds=bucket.reset)
        for shown in names:
            headers[f"anthropic-ratelimit-{shown}-limit"] = str(bucket.size)
            headers[f"anthropic-ratelimit-{shown}-remaining"] = str(int(bucket.left))
            headers[f"anthropic-ratelimit-{shown}-reset"] = reset.strftime("%Y-%m-%dT%H:%M:%SZ")
    return headers
