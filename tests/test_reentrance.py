"""A signal's handler, or a finalizer, runs on a thread that holds a lock of ours, and needs that lock."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from polars_llm.backends.clients import PerProcess
from polars_llm.frame import scope
from polars_llm.store import textcache
from polars_llm.store.ledger import DiskcacheLedger


def comes_back(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_the_ledger_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DiskcacheLedger(tmp_path / "jobs").put_fact("n", 1)
    ledger = DiskcacheLedger(tmp_path / "jobs")
    opened, found = textcache.open_text_cache, []

    def open_text_cache(directory: Path, timeout: float) -> textcache.TextCache:
        monkeypatch.setattr(textcache, "open_text_cache", opened)
        found.append(ledger.get_fact("n"))
        return opened(directory, timeout)

    monkeypatch.setattr(textcache, "open_text_cache", open_text_cache)
    comes_back(lambda: found.append(ledger.get_fact("n")))
    assert found == [1, 1]


def test_a_client_while_it_connects() -> None:
    class Client:
        def close(self) -> None:
            closed.append(self)

    closed: list[Client] = []

    def connect() -> Client:
        if len(made) < 2:
            made.append(len(made))
            clients.get()
        return Client()

    made: list[int] = []
    clients = PerProcess(connect)

    def use() -> None:
        clients.get()
        clients.close()

    comes_back(use)
    assert len(closed) == 1


def test_a_verb_that_leaves_while_it_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    verb, part = scope.Occurrence(), scope.Scope()
    verb.join(part)
    verb._planned = {0: ((0, 0), part)}

    def at_work(*_: object) -> bool:
        part.close()  # as a generator does that the garbage collector finds just now
        return False

    monkeypatch.setattr(scope, "at_work", at_work)
    monkeypatch.setattr(scope, "collecting", lambda: sys._getframe())
    comes_back(verb.planned)
    assert verb._scopes == []


_BUILDING = """
import threading
from polars_llm.backends.vllm import binding, engines

entered = threading.Event()

def construct(*_):
    entered.set()
    threading.Event().wait()

binding.construct = construct
engines._PATIENCE = 0.5
threading.Thread(target=engines.engine_for, args=("m", {}), kwargs={"endpoint": "x"}, daemon=True).start()
entered.wait()
"""


def test_the_process_ends_while_a_thread_builds_an_engine() -> None:
    subprocess.run([sys.executable, "-c", _BUILDING], timeout=60, check=True)
