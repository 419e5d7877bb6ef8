"""A provider and a client process that belong together, and the cases that they run."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import msgspec

from polars_llm import testing
from tests.crash.client import Order, Report

__all__ = ["Worker", "Workers"]

T = TypeVar("T")

_ROOT = Path(__file__).parents[2]
# The assumption of all that is shown here: a provider's list lags no longer than the quiet period.
_SETTINGS = {"POLARS_LLM_POLL_INTERVAL": "0.05", "POLARS_LLM_QUIET_PERIOD": "0.2"}


class Worker:
    """One provider, whose model says what it was asked, and one process that evaluates.

    Attributes
    ----------
    asked
        How often each prompt was answered, and therefore billed: counted by the model itself, which
        knows nothing of keys and batches.
    """

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.provider = stack.enter_context(testing.provider(model=self._answer, set_env=False))
        self._directory = directory
        environment = {k: v for k, v in os.environ.items() if not k.startswith("POLARS_LLM_")}
        self._client = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.client"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_ROOT,
            env={**environment, **_SETTINGS, **self.provider.env},
        )
        stack.callback(self._stop)

    def _answer(self, request: testing.ModelRequest) -> str:
        self.asked[request.prompt] += 1
        return request.prompt

    def _stop(self) -> None:
        for pipe in (self._client.stdin, self._client.stdout):
            assert pipe is not None
            pipe.close()
        self._client.wait()

    def new_cache(self) -> str:
        """A directory that isn't there yet."""
        return str(Path(tempfile.mkdtemp(dir=self._directory)) / "cache")

    def forget(self) -> None:
        """Begin with an account in which nothing ever happened."""
        self.provider.reset()
        self.asked.clear()

    def check_bill(self, prompts: Sequence[str], label: object) -> None:
        """Each of these prompts was billed exactly once, and nothing was billed behind the model's back."""
        bill = self.provider.bill()  # which brings all batches to their end
        assert {p: self.asked[p] for p in prompts if self.asked[p] != 1} == {}, f"{label}: how often billed"
        assert bill.duplicates == {}, label
        assert bill.billed == self.asked.total(), label

    def run(self, **facts: Any) -> Report:
        """Run one process; see `Order`."""
        pipes = self._client.stdin, self._client.stdout
        assert pipes[0] is not None
        assert pipes[1] is not None
        pipes[0].write(msgspec.json.encode(Order(**facts)) + b"\n")
        pipes[0].flush()
        return msgspec.json.decode(pipes[1].readline(), type=Report)


@dataclasses.dataclass(frozen=True)
class Workers:
    """Several workers that share the cases of a test."""

    idle: SimpleQueue[Worker]
    all: Sequence[Worker]

    @classmethod
    @contextmanager
    def started(cls, count: int = 2) -> Iterator[Self]:
        """Start them, and stop them after the block."""
        # Memory, if there is a file system for it: what is killed here is processes, not the machine.
        home = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=home, prefix="pllm-crash-")))
            workers = [Worker(stack, directory) for _ in range(count)]
            idle: SimpleQueue[Worker] = SimpleQueue()
            for worker in workers:
                idle.put(worker)
            yield cls(idle, workers)

    def map(self, run: Callable[[Worker, T], None], cases: Sequence[T]) -> None:
        """Run all cases; the first failure ends it."""
        stop = threading.Event()

        def one(case: T) -> None:
            if stop.is_set():
                return
            worker = self.idle.get()
            try:
                run(worker, case)
            except BaseException:
                stop.set()
                raise
            finally:
                self.idle.put(worker)

        with ThreadPoolExecutor(len(self.all)) as pool:
            list(pool.map(one, cases))
