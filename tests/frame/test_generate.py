"""The main job, as a user has it: ask, look, collect; counted on the provider's bill."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

import polars_llm as pllm
from polars_llm import testing
from tests.conftest import MODEL

PROMPTS = ["Water boils at 100 degrees.", "Iron rusts in wet air.", None, "Water boils at 100 degrees."]


@pytest.fixture
def df() -> pl.DataFrame:
    return pl.DataFrame({"id": [1, 2, 3, 4], "prompt": PROMPTS})


def collected(frame: pl.DataFrame, **options: Any) -> pl.DataFrame:
    return frame.llm.generate("prompt", **{"model": MODEL, "on_pending": "wait", **options})


def test_first_submits_then_the_same_line_collects(provider: testing.Provider, df: pl.DataFrame) -> None:
    with pytest.raises(pllm.JobsPending) as pending:
        df.llm.generate("prompt", model=MODEL)
    assert str(pending.value).startswith("2 requests sent now, 2 answers pending in 1 batch job")
    assert pending.value.requests == 2
    assert len(pending.value.jobs) == 1
    assert pending.value.next_poll > 0
    out = df.llm.generate("prompt", model=MODEL)
    assert out.columns == ["id", "prompt", "response"]
    assert out.schema["response"] == pl.String
    assert out["id"].to_list() == [1, 2, 3, 4]
    first, second, none, again = out["response"]
    assert none is None
    assert first == again
    assert "Water" in first
    assert "Iron" in second
    assert provider.bill().billed == 2


def test_a_pending_job_is_polled_and_never_sent_again(df: pl.DataFrame) -> None:
    with testing.provider(auto=False) as provider:
        for _ in range(3):
            with pytest.raises(pllm.JobsPending):
                df.llm.generate("prompt", model=MODEL)
        assert provider.bill().batches == 1
        provider.finish()
        assert df.llm.generate("prompt", model=MODEL)["response"].null_count() == 1
        assert provider.bill().batches == 1


def test_a_warm_evaluation_does_not_talk_to_the_provider(
    provider: testing.Provider, df: pl.DataFrame
) -> None:
    collected(df)
    provider.clear_log()
    collected(df)
    assert provider.log() == []


def test_a_new_row_costs_one_request_and_order_none(provider: testing.Provider, df: pl.DataFrame) -> None:
    collected(df)
    more = pl.concat([df.reverse(), pl.DataFrame({"id": [5], "prompt": ["Snow is cold."]})])
    out = collected(more)
    assert provider.bill().billed == 3
    assert "Snow" in out["response"][-1]
    assert out["id"].to_list() == [4, 3, 2, 1, 5]


def test_all_forms_are_the_same_requests(provider: testing.Provider, df: pl.DataFrame) -> None:
    eager = collected(df)
    assert_frame_equal(collected(df.lazy()).collect(), eager)  # type: ignore[arg-type, attr-defined]
    assert_frame_equal(df.lazy().llm.generate("prompt", model=MODEL).collect(), eager)
    expr = pl.col("prompt").llm.generate(model=MODEL)
    assert_frame_equal(df.with_columns(expr), eager)
    assert_frame_equal(df.lazy().with_columns(expr).collect(), eager)
    assert_frame_equal(df["prompt"].llm.generate(model=MODEL).to_frame(), eager.select("response"))
    assert_frame_equal(df.llm.generate(pl.col("prompt"), model=MODEL), eager)
    assert provider.bill().billed == 2


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_lazy_frames_submit_and_collect(provider: testing.Provider, df: pl.DataFrame, engine: Any) -> None:
    lf = df.lazy().llm.generate("prompt", model=MODEL)
    lf.collect_schema()
    lf.explain()
    repr(lf)
    assert provider.log() == []
    with pytest.raises(pllm.JobsPending) as pending:
        lf.collect(engine=engine)
    assert pending.value.jobs
    assert lf.collect(engine=engine)["response"].null_count() == 1
    assert provider.bill().billed == 2


def test_a_lazy_frame_pays_for_the_rows_that_are_needed(provider: testing.Provider, df: pl.DataFrame) -> None:
    lf = df.lazy().llm.generate("prompt", model=MODEL, on_pending="null")
    assert lf.select("id").collect().height == 4
    assert provider.bill().accepted == 0
    lf.filter(pl.col("id") == 2).collect()
    assert provider.bill().accepted == 1
    lf.head(1).collect()
    assert provider.bill().accepted == 2


def test_the_answer_itself_can_be_filtered(provider: testing.Provider, df: pl.DataFrame) -> None:
    lf = collected(df.lazy())  # type: ignore[arg-type]
    wanted = lf.filter(pl.col("response").str.contains("Iron") & (pl.col("id") < 4)).select("id")
    assert wanted.collect()["id"].to_list() == [2]  # type: ignore[attr-defined]


@pytest.mark.parametrize("on_pending", ["raise", "wait", "null"])
def test_empty_and_all_null_frames_send_nothing(provider: testing.Provider, on_pending: Any) -> None:
    for prompts in ([], [None, None]):
        frame = pl.DataFrame({"prompt": prompts}, schema={"prompt": pl.String})
        out = collected(frame, on_pending=on_pending)
        assert out.schema["response"] == pl.String
        assert out.height == len(prompts)
        assert out["response"].null_count() == len(prompts)
    assert provider.log() == []


def test_one_row(provider: testing.Provider) -> None:
    assert collected(pl.DataFrame({"prompt": ["Ice melts."]}))["response"].to_list() == ["Ice melts."]


def test_chunked_sliced_and_categorical_columns(provider: testing.Provider) -> None:
    texts = [f"Fact number {n} is true." for n in range(20)]
    whole = pl.DataFrame({"prompt": texts})
    out = collected(whole)
    chunked = pl.concat([whole.slice(0, 7), whole.slice(7, 5), whole.slice(12)], rechunk=False)
    assert_frame_equal(collected(chunked), out)
    assert_frame_equal(collected(whole.slice(5, 10)), out.slice(5, 10))
    for dtype in (pl.Categorical(), pl.Enum(texts)):
        cast = whole.with_columns(pl.col("prompt").cast(dtype))
        assert collected(cast)["response"].equals(out["response"])
    assert provider.bill().billed == 20


def test_a_literal_prompt_is_one_request_for_the_whole_height(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"id": range(5)})
    out = frame.llm.generate(pl.lit("Rain falls."), model=MODEL, on_pending="wait")
    assert out["response"].to_list() == ["Rain falls."] * 5
    assert provider.bill().billed == 1


@pytest.mark.slow
def test_a_hundred_thousand_rows() -> None:
    letters = dict(zip("0123456789", "abcdefghij", strict=True))
    name = pl.format("q{}", pl.col("id").cast(pl.String).str.replace_many(letters))
    frame = pl.DataFrame({"id": range(100_000)}).with_columns(prompt=name)
    with testing.provider() as provider:
        out = collected(frame)
        bill = provider.bill()
    assert out["id"].equals(frame["id"])
    # The built-in model's summary of one word names that word, so a shifted row would show.
    assert out.select((pl.col("response") == pl.format("In short: {}.", "prompt")).all()).item()
    assert (bill.billed, bill.batches, bill.duplicates) == (100_000, 2, {})


def test_batches_are_packed_under_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    from polars_llm.backends.base import Limits
    from polars_llm.backends.openai import OpenAIBatch

    monkeypatch.setattr(OpenAIBatch, "limits", Limits(requests=3, size_bytes=2_000))
    frame = pl.DataFrame({"prompt": [f"Fact {n}." for n in range(7)] + ["x" * 3_000]})
    with testing.provider(limits={"openai_requests": 3}) as provider:
        with pytest.warns(pllm.LLMWarning, match="request_too_large 1"):
            out = collected(frame, output="full")["response"].struct.unnest()
        assert provider.bill().batches == 3
        assert provider.bill().billed == 7
    assert out["status"].to_list() == ["done"] * 7 + ["failed"]
    assert "request_too_large" in out["error"][-1]


# --- options ------------------------------------------------------------------------------------


def sent_bodies(provider: testing.Provider) -> list[dict[str, Any]]:
    return [r["body"] for batch in provider.batches() for r in provider.requests(batch["id"])]


def test_options_reach_the_provider_and_nothing_else_does(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Go."], "lead": ["Be brief."]})
    collected(frame)
    collected(frame, system="Be kind.", max_tokens=9, temperature=0.0, seed=1, sample=2)
    collected(frame, system=pl.col("lead"), params={"service_tier": "flex"})
    plain, full, led = sent_bodies(provider)
    assert plain == {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "Go."}]}
    assert full == {
        "model": "gpt-6-luna",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Go."}],
        "max_completion_tokens": 9,
        "temperature": 0,
        "seed": 3,
    }
    assert led["messages"][0] == {"role": "system", "content": "Be brief."}
    assert led["service_tier"] == "flex"


def test_what_changes_the_answer_is_another_request(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Go."]})
    for options in (
        {},
        {"temperature": 0.5},
        {"max_tokens": 5},
        {"system": "s"},
        {"sample": 1},
        {"params": {"x": 1}},
        {"model": "openai/gpt-6-sol"},
    ):
        collected(frame, **options)
    assert provider.bill().billed == 7


def test_samples_as_a_column(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Go."] * 3, "n": [0, 1, 1]})
    collected(frame, sample=pl.col("n"))
    assert provider.bill().billed == 2


def test_name_and_full_output(provider: testing.Provider, df: pl.DataFrame) -> None:
    out = collected(df, name="facts", output="full")
    facts = out["facts"].struct.unnest()
    assert facts["status"].to_list() == ["done", "done", None, "done"]
    assert facts["key"][0] == facts["key"][3] != facts["key"][1]
    assert facts["key"][0].startswith("pllm1-")
    assert facts["finish_reason"][0] == "stop"
    assert facts["input_tokens"][0] > 0
    assert facts["job_id"][0].startswith("job_")
    assert out["facts"][2] is None


def test_null_shows_what_is_there(df: pl.DataFrame) -> None:
    with testing.provider(auto=False) as provider:
        out = collected(df, on_pending="null", output="full")["response"].struct.unnest()
        assert out["status"].to_list() == ["pending", "pending", None, "pending"]
        assert out["job_id"][0].startswith("job_")
        assert provider.bill().batches == 1
        assert collected(df, on_pending="null")["response"].null_count() == 4


# --- failures -----------------------------------------------------------------------------------


def test_one_failed_row_is_null_with_one_warning(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Fine.", "Bad [[fail:400]].", "Also fine."]})
    with pytest.warns(pllm.LLMWarning, match=r"1 of 3 requests failed") as caught:
        out = collected(frame)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert out["response"].to_list() == ["Fine.", None, "Also fine."]
    with pytest.warns(pllm.LLMWarning):
        collected(frame)
    assert provider.bill().accepted == 3  # a permanent failure is remembered, not sent again
    with pytest.raises(pllm.RequestsFailed) as failed:
        collected(frame, on_error="raise")
    assert failed.value.failed == 1
    assert sum(failed.value.kinds.values()) == 1


def test_retry_failed_sends_failures_again_once(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Fine.", "Bad [[fail:400]]."]})
    with pytest.warns(pllm.LLMWarning):
        collected(frame)
    with pytest.warns(pllm.LLMWarning):
        collected(frame, retry_failed=True)
    assert provider.bill().accepted == 3


def test_passing_failures_are_retried_alone_and_bounded(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"prompt": ["Fine.", "Busy [[fail:500]]."]})
    with pytest.warns(pllm.LLMWarning, match="1 of 2"):
        collected(frame)
    bill = provider.bill()
    assert bill.accepted == 4  # both, then the failed one alone, twice
    assert bill.billed == 1


@pytest.mark.parametrize("form", ["frame", "lazy", "expr", "series"])
def test_wrong_dtypes_fail_before_anything_is_sent(provider: testing.Provider, form: str) -> None:
    frame = pl.DataFrame({"prompt": [1, 2]})
    calls = {
        "frame": lambda: frame.llm.generate("prompt", model=MODEL),
        "lazy": lambda: frame.lazy().llm.generate("prompt", model=MODEL).collect(),
        "expr": lambda: frame.select(pl.col("prompt").llm.generate(model=MODEL)),
        "series": lambda: frame["prompt"].llm.generate(model=MODEL),
    }
    with pytest.raises(pllm.InvalidRequest, match="Int64, not String"):
        calls[form]()
    assert provider.log() == []


def test_a_missing_column_is_polars_own_error(provider: testing.Provider, df: pl.DataFrame) -> None:
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        df.llm.generate("no such", model=MODEL)
    with pytest.raises(pl.exceptions.ColumnNotFoundError):
        df.lazy().llm.generate("no such", model=MODEL).collect()


@pytest.mark.parametrize(
    "options",
    [
        {"model": None},
        {"model": "gpt-6-luna"},
        {"model": "nobody/x"},
        {"output": "all"},
        {"on_pending": "later"},
        {"on_error": "ignore"},
        {"max_tokens": 0},
        {"max_tokens": 5.5},
        {"max_tokens": "5"},
        {"sample": -1},
        {"sample": 1.5},
        {"system": 3},
        {"temperature": float("nan")},
        {"params": {"stream": True}},
        {"name": ""},
    ],
)
def test_bad_arguments_fail_at_the_call(provider: testing.Provider, df: pl.DataFrame, options: Any) -> None:
    with pytest.raises((pllm.InvalidRequest, pllm.ModelNotChosen), match="Nothing was sent"):
        df.lazy().llm.generate("prompt", **{"model": MODEL, **options})
    assert provider.log() == []


# --- exceptions, secrets, processes ---------------------------------------------------------------


def test_a_series_has_a_value_for_each_row_of_an_eager_frame(
    provider: testing.Provider, df: pl.DataFrame
) -> None:
    for rows in (1, df.height + 1):  # Polars broadcasts a Series of one value no longer
        other = pl.Series("other", ["p"] * rows)
        with pytest.raises(pllm.InvalidRequest, match=f"{rows} rows and the frame {df.height}"):
            df.llm.generate(other, model=MODEL)
    with pytest.raises(pllm.InvalidRequest, match="lazy frame"):
        df.lazy().llm.generate(df["prompt"], model=MODEL)
    assert provider.bill().batches == 0


def test_a_series_knows_no_other_columns(provider: testing.Provider, df: pl.DataFrame) -> None:
    with pytest.raises(pllm.InvalidRequest, match="no other columns, and language was asked for"):
        df["prompt"].llm.generate(model=MODEL, system=pl.col("language"))
    assert provider.log() == []


def test_exceptions_keep_their_facts_through_expressions(
    provider: testing.Provider, df: pl.DataFrame
) -> None:
    for engine in ("in-memory", "streaming"):
        sample = 1 if engine == "streaming" else 0
        lf = df.lazy().with_columns(pl.col("prompt").llm.generate(model=MODEL, sample=sample))
        with pytest.raises(pllm.JobsPending) as pending:
            lf.collect(engine=engine)  # type: ignore[call-overload]
        assert pending.value.requests == 2
        assert pending.value.jobs
        copy = pickle.loads(pickle.dumps(pending.value))
        assert type(copy) is pllm.JobsPending
        assert copy.jobs == pending.value.jobs


@pytest.mark.parametrize("pickled", [lambda lf: lf.serialize(), pickle.dumps])
def test_a_plan_that_is_pickled_says_what_to_do(df: pl.DataFrame, pickled: Any) -> None:
    verb, expression = (
        df.lazy().llm.generate("prompt", model=MODEL),
        pl.col("prompt").llm.generate(model=MODEL),
    )
    for plan in (verb, df.lazy().select(expression)):
        with pytest.raises(pl.exceptions.ComputeError, match=r"(?s)cannot be pickled.*Hint: build it where"):
            pickled(plan)


def test_no_secret_reaches_disk_reprs_errors_or_pickles(
    provider: testing.Provider, df: pl.DataFrame, own_cache: Path
) -> None:
    secret = "sk-very-secret-0123456789"
    model = pllm.OpenAI("gpt-6-luna", api_key=secret, base_url=provider.openai_base_url)
    assert secret not in repr(model)
    assert secret.encode() not in pickle.dumps(model)
    collected(df, model=model)
    for path in own_cache.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
    provider.fault("status", status=401, message=f"Incorrect API key provided: {secret}.", times=None)
    with pytest.raises(pllm.AccountError) as refused:
        collected(df, model=model, sample=1)
    assert secret not in str(refused.value)
    assert "made no batch that runs" in str(refused.value)


def test_a_missing_key_is_said_before_anything_is_sent(df: pl.DataFrame) -> None:
    with pytest.raises(pllm.AccountError, match="OPENAI_API_KEY"):
        df.llm.generate("prompt", model=MODEL)


def test_account_errors_are_not_remembered(provider: testing.Provider, df: pl.DataFrame) -> None:
    provider.fault("status", operation="batches.create", status=401, times=1)
    with pytest.raises(pllm.AccountError):
        collected(df)
    assert collected(df)["response"].null_count() == 1
    assert provider.bill().billed == 2


def test_the_cache_is_shared_by_processes(provider: testing.Provider, df: pl.DataFrame) -> None:
    code = (
        "import polars as pl, polars_llm\n"
        f"df = pl.DataFrame({{'prompt': {PROMPTS!r}}})\n"
        f"print(df.llm.generate('prompt', model={MODEL!r}, on_pending='wait')['response'].null_count())"
    )
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
        )
        assert done.stdout.strip() == "1", done.stderr
    collected(df)
    assert provider.bill().billed == 2


def test_config_and_environment_choose_the_model(
    provider: testing.Provider, df: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(pllm.ModelNotChosen):
        df.llm.generate("prompt")
    monkeypatch.setenv("POLARS_LLM_MODEL", MODEL)
    assert df.llm.generate("prompt", on_pending="wait").height == 4
    with pllm.Config(model="openai/gpt-6-sol", on_pending="wait"):
        df.llm.generate("prompt")
    assert {b["model"] for b in sent_bodies(provider)} == {"gpt-6-luna", "gpt-6-sol"}
    lf = df.lazy()
    with pllm.Config(model="openai/gpt-6-terra"):
        verb = lf.llm.generate("prompt", on_pending="null")
    verb.collect()  # settings are those of the call, not of the collect
    assert "gpt-6-terra" in {b["model"] for b in sent_bodies(provider)}


def test_waiting_is_silent_where_nobody_looks(
    provider: testing.Provider, df: pl.DataFrame, capfd: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected(df)
    assert capfd.readouterr() == ("", "")
