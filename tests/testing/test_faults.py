"""Faults on demand: each kind, as a client with the real SDK meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

import polars_llm.testing
from polars_llm.testing import Provider
from polars_llm.testing.faults import KINDS

from .conftest import CHAT, ask, asks, by_id, chat_line, chats, raises, results, rows, submit, upload

lost = raises(openai.APIConnectionError)


def submit_messages(client: anthropic.Anthropic, requests: list[Any]) -> Any:
    return client.messages.batches.create(requests=requests)


def content(client: openai.OpenAI, lines: list[Any] | None = None) -> tuple[str, str]:
    """The ids of the output and the error file of a batch that has ended."""
    batch = client.batches.retrieve(submit(client, lines or chats(4)).id)
    return batch.output_file_id or "", batch.error_file_id or ""


# ---- the reply is lost, the work is done


def test_create_then_500_makes_the_batch_all_the_same(
    p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic
) -> None:
    p.fault("create-then-500", times=2)
    raises(openai.InternalServerError)(lambda: submit(oai, chats(1)))
    raises(anthropic.InternalServerError)(lambda: submit_messages(ant, asks(1)))
    assert [batch["protocol"] for batch in p.batches()] == ["openai", "anthropic"]
    assert p.bill().by_custom_id == {"r0": 2}


def test_the_default_retries_of_the_sdk_pay_twice(p: Provider) -> None:
    p.fault("create-then-500")
    with openai.OpenAI(max_retries=2) as careless:
        submit(careless, chats(3))
    assert p.bill().duplicates == {"r0": 2, "r1": 2, "r2": 2}


def test_create_then_drop(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("create-then-drop", times=2)
    lost(lambda: submit(oai, chats(1)))
    raises(anthropic.APIConnectionError)(lambda: submit_messages(ant, asks(1)))
    assert p.bill().batches == 2
    assert [line.status for line in p.log() if line.path.endswith("batches")] == [None, None]


def test_a_reply_can_be_lost_anywhere(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("create-then-drop", operation="files.create")
    lost(lambda: upload(oai, chats(1)))
    assert p.bill().files == 1
    p.fault("create-then-500", operation="chat.completions.create", status=529)
    error = raises(openai.InternalServerError)(
        lambda: oai.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hello."}])
    )
    assert (error.status_code, p.bill().realtime) == (529, 1)


def test_create_then_garbage(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("create-then-garbage")
    with pytest.raises(ValueError, match=r"JSON|Unterminated|Expecting"):
        submit(oai, chats(1))
    assert p.bill().batches == 1


VICTIM = """
    import io, json, openai
    from polars_llm.testing import Provider
    client = openai.OpenAI(max_retries=0)
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": "Hi."}]}}
    data = io.BytesIO(json.dumps(line).encode())
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    client.batches.create(
        input_file_id=file.id, endpoint=line["url"], completion_window="24h")
    print("alive")
