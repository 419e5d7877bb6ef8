"""The verbs: arguments -> requests -> a column.

A `Verb` is what a call was resolved to: model, header, options. It is a value that can look its rows up, say
which requests they make, and lay answers on them. Who brings the answers is `sending`, what is done about
those that are missing `asking`, and how a verb lives in a plan `nodes`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias, TypedDict, Unpack, cast, get_args

import polars as pl

from polars_llm.backends.base import BatchBackend, LiveBackend
from polars_llm.backends.options import Options
from polars_llm.config import CacheLocation, OnError, OnPending, Settings, settings, usd
from polars_llm.errors import InvalidRequest
from polars_llm.forks import refuse_hanging
from polars_llm.frame.column import Failures, column, full
from polars_llm.frame.conversations import is_conversation, told
from polars_llm.frame.inputs import (
    ATTACHED,
    IMAGES,
    KIND,
    PROMPT,
    RETRY,
    SAMPLE,
    SYSTEM,
    check_images,
    checked,
    expr,
    with_attached,
)
from polars_llm.frame.labels import FIELD, Labels, LabelsLike
from polars_llm.frame.typed import SEED_STEP, Typed, nth_retry
from polars_llm.images import as_sent
from polars_llm.jobs.evaluate import Pending
from polars_llm.jobs.lookup import Policy, unanswered
from polars_llm.models import Model, resolve
from polars_llm.request import RequestHeader, Requests, key_hex, key_prefix
from polars_llm.store import Store, open_store

if TYPE_CHECKING:
    from polars._typing import IntoExpr

__all__ = [
    "AskMode",
    "CommonOptions",
    "GenerateOptions",
    "Output",
    "Verb",
    "check_arguments",
    "check_mode",
    "classify",
    "generate",
    "policy",
]

Output: TypeAlias = Literal["value", "full"]
AskMode: TypeAlias = Literal["batch", "realtime"]


class CommonOptions(TypedDict, total=False):
    """Keyword arguments that verbs share, for type checkers (a test holds them to the signatures)."""

    model: str | Model | None
    system: str | pl.Expr | None
    images: str | pl.Expr | pl.Series | None
    name: str
    output: Output
    on_pending: OnPending | None
    on_error: OnError | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    stop: str | list[str] | None
    seed: int | None
    reasoning_effort: str | None
    params: Mapping[str, Any] | None
    sample: int | pl.Expr
    retry_failed: bool
    max_cost: float | None
    retries_on_invalid: int
    mode: AskMode
    max_concurrency: int | None


class GenerateOptions(CommonOptions, total=False):
    """Keyword arguments of `generate`."""

    schema: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """One call of a verb, resolved."""

    model: Model
    backend: BatchBackend | LiveBackend
    header: RequestHeader
    name: str
    prompt: IntoExpr
    system: str | pl.Expr | None
    images: IntoExpr | None
    sample: int | pl.Expr
    output: Output
    on_pending: OnPending
    on_error: OnError
    policy: Policy
    cache: CacheLocation
    typed: Typed | None = None
    value: pl.DataType = dataclasses.field(default_factory=pl.String)
    """Of an answer: String for text, Array for vectors."""

    def __reduce__(self) -> NoReturn:
        # Backends hold locks and clients; "cannot pickle '_thread.lock'" would help nobody.
        raise TypeError(
            "A plan or an expression with an LLM verb cannot be pickled or serialised.\n\n"
            "Hint: build it where it runs; the answers come from the cache. Nothing was sent."
        )

    @property
    def dtype(self) -> pl.DataType:
        """Of the column that it gives."""
        typed = self.typed
        if self.output != "full":
            return typed.dtype if typed else self.value
        return pl.Struct(full(typed.dtype if typed else self.value, raw=typed is not None))

    @property
    def store(self) -> Store:
        """The cache directory; made when it is first needed."""
        return open_store(*self.cache)

    def inputs(self) -> list[pl.Expr]:
        """What it reads of a frame, under names of our own."""
        read = [expr(self.prompt).alias(PROMPT)]
        if self.images is not None:
            read.append(expr(self.images).alias(IMAGES))
        if isinstance(self.system, pl.Expr):
            read.append(self.system.alias(SYSTEM))
        if isinstance(self.sample, pl.Expr):
            read.append(self.sample.alias(SAMPLE))
        return read

    def checked(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows of `inputs` as `keys` and `requests` want them.

        Raises
        ------
        InvalidRequest
            At collect: a prompt or system that is not text, a sample that is not a whole number >= 0, a
            conversation or an image that cannot be sent.
        """
        rows = checked(rows, talks=not isinstance(self.value, pl.Array))
        if is_conversation(rows.schema[PROMPT]):
            system = rows[SYSTEM] if SYSTEM in rows.columns else self._system
            said = told(rows[PROMPT], system, self.header.provider)
            rows = rows.with_columns(
                said["prompt"].alias(PROMPT), said["system"].alias(SYSTEM), said["kind"].alias(KIND)
            )
        if IMAGES in rows.columns:
            rows = with_attached(rows, self.header.provider)
        return rows

    @property
    def _system(self) -> str | None:
        return self.system if isinstance(self.system, str) else None

    def keys(self, rows: pl.DataFrame) -> pl.Series:
        """Key prefix of each of the `checked` rows; null where the prompt is null."""
        # One pass, streaming: the hex text of the keys never exists for all rows at once.
        return (
            rows.lazy()
            .select(key_prefix(self._key_hex(rows)).alias("key"))
            .collect(engine="streaming")
            .to_series()
        )

    def find(self, rows: pl.DataFrame, keys: pl.Series) -> pl.DataFrame:
        """What is known of each row: `ResultStore.find`, and with a schema `Typed.settled`."""
        found = self.store.results.find(keys)
        if self.typed is None:
            return found

        def hexes(which: pl.Series) -> pl.Series:
            return rows.filter(which).select(self._key_hex(rows)).to_series()

        return self.typed.settled(found, hexes, self.store.results)

    def _key_hex(self, rows: pl.DataFrame) -> pl.Expr:
        def of(name: str, constant: Any) -> Any:
            return pl.col(name) if name in rows.columns else constant

        return key_hex(
            self.header.digest(),
            pl.col(PROMPT),
            kind=of(KIND, "t"),
            system=of(SYSTEM, self._system),
            sample=of(SAMPLE, self.sample),
            attachments=of(ATTACHED, None),
        )

    def once(self) -> Verb:
        """The same verb, which does not send again what has failed for good by now."""
        return dataclasses.replace(self, policy=dataclasses.replace(self.policy, retry_failed=False))

    def requests(self, rows: pl.DataFrame, found: pl.DataFrame) -> Requests:
        """The distinct requests among `rows` that have no answer."""
        missing = found["key"].is_in(unanswered(found, self.policy)["key"].implode())
        if self.typed is not None:  # what was answered is not sent again as it is, whatever it says
            missing = missing & found["reason"].is_null()
        wanted = _numbered(rows, found).with_columns(__prefix=found["key"]).filter(missing)
        wanted = wanted.unique("__prefix", keep="first", maintain_order=True)
        images: dict[str, Any] = (
            {"images": as_sent(wanted[IMAGES]), "attachments": ATTACHED} if IMAGES in rows.columns else {}
        )
        frame = wanted.select(
            key=self._full_key(wanted),
            attempt=pl.lit(1, pl.UInt16),
            prompt=PROMPT,
            kind=KIND if KIND in rows.columns else pl.lit("t"),
            system=SYSTEM if SYSTEM in rows.columns else pl.lit(self._system, pl.String),
            sample=SAMPLE if SAMPLE in rows.columns else pl.lit(self.sample, pl.Int64),
            **images,
        )
        if self.typed is not None:
            raised = pl.col("sample") + pl.col("retry") * SEED_STEP
            frame = frame.with_columns(wanted[RETRY].alias("retry")).with_columns(sample=raised)
        return self.distinct(frame)

    def _full_key(self, rows: pl.DataFrame) -> pl.Expr:
        """Binary keys of numbered rows."""
        made = self._key_hex(rows)
        if RETRY in rows.columns and (most := cast("int", rows[RETRY].max() or 0)):
            made = nth_retry(made, pl.col(RETRY), most)
        return made.str.decode("hex")

    def distinct(self, frame: pl.DataFrame) -> Requests:
        """Requests of this verb, from a frame of distinct ones."""
        return Requests(self.header, frame)

    def failures(self) -> Failures:
        """A fresh count of failures, for one evaluation."""
        return Failures(self.store, self.policy)

    def lay(self, found: pl.DataFrame, rows: pl.DataFrame, pending: Pending | None) -> pl.Series:
        """Answers on their rows."""
        rows = _numbered(rows, found)
        full_key = self._full_key(rows) if self.output == "full" else None
        laid = column(found, rows, self.store, self.policy, pending, full_key, self.value)
        return laid.alias(self.name)


