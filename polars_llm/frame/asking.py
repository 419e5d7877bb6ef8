"""The rows of a verb, looked up, and what is done about those that have no answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import polars as pl

from polars_llm.errors import UnansweredInput
from polars_llm.frame.scope import Missing, Occurrence, Scope, Staged
from polars_llm.frame.sending import Wanted, bring
from polars_llm.frame.verbs import Verb
from polars_llm.jobs.evaluate import Pending
from polars_llm.jobs.lookup import unanswered
from polars_llm.request import Requests

__all__ = ["Asked", "InPlan", "answers", "never_ends"]


def answers(
    asked: Sequence[Asked], decide: Callable[[Sequence[Wanted]], Pending | None], staged: Staged | None
) -> list[pl.Series]:
    """The columns of verbs side by side."""
    wanted = [(a.verb, requests) for a in asked if (requests := a.missing()) is not None]
    pending = decide(wanted) if wanted else None
    columns = []
    for a in asked:
        if wanted:
            a.look_again()
        failures = a.verb.failures()
        failures.count(a.found, pending)
        if staged is None:
            failures.report(a.verb.on_error)
        else:
            staged.failed(a.verb, failures)
        columns.append(a.verb.lay(a.found, a.rows, pending))
    return columns


class Asked:
    """Rows of one verb, looked up."""

    def __init__(self, verb: Verb, rows: pl.DataFrame) -> None:
        self.verb = verb
        self.rows = verb.checked(rows)
        self._keys = verb.keys(self.rows)
        self.look_again()

    def look_again(self) -> None:
        self.found = self.verb.find(self.rows, self._keys)

    def missing(self) -> Requests | None:
        if unanswered(self.found, self.verb.policy).is_empty():
            return None
        return self.verb.requests(self.rows, self.found)


class InPlan:
    """Verbs at one place of a plan, in one evaluation of it.

    Parameters
    ----------
    verb
        The place.
    upstream
        The evaluation of what they read, where that is one of its own.
    """

    def __init__(self, verb: Occurrence, upstream: bool = False) -> None:
        self._verb = verb
        self._scopes = verb.scopes()
        self.staged: Staged | None = next((s.staged for s in self._scopes if s.staged is not None), None)
        self.upstream = Scope(self._scopes, self.staged) if upstream else None

    def policy_of(self, verb: Verb) -> Verb:
        """In a later pass nothing is retried that failed in an earlier one."""
        return verb.once() if self.staged is not None and self.staged.again else verb

    @property
    def blocked(self) -> bool:
        """Do they read, or may they read, an answer that is still to come?"""
        if self.upstream is not None:
            return not self.upstream.complete
        return any(scope.blocks(self._verb) for scope in self._scopes)

    def decide(self, wanted: Sequence[Wanted]) -> Pending | None:
        """Send what is missing, leave that to the driver, or leave it altogether."""
        if self.staged is not None:
            self._stage(wanted, self.staged)
            return None
        if self._untold and any(verb.on_pending == "null" for verb, _ in wanted):
            raise _untold_input(wanted)
        if self.blocked:
            self._note(answered=False)
            if any(verb.on_pending == "raise" for verb, _ in wanted):
                raise _unanswered_input(wanted, "may read" if self._untold else "reads")
            return None
        pending = bring(wanted)
        self._note(answered=not pending.jobs)
        return pending

    @property
    def _untold(self) -> bool:
        """Does nothing tell which evaluation it is, and so what they read?"""
        return self.upstream is None and not any(scope.told for scope in self._scopes)

    def want(self, wanted: Sequence[Wanted]) -> None:
        """Tell the driver what is missing."""
        if wanted and self.staged is not None:
            self.staged.want(self._verb, wanted)

    def done(self) -> None:
        """Every row was answered; they may still have been asked with an input that was not."""
        self._note(answered=self.upstream is None or self.upstream.complete)

    def _stage(self, wanted: Sequence[Wanted], staged: Staged) -> None:
        if staged.final:
            raise never_ends(wanted)
        if self.blocked:
            staged.block(self._verb)
        else:
            staged.want(self._verb, wanted)
        self._note(answered=False)
        if staged.strict:
            raise Missing("answers are missing")

    def _note(self, *, answered: bool) -> None:
        for scope in self._scopes:
            scope.note(self._verb, answered=answered)

    def close(self) -> None:
        """The evaluation of what they read is over."""
        if self.upstream is not None:
            self.upstream.close()


def _unanswered_input(wanted: Sequence[Wanted], reads: str) -> UnansweredInput:
    names = ", ".join(repr(verb.name) for verb, _ in wanted)
    return UnansweredInput(
        f"{names} {reads} answers that are not there yet.",
        hint="run the same line again later, or lf.llm.collect(), which waits for one after the other."
        " Nothing was sent for it.",
    )


def _untold_input(wanted: Sequence[Wanted]) -> UnansweredInput:
    names = ", ".join(repr(verb.name) for verb, _ in wanted)
    return UnansweredInput(
        f"{names} is an expression with on_pending='null' in a query that runs in the background: whether it"
        " reads answers that are not there yet cannot be known.",
        hint="leave on_pending out, ask on the frame (lf.llm.generate(...)), or collect with"
        " lf.llm.collect(). Nothing was sent for it.",
    )


def never_ends(wanted: Sequence[Wanted]) -> UnansweredInput:
    """The error for a plan that can't be driven to its end."""
    names = ", ".join(sorted({repr(verb.name) for verb, _ in wanted})) or "A verb"
    return UnansweredInput(
        f"{names} asks for other rows in every evaluation: the plan samples, or its input changes.",
        hint="collect what it reads first, then ask. What was sent is kept and not paid for again.",
    )
