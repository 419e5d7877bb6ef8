"""A provider that does nothing by itself, the clocks, and what may go wrong: for simulated processes."""

from __future__ import annotations

import os
import ssl
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import polars_llm as pllm
from polars_llm import clock, testing
from polars_llm.backends import base
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.base import Limits
from polars_llm.backends.openai import OpenAIBatch
from polars_llm.jobs import ingest

__all__ = ["MODELS", "World", "faults_of", "worlds"]

MODELS = {"openai": "openai/gpt-6-luna", "anthropic": "anthropic/claude-haiku-5-5"}
_LAG = 0.05

_CREATE = {"operation": "*batches.create"}
_UPLOAD = {"operation": "files.create"}
_READ = {"operation": "*batches.retrieve|*batches.list|files.*|*batches.results"}
_FAULTS: dict[str, list[dict[str, Any]]] = {
    "create-then-500": [{}],
    "create-then-drop": [{}, _UPLOAD],
    "create-then-garbage": [{}],
    "drop": [_CREATE, _READ, {**_READ, "times": 7}],
    "status": [
        *({**_CREATE, "status": status} for status in (400, 401, 500, 503, 529)),
        *({**_CREATE, "status": 429, "retry_after": after, "times": 3} for after in (None, 0)),
        *({**_READ, "status": status, "times": n} for status in (429, 500, 503, 529) for n in (1, 7)),
    ],
    "expire": [{"fraction": fraction} for fraction in (0.0, 0.5)],
    "cancel": [{"fraction": fraction} for fraction in (0.0, 0.5)],
    "list-lag": [{"seconds": _LAG}],
    "not-found": [{}],
    "sparse": [{}],
    "odd-status": [{}],
    "truncate": [{"framing": "close"}, {"framing": "chunked"}],
    "crlf": [{}],
    "blank-lines": [{}],
    "duplicate-lines": [{}],
    "foreign-ids": [{}],
    "garbage-line": [{}],
    "string-body": [{}],
    "token-limit": [{}],
    "fail": [{}],
}
_OPENAI_ONLY = {"token-limit", "fail", "string-body"}
# What makes an answer be fetched again: at most two in a row, for the third is believed.
_REFETCHED = {"truncate"}


def faults_of(protocol: str) -> list[tuple[str, dict[str, Any]]]:
    """Kind and options of all that may go wrong there."""
    kinds = _FAULTS.keys() - (_OPENAI_ONLY if protocol == "anthropic" else set())
    return [(kind, options) for kind in sorted(kinds) for options in _FAULTS[kind]]


class World:
    """One provider for all cases, and the clocks.

    Attributes
    ----------
    asked
        How often each prompt was answered, and therefore billed: counted by the model itself, which
        knows nothing of keys and batches.
    """

    def __init__(self, protocol: str, figures: Counter[str], directory: Path) -> None:
        self.protocol = protocol
        self.model = MODELS[protocol]
        self.figures = figures
        self.asked: Counter[str] = Counter()
        self.provider = testing.provider(model=self._answer, auto=False)
        self._directory = directory
        self._count = 0
        self._struck: list[str] = []
        self._passed = 0.0
        self._set = 0.0
        self._uptime, self._time = clock._uptime, time.time

    def _answer(self, request: testing.ModelRequest) -> str:
        self.asked[request.prompt] += 1
        return request.prompt

    def begin(self) -> Path:
        """A new account; gives an empty directory."""
        self.provider.reset()
        self.asked.clear()
        self._set = 0.0
        self._count += 1
        home = self._directory / str(self._count)
        home.mkdir()
        return home

    def limit(self, requests: int) -> None:
        """How many requests a batch takes."""
        for backend in (OpenAIBatch, AnthropicBatch):
            backend.limits = Limits(requests=requests, size_bytes=1_000_000)

    def uptime(self) -> float:
        """What the library takes for the machine's uptime."""
        return self._uptime() + self._passed

    def now(self) -> float:
        """What the library takes for the wall clock."""
        return self._time() + self._passed + self._set

    def wait(self) -> None:
        """Show what lags; then let a long time pass."""
        time.sleep(1.5 * _LAG)
        self._passed += 1_000.0

    def set_clock(self, days: float) -> None:
        """Somebody sets the wall clock forward or back."""
        self._set += days * 86_400.0

    def reset_clock(self, days: float) -> None:
        """The wall clock is right again, and so many days have passed."""
        self._set = days * 86_400.0

    def fault(self, kind: str, *, anybody_inside: bool, **options: Any) -> None:
        """Order a fault, if it may be had now."""
        if kind in _REFETCHED:
            waiting = [f["kind"] for f in self.provider.faults() if not f["struck"]]
            if anybody_inside or sum(k in _REFETCHED for k in waiting) >= 2:
                return
        self.provider.fault(kind, **options)
        self.figures["faults ordered"] += 1

    def story(self) -> str:
        """What the provider did, for a failure's message."""
        batches = [
            f"{b['id']} {b['state']} {b['counts']} {b['metadata']} {b['custom_ids']}"
            for b in self.provider.batches()
        ]
        faults = [f"{f['kind']} {f['operation']} struck {f['struck']}" for f in self.provider.faults()]
        log = [f"{seen.status} {seen.method} {seen.path}" for seen in self.provider.log()]
        return "\n".join([*batches, *self._struck, *faults, *log])

    def note_faults(self) -> None:
        """No more faults; count what struck."""
        self._struck = [f"{f['kind']} {f['options']} struck {f['struck']}" for f in self.provider.faults()]
        self.figures["faults that struck"] += sum(f["struck"] for f in self.provider.faults())
        self.provider.clear_faults()


@contextmanager
def worlds(protocol: str, figures: Counter[str], directory: Path) -> Iterator[World]:
    """A world for the block; the library's clocks and pauses are its own."""
    # Memory, if there is a file system for it: what dies here is processes, not the machine.
    home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else directory
    with (
        tempfile.TemporaryDirectory(dir=home, prefix="pllm-interleavings-") as scratch,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        world = World(protocol, figures, Path(scratch))
        patch.setattr(clock, "_uptime", world.uptime)
        patch.setattr(time, "time", world.now)
        patch.setattr(ingest, "_PAUSE", 0.0)
        patch.setattr(base, "_wait", lambda state: 0.0)
        patch.setenv("POLARS_LLM_QUIET_PERIOD", "60")
        for backend in (OpenAIBatch, AnthropicBatch):
            # Longer than a call can take on the busiest machine: a reply that is late is no fault here.
            patch.setattr(backend, "create_timeout", 60.0)
            patch.setattr(backend, "limits", backend.limits)
        # Reading the authorities' certificates takes 35 ms each time; nothing here is encrypted.
        patch.setattr(ssl.SSLContext, "load_verify_locations", lambda *args, **options: None)
        warnings.simplefilter("ignore", pllm.LLMWarning)
        with world.provider:
            yield world
