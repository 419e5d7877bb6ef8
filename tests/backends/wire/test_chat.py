"""The Chat Completions wire form: bodies that carry what was set, and replies however they come."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polars_llm as pllm
from polars_llm.answer import ACCOUNT, DONE, FAILED, RETRY
from polars_llm.backends.options import Options
from polars_llm.backends.wire import chat, lines
from polars_llm.errors import InvalidRequest
from polars_llm.request import RequestHeader, Requests, custom_id, key_hex
from polars_llm.schema import freeze

KEY = bytes(range(32))
ID = custom_id(KEY)
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


def requests(rows: list[dict[str, Any]], **options: Any) -> Requests:
    header = RequestHeader(
        provider="openai",
        base_url=None,
        endpoint=chat.ENDPOINT,
        model="m",
        body=chat.body(Options(**options)),
    )
    schema = {
        "key": pl.Binary,
        "prompt": pl.String,
        "kind": pl.String,
        "system": pl.String,
        "sample": pl.Int64,
    }
    return Requests(header, pl.DataFrame(rows, schema=schema))


def row(prompt: str, system: str | None = None, sample: int = 0, kind: str = "t") -> dict[str, Any]:
    return {"key": KEY, "prompt": prompt, "kind": kind, "system": system, "sample": sample}


def test_nothing_that_was_not_set_is_sent() -> None:
    (line,) = chat.render(requests([row("hi")]))
    assert json.loads(line) == {
        "custom_id": ID,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "hi"}]},
    }


def test_options_have_the_endpoints_names() -> None:
    options = {
        "max_tokens": 5,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ["a"],
        "seed": 7,
        "reasoning_effort": "low",
        "params": {"service_tier": "flex"},
    }
    (line,) = chat.render(requests([row("hi")], **options))
    assert json.loads(line)["body"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_completion_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "stop": ["a"],
        "seed": 7,
        "reasoning_effort": "low",
        "service_tier": "flex",
    }
    assert b'"temperature":0,' in line  # 0.0 and 0 are one request: they must be the same bytes


@pytest.mark.parametrize("params", [{"model": "x"}, {"messages": []}, {"stream": True}, {"n": 2}])
def test_fields_of_the_verb_cannot_be_set_twice(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        chat.body(Options(params=params))
    with pytest.raises(InvalidRequest):
        chat.body(Options(temperature=1.0, params={"temperature": 1.0}))


@given(rows=st.lists(st.tuples(TEXT, st.none() | TEXT, st.integers(0, 9)), max_size=5))
def test_lines_are_json_and_say_what_the_row_says(rows: list[tuple[str, str | None, int]]) -> None:
    lines = list(chat.render(requests([row(p, s, n) for p, s, n in rows], seed=3)))
    assert len(lines) == len(rows)
    for line, (prompt, system, sample) in zip(lines, rows, strict=True):
        assert b"\n" not in line
        body = json.loads(line)["body"]
        expected = [{"role": "user", "content": prompt}]
        if system is not None:
            expected.insert(0, {"role": "system", "content": system})
        assert body["messages"] == expected
        assert body["seed"] == 3 + sample  # with a seed, another sample is another seed


def test_whole_conversations_go_as_they_are() -> None:
    talk = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    plain, led = chat.render(
        requests([row(json.dumps(talk), kind="m"), row(json.dumps(talk), "s", kind="m")])
    )
    assert json.loads(plain)["body"]["messages"] == talk
    assert json.loads(led)["body"]["messages"] == [{"role": "system", "content": "s"}, *talk]


SCHEMA = freeze({"b": Annotated[str, msgspec.Meta(min_length=2)], "a": int | None}).json


def with_schema(model: pllm.OpenAI, **options: Any) -> Requests:
    header = model.backend().header(Options(schema=SCHEMA, **options))
    return Requests(header, requests([row("hi")]).frame)


def test_a_schema_goes_as_strict_response_format_in_its_own_order() -> None:
    (line,) = chat.render(with_schema(pllm.OpenAI("m", api_key="k"), temperature=0.5))
    assert line.decode() == (
        '{"custom_id":"' + ID + '","method":"POST","url":"/v1/chat/completions","body":{"model":"m",'
        '"messages":[{"role":"user","content":"hi"}],"temperature":0.5,'
        '"response_format":{"type":"json_schema","json_schema":{"name":"answer","strict":true,"schema":'
        '{"type":"object","properties":{"b":{"description":"(minLength 2)","type":"string"},'
        '"a":{"anyOf":[{"type":"integer"},{"type":"null"}]}},"required":["b","a"],'
        '"additionalProperties":false}}}}}'
    )


def test_a_schema_and_nothing_else() -> None:
    (line,) = chat.render(with_schema(pllm.OpenAI("m", api_key="k")))
    assert list(json.loads(line)["body"]) == ["model", "messages", "response_format"]


def test_a_schema_is_part_of_the_key() -> None:
    header = with_schema(pllm.OpenAI("m", api_key="k")).header
    key = pl.DataFrame({"p": ["hi"]}).select(key_hex(header.digest(), pl.col("p"))).item()
    assert key == "796492ca633c959e9a6ddd1b1a68cf98cd9768d0546c330f8fddd97dc54c1beb"


def test_a_schema_and_a_response_format_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="response_format"):
        chat.body(Options(schema=SCHEMA, params={"response_format": {"type": "json_object"}}))


# --- replies ------------------------------------------------------------------------------------


def completion(**message: Any) -> dict[str, Any]:
    reason = message.pop("finish_reason", "stop")
    return {
        "id": "c",
        "object": "chat.completion",
        "model": "m-2026",
        "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 2}},
    }


def line(body: Any, status: int = 200, **more: Any) -> bytes:
    response = {"status_code": status, "request_id": "r", "body": body}
    return json.dumps({"id": "b", "custom_id": ID, "response": response, "error": None, **more}).encode()


def only(raw: bytes) -> dict[str, Any]:
    return lines.parse([raw], chat.read_reply).row(0, named=True)


def test_an_answer() -> None:
    answer = only(line(completion(content="Hello")))
    body = answer.pop("body")
    assert json.loads(body)["id"] == "c"
    assert answer == {
        "key": KEY,
        "state": DONE,
        "text": "Hello",
        "error": None,
        "error_message": None,
        "finish_reason": "stop",
        "input_tokens": 9,
        "cached_input_tokens": 2,
        "cache_write_1h_tokens": None,
        "service_tier": None,
        "inference_geo": None,
        "cache_write_tokens": None,
        "output_tokens": 4,
        "model": "m-2026",
        "vector": None,
    }


@pytest.mark.parametrize(
    ("message", "text", "reason"),
    [
        ({"content": None, "refusal": "I won't."}, None, "refusal"),
        ({"content": "", "finish_reason": "content_filter"}, "", "content_filter"),
        ({"content": None, "tool_calls": [{}], "finish_reason": "tool_calls"}, None, "tool_calls"),
        ({"content": "cut o", "finish_reason": "length"}, "cut o", "length"),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab", "stop"),
    ],
)
def test_replies_without_plain_text_are_done_with_their_reason(
    message: dict[str, Any], text: str | None, reason: str
) -> None:
    answer = only(line(completion(**message)))
    assert (answer["state"], answer["text"], answer["finish_reason"]) == (DONE, text, reason)


def test_body_as_a_json_string() -> None:
    assert only(line(json.dumps(completion(content="x\u2028y"))))["text"] == "x\u2028y"


NO_TEXT = [
    (rb"cut \ud83d", "cut \ufffd"),
    (rb"\udc00\ud83d\ude00", "\ufffd\U0001f600"),
    (rb"\ud83d\u0041", "\ufffdA"),
    (rb"\\ud83d \ud83d", "\\ud83d \ufffd"),
    (b"caf\xe9", "caf\ufffd"),
    (rb"nul \u0000", "nul \0"),
]


@pytest.mark.parametrize(("said", "text"), NO_TEXT)
def test_what_no_string_can_hold_is_replaced_and_the_rest_kept(said: bytes, text: str) -> None:
    body = json.dumps(completion(content="?")).encode().replace(b"?", said)
    around = line("!")
    assert only(around.replace(b'"!"', body))["text"] == text
    quoted = b'"' + body.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'
    assert only(around.replace(b'"!"', quoted))["text"] == text
    assert chat.read_reply(200, body)["text"] == text


def test_usage_may_be_missing() -> None:
    body = completion(content="x")
    del body["usage"]
    assert only(line(body))["input_tokens"] is None


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        (400, "invalid_prompt", FAILED),
        (422, None, FAILED),
        (429, "rate_limit_exceeded", RETRY),
        (500, None, RETRY),
        (503, None, RETRY),
        (401, None, ACCOUNT),
        (429, "insufficient_quota", ACCOUNT),
        (404, "model_not_found", ACCOUNT),
    ],
)
def test_http_failures(status: int, code: str | None, state: int) -> None:
    answer = only(line({"error": {"message": "no", "type": "t", "code": code}}, status))
    assert (answer["state"], answer["error"], answer["error_message"]) == (state, code or "t", "no")


@pytest.mark.parametrize(("code", "kind"), [("batch_expired", "expired"), ("batch_cancelled", "cancelled")])
def test_requests_that_never_ran(code: str, kind: str) -> None:
    raw = json.dumps({"custom_id": ID, "response": None, "error": {"code": code, "message": "late"}})
    answer = only(raw.encode())
    assert (answer["state"], answer["error"]) == (RETRY, kind)


@pytest.mark.parametrize("body", [None, [], {}, {"choices": []}, "not json", {"choices": [{"message": 3}]}])
def test_an_unreadable_reply_fails_with_its_raw_text(body: Any) -> None:
    try:
        answer = only(line(body))
    except Exception as error:  # noqa: BLE001
        pytest.fail(f"a traceback for {body!r}: {error!r}")
    assert (answer["state"], answer["error"]) == (FAILED, "unreadable_reply")


def test_dirt_is_left_out_and_text_is_not_split() -> None:
    good = json.dumps(
        {"custom_id": ID, "response": {"status_code": 200, "body": completion(content="a\u2028b\u0085c")}},
        ensure_ascii=False,
    )
    made = [
        b"",
        b"\r\n",
        b"{cut",
        b"\xef\xbb\xbf" + good.encode() + b"\r\n",
        b'{"custom_id": "foreign"}',
        b"[1]",
        b"\xff\xfe",
    ]
    parsed = lines.parse(made, chat.read_reply)
    assert parsed["text"].to_list() == ["a\u2028b\u0085c"]


def test_a_line_without_response_and_error_is_a_failure_that_says_so() -> None:
    assert only(json.dumps({"custom_id": ID}).encode())["error"] == "empty_line"
