"""Whole conversations as prompts: the same content is the same request, in whatever form it comes."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polars_llm as pllm
from polars_llm import testing
from polars_llm.frame import inputs, verbs
from tests.conftest import MODEL

MESSAGE = pl.Struct({"role": pl.String, "content": pl.String})
TALKS = [
    [("user", "Name a metal."), ("assistant", "Iron."), ("user", "Another.")],
    None,
    [("system", "Be brief."), ("user", "Name a gas.")],
    [("user", "Name a metal."), ("assistant", "Iron."), ("user", "Another.")],
]

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20)
TALK = st.lists(
    st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), TEXT), min_size=1, max_size=4
)


def column(talks: list[Any], name: str = "talk") -> pl.Series:
    rows = [t if t is None else [{"role": r, "content": c} for r, c in t] for t in talks]
    return pl.Series(name, rows, dtype=pl.List(MESSAGE))


def keys(prompts: pl.Series, **options: Any) -> list[int | None]:
    verb = verbs.generate(pl.col(inputs.PROMPT), model=pllm.OpenAI("m", api_key="k"), **options)
    return verb.keys(verb.checked(prompts.alias(inputs.PROMPT).to_frame())).to_list()


def collected(frame: Any, prompt: Any = "talk", **options: Any) -> Any:
    return frame.llm.generate(prompt, **{"model": MODEL, "on_pending": "wait", **options})


def test_conversations_are_asked_once_and_answered_on_their_rows(provider: testing.Provider) -> None:
    out = collected(pl.DataFrame({"talk": column(TALKS)}))
    assert out["response"].to_list() == ["Another.", None, "Name a gas.", "Another."]
    assert provider.bill().billed == 2


def test_all_forms_are_the_same_requests(provider: testing.Provider) -> None:
    df = pl.DataFrame({"talk": column(TALKS)})
    want = collected(df)["response"].to_list()
    assert collected(df.lazy()).collect()["response"].to_list() == want
    assert df.lazy().llm.generate("talk", model=MODEL).collect()["response"].to_list() == want
    expr = pl.col("talk").llm.generate(model=MODEL)
    assert df.select(expr)["response"].to_list() == want
    assert df.lazy().select(expr).collect()["response"].to_list() == want
    assert df["talk"].llm.generate(model=MODEL).to_list() == want
    assert provider.bill().billed == 2


def test_a_conversation_that_is_a_prompt_is_already_paid_for(provider: testing.Provider) -> None:
    collected(pl.DataFrame({"p": ["Name a gas."]}), "p", system="Be brief.")
    collected(pl.DataFrame({"talk": column(TALKS[2:3])}))
    collected(pl.DataFrame({"talk": column([[("user", "Name a gas.")]])}), system="Be brief.")
    assert provider.bill().billed == 1


def test_samples_and_system_prompts_per_row(provider: testing.Provider) -> None:
    df = pl.DataFrame({"talk": column(TALKS), "n": [0, 0, 0, 1], "s": ["Be kind.", None, "Be kind.", None]})
    collected(df, system=pl.col("s"), sample=pl.col("n"))
    sent = provider.bill().billed
    assert sent == 3
    full = collected(df, system=pl.col("s"), sample=pl.col("n"), output="full")
    assert full["response"].struct.field("key").drop_nulls().n_unique() == 3
    assert provider.bill().billed == sent


def test_the_system_prompt_comes_before_the_conversations_own() -> None:
    said: list[Any] = []

    def model(request: testing.ModelRequest) -> str:
        said.append([(m["role"], m["content"]) for m in request.body["messages"]])
        return "ok"

    with testing.provider(model=model):
        collected(pl.DataFrame({"talk": column(TALKS[2:3])}), system="You are a chemist.")
    assert said == [
        [("system", "You are a chemist."), ("system", "Be brief."), ("user", "Name a gas.")],
    ]


def test_on_anthropic_system_messages_go_where_they_belong() -> None:
    said: list[Any] = []

    def model(request: testing.ModelRequest) -> str:
        said.append((request.system, request.body["messages"]))
        return "ok"

    with testing.provider(model=model):
        out = collected(
            pl.DataFrame({"talk": column([[("system", "Be brief."), *TALKS[0]]])}),
            model="anthropic/claude-haiku-5-5",
        )
    assert out["response"].to_list() == ["ok"]
    ((system, messages),) = said
    assert system == "Be brief."
    assert [(m["role"], m["content"]) for m in messages] == TALKS[0]


@given(
    talks=st.lists(st.none() | TALK, min_size=1, max_size=6), cut=st.integers(0, 6), system=st.none() | TEXT
)
def test_neither_chunks_nor_field_order_nor_dtypes_change_a_key(
    talks: list[Any], cut: int, system: str | None
) -> None:
    whole = column(talks)
    want = keys(whole, system=system)
    assert [k is None for k in want] == [t is None for t in talks]
    assert keys(pl.concat([whole.head(cut), whole.slice(cut)], rechunk=False), system=system) == want
    turned = [t if t is None else [{"content": c, "role": r} for r, c in t] for t in talks]
    other = pl.Struct({"content": pl.String, "role": pl.Categorical()})
    assert keys(pl.Series(turned, dtype=pl.List(other)), system=system) == want
    assert [keys(whole.slice(i, 1), system=system)[0] for i in range(len(talks))] == want


@given(talks=st.lists(TALK, min_size=1, max_size=6), system=st.none() | TEXT)
def test_keys_are_equal_exactly_when_conversations_are(talks: list[Any], system: str | None) -> None:
    got = keys(column(talks), system=system)
    for first, one in zip(got, talks, strict=True):
        for second, other in zip(got, talks, strict=True):
            assert (first == second) == (one == other)


def test_arrays_are_conversations_too() -> None:
    talk = column([TALKS[0], TALKS[3]])
    assert keys(talk.list.to_array(3)) == keys(talk)


def test_many_rows_cross_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    talks = [None if n % 5 == 0 else [("user", str(n)), ("assistant", "x"), ("user", "y")] for n in range(23)]
    whole = keys(column(talks))
    monkeypatch.setattr("polars_llm.frame.conversations._STEP", 4)
    assert keys(column(talks)) == whole
    talks[17] = [("user", "a"), ("user", None)]  # type: ignore[list-item]
    with pytest.raises(pllm.InvalidRequest, match="Row 17, message 1"):
        keys(column(talks))


BAD: list[tuple[list[Any], str]] = [
    ([None, []], "Row 1: the conversation is empty"),
    ([[("user", "a")], [("user", "a"), ("assistant", None)]], "Row 1, message 1: its content is null"),
    ([[("user", "a")], [(None, "a")]], "Row 1, message 0: it has no role"),
    ([None, [("user", "a"), ("tool", "b")]], "Row 1, message 1: the role is 'tool'"),
]


@pytest.mark.parametrize(("talks", "said"), BAD)
def test_what_cannot_be_sent_is_said_before_anything_is_sent(
    provider: testing.Provider, talks: list[Any], said: str
) -> None:
    frame = pl.DataFrame({"talk": column(talks)})
    for ask in (
        lambda: collected(frame),
        lambda: collected(frame.lazy()).collect(),
        lambda: frame.select(pl.col("talk").llm.generate(model=MODEL)),
    ):
        with pytest.raises(pllm.InvalidRequest, match=said) as error:
            ask()
        assert "Nothing was sent" in str(error.value)
    assert provider.log() == []


@pytest.mark.parametrize(
    ("talk", "said"),
    [
        ([("user", "a"), ("assistant", "b")], "Row 1, message 1: the assistant has the last word"),
        ([("user", "b"), ("developer", "a"), ("user", "b")], "Row 1, message 1: the role is 'developer'"),
        ([("system", "a")], "Row 1, message 0: only the system speaks"),
        ([("system", "a"), ("system", "b")], "Row 1, message 1: only the system speaks"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"mode": "realtime"}])
def test_what_anthropic_does_not_take(
    provider: testing.Provider, talk: Any, said: str, options: dict[str, Any]
) -> None:
    frame = pl.DataFrame({"talk": column([TALKS[0], talk, TALKS[0]])})
    with pytest.raises(pllm.InvalidRequest, match=said):
        collected(frame, model="anthropic/claude-haiku-5-5", **options)
    assert provider.log() == []
    assert collected(frame)["response"].null_count() == 0


def test_a_null_message_is_refused(provider: testing.Provider) -> None:
    with pytest.raises(pllm.InvalidRequest, match="Row 0, message 0: it is null"):
        collected(pl.DataFrame({"talk": pl.Series([[None]], dtype=pl.List(MESSAGE))}))


@pytest.mark.parametrize(
    "dtype",
    [
        pl.List(pl.Struct({"role": pl.String, "text": pl.String})),
        pl.List(pl.Struct({"role": pl.String, "content": pl.String, "name": pl.String})),
        pl.List(pl.Struct({"role": pl.String, "content": pl.Int64})),
        pl.List(pl.String),
        MESSAGE,
    ],
)
def test_other_dtypes_are_refused(provider: testing.Provider, dtype: Any) -> None:
    with pytest.raises(pllm.InvalidRequest, match="dtype"):
        collected(pl.DataFrame({"talk": pl.Series([None], dtype=dtype)}))
    assert provider.log() == []


def test_all_null_and_empty_columns(provider: testing.Provider) -> None:
    for talks in ([], [None, None]):
        assert collected(pl.DataFrame({"talk": column(talks)}))["response"].to_list() == talks
    assert provider.log() == []
