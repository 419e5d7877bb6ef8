"""The nearest rival, llm-batch-py, in an environment of its own.

It is measured as it is, at its fastest: a template of its own compiled kind, and none of its extra
columns. Its answers are structured output; ours here are plain text: the request is about as long.

It counts tokens before it submits, with a vocabulary that tiktoken downloads on first use. Where that
can't be had, the count is left out (`rival_llm_batch_py.py`): that favours it when cold, and changes
nothing when warm, for then it counts nothing.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

import data
import polars as pl
from rounds import DATA, HERE, Contestant

from polars_llm.testing import Provider, provider

NAME = "llm-batch-py"
_WANTED = ("llm-batch-py==0.1.8", f"polars=={pl.__version__}")
_ENVIRONMENT = DATA / "venv"
_SCRIPT = str(HERE / "rival_llm_batch_py.py")


def warm(rows: int, runs: int, place: Path) -> list[Contestant]:
    """It, with everything answered; an empty list where it can't be installed."""
    python = _python()
    if python is None:
        return []
    source, cache = _input(rows, place), place / "cache"
    # Answers as long as ours.
    with provider(lambda asked: {"json": {"response": asked.prompt}}, set_env=False) as server:
        # The first run submits, the second one finds the batch ended and keeps its answers.
        for _ in range(2):
            subprocess.run(
                [python, _SCRIPT, "cold", str(source), str(cache)],
                env=dict(server.env),
                stdout=subprocess.DEVNULL,
                check=True,
            )

    def before() -> Mapping[str, str]:
        # Nothing listens there: being warm needs no provider.
        return {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": "http://127.0.0.1:9/v1"}

    command = [python, _SCRIPT, "warm", str(source), str(cache)]
    return [Contestant(name=NAME, rows=rows, command=command, runs=runs, before=before)]


def cold(rows: int, runs: int, place: Path, server: Provider) -> list[Contestant]:
    """It, with nothing asked before; an empty list where it can't be installed."""
    python = _python()
    if python is None:
        return []
    source, cache = _input(rows, place), place / "cache"

    def before() -> Mapping[str, str]:
        shutil.rmtree(cache, ignore_errors=True)
        return dict(server.env)

    command = [python, _SCRIPT, "cold", str(source), str(cache)]
    return [Contestant(name=NAME, rows=rows, command=command, runs=runs, before=before)]


def _input(rows: int, place: Path) -> Path:
    place.mkdir(parents=True)
    data.write_input(rows, place / "input.parquet")
    return place / "input.parquet"


def _python() -> str | None:
    """Its interpreter; the environment is made where there is none, or an older one."""
    stamp = _ENVIRONMENT / "wanted.txt"
    python = _ENVIRONMENT / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not stamp.exists() or stamp.read_text() != "\n".join(_WANTED):
        print(f"installing {NAME} into {_ENVIRONMENT} ...", file=sys.stderr)
        venv.create(_ENVIRONMENT, with_pip=True, clear=True)
        installed = subprocess.run([python, "-m", "pip", "install", "-q", *_WANTED], check=False)
        if installed.returncode:
            print(f"{NAME} cannot be installed here: it is left out.", file=sys.stderr)
            return None
        stamp.write_text("\n".join(_WANTED))
    return str(python)
