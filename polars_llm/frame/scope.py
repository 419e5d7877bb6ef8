"""One evaluation of a plan, as the verbs in it see it: who drives it, and what it left unanswered.

Polars tells a function neither which query it is called for nor by whom, and its worker threads know no
context. What can be known: whenever a plan is about to run or to be described, Polars asks every IO source
for its schema, on the thread that asked; whole-column expressions and main-thread nodes are called on the
thread that collects; and an expression can carry a mark that shows in `LazyFrame.explain`. So each verb in a
plan is an `Occurrence`, which finds the `Scope` of the evaluation that it is called for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import polars as pl

from polars_llm.errors import UnansweredInput
from polars_llm.frame.calls import at_work, collected, collecting, evaluation, is_of_polars

if TYPE_CHECKING:
    from polars_llm.frame.column import Failures
    from polars_llm.frame.verbs import Verb
    from polars_llm.request import Requests

__all__ = ["Contended", "Missing", "Occurrence", "Scope", "Staged", "inside", "mark"]


class Contended(UnansweredInput):
    """The same frame is evaluated on two threads, and driven on one of them."""


class Missing(UnansweredInput):
    """Ends a pass of a plan that writes."""


@dataclasses.dataclass(slots=True)
class Staged:
    """What the verbs of a driven pass want to send, instead of sending it.

    Parameters
    ----------
    again
        It is not the first pass: what has failed by now has failed in this evaluation.
    final
        Nothing may be missing any more; where something is, the verb raises `UnansweredInput`.
    strict
        The plan writes: the first verb that misses something raises `Missing` once it has said what.
    wanted, places
        What is to be sent, and the verbs that want it, by identity.
    blocked
        Verbs that said nothing of some rows, because they may read what is unanswered.
    failures
        What to report when the evaluation is over.
    """

    again: bool = False
    final: bool = False
    strict: bool = False
    wanted: list[tuple[Verb, Requests]] = dataclasses.field(default_factory=list)
    places: set[int] = dataclasses.field(default_factory=set)
    blocked: set[int] = dataclasses.field(default_factory=set)
    failures: list[tuple[Verb, Failures]] = dataclasses.field(default_factory=list)
    lock: threading.RLock = dataclasses.field(default_factory=threading.RLock)

    def want(self, place: Occurrence, wanted: Sequence[tuple[Verb, Requests]]) -> None:
        """These have no answer; they are sent when the pass is over."""
        with self.lock:
            self.places.add(id(place))
            self.wanted.extend(wanted)

    def block(self, place: Occurrence) -> None:
        """The verb sends nothing for some rows in this pass."""
        with self.lock:
            self.blocked.add(id(place))

    def forget(self) -> None:
        """The pass begins anew."""
        with self.lock:
            self.wanted.clear()
            self.failures.clear()
            self.places.clear()
            self.blocked.clear()

    def failed(self, verb: Verb, failures: Failures) -> None:
        """Reported when the last pass is over, on the thread that collects."""
        with self.lock:
            self.failures.append((verb, failures))


class Scope:
    """One evaluation of a plan; `outer` are those that it is a part of."""

    told = True
    """Calls are known to belong to it."""

    def __init__(
        self, outer: Sequence[Scope] = (), staged: Staged | None = None, thread: int | None = None
    ) -> None:
        self.staged = staged
        # On which it is driven: parts of it run on others.
        self.thread: int = thread or (outer[0].thread if outer else threading.get_ident())
        self._outer = tuple(outer)
        self._joined: list[Occurrence] = []
        self._parts: list[Scope] = []
        if staged is not None:
            for scope in outer:
                scope._parts.append(self)
        self._unanswered: set[Occurrence] = set()
        self._in_parts: set[Occurrence] = set()  # of these, what parts of this evaluation left unanswered
        self._side_by_side: list[set[Occurrence]] = []
        self._plans: list[dict[Occurrence, tuple[int, int]]] = []

    @property
    def complete(self) -> bool:
        """Nothing was left unanswered."""
        return not self._unanswered

    def note(self, verb: Occurrence, *, answered: bool) -> None:
        """What a verb gave here is all it will give, or some of it only stands for answers to come."""
        # Within one evaluation one part of a column (a group) may be answered and another one not.
        if not answered:
            self._unanswered.add(verb)
        for scope in self._outer:
            scope.note_part(verb, answered=answered)

    def note_part(self, verb: Occurrence, *, answered: bool) -> None:
        """The same, of a part of this evaluation."""
        if not answered:
            self._in_parts.add(verb)
            self.note(verb, answered=False)

    def blocks(self, verb: Occurrence) -> bool:
        """May the verb read what another one left unanswered? It may unless the plan shows otherwise."""
        others = self._unanswered - {verb}
        for beside in self._side_by_side:
            if verb in beside:
                others -= beside - verb.inner
        return any(other in self._in_parts or not self._stands_above(other, verb) for other in others)

    def _stands_above(self, other: Occurrence, verb: Occurrence) -> bool:
        """Does the verb certainly not read the other one's answers? A plan is told from the top down."""
        both = [at for at in self._plans if other in at and verb in at]
        return (
            len(both) == 1
            and sum(other in at or verb in at for at in self._plans) == 1
            and both[0][other][1] < both[0][verb][0]
            and other not in verb.inner
        )

    @contextlib.contextmanager
    def planning(self, *plans: pl.LazyFrame) -> Iterator[None]:
        """Plans that this thread makes within belong to this evaluation."""
        before = _here.scope
        _here.scope = self
        try:
            self._find_expressions(plans)
            yield
        finally:
            _here.scope = before

    def close(self) -> None:
        """It is over, and its parts with it: its verbs no longer take part in it."""
        # A part that was cut off is never finished by whoever began it.
        for part in self._parts:
            part.close()
        for verb in self._joined:
            verb.leave(self)
        self._joined.clear()

    def join(self, verb: Occurrence) -> None:
        """The verb takes part in this evaluation."""
        if verb not in self._joined:
            self._joined.append(verb)

    def _find_expressions(self, plans: Sequence[pl.LazyFrame]) -> None:
        if not _marked:
            return  # nobody ever made one: plans without any verb cost nothing
        for plan in plans:
            at: dict[Occurrence, tuple[int, int]] = {}  # the first and the last line of each
            for number, line in enumerate(plan.explain(optimized=False).splitlines()):
                verbs = {_marked[m] for m in _MARK.findall(line) if m in _marked}
                for verb in verbs:
                    verb.join(self)
                    at[verb] = (at.get(verb, (number, number))[0], number)
                if len(verbs) > 1:  # expressions of one node
                    self._side_by_side.append(verbs)
            self._plans.append(at)


