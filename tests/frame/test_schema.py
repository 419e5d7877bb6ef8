"""Answers with a schema: typed columns, misfits as failed rows, and bounded retries; on both protocols."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from typing import Any, Literal

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from tests.conftest import MODEL

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]
REVIEW = {
    "mood": Literal["good", "bad"] | None,
    "stars": pl.UInt8,
    "facts": list[str],
    "by": {"name": str, "seen": pl.Date},
}
DTYPE = pl.Struct(
    {
        "mood": pl.Enum(["good", "bad"]),
        "stars": pl.UInt8,
        "facts": pl.List(pl.String),
        "by": pl.Struct({"name": pl.String, "seen": pl.Date}),
    }
)
PROMPTS = ["A good day.", None, "A bad day.", "A good day."]


@pytest.fixture
def df() -> pl.DataFrame:
    return pl.DataFrame({"id": [1, 2, 3, 4], "prompt": PROMPTS})


def review(prompt: str, **more: Any) -> str:
    mood = "good" if "good" in prompt else "bad"
    by = {"name": prompt, "seen": "2026-11-21"}
    return json.dumps({"mood": mood, "stars": 3, "facts": [prompt], "by": by, **more})


def value(prompt: str) -> dict[str, Any]:
    made: dict[str, Any] = pl.select(
        pl.lit(review(prompt)).str.json_decode(pl.Struct({**dict(DTYPE), "mood": pl.String}))
    ).item()
    return made


def collected(frame: pl.DataFrame, **options: Any) -> pl.DataFrame:
    return frame.llm.generate("prompt", **{"model": MODEL, "schema": REVIEW, "on_pending": "wait", **options})


@pytest.mark.parametrize("model", MODELS)
def test_a_typed_column_on_the_right_rows(df: pl.DataFrame, model: str) -> None:
    with testing.provider(model=lambda request: review(request.prompt)) as provider:
        out = collected(df, model=model)
        assert out.schema["response"] == DTYPE
        assert out["response"].to_list() == [None if p is None else value(p) for p in PROMPTS]
        assert provider.bill().billed == 2
        provider.clear_log()
        assert_frame_equal(collected(df, model=model), out)
        assert provider.log() == []


@pytest.mark.parametrize("model", MODELS)
def test_the_provider_gets_the_schema_in_its_own_way(df: pl.DataFrame, model: str) -> None:
    with testing.provider() as provider:  # the built-in model obeys the schema, or refuses it
        out = collected(df, model=model)["response"]
        (batch,) = provider.batches()
        body = provider.requests(batch["id"])[0]["body"]
    assert out.null_count() == 1
    assert out.dtype == DTYPE
    sent = (
        body["output_config"]["format"]["schema"]
        if "claude" in model
        else body["response_format"]["json_schema"]["schema"]
    )
    assert list(sent["properties"]) == list(REVIEW)
    assert sent["required"] == list(REVIEW)


def test_all_forms_are_the_same_requests(df: pl.DataFrame) -> None:
    with testing.provider(model=lambda request: review(request.prompt)) as provider:
        eager = collected(df)
        options: dict[str, Any] = {"model": MODEL, "schema": REVIEW}
        expr = pl.col("prompt").llm.generate(**options)
        lazy = df.lazy().llm.generate("prompt", **options)
        assert lazy.collect_schema() == eager.schema
        assert_frame_equal(lazy.collect(), eager)
        assert_frame_equal(lazy.collect(engine="streaming"), eager)
        assert_frame_equal(df.lazy().with_columns(expr).collect(), eager)
        assert_frame_equal(df["prompt"].llm.generate(**options).to_frame(), eager.select("response"))
        good = lazy.filter(pl.col("response").struct.field("mood") == "good").select("id").collect()
        assert good["id"].to_list() == [1, 4]
        assert provider.bill().billed == 2


@pytest.mark.parametrize("prompts", [[], [None, None]])
@pytest.mark.parametrize("output", ["value", "full"])
def test_nothing_to_ask(provider: testing.Provider, prompts: list[None], output: Any) -> None:
    frame = pl.DataFrame({"prompt": prompts}, schema={"prompt": pl.String})
    for out in (collected(frame, output=output), collected(frame.lazy(), output=output).lazy().collect()):  # type: ignore[arg-type]
        found = out["response"]
        assert found.null_count() == found.len() == len(prompts)
        assert (found.dtype if output == "value" else dict(found.dtype)["value"]) == DTYPE  # type: ignore[call-overload]
    assert provider.log() == []


def test_another_schema_is_another_request_and_text_is_not_typed(df: pl.DataFrame) -> None:
    with testing.provider(model=lambda request: review(request.prompt)) as provider:
        collected(df)
        collected(df, schema={"mood": str})
        collected(df, schema={**REVIEW, "by": {"seen": pl.Date, "name": str}})
        assert provider.bill().billed == 6
        assert collected(df, schema=None)["response"].dtype == pl.String


@pytest.mark.parametrize("model", MODELS)
def test_what_does_not_fit_is_a_failed_row_with_its_text(df: pl.DataFrame, model: str) -> None:
    def answer(request: Any) -> str:
        return review(request.prompt, stars=300) if "bad" in request.prompt else review(request.prompt)

    with testing.provider(model=answer) as provider:
        with pytest.warns(pllm.LLMWarning, match=r"1 of 2 requests failed: invalid_output 1\.") as said:
            out = collected(df, model=model, output="full")["response"].struct.unnest()
        assert "retries_on_invalid" in str(said[0].message)
        assert "were billed" in str(said[0].message)
        assert out["status"].to_list() == ["done", None, "failed", "done"]
        assert out["value"].to_list() == [value(PROMPTS[0] or ""), None, None, value(PROMPTS[0] or "")]
        assert out["error"][2] == "invalid_output: Expected `int` <= 255 - at `$.stars`"
        assert out["raw"][2] == review("A bad day.", stars=300)
        assert out["output_tokens"][2] > 0
        with pytest.raises(pllm.RequestsFailed) as failed:
            collected(df, model=model, on_error="raise")
        assert failed.value.kinds == {"invalid_output": 1}
        with pytest.warns(pllm.LLMWarning):
            assert collected(df, model=model, retry_failed=True)["response"].null_count() == 2
        assert provider.bill().billed == 2


def test_a_stored_answer_stays_as_it_came(df: pl.DataFrame) -> None:
    with testing.provider(model=lambda request: "not at all"):
        with pytest.warns(pllm.LLMWarning):
            collected(df)
    stored = pllm.results().collect()
    assert stored["text"].to_list() == ["not at all"] * 2
    assert stored["status"].unique().to_list() == ["done"]


@pytest.mark.parametrize("model", MODELS)
def test_refusals_and_cut_answers_say_so(provider: testing.Provider, model: str) -> None:
    frame = pl.DataFrame({"prompt": ["[[length]]", "[[refuse]]", "[[empty]]", "[[not_json]]"]})
    with testing.provider(), pytest.warns(pllm.LLMWarning, match="invalid_output 4"):
        out = collected(frame, model=model, output="full")["response"].struct.unnest()
    cut, refused, empty, other = out["error"]
    assert "cut off (length): " in cut or "cut off (max_tokens): " in cut
    assert refused == "invalid_output: no text: refusal: I can't help with that."
    assert empty == "invalid_output: no text: end_turn" if "claude" in model else "truncated" in empty
    assert "malformed" in other
    assert out["raw"][3] == "{This is no JSON"


def test_letter_case_of_labels_is_forgiven(df: pl.DataFrame) -> None:
    with testing.provider(model=lambda request: review(request.prompt, mood="GOOD")):
        assert collected(df)["response"].struct.field("mood").to_list() == ["good", None, "good", "good"]


# --- retries -------------------------------------------------------------------------------------


class Third:
    """Answers a prompt rightly from the nth time on."""

    def __init__(self, first_right: int) -> None:
        self.asked: dict[str, int] = {}
        self.first_right = first_right

    def __call__(self, request: Any) -> str:
        self.asked[request.prompt] = self.asked.get(request.prompt, 0) + 1
        right = self.asked[request.prompt] >= self.first_right or "good" in request.prompt
        return review(request.prompt) if right else "{"


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_invalid_answers_are_asked_again_alone_until_one_fits(
    df: pl.DataFrame, model: str, lazy: bool
) -> None:
    asked = Third(3)
    frame = df.lazy() if lazy else df
    with testing.provider(model=asked) as provider:
        out = collected(frame, model=model, retries_on_invalid=5).lazy().collect()  # type: ignore[arg-type]
        assert out["response"].to_list() == [None if p is None else value(p) for p in PROMPTS]
        assert asked.asked == {"A good day.": 1, "A bad day.": 3}
        provider.clear_log()
        again = collected(df, model=model, retries_on_invalid=2, output="full")["response"].struct.unnest()
        assert again["value"].to_list() == out["response"].to_list()
        assert again["key"].n_unique() == 3  # null among them
        assert provider.log() == []
        # A lower bound looks no further than it says.
        with pytest.warns(pllm.LLMWarning, match="invalid_output 1"):
            assert collected(df, model=model, retries_on_invalid=1)["response"].null_count() == 2
        assert provider.bill().billed == 4


@pytest.mark.parametrize("model", MODELS)
def test_realtime_answers_are_typed_and_asked_again_as_well(df: pl.DataFrame, model: str) -> None:
    asked = Third(3)
    with testing.provider(model=asked) as provider:
        now = df.llm.generate("prompt", model=model, schema=REVIEW, mode="realtime", retries_on_invalid=2)
        assert now["response"].to_list() == [None if p is None else value(p) for p in PROMPTS]
        assert provider.bill().realtime == provider.bill().billed == 4
        provider.clear_log()
        assert_frame_equal(collected(df, model=model, retries_on_invalid=2), now)
        assert provider.log() == []


@pytest.mark.parametrize("form", ["source", "expression", "pushdown"])
def test_driven_queries_ask_again_as_well(df: pl.DataFrame, form: str) -> None:
    asked = Third(4)
    options: dict[str, Any] = {"model": MODEL, "schema": REVIEW, "retries_on_invalid": 4}
    expr = pl.col("prompt").llm.generate(**options, pushdown=form == "pushdown")
    with testing.provider(model=asked) as provider:
        lf = df.lazy().llm.generate("prompt", **options) if form == "source" else df.lazy().with_columns(expr)
        out = lf.llm.collect()["response"]
        assert out.to_list() == [None if p is None else value(p) for p in PROMPTS]
        assert asked.asked == {"A good day.": 1, "A bad day.": 4}
        assert provider.bill().billed == 5


def test_what_a_typed_answer_decides_is_asked_after_its_retries(df: pl.DataFrame) -> None:
    asked = Third(5)

    def answer(request: Any) -> str:
        return str(asked(request)) if "mood" in json.dumps(request.schema) else f"about {request.prompt}"

    with testing.provider(model=answer) as provider:
        lf = df.lazy().llm.generate("prompt", model=MODEL, schema={"mood": str}, retries_on_invalid=4)
        mood = pl.col("response").struct.field("mood")
        lf = lf.llm.generate(pl.when(mood == "bad").then("prompt"), model=MODEL, name="why")
        out = lf.llm.collect()
        assert out["why"].to_list() == [None, None, "about A bad day.", None]
        assert provider.bill().billed == 7


def test_verbs_of_one_schema_and_other_bounds_share_what_they_ask(df: pl.DataFrame) -> None:
    asked = Third(2)
    with testing.provider(model=asked) as provider:
        lf = df.lazy().llm.generate("prompt", model=MODEL, schema=REVIEW, name="once")
        lf = lf.llm.generate("prompt", model=MODEL, schema=REVIEW, name="twice", retries_on_invalid=1)
        with pytest.warns(pllm.LLMWarning, match="1 of 2 requests failed: invalid_output 1"):
            out = lf.llm.collect()
        assert out["once"].null_count() == 2
        assert out["twice"].null_count() == 1
        assert provider.bill().billed == 3


def test_retries_are_bounded_and_what_was_asked_stays(df: pl.DataFrame) -> None:
    asked = Third(99)
    with testing.provider(model=asked) as provider:
        for bound, billed in ((0, 2), (2, 4), (2, 4), (3, 5)):
            with pytest.warns(pllm.LLMWarning, match="1 of 2 requests failed: invalid_output 1"):
                collected(df, retries_on_invalid=bound)
            assert provider.bill().billed == billed
        assert provider.bill().duplicates == {}


@pytest.mark.parametrize("form", ["eager", "source"])
def test_a_retry_is_pending_like_any_request(df: pl.DataFrame, form: str) -> None:
    def ask(**options: Any) -> pl.DataFrame:
        frame = df if form == "eager" else df.lazy()
        made = frame.llm.generate("prompt", model=MODEL, schema=REVIEW, retries_on_invalid=1, **options)
        return made.lazy().collect()

    with testing.provider(model=Third(2), auto=False) as provider:
        with pytest.raises(pllm.JobsPending) as pending:
            ask()
        assert pending.value.requests == 2
        provider.finish()
        # The first answers come in; one does not fit, and is sent again in the same evaluation.
        with pytest.raises(pllm.JobsPending) as pending:
            ask()
        assert pending.value.requests == 1
        out = ask(on_pending="null", output="full")["response"].struct.unnest()
        assert out["status"].to_list() == ["done", None, "pending", "done"]
        assert provider.bill().batches == 2
        provider.finish()
        assert ask()["response"].null_count() == 1
        assert provider.bill().billed == 3


def test_a_retry_raises_a_set_seed(df: pl.DataFrame) -> None:
    with testing.provider(model=lambda request: "{") as provider:
        with pytest.warns(pllm.LLMWarning):
            collected(df.head(1), seed=7, sample=2, retries_on_invalid=2)
        seeds = [r["body"]["seed"] for batch in provider.batches() for r in provider.requests(batch["id"])]
    assert sorted(seeds) == [9, 1_000_012, 2_000_015]


def test_system_and_sample_per_row_stay_with_the_retry() -> None:
    frame = pl.DataFrame(
        {"prompt": ["A bad day."] * 3, "lead": ["Be brief.", None, "Be kind."], "n": [0, 1, 0]}
    )
    with testing.provider(model=lambda request: "{") as provider:
        with pytest.warns(pllm.LLMWarning, match="3 of 3"):
            out = collected(
                frame, system=pl.col("lead"), sample=pl.col("n"), retries_on_invalid=1, output="full"
            )
        systems = [
            [m["content"] for m in r["body"]["messages"] if m["role"] == "system"]
            for batch in provider.batches()
            for r in provider.requests(batch["id"])
        ]
    assert sorted(systems) == [[], [], ["Be brief."], ["Be brief."], ["Be kind."], ["Be kind."]]
    assert out["response"].struct.field("key").n_unique() == 3


def test_an_estimate_follows_the_retries(df: pl.DataFrame) -> None:
    options: dict[str, Any] = {"model": MODEL, "schema": REVIEW, "max_tokens": 50}

    def facts(**more: Any) -> dict[str, Any]:
        return df.llm.estimate("prompt", **options, **more).row(0, named=True)

    with testing.provider(model=Third(2)) as provider:
        assert facts()["to_send"] == 2
        with pytest.warns(pllm.LLMWarning, match="invalid_output"):
            collected(df, max_tokens=50)
        now = facts(retry_failed=True)
        assert (now["failed"], now["to_send"]) == (1, 0)
        now = facts()
        assert (now["cached"], now["failed"], now["to_send"]) == (1, 1, 0)
        now = facts(retries_on_invalid=1)
        assert (now["cached"], now["failed"], now["to_send"]) == (1, 0, 1)
        collected(df, max_tokens=50, retries_on_invalid=1)
        now = facts(retries_on_invalid=1)
        assert (now["cached"], now["failed"], now["to_send"]) == (2, 0, 0)
        assert provider.bill().billed == 3
        labels = df.llm.estimate("prompt", ["good", "bad"], verb="classify", model=MODEL, max_tokens=9)
        assert labels["to_send"].to_list() == [2]


@pytest.mark.parametrize("driven", [False, True])
def test_retries_count_against_max_cost(driven: bool) -> None:
    frame = pl.DataFrame({"prompt": ["A bad day."]})
    model = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=4))
    options: dict[str, Any] = {"model": model, "max_tokens": 50}

    def ask(**more: Any) -> pl.DataFrame:
        if not driven:
            return collected(frame, **options, **more)
        return frame.lazy().llm.generate("prompt", schema=REVIEW, **options, **more).llm.collect()

    bound = frame.llm.estimate("prompt", schema=REVIEW, **options)["cost_usd_max"][0]
    with testing.provider(model=lambda request: "x" * 190) as provider:
        with pytest.raises(pllm.BudgetExceeded) as exceeded:
            ask(retries_on_invalid=3, max_cost=bound * 1.1)
        assert exceeded.value.cost_usd == pytest.approx(bound, rel=0.01)
        assert exceeded.value.reserved_usd == pytest.approx(provider.bill().cost_usd)
        assert provider.bill().billed == 1
        with pytest.warns(pllm.LLMWarning, match="invalid_output 1"):
            ask(retries_on_invalid=3, max_cost=bound * 3)
        assert provider.bill().billed == 4


KILLED = """
import polars as pl, polars_llm as pllm
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.openai import OpenAIBatch
AnthropicBatch.create_timeout = OpenAIBatch.create_timeout = 0.5
df = pl.DataFrame({"prompt": ["A bad day.", "A good day.", "A bad night."]})
out = df.llm.generate("prompt", model=%r, schema={"mood": str}, on_pending="wait", retries_on_invalid=3)
print(out["response"].struct.field("mood").to_list())
"""


@pytest.mark.parametrize(("model", "kind"), [(MODELS[0], "kill"), (MODELS[1], "create-then-kill")])
def test_a_retry_survives_a_kill_and_is_sent_once(model: str, kind: str) -> None:
    asked = Third(3)
    with testing.provider(model=asked) as provider:
        for batch in (1, 2):  # the first retry's batch, then the second's
            provider.fault(kind, operation="*batches.create", after=1 if batch == 1 else 0)
            died = subprocess.run([sys.executable, "-c", KILLED % model], check=False, env=os.environ)
            assert died.returncode == -signal.SIGKILL
        done = subprocess.run(
            [sys.executable, "-c", KILLED % model],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ,
        )
        assert done.stdout.strip() == "['bad', 'good', 'bad']", done.stderr
        assert asked.asked == {"A good day.": 1, "A bad day.": 3, "A bad night.": 3}
        assert provider.bill().billed == 7
        assert provider.bill().duplicates == {}


# --- refused at call ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"schema": {"a": {"b": Any}}}, "'a.b'"),
        (
            {"schema": {f"f{i}": int | None for i in range(17)}, "model": MODELS[1]},
            "Anthropic takes at most 16",
        ),
        ({"schema": None, "retries_on_invalid": 1}, "there is none"),
        ({"retries_on_invalid": -1}, "retries_on_invalid"),
        ({"retries_on_invalid": True}, "retries_on_invalid"),
        ({"params": {"response_format": {"type": "text"}}}, "response_format"),
    ],
)
def test_what_cannot_be_is_refused_at_call(
    provider: testing.Provider, df: pl.DataFrame, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(pllm.InvalidRequest) as refused:
        collected(df, **options)
    assert said in str(refused.value)
    with warnings.catch_warnings(), pytest.raises(pllm.InvalidRequest):
        collected(df.lazy(), **options)  # type: ignore[arg-type]
    assert provider.log() == []
