"""The machine lets a job down, at any stage: full disks, lost directories, clocks, signals, forks.

Whatever happens: a clear error, the same line goes on afterwards, and nothing is paid twice or lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import operate, store, testing
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.openai import OpenAIBatch
from polars_llm.cli import main
from tests.conftest import MODEL
from tests.store.child import Child
from tests.store.disks import make_read_only, mounted

MODELS = [MODEL, "anthropic/claude-haiku-5-5"]
PROMPTS = [f"Statement number {n} is about thing {n}." for n in range(8)]
FRAME = pl.DataFrame({"prompt": PROMPTS})

linux = pytest.mark.skipif(sys.platform != "linux", reason="mounts small disks")


@pytest.fixture(autouse=True)
def short_create_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OpenAIBatch, "create_timeout", 0.5)
    monkeypatch.setattr(AnthropicBatch, "create_timeout", 0.5)


@pytest.fixture(params=MODELS, ids=["openai", "anthropic"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def slow() -> Iterator[testing.Provider]:
    """A provider whose batches end when the test says so."""
    with testing.provider(model=lambda request: request.prompt, auto=False) as running:
        yield running


def collected(**options: Any) -> pl.DataFrame:
    return FRAME.llm.generate("prompt", **{"model": MODEL, "on_pending": "wait", **options})


def submit(**options: Any) -> list[str]:
    with pytest.raises(pllm.JobsPending) as pending:
        collected(on_pending="raise", **options)
    return pending.value.jobs


def check(provider: testing.Provider, out: pl.DataFrame) -> None:
    """Every answer on its row, every request billed once, nothing left."""
    assert out["response"].to_list() == PROMPTS
    bill = provider.bill()
    assert (bill.billed, bill.duplicates) == (len(PROMPTS), {})
    assert operate.watch().is_empty()


# --- full disks -----------------------------------------------------------------------------------

_KIB = 1024


class Disk:
    """A small disk that can be filled up."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self, left: int = 0) -> None:
        """Leave so many bytes."""
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4 * _KIB)):
                pass
        state = os.statvfs(self.path)
        os.truncate(self._ballast, self._ballast.stat().st_size - left + state.f_bavail * state.f_frsize)

    def free(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", "1m"):
        monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "disk" / "cache"))
        yield Disk(tmp_path / "disk")


# From nothing at all to enough: the disk becomes full at another step each time.
ROOM = [0, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160]


@linux
@pytest.mark.parametrize("left", ROOM)
def test_a_disk_that_is_full_before_or_while_submitting(
    provider: testing.Provider, disk: Disk, left: int
) -> None:
    model = MODELS[ROOM.index(left) % 2]
    disk.fill(left * _KIB)
    for _ in range(2):
        with pytest.raises((pllm.CacheError, pllm.JobsPending), match="Hint:"):
            collected(model=model, on_pending="raise")
    disk.free()
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@linux
@pytest.mark.parametrize("left", ROOM)
def test_a_disk_that_is_full_before_or_while_collecting(
    slow: testing.Provider, disk: Disk, left: int
) -> None:
    model = MODELS[ROOM.index(left) % 2]
    submit(model=model)
    disk.fill(left * _KIB)
    slow.finish()
    for _ in range(2):
        # At worst there is no room for the answers.
        with contextlib.suppress(pllm.CacheError, pllm.JobsPending):
            assert collected(model=model, on_pending="raise")["response"].to_list() == PROMPTS
    disk.free()
    check(slow, collected(model=model))
    assert slow.bill().batches == 1


