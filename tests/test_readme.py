"""Every python block of README and docs runs, in order, against the local provider."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from polars_llm import testing

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


def test_the_commands_are_there() -> None:
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "examples/quickstart.py" in commands[0]
    assert "pytest" in commands[1]
