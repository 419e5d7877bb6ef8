"""What operators call: jobs, results, cancel, abandon, watch, recover; and the same in the CLI."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import operate, store, testing
from polars_llm.cli import main
from tests.conftest import MODEL

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]
FRAME = pl.DataFrame({"prompt": [f"Fact {n}." for n in range(4)]})


def collected(**options: Any) -> pl.DataFrame:
    return FRAME.llm.generate("prompt", **{"model": MODEL, "on_pending": "wait", **options})


def lose_the_cache(path: Path) -> None:
    shutil.rmtree(path)
    store._open.clear()


TERMINAL = [sys.executable, "-c", "from polars_llm.cli import main; raise SystemExit(main())"]


def terminal(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*TERMINAL, *arguments], capture_output=True, check=False, **options)


def test_jobs_and_results_of_an_empty_cache() -> None:
    assert pllm.jobs().height == 0
    assert pllm.jobs().schema == pl.Schema(operate._JOBS)
    assert pllm.results().collect().height == 0


def test_jobs_says_what_is_known(provider: testing.Provider) -> None:
    prices = pllm.Prices(input=1_000_000, output=0, batch_multiplier=0.5)
    collected(model=pllm.OpenAI("gpt-6-luna", prices=prices))
    job = pllm.jobs().row(0, named=True)
    assert (job["provider"], job["model"], job["state"]) == ("openai", "gpt-6-luna", "ingested")
    assert (job["requests"], job["done"], job["failed"]) == (4, 4, 0)
    assert job["batch_id"].startswith("batch_")
    tokens = pllm.results().select(pl.col("input_tokens").sum()).collect().item()
    assert job["cost_usd"] == pytest.approx(0.5 * tokens)
    assert pllm.jobs(open_only=True).height == 0


def test_an_unknown_price_is_null_not_zero(provider: testing.Provider) -> None:
    collected(model=pllm.OpenAI("nobody-knows-this-model"))
    assert pllm.jobs()["cost_usd"].to_list() == [None]
    assert pllm.results().collect()["cost_usd"].null_count() == 4


def test_results_are_everything_that_was_answered(provider: testing.Provider) -> None:
    out = collected(output="full")["response"].struct.unnest()
    answers = pllm.results(body=True).collect()
    joined = out.join(answers, on="key", how="left", maintain_order="left")
    assert joined["text"].to_list() == FRAME["prompt"].to_list()
    assert json.loads(answers["body"][0])["object"] == "chat.completion"
    assert "body" not in pllm.results().collect_schema()


@pytest.mark.parametrize("model", MODELS)
def test_cancel_keeps_what_is_done_and_the_rest_is_sent_again(model: str) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        provider.fault("cancel", operation="*batches.cancel", fraction=0.5)
        with pytest.raises(pllm.JobsPending) as pending:
            collected(model=model, on_pending="raise")
        pllm.cancel(pending.value.jobs[0])
        with pytest.raises(pllm.JobsPending):
            provider.finish(outcome="cancelled", fraction=0.5)
            collected(model=model, on_pending="raise")
        provider.finish()
        assert collected(model=model)["response"].to_list() == FRAME["prompt"].to_list()
        assert (provider.bill().billed, provider.bill().duplicates) == (4, {})


def test_cancel_of_what_has_no_batch_is_a_clear_error(provider: testing.Provider) -> None:
    with pytest.raises(pllm.InvalidRequest, match="no job"):
        pllm.cancel("job_0000")
    collected()
    with pytest.raises(pllm.InvalidRequest, match="no running batch"):
        pllm.cancel(pllm.jobs()["job"][0])


def test_abandon_frees_the_requests(provider: testing.Provider) -> None:
    provider.fault("drop", operation="*batches.create")
    with pytest.raises(pllm.JobsPending) as pending:
        collected(on_pending="raise")
    pllm.abandon(pending.value.jobs[0])
    assert collected()["response"].null_count() == 0
    assert provider.bill().billed == 4
    with pytest.raises(pllm.InvalidRequest, match="already"):
        pllm.abandon(pending.value.jobs[0])


@pytest.mark.parametrize("model", MODELS)
def test_recover_fills_a_lost_cache_and_nothing_is_paid_again(
    provider: testing.Provider, own_cache: Path, model: str
) -> None:
    collected(model=model)
    lose_the_cache(own_cache)
    name = model.partition("/")[0]
    assert pllm.recover(name)["answers"].to_list() == [4]
    assert pllm.recover(name)["answers"].to_list() == [0]
    assert collected(model=model)["response"].to_list() == FRAME["prompt"].to_list()
    assert provider.bill().batches == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("framing", ["chunked", "close"])
def test_recover_reads_a_cut_download_again(
    provider: testing.Provider, own_cache: Path, model: str, framing: str
) -> None:
    collected(model=model)
    lose_the_cache(own_cache)
    provider.fault("truncate", framing=framing)
    assert pllm.recover(model.partition("/")[0]).select("outcome", "answers").rows() == [("recovered", 4)]
    assert collected(model=model)["response"].null_count() == 0
    assert provider.bill().batches == 1


@pytest.mark.parametrize("model", MODELS)
def test_recover_says_so_where_answers_are_missing(
    provider: testing.Provider, own_cache: Path, model: str
) -> None:
    collected(model=model)
    lose_the_cache(own_cache)
    provider.fault("missing-lines", times=None)
    assert pllm.recover(model.partition("/")[0]).select("outcome", "answers").rows() == [("incomplete", 3)]
    provider.clear_faults()
    assert pllm.recover(model.partition("/")[0]).select("outcome", "answers").rows() == [("recovered", 1)]


_RECOVER = """
import re, sys
import polars_llm as pllm
done = pllm.recover(sys.argv[1])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())
print(done["answers"].sum(), int(peak[1]) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("model", MODELS)
def test_the_memory_of_recover_does_not_grow_with_the_number_of_batches(
    own_cache: Path, tmp_path: Path, model: str
) -> None:
    """One batch of answers is held at a time, however many there are."""
    rows, size = 500, 16_000  # 8 MB a batch on the wire, several times that in memory
    with testing.provider(model=lambda request: request.prompt[:8] + "x" * size) as provider:
        peaks = []
        for batches in (2, 10):
            while provider.bill().batches < batches:
                start = provider.bill().batches * rows
                frame = pl.DataFrame({"prompt": [f"{n:08d}" for n in range(start, start + rows)]})
                frame.llm.generate("prompt", model=model, on_pending="wait")
            place = tmp_path / str(batches)
            done = subprocess.run(
                [sys.executable, "-c", _RECOVER, model.partition("/")[0]],
                env={**os.environ, "POLARS_LLM_CACHE_DIR": str(place)},
                capture_output=True,
                text=True,
                check=True,
            )
            answers, peak = map(int, done.stdout.split())
            assert answers == batches * rows
            peaks.append(peak)
    # MiB. Measured 20 to 56, by chance and by the version of Polars; holding all batches 132 and more.
    assert peaks[1] - peaks[0] < 90, peaks


def test_recover_shows_how_far_it_is(
    provider: testing.Provider, own_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collected()
    other = FRAME.select(pl.format("{} Why?", "prompt").alias("prompt"))
    other.llm.generate("prompt", model=MODEL, on_pending="wait")
    lose_the_cache(own_cache)
    caplog.clear()
    with caplog.at_level("INFO", logger="polars_llm"):
        pllm.recover("openai")
    assert [m for m in caplog.messages if "batches: 2 of 2" in m]


def test_recover_resumes_what_still_runs(own_cache: Path) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        lose_the_cache(own_cache)
        assert pllm.recover("openai")["outcome"].to_list() == ["resumed"]
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        provider.finish()
        assert collected()["response"].to_list() == FRAME["prompt"].to_list()
        assert provider.bill().batches == 1


@pytest.mark.parametrize("framing", ["chunked", "close"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_recover_resumes_all_of_what_still_runs(own_cache: Path, framing: str, share: float) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        lose_the_cache(own_cache)
        provider.fault("truncate", framing=framing, share=share)
        assert pllm.recover("openai")["outcome"].to_list() == ["resumed"]
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        assert provider.bill().batches == 1
        lose_the_cache(own_cache)
        provider.fault("gone", status=404, times=None)
        assert pllm.recover("openai")["outcome"].to_list() == ["running"]


def test_recover_leaves_foreign_batches_alone(provider: testing.Provider) -> None:
    import openai

    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "x"}]}
    line = {"custom_id": "mine-1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    with openai.OpenAI() as client:
        made = client.files.create(file=("in.jsonl", json.dumps(line).encode()), purpose="batch")
        client.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")
    assert pllm.recover("openai")["answers"].sum() == 0
    assert pllm.results().collect().height == 0


def test_recover_leaves_foreign_messages_alone(provider: testing.Provider) -> None:
    import anthropic

    params: Any = {
        "model": "claude-haiku-5-5",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "x"}],
    }
    with anthropic.Anthropic() as client:
        client.messages.batches.create(requests=[{"custom_id": "mine-1", "params": params}])
    provider.finish()
    assert pllm.recover("anthropic").select("outcome", "answers").rows() == [("foreign", 0)]
    assert pllm.results().collect().height == 0


