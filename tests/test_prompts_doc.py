"""The tables in docs/prompts.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from polars_llm.backends.wire.embeddings import WIDTHS
from polars_llm.frame.conversations import ROLES
from polars_llm.images import LIMITS

TEXT = (Path(__file__).parents[1] / "docs" / "prompts.md").read_text(encoding="utf-8")


def test_lengths_of_vectors() -> None:
    rows = dict(re.findall(r"^\| (text-embedding\S+) \| ([\d,]+)", TEXT, re.MULTILINE))
    assert {name: int(n.replace(",", "")) for name, n in rows.items()} == WIDTHS


def test_limits_of_images() -> None:
    rows = dict(re.findall(r"^\| (OpenAI|Anthropic) \| ([\d,]+)", TEXT, re.MULTILINE))
    counts = {name.lower(): int(n.replace(",", "")) for name, n in rows.items()}
    assert counts == {name: limits.count for name, limits in LIMITS.items()}
    size = LIMITS["anthropic"].size_bytes
    assert size is not None
    assert f"{size // 1024**2} MB in base64" in TEXT


def test_roles() -> None:
    said = TEXT.partition("roles are ")[2].partition(":\n")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(ROLES)