@linux
def test_a_disk_that_becomes_full_while_the_batch_is_created(
    model: str, provider: testing.Provider, disk: Disk
) -> None:
    held = provider.fault("create-then-hold", seconds=0.3)
    with ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(collected, model=model, on_pending="raise")
        assert provider.held(held, seconds=20) == 1
        disk.fill()
        provider.release(held)
        with pytest.raises(pllm.CacheError, match=r"Hint: free space"):
            evaluation.result()
    disk.free()
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@linux
def test_a_full_disk_is_a_line_in_the_terminal(
    slow: testing.Provider, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    submit()
    slow.finish()
    disk.fill()
    assert main(["watch"]) == 1
    assert "Hint: free space" in capsys.readouterr().err
    disk.free()
    assert main(["watch"]) == 0
    check(slow, collected())


# --- read-only directories --------------------------------------------------------------------------


@linux
def test_a_read_only_disk_from_the_start(model: str, provider: testing.Provider, disk: Disk) -> None:
    make_read_only(disk.path)
    with pytest.raises(pllm.CacheError, match=r"Read-only(.|\n)*Hint: set POLARS_LLM_CACHE_DIR"):
        collected(model=model)
    assert provider.log() == []


@linux
def test_a_disk_that_becomes_read_only_while_a_job_is_pending(
    model: str, slow: testing.Provider, disk: Disk
) -> None:
    submit(model=model)
    make_read_only(disk.path)
    slow.finish()
    for _ in range(2):
        with pytest.raises(pllm.CacheError, match=r"Hint: (.|\n)*POLARS_LLM_CACHE_DIR(.|\n)*pllm.recover"):
            collected(model=model)
    make_read_only(disk.path, but="rw")
    check(slow, collected(model=model))
    assert slow.bill().batches == 1


@linux
def test_what_is_answered_can_be_read_from_a_read_only_disk(provider: testing.Provider, disk: Disk) -> None:
    check(provider, collected())
    make_read_only(disk.path)
    provider.clear_log()
    assert collected()["response"].to_list() == PROMPTS
    assert collected(output="full")["response"].struct.field("status").to_list() == ["done"] * 8
    assert pllm.results().collect().height == 8
    assert provider.log() == []
    with pytest.raises(pllm.CacheError, match="Hint: make it writable"):
        pllm.jobs()  # SQLite cannot read a database there that it cannot lock


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Be a user without rights for the block; anybody but root is one already."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX only")
@pytest.mark.parametrize("mode", [0o555, 0o700])
def test_a_directory_of_another_user(provider: testing.Provider, mode: int) -> None:
    collected(sample=1)  # loads what this user could not
    before = len(provider.log())
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(mode)
        with nobody(), pllm.Config(cache_dir=Path(home, "cache")):
            for _ in range(2):
                with pytest.raises(pllm.CacheError, match=r"Permission denied(.|\n)*Hint: make it writable"):
                    collected()
    assert len(provider.log()) == before


# --- answers that are damaged ---------------------------------------------------------------------------


