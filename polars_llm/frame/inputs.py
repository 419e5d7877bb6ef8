"""What a verb reads of a frame: the columns of its own that hold it, and whether it can be sent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from polars_llm.errors import InvalidRequest
from polars_llm.frame.conversations import is_conversation
from polars_llm.images import LIMITS, digests

if TYPE_CHECKING:
    from polars._typing import IntoExpr

__all__ = [
    "ATTACHED",
    "IMAGES",
    "KIND",
    "PROMPT",
    "RETRY",
    "SAMPLE",
    "SYSTEM",
    "check_images",
    "checked",
    "expr",
    "with_attached",
]

# Inputs of a verb as columns of their own, whatever the user's frame calls them.
PROMPT, SYSTEM, SAMPLE, IMAGES = "__pllm_prompt", "__pllm_system", "__pllm_sample", "__pllm_images"
# What `Verb.checked` adds to them: text or messages, and the digest of the row's images.
KIND, ATTACHED = "__pllm_kind", "__pllm_attached"
# How many answers to a row's request did not fit their schema.
RETRY = "__pllm_retry"


def expr(prompt: IntoExpr) -> pl.Expr:
    """An input of a verb as an expression; a string names a column."""
    if isinstance(prompt, str):
        return pl.col(prompt)
    if isinstance(prompt, pl.Expr):
        return prompt
    if isinstance(prompt, pl.Series):
        return pl.lit(prompt)
    raise InvalidRequest(
        f"A {type(prompt).__name__} is neither a column's name nor an expression",
        hint="pass the name of a column, or an expression such as"
        " pl.format('Summarise: {}', 'text'). Nothing was sent.",
    )


_TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Null)


def checked(rows: pl.DataFrame, *, talks: bool) -> pl.DataFrame:
    """`rows` with text as String, samples as Int64 and images as lists; conversations if `talks`."""
    casts = []
    for name, dtype in rows.schema.items():
        if name == SAMPLE:
            casts.append(_checked_sample(rows[name]))
            continue
        if name == IMAGES:
            casts.append(_checked_images(rows[name]))
            continue
        if name == PROMPT and talks and is_conversation(dtype):
            continue
        if not isinstance(dtype, _TEXT):
            what = "prompt" if name == PROMPT else "system"
            raise InvalidRequest(
                f"The {what} has dtype {dtype}, not String",
                hint="cast it, or build the text with pl.format('... {}', column). Nothing was sent.",
            )
        if dtype != pl.String:
            casts.append(rows[name].cast(pl.String))
    return rows.with_columns(casts) if casts else rows


def _checked_sample(sample: pl.Series) -> pl.Series:
    if not sample.dtype.is_integer() and sample.dtype != pl.Null:
        raise InvalidRequest(
            f"sample has dtype {sample.dtype}, not a whole number",
            hint="pass an int, or an expression of integers. Nothing was sent.",
        )
    if (sample < 0).any():
        raise InvalidRequest("A sample is below 0.", hint="samples count from 0. Nothing was sent.")
    return sample.cast(pl.Int64).fill_null(0)


def _checked_images(images: pl.Series) -> pl.Series:
    """As List of Binary or List of String."""
    dtype = images.dtype
    if isinstance(dtype, pl.Array):
        images = images.arr.to_list()
    elif not isinstance(dtype, pl.List):
        images = images.to_frame().select(pl.concat_list(pl.all())).to_series()
    inner = images.dtype.inner if isinstance(images.dtype, pl.List) else None
    if isinstance(inner, (pl.Binary, pl.String)):
        return images
    if isinstance(inner, _TEXT):
        return images.cast(pl.List(pl.String))
    raise InvalidRequest(
        f"images has dtype {dtype}, neither Binary nor String nor a list of one of them",
        hint="pass the bytes of the images, or paths, http(s) addresses or data URLs. Nothing was sent.",
    )


def check_images(images: IntoExpr | None, provider: str) -> None:
    """Raise InvalidRequest, at call, for images that are no column, or that the provider is not sent."""
    if images is not None:
        expr(images)
        if provider not in LIMITS:
            raise InvalidRequest(
                f"images: {provider} is not asked with images",
                hint=f"they go to {' and '.join(LIMITS)}. Nothing was sent.",
            )


def with_attached(rows: pl.DataFrame, provider: str) -> pl.DataFrame:
    """`rows` with the digests of their images; those of null prompts are not read.

    Raises
    ------
    InvalidRequest
        An image that cannot be sent, or whose conversation has no place for it; the message names the row.
    """
    images = rows.select(pl.when(pl.col(PROMPT).is_not_null()).then(IMAGES).alias(IMAGES)).to_series()
    rows = rows.with_columns(images, digests(images, LIMITS.get(provider)).alias(ATTACHED))
    if KIND in rows.columns:
        # In the one form of a conversation a quote inside of a text is escaped: only a role looks like this.
        silent = (pl.col(KIND) == "m") & ~pl.col(PROMPT).str.contains('"role":"user"', literal=True)
        lost = rows.select((silent & pl.col(ATTACHED).is_not_null()).arg_true()).to_series()
        if lost.len():
            raise InvalidRequest(
                f"Row {lost[0]}: the conversation has images, and no message from the user that they could"
                " belong to",
                hint="give it a message with role 'user', or null images. Nothing was sent.",
            )
    return rows
