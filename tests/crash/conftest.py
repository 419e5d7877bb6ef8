"""What the crash suite did, in the summary at the end."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

_FIGURES: Counter[str] = Counter()


@pytest.fixture(scope="session")
def figures() -> Counter[str]:
    """Counts of what was done; each appears in the terminal's summary."""
    return _FIGURES


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line: cases, kills, faults."""
    if _FIGURES:
        said = ", ".join(f"{count:,} {name}" for name, count in sorted(_FIGURES.items()))
        terminalreporter.write_line(f"crash suite: {said}")
