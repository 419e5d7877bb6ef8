"""The Messages wire form: bodies that carry what was set, and replies however they come."""

from __future__ import annotations

import json
from typing import Annotated, Any

import blake3
import msgspec
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polars_llm as pllm
from polars_llm.answer import ACCOUNT, DONE, FAILED, RETRY
from polars_llm.backends.options import Options
from polars_llm.backends.wire import messages
from polars_llm.errors import InvalidRequest
from polars_llm.request import RequestHeader, Requests, custom_id, key_hex
from polars_llm.schema import freeze

KEY = bytes(range(32))
ID = custom_id(KEY)
OLD = "2023-06-01"
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30)


def requests(rows: list[dict[str, Any]], **options: Any) -> Requests:
    header = RequestHeader(
        provider="anthropic",
        base_url=None,
        endpoint=messages.ENDPOINT,
        model="m",
        body=messages.body(Options(**options)),
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


def talk(*turns: tuple[str, Any]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in turns])


# --- requests -----------------------------------------------------------------------------------


def test_nothing_that_was_not_set_is_sent_but_the_limit_that_the_api_wants() -> None:
    (line,) = messages.render(requests([row("hi")]))
    assert json.loads(line) == {
        "custom_id": ID,
        "params": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4096},
    }


def test_options_have_the_apis_names() -> None:
    options = {
        "max_tokens": 5,
        "stop": ["a", "b"],
        "reasoning_effort": "low",
        "params": {"thinking": {"type": "adaptive"}, "output_config": {"format": {"type": "json_schema"}}},
    }
    (line,) = messages.render(requests([row("hi", "Be brief.")], **options))
    assert json.loads(line)["params"] == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "system": [{"type": "text", "text": "Be brief."}],
        "max_tokens": 5,
        "stop_sequences": ["a", "b"],
        "thinking": {"type": "adaptive"},
        "output_config": {"effort": "low", "format": {"type": "json_schema"}},
    }


def test_one_stop_string_is_a_list_of_one() -> None:
    assert messages.body(Options(stop="END"))["stop_sequences"] == ["END"]


def test_the_limit_may_come_in_params() -> None:
    assert messages.body(Options(params={"max_tokens": 9}))["max_tokens"] == 9


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.0},
        {"top_p": 0.5},
        {"params": {"temperature": 1.0}},
        {"params": {"top_k": 3}},
    ],
)
def test_sampling_parameters_are_refused_where_the_version_refuses_them(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"api_version='2023-06-01'.*Nothing was sent"):
        messages.body(Options(**options))
    with pytest.raises(InvalidRequest):
        messages.body(Options(**options), api_version="2027-01-01")
    sent = {**options, **options.get("params", {})}
    sent.pop("params", None)
    assert messages.body(Options(**options), api_version=OLD) == {"max_tokens": 4096, **sent}


@pytest.mark.parametrize("version", [OLD, "2026-10-21"])
@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 2, "params": {"max_tokens": 2}},
        {"stop": "x", "params": {"stop_sequences": ["x"]}},
        {"reasoning_effort": "low", "params": {"output_config": {"effort": "low"}}},
        {"reasoning_effort": "low", "params": {"output_config": "low"}},
        *({"params": {name: 1}} for name in ("model", "messages", "system", "stream", "speed", "seed")),
        {"params": {"max_tokens": "many"}},
    ],
)
def test_what_cannot_be_sent_is_refused_before_anything_is(options: dict[str, Any], version: str) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        messages.body(Options(**options), api_version=version)


@given(rows=st.lists(st.tuples(TEXT, st.none() | TEXT, st.integers(0, 9)), max_size=5))
def test_lines_are_json_and_say_what_the_row_says(rows: list[tuple[str, str | None, int]]) -> None:
    lines = list(messages.render(requests([row(*r) for r in rows])))
    assert len(lines) == len(rows)
    for line, (prompt, system, _) in zip(lines, rows, strict=True):
        assert b"\n" not in line  # `create` makes a comma of each line end
        params = json.loads(line)["params"]
        assert params["messages"] == [{"role": "user", "content": prompt}]
        # The API refuses empty text blocks.
        assert params.get("system") == ([{"type": "text", "text": system}] if system else None)