"""


def run_victim() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(VICTIM)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the sender in /proc")
@pytest.mark.parametrize(("kind", "batches"), [("kill", 0), ("create-then-kill", 1)])
def test_the_client_is_killed_before_or_after_the_batch_is_made(p: Provider, kind: str, batches: int) -> None:
    p.fault(kind, operation="batches.create")
    done = run_victim()
    assert (done.returncode, done.stdout) == (-9, "")
    assert p.bill().batches == batches
    assert run_victim().stdout == "alive\n"
    assert p.bill().batches == batches + 1


def test_a_pid_says_who_is_killed(p: Provider, oai: openai.OpenAI) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        p.fault("create-then-kill", pid=other.pid)
        lost(lambda: submit(oai, chats(1)))
        assert other.wait(10) == -9
    assert p.bill().batches == 1


# ---- nothing was accepted


def test_drop(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("drop", operation="*batches.create", times=2)
    lost(lambda: submit(oai, chats(1)))
    raises(anthropic.APIConnectionError)(lambda: submit_messages(ant, asks(1)))
    assert p.bill().batches == 0


@pytest.mark.parametrize("status", [402, 408, 429, 500, 503, 529])
def test_status(p: Provider, ant: anthropic.Anthropic, status: int) -> None:
    p.fault("status", status=status, times=2)
    for _ in range(2):
        error = raises(anthropic.APIStatusError)(lambda: submit_messages(ant, asks(1)))
        assert error.status_code == status
        assert "retry-after" not in error.response.headers
    submit_messages(ant, asks(1))
    assert p.bill().batches == 1


def test_status_with_retry_after_code_and_html(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("status", status=429, retry_after=7, code="insufficient_quota", message="Pay first.")
    error = raises(openai.RateLimitError)(lambda: oai.batches.list())
    assert (error.code, error.response.headers["retry-after"]) == ("insufficient_quota", "7")
    assert "Pay first." in str(error)
    p.fault("status", status=502, html=True)
    error = raises(openai.InternalServerError)(lambda: oai.batches.list())
    assert error.response.text.startswith("<html>")


def test_retries_of_the_sdk_pass_a_short_storm(p: Provider) -> None:
    p.fault("status", operation="batches.list", status=429, retry_after=0.01, times=2)
    with openai.OpenAI(max_retries=2) as oai:
        assert list(oai.batches.list()) == []
    assert [line.status for line in p.log()] == [429, 429, 200]


def test_slow(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("slow", seconds=0.3)
    raises(openai.APITimeoutError)(lambda: oai.with_options(timeout=0.1).batches.list())
    started = time.monotonic()
    oai.batches.list()
    assert time.monotonic() - started < 0.3


@pytest.mark.parametrize(("kind", "batches"), [("hold", 0), ("create-then-hold", 1)])
def test_hold_until_released(p: Provider, oai: openai.OpenAI, kind: str, batches: int) -> None:
    hold = p.fault(kind, operation="batches.create")
    thread = threading.Thread(target=submit, args=(oai, chats(1)))
    thread.start()
    assert p.held(hold, seconds=10) == 1
    assert len(p.batches()) == batches
    assert p.log()[-1] == ("POST", "/v1/batches", None)
    p.release(hold)
    thread.join(10)
    assert not thread.is_alive()
    assert (len(p.batches()), p.held(hold)) == (1, 0)
    assert p.log()[-1] == ("POST", "/v1/batches", 200)


def test_clearing_the_faults_lets_go(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("hold", times=None)
    p.fault("drop", times=None)
    thread = threading.Thread(target=lambda: raises(openai.APIConnectionError)(oai.batches.list))
    thread.start()
    assert p.held(seconds=10) == 1
    p.clear_faults()
    thread.join(10)
    assert p.faults() == []
    oai.batches.list()


def test_not_found_just_after_creation(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("not-found", times=2)
    batch = submit(oai, chats(1))
    for _ in range(2):
        raises(openai.NotFoundError)(lambda: oai.batches.retrieve(batch.id))
    assert oai.batches.retrieve(batch.id).status == "completed"
    p.fault("not-found")
    other = submit_messages(ant, asks(1))
    raises(anthropic.NotFoundError)(lambda: ant.messages.batches.retrieve(other.id))


def test_results_are_gone(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    output, _ = content(oai)
    batch = submit_messages(ant, asks(1))
    p.fault("gone", times=2)
    error = raises(openai.APIStatusError)(lambda: oai.files.content(output))
    assert error.status_code == 410
    error = raises(anthropic.APIStatusError)(lambda: ant.messages.batches.results(batch.id))
    assert error.status_code == 410
    p.fault("gone", status=404)
    raises(openai.NotFoundError)(lambda: oai.files.content(output))
    assert len(rows(oai, output)) == 4


# ---- which requests it strikes


def test_after_times_method_and_path_choose_the_requests(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("status", method="GET", path="/v1/b*", after=1, times=2)
    statuses = []
    for _ in range(5):
        oai.files.list()
        try:
            oai.batches.list()
            statuses.append(200)
        except openai.InternalServerError:
            statuses.append(500)
    assert statuses == [200, 500, 500, 200, 200]
    assert p.faults()[0]["struck"] == 2


def test_a_fault_waits_behind_one_that_ends_the_request(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("status", operation="batches.create", status=503)
    p.fault("create-then-drop")
    raises(openai.InternalServerError)(lambda: submit(oai, chats(1)))
    lost(lambda: submit(oai, chats(1)))
    submit(oai, chats(1))
    assert p.bill().batches == 2


def test_unknown_kinds_and_options_are_told(p: Provider) -> None:
    with pytest.raises(ValueError, match="create-then-500"):
        p.fault("explode")
    with pytest.raises(TypeError, match="fraction"):
        p.fault("expire", share=0.5)


def test_every_kind_is_documented() -> None:
    assert polars_llm.testing.__doc__ is not None
    for kind in KINDS:
        assert f"``{kind}``" in polars_llm.testing.__doc__


# ---- how a batch goes


def test_expire(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("expire", fraction=0.75)
    batch = oai.batches.retrieve(submit(oai, chats(8)).id)
    assert batch.status == "expired"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (6, 2)
    assert p.bill().billed == 6
    assert oai.batches.retrieve(submit(oai, chats(8)).id).status == "completed"


def test_cancel_by_the_provider(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("cancel", fraction=0.25)
    batch = oai.batches.retrieve(submit(oai, chats(8)).id)
    assert (batch.status, p.bill().billed) == ("cancelled", 2)


def test_fail(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("fail", code="invalid_request", message="Because.", times=2)
    batch = oai.batches.retrieve(submit(oai, chats(2)).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert (batch.errors.data[0].code, batch.errors.data[0].message) == (
        "invalid_request",
        "Because.",
    )
    other = submit_messages(ant, asks(2))
    assert ant.messages.batches.retrieve(other.id).request_counts.errored == 2
    assert results(ant, other.id)["r0"].error.error.type == "api_error"
    assert p.bill().billed == 0


def test_token_limit(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("token-limit", times=2)
    batch = submit(oai, chats(2))
    failed = oai.batches.retrieve(batch.id)
    assert failed.errors is not None
    assert failed.errors.data is not None
    assert failed.errors.data[0].code == "token_limit_exceeded"
    raises(anthropic.RateLimitError)(lambda: submit_messages(ant, asks(2)))
    again = oai.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert oai.batches.retrieve(again.id).status == "completed"
    assert p.bill().billed == 2


def test_list_lag(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("list-lag", seconds=0.5, times=2)
    batch, other = submit(oai, chats(1)), submit_messages(ant, asks(1))
    assert list(oai.batches.list()) == []
    assert list(ant.messages.batches.list()) == []
    assert oai.batches.retrieve(batch.id).id == batch.id
    time.sleep(0.5)
    assert [b.id for b in oai.batches.list()] == [batch.id]
    assert [b.id for b in ant.messages.batches.list()] == [other.id]


def test_batch_seconds_of_one_batch(p: Provider, oai: openai.OpenAI) -> None:
    p.fault("batch-seconds", seconds=60)
    slow, quick = submit(oai, chats(1)), submit(oai, chats(1))
    assert oai.batches.retrieve(quick.id).status == "completed"
    assert oai.batches.retrieve(slow.id).status == "validating"


# ---- how a batch is shown


def test_sparse(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("sparse", times=2)
    assert oai.batches.retrieve(submit(oai, chats(1)).id).request_counts is None
    batch = ant.messages.batches.retrieve(submit_messages(ant, asks(1)).id)
    assert getattr(batch, "request_counts", None) is None


def test_odd_status(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    p.fault("odd-status", status="paused", times=2)
    batch, other = submit(oai, chats(1)), submit_messages(ant, asks(1))
    shown: str = oai.batches.retrieve(batch.id).status
    assert shown == "paused"
    shown = ant.messages.batches.retrieve(other.id).processing_status
    assert shown == "paused"
    assert oai.batches.retrieve(batch.id).status == "completed"


def test_relative_url(p: Provider, ant: anthropic.Anthropic) -> None:
    p.fault("relative-url", times=2)
    batch = ant.messages.batches.retrieve(submit_messages(ant, asks(2)).id)
    assert batch.results_url == f"/v1/messages/batches/{batch.id}/results"
    assert results(ant, batch.id).keys() == {"r0", "r1"}


# ---- what comes of a download


def raw(client: openai.OpenAI, file_id: str) -> bytes:
    return client.files.content(file_id).content


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_a_truncated_download_that_can_be_noticed(p: Provider, oai: openai.OpenAI, framing: str) -> None:
    output, _ = content(oai)
    p.fault("truncate", framing=framing)
    lost(lambda: raw(oai, output))
    assert len(rows(oai, output)) == 4


def test_a_truncated_download_that_looks_complete(p: Provider, oai: openai.OpenAI) -> None:
    output, _ = content(oai)
    whole = raw(oai, output)
    p.fault("truncate", framing="close", share=0.5)
    assert raw(oai, output) == whole[: len(whole) // 2]


def test_truncated_results_end_in_silence(p: Provider, ant: anthropic.Anthropic) -> None:
    batch = submit_messages(ant, asks(10))
    ant.messages.batches.retrieve(batch.id)
    whole = ant.messages.batches.with_raw_response.results(batch.id).http_response.read()
    lines = whole.split(b"\n")
    # Cut just behind the fifth line, where nothing looks wrong.
    share = (sum(map(len, lines[:5])) + 5) / len(whole)
    p.fault("truncate", framing="close", share=share)
    assert 4 <= len(results(ant, batch.id)) <= 5


def test_line_ends(p: Provider, oai: openai.OpenAI) -> None:
    output, _ = content(oai)
    plain = raw(oai, output)
    for kind, expected in (
        ("crlf", plain.replace(b"\n", b"\r\n")),
        ("blank-lines", b"\n" + plain.replace(b"\n", b"\n\n")),
        ("no-final-newline", plain[:-1]),
        ("duplicate-lines", plain + plain),
    ):
        p.fault(kind)
        assert raw(oai, output) == expected
        assert raw(oai, output) == plain


def test_a_blank_line_breaks_the_decoder_of_the_sdk(p: Provider, ant: anthropic.Anthropic) -> None:
    batch = submit_messages(ant, asks(2))
    ant.messages.batches.retrieve(batch.id)
    p.fault("blank-lines")
    with pytest.raises(json.JSONDecodeError):
        results(ant, batch.id)


def test_foreign_and_missing_lines(p: Provider, oai: openai.OpenAI) -> None:
    output, _ = content(oai)
    ids = by_id(rows(oai, output)).keys()
    p.fault("foreign-ids", count=2)
    foreign = by_id(rows(oai, output)).keys() - ids
    assert foreign == {"somebody-elses-0", "somebody-elses-1"}
    p.fault("missing-lines", custom_id="r2")
    assert ids - by_id(rows(oai, output)).keys() == {"r2"}
    p.fault("missing-lines", count=3)
    assert len(rows(oai, output)) == 1
    assert len(rows(oai, output)) == 4


def test_a_garbage_line(p: Provider, oai: openai.OpenAI) -> None:
    output, _ = content(oai)
    p.fault("garbage-line")
    with pytest.raises(json.JSONDecodeError):
        rows(oai, output)


def test_raw_separators_in_every_answer(p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    output, _ = content(oai)
    p.fault("raw-separators")
    data = raw(oai, output)
    assert data.count("\u2028".encode()) == 4
    assert data.count(b"\n") == 4
    batch = submit_messages(ant, [ask("a", "The sea is blue. Yes.")])
    ant.messages.batches.retrieve(batch.id)
    p.fault("raw-separators")
    text = results(ant, batch.id)["a"].message.content[0].text
    assert text == "The sea is blue. \u2028and\u0085on"


def test_answers_that_end_in_half_a_surrogate_pair(
    p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic
) -> None:
    output, _ = content(oai)
    p.fault("lone-surrogates")
    said = [row["response"]["body"]["choices"][0]["message"]["content"] for row in rows(oai, output)]
    assert len(said) == 4
    assert all(text.endswith("\ud83d") for text in said)
    batch = submit_messages(ant, [ask("a", "The sea is blue. Yes.")])
    ant.messages.batches.retrieve(batch.id)
    p.fault("lone-surrogates")
    assert results(ant, batch.id)["a"].message.content[0].text == "The sea is blue.\ud83d"


def test_odd_lines_of_lax_services(p: Provider, oai: openai.OpenAI) -> None:
    output, errors = content(oai, [*chats(1), chat_line("bad", "[[fail:400]]")])
    p.fault("string-body")
    body = rows(oai, output)[0]["response"]["body"]
    assert isinstance(body, str)
    assert json.loads(body)["object"] == "chat.completion"
    p.fault("no-response", times=2)
    assert "error" not in rows(oai, output)[0]
    (line,) = rows(oai, errors)
    assert "response" not in line
    assert "asked for an error" in line["error"]["message"]
