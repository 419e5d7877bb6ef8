"""The verb embed: arguments -> a `Verb` whose answers are vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import polars as pl

from polars_llm.backends.options import Options
from polars_llm.config import OnError, OnPending, settings
from polars_llm.forks import refuse_hanging
from polars_llm.frame.verbs import AskMode, Output, Verb, check_arguments, check_mode, policy
from polars_llm.models import Model, resolve

if TYPE_CHECKING:
    from polars._typing import IntoExpr

__all__ = ["EmbedOptions", "embed"]


class EmbedOptions(TypedDict, total=False):
    """Keyword arguments of `embed`, for type checkers (a test holds the two together)."""

    model: str | Model | None
    dimensions: int | None
    name: str
    output: Output
    on_pending: OnPending | None
    on_error: OnError | None
    params: Mapping[str, Any] | None
    retry_failed: bool
    max_cost: float | None
    mode: AskMode
    max_concurrency: int | None


def embed(
    text: IntoExpr,
    *,
    model: str | Model | None = None,
    dimensions: int | None = None,
    name: str = "embedding",
    output: Output = "value",
    on_pending: OnPending | None = None,
    on_error: OnError | None = None,
    params: Mapping[str, Any] | None = None,
    retry_failed: bool = False,
    max_cost: float | None = None,
    mode: AskMode = "batch",
    max_concurrency: int | None = None,
) -> Verb:
    """Resolve a call of embed; the namespaces' docstrings say what each argument means."""
    refuse_hanging()
    chosen = settings(on_pending=on_pending, on_error=on_error)
    check_arguments(name=name, output=output)
    check_mode(mode, max_concurrency)
    asked, sent, length = resolve(chosen.model if model is None else model).embedding(dimensions)
    backend = asked.backend(mode, max_concurrency=max_concurrency)
    return Verb(
        model=asked,
        backend=backend,
        header=backend.header(Options(params=params or {}, dimensions=sent)),
        name=name,
        prompt=text,
        system=None,
        images=None,
        sample=0,
        output=output,
        on_pending=chosen.on_pending,
        on_error=chosen.on_error,
        policy=policy(chosen, retry_failed=retry_failed, max_cost=max_cost),
        cache=chosen.cache,
        value=pl.Array(pl.Float32, length),
    )
