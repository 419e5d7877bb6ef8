"""What a user sets for a verb, by this library's names; each backend writes it as its provider takes it."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from polars_llm.errors import InvalidRequest

__all__ = ["Options"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user set for a verb, by our names; None is unset and never sent.

    Parameters
    ----------
    schema
        `Schema.json`. A backend puts it into `RequestHeader.schema` as its provider takes it
        (`polars_llm.schema.rules.worded`).

    Raises
    ------
    InvalidRequest
        At call: a value of another kind. Providers answer that for each row, when the job is over.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    reasoning_effort: str | None = None
    params: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    schema: str | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        for name, (takes, fits) in _KINDS.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                # What is in params may be a secret.
                given = f"of type {type(value).__name__}" if name == "params" else repr(value)
                raise InvalidRequest(
                    f"{name} is {given}, not {takes}",
                    hint="see help(pl.DataFrame.llm.generate). Nothing was sent.",
                )


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_stop(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and all(map(_is_text, value)))


def _is_fields(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value))


_KINDS: Mapping[str, tuple[str, Callable[[object], bool]]] = {
    "temperature": ("a number", _is_number),
    "top_p": ("a number", _is_number),
    "seed": ("a whole number", _is_whole),
    "stop": ("a text or a list of texts", _is_stop),
    "reasoning_effort": ("a word", _is_text),
    "params": ("a mapping of names to values", _is_fields),
}