class _Background(Scope):
    """All plain evaluations that Polars runs in the background: nothing there tells them apart.

    A verb that is called for one of them may read what any of them left unanswered, as long as that plan
    lives. Polars may drop a part of a plan that it has run while the rest still runs: then those may read it
    that were there by then.
    """

    told = False

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[weakref.ref[Occurrence], _Left] = {}

    @property
    def complete(self) -> bool:
        """Nothing is left unanswered."""
        return not any(at() for at in tuple(self._waiting))

    def note(self, verb: Occurrence, *, answered: bool) -> None:
        """What the verb gave is all it will give, or not.

        One evaluation may read a source twice, and have answers from one part of it only: that it has them
        counts from the next time on that the plan is about to run.
        """
        at = weakref.ref(verb)
        left = self._waiting.get(at)
        if not answered:
            self._waiting[at] = _Left(verb.times_planned, _marked.valuerefs())
            for known, of_known in tuple(self._waiting.items()):
                if known() is None and of_known.is_over():
                    self._waiting.pop(known, None)
        elif left is not None and not (verb.times_planned and left.times_planned == verb.times_planned):
            self._waiting.pop(at, None)

    def note_part(self, verb: Occurrence, *, answered: bool) -> None:
        """The same."""
        self.note(verb, answered=answered)

    def blocks(self, verb: Occurrence) -> bool:
        """May the verb read what another one left unanswered?"""
        return any(
            left.may_be_read_by(verb) if (other := at()) is None else other is not verb
            for at, left in tuple(self._waiting.items())
        )


# Longer than Polars is at work on the rest of a plan. An expression may live on, and be used in other plans:
# those it holds up for as long.
_AFTERLIFE_S = 600.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Left:
    """What a verb in the background left unanswered.

    Parameters
    ----------
    times_planned
        How often the verb's plan had been about to run.
    readers
        The expressions that there were: those of the same plan are among them.
    """

    times_planned: int
    readers: Sequence[weakref.ref[Occurrence]]
    since: float = dataclasses.field(default_factory=time.monotonic)

    def may_be_read_by(self, verb: Occurrence) -> bool:
        """Though the verb that left it is gone?"""
        return not self.is_over() and any(at() is verb for at in self.readers)

    def is_over(self) -> bool:
        return time.monotonic() - self.since > _AFTERLIFE_S or all(at() is None for at in self.readers)


class _Here(threading.local):
    scope: Scope | None = None


_here = _Here()
_background = _Background()


def _plain() -> Scope:
    """The scope of the plain evaluation on this thread."""
    collect = collecting()
    return _background if collect is None else _scope_of(collect)


