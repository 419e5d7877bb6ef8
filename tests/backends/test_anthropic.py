"""Anthropic's Message Batches on the wire: one create is one POST, and no key goes where it should not."""

from __future__ import annotations

import contextlib
import http.server
import json
import pickle
import re
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import clock, testing
from polars_llm.backends import anthropic
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.base import CallFailed, Phase
from polars_llm.backends.options import Options
from polars_llm.job import Job
from polars_llm.request import Requests, custom_id

SECRET = "sk-ant-api03-secret"
MODEL = "claude-haiku-5-5"
BATCHES = "/v1/messages/batches"


@pytest.fixture(autouse=True)
def no_foreign_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a developer's token nor a profile on disk is ever read."""
    for name in ("ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_PROFILE", "ANTHROPIC_CUSTOM_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("ANTHROPIC_CONFIG_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@contextlib.contextmanager
def connected(url: str, **options: Any) -> Iterator[AnthropicBatch]:
    made = pllm.Anthropic(MODEL, base_url=url, **{"api_key": SECRET, **options}).backend()
    assert isinstance(made, AnthropicBatch)
    try:
        yield made
    finally:
        made.close()


def keys_of(prompts: list[str]) -> list[bytes]:
    return [prompt.encode().ljust(32, b"\0")[:32] for prompt in prompts]


def spooled(backend: AnthropicBatch, path: Path, prompts: list[str], **facts: Any) -> Job:
    """A job with its request file, as the heart makes it."""
    frame = pl.DataFrame(
        {"key": keys_of(prompts), "prompt": prompts, "kind": "t", "system": None, "sample": 0},
        schema_overrides={"key": pl.Binary, "system": pl.String},
    )
    lines = list(backend.render(Requests(backend.header(Options()), frame)))
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return Job.plan(
        provider="anthropic",
        base_url=backend.base_url,
        endpoint="/v1/messages",
        model=MODEL,
        requests=len(prompts),
        **{"create_called": clock.stamp(), **facts},
    )


def posts(provider: testing.Provider) -> int:
    return sum(seen.method == "POST" for seen in provider.log())


# --- create -------------------------------------------------------------------------------------


def test_create_sends_the_spooled_lines_in_one_body_of_known_length(
    provider: testing.Provider, tmp_path: Path
) -> None:
    prompts = ["one", 'two\nlines, "quoted"', "drei\u2028ü"]
    with connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", prompts)
        batch_id = backend.create(job, tmp_path / "lines")
    (batch,) = provider.batches()
    assert (batch["id"], batch["owner"]) == (batch_id, SECRET)
    (seen,) = provider.exchanges()
    assert seen["headers"]["content-length"] == str(len(seen["body"].encode()))
    assert seen["headers"]["content-type"] == "application/json"
    assert seen["headers"]["anthropic-version"] == "2026-10-21"
    assert "transfer-encoding" not in seen["headers"]
    asked = json.loads(seen["body"])["requests"]
    assert [r["custom_id"] for r in asked] == [custom_id(key) for key in keys_of(prompts)]
    assert [r["params"]["messages"][0]["content"] for r in asked] == prompts
    assert posts(provider) == 1


def test_a_full_batch_is_not_larger_than_the_limit(provider: testing.Provider, tmp_path: Path) -> None:
    """The brackets around the lines count as well."""
    with connected(provider.url) as backend:
        spooled(backend, tmp_path / "lines", ["a", "b"])
        with (tmp_path / "lines").open("rb") as file:
            body = anthropic._Body(file)
            sent = b"".join(body)
    assert len(sent) == body.size_bytes
    brackets = body.size_bytes - (tmp_path / "lines").stat().st_size
    assert backend.limits.size_bytes + brackets <= 256_000_000


@pytest.mark.parametrize(
    ("fault", "options", "uncertain", "account"),
    [
        ("status", {"status": 400}, False, False),
        ("status", {"status": 401}, False, True),
        ("status", {"status": 402}, False, True),
        ("status", {"status": 403}, False, True),
        ("status", {"status": 413}, False, False),
        ("status", {"status": 429, "retry_after": 7}, False, False),
        ("status", {"status": 500}, True, False),
        ("status", {"status": 529}, True, False),
        ("status", {"status": 502, "html": True}, True, False),
        ("drop", {}, True, False),
        ("create-then-500", {}, True, False),
        ("create-then-drop", {}, True, False),
        ("create-then-garbage", {}, True, False),
    ],
)
def test_a_failed_create_is_one_post_and_says_what_is_known(
    provider: testing.Provider,
    tmp_path: Path,
    fault: str,
    options: dict[str, Any],
    uncertain: bool,
    account: bool,
) -> None:
    provider.fault(fault, operation="messages.batches.create", times=None, **options)
    with connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["one"])
        with pytest.raises(CallFailed) as caught:
            backend.create(job, tmp_path / "lines")
    assert posts(provider) == 1
    assert (caught.value.verdict.uncertain, caught.value.verdict.account) == (uncertain, account)
    assert caught.value.retry_after == options.get("retry_after")
    assert len(provider.batches()) == (fault.startswith("create-then"))


