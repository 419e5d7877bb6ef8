"""The realtime backend alone: blocks, memory, what it does with odd replies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.answer import DONE, RETRY
from polars_llm.backends import realtime
from polars_llm.backends.base import is_batch
from polars_llm.backends.options import Options
from polars_llm.backends.realtime import Realtime
from polars_llm.backends.replies import REPLY_SCHEMA
from polars_llm.request import Requests

_ANSWERING = "chat.completions.create"


@pytest.fixture
def provider() -> Iterator[testing.Provider]:
    with testing.provider() as running:
        yield running


def requests(backend: Realtime, count: int, text: str = "[[say:yes]]") -> list[Requests]:
    frame = pl.DataFrame(
        {
            "key": [n.to_bytes(32) for n in range(count)],
            "attempt": [1] * count,
            "prompt": [f"{text} {n}" for n in range(count)],
            "kind": ["t"] * count,
            "system": [None] * count,
            "sample": [0] * count,
        },
        schema_overrides={"attempt": pl.UInt16, "system": pl.String},
    )
    return [Requests(backend.header(Options()), frame)]


def live(**options: Any) -> Realtime:
    made = pllm.OpenAI("gpt-6-luna").backend("realtime", **options)
    assert isinstance(made, Realtime)
    return made


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_no_batch_backend_and_has_one(provider: testing.Provider) -> None:
    backend = live()
    assert not is_batch(backend)
    assert backend.batch is not None
    assert is_batch(backend.batch)
    assert backend.header(Options()) == backend.batch.header(Options())
    assert "sk-" not in repr(backend)


def test_blocks_hold_every_reply_once(provider: testing.Provider) -> None:
    backend = live()
    blocks = list(backend.run(requests(backend, 600)))
    for block in blocks:
        assert block.schema == pl.Schema(REPLY_SCHEMA)
    replies = pl.concat(blocks)
    assert replies["key"].n_unique() == replies.height == 600
    assert replies["state"].unique().to_list() == [DONE]


def test_a_block_comes_after_a_second_even_if_nothing_arrived(provider: testing.Provider) -> None:
    provider.fault("hold", operation=_ANSWERING, seconds=3)
    backend = live()
    started = time.monotonic()
    first = next(run := backend.run(requests(backend, 1)))
    assert time.monotonic() - started > 0.8
    assert first.is_empty()
    assert sum(block.height for block in run) == 1


def test_no_more_are_asked_while_replies_wait_to_be_kept(
    provider: testing.Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realtime, "_BLOCK_REPLIES", 10)
    monkeypatch.setattr(realtime, "_MOST_WAITING", 40)
    backend = live(max_concurrency=8)
    run = backend.run(requests(backend, 400))
    taken = next(run).height
    time.sleep(1.0)  # a slow disk
    assert provider.bill().realtime <= taken + 40 + 2 * 8
    assert taken + sum(block.height for block in run) == 400


def test_closing_it_ends_what_is_in_flight(provider: testing.Provider) -> None:
    provider.fault("hold", operation=_ANSWERING, seconds=60, times=None)
    backend = live(max_concurrency=3)
    run = backend.run(requests(backend, 10))
    next(run)
    wait_until(lambda: provider.held(seconds=1) == 3)
    started = time.monotonic()
    run.close()
    assert time.monotonic() - started < 5
    provider.release()
    assert provider.bill().realtime <= 3


@pytest.mark.parametrize("kind", ["create-then-garbage", "create-then-drop", "create-then-500"])
def test_a_reply_that_cannot_be_read_may_pass(provider: testing.Provider, kind: str) -> None:
    provider.fault(kind, operation=_ANSWERING)
    backend = live()
    (block,) = [b for b in backend.run(requests(backend, 1)) if b.height]
    assert block["state"].to_list() == [RETRY]


def test_an_error_says_nothing_of_the_key(provider: testing.Provider) -> None:
    secret = "tok-5f0e9d8c7b6a"
    provider.fault("status", operation=_ANSWERING, status=400, message=f"bad: {secret}")
    backend = pllm.OpenAI("m", api_key=secret).backend("realtime")
    (block,) = [b for b in backend.run(requests(backend, 1)) if b.height]  # type: ignore[arg-type]
    assert block["error_message"].to_list() == ["bad: ***"]
    assert secret.encode() not in block["body"].item()


def test_the_note_says_what_it_waits_for(provider: testing.Provider) -> None:
    provider.fault("status", operation=_ANSWERING, status=429, retry_after=60)
    backend = live()
    run = backend.run(requests(backend, 1))
    next(run)
    wait_until(lambda: "the host takes no more for" in backend.note)
    run.close()
    assert backend.note == ""