def _numbered(rows: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """Rows with the attempt that `Verb.find` found for each, where they have a schema."""
    return rows.with_columns(found["retry"].alias(RETRY)) if "retry" in found.columns else rows


def generate(
    prompt: IntoExpr,
    *,
    model: str | Model | None = None,
    system: str | pl.Expr | None = None,
    images: str | pl.Expr | pl.Series | None = None,
    schema: Any = None,
    name: str = "response",
    output: Output = "value",
    on_pending: OnPending | None = None,
    on_error: OnError | None = None,
    max_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    stop: str | list[str] | None = None,
    seed: int | None = None,
    reasoning_effort: str | None = None,
    params: Mapping[str, Any] | None = None,
    sample: int | pl.Expr = 0,
    retry_failed: bool = False,
    max_cost: float | None = None,
    retries_on_invalid: int = 0,
    mode: AskMode = "batch",
    max_concurrency: int | None = None,
) -> Verb:
    """Resolve a call of generate; the namespaces' docstrings say what each argument means."""
    refuse_hanging()
    chosen = settings(on_pending=on_pending, on_error=on_error)
    check_arguments(name=name, output=output, system=system, sample=sample, max_tokens=max_tokens)
    typed = Typed.of(schema, retries_on_invalid)
    check_mode(mode, max_concurrency)
    options = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        seed=seed,
        reasoning_effort=reasoning_effort,
        params=params or {},
        schema=typed.schema.json if typed else None,
    )
    chosen_model = resolve(chosen.model if model is None else model)
    backend = chosen_model.backend(mode, max_concurrency=max_concurrency)
    check_images(images, backend.provider)
    return Verb(
        model=chosen_model,
        backend=backend,
        header=backend.header(options),
        name=name,
        prompt=prompt,
        system=system,
        images=images,
        sample=sample,
        output=output,
        on_pending=chosen.on_pending,
        on_error=chosen.on_error,
        policy=policy(chosen, retry_failed=retry_failed, max_cost=max_cost),
        cache=chosen.cache,
        typed=typed,
    )


