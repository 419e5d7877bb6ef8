"""The Responses wire form, without a network."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.answer import ACCOUNT, DONE, FAILED, RETRY
from polars_llm.backends.options import Options
from polars_llm.backends.wire import responses
from polars_llm.errors import InvalidRequest
from polars_llm.request import RequestHeader, Requests, canonical, conversation

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
SCHEMA = {
    "key": pl.Binary,
    "prompt": pl.String,
    "kind": pl.String,
    "system": pl.String,
    "sample": pl.Int64,
}


def sent(
    *rows: tuple[str, str, str | None], options: Options | None = None, schema: str | None = None
) -> list[Any]:
    header = RequestHeader(
        provider="openai",
        base_url=None,
        endpoint=responses.ENDPOINT,
        model="m",
        body=responses.body(options or Options()),
        schema=schema,
    )
    frame = pl.DataFrame(
        [(bytes(32), prompt, kind, system, 0) for kind, prompt, system in rows], schema=SCHEMA, orient="row"
    )
    lines = [json.loads(line) for line in responses.render(Requests(header, frame))]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/responses")}
    return [line["body"] for line in lines]


def said(*parts: Any, status: str = "completed", **more: Any) -> dict[str, Any]:
    message = {"type": "message", "role": "assistant", "content": list(parts)}
    output = [{"type": "reasoning", "summary": []}, *([message] if parts else [])]
    return {"object": "response", "model": "m-2026", "status": status, "output": output, **more}


def text(words: str) -> dict[str, Any]:
    return {"type": "output_text", "text": words, "annotations": []}


def read(body: Any, status: int = 200) -> dict[str, Any]:
    return responses.read_reply(status, json.dumps(body).encode())


def test_a_prompt_is_the_input_and_nothing_is_kept_there() -> None:
    assert sent(("t", "hi", None), ("t", "hi", "Be brief.")) == [
        {"model": "m", "input": "hi", "store": False},
        {"model": "m", "input": "hi", "instructions": "Be brief.", "store": False},
    ]


def test_a_conversation_is_the_input() -> None:
    kind, system, prompt = conversation(["system", "user", "assistant", "user"], ["s", "a", "b", "c"])
    (body,) = sent((kind, prompt, system))
    assert body["instructions"] == "s"
    assert [(m["role"], m["content"]) for m in body["input"]] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
    ]


@given(prompt=TEXT, system=st.none() | TEXT)
def test_any_text_arrives_as_it_is(prompt: str, system: str | None) -> None:
    (body,) = sent(("t", prompt, system))
    assert (body["input"], body.get("instructions")) == (prompt, system)


def test_options_have_the_names_of_this_api() -> None:
    options = Options(
        max_tokens=64,
        top_p=0.5,
        reasoning_effort="low",
        params={"reasoning": {"summary": "auto"}, "service_tier": "flex", "store": True},
    )
    assert responses.body(options) == {
        "max_output_tokens": 64,
        "top_p": 0.5,
        "reasoning": {"effort": "low", "summary": "auto"},
        "service_tier": "flex",
        "store": True,
    }
    assert responses.body(Options(params={"reasoning": {"effort": "high"}}))["reasoning"] == {
        "effort": "high"
    }
    assert canonical(responses.body(options)) == responses.body(options)


def test_a_schema_goes_beside_what_is_in_text_already() -> None:
    schema = '{"type":"object","properties":{"b":{},"a":{}}}'
    format_ = {"type": "json_schema", "name": "answer", "strict": True, "schema": json.loads(schema)}
    (body,) = sent(("t", "hi", None), schema=schema)
    assert body["text"] == {"format": format_}
    assert list(body["text"]["format"]["schema"]["properties"]) == ["b", "a"]
    loud = Options(max_tokens=20, params={"text": {"verbosity": "low"}})
    (body,) = sent(("t", "hi", None), options=loud, schema=schema)
    assert body["text"] == {"verbosity": "low", "format": format_}
    assert (body["max_output_tokens"], body["store"]) == (20, False)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (Options(stop="x"), "stop"),
        (Options(schema="{}", params={"text": {"format": {}}}), "schema"),
        (Options(seed=1), "seed"),
        (Options(max_tokens=15), "max_tokens"),
        (Options(params={"input": "x"}), "input"),
        (Options(params={"instructions": "x"}), "instructions"),
        (Options(params={"background": True}), "background"),
        (Options(top_p=1, params={"top_p": 1}), "top_p"),
        (Options(reasoning_effort="low", params={"reasoning": {"effort": "low"}}), "reasoning_effort"),
        (Options(reasoning_effort="low", params={"reasoning": "low"}), "reasoning_effort"),
    ],
)
def test_what_cannot_be_sent_is_refused_at_call(options: Options, named: str) -> None:
    with pytest.raises(InvalidRequest, match=named) as error:
        responses.body(options)
    assert "Nothing was sent" in str(error.value)


def test_an_answer() -> None:
    usage = {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 3},
        "output_tokens": 4,
    }
    answer = read(said(text("To"), text("kyo."), usage=usage))
    assert {k: v for k, v in answer.items() if k != "body"} == {
        "state": DONE,
        "text": "Tokyo.",
        "error_message": None,
        "finish_reason": "stop",
        "input_tokens": 9,
        "cached_input_tokens": 2,
        "service_tier": None,
        "cache_write_tokens": 3,
        "output_tokens": 4,
        "model": "m-2026",
    }


@pytest.mark.parametrize(
    ("body", "reason", "words"),
    [
        (
            said(text("To"), status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            "length",
            "To",
        ),
        (said(status="incomplete", incomplete_details={"reason": "max_output_tokens"}), "length", None),
        (
            said(status="incomplete", incomplete_details={"reason": "content_filter"}),
            "content_filter",
            None,
        ),
        (said(text("x"), status="incomplete", incomplete_details=None), "incomplete", "x"),
        (said({"type": "refusal", "refusal": "No."}), "refusal", None),
        ({**said(), "output": [{"type": "function_call", "name": "f"}]}, "tool_calls", None),
    ],
)
def test_how_an_answer_ended(body: Any, reason: str, words: str | None) -> None:
    answer = read(body)
    assert (answer["state"], answer["finish_reason"], answer["text"]) == (DONE, reason, words)


def test_a_refusal_is_readable() -> None:
    assert read(said({"type": "refusal", "refusal": "No."}))["error_message"] == "No."


def test_failures() -> None:
    failed = read(said(status="failed", error={"code": "server_error", "message": "sorry"}))
    assert (failed["state"], failed["error"], failed["error_message"]) == (RETRY, "server_error", "sorry")
    bad = read({"error": {"code": "invalid_prompt", "message": "no"}}, 400)
    assert (bad["state"], bad["error"]) == (FAILED, "invalid_prompt")
    assert read({"error": {"code": "invalid_api_key", "message": "no"}}, 401)["state"] == ACCOUNT


@given(body=st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"null", b'{"output":[1]}']))
def test_no_reply_makes_a_traceback(body: bytes) -> None:
    answer = responses.read_reply(200, body)
    assert (answer["state"], answer["error"]) == (FAILED, "unreadable_reply")
