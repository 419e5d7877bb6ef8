"""A batch and its life, the same for both protocols.

    validating -> in_progress -> finalizing -> completed
        |              |`-> expired
        |              `-> cancelled (by the provider)
        `-> failed          cancelling -> cancelled (by the client)

Nothing happens in the background: a batch is brought up to date when somebody looks at it. That
makes a test repeatable, and a batch that nobody looks at is brought up to date by the bill.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec

from .bill import Charge
from .wire import Slice

if TYPE_CHECKING:
    from .world import World

Stage = Literal[
    "validating",
    "in_progress",
    "finalizing",
    "cancelling",
    "completed",
    "failed",
    "expired",
    "cancelled",
]
ENDED = ("completed", "failed", "expired", "cancelled")
CHUNK = 2_048


class Plan(msgspec.Struct):
    """How the batch will go, where that was decided beforehand."""

    end: Literal["completed", "expired", "cancelled", "failed"] = "completed"
    fraction: float = 1.0
    code: str = ""
    message: str = ""


class Row(msgspec.Struct):
    """One request of a batch: its id, its body, and whether its turn comes at all."""

    custom_id: str
    body: dict[str, Any]
    unanswered: Literal["", "expired", "cancelled"] = ""


class Outcome(msgspec.Struct):
    """One row's result line, the file it goes to, and what it costs (None: nothing)."""

    custom_id: str
    line: bytes
    kind: Literal["succeeded", "errored", "expired", "cancelled"]
    charge: Charge | None = None
    cached_tokens: int = 0


class Dialect(Protocol):
    """What differs between the protocols."""

    splits_errors: bool

    def check(self, world: World, batch: Batch) -> list[dict[str, Any]]:
        """Read the input; fill in total, custom_ids and model; give the errors that fail it."""
        ...

    def rows(self, lines: list[bytes]) -> list[Row]: ...

    def publish(self, world: World, batch: Batch) -> None:
        """Make the result files known, before the batch is seen to have ended."""
        ...

    def answer(self, world: World, batch: Batch, rows: list[Row]) -> Iterable[Outcome]: ...


