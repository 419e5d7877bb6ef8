"""Real processes killed in the middle: an engine, the process that evaluates; Ctrl+C; what ends with them."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import polars as pl

import polars_llm as pllm
from tests.ray.conftest import TOKEN, tiny
from tests.vllm.conftest import ENGINE
from tests.vllm.conftest import tiny as local
from tests.vllm.test_processes import finish, start

ROWS = 300
ASKED = {"max_tokens": 100, "temperature": 0, "params": {"ignore_eos": True}}
SCRIPT = f"""
import polars as pl
import polars_llm as pllm
import sys

model = pllm.RayVLLM(sys.argv[1], dtype="float32", engine={ENGINE!r}, batch_size=16)
frame = pl.DataFrame({{"q": [f"Question {{i}}" for i in range({ROWS})]}})
out = frame.llm.generate("q", model=model, **{ASKED!r})
print("answered", out["response"].drop_nulls().len(), flush=True)
"""


def questions(n: int = ROWS) -> pl.DataFrame:
    return pl.DataFrame({"q": [f"Question {i}" for i in range(n)]})


def family(pid: int) -> list[int]:
    """All processes below one."""
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def engines(pid: int) -> list[int]:
    """The workers below a process that hold an engine."""
    import psutil

    below = psutil.Process(pid).children(recursive=True)
    return [p.pid for p in below if any("vLLMEngineStageUDF" in said for said in alive([p.pid]))]


def token_of(pid: int) -> str:
    """What a process was started with."""
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next((v.partition("=")[2] for v in variables if v.startswith("HF_TOKEN=")), "")


def alive(pids: list[int]) -> list[str]:
    import psutil

    found = []
    for pid in pids:
        try:
            process = psutil.Process(pid)
            said = " ".join(process.cmdline()) or process.name()
            # Ray's two agents see only after a minute that they are alone; they hold nothing.
            if process.status() != psutil.STATUS_ZOMBIE and "Agent" not in said:
                found.append(said)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def gone(pids: list[int], seconds: float = 40) -> bool:
    until = time.monotonic() + seconds
    while alive(pids) and time.monotonic() < until:
        time.sleep(0.2)
    return not alive(pids)


def test_a_lost_engine_is_started_again_and_what_was_answered_stays(model_dir: str) -> None:
    killed: list[int] = []
    tokens: list[str] = []
    kept: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 200
        while not pllm.results().collect().height and time.monotonic() < until:
            time.sleep(0.1)
        kept.append(pllm.results().collect().height)
        for worker in engines(os.getpid()):
            core = next(pid for pid in family(worker) if any("EngineCore" in said for said in alive([pid])))
            tokens.append(token_of(core))
            os.kill(core, signal.SIGKILL)
            killed.append(core)

    model = tiny(model_dir, runtime_env={"env_vars": {"HF_TOKEN": TOKEN}})
    thread = threading.Thread(target=kill)
    thread.start()
    out = questions().llm.generate("q", model=model, **ASKED)
    thread.join()
    assert len(killed) == 1
    assert 0 < kept[0] < ROWS
    assert out["response"].null_count() == 0
    assert pllm.jobs().select("state", "requests", "done").rows() == [("ingested", ROWS, ROWS)]
    answers = pllm.results().collect()
    assert answers["key"].n_unique() == answers.height == ROWS
    assert gone(engines(os.getpid()))  # they end with the evaluation; Ray stays for the next
    assert tokens == [TOKEN]
    below = family(os.getpid())
    assert any("raylet" in said for said in alive(below))
    pllm.RayVLLM("any").close()
    assert gone([pid for pid in below if any("ray" in said for said in alive([pid]))])


def test_a_lost_driver_and_an_interrupted_one_pay_only_for_what_was_not_kept(
    model_dir: str, tmp_path: Path
) -> None:
    script = tmp_path / "ask.py"
    script.write_text(SCRIPT)
    kept = [0]
    for how in (signal.SIGKILL, signal.SIGINT):
        process = start(script, model_dir)
        while process.poll() is None and pllm.results().collect().height <= kept[-1]:
            time.sleep(0.1)
        below = family(process.pid)
        assert any("vLLMEngineStageUDF" in said for said in alive(below))
        if how is signal.SIGKILL:  # all of Ray as well: nobody is left who would end the engine
            for pid in below:
                if any("ray" in said for said in alive([pid])):
                    os.kill(pid, how)
        process.send_signal(how)
        said = finish(process)
        assert ("KeyboardInterrupt" in said) == (how is signal.SIGINT), said
        assert ("are kept" in said) == (how is signal.SIGINT), said
        kept.append(pllm.results().collect().height)
        assert kept[-2] < kept[-1] < ROWS
        assert gone(below), alive(below)
    # The rest by an engine in this process: the keys are the same.
    here = local(model_dir)
    out = questions().llm.generate("q", model=here, **ASKED)
    here.close()
    assert out["response"].null_count() == 0
    jobs = pllm.jobs().select("state", "requests").rows()
    assert jobs == [("released", ROWS), ("released", ROWS - kept[1]), ("ingested", ROWS - kept[2])]
    answers = pllm.results().collect()
    assert answers["key"].n_unique() == answers.height == ROWS