def test_answers_that_cannot_be_read_are_not_paid_again(
    model: str, provider: testing.Provider, own_cache: Path
) -> None:
    check(provider, collected(model=model))
    (segment,) = (own_cache / "results").glob("*.parquet")
    whole = segment.read_bytes()
    segment.write_bytes(whole[: len(whole) // 2])
    store._open.clear()  # as a new process
    provider.clear_log()
    for _ in range(2):
        with pytest.raises(pllm.CacheError, match=rf"{segment.name}(.|\n)*Hint:"):
            collected(model=model)
    assert provider.log() == []
    segment.write_bytes(whole)
    check(provider, collected(model=model))


# --- a directory that is removed ----------------------------------------------------------------------


@pytest.mark.parametrize("what", ["", "jobs"])
def test_a_directory_removed_while_a_job_is_pending(
    slow: testing.Provider, own_cache: Path, what: str
) -> None:
    submit()
    lose(own_cache / what)
    with pytest.raises(pllm.CacheError, match=r"removed(.|\n)*Hint: (.|\n)*pllm.recover"):
        collected()
    assert pllm.recover("openai")["outcome"].to_list() == ["resumed"]
    submit()
    slow.finish()
    check(slow, collected())
    assert slow.bill().batches == 1


@pytest.mark.parametrize("what", ["", "jobs", "spool"])
def test_a_directory_removed_while_it_waits(
    model: str, slow: testing.Provider, own_cache: Path, what: str
) -> None:
    with ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(collected, model=model)
        until(lambda: not pllm.jobs(open_only=True).filter(state="submitted").is_empty())
        job = pllm.jobs()["job"][0]
        lose(own_cache / what)
        if what == "spool":
            slow.finish()  # until then nobody reads what was in it
        # In the middle of a write SQLite says so first.
        with pytest.raises(pllm.CacheError, match=r"Hint: (.|\n)*(pllm.recover|check it)"):
            evaluation.result(timeout=30)
    slow.finish()
    if what == "spool":
        pllm.abandon(job)
    pllm.recover(model.partition("/")[0])
    check(slow, collected(model=model))
    assert slow.bill().batches == 1


def lose(path: Path) -> None:
    """In one moment, as nobody else can see it half done."""
    path.rename(path.with_name("lost"))


def until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# --- clocks -------------------------------------------------------------------------------------------

DAY = 86_400.0


@pytest.mark.parametrize("jumps", [(3, 3, 3), (-3, -3, -3), (400, -800, 400), (-400, 800, -400)])
@pytest.mark.parametrize("fault", ["create-then-drop", "token-limit", "drop", "expire"])
def test_a_clock_that_jumps_through_a_jobs_life(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch, jumps: tuple[int, ...], fault: str
) -> None:
    real, offset = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + offset)
    provider.fault(fault, **({"operation": "*batches.create"} if fault == "drop" else {}))
    started = time.monotonic()
    for days in jumps:
        with contextlib.suppress(pllm.JobsPending):
            collected(on_pending="raise")
        assert provider.bill().billed <= len(PROMPTS)
        offset += days * DAY
    check(provider, collected())
    assert time.monotonic() - started < 30
    if fault == "drop":  # the quiet period was one by the machine's uptime
        assert time.monotonic() - started > 0.7


# --- signals ------------------------------------------------------------------------------------------

_PROCESS = f"""
import os, signal, sys
import polars as pl, polars_llm as pllm
from polars_llm.backends.anthropic import AnthropicBatch
from polars_llm.backends.openai import OpenAIBatch
AnthropicBatch.create_timeout = OpenAIBatch.create_timeout = 30.0
model, handler = sys.argv[1:]
if handler == "exit":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
if handler == "interrupt":
    signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    pl.DataFrame({{"prompt": {PROMPTS!r}}}).llm.generate("prompt", model=model, on_pending="wait")
except KeyboardInterrupt as stop:
    print(*getattr(stop, "__notes__", []), flush=True)
    sys.exit(4)
"""
SIGNALS = [
    pytest.param(signal.SIGTERM, "default", -signal.SIGTERM, id="SIGTERM"),
    pytest.param(signal.SIGTERM, "exit", 3, id="SIGTERM-with-a-handler"),
    pytest.param(signal.SIGINT, "interrupt", 4, id="Ctrl+C"),
]
posix = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")


def ended_by(process: subprocess.Popen[Any], number: signal.Signals) -> int:
    """The exit status; a signal whose handler raises inside a finalizer is forgotten, by Python itself."""
    for _ in range(3):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(5)
    raise AssertionError(f"{number} does not end it")


@posix
@pytest.mark.parametrize("fault", ["create-then-hold", "hold"])
@pytest.mark.parametrize(("number", "handler", "code"), SIGNALS)
def test_a_signal_while_submitting(
    model: str, provider: testing.Provider, number: signal.Signals, handler: str, code: int, fault: str
) -> None:
    held = provider.fault(fault, operation="*batches.create", seconds=30)
    with Child(_PROCESS, model, handler) as child:
        assert provider.held(held, seconds=30) == 1
        assert ended_by(child.process, number) == code
        provider.release(held)  # what was on its way arrives
        if number == signal.SIGINT:
            assert "job_" in child.line()
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@posix
@pytest.mark.parametrize(("number", "handler", "code"), SIGNALS)
def test_a_signal_while_waiting(
    model: str, slow: testing.Provider, number: signal.Signals, handler: str, code: int
) -> None:
    with Child(_PROCESS, model, handler) as child:
        until(lambda: not pllm.jobs(open_only=True).filter(state="submitted").is_empty(), 30)
        assert ended_by(child.process, number) == code
        if number == signal.SIGINT:
            assert "job_" in child.line()
    slow.finish()
    check(slow, collected(model=model))
    assert slow.bill().batches == 1


# --- forks --------------------------------------------------------------------------------------------

_FORKS = f"""
import multiprocessing, sys, threading, warnings
import polars as pl, polars_llm as pllm
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
frame = pl.DataFrame({{"prompt": {PROMPTS!r}}})

def evaluate(pipe=None, **options):
    try:
        said = frame.llm.generate("prompt", model=sys.argv[1], **options)["response"].null_count()
    except pllm.PolarsLLMError as error:
        said = type(error).__name__
    if pipe is not None:
        pipe.send(said)
    return said

def embed(pipe):
    try:
        said = frame.llm.embed("prompt", model="openai/text-embedding-3-small").height
    except pllm.PolarsLLMError as error:
        said = type(error).__name__
    pipe.send(said)

def in_a_fork(target=evaluate, **options):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs,), kwargs=options)
    process.start()
    said = ours.recv() if ours.poll(30) else "hangs"
    process.join(10)
    if process.is_alive():
        process.kill()
    print("the child:", said, flush=True)
"""
_FORKS_AFTER_USE = f"""
{_FORKS}
print("the parent:", evaluate(on_pending="wait"), flush=True)
in_a_fork(on_pending="wait")
in_a_fork(on_pending="wait", sample=1)
in_a_fork(embed)
print("the parent:", evaluate(on_pending="wait"), flush=True)
"""
_FORKS_BEFORE_USE = f"""
{_FORKS}
in_a_fork(on_pending="wait")
in_a_fork(on_pending="wait")
print("the parent:", evaluate(on_pending="wait"), flush=True)
"""
_FORKS_WHILE_SUBMITTING = f"""
{_FORKS}
thread = threading.Thread(target=lambda: print("the parent:", evaluate(on_pending="wait"), flush=True))
thread.start()
input()
in_a_fork(on_pending="raise")
in_a_fork(on_pending="raise")
print("forked", flush=True)
thread.join()
"""
fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@fork
def test_a_fork_of_a_process_that_has_used_polars_is_refused(model: str, provider: testing.Provider) -> None:
    with Child(_FORKS_AFTER_USE, model) as child:
        refused = ["the child: PolarsLLMError"] * 3
        assert child.lines() == ["the parent: 0", *refused, "the parent: 0"]
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@fork
def test_a_fork_of_a_process_that_has_not_is_a_process_like_others(
    model: str, provider: testing.Provider
) -> None:
    with Child(_FORKS_BEFORE_USE, model) as child:
        assert child.lines() == ["the child: 0", "the child: 0", "the parent: 0"]
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


@fork
def test_a_fork_while_its_parent_submits(model: str, provider: testing.Provider) -> None:
    held = provider.fault("create-then-hold", seconds=60)
    with Child(_FORKS_WHILE_SUBMITTING, model) as child:
        assert provider.held(held, seconds=30) == 1
        child.go_on()
        assert [child.line() for _ in range(3)] == ["the child: PolarsLLMError"] * 2 + ["forked"]
        provider.release(held)
        assert child.lines() == ["the parent: 0"]
    check(provider, collected(model=model))
    assert provider.bill().batches == 1


# --- results that are gone ----------------------------------------------------------------------------


def test_results_that_the_provider_has_expired(model: str, slow: testing.Provider) -> None:
    submit(model=model)
    slow.finish()
    slow.fault("gone", times=None)
    with pytest.warns(pllm.LLMWarning, match=r"results_gone 8(.|\n)*may have billed"):
        full = collected(model=model, output="full")["response"].struct.unnest()
    assert full["status"].to_list() == ["failed"] * 8
    assert full["error"].str.contains("results_gone: the provider no longer has them").all()
    with pytest.raises(pllm.RequestsFailed, match="results_gone 8"):
        collected(model=model, on_error="raise")
    assert slow.bill().batches == 1
