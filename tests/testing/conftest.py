"""A running provider for each test, and the real SDKs pointed at it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import openai
import pytest

from polars_llm.testing import Provider, provider


@pytest.fixture(scope="session")
def running() -> Iterator[Provider]:
    with provider(set_env=False) as started:
        yield started


@pytest.fixture
def p(running: Provider, monkeypatch: pytest.MonkeyPatch) -> Provider:
    running.reset()
    for name, value in running.env.items():
        monkeypatch.setenv(name, value)
    return running


@pytest.fixture
def oai(p: Provider) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(max_retries=0) as client:
        yield client


@pytest.fixture
def ant(p: Provider) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(max_retries=0) as client:
        yield client


CHAT = "/v1/chat/completions"


def chat_line(custom_id: str, prompt: str, **body: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    full = {"model": "gpt-6-luna", "messages": [message], **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": full}


def jsonl(lines: list[Any]) -> bytes:
    return b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: openai.OpenAI, lines: list[Any]) -> str:
    file = ("in.jsonl", io.BytesIO(jsonl(lines)))
    return client.files.create(file=file, purpose="batch").id


def submit(client: openai.OpenAI, lines: list[Any], *, endpoint: Any = CHAT, **options: Any) -> Any:
    return client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", **options
    )


def chats(count: int) -> list[dict[str, Any]]:
    return [chat_line(f"r{i}", f"Prompt {i}. The sea is wide and blue.") for i in range(count)]


def rows(client: openai.OpenAI, file_id: str) -> list[dict[str, Any]]:
    """The lines of a result file, in its order."""
    data = client.files.content(file_id).content
    return [json.loads(line) for line in data.split(b"\n") if line.strip()]


def by_id(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line["custom_id"]: line for line in lines}


def ask(custom_id: str, prompt: str, **params: Any) -> dict[str, Any]:
    message = {"role": "user", "content": prompt}
    full = {"model": "claude-haiku-5-5", "max_tokens": 100, "messages": [message], **params}
    return {"custom_id": custom_id, "params": full}


def asks(count: int) -> list[dict[str, Any]]:
    return [ask(f"r{i}", f"Prompt {i}. The sea is wide and blue.") for i in range(count)]


def results(client: anthropic.Anthropic, batch_id: str) -> dict[str, Any]:
    return {line.custom_id: line.result for line in client.messages.batches.results(batch_id)}


def raises(kind: type[Exception]) -> Callable[[Callable[[], Any]], Any]:
    """Run a call that must fail, and give the error."""

    def run(call: Callable[[], Any]) -> Any:
        with pytest.raises(kind) as caught:
            call()
        return caught.value

    return run