class Server:
    """A server for what no provider does: a handler decides about every connection."""

    def __init__(self, handle: Callable[[socket.socket], None]) -> None:
        self.connections = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._handle = handle
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with link, contextlib.suppress(OSError):
                self._handle(link)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def reset(link: socket.socket) -> None:
    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def read_all(link: socket.socket) -> bytes:
    """A whole request; of its body only the end is kept."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += link.recv(65_536)
    head, rest = head.split(b"\r\n\r\n", 1)
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    left = int(length[1]) - len(rest) if length else 0
    while left > 0:
        rest = link.recv(1 << 20)
        assert rest
        left -= len(rest)
    assert left == 0
    return rest


def large(backend: AnthropicBatch, path: Path, megabytes: int) -> Job:
    job = spooled(backend, path, ["x" * 1_000_000])
    path.write_bytes(path.read_bytes() * megabytes)
    return job


def cut_in_the_middle(link: socket.socket) -> None:
    link.recv(100_000)
    reset(link)


def read_and_reset(link: socket.socket) -> None:
    read_all(link)
    reset(link)


def read_and_redirect(link: socket.socket) -> None:
    read_all(link)
    link.sendall(b"HTTP/1.1 307 Moved\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n")


def refuse_early(link: socket.socket) -> None:
    """Answer before the body is read, as proxies do with what is too large, then read on."""
    link.recv(1_000)
    link.sendall(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
    link.shutdown(socket.SHUT_WR)
    while link.recv(1 << 20):
        pass


@pytest.mark.parametrize(
    ("handle", "uncertain", "status"),
    [
        (cut_in_the_middle, False, None),
        (refuse_early, False, 413),
        (read_and_reset, True, None),
        (read_and_redirect, False, 307),
    ],
)
def test_only_a_body_that_arrived_whole_can_have_made_a_batch(
    tmp_path: Path, handle: Callable[[socket.socket], None], uncertain: bool, status: int | None
) -> None:
    with Server(handle) as server, connected(server.url) as backend:
        job = large(backend, tmp_path / "lines", 12)
        with pytest.raises(CallFailed) as caught:
            backend.create(job, tmp_path / "lines")
    assert caught.value.status == status
    assert caught.value.verdict.uncertain is uncertain
    assert server.connections == 1


def test_a_body_that_takes_too_long_is_given_up_while_nothing_can_have_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anthropic, "_SENDING", 0.0)
    with Server(lambda link: [*iter(lambda: link.recv(1 << 20), b"")].clear()) as server:
        with connected(server.url) as backend:
            job = large(backend, tmp_path / "lines", 3)
            with pytest.raises(CallFailed, match="took more than") as caught:
                backend.create(job, tmp_path / "lines")
    assert caught.value.verdict.transient
    assert not caught.value.verdict.uncertain


def test_nobody_there_is_certainly_no_batch(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with connected(f"http://127.0.0.1:{port}") as backend:
        job = spooled(backend, tmp_path / "lines", ["one"])
        with pytest.raises(CallFailed) as caught:
            backend.create(job, tmp_path / "lines")
    assert caught.value.verdict.transient
    assert not caught.value.verdict.uncertain


def test_a_large_body_is_never_held_in_memory(tmp_path: Path) -> None:
    megabytes = 40
    ends: list[bytes] = []

    def take(link: socket.socket) -> None:
        ends.append(read_all(link)[-2:])
        reply = b'{"id":"msgbatch_1","type":"message_batch"}'
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        link.sendall(head % len(reply) + reply)

    with Server(take) as server, connected(server.url) as backend:
        job = large(backend, tmp_path / "lines", megabytes)
        backend._clients.get()
        tracemalloc.start()
        try:
            assert backend.create(job, tmp_path / "lines") == "msgbatch_1"
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert ends == [b"]}"]
    assert peak < 8_000_000 < megabytes * 1_000_000


# --- headers and credentials --------------------------------------------------------------------


def test_the_pinned_version_and_betas_go_with_the_batch(provider: testing.Provider, tmp_path: Path) -> None:
    pinned = {"api_version": "2023-06-01", "betas": ["output-300k-2026-03-24"]}
    with connected(provider.url, **pinned) as backend:
        job = spooled(backend, tmp_path / "lines", ["one"])
        backend.create(job, tmp_path / "lines")
    (seen,) = provider.exchanges()
    assert seen["headers"]["anthropic-version"] == "2023-06-01"
    assert seen["headers"]["anthropic-beta"] == "output-300k-2026-03-24"


def test_the_environment_cannot_change_answers_behind_the_key(
    provider: testing.Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "ANTHROPIC_CUSTOM_HEADERS", "Anthropic-Version: 2023-06-01\nAnthropic-Beta: b\nx-team: red"
    )
    with connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["one"])
        backend.create(job, tmp_path / "lines")
    (seen,) = provider.exchanges()
    assert seen["headers"]["anthropic-version"] == "2026-10-21"
    assert "anthropic-beta" not in seen["headers"]
    assert seen["headers"]["x-team"] == "red"


def test_sampling_parameters_under_the_old_version(provider: testing.Provider) -> None:
    df = pl.DataFrame({"p": ["hi"]})
    with pytest.raises(pllm.InvalidRequest, match="Nothing was sent"):
        df.llm.generate("p", model=f"anthropic/{MODEL}", temperature=0.5)
    assert provider.log() == []
    old = pllm.Anthropic("claude-haiku-4-5", api_version="2023-06-01")
    assert df.llm.generate("p", model=old, temperature=0.5, on_pending="wait")["response"].to_list() == ["hi"]


@pytest.mark.parametrize("profiles", [None, "no-such-directory"])
def test_no_key_is_an_error_of_the_account(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profiles: str | None
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    if profiles:
        monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(tmp_path / profiles))
    with pytest.raises(pllm.AccountError, match="ANTHROPIC_API_KEY"):
        pl.DataFrame({"p": ["hi"]}).llm.generate("p", model=f"anthropic/{MODEL}")
    assert provider.log() == []


def test_a_profile_for_another_host_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its answers would be kept under the name of Anthropic's own host."""
    profiles = tmp_path / "profiles" / "configs"
    profiles.mkdir(parents=True)
    facts = {
        "base_url": "https://other.example",
        "authentication": {"type": "user_oauth", "credentials_path": str(tmp_path / "c.json")},
    }
    (profiles / "work.json").write_text(json.dumps(facts))
    (tmp_path / "c.json").write_text(
        json.dumps({"version": "1.0", "type": "oauth_token", "access_token": "x"})
    )
    (tmp_path / "c.json").chmod(0o600)
    monkeypatch.setenv("ANTHROPIC_CONFIG_DIR", str(profiles.parent))
    monkeypatch.setenv("ANTHROPIC_PROFILE", "work")
    with pytest.raises(pllm.AccountError, match="another host"):
        pllm.Anthropic(MODEL).backend().newest_batch()