class Batch:
    """One batch: what it was created with, where it stands, what came of it."""

    def __init__(
        self, id: str, protocol: Literal["openai", "anthropic"], dialect: Dialect, source: Slice
    ) -> None:
        self.id = id
        self.protocol = protocol
        self.dialect = dialect
        self.source = source
        self.endpoint = ""
        self.owner = ""
        self.version = ""
        self.extended = False
        self.input_file_id: str | None = None
        self.metadata: dict[str, str] | None = None
        self.model: str | None = None
        self.output_lives = 30 * 86_400
        self.created = time.time()
        self.visible_at = self.created
        self.seconds = 0.0
        self.plan = Plan()
        self.stage: Stage = "validating"
        self.stamps: dict[str, float] = {}
        self.errors: list[dict[str, Any]] = []
        self.custom_ids: list[str] = []
        self.counts = dict.fromkeys(("succeeded", "errored", "expired", "cancelled"), 0)
        self.usage = dict.fromkeys(("input", "output", "cached"), 0)
        self.output: Slice | None = None
        self.error_output: Slice | None = None
        self.output_file_id: str | None = None
        self.error_file_id: str | None = None
        self.lock = threading.RLock()

    @property
    def total(self) -> int:
        return len(self.custom_ids)

    @property
    def ended(self) -> bool:
        return self.stage in ENDED

    def progress(self, now: float) -> float:
        """How far it is, by the clock: 0 to 1."""
        if self.seconds <= 0:
            return 1.0
        return min((now - self.created) / self.seconds, 1.0)

    def done_so_far(self) -> int:
        if self.ended:
            return self.counts["succeeded"]
        if self.stage not in ("in_progress", "finalizing") or self.seconds <= 0:
            return 0
        return int(self.total * min(self.progress(time.time()), 0.99))

    # ---- moving on

    def settle(self, world: World, *, steps: int | None = None) -> None:
        """Bring it to the stage that is due by the clock; at most `steps` stages further."""
        if self.ended:
            return
        with self.lock:
            while not self.ended and self._is_due() and steps != 0:
                self.step(world)
                steps = None if steps is None else steps - 1

    def _is_due(self) -> bool:
        progress = self.progress(time.time())
        due = {"validating": 0.1, "in_progress": 0.9, "finalizing": 1.0, "cancelling": 0.0}
        return progress >= due[self.stage]

    def step(self, world: World) -> None:
        """One stage further."""
        with self.lock:
            if self.stage == "validating":
                self._validate(world)
            elif self.stage == "in_progress" and self.plan.end in ("expired", "cancelled"):
                self._end(world, self.plan.end)
            elif self.stage == "in_progress":
                self._enter("finalizing")
            elif self.stage == "finalizing":
                self._end(world, "completed")
            elif self.stage == "cancelling":
                self._end(world, "cancelled")

    def finish(self, world: World) -> None:
        """All the way to the end, whatever the clock says."""
        with self.lock:
            while not self.ended:
                self.step(world)

    def cancel(self, fraction: float) -> None:
        with self.lock:
            self.plan = Plan(end="cancelled", fraction=fraction)
            self._enter("cancelling")

    def _enter(self, stage: Stage) -> None:
        self.stage = stage
        self.stamps[stage] = time.time()

    def _validate(self, world: World) -> None:
        self.errors = self.dialect.check(world, self)
        if self.plan.end == "failed" and self.protocol == "openai":
            facts = {"code": self.plan.code, "message": self.plan.message}
            self.errors = [{**facts, "line": None, "param": None}]
        if self.errors:
            self.custom_ids = [] if self.protocol == "openai" else self.custom_ids
            self._enter("failed")
        else:
            world.account.note(accepted=self.total)
            self._enter("in_progress")

    # ---- the work

    def _end(self, world: World, stage: Stage) -> None:
        if "in_progress" not in self.stamps:  # Cancelled before it was read.
            self._validate(world)
            if self.ended:
                return
            self.stage = "cancelling"
        self._process(world)
        self.dialect.publish(world, self)
        if stage == "completed" and self.protocol == "openai" and self.counts["expired"]:
            stage = "expired"
        self._enter(stage)

    def _process(self, world: World) -> None:
        """Answer the rows, write the result files, and bill: all or nothing of it is seen."""
        charges: list[Charge] = []
        dice = random.Random(self.id)
        with world.files.writing() as (path, good), world.files.writing() as (bad_path, bad):
            errors = bad if self.dialect.splits_errors else good
            for rows in self._chunks(dice):
                rank = {row.custom_id: position for position, row in enumerate(rows)}
                outcomes = list(self.dialect.answer(world, self, rows))
                outcomes.sort(key=lambda outcome: -rank[outcome.custom_id])
                for outcome in outcomes:
                    (good if outcome.kind == "succeeded" else errors).write(outcome.line + b"\n")
                    self.counts[outcome.kind] += 1
                    if outcome.charge is not None:
                        charges.append(outcome.charge)
                        self.usage["input"] += outcome.charge.input_tokens
                        self.usage["output"] += outcome.charge.output_tokens
                        self.usage["cached"] += outcome.cached_tokens
            sizes = good.tell(), bad.tell()
        self.output = Slice(path, 0, sizes[0]) if sizes[0] else None
        self.error_output = Slice(bad_path, 0, sizes[1]) if sizes[1] else None
        world.account.charge(charges, free=self.total - len(charges))

    def _chunks(self, dice: random.Random) -> Iterator[list[Row]]:
        """The rows, the last chunk first: results never come in the order of the input."""
        answered = self.total
        if self.plan.end in ("expired", "cancelled"):
            answered = round(self.total * self.plan.fraction)
        left_out = set(dice.sample(range(self.total), self.total - answered))
        reason: Literal["expired", "cancelled"]
        reason = "cancelled" if self.plan.end == "cancelled" else "expired"
        for start, piece in reversed(list(self._pieces())):
            rows = self.dialect.rows(list(piece.lines()))
            for position, row in enumerate(rows, start):
                if position in left_out:
                    row.unanswered = reason
            yield rows

    def _pieces(self) -> Iterator[tuple[int, Slice]]:
        """The input in chunks of lines: the first line's number, and the bytes."""
        first, offset, size = 0, self.source.offset, 0
        number = 0
        for line in self.source.lines():
            if number - first == CHUNK:
                yield first, Slice(self.source.path, offset, size)
                first, offset, size = number, offset + size, 0
            number += bool(line.strip())
            size += len(line)
        if size:
            yield first, Slice(self.source.path, offset, size)


class BatchShelf:
    """All batches of the provider, in the order they were created."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._batches: dict[str, Batch] = {}

    def add(self, batch: Batch) -> None:
        with self._lock:
            self._batches[batch.id] = batch

    def remove(self, batch_id: str) -> None:
        with self._lock:
            del self._batches[batch_id]

    def get(self, batch_id: str, protocol: str, owner: str | None) -> Batch | None:
        batch = self._batches.get(batch_id)
        if batch is None or batch.protocol != protocol or owner not in (None, batch.owner):
            return None
        return batch

    def listing(self) -> list[Batch]:
        with self._lock:
            return list(self._batches.values())

    def visible(self, protocol: str, owner: str | None) -> list[Batch]:
        """What a list shows, newest first."""
        now = time.time()
        return [
            batch
            for batch in reversed(self.listing())
            if batch.protocol == protocol and batch.visible_at <= now and owner in (None, batch.owner)
        ]

    def settle(self, world: World) -> None:
        """Bring all up to date, but wait for none that somebody else is working on."""
        if not world.settings.auto or world.settings.stepwise:
            return
        for batch in self.listing():
            if not batch.ended and batch.lock.acquire(blocking=False):
                try:
                    batch.settle(world)
                finally:
                    batch.lock.release()
