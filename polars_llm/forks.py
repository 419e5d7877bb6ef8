"""Whether Polars works in this process: not in a child that was forked beside its threads.

A fork copies the memory, not the threads. In the child Polars hands its work to threads that are not there
and waits for them for ever, whoever calls it. Before its first query it has none: such a child is fine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from polars_llm.errors import PolarsLLMError

__all__ = ["refuse_hanging"]

_TASKS = Path("/proc/self/task")
_POLARS_OWN = re.compile(r"polars-\d+|async-executor.*")

_beside_threads = False
_hangs = False


def _note_threads() -> None:
    global _beside_threads
    _beside_threads = any(_POLARS_OWN.fullmatch(name) for name in _threads())


def _threads() -> list[str]:
    """Names of this process' threads; none where the system does not say (not Linux)."""
    try:
        return [(task / "comm").read_text().strip() for task in _TASKS.iterdir()]
    except OSError:
        return []


def _note_child() -> None:
    global _hangs
    _hangs = _hangs or _beside_threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note_threads, after_in_child=_note_child)


def refuse_hanging() -> None:
    """Say that Polars cannot be used here, instead of waiting for ever.

    Raises
    ------
    PolarsLLMError
        This process was forked from one in which Polars had been at work.
    """
    if _hangs:
        raise PolarsLLMError(
            "This process was forked from one that had used Polars, whose threads a fork does not copy: any"
            " query would wait for them for ever.",
            hint="start worker processes with the multiprocessing context 'spawn' or 'forkserver'. Nothing"
            " was sent from here; the parent's jobs go on.",
        )
