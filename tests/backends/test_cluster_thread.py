"""The thread that stays for a cluster of this process."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from polars_llm.backends.vllm import cluster


class FakeRay:
    """Notes which thread began."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.by: list[threading.Thread] = []

    def init(self, **_: Any) -> None:
        self.by.append(threading.current_thread())
        if self.fails:
            raise RuntimeError("no room")


def begun_elsewhere(ray: FakeRay) -> list[BaseException]:
    failed: list[BaseException] = []

    def begin() -> None:
        try:
            cluster._init(ray)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return failed


def ended(thread: threading.Thread) -> bool:
    until = time.monotonic() + 10
    while thread.is_alive() and time.monotonic() < until:
        time.sleep(0.01)
    return not thread.is_alive()


@pytest.fixture(autouse=True)
def nobody_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_left", threading.Event())


def test_the_thread_of_a_cluster_that_the_user_ended_goes_with_the_next_one() -> None:
    ray = FakeRay()
    for _ in range(3):
        assert begun_elsewhere(ray) == []
    first, second, third = ray.by
    assert ended(first)
    assert ended(second)
    assert third.is_alive()
    cluster._init(ray)  # on the main thread, which stays by itself
    assert ray.by[-1] is threading.main_thread()
    assert ended(third)


def test_what_ray_raises_is_raised_where_it_was_asked_for() -> None:
    ray = FakeRay(fails=True)
    (error,) = begun_elsewhere(ray)
    assert str(error) == "no room"
    assert ended(ray.by[0])