# A name that the call's frame does not use is kept beside its own, as long as it runs (PEP 667). The frame's
# id tells less: the next call of the same line may have it again.
_SCOPE = "__pllm_scope"


def _scope_of(collect: FrameType) -> Scope:
    """The scope of the plain evaluation that this call is: it lives and ends with it."""
    scope: Scope = collect.f_locals.setdefault(_SCOPE, Scope())
    return scope


class Occurrence:
    """One verb, or several side by side, at one place of a plan.

    Parameters
    ----------
    inner
        Expressions that it reads: occurrences whose answers are its input.
    """

    def __init__(self, inner: frozenset[Occurrence] = frozenset()) -> None:
        self.inner = inner
        self.mark: str | None = None
        self.times_planned = 0
        self._in_background = False
        self._scopes: list[Scope] = []
        self._planned: dict[int, tuple[tuple[int, int], Scope]] = {}
        # Re-entrant: a generator that the garbage collector closes may come in between, and leave.
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # another process has evaluations of its own

    def planned(self) -> None:
        """Polars asks for the schema: the plan is about to run, or to be described."""
        if _here.scope is not None:
            self.join(_here.scope)
            return
        self.times_planned += 1
        collect = collecting()
        if collect is None or collect.f_locals.get("background"):
            # A thread of Polars, at work on something that was planned before; or it will be one.
            self._in_background |= collect is not None or is_of_polars(threading.current_thread())
            return
        with self._lock:
            self._planned = {t: p for t, p in self._planned.items() if at_work(t, p[0])}
            self._planned[threading.get_ident()] = (evaluation(collect), _plain())

    def scopes(self) -> list[Scope]:
        """The evaluations that a call may belong to; at least one.

        Raises
        ------
        Contended
            It may belong to a driven evaluation, or to a plain one on another thread.
        """
        if _here.scope is not None or collecting() is not None:  # on the thread that collects
            return [_here.scope or _plain()]
        with self._lock:
            scopes = list(self._scopes)
            planned = dict(self._planned)
        if not scopes:
            # What was planned on a thread that has gone on since tells nothing of this call.
            told = [scope for thread, (at, scope) in planned.items() if at_work(thread, at)]
            told = told or self._of_collected()
            return [*told, *([_background] if self._in_background else [])] or [_plain()]
        driven = {scope.thread for scope in scopes if scope.staged is not None}
        if len(driven) > 1:
            raise Contended(
                "This frame is being driven to its end on two threads.",
                hint="run the same line again when the other one is done. Nothing was sent by this one.",
            )
        plain = any(t not in driven and at_work(t, at) for t, (at, _) in planned.items())
        if driven and (plain or self._collected_elsewhere(driven)):
            raise Contended(
                "This frame is being driven to its end on one thread and evaluated on another.",
                hint="run the same line again when the other one is done. Nothing was sent by this one.",
            )
        return scopes

    def _of_collected(self) -> list[Scope]:
        """Of plain evaluations whose plan shows this expression: groups are called on other threads."""
        calls = [] if self.mark is None else [collect for _, collect in collected(self.mark)]
        # A call that collects in the background returns at once: some expressions would find it, others not.
        return [_scope_of(collect) for collect in calls if not collect.f_locals.get("background")]

    def _collected_elsewhere(self, driven: set[int]) -> bool:
        return self.mark is not None and any(thread not in driven for thread, _ in collected(self.mark))

    @property
    def on_collecting_thread(self) -> bool:
        """Is this call one on the thread that collects, and therefore for all rows?"""
        return collecting() is not None

    def join(self, scope: Scope) -> None:
        """Take part in an evaluation, until it is closed."""
        with self._lock:
            if scope not in self._scopes:
                self._scopes.append(scope)
            self._planned.pop(threading.get_ident(), None)  # this thread can't be collecting plainly, too
        scope.join(self)

    def leave(self, scope: Scope) -> None:
        """The evaluation is over."""
        with self._lock:
            if scope in self._scopes:
                self._scopes.remove(scope)


# --- expressions --------------------------------------------------------------------------------------

_MARK = re.compile(r"__pllm_at_([0-9a-f]{16})")
_marked: weakref.WeakValueDictionary[str, Occurrence] = weakref.WeakValueDictionary()


def mark(verb: Occurrence) -> str:
    """A column's name by which the occurrence of an expression is found in a plan."""
    token = secrets.token_hex(8)
    _marked[token] = verb
    verb.mark = f"__pllm_at_{token}"
    return verb.mark


def inside(expr: pl.Expr) -> frozenset[Occurrence]:
    """The occurrences that an expression reads."""
    if not _marked:
        return frozenset()
    return frozenset(_marked[m] for m in _MARK.findall(str(expr)) if m in _marked)
