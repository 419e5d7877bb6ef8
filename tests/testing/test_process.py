"""The provider's own process: what it outlives, what it doesn't, and what it leaves behind."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import openai
import pytest

import polars_llm.testing
from polars_llm.testing import Provider, provider

from .conftest import chats, submit

ROOT = Path(__file__).parents[2]
NAMES = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL")


def run(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for temporary files: what is left there was left by this test."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


CLIENT = """
    import io, json, os, signal, sys, openai
    name = sys.argv[1]
    line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": name}]}}
    client = openai.OpenAI(max_retries=0)
    data = io.BytesIO(json.dumps(line).encode())
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    client.batches.create(
        input_file_id=file.id, endpoint=line["url"], completion_window="24h")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_bill_outlives_killed_clients(p: Provider) -> None:
    clients = [run(CLIENT, f"client-{i}") for i in range(3)]
    for client in clients:
        with client:
            assert client.wait(30) == -9
    assert p.bill().by_custom_id == {f"client-{i}": 1 for i in range(3)}


def test_it_shares_nothing_with_the_library(p: Provider) -> None:
    assert p.pid is not None
    maps = Path(f"/proc/{p.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "polars" not in maps.read_text()


def test_its_files_import_only_each_other() -> None:
    for path in Path(polars_llm.testing.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, path
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
                assert not [n for n in names if n and n.startswith(("polars", "openai", "anthro"))]


def test_it_starts_quickly() -> None:
    started = time.monotonic()
    with provider():
        seconds = time.monotonic() - started
    # A tenth of that on an idle machine; importing polars alone would take longer.
    assert seconds < 2


def test_the_environment_is_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-mine")
    monkeypatch.delenv("ANTHROPIC_BASE_URL", raising=False)
    with provider() as p:
        assert {name: os.environ[name] for name in NAMES} == p.env
        assert p.env["OPENAI_BASE_URL"] == p.openai_base_url == f"{p.url}/v1"
        assert p.env["ANTHROPIC_BASE_URL"] == p.anthropic_base_url == p.url
        assert "OPENAI_ORG_ID" not in os.environ
    assert os.environ["OPENAI_API_KEY"] == "mine"
    assert os.environ["OPENAI_ORG_ID"] == "org-mine"
    assert "ANTHROPIC_BASE_URL" not in os.environ
    with provider(set_env=False):
        assert os.environ["OPENAI_API_KEY"] == "mine"


def test_a_proxy_is_not_asked_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.com")
    with provider() as p, openai.OpenAI(max_retries=0) as oai:
        submit(oai, chats(1))
        assert p.bill().batches == 1
    assert os.environ["NO_PROXY"] == "example.com"


def test_nothing_is_left_behind(scratch: Path) -> None:
    with provider() as p, openai.OpenAI(max_retries=0) as oai:
        submit(oai, chats(1))
        assert len(list(scratch.iterdir())) == 1
        assert p.pid is not None
    assert not is_running(p.pid)
    assert list(scratch.iterdir()) == []


def test_a_failing_test_ends_it_too() -> None:
    with pytest.raises(ZeroDivisionError), provider() as p:
        raise ZeroDivisionError
    assert p.pid is not None
    assert not is_running(p.pid)


OWNER = """
    import sys, signal
    from polars_llm.testing import provider
    p = provider(set_env=False, detached=sys.argv[1] == "detached").start()
    print(p.url, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_parent(scratch: Path, how: signal.Signals) -> None:
    with run(OWNER, "attached") as owner:
        assert owner.stdout is not None
        p = Provider.attach(owner.stdout.readline().strip())
        assert p.log() == []
        owner.send_signal(how)
        owner.wait(10)
    assert p.wait_until_gone()
    assert list(scratch.iterdir()) == []


def test_detached_it_goes_on_until_it_is_stopped(scratch: Path) -> None:
    with run(OWNER, "detached") as owner:
        assert owner.stdout is not None
        p = Provider.attach(owner.stdout.readline().strip())
        owner.kill()
        owner.wait(10)
    with p, openai.OpenAI(api_key="k", base_url=p.openai_base_url) as oai:
        submit(oai, chats(2))
        time.sleep(0.7)  # Longer than it would take to notice that the parent is gone.
    assert p.bill().billed == 2
    p.stop()
    assert p.wait_until_gone()
    assert list(scratch.iterdir()) == []


def test_a_taken_port_is_told(p: Provider, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="did not start"):
        provider(port=int(p.url.rpartition(":")[2])).start()
    assert "Address already in use" in capfd.readouterr().err
    assert os.environ["OPENAI_BASE_URL"] == p.openai_base_url


def test_unknown_limits_are_told() -> None:
    with pytest.raises(ValueError, match="openai_requests"):
        provider(limits={"requests": 1})


def test_a_bug_in_the_emulator_is_a_500_and_a_trace(capfd: pytest.CaptureFixture[str]) -> None:
    with provider() as p, openai.OpenAI(max_retries=0) as oai:
        p.fault("slow", seconds="not a number")
        with pytest.raises(openai.InternalServerError, match="bug"):
            oai.batches.list()
        assert oai.batches.list().data == []
    assert "TypeError" in capfd.readouterr().err


def test_it_can_start_over(p: Provider) -> None:
    with openai.OpenAI(max_retries=0) as oai:
        batch = submit(oai, chats(2))
        p.fault("drop", times=None, after=100)
        assert p.bill().billed == 2
        p.reset()
        assert (p.bill().billed, p.bill().files, p.batches(), p.files()) == (0, 0, [], [])
        assert (p.log(), p.faults()) == ([], [])
        with pytest.raises(openai.NotFoundError):
            oai.batches.retrieve(batch.id)
        submit(oai, chats(1))
    assert p.bill().billed == 1


def test_exchanges_tell_what_arrived(p: Provider) -> None:
    with openai.OpenAI(api_key="sk-mine", max_retries=0) as oai:
        oai.embeddings.create(model="m", input="x", extra_headers={"x-odd": "1"})
    (exchange,) = p.exchanges()
    assert exchange["operation"] == "embeddings.create"
    assert exchange["headers"]["authorization"] == "Bearer sk-mine"
    assert exchange["headers"]["x-odd"] == "1"
    assert '"input":"x"' in exchange["body"].replace(" ", "")
    p.clear_log()
    assert (p.log(), p.exchanges()) == ([], [])
    assert p.bill().billed == 1
