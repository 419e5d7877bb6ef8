"""Elapsed time that survives the process and does not trust the wall clock."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["seconds_since", "stamp"]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "-"


def _uptime() -> float:
    # Counts suspended time too, unlike the monotonic clock of Linux.
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(clock) if clock is not None else time.time()


def stamp() -> str:
    """This moment, in a form that another process can measure from."""
    return f"{_boot()} {_uptime():.3f} {time.time():.3f}"


def seconds_since(earlier: str) -> float:
    """Seconds since a `stamp`, never negative.

    Within one boot of the machine this is its uptime, which no clock setting moves. After a reboot
    the wall clock is all there is.
    """
    boot, uptime, wall = earlier.split(" ")
    if boot != "-" and boot == _boot():
        return max(0.0, _uptime() - float(uptime))
    return max(0.0, time.time() - float(wall))
