"""Real processes: killed in the middle, scripts without a guard, the engine in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import polars as pl
import pytest

import polars_llm as pllm
from tests.vllm.conftest import ENGINE, ROOT, tiny

ROWS = 400
ASK = f"""
import polars as pl
import polars_llm as pllm

ENGINE = {ENGINE!r}

def ask(path, rows={ROWS}):
    model = pllm.VLLM(path, dtype="float32", engine=ENGINE)
    frame = pl.DataFrame({{"q": [f"Question {{i}}" for i in range(rows)]}})
    out = frame.llm.generate("q", model=model, max_tokens=100, temperature=0, params={{"ignore_eos": True}})
    print("answered", out["response"].drop_nulls().len(), flush=True)
"""


def start(script: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    try:
        said, _ = process.communicate(timeout=200)
    finally:
        # Its own session: engines in processes of their own go with it.
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


def script(path: Path, last: str) -> Path:
    path.write_text(textwrap.dedent(ASK) + "\nimport sys\n" + last + "\n")
    return path


def until_some_are_kept(process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < until and not pllm.results().collect().height:
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_stopped_in_the_middle_the_rest_alone_is_asked(
    how: signal.Signals, model_dir: str, tmp_path: Path
) -> None:
    process = start(script(tmp_path / "ask.py", "ask(sys.argv[1])"), model_dir)
    until_some_are_kept(process)
    process.send_signal(how)
    said = finish(process)
    assert ("KeyboardInterrupt" in said) == (how is signal.SIGINT), said
    kept = pllm.results().collect().height
    assert 0 < kept < ROWS
    frame = pl.DataFrame({"q": [f"Question {i}" for i in range(ROWS)]})
    asked = {"max_tokens": 100, "temperature": 0, "params": {"ignore_eos": True}}
    out = frame.llm.generate("q", model=tiny(model_dir), **asked)
    assert out["response"].null_count() == 0
    jobs = pllm.jobs().select("state", "requests").rows()
    assert jobs == [("released", ROWS), ("ingested", ROWS - kept)]
    assert pllm.results().collect()["key"].n_unique() == pllm.results().collect().height == ROWS


STOP_THE_START = """
import _thread, threading, time

def stop():
    while "vllm" not in sys.modules:
        time.sleep(0.05)
    _thread.interrupt_main()

threading.Thread(target=stop, daemon=True).start()
try:
    ask(sys.argv[1], 5)
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


def test_stopped_at_the_start_the_next_evaluation_has_that_engine(model_dir: str, tmp_path: Path) -> None:
    again = """
ask(sys.argv[1], 5)
print("engines", sum(t.name == "polars_llm vllm" for t in threading.enumerate()))
"""
    process = start(script(tmp_path / "ask.py", STOP_THE_START + again), model_dir)
    said = finish(process)
    assert [line for line in said.splitlines() if line.split()[0] in {"stopped", "answered", "engines"}] == [
        "stopped",
        "answered 5",
        "engines 1",
    ], said
    assert process.returncode == 0


def test_stopped_at_the_start_the_process_ends_in_order(model_dir: str, tmp_path: Path) -> None:
    process = start(script(tmp_path / "ask.py", STOP_THE_START), model_dir)
    said = finish(process)
    assert "stopped" in said
    assert "terminate called" not in said
    assert process.returncode == 0, said


def test_a_script_needs_no_guard(model_dir: str, tmp_path: Path) -> None:
    process = start(script(tmp_path / "ask.py", "ask(sys.argv[1], 5)"), model_dir)
    said = finish(process)
    assert "answered 5" in said, said
    assert process.returncode == 0


def test_where_a_guard_is_needed_the_error_says_so(model_dir: str, tmp_path: Path) -> None:
    process = start(
        script(tmp_path / "ask.py", "ask(sys.argv[1], 5)"), model_dir, VLLM_ENABLE_V1_MULTIPROCESSING="1"
    )
    said = finish(process)
    assert 'if __name__ == "__main__":' in said, said
    assert "InvalidRequest" in said
    assert process.returncode == 1


@pytest.mark.slow
def test_killed_it_leaves_no_engine_behind(model_dir: str, tmp_path: Path) -> None:
    import psutil

    process = start(
        script(tmp_path / "ask.py", 'if __name__ == "__main__":\n    ask(sys.argv[1])'),
        model_dir,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    until_some_are_kept(process)
    left = psutil.Process(process.pid).children(recursive=True)
    assert len(left) > 1
    process.kill()
    process.wait()
    try:
        _, alive = psutil.wait_procs(left, timeout=20)
        assert alive == []
    finally:
        for one in left:
            if one.is_running():
                one.kill()
        finish(process)


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own(model_dir: str, tmp_path: Path) -> None:
    process = start(
        script(tmp_path / "ask.py", 'if __name__ == "__main__":\n    ask(sys.argv[1], 5)'),
        model_dir,
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
    )
    said = finish(process)
    assert "answered 5" in said, said
    assert process.returncode == 0