def test_whole_conversations_go_as_they_are_but_for_their_system_prompt() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", [{"type": "text", "text": "c"}])]
    rows = [
        row(talk(*turns), kind="m"),
        row(talk(("system", "s"), *turns), kind="m"),
        row(talk(("system", [{"type": "text", "text": "t"}]), *turns), "s", kind="m"),
    ]
    plain, led, both = (json.loads(line)["params"] for line in messages.render(requests(rows)))
    assert plain["messages"] == led["messages"] == both["messages"] == json.loads(talk(*turns))
    assert "system" not in plain
    assert led["system"] == [{"type": "text", "text": "s"}]
    assert both["system"] == [{"type": "text", "text": "s"}, {"type": "text", "text": "t"}]


def test_only_the_end_of_the_system_prompt_is_marked_for_the_cache() -> None:
    rows = [
        row("hi"),
        row("hi", ""),
        row("hi", "Be brief."),
        row(talk(("system", "a"), ("system", "b"), ("user", "c")), kind="m"),
    ]
    lines = messages.render(requests(rows), cache_system="1h")
    none, empty, one, two = (json.loads(line)["params"] for line in lines)
    mark = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    assert "system" not in none
    assert "system" not in empty
    assert one["system"] == [{"type": "text", "text": "Be brief.", **mark}]
    assert two["system"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b", **mark}]
    plain = [json.loads(line)["params"] for line in messages.render(requests(rows))]
    assert [p["messages"] for p in plain] == [p["messages"] for p in (none, empty, one, two)]


@pytest.mark.parametrize("turns", [[], [("system", "s")], [("user", "a"), ("assistant", "The answer is (")]])
def test_a_conversation_must_end_with_the_user(turns: list[tuple[str, Any]]) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        list(messages.render(requests([row(talk(*turns), kind="m")])))


# --- keys ---------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return blake3.blake3(text.encode()).hexdigest()


def oracle(model: str, body: dict[str, Any], headers: dict[str, str], prompt: str) -> str:
    """The format of request.py's docstring, written without Polars or msgspec."""
    facts = {
        "base_url": None,
        "body": body,
        "endpoint": "/v1/messages",
        "headers": headers,
        "model": model,
        "provider": "anthropic",
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = digest("pllm/v1/header\n" + text)
    return digest(
        digest("pllm/v1/request\n" + header + "t" + "0" * 64 + "0" * 20 + "0" * 64) + digest(prompt)
    )


def key(model: pllm.Anthropic, prompt: str, **options: Any) -> str:
    header = model.backend().header(Options(**options)).digest()
    frame = pl.DataFrame({"p": [prompt]})
    return str(frame.select(key_hex(header, pl.col("p"))).item())


def test_v1_is_frozen() -> None:
    """Golden vectors: a release that changes one makes users pay again."""
    plain = key(pllm.Anthropic("claude-haiku-5-5"), "Why is the sky blue?")
    now = {"anthropic-version": "2026-10-21"}
    assert plain == oracle("claude-haiku-5-5", {"max_tokens": 4096}, now, "Why is the sky blue?")
    assert plain == "6840021761070fe33ee561513481ca418947e823351cb350a31838689f5ab15b"

    old = pllm.Anthropic("claude-haiku-4-5", api_version=OLD, betas=["b-2", "a-1"])
    pinned = key(old, "Why is the sky blue?", temperature=0.0, max_tokens=64)
    body = {"max_tokens": 64, "temperature": 0}
    headers = {"anthropic-beta": "a-1,b-2", "anthropic-version": OLD}
    assert pinned == oracle("claude-haiku-4-5", body, headers, "Why is the sky blue?")
    assert pinned == "43f24d99e0719bf168e73df05d1eb93b2a590484391ea5cc920a72cbc278fd6d"


SCHEMA = freeze({"b": Annotated[str, msgspec.Meta(min_length=2)], "a": int | None}).json


def with_schema(**options: Any) -> Requests:
    header = pllm.Anthropic("m", api_key="k").backend().header(Options(schema=SCHEMA, **options))
    return Requests(header, requests([row("hi")]).frame)


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({}, ""),
        ({"reasoning_effort": "low"}, '"effort":"low",'),
        ({"params": {"output_config": {"effort": "low"}}}, '"effort":"low",'),
        ({"params": {"output_config": {}}}, ""),
    ],
)
def test_a_schema_goes_as_output_format_in_its_own_order(options: dict[str, Any], config: str) -> None:
    (line,) = messages.render(with_schema(**options))
    assert line.decode() == (
        '{"custom_id":"' + ID + '","params":{"model":"m","messages":[{"role":"user","content":"hi"}],'
        '"max_tokens":4096,"output_config":{' + config + '"format":{"type":"json_schema","schema":'
        '{"type":"object","properties":{"b":{"description":"(minLength 2)","type":"string"},'
        '"a":{"anyOf":[{"type":"integer"},{"type":"null"}]}},"required":["b","a"],'
        '"additionalProperties":false}}}}}'
    )