def test_secrets_stay_out_of_everything_that_is_shown(provider: testing.Provider) -> None:
    provider.fault("status", status=400, message=f"no access for {SECRET}", times=None)
    with connected(provider.url) as backend:
        with pytest.raises(CallFailed) as caught:
            backend.newest_batch()
        model = pllm.Anthropic(MODEL, base_url="https://user:pass@gateway.example/x?key=1", api_key=SECRET)
        said = [str(caught.value), repr(caught.value), repr(backend), repr(model), repr(model.backend())]
    for text in said:
        assert SECRET not in text
        assert "pass" not in text
        assert "key=1" not in text
    travelled = pickle.dumps(model)
    assert SECRET.encode() not in travelled
    assert pickle.loads(travelled) == model


# --- looking ------------------------------------------------------------------------------------


def test_status_until_the_end_and_after_it(tmp_path: Path) -> None:
    with testing.provider(auto=False) as provider, connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["one", "two", "three", "four"])
        job = job_with(job, batch_id=backend.create(job, tmp_path / "lines"))
        running = backend.status(job)
        assert (running.phase, running.done, running.failed) == (Phase.RUNNING, 0, 0)
        provider.finish(fraction=0.75)
        ended = backend.status(job)
        assert (ended.phase, ended.done, ended.failed, ended.why) == (Phase.ENDED, 3, 1, "completed")
        backend.cancel(job)  # what has ended cannot be cancelled, and that is fine
        assert backend.status(job_with(job, batch_id="msgbatch_gone")).phase is Phase.MISSING


