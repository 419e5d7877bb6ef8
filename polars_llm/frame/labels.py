"""Labels of classify: what a user may name, and the text that tells the model about them.

The text is part of every request's system prompt, and so of its key: it never changes
(`tests/frame/test_classify.py` freezes it).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import polars as pl

from polars_llm.errors import InvalidRequest
from polars_llm.schema import Schema, freeze

__all__ = ["FIELD", "Labels", "LabelsLike"]

LabelsLike: TypeAlias = Iterable[str] | Mapping[str, str | None] | type[enum.Enum] | pl.Enum

FIELD = "label"

_TASK = "Classify the text of the user's message. Answer with exactly one of these labels:"


@dataclasses.dataclass(frozen=True, slots=True)
class Labels:
    """Labels in their order, each with its description or None."""

    described: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, given: LabelsLike) -> Labels:
        """The labels that a user named.

        Raises
        ------
        InvalidRequest
            At call: no labels, a set (it has no order), labels that are not texts or are blank, and labels
            that are equal, or collide when case is folded (a model may answer in another case).
        """
        pairs = _pairs(given)
        if not pairs:
            raise _refused("labels is empty", "name at least one label, for example ['spam', 'ham'].")
        folded: dict[str, str] = {}
        for label, said in pairs:
            if not isinstance(label, str) or not (said is None or isinstance(said, str)):
                raise _refused(f"labels has {label!r}, described by {said!r}: not texts", "use strings.")
            if any(0xD800 <= ord(c) < 0xE000 for c in label):
                raise _refused(f"labels has {label!r}, with a lone surrogate", "decode the text first.")
            if not label.strip():
                raise _refused(f"labels has the blank label {label!r}", "leave it out, or give it a name.")
            if label.casefold() in folded:
                other = folded[label.casefold()]
                raise _refused(
                    f"labels has {other!r} and {label!r}, which are one label when case is folded",
                    "rename one of them: a model may answer in another case.",
                )
            folded[label.casefold()] = label
        return cls(tuple(pairs))

    @property
    def schema(self) -> Schema:
        """An object with the label as its one property."""
        return freeze({FIELD: pl.Enum([label for label, _ in self.described])})

    def system(self, own: str | pl.Expr | None) -> str | pl.Expr:
        """The task and the labels; behind an empty line what the user says, where that is not null."""
        lines = [f"- {label}: {said}" if said else f"- {label}" for label, said in self.described]
        task = "\n".join([_TASK, *lines])
        if own is None:
            return task
        if isinstance(own, pl.Expr):
            return pl.concat_str(pl.lit(f"{task}\n\n"), own).fill_null(pl.lit(task))
        return f"{task}\n\n{own}"


def _pairs(given: LabelsLike) -> list[tuple[Any, Any]]:
    if isinstance(given, Mapping):
        return list(given.items())
    if isinstance(given, pl.Enum):
        return [(label, None) for label in given.categories]
    if isinstance(given, type) and issubclass(given, enum.Enum):
        return [(member.value, None) for member in given]
    if isinstance(given, (set, frozenset)):
        # Python shuffles a set of texts anew in every process: other keys, and the column paid again.
        raise _refused(
            "labels is a set, which has another order in every process, and the order is part of the key",
            "pass a list, for example sorted(labels).",
        )
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise _refused(f"labels is {given!r}, not several labels", "for example ['spam', 'ham'].")
    return [(label, None) for label in given]


def _refused(what: str, hint: str) -> InvalidRequest:
    return InvalidRequest(what, hint=f"{hint} Nothing was sent.")
