"""How a verb lives in a plan: direct on a frame, a streaming source, a main-thread node, an expression.

- A DataFrame or Series calls the heart directly: main thread, exceptions and Ctrl+C whole.
- A LazyFrame verb is an IO source of its own (`source`): filters, columns and limits that do not read
  the answer go below it, rows stream through it, and the plan can be described without running.
- Where it may take long (``on_pending="wait"``) it is a `LazyFrame.map_batches` (`on_main_thread`),
  which both engines call on the main thread, so that Ctrl+C works.
- An expression (`expression`) sees the whole column.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from polars_llm.errors import PolarsLLMError
from polars_llm.frame.verbs import PROMPT, SAMPLE, SYSTEM, Verb, checked
from polars_llm.jobs.evaluate import Pending
from polars_llm.jobs.lookup import unanswered
from polars_llm.request import Requests

__all__ = ["expression", "lazily", "on_frame", "on_series"]

_OURS = (PROMPT, SYSTEM, SAMPLE)


def on_frame(frame: pl.DataFrame, verb: Verb) -> pl.DataFrame:
    """The frame with the answers as a column."""
    return frame.with_columns(verb.answer(_inputs(frame, verb)))


def on_series(series: pl.Series, verb: Verb) -> pl.Series:
    """The answers to a series of prompts."""
    return verb.answer(series.alias(PROMPT).to_frame())


def _inputs(frame: pl.DataFrame, verb: Verb) -> pl.DataFrame:
    # with_columns first: a literal prompt is broadcast to the height of the frame.
    read = verb.inputs()
    return frame.with_columns(read).select(e.meta.output_name() for e in read)


def lazily(lf: pl.LazyFrame, verb: Verb) -> pl.LazyFrame:
    """The lazy frame with the answers as a column; nothing runs now."""
    return on_main_thread(lf, verb) if verb.on_pending == "wait" else source(lf, verb)


def on_main_thread(lf: pl.LazyFrame, verb: Verb) -> pl.LazyFrame:
    """A node that both engines call once, on the main thread, with the whole frame."""

    def call(frame: pl.DataFrame) -> pl.DataFrame:
        return on_frame(frame, verb)

    # Filters may only pass below where the answer is a new column: Polars would otherwise apply a
    # predicate on the old column of that name.
    fresh = verb.name not in lf.collect_schema().names()
    schema = {**lf.collect_schema(), verb.name: verb.dtype}
    return lf.map_batches(call, predicate_pushdown=fresh, schema=schema)


def source(lf: pl.LazyFrame, verb: Verb) -> pl.LazyFrame:
    """An IO source that runs `lf` and adds the answers, as far as the rest of the query needs them."""

    def schema() -> pl.Schema:
        return pl.Schema({**lf.collect_schema(), verb.name: verb.dtype})

    def run(
        columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = columns if columns is not None else list(schema())
        below, above = _split(predicate, verb.name)
        upstream = lf if below is None else lf.filter(below)
        if limit is not None and above is None:
            upstream = upstream.head(limit)
        if verb.name not in wanted and above is None:
            yield from _batches(upstream.select(wanted), size)
            return
        keep = set(wanted) | set(above.meta.root_names() if above is not None else ())
        passed = [name for name in lf.collect_schema().names() if name in keep - {verb.name}]
        rows = _with_inputs(upstream, verb, passed)
        left = limit
        for batch in _answered(_batches(rows, size), verb):
            out = batch if above is None else batch.filter(above)
            out = out.select(wanted) if left is None else out.select(wanted).head(left)
            left = None if left is None else left - out.height
            yield out
            if left == 0:
                return

    def whole(*arguments: Any) -> Iterator[pl.DataFrame]:
        return iter(list(run(*arguments)))

    return register_io_source(whole if _WRAPS_EXCEPTIONS else run, schema=schema, validate_schema=True)


# Before 2.0 Polars turned what a source's generator raises into a ComputeError, but not what the call
# itself raises: there the whole source runs inside the call, and holds its rows.
_WRAPS_EXCEPTIONS = int(pl.__version__.split(".")[0]) < 2


def _with_inputs(lf: pl.LazyFrame, verb: Verb, passed: list[str]) -> pl.LazyFrame:
    read = verb.inputs()
    return lf.with_columns(read).select(*passed, *(e.meta.output_name() for e in read))


def _split(predicate: pl.Expr | None, name: str) -> tuple[pl.Expr | None, pl.Expr | None]:
    """(what does not read the answer, what does); a conjunction is taken apart."""
    below: pl.Expr | None = None
    above: pl.Expr | None = None
    for part in _conjuncts(predicate) if predicate is not None else ():
        if name in part.meta.root_names():
            above = part if above is None else above & part
        else:
            below = part if below is None else below & part
    return below, above


def _conjuncts(predicate: pl.Expr) -> Iterator[pl.Expr]:
    parts = predicate.meta.pop()
    if len(parts) == 2 and (parts[0] & parts[1]).meta.eq(predicate):
        yield from _conjuncts(parts[0])
        yield from _conjuncts(parts[1])
    elif len(parts) == 2 and (parts[1] & parts[0]).meta.eq(predicate):
        yield from _conjuncts(parts[1])
        yield from _conjuncts(parts[0])
    else:
        yield predicate


def _batches(lf: pl.LazyFrame, size: int | None) -> Iterator[pl.DataFrame]:
    return iter(lf.collect_batches(chunk_size=size or 100_000, maintain_order=True))


def _answered(batches: Iterator[pl.DataFrame], verb: Verb) -> Iterator[pl.DataFrame]:
    """Each batch with its answers; all that is missing anywhere is sent as one.

    As long as every row is answered, batches stream through. From the first missing answer on,
    requests are gathered to the end of the input and sent together.
    """
    store, failures = verb.store, verb.failures()
    gathered: list[Requests] = []
    waiting: list[pl.DataFrame] = []

    def lay(batch: pl.DataFrame, pending: Pending | None) -> pl.DataFrame:
        rows = checked(batch.select(c for c in _OURS if c in batch.columns))
        found = store.results.find(verb.keys(rows))
        failures.count(found, pending)
        return batch.drop(*rows.columns).with_columns(verb.lay(found, rows, pending))

    for batch in batches:
        rows = checked(batch.select(c for c in _OURS if c in batch.columns))
        found = store.results.find(verb.keys(rows))
        if not unanswered(found, verb.policy).is_empty():
            gathered.append(verb.requests(rows, found))
        if gathered:
            waiting.append(batch)
            continue
        failures.count(found, None)
        yield batch.drop(*rows.columns).with_columns(verb.lay(found, rows, None))
    if gathered:
        frame = pl.concat([r.frame for r in gathered]).unique("key", maintain_order=True)
        pending = verb.bring(Requests(verb.header, frame))
        for batch in waiting:
            yield lay(batch, pending)
    failures.report(verb.on_error)


def expression(verb: Verb) -> pl.Expr:
    """The verb on a whole column, as an expression."""
    read = verb.inputs()

    def call(rows: pl.Series) -> pl.Series:
        with _rebuilt():
            return verb.answer(rows.struct.unnest())

    return pl.struct(read).map_batches(call, return_dtype=verb.dtype).alias(verb.name)


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
