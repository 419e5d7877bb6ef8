"""The four namespaces: what they pass on is what they document."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from polars_llm import namespace
from polars_llm.frame import embeddings, verbs

SPACES = [namespace.LLMDataFrame, namespace.LLMLazyFrame, namespace.LLMExpr, namespace.LLMSeries]


def keywords(function: Any) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def test_the_typed_keywords_are_those_of_the_verb() -> None:
    assert keywords(verbs.generate) == set(verbs.GenerateOptions.__annotations__)
    assert keywords(verbs.generate) - {"schema"} == set(verbs.CommonOptions.__annotations__)
    assert keywords(embeddings.embed) == set(embeddings.EmbedOptions.__annotations__)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", ["generate", "classify", "embed"])
def test_every_parameter_is_documented_where_it_is_taken(space: type, name: str) -> None:
    verb = getattr(space, name)
    section = verb.__doc__.partition("Parameters\n")[2].partition("Returns\n")[0]
    heads = [line.strip() for line in section.splitlines() if line.startswith(" " * 8) and line[8:9].strip()]
    documented = {part.strip() for head in heads for part in head.split(",")}
    taken = set(inspect.signature(verb).parameters) - {"self"}
    assert taken <= documented
    assert documented - taken <= {"prompt", "text", "----------"}  # an Expr or Series is its own prompt
    assert "{" not in verb.__doc__.replace("{}", "").replace("params={", "")
