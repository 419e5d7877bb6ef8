"""Replies of any provider as rows: their schema, how result lines are read, how failures are ranked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import msgspec
import polars as pl

from polars_llm.answer import ACCOUNT, FAILED, RETRY
from polars_llm.backends.base import verdict
from polars_llm.request import key_from_custom_id

__all__ = [
    "REPLY_SCHEMA",
    "STOPPED",
    "Reply",
    "after_ctrl_c",
    "decode",
    "decoded",
    "failed",
    "frame",
    "never_ran",
    "rows",
    "word",
]

Reply: TypeAlias = dict[str, Any]

REPLY_SCHEMA: Mapping[str, pl.DataType] = {
    "key": pl.Binary(),
    "state": pl.UInt8(),
    "text": pl.String(),
    "error": pl.String(),
    "error_message": pl.String(),
    "finish_reason": pl.String(),
    "input_tokens": pl.Int64(),
    "cached_input_tokens": pl.Int64(),
    "output_tokens": pl.Int64(),
    "model": pl.String(),
    "body": pl.Binary(),
    "vector": pl.List(pl.Float32()),
    # Priced, not kept: the raw reply has them.
    "cache_write_tokens": pl.Int64(),
    "cache_write_1h_tokens": pl.Int64(),
    "service_tier": pl.String(),
    "inference_geo": pl.String(),
}

STOPPED = pl.DataFrame()
"""The block of a run that Ctrl+C has ended, until Polars can make a frame of what had come."""

# Replies that are Python objects at once.
_STEP = 1_000


class _Named(Protocol):
    custom_id: str


L = TypeVar("L", bound=_Named)
T = TypeVar("T")


# A pair of surrogates, half of one, or any other escape of JSON.
_ESCAPE = re.compile(rb"\\(?:(u[dD][89abAB]..\\u[dD][c-fC-F])|(u[dD][89a-fA-F]..)|.)", re.DOTALL)


def decode(raw: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """JSON of the right shape; what is no Unicode text in it becomes U+FFFD.

    A model that stops in the middle of an emoji leaves half of a surrogate pair, which JSON can say and
    no String can hold. The answer is paid for all the same.

    Raises
    ------
    msgspec.DecodeError, UnicodeDecodeError
        It is something else.
    """
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = raw.decode(errors="replace").encode()
        return decoder.decode(_ESCAPE.sub(lambda found: rb"\ufffd" if found[2] else found[0], text))


def decoded(lines: Iterable[bytes], decoder: msgspec.json.Decoder[L]) -> Iterator[L]:
    """Lines that are JSON of the right shape; blank and broken ones are left out."""
    for raw in lines:
        line = raw.strip(b" \r\n\t\xef\xbb\xbf")
        if not line:
            continue
        try:
            yield decode(line, decoder)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue


def rows(
    lines: Iterable[bytes], decoder: msgspec.json.Decoder[L], read: Callable[[L], Reply]
) -> pl.DataFrame:
    """Result lines as one frame (REPLY_SCHEMA).

    Lines that are not JSON, and lines whose custom_id is not ours, are left out: the caller
    reconciles against the custom_ids that it sent.
    """
    parts: list[pl.DataFrame] = []
    found: list[Reply] = []
    for line in decoded(lines, decoder):
        key = key_from_custom_id(line.custom_id)
        if key is not None:
            found.append({"key": key, **read(line)})
        if len(found) == _STEP:
            parts.append(frame(found))
            found = []
    return pl.concat([*parts, frame(found)])


def frame(replies: Sequence[Reply]) -> pl.DataFrame:
    """Replies as one frame (REPLY_SCHEMA).

    The ``vector`` of a reply is bytes, little-endian Float32: no number of it is ever a Python object.
    """
    made = pl.DataFrame(replies, schema={**REPLY_SCHEMA, "vector": pl.Binary()})
    sizes = made["vector"].bin.size().unique().drop_nulls()
    if sizes.is_empty():
        return made.with_columns(pl.lit(None, REPLY_SCHEMA["vector"]).alias("vector"))
    column = pl.col("vector")
    vectors = [
        pl.when(column.bin.size() == size)
        .then(column)
        .bin.reinterpret(dtype=pl.Array(pl.Float32, size // 4), endianness="little")
        .arr.to_list()
        for size in sizes
    ]
    return made.with_columns(pl.coalesce(vectors).alias("vector"))


def after_ctrl_c(rest: Callable[[], pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """`STOPPED`, once at least, and then what `rest` gives.

    Ctrl+C in a query makes each call of Polars raise KeyboardInterrupt, in all threads, until that query
    has returned: whoever asks for the next block tries again then.
    """
    while True:
        yield STOPPED
        try:
            block = rest()
        except KeyboardInterrupt:
            continue
        yield block
        return


def word(value: Any) -> str | None:
    """A field that hosts fill freely, and that must not make a reply unreadable."""
    return value if isinstance(value, str) else None


def failed(status: int | None, kind: str, message: Any, raw: bytes) -> Reply:
    """A request that went wrong: for good, for a passing reason, or for one of the account."""
    meaning = verdict(status, kind=kind)
    state = ACCOUNT if meaning.account else RETRY if meaning.transient else FAILED
    return _failure(state, kind, message, raw)


def never_ran(kind: str, message: Any, raw: bytes) -> Reply:
    """A request that the provider did not get to: not billed, sent again by itself."""
    return _failure(RETRY, kind, message, raw)


def _failure(state: int, kind: str, message: Any, raw: bytes) -> Reply:
    text = message if isinstance(message, str) else None if message is None else str(message)
    return {"state": state, "error": kind, "error_message": text, "body": raw or None}
