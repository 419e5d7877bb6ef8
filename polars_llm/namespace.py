"""The `.llm` namespace on DataFrame, LazyFrame, Expr and Series: thin, and documented for users."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import polars as pl

from polars_llm.config import OnPending
from polars_llm.errors import LLMWarning
from polars_llm.frame import embeddings, engine, expressions, nodes, verbs
from polars_llm.frame.embeddings import EmbedOptions
from polars_llm.frame.estimate import CountTokens, resolve_verb
from polars_llm.frame.inputs import PROMPT
from polars_llm.frame.labels import LabelsLike
from polars_llm.frame.verbs import CommonOptions, GenerateOptions

if TYPE_CHECKING:
    from polars._typing import IntoExpr

__all__ = ["LLMDataFrame", "LLMExpr", "LLMLazyFrame", "LLMSeries", "register"]

F = TypeVar("F", bound=Callable[..., Any])

_VERB = """{task} {gives}.

        The distinct prompts that have no answer yet become one offline batch job, at half price.
        {when} Evaluating the same again resumes: what was sent is never sent twice, what was answered
        comes from the cache.

        Parameters
        ----------
        {first}
            {prompt}{more}{own}
        model
            ``"openai/NAME"``, or a model object such as ``pllm.OpenAI("NAME")``. Default:
            ``pllm.Config(model=...)``, then the environment variable ``POLARS_LLM_MODEL``.
        system
            System prompt: text, or an expression for one per row (null: none for that row). A string
            is literal text, never a column's name. Beside a conversation with system messages of its
            own it comes before them.
        images
            Images of each row: the name of a column, an expression or a Series of Binary (the bytes), of
            String (a path, an http(s) address or a data URL), or a List of either. Null is none. PNG,
            JPEG, GIF and WebP, known by their first bytes. They belong to the prompt, or to the last
            message from the user. Files are read to compute keys, and again when they are sent; an
            address is not read: its text counts as the image.
        name
            Name of the column.
        output
            ``"value"`` gives {value}. ``"full"`` gives a Struct of value, status (Enum done,
            pending, failed), error, finish_reason, input_tokens, cached_input_tokens, output_tokens,
            cost_usd, model, job_id and key; for typed values also raw, the text as it came. Duplicate
            rows share a key: sum costs over unique keys.
        on_pending
            ``"raise"`` (default) submits what is missing and raises `JobsPending`. ``"wait"`` stays,
            with a progress bar; Ctrl+C stops the waiting, not the job. ``"null"`` submits, and gives
            what is there.
        on_error
            ``"null"`` (default): a failed request gives null, and one `LLMWarning` counts failures by
            kind. ``"raise"`` raises `RequestsFailed`.
        max_tokens
            Most output tokens of an answer, thinking included.
        temperature, top_p, stop, seed, reasoning_effort
            As the provider documents them. What you do not set is not sent.
        params
            Any other field of the request body.
        sample
            Ask the same thing again: each number is a request of its own. An int, or an expression of
            ints. With `seed`, sample *n* is sent with seed + *n*.
        retry_failed
            Send again what failed for good. What failed for a passing reason is sent again anyway,
            alone, up to three times in all.
        max_cost
            The most that this evaluation may cost, in USD, what it has in flight included. What may pass
            it is not sent: `BudgetExceeded`. It is compared with a bound that holds (no more tokens than
            bytes, answers of `max_tokens`), so set `max_tokens`, too.
        retries_on_invalid
            How often a request is asked again whose answer does not fit {fits}. Each time is a request of
            its own, paid and kept; the first answer that fits counts. What never fits is failed, error
            ``invalid_output``.
        mode
            ``"batch"`` (default), or ``"realtime"``: answers in seconds at the full price, asked while
            this call waits. The same requests and the same cache: what a batch answered is not asked
            again, and what is pending in a batch stays there.
        max_concurrency
            With ``mode="realtime"``: most requests at once. Default: 32.

        Returns
        -------
        {returns}
            {what} Null prompts give null, unsent and unpaid; order and height never change.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            At call: no model, an argument that cannot be sent, {refused}. {late}: a column that is
            not text, a conversation or an image that cannot be sent (the message names the row).
        JobsPending
            {late}, with ``on_pending="raise"``, while answers are missing.
        RequestsFailed
            {late}, with ``on_error="raise"``, if a request failed for good.
        BudgetExceeded
            {late}: it could cost more than `max_cost`, or than ``pllm.Config(max_cost=...)``. Nothing was
            sent.
        ProviderError, CacheError
            {late}: the provider said no, or the cache directory cannot be used. The message says what
            happened to the money.

        Notes
        -----
        Costs: one request for each distinct prompt (with its system prompt, parameters and sample)
        that was never answered, at the provider's batch price, half of the usual. Nothing for nulls,
        duplicates, cached answers and failed requests.
