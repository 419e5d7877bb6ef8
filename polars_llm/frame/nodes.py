"""How verbs live in a plan: direct on a frame, a streaming source, a main-thread node.

- A DataFrame or Series calls the heart directly: main thread, exceptions and Ctrl+C whole.
- A LazyFrame verb is an IO source of its own (`_source`): filters, columns and limits that do not read the
  answer go below it, rows stream through it, and the plan can be described without running. Verbs that
  follow one another and do not read each other's answers share one source, and are sent together.
- Where it may take long (``on_pending="wait"``, live backends) it is a `LazyFrame.map_batches`
  (`_on_main_thread`), which both engines call on the thread that collects, so that Ctrl+C works.
- An expression (`polars_llm.frame.expressions`) sees the whole column, or any part of it.

In a driven evaluation (`polars_llm.frame.engine`) none of them sends anything: they say what they want.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from polars_llm.backends.base import is_batch
from polars_llm.errors import InvalidRequest, UnansweredInput
from polars_llm.frame.asking import Asked, InPlan, answers
from polars_llm.frame.estimate import CountTokens, estimate
from polars_llm.frame.inputs import PROMPT
from polars_llm.frame.scope import Occurrence, Scope, Staged, mark
from polars_llm.frame.sending import Wanted, bring
from polars_llm.frame.verbs import Verb
from polars_llm.jobs.evaluate import Pending
from polars_llm.request import Requests
from polars_llm.store.spool import Scratch

__all__ = ["estimated", "lazily", "on_frame", "on_series"]

# Rows at a time, where Polars does not say.
_BATCH = 100_000


def on_frame(frame: pl.DataFrame, verb: Verb) -> pl.DataFrame:
    """The frame with the answers as a column."""
    for given in (verb.prompt, verb.images):
        if isinstance(given, pl.Series) and given.len() != frame.height:
            raise InvalidRequest(
                f"The Series {given.name!r} has {given.len():,} rows and the frame {frame.height:,}",
                hint="pass one value for each row of the frame. Nothing was sent.",
            )
    return _answer(frame, verb)


def on_series(series: pl.Series, verb: Verb) -> pl.Series:
    """The answers to a series of prompts."""
    other = {root for e in verb.inputs() for root in e.meta.root_names()} - {PROMPT}
    if other:
        raise InvalidRequest(
            f"A Series has no other columns, and {', '.join(sorted(other))} was asked for",
            hint="call the verb on the frame: df.llm.generate(...). Nothing was sent.",
        )
    return _answer(series.alias(PROMPT).to_frame(), verb)[verb.name]


# --- frames -------------------------------------------------------------------------------------------


def _answer(frame: pl.DataFrame, verb: Verb) -> pl.DataFrame:
    """The whole frame at once, with the answers."""
    return frame.with_columns(answers([Asked(verb, _rows(frame, verb))], bring, None))


def _rows(frame: pl.DataFrame, verb: Verb) -> pl.DataFrame:
    # with_columns first: a literal prompt is broadcast to the height of the frame.
    read = verb.inputs()
    return frame.with_columns(read).select(e.meta.output_name() for e in read)


def estimated(lf: pl.LazyFrame, verb: Verb, count_tokens: CountTokens | None) -> pl.DataFrame:
    """What the verb would send and cost on that frame."""
    read = verb.inputs()
    rows = lf.with_columns(read).select(e.meta.output_name() for e in read)
    # A frame without rows may give no batch at all.
    none = pl.DataFrame(schema=rows.collect_schema())
    scope = Scope(staged=Staged())  # other verbs in the plan say what they want, and send nothing
    try:
        row = estimate(itertools.chain([none], _within(scope, rows, None)), verb, count_tokens)
    finally:
        scope.close()
    if not scope.complete:
        raise UnansweredInput(
            f"{verb.name!r} reads answers that are not there yet: what it would send is not known.",
            hint="estimate what it reads first, and collect that. Nothing was sent.",
        )
    return row


# --- lazy frames --------------------------------------------------------------------------------------

# What each lazy frame of ours was made of, as long as it lives: the next verb on it may go beside the last.
_built: dict[int, tuple[weakref.ref[pl.LazyFrame], pl.LazyFrame, tuple[Verb, ...]]] = {}


def lazily(lf: pl.LazyFrame, verb: Verb) -> pl.LazyFrame:
    """The lazy frame with the answers as a column; nothing runs now."""
    if isinstance(verb.prompt, pl.Series) or isinstance(verb.images, pl.Series):
        raise InvalidRequest(
            "A Series has rows of its own, and those of a lazy frame are not known before it is collected",
            hint="pass the name of a column or an expression; lf.collect().llm takes a Series. Nothing was"
            " sent.",
        )
    base, before = _beside(lf, verb)
    verbs = (*before, verb)
    made = _on_main_thread(base, verbs) if _takes_long(verb) else _source(base, verbs)
    at = id(made)
    _built[at] = (weakref.ref(made, lambda _: _built.pop(at, None)), base, verbs)
    return made


def _takes_long(verb: Verb) -> bool:
    return verb.on_pending == "wait" or not is_batch(verb.backend)


def _beside(lf: pl.LazyFrame, verb: Verb) -> tuple[pl.LazyFrame, tuple[Verb, ...]]:
    """What `lf` adds answers to, and those verbs, if this one can be asked at the same time."""
    made = _built.get(id(lf))
    if made is None or made[0]() is not lf:
        return lf, ()
    _, base, verbs = made
    names = {v.name for v in verbs}
    alike = all(
        (v.policy, v.on_pending, v.cache, _takes_long(v))
        == (verb.policy, verb.on_pending, verb.cache, _takes_long(verb))
        for v in verbs
    )
    if not alike or verb.name in names:
        return lf, ()
    roots = [root for e in verb.inputs() for root in e.meta.root_names()]
    # A wildcard or a selector would see the answers as well.
    if names.intersection(roots) or not set(roots) <= set(base.collect_schema().names()) or not roots:
        return lf, ()
    return base, verbs


def _schema(lf: pl.LazyFrame, verbs: Sequence[Verb]) -> pl.Schema:
    return pl.Schema({**lf.collect_schema(), **{verb.name: verb.dtype for verb in verbs}})


def _on_main_thread(lf: pl.LazyFrame, verbs: Sequence[Verb]) -> pl.LazyFrame:
    """A node that both engines call once, on the thread that collects, with the whole frame."""
    place = Occurrence()
    at = mark(place)
    # Prompts are made before the node: a filter that comes later may pass below the node, not below them.
    asking = [_Asking(verb, f"{at}_{number}") for number, verb in enumerate(verbs)]
    made = lf.with_columns(e for a in asking for e in a.inputs)
    names = [n for a in asking for n in a.names]
    whole = _schema(lf, verbs)

    def call(frame: pl.DataFrame) -> pl.DataFrame:
        here = InPlan(place)
        asked = [Asked(here.policy_of(a.verb), a.rows(frame)) for a in asking]
        return frame.with_columns(answers(asked, here.decide, here.staged)).select(*whole, *names)

    # Filters may only pass below where the answers are new columns: Polars would otherwise apply a
    # predicate on the old column of that name.
    fresh = not {v.name for v in verbs}.intersection(lf.collect_schema().names())
    schema = pl.Schema({**whole, **{n: t for n, t in made.collect_schema().items() if n in names}})
    return made.map_batches(call, predicate_pushdown=fresh, schema=schema).select(whole.names())


def _source(lf: pl.LazyFrame, verbs: Sequence[Verb]) -> pl.LazyFrame:
    """An IO source that runs `lf` and adds the answers, as far as the rest of the query needs them."""
    place = Occurrence()

    def schema() -> pl.Schema:
        place.planned()
        return _schema(lf, verbs)

    def run(
        columns: list[str] | None, predicate: pl.Expr | None, limit: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        wanted = columns if columns is not None else _schema(lf, verbs).names()
        below, above = _split(predicate, {v.name for v in verbs})

        def needed(rows: pl.LazyFrame) -> pl.LazyFrame:
            # Where Polars hands over both, it means the first `limit` rows, and of these the filtered.
            rows = rows if limit is None else rows.head(limit)
            return rows if below is None else rows.filter(below)

        keep = set(wanted) | set(above.meta.root_names() if above is not None else ())
        asked = [v for v in verbs if v.name in keep]
        passed = [n for n in lf.collect_schema().names() if n in keep - {v.name for v in asked}]
        if not asked:
            # One column at least: rows without any have no number.
            rows = needed(lf).select(passed or lf.collect_schema().names()[:1])
            batches = _unasked(rows, size, place)
        else:
            batches = _streamed(lf, needed, asked, passed, size, place)
        for batch in batches:
            out = batch if above is None else batch.filter(above)
            yield out.select(wanted) if wanted else out.drop(out.columns)

    def whole(*arguments: Any) -> Iterator[pl.DataFrame]:
        return iter(list(run(*arguments)))

    return register_io_source(whole if _WRAPS_EXCEPTIONS else run, schema=schema, validate_schema=True)


# Before 2.0 Polars turned what a source's generator raises into a ComputeError, but not what the call
# itself raises: there the whole source runs inside the call, and holds its rows.
_WRAPS_EXCEPTIONS = int(pl.__version__.split(".")[0]) < 2


def _split(predicate: pl.Expr | None, names: set[str]) -> tuple[pl.Expr | None, pl.Expr | None]:
    """(what does not read the answers, what does); a conjunction is taken apart."""
    below: pl.Expr | None = None
    above: pl.Expr | None = None
    for part in _conjuncts(predicate) if predicate is not None else ():
        if names.intersection(part.meta.root_names()):
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
    # The engine is named: an affinity to ours would drive this part of a plan for itself.
    return iter(lf.collect_batches(chunk_size=size or _BATCH, maintain_order=True, engine="streaming"))


def _unasked(rows: pl.LazyFrame, size: int | None, place: Occurrence) -> Iterator[pl.DataFrame]:
    """Batches without the answers; verbs further below take part in the evaluation all the same."""
    here = InPlan(place, upstream=True)
    assert here.upstream is not None
    try:
        yield from _within(here.upstream, rows, size)
    finally:
        here.close()


def _streamed(
    lf: pl.LazyFrame,
    needed: Callable[[pl.LazyFrame], pl.LazyFrame],
    verbs: Sequence[Verb],
    passed: list[str],
    size: int | None,
    place: Occurrence,
) -> Iterator[pl.DataFrame]:
    """Batches of `passed` columns with the answers; all that is missing anywhere is sent together.

    As long as every row is answered, batches stream through. From the first missing answer on they go to
    disk, and to the end of the input requests are gathered.
    """
    here = InPlan(place, upstream=True)
    assert here.upstream is not None
    asking = [_Asking(here.policy_of(verb), number) for number, verb in enumerate(verbs)]
    # Prompts may look at other rows (shift, len): they are made before any row is left out. Where they do
    # not, Polars moves the filter below them.
    inputs = [e for a in asking for e in a.inputs]
    rows = needed(lf.with_columns(inputs)).select(*passed, *(e.meta.output_name() for e in inputs))
    try:
        with verbs[0].store.spool.scratch() as waiting:
            batches = _read(here.upstream, lf, needed, inputs, passed, size)
            yield from _through(batches, asking, here, waiting)
        if here.staged is not None and here.blocked:
            here.want(_beyond_doubt(rows, asking, size, here.upstream.thread))
    finally:
        here.close()


def _read(
    scope: Scope,
    lf: pl.LazyFrame,
    needed: Callable[[pl.LazyFrame], pl.LazyFrame],
    inputs: Sequence[pl.Expr],
    passed: Sequence[str],
    size: int | None,
) -> Iterator[pl.DataFrame]:
    """Batches of `passed` and `inputs`.

    Inputs that are columns as they stand get their names here and not in the plan: where a plan makes
    columns, Polars' streaming engine holds three times as much of what a scan reads (2.1: some 45 parts
    of 100,000 rows, against 14).
    """
    plain = {e.meta.output_name(): e.meta.root_names()[0] for e in inputs if _is_column(e)}
    made = [e for e in inputs if e.meta.output_name() not in plain]
    read = dict.fromkeys([*passed, *plain.values()])
    rows = needed(lf.with_columns(made) if made else lf)
    rows = rows.select(*read, *(e.meta.output_name() for e in made))
    names = (pl.col(column).alias(name) for name, column in plain.items())
    select = [*passed, *names, *(e.meta.output_name() for e in made)]
    for batch in _within(scope, rows, size):
        yield batch.select(select)


def _is_column(expr: pl.Expr) -> bool:
    return expr.meta.undo_aliases().meta.is_column()


def _within(scope: Scope, rows: pl.LazyFrame, size: int | None) -> Iterator[pl.DataFrame]:
    """The batches of a plan, as a part of an evaluation."""
    with scope.planning(rows):
        rows.collect_schema()  # asks the sources in it for their schemas, on this thread
    return _batches(rows, size)


def _beyond_doubt(
    rows: pl.LazyFrame, asking: Sequence[_Asking], size: int | None, thread: int
) -> list[Wanted]:
    """What is missing of verbs whose own inputs do not read what is unanswered in the rows that they pass.

    Polars tells: where the inputs alone are selected, a verb that they do not read is not asked.
    """
    wanted: list[Wanted] = []
    for a in asking:
        scope = Scope(staged=Staged(), thread=thread)
        try:
            for batch in _within(scope, rows.select(a.names), size):
                a.look(batch)
        finally:
            scope.close()
        found = a.wanted()
        if scope.complete:
            wanted += found
    return wanted


def _through(
    batches: Iterator[pl.DataFrame], asking: Sequence[_Asking], here: InPlan, waiting: Scratch
) -> Iterator[pl.DataFrame]:
    missing = False
    for batch in batches:
        looked = [a.look(batch) for a in asking]
        missing = missing or any(a.requests for a in asking)
        if missing:
            # Nothing goes out before all is known. A query that has its first rows may end at any moment,
            # and what it would still have asked would be heard by nobody.
            waiting.append(batch)
        else:
            yield _laid(batch, asking, looked, None)
    if missing:
        pending = here.decide([w for a in asking for w in a.wanted()])
        for batch in waiting:
            yield _laid(batch, asking, [a.look_again(batch) for a in asking], pending)
    else:
        here.done()
    for a in asking:
        if here.staged is None:
            a.failures.report(a.verb.on_error)
        else:
            here.staged.failed(a.verb, a.failures)


def _laid(
    batch: pl.DataFrame, asking: Sequence[_Asking], looked: Sequence[Asked], pending: Pending | None
) -> pl.DataFrame:
    columns = []
    for a, asked in zip(asking, looked, strict=True):
        a.failures.count(asked.found, pending)
        columns.append(a.verb.lay(asked.found, asked.rows, pending))
    return batch.drop(n for a in asking for n in a.names).with_columns(columns)


class _Asking:
    """One of the verbs side by side, over all batches of an evaluation."""

    def __init__(self, verb: Verb, number: int | str) -> None:
        self.verb = verb
        self.failures = verb.failures()
        self.requests: list[Requests] = []
        read = verb.inputs()
        self.names = [f"{e.meta.output_name()}_{number}" for e in read]
        self.inputs = [e.alias(n) for e, n in zip(read, self.names, strict=True)]
        self._own = [e.meta.output_name() for e in read]

    def look(self, batch: pl.DataFrame) -> Asked:
        """Look the rows of a batch up, and keep what is missing."""
        asked = self.look_again(batch)
        requests = asked.missing()
        if requests is not None:
            self.requests.append(requests)
        return asked

    def look_again(self, batch: pl.DataFrame) -> Asked:
        return Asked(self.verb, self.rows(batch))

    def rows(self, batch: pl.DataFrame) -> pl.DataFrame:
        """Its inputs under the names that the verb knows."""
        names = dict(zip(self.names, self._own, strict=True))
        return batch.select(pl.col(n).alias(own) for n, own in names.items())

    def wanted(self) -> list[Wanted]:
        """What is missing, each request once."""
        if not self.requests:
            return []
        frame = pl.concat([r.frame for r in self.requests]).unique("key", maintain_order=True)
        self.requests.clear()
        return [(self.verb, self.verb.distinct(frame))]
