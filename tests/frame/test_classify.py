"""classify: one of some labels for each text, as an Enum; on both protocols."""

from __future__ import annotations

import enum
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from tests.conftest import MODEL

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]
LABELS = ["positive", "negative", "neutral"]
TEXTS = ["What a happy day!", None, "It was bad, bad.", "A table.", "What a happy day!"]


class Mood(enum.Enum):
    POSITIVE = "positive"
    NEGATIVE = "negative"
    NEUTRAL = "neutral"


@pytest.fixture
def df() -> pl.DataFrame:
    return pl.DataFrame({"text": TEXTS})


def labelled(frame: pl.DataFrame, labels: Any = LABELS, **options: Any) -> pl.DataFrame:
    return frame.llm.classify("text", labels, **{"model": MODEL, "on_pending": "wait", **options})


@pytest.mark.parametrize("model", MODELS)
def test_labels_on_the_right_rows(df: pl.DataFrame, model: str) -> None:
    with testing.provider() as provider:
        out = labelled(df, model=model)
        assert out.columns == ["text", "label"]
        assert out.schema["label"] == pl.Enum(LABELS)
        assert out["label"].to_list() == ["positive", None, "negative", "neutral", "positive"]
        assert provider.bill().billed == 3
        assert_frame_equal(labelled(df, model=model), out)
        assert provider.bill().billed == 3


def test_all_forms_are_the_same_requests(df: pl.DataFrame) -> None:
    with testing.provider() as provider:
        eager = labelled(df)
        options: dict[str, Any] = {"labels": LABELS, "model": MODEL}
        lazy = df.lazy().llm.classify("text", **options)
        assert lazy.collect_schema() == eager.schema
        assert_frame_equal(lazy.collect(), eager)
        expr = pl.col("text").llm.classify(**options)
        assert_frame_equal(df.with_columns(expr), eager)
        assert_frame_equal(df.lazy().with_columns(expr).collect(), eager)
        assert_frame_equal(df["text"].llm.classify(**options).to_frame(), eager.select("label"))
        assert lazy.filter(pl.col("label") == "negative").collect().height == 1
        assert provider.bill().billed == 3


@pytest.mark.parametrize(
    "labels",
    [
        tuple(LABELS),
        dict.fromkeys(LABELS),
        dict.fromkeys(LABELS).keys(),
        Mood,
        pl.Enum(LABELS),
        pl.Series(LABELS),
    ],
)
def test_labels_however_they_are_named(df: pl.DataFrame, labels: Any) -> None:
    with testing.provider() as provider:
        out = labelled(df)
        assert_frame_equal(labelled(df, labels), out)
        assert provider.bill().billed == 3


SYSTEM = (
    "Classify the text of the user's message. Answer with exactly one of these labels:\n"
    "- spam: unwanted mail\n"
    "- ham"
)


@pytest.mark.parametrize("model", MODELS)
def test_what_the_model_is_told_is_frozen(model: str) -> None:
    frame = pl.DataFrame({"text": ["Buy now", "Buy now"], "who": [None, "for a bank"]})
    labels = {"spam": "unwanted mail", "ham": None}
    with testing.provider(model=lambda request: '{"label": "ham"}') as provider:
        labelled(frame, labels, model=model)
        labelled(frame, labels, model=model, system="Be strict.")
        labelled(frame, labels, model=model, system=pl.format("Sort {}.", "who"))
        bodies = [r["body"] for batch in provider.batches() for r in provider.requests(batch["id"])]
        # The row whose own system prompt is null says the same as the first call.
        assert provider.bill().billed == 3
    told = []
    for body in bodies:
        blocks = body.get("system") or [{"text": body["messages"][0]["content"]}]
        told.append(blocks[0]["text"])
    assert sorted(told) == sorted([SYSTEM, f"{SYSTEM}\n\nBe strict.", f"{SYSTEM}\n\nSort for a bank."])


def test_keys_of_classify_are_frozen(df: pl.DataFrame) -> None:
    with testing.provider():
        out = labelled(
            df.head(1), output="full", model=pllm.OpenAI("gpt-6-luna", cache_as="https://x.example")
        )
    full = out["label"].struct.unnest()
    assert full.schema["value"] == pl.Enum(LABELS)
    assert full["raw"].to_list() == ['{"label":"positive"}']
    assert full["key"].to_list() == ["pllm1-Wf7zOkE7gS641gfYR6BSklH-PLTPufeCwqajtv3s9No"]


def test_order_and_descriptions_of_labels_are_part_of_the_request(df: pl.DataFrame) -> None:
    with testing.provider() as provider:
        labelled(df)
        labelled(df, LABELS[::-1])
        labelled(df, {**dict.fromkeys(LABELS), "neutral": "neither"})
        assert provider.bill().billed == 9


def test_another_letter_case_is_the_label_and_another_word_a_failure(df: pl.DataFrame) -> None:
    def answer(request: Any) -> str:
        return '{"label": "Positive"}' if "happy" in request.prompt else '{"label": "mixed"}'

    with testing.provider(model=answer) as provider:
        with pytest.warns(pllm.LLMWarning, match="2 of 3 requests failed: invalid_output 2"):
            out = labelled(df)
        assert out["label"].to_list() == ["positive", None, None, None, "positive"]
        with pytest.warns(pllm.LLMWarning, match="2 of 3"):
            labelled(df, retries_on_invalid=2)
        assert provider.bill().billed == 7


@pytest.mark.parametrize("texts", [[], [None]])
def test_nothing_to_classify(provider: testing.Provider, texts: list[None]) -> None:
    frame = pl.DataFrame({"text": texts}, schema={"text": pl.String})
    out = labelled(frame)
    assert out.schema["label"] == pl.Enum(LABELS)
    assert out["label"].null_count() == len(texts)
    assert provider.log() == []


def test_a_thousand_labels(df: pl.DataFrame) -> None:
    labels = [f"topic {n}" for n in range(1_000)]
    with testing.provider(model=lambda request: '{"label": "topic 999"}'):
        assert labelled(df, labels)["label"].drop_nulls().unique().to_list() == ["topic 999"]
    with pytest.raises(pllm.InvalidRequest, match="1,001 labels"):
        labelled(df, [*labels, "one more"])


class Numbers(enum.Enum):
    ONE = 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([], "empty"),
        ({}, "empty"),
        (["a", "a"], "'a' and 'a'"),
        (["Spam", "spam"], "'Spam' and 'spam'"),
        (["straße", "STRASSE"], "case is folded"),
        (["a", " "], "blank"),
        (["a", 1], "1"),
        (["a", None], "None"),
        ({"a": 1}, "not texts"),
        (Numbers, "not texts"),
        ("spam", "not several labels"),
        (3, "not several labels"),
        (["\ud800"], "surrogate"),
        ({"spam", "ham"}, "sorted(labels)"),
        (frozenset({"spam", "ham"}), "another order in every process"),
    ],
)
def test_labels_that_cannot_be_are_refused_at_call(
    provider: testing.Provider, df: pl.DataFrame, labels: Any, said: str
) -> None:
    with pytest.raises(pllm.InvalidRequest) as refused:
        df.lazy().llm.classify("text", labels, model=MODEL)
    assert said in str(refused.value)
    assert "Nothing was sent." in str(refused.value)
    assert provider.log() == []


def test_other_arguments_are_checked_as_for_generate(df: pl.DataFrame) -> None:
    with pytest.raises(pllm.InvalidRequest, match="system is a int"):
        labelled(df, system=3)
    with pytest.raises(TypeError, match="schema"):
        labelled(df, schema={"a": int})