"""

_PUSHDOWN = """
        pushdown
            True: elementwise, so that only the rows that a query needs are asked; to be collected with
            ``lf.llm.collect()`` or on `pllm.Engine`. Default: True while that engine is the active one."""
_EAGER = "The first call submits it and raises `JobsPending`; a later call returns the answers."
_LAZY = "The first collect submits it and raises `JobsPending`; a later one returns the answers."
_TEXT = "A column's name, or an expression of texts."
_TALK = """A row is text, or a whole conversation: a List or Array of
            structs of role and content; roles are system, developer, user and assistant."""
_COLUMN = f"""A column's name, or an expression such as ``pl.format('Summarise: {{}}', 'text')``.
            {_TALK}"""


_GENERATE = {
    "task": "Ask a model one prompt a row; the answers come back as",
    "first": "prompt",
    "more": """
        schema
            What every answer must be: a pydantic model, a dataclass or TypedDict class, a `pl.Struct` or
            `pl.Schema`, a dict of names and dtypes or types, or a JSON Schema as a dict. The column is
            then a Struct with real dtypes (docs/schema.md). It is part of the key.""",
    "value": "a String column, or with `schema` a Struct",
    "fits": "its `schema`",
    "refused": "or a schema that the provider could not keep to: the message names the field",
}
_CLASSIFY = {
    "task": "Sort one text a row under one of several labels; they come back as",
    "first": "text",
    "more": """
        labels
            A list of labels, an Enum class (its values), a `pl.Enum`, or a dict of labels and what each
            means. Their order and descriptions are part of the key. The model is told by a fixed text
            with the labels (docs/schema.md), followed by `system`.""",
    "value": "an Enum column of exactly these labels",
    "fits": "any label",
    "refused": "no labels, a set of them, blank ones, or labels that collide when case is folded",
}
_EMBED = {
    "page": """Turn texts into vectors, one a row; they come back as {gives}.

        The distinct texts that have no vector yet become one offline batch job, at half price.
        {when} Evaluating the same again resumes, and nothing is sent or paid twice.

        Parameters
        ----------
        text
            {prompt}{own}
        model
            For example ``"openai/text-embedding-3-small"``, or a model object. Default:
            ``pllm.Config(model=...)``, then the environment variable ``POLARS_LLM_MODEL``.
        dimensions
            How many numbers a vector has. Default: as many as the model's own have. The host is asked
            for shorter ones where it is fewer. A model that the library does not know needs it, or
            ``pllm.OpenAI(NAME, vector_length=...)``.
        name
            Name of the column.
        output
            ``"value"`` gives an Array(Float32, dimensions) column. ``"full"`` gives a Struct as
            `generate` does.
        on_pending, on_error, retry_failed, max_cost, mode, max_concurrency
            As for `generate`.
        params
            Any other field of the request body.

        Returns
        -------
        {returns}
            {what} Null texts give null, unsent and unpaid; order and height never change. The numbers
            are the bits of the provider's own Float32.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            At call: no model, a provider without embeddings, a length that is not known or not to be
            had. {late}: a column that is not text.
        JobsPending
            {late}, with ``on_pending="raise"``, while vectors are missing.
        RequestsFailed
            {late}, with ``on_error="raise"``, if a request failed for good.
        ProviderError, CacheError
            {late}: the provider said no, or the cache directory cannot be used. The message says what
            happened to the money.

        Notes
        -----
        Costs: the input tokens of each distinct text that has no vector yet, at the provider's batch
        price. Nothing for nulls, duplicates, cached vectors and failed requests.
