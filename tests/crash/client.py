"""A user's process that evaluates one frame, and dies where it is told to.

`python -m tests.crash.client` imports everything once, and then forks a process for each order that it
reads (a line of JSON): that saves the start of an interpreter each time. Polars' threads start with its
first query, so the process that forks runs none.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import ssl
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Literal

import msgspec
import polars as pl

import polars_llm as pllm
from polars_llm import operate
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.base import Limits
from polars_llm.backends.openai import OpenAIBatch
from tests.crash.trace import Event, Side, Tracer

__all__ = ["Order", "Report"]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What a process shall do, and where it shall die.

    Attributes
    ----------
    do
        ``generate``, or what an operator does: ``watch``, ``recover``.
    cache, model, prompts, on_pending
        Where and what to evaluate.
    mode
        ``batch`` or ``realtime``.
    per_batch
        Requests that a batch takes.
    die_at
        Name and place of an event, how often it happens before, and on which side of it.
    die_after
        Seconds after which it is killed from outside, wherever it is.
    """

    do: Literal["generate", "watch", "recover"] = "generate"
    cache: str
    model: str
    prompts: list[str]
    on_pending: Literal["raise", "wait"] = "wait"
    mode: Literal["batch", "realtime"] = "batch"
    per_batch: int = 1_000
    die_at: tuple[str, str, int, Side] | None = None
    die_after: float | None = None


class Report(msgspec.Struct, kw_only=True):
    """What became of a process.

    Attributes
    ----------
    killed
        By SIGKILL.
    answers
        The column, None if it raised.
    error
        Name of the exception; with `trace` where it is not JobsPending.
    events
        Name and place of each event, in order, and whether nothing was written.
    untraced
        Files that were written behind the tracer's back.
    open_jobs
        States of the jobs that are open at the end.
    """

    killed: bool = False
    answers: list[str | None] | None = None
    error: str | None = None
    trace: str | None = None
    events: list[tuple[str, str, bool]] = []
    untraced: list[str] = []
    open_jobs: list[str] = []
    modules: list[str] = []


def _evaluate(order: Order, report: Report) -> None:
    for backend in (OpenAIBatch, AnthropicBatch):
        backend.create_timeout = 0.5
        backend.limits = Limits(requests=order.per_batch, size_bytes=1_000_000)
    os.environ["POLARS_LLM_CACHE_DIR"] = order.cache
    warnings.simplefilter("error")
    seen: Counter[tuple[str, str]] = Counter()

    def visit(side: Side, event: Event) -> None:
        if (event.name, event.place, seen[event.name, event.place], side) == order.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if side == "after":
            seen[event.name, event.place] += 1
            report.events.append((event.name, event.place, event.idle))

    tracer = Tracer(Path(order.cache), visit)
    try:
        with tracer.installed():
            report.answers = _do(order)
    except pllm.JobsPending as error:
        report.error = type(error).__name__
    report.untraced = sorted(tracer.untraced())
    report.modules = list(sys.modules)
    report.open_jobs = pllm.jobs(open_only=True)["state"].to_list()


def _do(order: Order) -> list[str | None] | None:
    if order.do == "watch":
        operate.watch()
    elif order.do == "recover":
        pllm.recover(order.model.partition("/")[0])
    else:
        frame = pl.DataFrame({"prompt": order.prompts})
        options = {"model": order.model, "mode": order.mode, "on_pending": order.on_pending}
        out = frame.llm.generate("prompt", **options)
        if order.on_pending == "wait":
            # A job whose answers are stored, but which is not closed, is nobody's need any more.
            operate.watch()
        return out["response"].to_list()
    return None


def _child(order: Order, sink: int) -> None:
    report = Report()
    try:
        _evaluate(order, report)
    except BaseException as error:  # noqa: BLE001  # it is told to the test, which fails
        report.error, report.trace = type(error).__name__, traceback.format_exc()
    with os.fdopen(sink, "wb") as pipe:
        pipe.write(msgspec.json.encode(report))


def _run(order: Order) -> Report:
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(source)
        try:
            _child(order, sink)
        finally:
            os._exit(0)
    os.close(sink)
    if order.die_after is not None:
        select.select([source], [], [], order.die_after)
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(source, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return Report(killed=True)
    if not said:
        return Report(error="died", trace=f"the process ended with wait status {status}")
    return msgspec.json.decode(said, type=Report)


def main() -> None:
    """Take orders until standard input ends."""
    # Reading the authorities' certificates takes 35 ms for each client; nothing here is encrypted.
    ssl.SSLContext.load_verify_locations = lambda *arguments, **options: None  # type: ignore[method-assign]
    gc.disable()  # it would touch, and thereby copy, what the processes share
    for line in sys.stdin.buffer:
        report = _run(msgspec.json.decode(line, type=Order))
        # What a process had to import, the next ones inherit.
        imported, report.modules = set(report.modules) - sys.modules.keys(), []
        for name in imported:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        if imported:
            gc.collect()
            gc.freeze()
        sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
