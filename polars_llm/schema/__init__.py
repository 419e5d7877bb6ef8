"""Schemas of answers: what a user writes -> one frozen form, its dtype, and how answers are read.

`freeze` takes a class or dtypes or a JSON Schema and gives a `Schema`. Its text is ours alone: no
library's way of printing a model enters a key.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
import polars as pl

from polars_llm.schema.classes import root_of
from polars_llm.schema.reading import compiled, read
from polars_llm.schema.shapes import Fields, dtype_of, json_form

__all__ = ["Schema", "freeze"]


@dataclasses.dataclass(frozen=True, slots=True)
class Schema:
    """A schema of answers, frozen.

    Parameters
    ----------
    root
        The shape of an answer.
    """

    root: Fields

    @property
    def json(self) -> str:
        """Compact JSON Schema in our strict form, properties in their order. It enters the key."""
        return msgspec.json.encode(json_form(self.root)).decode()

    @property
    def dtype(self) -> pl.Struct:
        """Of the values: a Struct with the properties in their order."""
        dtype = dtype_of(self.root)
        assert isinstance(dtype, pl.Struct)
        return dtype

    def read(self, text: pl.Series) -> tuple[pl.Series, pl.Series]:
        """Answers as values.

        Parameters
        ----------
        text
            String: what the model wrote.

        Returns
        -------
        tuple
            Values of `dtype`, null where the text is null or does not fit; and the reason why not
            (String), null where it fits. Properties that nobody asked for are ignored.
        """
        return read(self.root, text)


def freeze(schema: Any) -> Schema:
    """The frozen form of a schema.

    Parameters
    ----------
    schema
        A pydantic model class, a dataclass or TypedDict class; a `pl.Struct` or `pl.Schema`; a dict of
        names and dtypes or Python types; or a JSON Schema as a dict.

    Raises
    ------
    InvalidRequest
        At call: something that strict structured output or Polars cannot say. The message names the
        path to the field.
    """
    made = Schema(root_of(schema))
    compiled(made.root)  # a bound or a pattern that cannot be checked is said now
    return made