def test_a_schema_is_part_of_the_key() -> None:
    key = pl.DataFrame({"p": ["hi"]}).select(key_hex(with_schema().header.digest(), pl.col("p"))).item()
    assert key == "155029b01e9cbe4bf025c90a9d192c4df30c0d33f5c310a2cee8594bcafde4b8"


@pytest.mark.parametrize("config", [{"format": {"type": "json_schema"}}, "x"])
def test_a_schema_and_an_output_format_contradict_each_other(config: Any) -> None:
    with pytest.raises(InvalidRequest, match="set twice"):
        messages.body(Options(schema=SCHEMA, params={"output_config": config}))


def test_the_default_limit_and_the_same_limit_set_by_hand_are_one_request() -> None:
    model = pllm.Anthropic("m")
    assert key(model, "x") == key(model, "x", max_tokens=4096) == key(model, "x", params={"max_tokens": 4096})
    assert key(model, "x") != key(model, "x", max_tokens=4097)


def test_version_betas_and_host_are_in_the_key_and_the_api_key_is_not() -> None:
    keys = [
        key(pllm.Anthropic("m"), "x"),
        key(pllm.Anthropic("m", api_version=OLD), "x"),
        key(pllm.Anthropic("m", betas=["b"]), "x"),
        key(pllm.Anthropic("m", base_url="https://gateway.example"), "x"),
    ]
    assert len(set(keys)) == 4
    assert key(pllm.Anthropic("m", api_key="sk-ant-1"), "x") == keys[0]
    assert key(pllm.Anthropic("m", betas=("b", "b")), "x") == keys[2]
    moved = pllm.Anthropic("m", base_url="https://gateway.example", cache_as="https://api.anthropic.com/")
    assert key(moved, "x") == keys[0]


# --- replies ------------------------------------------------------------------------------------


def message(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 9,
        "output_tokens": 4,
        "cache_creation_input_tokens": 100,
        "cache_read_input_tokens": 20,
        "service_tier": "batch",
    }
    whole = {"id": "msg", "type": "message", "role": "assistant", "model": "m-2026", "content": list(blocks)}
    return {**whole, "stop_reason": "end_turn", "stop_details": None, "usage": usage, **more}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "citations": None}


def line(result: Any) -> bytes:
    return json.dumps({"custom_id": ID, "result": result}).encode()


def succeeded(body: Any) -> bytes:
    return line({"type": "succeeded", "message": body})


def errored(type_: str, said: str = "no", **more: Any) -> bytes:
    inner = {"type": type_, "message": said, **more}
    return line({"type": "errored", "error": {"type": "error", "error": inner, "request_id": "req"}})


def only(raw: bytes) -> dict[str, Any]:
    return messages.parse_lines([raw]).row(0, named=True)