def job_with(job: Job, **facts: Any) -> Job:
    return job.to(job.state, **facts)


@pytest.mark.parametrize("fault", ["sparse", "odd-status"])
def test_a_batch_of_unknown_shape_is_waited_for_or_read(
    provider: testing.Provider, tmp_path: Path, fault: str
) -> None:
    provider.fault(fault, operation="messages.batches.retrieve", times=None)
    with connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["one"])
        job = job_with(job, batch_id=backend.create(job, tmp_path / "lines"))
        expected = Phase.RUNNING if fault == "odd-status" else Phase.ENDED
        assert backend.status(job).phase is expected


def test_cancel_keeps_what_was_done(tmp_path: Path) -> None:
    with testing.provider(auto=False) as provider, connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["one", "two"])
        job = job_with(job, batch_id=backend.create(job, tmp_path / "lines"))
        backend.cancel(job)
        assert backend.status(job).phase is Phase.RUNNING
        provider.finish()
        status = backend.status(job)
        assert (status.phase, status.failed) == (Phase.ENDED, 2)
        backend.download(job, status, tmp_path / "results")
        with (tmp_path / "results").open("rb") as lines:
            assert backend.parse(lines, status)["error"].to_list() == ["cancelled"] * 2


# --- finding a lost batch -----------------------------------------------------------------------


class Asked:
    """The heart's question, noting what it was asked."""

    def __init__(self, *own: str) -> None:
        self.own = {custom_id(key) for key in keys_of(list(own))}
        self.times = 0

    def __call__(self, custom_ids: Any) -> bool | None:
        self.times += 1
        names = set(custom_ids)
        return names == self.own if names else None


