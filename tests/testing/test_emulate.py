"""The provider in a terminal, and the pytest fixture."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from .conftest import chats, submit

ROOT = Path(__file__).parents[2]


def test_it_says_where_it_is_and_ends_with_its_bill() -> None:
    command = [sys.executable, "-m", "polars_llm.testing", "--port", "0", "--batch-seconds", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as terminal:
        assert terminal.stdout is not None
        said = ""
        while "Ctrl+C" not in said:
            said += terminal.stdout.readline()
        exported = dict(
            line.removeprefix("export ").split("=", 1)
            for line in said.splitlines()
            if line.startswith("export ")
        )
        assert exported["OPENAI_BASE_URL"] in said.splitlines()[0]
        assert exported["ANTHROPIC_BASE_URL"] in said.splitlines()[1]
        with openai.OpenAI(api_key=exported["OPENAI_API_KEY"], base_url=exported["OPENAI_BASE_URL"]) as oai:
            submit(oai, chats(3))
        terminal.send_signal(signal.SIGINT)
        rest, _ = terminal.communicate(timeout=10)
    assert terminal.returncode == 0
    assert "3 requests billed (0 realtime) in 1 batches" in rest


FIXTURE_TEST = """
    import openai

    def test_the_fixture_points_the_sdk_at_the_provider(llm_provider):
        client = openai.OpenAI(max_retries=0)
        client.embeddings.create(model="m", input="x")
        client.close()
        assert llm_provider.bill().realtime == 1
"""


def test_the_pytest_fixture(tmp_path: Path) -> None:
    test = tmp_path / "test_user.py"
    test.write_text("\n".join(line[4:] for line in FIXTURE_TEST.splitlines()))
    plugin = "polars_llm.testing.pytest_plugin"
    command = [sys.executable, "-m", "pytest", "-q", "-p", plugin, str(test)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("module", ["polars_llm.testing.pytest_plugin"])
def test_the_plugin_starts_nothing_at_import(module: str) -> None:
    code = (
        f"import sys; before = set(sys.modules); import {module}; "
        "print([m for m in set(sys.modules) - before if m.startswith('polars_llm.testing.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"['{module}']"
