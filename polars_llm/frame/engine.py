"""Driving a query to its end: run the plan, send what is missing as one, wait, run it again.

`collect` and `sink` are what ``lf.llm.collect()`` and ``lf.llm.sink_parquet()`` call. `Engine` is the same
thing as an engine of Polars, for ``collect(engine=...)`` and `polars.Config.set_engine_affinity`; it stands
on an interface that Polars calls unstable, and nothing else in this library does.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

import polars as pl

from polars_llm.config import OnPending
from polars_llm.errors import InvalidRequest
from polars_llm.frame.asking import never_ends
from polars_llm.frame.column import Failures
from polars_llm.frame.scope import Contended, Missing, Scope, Staged
from polars_llm.frame.sending import Wanted, needs, spent
from polars_llm.interrupts import stopped_by
from polars_llm.jobs.evaluate import Pending, check_money, evaluate

__all__ = ["Engine", "collect", "pushdown", "sink"]

T = TypeVar("T")

# A verb asks once its input is complete, so once is the rule; parts of an expression's column may be asked
# one pass before the others. A verb that asks more often asks for something else each time.
_MOST_PASSES = 2
# Passes in which some rows of a verb were asked and others held back, since another verb's answers, which
# they may read, were missing just then (both sides of a join, part by part).
_MOST_IN_PART = 20
_PATIENCE_S = 5.0
# Held by a thread that runs a pass again because another one was at the same frame.
_turns = threading.Lock()


def collect(lf: pl.LazyFrame, on_pending: OnPending, **options: Any) -> pl.DataFrame:
    """`LazyFrame.collect`, driven."""
    _check_on_pending(on_pending)
    if options.get("background"):
        settle([lf], on_pending)
        return lf.collect(engine="streaming", **options)  # type: ignore[no-any-return]
    made: pl.DataFrame = drive(lambda: lf.collect(engine="streaming", **options), [lf], on_pending)
    return made


def sink(lf: pl.LazyFrame, write: Callable[[], None], on_pending: OnPending) -> None:
    """Drive `lf` to its end, and only then `write` it: no file is made of rows that are not all there."""
    _check_on_pending(on_pending)
    if settle([lf], on_pending):
        _finally(write, [lf])


def _check_on_pending(on_pending: object) -> None:
    # Whatever is not known would be taken for "null": rows that are not there yet would be nulls.
    if on_pending not in get_args(OnPending):
        raise InvalidRequest(
            f"on_pending is {on_pending!r}",
            hint="on_pending takes 'raise', 'wait', 'null'. Nothing was sent.",
        )


def settle(plans: Sequence[pl.LazyFrame], on_pending: OnPending) -> bool:
    """Drive the plans to their end and keep nothing; False if answers are still to come."""

    def run() -> None:
        pl.collect_all(
            [lf.sink_batches(_drop, lazy=True, engine="streaming") for lf in plans], engine="streaming"
        )

    return _driven(run, plans, on_pending)[1]


def _drop(_: pl.DataFrame) -> None:
    return None


def drive(run: Callable[[], T], plans: Sequence[pl.LazyFrame], on_pending: OnPending) -> T:
    """Run something that evaluates `plans`, again and again until no answer is missing.

    Parameters
    ----------
    run
        Evaluates the plans on this thread.
    plans
        What it evaluates.
    on_pending
        ``"wait"`` stays to the end; ``"raise"`` sends what can be sent and raises; ``"null"`` sends it and
        gives what is there.

    Raises
    ------
    JobsPending
        With ``"raise"``, while answers are missing.
    RequestsFailed
        A verb has ``on_error="raise"`` and a request of it failed for good.
    UnansweredInput
        The plan asks for other rows each time that it runs.
    """
    return _driven(run, plans, on_pending)[0]


def _driven(run: Callable[[], T], plans: Sequence[pl.LazyFrame], on_pending: OnPending) -> tuple[T, bool]:
    asked: collections.Counter[int] = collections.Counter()
    asked_in_part: collections.Counter[int] = collections.Counter()
    again, retries = False, 0
    before: list[Wanted] = []
    while True:
        staged = Staged(again=again, strict=any(_writes(lf) for lf in plans))
        result, complete = _one_pass(run, plans, staged)
        if complete:
            _report(staged)
            return result, True  # type: ignore[return-value]  # a complete pass has a result
        asked.update(staged.places - staged.blocked)
        asked_in_part.update(staged.places & staged.blocked)
        # An answer that does not fit its schema is asked again in the next pass.
        retries = max([retries, *(verb.typed.retries for verb, _ in staged.wanted if verb.typed)])
        too_often = max(asked.values(), default=0) > _MOST_PASSES + retries
        if not staged.wanted or too_often or max(asked_in_part.values(), default=0) > _MOST_IN_PART:
            raise never_ends(staged.wanted)
        pending = _bring(staged.wanted, on_pending, before)
        before += [(v, r.keys_only()) for v, r in staged.wanted if v.policy.max_cost is not None]
        if pending is not None and pending[0].jobs:
            if on_pending == "raise":
                raise pending[0].error(pending[1])
            _report(staged)
            return result, False  # type: ignore[return-value]  # nothing writes with "null"
        again = True


def _one_pass(run: Callable[[], T], plans: Sequence[pl.LazyFrame], staged: Staged) -> tuple[T | None, bool]:
    deadline = time.monotonic() + _PATIENCE_S
    with contextlib.ExitStack() as turn:
        while True:
            root = Scope(staged=staged)
            try:
                with root.planning(*plans):
                    return run(), root.complete
            except Missing:
                return None, False
            except Contended:
                # Another thread evaluates the same frame just now, and is told the same.
                if time.monotonic() > deadline:
                    raise
                staged.forget()
                turn.close()
                time.sleep(random.uniform(0.02, 0.1))
                turn.enter_context(_turns)
            finally:
                root.close()


def _finally(run: Callable[[], T], plans: Sequence[pl.LazyFrame]) -> T:
    """One more pass of what was driven to its end; anything missing now is an error."""
    root = Scope(staged=Staged(again=True, final=True))
    try:
        with root.planning(*plans):
            return run()
    finally:
        root.close()


def _writes(lf: pl.LazyFrame) -> bool:
    """A sink as a plan: it must not write rows whose answers are missing."""
    return lf.explain(optimized=False).lstrip().startswith("SINK")


def _bring(
    wanted: Sequence[Wanted], on_pending: OnPending, before: Sequence[Wanted]
) -> tuple[Pending, float] | None:
    """Send everything, then wait for everything; what is pending after that, and when to look again.

    What earlier passes asked, `before`, counts against the same max_cost.
    """
    groups: dict[Any, list[Wanted]] = {}
    for verb, requests in wanted:
        groups.setdefault((verb.cache, verb.policy), []).append((verb, requests))
    paid = {id(group): spent(group[0][0], before) for group in groups.values()}
    _check_money(list(groups.values()), paid)
    last: list[Pending] = []
    sent = 0
    for wait in (False, True) if on_pending == "wait" else (False,):
        last = []
        for group in groups.values():
            verb = group[0][0]
            # What failed while it was sent has failed in this evaluation, and is not retried by waiting.
            policy = dataclasses.replace(verb.policy, wait=wait, spent=paid[id(group)])
            policy = dataclasses.replace(policy, retry_failed=policy.retry_failed and not wait)
            pending = evaluate(needs(group), verb.store, policy)
            sent += pending.sent
            if pending.jobs:
                last.append(pending)
        if not last:
            return None
    together = Pending(
        held=pl.concat([p.held for p in last]).unique("key"),
        jobs=list({job.id: job for p in last for job in p.jobs}.values()),
        sent=sent,
    )
    return together, min(verb.policy.poll_interval for verb, _ in wanted)


def _check_money(groups: Sequence[Sequence[Wanted]], paid: Mapping[int, float | None]) -> None:
    """Refuse before anything of any group is sent."""
    for group in groups:
        verb = group[0][0]
        check_money(needs(group), verb.store, dataclasses.replace(verb.policy, spent=paid[id(group)]))
    if len(groups) > 1:  # the limit of the cache is for all of them together
        by_cache: dict[Any, list[Wanted]] = {}
        for group in groups:
            by_cache.setdefault(group[0][0].cache, []).extend(group)
        for wanted in by_cache.values():
            verb = wanted[0][0]
            check_money(needs(wanted), verb.store, dataclasses.replace(verb.policy, max_cost=None))


def _report(staged: Staged) -> None:
    """Failures of all verbs, each verb once however many parts of its column were asked."""
    by_verb: dict[int, tuple[Any, list[Failures]]] = {}
    for verb, failures in staged.failures:
        by_verb.setdefault(id(verb), (verb, []))[1].append(failures)
    for verb, parts in by_verb.values():
        Failures.together(parts).report(verb.on_error)


# --- the engine ---------------------------------------------------------------------------------------


class _Settled(threading.local):
    now = False


_settled = _Settled()


@contextlib.contextmanager
def _settling() -> Iterator[None]:
    """Within, `Engine.collect` on this thread runs a plan that was driven to its end already."""
    _settled.now = True
    try:
        yield
    finally:
        _settled.now = False


# Not there in another Polars: then `Engine` says so when it is made, and everything else goes on.
_StreamingEngine: Any = getattr(pl, "StreamingEngine", object)


class Engine(_StreamingEngine):  # type: ignore[misc]  # a class of Any
    """Polars' streaming engine, which answers the LLM verbs of a query together.

    It runs the plan, sends all requests that any verb is missing as one job for each model, waits on the
    thread that collects (Ctrl+C stops the waiting, not the jobs) and runs the plan again, until nothing is
    missing: a verb that reads another one's answers is asked in the next round. Queries without a verb run
    as on `polars.StreamingEngine`.

    Parameters
    ----------
    on_pending
        ``"wait"`` (default) stays until everything is answered. ``"raise"`` sends what can be sent and
        raises `JobsPending`. ``"null"`` sends it and gives what is there. It takes the place of what the
        verbs say.

    Raises
    ------
    InvalidRequest
        At call: another value, or a Polars that has no such engines.

    Examples
    --------
    >>> import polars as pl
    >>> import polars_llm as pllm
    >>> with pl.Config() as config:
    ...     _ = config.set_engine_affinity(pllm.Engine())
    ...     pl.LazyFrame({"n": [1, 2]}).sum().collect().item()
    3

    Notes
    -----
    In ``collect(background=True)`` and ``collect_batches`` rows come when this engine has done its part: with
    ``on_pending="null"`` they raise `JobsPending` while answers are missing.

    While it is the active affinity, expressions are built with ``pushdown=True``. `polars.Engine` is an
    interface that Polars may change; ``lf.llm.collect()`` does the same and does not use it.
    """

    def __init__(self, *, on_pending: OnPending = "wait") -> None:
        if _StreamingEngine is object:
            raise InvalidRequest(
                f"Polars {pl.__version__} has no polars.StreamingEngine to build on",
                hint="lf.llm.collect() does the same without it. Nothing was sent.",
            )
        super().__init__()
        _check_on_pending(on_pending)
        self.on_pending = on_pending

    def __repr__(self) -> str:
        return f"Engine(on_pending={self.on_pending!r})"

    def collect(self, lf: pl.LazyFrame, *, background: bool = False, **options: Any) -> Any:
        """See `LazyFrame.collect`."""
        run = super().collect
        if _settled.now:
            return _finally(lambda: run(lf, background=False, **options), [lf])
        if background:
            settle([lf], self.on_pending)
            return run(lf, background=True, **options)
        return drive(lambda: run(lf, background=False, **options), [lf], self.on_pending)

    def collect_all(self, lfs: Iterable[pl.LazyFrame], **options: Any) -> list[pl.DataFrame]:
        """See `polars.collect_all`."""
        plans, run = list(lfs), super().collect_all
        return drive(lambda: run(plans, **options), plans, self.on_pending)

    def collect_async(self, lf: pl.LazyFrame, *, gevent: bool = False, **options: Any) -> Any:
        """See `LazyFrame.collect_async`."""
        return self._in_thread(lambda: self.collect(lf, **options), gevent)

    def collect_all_async(self, lfs: Iterable[pl.LazyFrame], *, gevent: bool = False, **options: Any) -> Any:
        """See `polars.collect_all_async`."""
        return self._in_thread(lambda: self.collect_all(lfs, **options), gevent)

    def collect_batches(self, lf: pl.LazyFrame, *, lazy: bool = False, **options: Any) -> Any:
        """See `LazyFrame.collect_batches`."""
        run = super().collect_batches
        batches = _Batches(lambda: (settle([lf], self.on_pending), run(lf, lazy=lazy, **options))[1])
        if not lazy:
            batches.start()
        return batches

    def sink_parquet(self, lf: pl.LazyFrame, *target: Any, **options: Any) -> None:
        """See `LazyFrame.sink_parquet`."""
        self._sink(lf, lambda: super(Engine, self).sink_parquet(lf, *target, **options))

    def sink_ipc(self, lf: pl.LazyFrame, *target: Any, **options: Any) -> None:
        """See `LazyFrame.sink_ipc`."""
        self._sink(lf, lambda: super(Engine, self).sink_ipc(lf, *target, **options))

    def sink_csv(self, lf: pl.LazyFrame, *target: Any, **options: Any) -> None:
        """See `LazyFrame.sink_csv`."""
        self._sink(lf, lambda: super(Engine, self).sink_csv(lf, *target, **options))

    def sink_ndjson(self, lf: pl.LazyFrame, *target: Any, **options: Any) -> None:
        """See `LazyFrame.sink_ndjson`."""
        self._sink(lf, lambda: super(Engine, self).sink_ndjson(lf, *target, **options))

    def sink_batches(self, lf: pl.LazyFrame, *target: Any, **options: Any) -> None:
        """See `LazyFrame.sink_batches`."""
        self._sink(lf, lambda: super(Engine, self).sink_batches(lf, *target, **options))

    def _sink(self, lf: pl.LazyFrame, write: Callable[[], None]) -> None:
        def settled() -> None:
            with _settling():
                write()

        sink(lf, settled, self.on_pending)

    def _in_thread(self, run: Callable[[], T], gevent: bool) -> Awaitable[T]:
        if gevent:
            raise NotImplementedError(
                "pllm.Engine does not run under gevent.\n\nHint: collect with engine='streaming', or use"
                " asyncio. Nothing was sent."
            )
        return _awaited(run)


def _awaited(run: Callable[[], T]) -> Awaitable[T]:
    """Run it on a thread of its own; who cancels it stops its waiting, and not its jobs."""
    import asyncio  # here and not above: `import polars_llm` stays quick
    from concurrent.futures import Future, InvalidStateError

    # Not the loop's executor: its few threads are everyone's, and waiting may take a day. And
    # `asyncio.run` waits for them to end, also after Ctrl+C.
    ended: Future[T] = Future()
    stop = threading.Event()
    ended.add_done_callback(lambda _: stop.set())

    def work() -> None:
        with contextlib.suppress(InvalidStateError):  # cancelled: nobody waits for it
            try:
                with stopped_by(stop):
                    result = run()
            except BaseException as error:  # noqa: BLE001  # raised where it is awaited
                ended.set_exception(error)
            else:
                ended.set_result(result)

    threading.Thread(target=work, name="polars_llm-async", daemon=True).start()
    return asyncio.wrap_future(ended)


class _Batches:
    """What `collect_batches` gives: batches that are made when the first is asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None

    def start(self) -> Any:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return self

    def __next__(self) -> pl.DataFrame:
        batch: pl.DataFrame = next(self.start())
        return batch

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self.start().__arrow_c_stream__(requested_schema)


def pushdown(asked: bool | None) -> bool | None:
    """How an expression is built: as the user says, else pushed while our engine is the affinity (None)."""
    return asked if asked is not None else None if _is_active() else False


def _is_active() -> bool:
    """Is our engine what plain collects of this process use?"""
    try:
        # `pl.Config.state` names engines given by name only.
        from polars.lazyframe.engine_config import get_engine_affinity_override
    except ImportError:
        return False
    return isinstance(get_engine_affinity_override(), Engine)