def test_a_lost_batch_is_known_by_the_ids_in_its_results(tmp_path: Path) -> None:
    with testing.provider(auto=False) as provider, connected(provider.url) as backend:

        def sent(*prompts: str) -> str:
            job = spooled(backend, tmp_path / "lines", list(prompts))
            return backend.create(job, tmp_path / "lines")

        sent("a", "b")  # the same requests, but older than the mark
        marker = backend.newest_batch()
        foreign, ours, longer, taken = sent("x", "y"), sent("a", "b"), sent("a", "b", "c"), sent("a", "b")
        job = spooled(backend, tmp_path / "lines", ["a", "b"], marker=marker)

        running = backend.find(job, {taken}, asked := Asked("a", "b"))
        assert running.batch_id is None  # what was in a batch shows only at its end
        assert set(running.candidates) == {foreign, ours}
        assert asked.times == 0

        provider.finish(foreign)
        assert backend.find(job, {taken}, asked).candidates == (ours,)
        provider.finish()
        assert backend.find(job, {taken}, asked).batch_id == ours
        assert longer not in running.candidates

        assert backend.find(job, {taken, ours}, Asked("a", "b")).batch_id is None
        newest = job_with(job, marker=taken)
        assert backend.find(newest, set(), Asked("a", "b")) == backend.find(newest, set(), Asked())


def test_without_a_mark_all_batches_are_looked_through(provider: testing.Provider, tmp_path: Path) -> None:
    with connected(provider.url) as backend:
        assert backend.newest_batch() is None
        job = spooled(backend, tmp_path / "lines", ["a"])
        batch_id = backend.create(job, tmp_path / "lines")
        for prompt in ("b", "c"):
            spooled(backend, tmp_path / "lines", [prompt])
            backend.create(job, tmp_path / "lines")
        assert backend.find(job, set(), Asked("a")).batch_id == batch_id
        deleted = job_with(job, marker="msgbatch_deleted")
        assert backend.find(deleted, set(), Asked("a")).batch_id == batch_id
        assert backend.find(deleted, set(), Asked("z")) == backend.find(deleted, set(), lambda _: False)


@pytest.mark.parametrize("judged", [None, False])
def test_what_cannot_be_decided_stays_a_candidate(
    provider: testing.Provider, tmp_path: Path, judged: bool | None
) -> None:
    with connected(provider.url) as backend:
        job = spooled(backend, tmp_path / "lines", ["a"])
        batch_id = backend.create(job, tmp_path / "lines")
        found = backend.find(job, set(), lambda _: judged)
        assert found.candidates == (() if judged is False else (batch_id,))
        provider.fault("gone", times=None)
        assert backend.find(job, set(), Asked("a")).candidates == (batch_id,)