# --- the command line -----------------------------------------------------------------------------


def test_watch_has_exit_codes_for_cron(capsys: pytest.CaptureFixture[str]) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        assert main(["watch"]) == 0
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        assert main(["watch", "--json"]) == 75
        left = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert left["state"] == "submitted"
        provider.finish()
        assert main(["watch", "--interval", "0.05"]) == 0
        provider.clear_log()
        assert collected()["response"].null_count() == 0
        assert provider.log() == []


def test_cancel_and_abandon_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        with pytest.raises(pllm.JobsPending) as pending:
            collected(on_pending="raise")
        (job,) = pending.value.jobs
        assert main(["cancel", job, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["job"] == job
        assert provider.batches()[0]["state"] == "cancelling"
        assert main(["abandon", job, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["job"] == job
        assert main(["watch"]) == 0


def test_watch_says_errors_without_a_traceback(
    provider: testing.Provider, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(pllm.JobsPending):
        collected(on_pending="raise")
    provider.fault("status", status=401, times=None)
    assert main(["watch"]) == 1
    assert "Hint:" in capsys.readouterr().err


def test_watch_says_that_a_provider_does_not_answer(
    provider: testing.Provider, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(pllm.JobsPending):
        collected(on_pending="raise")
    provider.fault("status", status=503, times=None)
    assert main(["watch", "--json"]) == 75
    out, err = capsys.readouterr()
    assert json.loads(out)["state"] == "submitted"
    assert err.startswith("polars-llm: http://127.0.0.1")
    assert "did not answer about 1 job: " in err
    assert "Hint: nothing to do" in err
    assert ".py:" not in err  # where it was raised is nobody's concern here
    provider.clear_faults()
    assert main(["watch"]) == 0
    assert capsys.readouterr().err == ""


def test_tables_and_json(
    provider: testing.Provider, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    collected()
    assert main(["jobs"]) == 0
    assert "ingested" in capsys.readouterr().out
    assert main(["jobs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 4
    assert main(["results", "--json", "--limit", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["results", "--output", str(tmp_path / "all.parquet")]) == 0
    assert pl.read_parquet(tmp_path / "all.parquet").height == 4
    assert main(["recover", "openai", "--json"]) == 0


ODD = ["[/b] [red]", "\x1b[31mred \x9b1m", "\u2028 \u0085 \0 \U0001f600", "[link=x]", "\r\n", ""]


@pytest.mark.parametrize("alphabet", ["utf-8", "ascii"])
def test_answers_are_shown_as_text_whatever_is_in_them(alphabet: str) -> None:
    with testing.provider(model=lambda request: ODD[int(request.prompt)]):
        frame = pl.DataFrame({"prompt": [str(n) for n in range(len(ODD))]})
        frame.llm.generate("prompt", model=MODEL, on_pending="wait")
    environment = {**os.environ, "PYTHONIOENCODING": alphabet}
    table = terminal("results", env=environment)
    assert (table.returncode, table.stderr) == (0, b"")
    assert b"[/b] [red]" in table.stdout
    assert b"\x1b" not in table.stdout
    assert b"\xc2\x9b" not in table.stdout
    lines = terminal("results", "--json", env=environment)
    assert (lines.returncode, lines.stderr) == (0, b"")
    assert [json.loads(line)["text"] for line in lines.stdout.split(b"\n") if line] == ODD


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_leaves_changes_no_exit_code(form: list[str]) -> None:
    with testing.provider(model=lambda request: request.prompt, auto=False):
        with pytest.raises(pllm.JobsPending):
            collected(on_pending="raise")
        for command, code in (("jobs", 0), ("watch", 75)):
            ours, theirs = os.pipe()
            os.close(ours)
            done = subprocess.run(
                [*TERMINAL, command, *form], stdout=theirs, stderr=subprocess.PIPE, check=False
            )
            os.close(theirs)
            assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["results", "--output", "no/such/directory.parquet"], 1),
        (["results", "--output", "."], 1),
        (["results", "--limit", "-1"], 2),
        (["results", "--limit", "9" * 20], 2),
        (["watch", "--interval", "soon"], 2),
        (["emulate", "--host", "0.0.0.0.0"], 1),
        (["emulate", "--port", "99999"], 1),
    ],
)
def test_arguments_that_cannot_be_are_a_line_too(
    provider: testing.Provider, arguments: list[str], code: int
) -> None:
    collected()
    done = terminal(*arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert b"polars-llm" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["cancel", "job_0"], ["abandon", "job_0"], ["recover", "nobody"]])
def test_a_users_mistake_is_a_line_not_a_traceback(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert said.startswith("polars-llm: ")
    assert "Hint:" in said


@pytest.mark.parametrize(
    "command", [[], *([c] for c in ("jobs", "watch", "cancel", "recover", "results", "emulate"))]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "usage: polars-llm" in capsys.readouterr().out


def test_the_installed_command_runs(own_cache: Path) -> None:
    code = "from polars_llm.cli import main; raise SystemExit(main(['jobs', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
