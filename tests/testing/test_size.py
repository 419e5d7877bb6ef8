"""Batches as big as they may get."""

from __future__ import annotations

import json
import time
from pathlib import Path

import anthropic
import openai

from polars_llm.testing import Provider

from .conftest import CHAT, asks, chats


def test_fifty_thousand_requests_take_seconds(p: Provider, oai: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in chats(50_000)))
    started = time.monotonic()
    with path.open("rb") as data:
        file = oai.files.create(file=("in.jsonl", data), purpose="batch")
    batch = oai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
    done = oai.batches.retrieve(batch.id)
    seconds = time.monotonic() - started
    assert done.output_file_id is not None
    output = oai.files.content(done.output_file_id).content
    assert output.count(b"\n") == 50_000
    bill = p.bill()
    assert (bill.billed, len(bill.by_custom_id), bill.duplicates) == (50_000, 50_000, {})
    # Two seconds on an idle machine.
    assert seconds < 15


def test_twenty_thousand_messages_take_seconds(p: Provider, ant: anthropic.Anthropic) -> None:
    started = time.monotonic()
    requests = asks(20_000)
    batch = ant.messages.batches.create(requests=requests)  # type: ignore[arg-type]
    counts = ant.messages.batches.retrieve(batch.id).request_counts
    assert counts.succeeded == 20_000
    assert p.bill().billed == 20_000
    assert time.monotonic() - started < 15


def test_a_big_upload_is_not_held_in_memory(p: Provider, oai: openai.OpenAI, tmp_path: Path) -> None:
    status = Path(f"/proc/{p.pid}/status")
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(190_000_000)
    with path.open("rb") as data:
        assert oai.files.create(file=("big", data), purpose="batch").bytes == 190_000_000
    if status.exists():
        facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        # Without the pages of the file, which are mapped and not the process's own.
        assert int(facts["RssAnon"].split()[0]) < 80_000