def test_a_list_of_several_pages(
    provider: testing.Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(anthropic, "_PAGE", 2)
    with connected(provider.url) as backend:
        made = []
        for number in range(5):
            job = spooled(backend, tmp_path / "lines", [f"p{number}"])
            made.append(backend.create(job, tmp_path / "lines"))
        listed = list(backend.list_batches())
        assert [batch.batch_id for batch in listed] == made[::-1]
        assert {batch.requests for batch in listed} == {1}
        assert backend.find(job, set(), Asked("p0")).batch_id == made[0]
        assert backend.sent_custom_ids(listed[0], tmp_path / "x") is None


def archived() -> dict[str, Any]:
    """A batch whose results are gone, as the API shows it."""
    counts = {"processing": 0, "succeeded": 1, "errored": 0, "canceled": 0, "expired": 0}
    stamp = "2026-09-01T00:00:00Z"
    return {
        "id": "msgbatch_old",
        "type": "message_batch",
        "processing_status": "ended",
        "request_counts": counts,
        "created_at": stamp,
        "expires_at": stamp,
        "ended_at": stamp,
        "archived_at": stamp,
        "cancel_initiated_at": None,
        "results_url": None,
    }


@contextlib.contextmanager
def canned(replies: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str | None]]]]:
    """A server with fixed replies by path; gives its address, and paths and keys that came."""
    seen: list[tuple[str, str | None]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            seen.append((path, self.headers["authorization"]))
            reply = replies.get(path)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(404 if reply is None else 200)
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
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_archived_batch_is_older_than_a_young_job(tmp_path: Path) -> None:
    listing = {"data": [archived()], "has_more": False, "first_id": None, "last_id": None}
    with canned({BATCHES: listing}) as (url, _), connected(url) as backend:
        young = spooled(backend, tmp_path / "lines", ["a"])
        assert backend.find(young, set(), Asked("a")).candidates == ()
        # The stamp of a machine that was started again: wall clock, 29 days ago.
        boot, uptime, wall = clock.stamp().split(" ")
        then = f"other-{boot} {uptime} {float(wall) - 29 * 86_400}"
        old = job_with(young, create_called=then)
        assert backend.find(old, set(), Asked("a")).candidates == ("msgbatch_old",)


def test_results_that_are_archived_are_gone(tmp_path: Path) -> None:
    with canned({f"{BATCHES}/msgbatch_old": archived()}) as (url, _seen), connected(url) as backend:
        job = spooled(backend, tmp_path / "lines", ["a"], batch_id="msgbatch_old")
        with pytest.raises(CallFailed) as caught:
            backend.download(job, backend.status(job), tmp_path / "results")
    assert caught.value.status == 410


# --- results ------------------------------------------------------------------------------------


def ended(results_url: str | None) -> dict[str, Any]:
    return {**archived(), "id": "msgbatch_1", "archived_at": None, "results_url": results_url}


RESULT = json.dumps({"custom_id": custom_id(keys_of(["a"])[0]), "result": {"type": "expired"}}).encode()


@pytest.mark.parametrize("own_route", [True, False])
def test_the_key_never_goes_to_a_foreign_host(tmp_path: Path, own_route: bool) -> None:
    """A gateway may pass the real API's results_url through; its own route is asked instead."""
    path = f"{BATCHES}/msgbatch_1"
    with canned({"/loot": RESULT}) as (foreign, leaked):
        replies = {path: ended(f"{foreign}/loot")}
        if own_route:
            replies[f"{path}/results"] = RESULT
        with canned(replies) as (url, seen), connected(url) as backend:
            job = spooled(backend, tmp_path / "lines", ["a"], batch_id="msgbatch_1")
            status = backend.status(job)
            if own_route:
                backend.download(job, status, tmp_path / "results")
                assert (tmp_path / "results").read_bytes() == RESULT
            else:
                with pytest.raises(CallFailed, match="another host") as caught:
                    backend.download(job, status, tmp_path / "results")
                # Not 404 or 410: nothing is remembered as gone, and nothing is sent again.
                assert caught.value.status == 400
    assert leaked == []
    assert (f"{path}/results", f"Bearer {SECRET}") in seen


@pytest.mark.parametrize("given", ["{url}/given", "/given", "{url}/stale", "/stale", None])
def test_results_are_read_where_the_batch_says_else_where_they_are_documented(
    tmp_path: Path, given: str | None
) -> None:
    path = f"{BATCHES}/msgbatch_1"
    replies: dict[str, Any] = {"/given": b"given", f"{path}/results": b"documented"}
    with canned(replies) as (url, _), connected(url) as backend:
        replies[path] = ended(given and given.format(url=url))
        job = spooled(backend, tmp_path / "lines", ["a"], batch_id="msgbatch_1")
        backend.download(job, backend.status(job), tmp_path / "results")
    expected = b"given" if given and given.endswith("given") else b"documented"
    assert (tmp_path / "results").read_bytes() == expected


def test_a_web_page_with_status_200_is_no_batch(tmp_path: Path) -> None:
    """A proxy's log-in page: not an answer to anything, and not a crash."""
    page = b"<html>Please log in</html>"
    with canned({BATCHES: page, f"{BATCHES}/msgbatch_1": page}) as (url, _), connected(url) as backend:
        job = spooled(backend, tmp_path / "lines", ["a"], batch_id="msgbatch_1")
        for call in (backend._retrieve, lambda _: backend._page(None)):
            with pytest.raises(CallFailed) as caught:
                call(job.batch_id or "")
            assert caught.value.verdict.transient


# --- the whole way ------------------------------------------------------------------------------


def ask(df: pl.DataFrame, **options: Any) -> list[str | None]:
    answers = df.llm.generate("p", model=f"anthropic/{MODEL}", on_pending="wait", **options)
    return answers["response"].to_list()


def test_like_openai_in_everything(provider: testing.Provider) -> None:
    df = pl.DataFrame({"p": ["one", None, "two", "one"]})
    with pytest.raises(pllm.JobsPending) as pending:
        df.llm.generate("p", model=f"anthropic/{MODEL}")
    assert pending.value.requests == 2
    assert ask(df) == ["one", None, "two", "one"]
    assert ask(df.head(3).reverse()) == ["two", None, "one"]
    assert posts(provider) == 1
    assert provider.bill().billed == 2


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("crlf", {}),
        ("blank-lines", {}),
        ("duplicate-lines", {}),
        ("foreign-ids", {}),
        ("garbage-line", {}),
        ("no-final-newline", {}),
        ("missing-lines", {}),
        ("truncate", {"framing": "chunked"}),
        ("truncate", {"framing": "length"}),
        ("truncate", {"framing": "close"}),
        ("status", {"operation": "messages.batches.results", "status": 503}),
        ("drop", {"operation": "messages.batches.results"}),
    ],
)
def test_dirty_results_are_read_whole(
    provider: testing.Provider, fault: str, options: dict[str, Any]
) -> None:
    provider.fault(fault, **{"operation": "messages.batches.results", **options})
    prompts = [f"prompt {n}" for n in range(20)]
    assert ask(pl.DataFrame({"p": prompts})) == prompts
    assert provider.bill().billed == 20
    assert posts(provider) == 1


