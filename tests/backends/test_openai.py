"""OpenAI's batch service: one POST a create, and what is looked for and read in odd circumstances."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends.base import CallFailed, Phase
from polars_llm.backends.openai import OpenAIBatch
from polars_llm.job import Job, State
from polars_llm.request import custom_id
from tests.conftest import MODEL

FRAME = pl.DataFrame({"prompt": ["one", "two"]})
ENDPOINT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What isn't found must not be sent again within the test."""
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "60")


def job_of(file_id: str | None = "file_x", **facts: Any) -> Job:
    job = Job.plan(provider="openai", base_url=None, endpoint=ENDPOINT, model="gpt-6-luna", requests=1)
    return Job.from_dict({**job.to_dict(), "input_file_id": file_id, "state": State.CREATING, **facts})


def uploaded(backend: OpenAIBatch, path: Path) -> str:
    body = {"model": "gpt-6-luna", "messages": [{"role": "user", "content": "x"}]}
    line = {"custom_id": custom_id(bytes(32)), "method": "POST", "url": ENDPOINT, "body": body}
    path.write_text(json.dumps(line) + "\n")
    return backend.upload(job_of(), path)


@pytest.mark.parametrize(
    ("fault", "options", "uncertain"),
    [
        *(("status", {"status": status}, False) for status in (400, 401, 403, 413, 429)),
        *(("status", {"status": status}, True) for status in (408, 409, 500, 503, 529)),
        ("status", {"status": 502, "html": True}, True),
        *(
            (kind, {}, True)
            for kind in ("drop", "create-then-500", "create-then-drop", "create-then-garbage")
        ),
    ],
)
def test_a_failed_create_is_one_post_and_says_what_is_known(
    provider: testing.Provider, tmp_path: Path, fault: str, options: dict[str, Any], uncertain: bool
) -> None:
    backend = OpenAIBatch("gpt-6-luna")
    job = job_of(uploaded(backend, tmp_path / "lines"))
    provider.fault(fault, operation="batches.create", times=None, **options)
    with pytest.raises(CallFailed) as caught:
        backend.create(job, tmp_path / "lines")
    assert caught.value.verdict.uncertain == uncertain
    assert [seen.path for seen in provider.log() if seen.method == "POST"].count("/v1/batches") == 1
    assert len(provider.batches()) == (fault.startswith("create-then"))
    backend.close()


def test_a_lost_batch_is_found_behind_more_than_a_page_of_others(
    provider: testing.Provider, tmp_path: Path
) -> None:
    # It can't be looked for at once, so that the others come in between.
    provider.fault("create-then-500")
    provider.fault("status", operation="batches.list", status=503, retry_after=0, times=5)
    with pytest.raises(pllm.JobsPending, match="unknown"):
        FRAME.llm.generate("prompt", model=MODEL)
    backend = OpenAIBatch("gpt-6-luna")
    job = job_of(uploaded(backend, tmp_path / "lines"))
    for _ in range(120):
        backend.create(job, tmp_path / "lines")
    backend.close()
    provider.clear_log()
    out = FRAME.llm.generate("prompt", model=MODEL, on_pending="wait")
    assert out["response"].to_list() == ["one", "two"]
    assert [seen.path for seen in provider.log()].count("/v1/batches") == 2
    assert pllm.jobs()["state"].to_list() == ["ingested"]


def test_a_batch_without_metadata_is_known_by_its_file(provider: testing.Provider) -> None:
    """A host that speaks the protocol may not keep what it doesn't need."""
    import openai

    provider.fault("drop", operation="batches.create")
    with pytest.raises(pllm.JobsPending, match="unknown"):
        FRAME.llm.generate("prompt", model=MODEL)
    with openai.OpenAI() as client:
        client.batches.create(
            input_file_id=client.files.list().data[0].id, endpoint=ENDPOINT, completion_window="24h"
        )
    out = FRAME.llm.generate("prompt", model=MODEL, on_pending="wait")
    assert out["response"].to_list() == ["one", "two"]
    assert len(provider.batches()) == 1


def batch(**facts: Any) -> dict[str, Any]:
    return {
        "id": "batch_1",
        "object": "batch",
        "endpoint": ENDPOINT,
        "input_file_id": "file_x",
        "completion_window": "24h",
        "created_at": 1,
        "status": "completed",
        **facts,
    }


@contextlib.contextmanager
def canned(replies: dict[str, bytes]) -> Iterator[str]:
    """A server with fixed replies by path; gives its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = replies[self.path.split("?")[0]]
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


LINE = {
    "custom_id": custom_id(bytes(32)),
    "response": {
        "status_code": 200,
        "body": {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]},
    },
}


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        pytest.param(json.dumps(LINE).encode(), b"", id="an empty error file"),
        pytest.param(b"", json.dumps(LINE).encode() + b"\r\n", id="an empty output file"),
        pytest.param(b"\n\n", b"\n" + json.dumps(LINE).encode(), id="blank lines"),
    ],
)
def test_empty_files_and_missing_counts(tmp_path: Path, output: bytes, errors: bytes) -> None:
    shown = batch(output_file_id="file_o", error_file_id="file_e", request_counts=None)
    replies = {
        "/v1/batches/batch_1": json.dumps(shown).encode(),
        "/v1/files/file_o/content": output,
        "/v1/files/file_e/content": errors,
    }
    with canned(replies) as address:
        backend = OpenAIBatch("gpt-6-luna", address=address, api_key="sk-test")
        job = job_of(batch_id="batch_1")
        status = backend.status(job)
        assert (status.phase, status.done, status.failed) == (Phase.ENDED, 0, 0)
        backend.download(job, status, tmp_path / "results")
        with (tmp_path / "results").open("rb") as lines:
            assert backend.parse(lines, status)["text"].to_list() == ["yes"]
        backend.close()


@pytest.mark.parametrize("name", ["in_progress", "finalizing", "cancelling", "validating", "a new one"])
def test_a_status_that_is_not_an_end_is_waited_for(tmp_path: Path, name: str) -> None:
    with canned({"/v1/batches/batch_1": json.dumps(batch(status=name)).encode()}) as address:
        backend = OpenAIBatch("gpt-6-luna", address=address, api_key="sk-test")
        assert backend.status(job_of(batch_id="batch_1")).phase is Phase.RUNNING
        backend.close()
