"""Realtime requests: answers, markers, rate limits, latency."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from polars_llm.testing import Provider, provider

from .conftest import raises

PROMPT = "What is it? The sea is wide and blue. Yes."


def chat(client: openai.OpenAI, prompt: str, **body: Any) -> Any:
    message: Any = {"role": "user", "content": prompt}
    return client.chat.completions.create(model="gpt-6-luna", messages=[message], **body)


def respond(client: openai.OpenAI, prompt: str, **body: Any) -> Any:
    return client.responses.create(model="gpt-6-luna", input=prompt, **body)


def say(client: anthropic.Anthropic, prompt: str, **body: Any) -> Any:
    message: Any = {"role": "user", "content": prompt}
    full = {"model": "claude-haiku-5-5", "max_tokens": 100, "messages": [message], **body}
    return client.messages.create(**full)


def test_all_three_endpoints_answer_and_bill(
    p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic
) -> None:
    assert chat(oai, PROMPT).choices[0].message.content == "The sea is wide and blue."
    assert respond(oai, PROMPT).output_text == "The sea is wide and blue."
    message = say(ant, PROMPT)
    assert message.content[0].text == "The sea is wide and blue."
    bill = p.bill()
    assert (bill.billed, bill.realtime, bill.by_custom_id) == (3, 3, {})
    tokens = -(-len(PROMPT) // 4)
    assert message.usage.input_tokens == tokens
    assert bill.input_tokens == 3 * tokens
    assert bill.cost_usd == pytest.approx(bill.input_tokens * 1e-6 + bill.output_tokens * 4e-6)


def test_the_same_body_counts_twice_in_the_bill(p: Provider, oai: openai.OpenAI) -> None:
    chat(oai, PROMPT)
    chat(oai, PROMPT)
    assert list(p.bill().duplicate_bodies.values()) == [2]
    assert not p.bill().duplicates


def test_one_sentence_is_not_echoed(oai: openai.OpenAI) -> None:
    answer = chat(oai, "Kangaroos jump over enormous distances.").choices[0].message.content
    assert answer == "In short: kangaroos, jump, enormous, distances."


def test_an_instruction_before_the_text_is_left_out(oai: openai.OpenAI) -> None:
    answer = chat(oai, "Summarise this: The battery died.").choices[0].message.content
    assert answer == "The battery died."


def test_conversations_with_parts_are_understood(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    parts: list[Any] = [
        {"type": "text", "text": "Look. The sea is wide and blue."},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
    ]
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": parts},
    ]
    answer = oai.chat.completions.create(model="m", messages=messages)
    assert answer.choices[0].message.content == "The sea is wide and blue."
    assert answer.usage is not None
    assert answer.usage.prompt_tokens > 85
    blocks: list[Any] = [{"type": "text", "text": "Look. The sea is wide and blue."}]
    message = ant.messages.create(
        model="m", max_tokens=50, messages=[{"role": "user", "content": blocks}], system="Be brief."
    )
    assert message.content[0].type == "text"
    assert message.content[0].text == "The sea is wide and blue."


def test_limits_cut_the_answer(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    choice = chat(oai, "[[say:one two three four five]]", max_completion_tokens=2).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("one two ", "length")
    message = say(ant, "[[say:one two three four five]]", max_tokens=2)
    assert (message.content[0].text, message.stop_reason) == ("one two ", "max_tokens")
    answer = respond(oai, f"[[say:{'word ' * 30}]]", max_output_tokens=16)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert chat(oai, PROMPT, max_completion_tokens=5).choices[0].message.content == "The sea is wide…"


def test_stop_sequences_cut_the_answer(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    choice = chat(oai, "[[say:one two three]]", stop=[" th", "w"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("one t", "stop")
    message = say(ant, "[[say:one two three]]", stop_sequences=["zero", " two"])
    assert (message.content[0].text, message.stop_reason) == ("one", "stop_sequence")
    assert message.stop_sequence == " two"


@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 503])
def test_a_marker_fails_the_request(
    p: Provider, oai: openai.OpenAI, ant: anthropic.Anthropic, status: int
) -> None:
    error = raises(openai.APIStatusError)(lambda: chat(oai, f"[[fail:{status}]]"))
    assert (error.status_code, error.request_id[:4]) == (status, "req_")
    error = raises(anthropic.APIStatusError)(lambda: say(ant, f"[[fail:{status}]]"))
    assert (error.status_code, error.request_id[:4]) == (status, "req_")
    assert p.bill().billed == 0


def test_a_marker_fails_the_request_for_a_while(p: Provider, oai: openai.OpenAI) -> None:
    for _ in range(2):
        raises(openai.InternalServerError)(lambda: chat(oai, "Hello. [[fail:500:2]]"))
    assert chat(oai, "Hello. [[fail:500:2]]").choices[0].message.content
    assert p.bill().billed == 1


def test_markers_for_how_an_answer_ends(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    refusal = chat(oai, "[[refuse]]").choices[0].message
    assert (refusal.content, refusal.refusal) == (None, "I can't help with that.")
    assert respond(oai, "[[refuse]]").output[-1].content[0].type == "refusal"
    assert say(ant, "[[refuse]]").stop_reason == "refusal"
    assert chat(oai, "[[content_filter]]").choices[0].finish_reason == "content_filter"
    filtered = respond(oai, "[[content_filter]]")
    assert filtered.incomplete_details.reason == "content_filter"
    assert chat(oai, f"[[length]] {PROMPT}").choices[0].finish_reason == "length"
    assert chat(oai, "[[empty]]").choices[0].message.content == ""
    assert say(ant, "[[empty]]").content == []
    assert raises(openai.InternalServerError)(lambda: chat(oai, "[[expire]]")).status_code == 504


def test_tool_calls(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    call = chat(oai, "Weather in Paris [[tool]]").choices[0]
    assert call.finish_reason == "tool_calls"
    assert call.message.tool_calls[0].function.name == "lookup"
    assert "Paris" in call.message.tool_calls[0].function.arguments
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"name": "count", "input_schema": schema}
    message = say(ant, "I have 7 apples.", tools=[tool], tool_choice={"type": "any"})
    assert message.stop_reason == "tool_use"
    assert message.content[-1].input == {"n": 7}
    function: Any = {"type": "function", "name": "count", "parameters": schema}
    answer = respond(oai, "I have 7 apples.", tools=[function], tool_choice="required")
    assert answer.output[-1].arguments == '{"n":7}'


def test_thinking_comes_before_the_text(ant: anthropic.Anthropic) -> None:
    message = say(ant, PROMPT, thinking={"type": "adaptive"})
    assert [block.type for block in message.content] == ["thinking", "text"]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 10},
        {"temperature": 3},
        {"stream": True},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    ],
)
def test_what_openai_refuses(oai: openai.OpenAI, body: dict[str, Any]) -> None:
    raises(openai.BadRequestError)(lambda: chat(oai, "Hello.", **body))


def test_sampling_is_refused_where_the_model_refuses_it(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    assert chat(oai, PROMPT, temperature=0.2)
    message: Any = {"role": "user", "content": "Hello."}
    error = raises(openai.BadRequestError)(
        lambda: oai.chat.completions.create(model="gpt-6.2-sol", messages=[message], temperature=0.2)
    )
    assert error.code == "unsupported_value"
    error = raises(anthropic.BadRequestError)(lambda: say(ant, "Hello.", extra_body={"temperature": 1}))
    assert "temperature" in str(error)
    old = {"anthropic-version": "2023-06-01"}
    assert say(ant, "Hello.", extra_body={"temperature": 1}, extra_headers=old)


def test_prefill_is_refused(ant: anthropic.Anthropic) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "{"},
    ]
    error = raises(anthropic.BadRequestError)(
        lambda: ant.messages.create(model="m", max_tokens=5, messages=messages)
    )
    assert "prefill" in str(error)


def test_unknown_models_and_paths_are_not_found() -> None:
    with (
        provider(models=["known"]),
        openai.OpenAI(max_retries=0) as oai,
        anthropic.Anthropic(max_retries=0) as ant,
    ):
        error = raises(openai.NotFoundError)(lambda: chat(oai, "Hello."))
        assert error.code == "model_not_found"
        assert raises(anthropic.NotFoundError)(lambda: say(ant, "Hello.")).type == "not_found_error"
        raises(openai.NotFoundError)(lambda: oai.get("/nothing", cast_to=object))


def test_tokens_can_be_counted_before(ant: anthropic.Anthropic, oai: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "12345678"}]
    assert ant.messages.count_tokens(model="m", messages=messages).input_tokens == 2
    assert oai.responses.input_tokens.count(model="m", input="12345678").input_tokens == 2


# ---- embeddings


def test_embeddings_are_unit_vectors_in_either_encoding(p: Provider, oai: openai.OpenAI) -> None:
    texts = ["the red car", "a red car", "stocks fell sharply"]
    plain = oai.embeddings.create(model="text-embedding-3-small", input=texts, encoding_format="float")
    packed = oai.embeddings.create(model="text-embedding-3-small", input=texts)
    one = np.array([e.embedding for e in plain.data], dtype=np.float32)
    assert one.shape == (3, 1536)
    assert (one == np.array([e.embedding for e in packed.data], dtype=np.float32)).all()
    assert np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5)
    assert one[0] @ one[1] > 0.5 > one[0] @ one[2]
    assert list(p.bill().duplicate_bodies) == []


def test_embedding_dimensions(oai: openai.OpenAI) -> None:
    def size(model: str, **body: Any) -> int:
        return len(oai.embeddings.create(model=model, input="x", **body).data[0].embedding)

    assert size("text-embedding-3-large") == 3072
    assert size("text-embedding-3-small", dimensions=7) == 7
    refused = raises(openai.BadRequestError)
    refused(lambda: size("text-embedding-3-small", dimensions=1537))
    refused(lambda: size("text-embedding-ada-002", dimensions=7))
    refused(lambda: oai.embeddings.create(model="m", input=""))
    refused(lambda: oai.embeddings.create(model="m", input=["x"] * 2049))


@given(text=st.text(min_size=1, max_size=200), size=st.integers(1, 64))
@settings(max_examples=50, deadline=None)
def test_any_text_has_an_embedding(text: str, size: int) -> None:
    from polars_llm.testing.model import embedding

    vector = embedding(text, size)
    assert vector == embedding(text, size)
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-4)


# ---- any text at all


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=5))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_prompt_is_answered(oai: openai.OpenAI, texts: list[str]) -> None:
    for text in texts:
        said = text.replace("[[", "")
        answer = chat(oai, said)
        assert answer.choices[0].message.content
        assert answer.usage.prompt_tokens == -(-len(said.encode()) // 4)


# ---- limits and time


def test_rate_headers_tell_what_is_left(oai: openai.OpenAI, ant: anthropic.Anthropic) -> None:
    headers = oai.chat.completions.with_raw_response.create(
        model="m", messages=[{"role": "user", "content": "Hello."}]
    ).headers
    assert headers["x-ratelimit-limit-requests"] == "10000"
    assert headers["x-ratelimit-remaining-requests"] == "9999"
    assert headers["x-ratelimit-reset-tokens"].endswith("s")
    headers = ant.messages.with_raw_response.create(
        model="m", max_tokens=5, messages=[{"role": "user", "content": "Hello."}]
    ).headers
    assert headers["anthropic-ratelimit-requests-remaining"] == "9999"
    assert headers["anthropic-ratelimit-input-tokens-reset"].endswith("Z")


def test_too_many_requests_are_told_to_wait() -> None:
    with (
        provider(rpm=3) as p,
        openai.OpenAI(max_retries=0) as oai,
        anthropic.Anthropic(max_retries=0) as ant,
    ):
        for _ in range(3):
            chat(oai, PROMPT)
            say(ant, PROMPT)
        error = raises(openai.RateLimitError)(lambda: chat(oai, PROMPT))
        assert error.code == "rate_limit_exceeded"
        assert 0 < int(error.response.headers["retry-after"]) <= 21
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
        error = raises(anthropic.RateLimitError)(lambda: say(ant, PROMPT))
        assert error.type == "rate_limit_error"
        assert p.bill().billed == 6


def test_too_many_tokens_are_told_to_wait() -> None:
    with provider(tpm=600) as p, openai.OpenAI(max_retries=0) as oai:
        chat(oai, "x" * 2_400)
        error = raises(openai.RateLimitError)(lambda: chat(oai, "x" * 400))
        assert error.type == "tokens"
        assert p.bill().billed == 1


def test_latency_is_per_request_and_many_wait_at_once() -> None:
    with provider(latency=0.2) as p, openai.OpenAI(max_retries=0) as oai:
        with ThreadPoolExecutor(100) as pool:
            started = time.monotonic()
            list(pool.map(lambda i: chat(oai, f"{PROMPT} {i}"), range(100)))
            seconds = time.monotonic() - started
        # One after the other they would take twenty seconds.
        assert 0.2 <= seconds < 8
        assert p.bill().realtime == 100