def classify(text: IntoExpr, labels: LabelsLike, **options: Unpack[CommonOptions]) -> Verb:
    """Resolve a call of classify: generate, with a task, and a schema of one label."""
    if "schema" in options:
        raise TypeError("classify has labels, and takes no schema")
    named = Labels.of(labels)
    own = options.get("system")
    check_arguments(system=own)
    given: GenerateOptions = {"name": "label", **options, "system": named.system(own), "schema": named.schema}
    verb = generate(text, **given)
    assert verb.typed is not None
    return dataclasses.replace(verb, typed=dataclasses.replace(verb.typed, field=FIELD))


def check_mode(mode: str, max_concurrency: int | None) -> None:
    """Raise InvalidRequest for a mode that there is not."""
    wrong = None
    if mode not in get_args(AskMode):
        wrong = f"mode is {mode!r}; it takes 'batch' or 'realtime'"
    elif max_concurrency is not None:
        if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
            wrong = f"max_concurrency is {max_concurrency!r}; it is a whole number from 1 up"
        elif mode == "batch":
            wrong = "max_concurrency is for mode='realtime'; a batch takes as many as the provider likes"
    if wrong:
        raise InvalidRequest(wrong, hint="see help(pl.DataFrame.llm.generate). Nothing was sent.")


def policy(chosen: Settings, *, retry_failed: bool, max_cost: float | None) -> Policy:
    """How a verb with these settings behaves."""
    return Policy(
        wait=chosen.on_pending == "wait",
        poll_interval=chosen.poll_interval,
        quiet_period=chosen.quiet_period,
        retry_failed=retry_failed,
        max_cost=usd(max_cost),
        budget=chosen.max_cost,
        budget_since=chosen.max_cost_since,
    )


_MOST_SAMPLES = 2**63 - 1  # as Int64, in which an expression gives them


def check_arguments(
    *,
    name: str = "response",
    output: str = "value",
    system: object = None,
    sample: object = 0,
    max_tokens: int | None = None,
) -> None:
    """Raise InvalidRequest for what no verb takes."""
    wrong = None
    if output not in get_args(Output):
        wrong = f"output is {output!r}; it takes 'value' or 'full'"
    elif not isinstance(name, str) or not name:
        wrong = f"name is {name!r}, not a column's name"
    elif not (system is None or isinstance(system, (str, pl.Expr))):
        wrong = f"system is a {type(system).__name__}, neither text nor an expression"
    elif isinstance(sample, bool) or not isinstance(sample, (int, pl.Expr)):
        wrong = f"sample is {sample!r}, neither a whole number nor an expression"
    elif isinstance(sample, int) and not 0 <= sample <= _MOST_SAMPLES:
        wrong = f"sample is {sample}; samples count from 0"
    elif max_tokens is not None and not _is_count(max_tokens):
        wrong = f"max_tokens is {max_tokens!r}; it is a whole number from 1 up"
    if wrong:
        raise InvalidRequest(wrong, hint="see help(pl.DataFrame.llm.generate). Nothing was sent.")


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1 and value % 1 == 0