def test_separators_stay_text(provider: testing.Provider) -> None:
    provider.fault("raw-separators")
    (answer,) = ask(pl.DataFrame({"p": ["a"]}))
    assert answer == "a \u2028and\u0085on"


@pytest.mark.parametrize("fault", ["create-then-500", "create-then-drop", "create-then-garbage"])
def test_a_lost_reply_is_never_paid_twice(fault: str, tmp_path: Path) -> None:
    """Somebody else's batch of the same size is there as well, and ends first."""
    df = pl.DataFrame({"p": ["a", "b"]})
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        provider.fault(fault, operation="messages.batches.create")
        with pytest.raises(pllm.JobsPending):
            df.llm.generate("p", model=f"anthropic/{MODEL}")
        with connected(provider.url) as backend:
            job = spooled(backend, tmp_path / "lines", ["x", "y"])
            foreign = backend.create(job, tmp_path / "lines")
        for _ in range(2):
            with pytest.raises(pllm.JobsPending, match="2 batches may be this one"):
                df.llm.generate("p", model=f"anthropic/{MODEL}")
            assert pllm.jobs()["state"].to_list() == ["unknown"]
        provider.finish(foreign)
        with pytest.raises(pllm.JobsPending, match="1 batches may be this one"):
            df.llm.generate("p", model=f"anthropic/{MODEL}")
        provider.finish()
        assert ask(df) == ["a", "b"]
        assert len(provider.batches()) == 2
        assert not provider.bill().duplicates


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A create call that can't be found counts as never done at once."""
    monkeypatch.setattr(AnthropicBatch, "create_timeout", 0.0)
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "0.001")