"""
}


def _documented(verb: Mapping[str, str] = _GENERATE, **words: str) -> Callable[[F], F]:
    """Give a method the verb's docstring, and the signature that it passes on."""

    def dress(method: F) -> F:
        method.__doc__ = verb.get("page", _VERB).format_map(_Literal({"own": "", **verb, **words}))
        own = inspect.signature(method)
        resolves = embeddings.embed if verb is _EMBED else verbs.generate
        passed = inspect.signature(resolves).parameters.values()
        options = [p for p in passed if p.kind is p.KEYWORD_ONLY]
        if verb is _CLASSIFY:
            options = [p.replace(default="label") if p.name == "name" else p for p in options]
            options = [p for p in options if p.name != "schema"]
        first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        method.__signature__ = own.replace(parameters=[*first, *options])  # type: ignore[attr-defined]
        return method

    return dress


_ESTIMATE = """What a verb would send and cost. Nothing is sent.

        Parameters
        ----------
        prompt, *arguments, **options
            As for the verb.
        verb
            Its name: ``"generate"`` (default), ``"classify"``, ``"embed"``.
        count_tokens
            Your own counter, from a text to its number of tokens; called once for each request. Default:
            what the answers of this column in the cache took, or, where there are fewer than 10 of them, 4
            bytes of UTF-8 a token and 7 tokens a request.

        Returns
        -------
        DataFrame
            One row: ``rows``; ``nulls`` (rows without a prompt); ``unique`` requests, and of these
            ``cached``, ``in_flight``, ``failed`` (for good, not sent again) and ``to_send``; ``batches``;
            of what is to be sent ``input_tokens`` (an estimate), ``input_tokens_method``,
            ``output_tokens_max`` (null without `max_tokens`), ``cost_usd`` (answers as long as those in the
            cache, else as long as they may get) and ``cost_usd_max`` (a bound that holds: no more tokens
            than bytes; null where there are images). USD, at the price of the mode; null where it is not
            known, never 0.

        Raises
        ------
        ModelNotChosen, InvalidRequest
            {late}, as for the verb.

        Notes
        -----
        Costs nothing. The prompts are looked up in the cache and rendered, to count the batches. Prices are
        those that genai-prices lists, or the model object's own.
"""


def _estimated(*, late: str) -> Callable[[F], F]:
    def dress(method: F) -> F:
        method.__doc__ = _ESTIMATE.replace("{late}", late)
        return method

    return dress


class _Literal(dict[str, str]):
    def __missing__(self, key: str) -> str:
        return "{" + key + "}"


