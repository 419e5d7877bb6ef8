"""Every python block of README and docs runs, in order, against the local provider."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polars_llm import testing
from polars_llm.testing.faults import KINDS

ROOT = Path(__file__).parent.parent
PAGES = [
    p for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if "```python" in p.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, provider: testing.Provider, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(block, f"{page.name}, block {number + 1}", "exec", dont_inherit=True), names)


def test_the_tests_in_the_docs_pass(tmp_path: Path) -> None:
    """Blocks that define tests are a user's test file: the fixture comes with the installed package."""
    page = (ROOT / "docs" / "testing.md").read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def test_" in b]
    (tmp_path / "test_mine.py").write_text("\n\n".join(blocks))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_kinds_of_faults_in_the_docs_are_all() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ") and "`" in line]
    assert set(re.findall(r"`([\w-]+)`", "".join(table))) == KINDS.keys()


def test_the_commands_are_there() -> None:
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "examples/quickstart.py" in commands[0]
    assert "examples/local_model.py" in commands[1]
    assert "pytest" in commands[2]
