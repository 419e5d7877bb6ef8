"""The `.llm` namespace on DataFrame, LazyFrame, Expr and Series: thin. Its docstrings: `verb_docs.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Unpack

import polars as pl

from polars_llm.config import OnPending
from polars_llm.errors import LLMWarning
from polars_llm.frame import embeddings, engine, expressions, nodes, verbs
from polars_llm.frame.embeddings import EmbedOptions
from polars_llm.frame.estimate import CountTokens, resolve_verb
from polars_llm.frame.inputs import PROMPT
from polars_llm.frame.labels import LabelsLike
from polars_llm.frame.verbs import CommonOptions, GenerateOptions
from polars_llm.verb_docs import documented, estimated

if TYPE_CHECKING:
    from polars._typing import IntoExpr

__all__ = ["LLMDataFrame", "LLMExpr", "LLMLazyFrame", "LLMSeries", "register"]


class LLMDataFrame:
    """LLM verbs on a DataFrame: each adds a column."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self._frame = frame

    @documented("DataFrame")
    def generate(self, prompt: IntoExpr, **options: Unpack[GenerateOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, verbs.generate(prompt, **options))

    @documented("DataFrame")
    def embed(self, text: IntoExpr, **options: Unpack[EmbedOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, embeddings.embed(text, **options))

    @estimated(late="At call")
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

    @documented("DataFrame")
    def classify(self, text: IntoExpr, labels: LabelsLike, **options: Unpack[CommonOptions]) -> pl.DataFrame:
        return nodes.on_frame(self._frame, verbs.classify(text, labels, **options))


class LLMLazyFrame:
    """LLM verbs on a LazyFrame: each adds a column, and pays for the rows that the query needs."""

    def __init__(self, frame: pl.LazyFrame) -> None:
        self._frame = frame

    @documented("LazyFrame")
    def generate(self, prompt: IntoExpr, **options: Unpack[GenerateOptions]) -> pl.LazyFrame:
        return nodes.lazily(self._frame, verbs.generate(prompt, **options))

    @documented("LazyFrame")
    def embed(self, text: IntoExpr, **options: Unpack[EmbedOptions]) -> pl.LazyFrame:
        return nodes.lazily(self._frame, embeddings.embed(text, **options))

    @estimated(late="At call; the plan runs once")
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

    @documented("LazyFrame")
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
            As for `polars.LazyFrame.collect`, less ``engine``: it is the streaming engine. With
            ``background=True`` the answers are waited for before this returns, and ``"null"`` raises
            `JobsPending` in the background while any is missing.

        Returns
        -------
        DataFrame
            The result of the query.

        Raises
        ------
        InvalidRequest
            Another `on_pending`.
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
        InvalidRequest, JobsPending, RequestsFailed, UnansweredInput, ProviderError, CacheError
            As for `collect`.
        """
        engine.sink(self._frame, lambda: self._frame.sink_parquet(path, **options), on_pending)


class LLMExpr:
    """LLM verbs on an expression of prompts: each is an expression of answers."""

    def __init__(self, expr: pl.Expr) -> None:
        self._expr = expr

    @documented("Expr")
    def generate(self, *, pushdown: bool | None = None, **options: Unpack[GenerateOptions]) -> pl.Expr:
        verb = verbs.generate(self._expr, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))

    @documented("Expr")
    def classify(
        self, labels: LabelsLike, *, pushdown: bool | None = None, **options: Unpack[CommonOptions]
    ) -> pl.Expr:
        verb = verbs.classify(self._expr, labels, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))

    @documented("Expr")
    def embed(self, *, pushdown: bool | None = None, **options: Unpack[EmbedOptions]) -> pl.Expr:
        verb = embeddings.embed(self._expr, **options)
        return expressions.expression(verb, pushdown=engine.pushdown(pushdown))


class LLMSeries:
    """LLM verbs on a Series of prompts: each is a Series of answers."""

    def __init__(self, series: pl.Series) -> None:
        self._series = series

    @documented("Series")
    def generate(self, **options: Unpack[GenerateOptions]) -> pl.Series:
        return nodes.on_series(self._series, verbs.generate(pl.col(PROMPT), **options))

    @documented("Series")
    def embed(self, **options: Unpack[EmbedOptions]) -> pl.Series:
        return nodes.on_series(self._series, embeddings.embed(pl.col(PROMPT), **options))

    @documented("Series")
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