def test_an_answer() -> None:
    answer = only(succeeded(message(text("Hello"))))
    body = answer.pop("body")
    assert json.loads(body)["id"] == "msg"
    assert answer == {
        "key": KEY,
        "state": DONE,
        "text": "Hello",
        "error": None,
        "error_message": None,
        "finish_reason": "end_turn",
        "input_tokens": 129,  # cached tokens are billed input too, and counted beside it
        "cached_input_tokens": 20,
        "cache_write_tokens": 100,
        "cache_write_1h_tokens": None,
        "service_tier": "batch",
        "inference_geo": None,
        "output_tokens": 4,
        "model": "m-2026",
        "vector": None,
    }


def test_what_else_has_a_price() -> None:
    usage = {
        "input_tokens": 1,
        "output_tokens": 1,
        "cache_creation_input_tokens": 7,
        "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 2},
        "inference_geo": "us",
    }
    answer = only(succeeded(message(text("a"), usage=usage)))
    assert (answer["cache_write_tokens"], answer["cache_write_1h_tokens"]) == (7, 2)
    assert answer["inference_geo"] == "us"


def test_a_strange_tier_or_region_does_not_make_an_answer_unreadable() -> None:
    usage = {"input_tokens": 1, "output_tokens": 1, "service_tier": {"a": 1}, "inference_geo": 5}
    answer = only(succeeded(message(text("a"), usage=usage)))
    assert (answer["text"], answer["service_tier"], answer["inference_geo"]) == ("a", None, None)


THINKING = {"type": "thinking", "thinking": "Hm.", "signature": "s"}
TOOL = {"type": "tool_use", "id": "t", "name": "f", "input": {"text": "not an answer"}}


@pytest.mark.parametrize(
    ("blocks", "more", "value"),
    [
        ([THINKING, text("a"), text("b")], {}, "ab"),
        ([text("")], {}, ""),
        ([], {}, None),
        ([THINKING], {}, None),
        ([text("cut o")], {"stop_reason": "max_tokens"}, "cut o"),
        ([text("a")], {"stop_reason": "stop_sequence", "stop_sequence": "x"}, "a"),
        ([text("a")], {"stop_reason": "model_context_window_exceeded"}, "a"),
        ([text("so far")], {"stop_reason": "pause_turn"}, "so far"),
        ([TOOL], {"stop_reason": "tool_use"}, None),
        ([text("Let me look."), TOOL], {"stop_reason": "tool_use"}, None),
        ([text("The first st")], {"stop_reason": "refusal"}, None),
    ],
)
def test_text_is_what_the_text_blocks_say(blocks: list[Any], more: dict[str, Any], value: str | None) -> None:
    answer = only(succeeded(message(*blocks, **more)))
    assert answer["state"] == DONE
    assert answer["text"] == value
    assert answer["finish_reason"] == more.get("stop_reason", "end_turn")


@pytest.mark.parametrize(
    ("details", "said"),
    [
        ({"type": "refusal", "category": "bio", "explanation": "Not this."}, "Not this."),
        ({"type": "refusal", "category": "bio", "explanation": None}, "bio"),
        (None, "I can't"),
    ],
)
def test_a_refusal_says_why(details: Any, said: str) -> None:
    refusal = message(text("I can't"), stop_reason="refusal", stop_details=details)
    assert only(succeeded(refusal))["error_message"] == said


def test_usage_may_be_missing() -> None:
    bare = only(succeeded(message(text("a"), usage=None)))
    assert (bare["text"], bare["input_tokens"], bare["output_tokens"]) == ("a", None, None)
    little = only(succeeded(message(text("a"), usage={"input_tokens": 3, "output_tokens": 1})))
    assert (little["input_tokens"], little["cached_input_tokens"]) == (3, None)


