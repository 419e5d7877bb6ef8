"""Faults on demand: what can go wrong, for which requests, and how often.

The table `KINDS` is the whole list. A fault belongs to a phase: `before` anything is accepted,
`after` the request was carried out but before its reply, `batch` (how the created batch will end),
`view` (how a batch is shown) or `download` (what is wrong with the bytes of a result file).
"""

from __future__ import annotations

import threading
from fnmatch import fnmatchcase
from typing import Any, Literal

import msgspec

Phase = Literal["before", "after", "batch", "view", "download"]

_CREATE = "*batches.create"
_RETRIEVE = "*batches.retrieve"
_DOWNLOAD = "files.content|*batches.results"
_ERROR = {"message": None, "code": None, "type": None, "retry_after": None}


class Kind(msgspec.Struct, frozen=True):
    """One way to go wrong: when it strikes, where by default, and its options."""

    phase: Phase
    operation: str
    options: dict[str, Any] = {}
    ends: bool = False  # The request goes no further: later faults wait for the next one.


KINDS: dict[str, Kind] = {
    # before anything is accepted
    "status": Kind("before", "*", {"status": 500, **_ERROR, "html": False}, ends=True),
    "drop": Kind("before", "*", ends=True),
    "kill": Kind("before", "*", {"pid": None}, ends=True),
    "hold": Kind("before", "*", {"seconds": 60.0}),
    "slow": Kind("before", "*", {"seconds": 1.0}),
    "not-found": Kind("before", _RETRIEVE, {"status": 404}, ends=True),
    "gone": Kind("before", _DOWNLOAD, {"status": 410}, ends=True),
    # carried out, and then
    "create-then-500": Kind("after", _CREATE, {"status": 500, **_ERROR}),
    "create-then-drop": Kind("after", _CREATE),
    "create-then-kill": Kind("after", _CREATE, {"pid": None}),
    "create-then-hold": Kind("after", _CREATE, {"seconds": 60.0}),
    "create-then-garbage": Kind("after", _CREATE),
    # how the batch that is being created will go
    "expire": Kind("batch", _CREATE, {"fraction": 0.5}),
    "cancel": Kind("batch", _CREATE, {"fraction": 0.5}),
    "fail": Kind("batch", _CREATE, {"code": "invalid_request", "message": "The batch failed validation."}),
    "token-limit": Kind("batch", _CREATE),
    "list-lag": Kind("batch", _CREATE, {"seconds": 1.0}),
    "batch-seconds": Kind("batch", _CREATE, {"seconds": 1.0}),
    # how a batch is shown
    "sparse": Kind("view", _RETRIEVE),
    "odd-status": Kind("view", _RETRIEVE, {"status": "paused"}),
    "relative-url": Kind("view", _RETRIEVE),
    # what is wrong with a result file
    "truncate": Kind("download", _DOWNLOAD, {"share": 0.5, "framing": "chunked"}),
    "crlf": Kind("download", _DOWNLOAD),
    "blank-lines": Kind("download", _DOWNLOAD),
    "duplicate-lines": Kind("download", _DOWNLOAD),
    "foreign-ids": Kind("download", _DOWNLOAD, {"count": 3}),
    "raw-separators": Kind("download", _DOWNLOAD),
    "lone-surrogates": Kind("download", _DOWNLOAD),
    "string-body": Kind("download", _DOWNLOAD),
    "no-response": Kind("download", _DOWNLOAD),
    "missing-lines": Kind("download", _DOWNLOAD, {"count": 1, "custom_id": None}),
    "garbage-line": Kind("download", _DOWNLOAD),
    "no-final-newline": Kind("download", _DOWNLOAD),
}


class Fault(msgspec.Struct, kw_only=True):
    """One fault on order. It strikes `times` times, from the `after`-th match on."""

    id: int
    kind: str
    operation: str
    method: str | None = None
    path: str | None = None
    times: int | None = 1
    after: int = 0
    options: dict[str, Any] = {}
    seen: int = 0
    struck: int = 0

    @property
    def phase(self) -> Phase:
        return KINDS[self.kind].phase

    def matches(self, operation: str, method: str, path: str) -> bool:
        return (
            any(fnmatchcase(operation, pattern) for pattern in self.operation.split("|"))
            and self.method in (None, method)
            and (self.path is None or fnmatchcase(path, self.path))
        )

    def strikes(self) -> bool:
        """Count one match, and say whether it is one that goes wrong."""
        if self.times is not None and self.struck >= self.times:
            return False
        self.seen += 1
        if self.seen <= self.after:
            return False
        self.struck += 1
        return True


def order(kind: str, *, operation: str | None, options: dict[str, Any], **facts: Any) -> Fault:
    """Check what was asked for, and fill in the kind's defaults."""
    if kind not in KINDS:
        message = f"no fault is called {kind!r}\n\nHint: one of {', '.join(sorted(KINDS))}."
        raise ValueError(message)
    known = KINDS[kind].options
    if unknown := options.keys() - known.keys():
        message = (
            f"the fault {kind!r} has no option {', '.join(map(repr, sorted(unknown)))}\n\n"
            f"Hint: its options are: {', '.join(known) or 'none'}."
        )
        raise TypeError(message)
    return Fault(
        id=0,
        kind=kind,
        operation=operation or KINDS[kind].operation,
        options={**known, **options},
        **facts,
    )


class FaultDesk:
    """The faults on order, and the requests that are being held."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._next = 1
        self._held: dict[int, int] = {}
        self._released: set[int] = set()
        self._changed = threading.Condition(self._lock)

    def add(self, fault: Fault) -> int:
        with self._lock:
            fault.id, self._next = self._next, self._next + 1
            self._faults.append(fault)
            return fault.id

    def clear(self) -> None:
        """Forget every fault, and let go what is held."""
        with self._lock:
            self._released.update(fault.id for fault in self._faults)
            self._faults.clear()
            self._changed.notify_all()

    def listing(self) -> list[Fault]:
        with self._lock:
            return list(self._faults)

    def take(self, operation: str, method: str, path: str) -> list[Fault]:
        """The faults that strike this request, in the order in which they were asked for."""
        if not self._faults:
            return []
        struck: list[Fault] = []
        with self._lock:
            for fault in self._faults:
                if fault.matches(operation, method, path) and fault.strikes():
                    struck.append(fault)
                    if KINDS[fault.kind].ends:
                        break
        return struck

    def hold(self, fault: Fault) -> None:
        """Block until the fault is released, or its seconds are over."""
        with self._changed:
            self._held[fault.id] = self._held.get(fault.id, 0) + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: fault.id in self._released, fault.options["seconds"])
            self._held[fault.id] -= 1

    def release(self, fault_id: int | None) -> None:
        with self._changed:
            ids = [f.id for f in self._faults] if fault_id is None else [fault_id]
            self._released.update(ids)
            # A released hold is over: a later request must not meet a door that is open for ever.
            self._faults = [f for f in self._faults if f.id not in ids or "hold" not in f.kind]
            self._changed.notify_all()

    def held(self, fault_id: int | None, seconds: float) -> int:
        """How many requests are held; waits up to `seconds` for the first."""

        def count() -> int:
            return sum(n for key, n in self._held.items() if fault_id in (None, key))

        with self._changed:
            self._changed.wait_for(lambda: count() > 0, seconds)
            return count()
