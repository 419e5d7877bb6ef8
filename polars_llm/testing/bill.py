"""The bill: what the emulated provider charged, and the value in which a test reads it."""

from __future__ import annotations

import threading
from collections import Counter

import msgspec

INPUT_USD = 1e-6
"""Price of one input token in realtime, whatever the model."""
OUTPUT_USD = 4e-6
"""Price of one output token in realtime, whatever the model."""
BATCH_SHARE = 0.5
"""What a token costs in a batch, as a share of its realtime price."""


class Bill(msgspec.Struct, frozen=True, kw_only=True, repr_omit_defaults=True):
    """What the emulated provider charged so far.

    A request is billed when it is answered with success: a realtime request at its reply, a
    request of a batch when the batch ends. Errored, expired and cancelled requests are free.

    Attributes
    ----------
    billed
        Billed requests in all, realtime and batch.
    accepted
        Requests that came in with the batches that were created, answered or not.
    free
        Requests of ended batches that were not billed (errored, expired, cancelled).
    realtime
        Billed realtime requests.
    batches
        Batches created.
    files
        Files uploaded.
    input_tokens, output_tokens
        Billed tokens.
    cost_usd
        1 USD per million input tokens, 4 USD per million output tokens, half of that in a batch.
    by_custom_id
        How often each ``custom_id`` was billed (batches only).
    by_digest
        How often each request body was billed, realtime and batch alike. The digest is that of
        the body with sorted keys.
    """

    billed: int = 0
    accepted: int = 0
    free: int = 0
    realtime: int = 0
    batches: int = 0
    files: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    by_custom_id: dict[str, int] = {}
    by_digest: dict[str, int] = {}

    @property
    def duplicates(self) -> dict[str, int]:
        """The custom ids that were billed more than once, and how often."""
        return {name: times for name, times in self.by_custom_id.items() if times > 1}

    @property
    def duplicate_bodies(self) -> dict[str, int]:
        """The digests of bodies that were billed more than once, realtime and batch together."""
        return {name: times for name, times in self.by_digest.items() if times > 1}

    def __str__(self) -> str:
        return (
            f"{self.billed:,} requests billed ({self.realtime:,} realtime) in {self.batches:,} "
            f"batches, {self.input_tokens:,} tokens in, {self.output_tokens:,} out, "
            f"{self.cost_usd:.6f} USD; {self.free:,} not billed, "
            f"{len(self.duplicates):,} custom ids billed more than once"
        )

    def __repr__(self) -> str:
        # A bill of a million custom ids must not flood a test's failure message.
        return f"<Bill: {self}>"


class Charge(msgspec.Struct):
    """One billed request."""

    digest: str
    input_tokens: int
    output_tokens: int
    custom_id: str | None = None


class Account:
    """Where the server adds up. One lock, so that a bill is never half of a batch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._custom_ids: Counter[str] = Counter()
        self._digests: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def note(self, **counts: int) -> None:
        with self._lock:
            self._counts.update(counts)

    def charge(self, charges: list[Charge], *, free: int = 0) -> None:
        """Bill these requests, all at once."""
        with self._lock:
            self._counts["free"] += free
            for charge in charges:
                self._digests[charge.digest] += 1
                batch = charge.custom_id is not None
                if charge.custom_id is not None:
                    self._custom_ids[charge.custom_id] += 1
                self._counts["billed"] += 1
                self._counts["realtime"] += not batch
                self._counts["batch_input" if batch else "input"] += charge.input_tokens
                self._counts["batch_output" if batch else "output"] += charge.output_tokens

    def bill(self) -> Bill:
        with self._lock:
            n = self._counts
            cost = (n["input"] + n["batch_input"] * BATCH_SHARE) * INPUT_USD
            cost += (n["output"] + n["batch_output"] * BATCH_SHARE) * OUTPUT_USD
            return Bill(
                billed=n["billed"],
                accepted=n["accepted"],
                free=n["free"],
                realtime=n["realtime"],
                batches=n["batches"],
                files=n["files"],
                input_tokens=n["input"] + n["batch_input"],
                output_tokens=n["output"] + n["batch_output"],
                cost_usd=round(cost, 9),
                by_custom_id=dict(self._custom_ids),
                by_digest=dict(self._digests),
            )
