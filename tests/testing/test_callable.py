"""A model that is a callable in the test's own process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from polars_llm.testing import ModelRequest, Provider, provider

from .conftest import ask, by_id, chat_line, chats, raises, results, rows, submit


def chat(client: openai.OpenAI, prompt: str, **body: Any) -> Any:
    message: Any = {"role": "user", "content": prompt}
    return client.chat.completions.create(model="gpt-6-luna", messages=[message], **body)


def test_a_closure_answers_here_and_sees_the_request() -> None:
    seen: list[ModelRequest] = []

    def model(request: ModelRequest) -> str:
        seen.append(request)
        return f"{os.getpid()} {request.prompt.upper()}"

    with provider(model) as p, openai.OpenAI(max_retries=0) as oai:
        answer = chat(oai, "hello", temperature=0.5).choices[0].message.content
        done = oai.batches.retrieve(submit(oai, [chat_line("a", "bye")]).id)
        assert done.output_file_id is not None
        assert p.bill().billed == 2
    assert answer == f"{os.getpid()} HELLO"
    first, second = seen
    assert (first.mode, first.endpoint, first.custom_id) == (
        "realtime",
        "/v1/chat/completions",
        None,
    )
    assert (first.model, first.body["temperature"]) == ("gpt-6-luna", 0.5)
    assert (second.mode, second.custom_id, second.prompt) == ("batch", "a", "bye")


def test_it_answers_both_protocols_and_every_endpoint() -> None:
    def model(request: ModelRequest) -> Any:
        if request.endpoint == "/v1/embeddings":
            return [[float(len(text)), 0.0] for text in request.inputs]
        return f"{request.system}|{request.prompt}"

    with (
        provider(model),
        openai.OpenAI(max_retries=0) as oai,
        anthropic.Anthropic(max_retries=0) as ant,
    ):
        request: Any = ask("a", "hi", system="be brief")
        batch = ant.messages.batches.create(requests=[request])
        ant.messages.batches.retrieve(batch.id)
        assert results(ant, batch.id)["a"].message.content[0].text == "be brief|hi"
        response = oai.responses.create(model="m", input="hi", instructions="be brief")
        assert response.output_text == "be brief|hi"
        vectors = oai.embeddings.create(model="m", input=["a", "bcd"])
        assert [item.embedding for item in vectors.data] == [[1.0, 0.0], [3.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "content", "finish"),
    [
        ("text", "text", "stop"),
        (["one ", "two"], "one two", "stop"),
        ({"parts": ["one ", "two"]}, "one two", "stop"),
        ({"json": {"a": 1}}, '{"a":1}', "stop"),
        ({"text": "cut", "finish_reason": "length"}, "cut", "length"),
        ({"refusal": "no"}, None, "stop"),
    ],
)
def test_what_it_may_return(value: Any, content: str | None, finish: str) -> None:
    with provider(lambda _: value), openai.OpenAI(max_retries=0) as oai:
        choice = chat(oai, "hello").choices[0]
        assert (choice.message.content, choice.finish_reason) == (content, finish)


def test_it_may_state_its_usage_and_call_tools() -> None:
    usage = {"input_tokens": 1_000, "output_tokens": 50, "cached_input_tokens": 400}
    reply = {"tool_calls": [{"name": "go", "arguments": {"x": 1}}], "usage": usage}
    with provider(lambda _: reply) as p, openai.OpenAI(max_retries=0) as oai:
        answer = chat(oai, "hello")
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"x":1}'
        assert answer.usage.prompt_tokens_details.cached_tokens == 400
        assert (p.bill().input_tokens, p.bill().output_tokens) == (1_000, 50)


def test_it_may_fail_requests() -> None:
    def model(request: ModelRequest) -> Any:
        return {"error": 400} if "1" in request.prompt else "fine"

    with provider(model) as p, openai.OpenAI(max_retries=0) as oai:
        done = oai.batches.retrieve(submit(oai, chats(3)).id)
        assert done.error_file_id is not None
        assert by_id(rows(oai, done.error_file_id)).keys() == {"r1"}
        assert p.bill().billed == 2
        error = {"error": {"status": 429, "message": "no more", "code": "insufficient_quota"}}
    with provider(lambda _: error), openai.OpenAI(max_retries=0) as oai:
        caught = raises(openai.RateLimitError)(lambda: chat(oai, "hello"))
        assert caught.code == "insufficient_quota"


def test_the_token_limit_holds_for_it_too() -> None:
    with provider(lambda _: "x" * 100), openai.OpenAI(max_retries=0) as oai:
        choice = chat(oai, "hello", max_completion_tokens=3).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("x" * 12, "length")


def test_markers_come_before_it() -> None:
    with provider(lambda _: "said"), openai.OpenAI(max_retries=0) as oai:
        raises(openai.BadRequestError)(lambda: chat(oai, "[[fail:400]]"))


@pytest.mark.parametrize("value", [None, 7, {"txt": "x"}, {"finish_reason": "whim"}, "\ud83d"])
def test_what_it_must_not_return(value: Any) -> None:
    with openai.OpenAI(api_key="k", base_url="http://x", max_retries=0) as oai:
        p = provider(lambda _: value)
        with pytest.raises((TypeError, ValueError)), p:
            client = oai.with_options(base_url=p.openai_base_url)
            raises(openai.InternalServerError)(lambda: chat(client, "hello"))


def test_what_it_raises_fails_the_request_and_is_raised_again_at_the_end() -> None:
    def model(request: ModelRequest) -> str:
        raise KeyError(request.prompt)

    with pytest.raises(KeyError, match="hello"), provider(model) as p:
        with openai.OpenAI(max_retries=0) as oai:
            error = raises(openai.InternalServerError)(lambda: chat(oai, "hello"))
            assert "KeyError" in str(error)
            assert p.bill().billed == 0


@pytest.mark.parametrize("leave", [lambda: pytest.fail("asked"), lambda: sys.exit("asked")])
def test_what_is_no_exception_does_not_keep_anybody_waiting(leave: Callable[[], None]) -> None:
    def model(request: ModelRequest) -> str:
        leave()
        return "never"

    with pytest.raises((pytest.fail.Exception, SystemExit), match="asked"), provider(model) as p:
        with openai.OpenAI(max_retries=0, timeout=20) as oai:
            raises(openai.InternalServerError)(lambda: chat(oai, "hello"))
            raises(openai.InternalServerError)(lambda: chat(oai, "and again"))
            assert p.bill().billed == 0


def test_ten_thousand_requests_are_no_ten_thousand_journeys() -> None:
    with provider(lambda r: r.prompt[:5]) as p, openai.OpenAI(max_retries=0) as oai:
        started = time.monotonic()
        oai.batches.retrieve(submit(oai, chats(10_000)).id)
        assert time.monotonic() - started < 10
        assert p.bill().billed == 10_000


SCRIPT = """
    import os, signal
    from polars_llm.testing import provider
    p = provider(lambda r: os.kill(os.getpid(), signal.SIGKILL), set_env=False, detached=True)
    print(p.start().url, flush=True)
    signal.pause()
"""


def test_requests_fail_when_the_process_of_the_callable_is_gone() -> None:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as owner:
        assert owner.stdout is not None
        p = Provider.attach(owner.stdout.readline().strip())
        with openai.OpenAI(api_key="k", base_url=p.openai_base_url, max_retries=0) as oai:
            error = raises(openai.InternalServerError)(lambda: chat(oai, "hello"))
            assert "gone" in str(error)
            owner.wait(10)
            done = oai.batches.retrieve(submit(oai, chats(3)).id)
            assert done.request_counts is not None
            assert done.request_counts.failed == 3
            assert p.bill().billed == 0
        p.stop()
        assert p.wait_until_gone()