class LLMDataFrame:
    """LLM verbs on a DataFrame: each adds a column."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    @_documented(
        gives="a column",
        when=_EAGER,
        prompt=_COLUMN,
        returns="DataFrame",
        what="The frame with the column `name`.",
        late="At call",
    )
    def generate(self, prompt: IntoExpr, **options: Unpack[GenerateOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, verbs.generate(prompt, **options))

    @_documented(
        _EMBED,
        gives="a column",
        when=_EAGER,
        prompt="A column's name, or an expression of text.",
        returns="DataFrame",
        what="The frame with the column `name`.",
        late="At call",
    )
    def embed(self, text: IntoExpr, **options: Unpack[EmbedOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, embeddings.embed(text, **options))

    @_estimated(late="At call")
    def estimate(
        self,
        prompt: IntoExpr,
        *arguments: Any,
        verb: str = "generate",
        count_tokens: CountTokens | None = None,
        **options: Any,
    ) -> pl.DataFrame:
        resolved = resolve_verb(verb)(prompt, *arguments, **options)
        return nodes.estimated(self._frame.lazy(), resolved, count_tokens)

    @_documented(
        _CLASSIFY,
        gives="a column",
        when=_EAGER,
        prompt=_TEXT,
        returns="DataFrame",
        what="The frame with the column `name`.",
        late="At call",
    )
    def classify(self, text: IntoExpr, labels: LabelsLike, **options: Unpack[CommonOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, verbs.classify(text, labels, **options))


class LLMLazyFrame:
    """LLM verbs on a LazyFrame: each adds a column, and pays for the rows that the query needs."""

    def __init__(self, frame: pl.LazyFrame) -> None:
        self._frame = frame

    @_documented(
        gives="a column",
        when=_LAZY,
        prompt=_COLUMN,
        returns="LazyFrame",
        what="The lazy frame with the column `name`. Building and explaining it sends nothing.",
        late="At collect",
    )
    def generate(self, prompt: IntoExpr, **options: Unpack[GenerateOptions]) -> pl.LazyFrame:
        return nodes.lazily(self._frame, verbs.generate(prompt, **options))

    @_documented(
        _EMBED,
        gives="a column",
        when=_LAZY,
        prompt="A column's name, or an expression of text.",
        returns="LazyFrame",
        what="The lazy frame with the column `name`. Building and explaining it sends nothing.",
        late="At collect",
    )
    def embed(self, text: IntoExpr, **options: Unpack[EmbedOptions]) -> pl.LazyFrame:
        return nodes.lazily(self._frame, embeddings.embed(text, **options))

    @_estimated(late="At call; the plan runs once")
    def estimate(
        self,
        prompt: IntoExpr,
        *arguments: Any,
        verb: str = "generate",
        count_tokens: CountTokens | None = None,
        **options: Any,
    ) -> pl.DataFrame:
        resolved = resolve_verb(verb)(prompt, *arguments, **options)
        return nodes.estimated(self._frame, resolved, count_tokens)

    @_documented(
        _CLASSIFY,
        gives="a column",
        when=_LAZY,
        prompt=_TEXT,
        returns="LazyFrame",
        what="The lazy frame with the column `name`. Building and explaining it sends nothing.",
        late="At collect",
    )
    def classify(self, text: IntoExpr, labels: LabelsLike, **options: Unpack[CommonOptions]) -> pl.LazyFrame:
        return nodes.lazily(self._frame, verbs.classify(text, labels, **options))

    def collect(self, *, on_pending: OnPending = "wait", **options: Any) -> pl.DataFrame:
        """Collect the query, driving all its LLM verbs to the end.

        The plan runs, everything that any verb is missing is sent as one job for each model, and when it
        is answered the plan runs again, until nothing is missing. A verb that reads another one's answers
        is asked in the next round.

        Parameters
        ----------
        on_pending
            ``"wait"`` (default) stays, with one progress display; Ctrl+C stops the waiting, not the jobs.
            ``"raise"`` sends what can be sent and raises `JobsPending`; the same line goes on from there.
            ``"null"`` sends it and gives what is there. It takes the place of what the verbs say.
        **options
            As for `polars.LazyFrame.collect`, less ``engine``: it is the streaming engine.

        Returns
        -------
        DataFrame
            The result of the query.

        Raises
        ------
        JobsPending
            With ``on_pending="raise"``, while answers are missing.
        RequestsFailed
            A verb has ``on_error="raise"`` and one of its requests failed for good.
        UnansweredInput
            The plan asks for other rows each time that it runs (it samples, for instance). Nothing more is
            sent then.
        ProviderError, CacheError
            The provider said no, or the cache directory cannot be used.

        Notes
        -----
        Costs what the verbs in the query cost, for the rows that it needs.
        """
        return engine.collect(self._frame, on_pending, **options)

    def sink_parquet(self, path: Any, *, on_pending: OnPending = "wait", **options: Any) -> None:
        """Write the query to a Parquet file, driving all its LLM verbs to the end first.

        Nothing is written before every answer is there. The plan runs once more for the file.

        Parameters
        ----------
        path
            As for `polars.LazyFrame.sink_parquet`.
        on_pending
            As for `collect`; with ``"null"`` a file is written only if nothing is missing.
        **options
            As for `polars.LazyFrame.sink_parquet`, less ``engine`` and ``lazy``.

        Raises
        ------
        JobsPending, RequestsFailed, UnansweredInput, ProviderError, CacheError
            As for `collect`.
        """
        engine.sink(self._frame, lambda: self._frame.sink_parquet(path, **options), on_pending)


class LLMExpr:
    """LLM verbs on an expression of prompts: each is an expression of answers."""

    def __init__(self, expr: pl.Expr) -> None:
        self._expr = expr

    @_documented(
        gives="an expression",
        when=_LAZY,
        prompt=f"The expression itself. {_TALK}",
        own=_PUSHDOWN,
        returns="Expr",
        what="The answers, named `name`; the whole column is asked at once.",
        late="When evaluated",
    )
    def generate(self, *, pushdown: bool | None = None, **options: Unpack[GenerateOptions]) -> pl.Expr:
        verb = verbs.generate(self._expr, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))

    @_documented(
        _CLASSIFY,
        gives="an expression",
        when=_LAZY,
        prompt="The expression itself.",
        own=_PUSHDOWN,
        returns="Expr",
        what="The labels, named `name`; the whole column is asked at once.",
        late="When evaluated",
    )
    def classify(
        self, labels: LabelsLike, *, pushdown: bool | None = None, **options: Unpack[CommonOptions]
    ) -> pl.Expr:
        verb = verbs.classify(self._expr, labels, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))

    @_documented(
        _EMBED,
        gives="an expression",
        when=_LAZY,
        prompt="The expression itself.",
        own=_PUSHDOWN,
        returns="Expr",
        what="The vectors, named `name`; the whole column is asked at once.",
        late="When evaluated",
    )
    def embed(self, *, pushdown: bool | None = None, **options: Unpack[EmbedOptions]) -> pl.Expr:
        verb = embeddings.embed(self._expr, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))


class LLMSeries:
    """LLM verbs on a Series of prompts: each is a Series of answers."""

    def __init__(self, series: pl.Series) -> None:
        self._series = series

    @_documented(
        gives="a Series",
        when=_EAGER,
        prompt=f"The series itself. {_TALK}",
        returns="Series",
        what="The answers, named `name`.",
        late="At call",
    )
    def generate(self, **options: Unpack[GenerateOptions]) -> pl.Series:
        return nodes.on_series(self._series, verbs.generate(pl.col(PROMPT), **options))

    @_documented(
        _EMBED,
        gives="a Series",
        when=_EAGER,
        prompt="The series itself.",
        returns="Series",
        what="The vectors, named `name`.",
        late="At call",
    )
    def embed(self, **options: Unpack[EmbedOptions]) -> pl.Series:
        return nodes.on_series(self._series, embeddings.embed(pl.col(PROMPT), **options))

    @_documented(
        _CLASSIFY,
        gives="a Series",
        when=_EAGER,
        prompt="The series itself.",
        returns="Series",
        what="The labels, named `name`.",
        late="At call",
    )
    def classify(self, labels: LabelsLike, **options: Unpack[CommonOptions]) -> pl.Series:
        return nodes.on_series(self._series, verbs.classify(pl.col(PROMPT), labels, **options))


_REGISTER: tuple[tuple[type, Callable[[str], Callable[[type], type]], type], ...] = (
    (pl.DataFrame, pl.api.register_dataframe_namespace, LLMDataFrame),
    (pl.LazyFrame, pl.api.register_lazyframe_namespace, LLMLazyFrame),
    (pl.Expr, pl.api.register_expr_namespace, LLMExpr),
    (pl.Series, pl.api.register_series_namespace, LLMSeries),
)


def register() -> None:
    """Put `.llm` on the four Polars types; a warning if another package holds it."""
    for cls, registrar, namespace in _REGISTER:
        holder = getattr(cls, "llm", None)
        if getattr(holder, "__module__", __name__) != __name__:
            warnings.warn(
                LLMWarning(
                    f"{cls.__name__}.llm belonged to {holder.__module__}; now polars_llm holds it.\n\n"
                    "Hint: import only one of the two; the last import wins."
                ),
                stacklevel=3,
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "overriding existing custom namespace")
            registrar("llm")(namespace)