@pytest.mark.parametrize(
    ("fault", "options"),
    [
        ("foreign-ids", {"count": 2}),
        ("foreign-ids", {"count": 2, "times": None}),
        ("duplicate-lines", {}),
        ("missing-lines", {"count": 1}),
        ("missing-lines", {"count": 2}),
        ("blank-lines", {}),
        ("truncate", {"share": 0.4, "framing": "close"}),
        ("truncate", {"share": 0.0, "framing": "close"}),
        ("truncate", {"framing": "chunked"}),
        ("status", {"operation": "messages.batches.results", "status": 500}),
        ("status", {"operation": "messages.batches.list", "status": 503, "after": 1}),
        ("gone", {"operation": "messages.batches.results"}),
    ],
)
def test_a_look_that_goes_wrong_is_no_proof_of_absence(
    provider: testing.Provider, no_patience: None, fault: str, options: dict[str, Any]
) -> None:
    provider.fault("create-then-drop", operation="messages.batches.create")
    provider.fault(fault, **options)
    assert ask(pl.DataFrame({"p": ["a", "b"]})) == ["a", "b"]
    assert len(provider.batches()) == 1


def test_what_never_arrived_is_sent_again_when_the_list_stays_empty(
    provider: testing.Provider, no_patience: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "0.3")
    provider.fault("drop", operation="messages.batches.create")
    assert ask(pl.DataFrame({"p": ["a", "b"]})) == ["a", "b"]
    assert posts(provider) == 2
    assert len(provider.batches()) == 1


def test_an_orphan_that_is_not_ours_is_left_alone_and_the_work_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnthropicBatch, "create_timeout", 0.3)
    df = pl.DataFrame({"p": ["a", "b"]})
    with testing.provider(model=lambda request: request.prompt, auto=False) as provider:
        provider.fault("drop", operation="messages.batches.create")
        with pytest.raises(pllm.JobsPending):
            df.llm.generate("p", model=f"anthropic/{MODEL}")
        with connected(provider.url) as backend:
            job = spooled(backend, tmp_path / "lines", ["x", "y"])
            foreign = backend.create(job, tmp_path / "lines")
        with pytest.raises(pllm.JobsPending, match="1 batches may be this one"):
            df.llm.generate("p", model=f"anthropic/{MODEL}")
        provider.finish(foreign)
        deadline = time.monotonic() + 30
        while len(provider.batches()) == 1:
            assert time.monotonic() < deadline
            with pytest.raises(pllm.JobsPending):
                df.llm.generate("p", model=f"anthropic/{MODEL}")
        provider.finish()
        assert ask(df) == ["a", "b"]
        assert len(provider.batches()) == 2
        assert not provider.bill().duplicates
        assert pllm.jobs()["batch_id"].to_list().count(foreign) == 0


def test_the_same_requests_of_another_machine_are_taken_over(
    provider: testing.Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    df = pl.DataFrame({"p": ["a", "b"]})
    provider.fault("drop", operation="messages.batches.create")
    with pytest.raises(pllm.JobsPending):
        df.llm.generate("p", model=f"anthropic/{MODEL}")
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
        assert ask(df) == ["a", "b"]
    assert ask(df) == ["a", "b"]
    assert len(provider.batches()) == 1


def test_failures_by_kind(provider: testing.Provider) -> None:
    prompts = ["ok", "[[fail:400]] a", "[[fail:529:1]] b", "[[expire:1]] c", "[[fail:429:1]] d"]
    with pytest.warns(pllm.LLMWarning, match="1 of 5 requests failed: invalid_request_error 1"):
        answers = ask(pl.DataFrame({"p": prompts}))
    assert answers == ["ok", None, *prompts[2:]]
    assert posts(provider) == 2  # what may pass is sent again, alone
    assert [batch["total"] for batch in provider.batches()] == [5, 3]


def test_recover_reads_the_answers_back(
    provider: testing.Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    df = pl.DataFrame({"p": ["one", "two"]})
    ask(df)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "another"))
    pllm.Config.restore_defaults()
    recovered = pllm.recover("anthropic")
    assert recovered.select("outcome", "answers").rows() == [("recovered", 2)]
    assert ask(df) == ["one", "two"]
    assert posts(provider) == 1
