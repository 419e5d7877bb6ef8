"""Elapsed time across processes."""

from __future__ import annotations

import time

from polars_llm import clock


def test_seconds_pass() -> None:
    mark = clock.stamp()
    time.sleep(0.05)
    assert 0.04 < clock.seconds_since(mark) < 5


def test_a_moved_wall_clock_changes_nothing_within_a_boot() -> None:
    boot, uptime, wall = clock.stamp().split(" ")
    for shift in (-86_400, 86_400):
        assert clock.seconds_since(f"{boot} {uptime} {float(wall) + shift}") < 5


def test_after_a_reboot_the_wall_clock_counts_and_never_backwards() -> None:
    _, uptime, wall = clock.stamp().split(" ")
    assert 99 < clock.seconds_since(f"other-boot {uptime} {float(wall) - 100}") < 110
    assert clock.seconds_since(f"other-boot {uptime} {float(wall) + 100}") == 0
