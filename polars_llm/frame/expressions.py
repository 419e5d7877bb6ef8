"""A verb as an expression: on the whole column, or, with ``pushdown=True``, on any part of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import polars as pl

from polars_llm.errors import InvalidRequest, PolarsLLMError, UnansweredInput
from polars_llm.frame.asking import Asked, InPlan
from polars_llm.frame.calls import grouped
from polars_llm.frame.column import warn
from polars_llm.frame.scope import Occurrence, inside, mark
from polars_llm.frame.sending import Wanted
from polars_llm.frame.verbs import Verb
from polars_llm.jobs.evaluate import Pending

__all__ = ["expression"]


def expression(verb: Verb, *, pushdown: bool | None) -> pl.Expr:
    """The verb as an expression: on the whole column, or, with `pushdown`, on what of it is needed.

    None is pushed, for a driven evaluation; where it is called for a whole column plainly, it sends.
    """
    read = verb.inputs()
    if any(e.meta.has_multiple_outputs() for e in read):
        raise InvalidRequest(
            "A verb as an expression asks one column at a time",
            hint="call it for each column, or build one prompt with pl.format. Nothing was sent.",
        )
    own = [e.meta.output_name() for e in read]
    place = Occurrence(frozenset().union(*(inside(e) for e in read)))
    at = mark(place)
    whole = functools.partial(_whole, at=at)
    ask = (
        whole if pushdown is False else functools.partial(_pushed, whole=whole if pushdown is None else None)
    )

    def call(rows: pl.Series) -> pl.Series:
        with _rebuilt():
            frame = rows.struct.unnest()
            frame.columns = own  # without a plan, in which others would find the mark
            return ask(frame, verb, place)

    # The occurrence is found by its mark, which is the name of the first input.
    fields = pl.struct(read[0].alias(at), *read[1:])
    made = fields.map_batches(call, return_dtype=verb.dtype, is_elementwise=pushdown is not False)
    return made.alias(verb.name)


def _whole(rows: pl.DataFrame, verb: Verb, place: Occurrence, *, at: str) -> pl.Series:
    here = InPlan(place)
    verb = here.policy_of(verb)

    def decide(wanted: Sequence[Wanted]) -> Pending | None:
        if here.staged is None and not here.blocked and grouped(at):
            warn(
                f"{verb.name!r} stands in a group_by or an over: each group is a job of its own.\n\n"
                "Hint: build the prompts in the group_by and ask afterwards, or make the expression with"
                " pushdown=True and collect with lf.llm.collect()."
            )
        return here.decide(wanted)

    asked = Asked(verb, rows)
    requests = asked.missing()
    pending = decide([(verb, requests)]) if requests is not None else None
    if requests is None:
        here.done()
    else:
        asked.look_again()
    return _expressed(asked, pending, here)


def _pushed(
    rows: pl.DataFrame,
    verb: Verb,
    place: Occurrence,
    *,
    whole: Callable[[pl.DataFrame, Verb, Occurrence], pl.Series] | None,
) -> pl.Series:
    """Some rows, on any thread: nothing is sent, unless it is the `whole` column of a plain call."""
    here = InPlan(place)
    if whole is not None and here.staged is None and place.on_collecting_thread:
        return whole(rows, verb, place)
    asked = Asked(here.policy_of(verb), rows)
    requests = asked.missing()
    if requests is not None:
        if here.staged is None:
            why = "" if whole is None else " (pllm.Engine was the affinity)"
            raise UnansweredInput(
                f"{verb.name!r} was built with pushdown{why}, and {requests.height:,} or more of its"
                " requests have no answer.",
                hint="lf.llm.collect(), or collect(engine=pllm.Engine()), sends them together; of an eager"
                " frame df.lazy() makes a lazy one. Nothing was sent.",
            )
        if here.staged.strict:
            # Rows go on as soon as this returns, and others may have been written; to stop at the first part
            # of a column would send it in as many jobs as Polars makes parts.
            raise UnansweredInput(
                f"{verb.name!r} was built with pushdown, in a sink that is part of a plan (lazy=True), and"
                f" {requests.height:,} or more of its requests have no answer.",
                hint="call the sink without lazy=True, or collect first (lf.llm.collect()): both send them"
                " together. Nothing was sent for it.",
            )
        here.decide([(verb, requests)])
    return _expressed(asked, None, here)


def _expressed(asked: Asked, pending: Pending | None, here: InPlan) -> pl.Series:
    failures = asked.verb.failures()
    failures.count(asked.found, pending)
    if here.staged is None:
        failures.report(asked.verb.on_error)
    else:
        here.staged.failed(asked.verb, failures)
    return asked.verb.lay(asked.found, asked.rows, pending)


class _rebuilt:  # noqa: N801
    """Make our exceptions survive Polars, which rebuilds them as ``type(e)(message)``.

    The facts ride on a class made for this one exception, whose constructor puts them back.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, PolarsLLMError):
            return
        base, facts, message = type(error), dict(error.__dict__), error.args[0]

        def restore(self: PolarsLLMError, *_: object) -> None:
            Exception.__init__(self, message)
            self.__dict__.update(facts)

        def reduce(_: PolarsLLMError) -> tuple[Any, ...]:
            return base, (message,), facts

        names = {"__init__": restore, "__reduce__": reduce, "__module__": base.__module__}
        survivor = type(base.__name__, (base,), {**names, "__qualname__": base.__qualname__})
        raise survivor(message) from error
