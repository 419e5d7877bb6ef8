"""Polars' calls as they look from inside: which collects just now, on which thread, and what plan.

A function that Polars calls is told neither the query nor the thread that asked for it. The stacks of the
process' threads have both, in the frames of `Engine.collect` and `collect_all`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

import polars as pl

from polars_llm.stacks import stacks

__all__ = ["at_work", "collected", "collecting", "evaluation", "grouped", "is_of_polars"]

_ENGINE = ("lazyframe/engine.py", "lazyframe\\engine.py")
# A name that the call's frame does not use is kept beside its own, as long as it runs (PEP 667).
_LINES = "__pllm_lines"


def collecting() -> FrameType | None:
    """The call of Polars' `Engine.collect` that is at work on this thread, if it is one that collects."""
    # A thread of Polars that waits for a query of ours runs other calls meanwhile, on top of that query.
    return None if is_of_polars(threading.current_thread()) else _collect_in(sys._getframe(1))


def is_of_polars(thread: threading.Thread | None) -> bool:
    """Is it no thread of Python's?"""
    return thread is None or isinstance(thread, threading._DummyThread)


def _collect_in(frame: FrameType | None) -> FrameType | None:
    return next(_collects_in(frame), None)


def _collects_in(frame: FrameType | None) -> Iterator[FrameType]:
    """The innermost first: what Polars calls may collect frames of its own."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in {"collect", "collect_all"} and code.co_filename.endswith(_ENGINE):
            yield frame
        frame = frame.f_back


def evaluation(collect: FrameType) -> tuple[int, int]:
    """What tells one call of `Engine.collect` from the next, as far as can be told from another thread."""
    return id(collect), id(collect.f_locals.get("lf"))


def at_work(thread: int, which: tuple[int, int]) -> bool:
    """Is that evaluation still running on that thread?"""
    return any(evaluation(collect) == which for collect in _collects_in(stacks().get(thread)))


def _lines_of(collect: FrameType) -> list[str]:
    """The description of the plan, or plans, that this call collects."""
    known = collect.f_locals
    if _LINES not in known:
        several = known.get("lfs")
        plans = [known.get("lf"), *(several if isinstance(several, (list, tuple)) else ())]
        told = (plan.explain(optimized=False) for plan in plans if isinstance(plan, pl.LazyFrame))
        known[_LINES] = "\n".join(told).splitlines()
    lines: list[str] = known[_LINES]
    return lines


def collected(name: str) -> Iterator[tuple[int, FrameType]]:
    """The threads that collect a plan with that mark just now, and the calls that do.

    Not those of Polars: what they collect is a part of a call, which may have the mark in its columns.
    """
    for thread, frame in stacks().items():
        if is_of_polars(threading._active.get(thread)):  # type: ignore[attr-defined]
            continue
        for collect in _collects_in(frame):
            if any(name in line for line in _lines_of(collect)):
                yield thread, collect


def grouped(name: str) -> bool:
    """Is the expression with that mark in a group_by or an over of the query that calls it?"""
    return any(_is_grouped(name, _lines_of(collect)) for _, collect in collected(name))


def _is_grouped(name: str, lines: Sequence[str]) -> bool:
    at = next(n for n, line in enumerate(lines) if name in line)
    above = lines[at - 1].lstrip() if at else ""
    # What is done with the answers, up to the next expression of the same node.
    after = lines[at].partition(name)[2].partition("python_udf()")[2].partition(", ")[0]
    return above.startswith("AGGREGATE") or ".over(" in after
