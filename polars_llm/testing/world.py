"""Everything one emulated provider knows, in one place, for the handlers to share."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any, Protocol

import msgspec

from .batches import BatchShelf
from .bill import Account, Charge
from .dialogue import Failure, ModelRequest, Reply, Usage, finished, usage_of
from .faults import FaultDesk
from .markers import marked
from .rates import RateLimits
from .settings import Settings
from .uploads import FileShelf


class Model(Protocol):
    """Who answers: the built-in model, or the callable in the parent process."""

    def answer(self, requests: list[ModelRequest]) -> list[Reply]: ...


class Answer(msgspec.Struct):
    """A reply, and what it counts."""

    reply: Reply
    usage: Usage

    def charge(self, request: ModelRequest) -> Charge:
        return Charge(
            digest=request.digest,
            input_tokens=self.usage.input_tokens,
            output_tokens=self.usage.output_tokens,
            custom_id=request.custom_id if request.mode == "batch" else None,
        )


class Journal:
    """What arrived, and how it was answered; the last thousand exchanges in detail."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: list[list[Any]] = []
        self._details: deque[dict[str, Any]] = deque(maxlen=1_000)

    def open(self, method: str, path: str) -> list[Any]:
        """Note an arrival. Its status stays null until `line[2]` is set."""
        line = [method, path, None]
        with self._lock:
            self._lines.append(line)
        return line

    def detail(self, facts: dict[str, Any]) -> None:
        with self._lock:
            self._details.append(facts)

    def lines(self) -> list[list[Any]]:
        with self._lock:
            return list(self._lines)

    def details(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._details)

    def clear(self) -> None:
        with self._lock:
            self._lines.clear()
            self._details.clear()


class World:
    """The state of one provider process."""

    def __init__(self, settings: Settings, model: Model) -> None:
        self.settings = settings
        self.model = model
        self.url = ""
        self.started = time.time()
        self.files = FileShelf(Path(settings.directory))
        self.faults = FaultDesk()
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything that happened; what is held goes on, and is not counted any more."""
        self.files.clear()
        self.faults.clear()
        self.account = Account()
        self.batches = BatchShelf()
        self.journal = Journal()
        self.rates = RateLimits(self.settings.rpm, self.settings.tpm)
        self._attempts: Counter[str] = Counter()
        self._prefixes: set[str] = set()

    def attempt(self, digest: str) -> int:
        """How often this body was asked before."""
        with self._lock:
            self._attempts[digest] += 1
            return self._attempts[digest] - 1

    def remembers(self, prefix: str) -> bool:
        """Whether a cached prompt prefix was seen before; from now on it was."""
        with self._lock:
            known = prefix in self._prefixes
            self._prefixes.add(prefix)
            return known

    def ask(self, requests: list[ModelRequest]) -> list[Answer]:
        """Answer requests: a marker in the prompt first, then the model."""
        replies: list[Reply | None] = [self._without_model(request) for request in requests]
        open_ = [r for r, reply in zip(requests, replies, strict=True) if reply is None]
        answered = iter(self.model.answer(open_)) if open_ else iter(())
        done = (
            (request, finished(request, next(answered) if reply is None else reply))
            for request, reply in zip(requests, replies, strict=True)
        )
        return [Answer(reply, usage_of(request, reply)) for request, reply in done]

    def _without_model(self, request: ModelRequest) -> Reply | None:
        known = self.settings.models
        if known is not None and request.model not in known:
            message = f"The model '{request.model}' does not exist or you do not have access to it."
            failure = Failure(status=404, message=message, code="model_not_found")
            return Reply(failure=failure)
        return marked(request, self.attempt)