@pytest.mark.parametrize(
    ("type_", "state"),
    [
        ("invalid_request_error", FAILED),
        ("request_too_large", FAILED),
        ("not_found_error", FAILED),
        ("authentication_error", ACCOUNT),
        ("billing_error", ACCOUNT),
        ("permission_error", ACCOUNT),
        ("rate_limit_error", RETRY),
        ("timeout_error", RETRY),
        ("api_error", RETRY),
        ("overloaded_error", RETRY),
        ("an_error_of_next_year", RETRY),
    ],
)
def test_errored_requests(type_: str, state: int) -> None:
    answer = only(errored(type_))
    assert (answer["state"], answer["error"], answer["error_message"]) == (state, type_, "no")
    assert json.loads(answer["body"])["request_id"] == "req"


@pytest.mark.parametrize(
    ("type_", "said", "details", "kind"),
    [
        ("not_found_error", "model: claude-nope", None, "model_not_found"),
        ("invalid_request_error", "Your credit balance is too low to access ...", None, "billing_error"),
        (
            "rate_limit_error",
            "no",
            {"error_code": "enforced_spend_limit_reached"},
            "enforced_spend_limit_reached",
        ),
    ],
)
def test_what_concerns_the_account_is_never_held_against_a_request(
    type_: str, said: str, details: Any, kind: str
) -> None:
    answer = only(errored(type_, said, details=details))
    assert (answer["state"], answer["error"]) == (ACCOUNT, kind)


@pytest.mark.parametrize(("type_", "kind"), [("expired", "expired"), ("canceled", "cancelled")])
def test_requests_that_never_ran(type_: str, kind: str) -> None:
    answer = only(line({"type": type_}))
    assert (answer["state"], answer["error"]) == (RETRY, kind)


def test_what_no_string_can_hold_is_replaced_and_the_rest_kept() -> None:
    for said, value in ((rb"cut \ud83d", "cut \ufffd"), (b"caf\xe9", "caf\ufffd"), (rb"\\ud83d", "\\ud83d")):
        body = json.dumps(message(text("?"))).encode().replace(b"?", said)
        assert only(succeeded("!").replace(b'"!"', body))["text"] == value
        assert messages.read_reply(200, body)["text"] == value


@pytest.mark.parametrize("body", [None, [], {}, {"content": "text"}, {"content": [3]}, "not a message"])
def test_an_unreadable_message_fails_and_keeps_its_raw_text(body: Any) -> None:
    answer = only(succeeded(body))
    assert (answer["state"], answer["error"]) == (FAILED, "unreadable_reply")
    assert json.loads(answer["body"]) == body


@pytest.mark.parametrize("result", [None, {}, {"type": "paused"}, {"type": "errored", "error": "odd"}])
def test_results_of_unknown_shape_are_failures(result: Any) -> None:
    assert only(line(result))["state"] in (FAILED, RETRY)


def test_dirt_is_left_out_and_text_is_not_split() -> None:
    good = {"custom_id": ID, "result": {"type": "succeeded", "message": message(text("a\u2028b\u0085c"))}}
    lines = [
        b"",
        b"\r\n",
        b"{cut",
        b"\xef\xbb\xbf" + json.dumps(good, ensure_ascii=False).encode() + b"\r\n",
        b'{"custom_id": "foreign", "result": {"type": "expired"}}',
        b'{"custom_id": 3}',
        b"[1]",
        b"\xff\xfe",
    ]
    assert messages.parse_lines(lines)["text"].to_list() == ["a\u2028b\u0085c"]
    assert list(messages.custom_ids_of(lines)) == [ID, "foreign"]


def test_a_realtime_reply_reads_the_same() -> None:
    whole = json.dumps(message(text("Hello"))).encode()
    assert messages.read_reply(200, whole)["text"] == "Hello"
    error = json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "busy"}}).encode()
    assert messages.read_reply(529, error)["state"] == RETRY
    assert messages.read_reply(502, b"<html>Bad gateway</html>")["error"] == "http_502"


@pytest.mark.parametrize("version", ["", "latest", "2026-10", "2026-10-21\r\nx: y", 20261021])
def test_a_version_is_a_date(version: Any) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        pllm.Anthropic("m", api_version=version)


@pytest.mark.parametrize("betas", ["one", ["a,b"], ["a\nb"], [""]])
def test_betas_are_names(betas: Any) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        pllm.Anthropic("m", betas=betas)
