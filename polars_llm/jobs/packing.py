"""Request lines -> provider batches under limits. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from polars_llm.backends.base import Limits

__all__ = ["Pack", "pack"]


@dataclasses.dataclass(slots=True)
class Pack:
    """What goes into one batch, or, if `oversized`, one request that fits into none.

    Parameters
    ----------
    rows
        Positions of the lines in the input, ascending.
    lines
        Request lines, without line ends.
    size_bytes
        With one line end a line.
    """

    rows: list[int] = dataclasses.field(default_factory=list)
    lines: list[bytes] = dataclasses.field(default_factory=list)
    size_bytes: int = 0
    oversized: bool = False


def pack(lines: Iterable[bytes], limits: Limits) -> Iterator[Pack]:
    """Fill batches in the order of the lines; one that is too large alone comes by itself.

    Every line is in exactly one pack; no pack passes the limits; at most one batch is held in
    memory.
    """
    current = Pack()
    for row, line in enumerate(lines):
        size = len(line) + 1
        if size > limits.size_bytes:
            yield Pack([row], [], size, oversized=True)
            continue
        full = len(current.rows) == limits.requests
        if full or current.size_bytes + size > limits.size_bytes:
            yield current
            current = Pack()
        current.rows.append(row)
        current.lines.append(line)
        current.size_bytes += size
    if current.rows:
        yield current
