"""The canonical form and the key. Golden vectors freeze v1; an independent blake3 computes them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import blake3
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.errors import InvalidRequest
from polars_llm.images import digests
from polars_llm.request import (
    RequestHeader,
    canonical,
    conversation,
    custom_id,
    custom_ids,
    key_from_custom_id,
    key_hex,
    key_prefix,
    retry_key,
)

HEADER = RequestHeader(provider="openai", base_url=None, endpoint="/v1/chat/completions", model="gpt-6-luna")

TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | TEXT
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def digest(text: str) -> str:
    return blake3.blake3(text.encode()).hexdigest()


def oracle_key(
    header: RequestHeader, prompt: str, system: str | None = None, sample: int = 0, kind: str = "t"
) -> str:
    """The format of request.py's docstring, written a second time without Polars or msgspec."""
    facts: dict[str, Any] = {
        "base_url": header.base_url,
        "body": dict(header.body),
        "endpoint": header.endpoint,
        "headers": dict(header.headers),
        "model": header.model,
        "provider": header.provider,
    }
    if header.schema is not None:
        facts["schema"] = header.schema
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    head = digest(
        "pllm/v1/request\n"
        + digest("pllm/v1/header\n" + text)
        + kind
        + ("0" * 64 if system is None else digest(system))
        + f"{sample:020d}"
        + "0" * 64
    )
    return digest(head + digest(prompt))


def keys(prompts: list[str | None], header: RequestHeader = HEADER, **options: Any) -> list[str | None]:
    frame = pl.DataFrame({"p": prompts}, schema={"p": pl.String})
    return frame.select(k=key_hex(header.digest(), pl.col("p"), **options))["k"].to_list()


def test_v1_is_frozen() -> None:
    warm = RequestHeader(
        provider="openai",
        base_url="https://host.example/v1",
        endpoint="/v1/chat/completions",
        model="gpt-6-luna",
        body={"temperature": 0.5, "max_completion_tokens": 64},
    )
    assert keys(["Why is the sky blue?"]) == [
        "5609552f06f5cfd21daba30307c9e2faf59a0bfc1403a26ae9401bda386c8ccb"
    ]
    assert keys(["Why is the sky blue?"], warm, system="Be brief.", sample=2) == [
        "8cc84ca7453d2b494eb7224547a240ed08c0dd2ab2c2c08018913c161b5294be"
    ]
    assert (
        custom_id(bytes.fromhex(keys([""])[0] or "")) == "pllm1-KVufnrndnUdYRgcyWx2ef6d5WYyVoXmFGnEeSS0VBpQ"
    )


@given(prompt=TEXT, system=st.none() | TEXT, sample=st.integers(0, 2**62))
def test_key_follows_the_documented_format(prompt: str, system: str | None, sample: int) -> None:
    assert keys([prompt], system=system, sample=sample) == [oracle_key(HEADER, prompt, system, sample)]


@given(prompts=st.lists(st.none() | TEXT, max_size=8), system=st.none() | TEXT, sample=st.integers(0, 99))
def test_constants_and_columns_give_the_same_keys(
    prompts: list[str | None], system: str | None, sample: int
) -> None:
    frame = pl.DataFrame(
        {"p": prompts, "s": [system] * len(prompts), "n": [sample] * len(prompts)},
        schema={"p": pl.String, "s": pl.String, "n": pl.Int64},
    )
    per_row = key_hex(HEADER.digest(), pl.col("p"), system=pl.col("s"), sample=pl.col("n"))
    assert frame.select(k=per_row)["k"].to_list() == keys(prompts, system=system, sample=sample)


@given(prompts=st.lists(st.none() | TEXT, min_size=1, max_size=12), cut=st.integers(0, 12))
def test_chunks_and_slices_do_not_matter(prompts: list[str | None], cut: int) -> None:
    whole = pl.Series("p", prompts, dtype=pl.String)
    parts = pl.concat([whole.head(cut), whole.slice(cut)], rechunk=False)
    expr = key_hex(HEADER.digest(), pl.col("p"))
    assert parts.to_frame().select(k=expr)["k"].to_list() == keys(prompts)
    streamed = parts.to_frame().lazy().select(k=expr).collect(engine="streaming")
    assert streamed["k"].to_list() == keys(prompts)


def test_schema_and_retry_are_frozen() -> None:
    strict = dataclasses.replace(HEADER, schema='{"type":"object"}')
    (key,) = keys(["Why is the sky blue?"], strict)
    frame = pl.DataFrame({"k": [key]}).select("k", r=retry_key(pl.col("k")))
    assert frame.row(0) == (
        "a8bb3f5006e397177a9070622e3c4c0c22fc524fd33cb7cd161b103d4358a7fe",
        "f5483a39b2476920fd201bcc4fde89f06efff27ab180b27a003ecd07f88715ce",
    )


@given(schema=st.none() | TEXT, prompt=TEXT)
def test_keys_of_schemas_and_retries_follow_the_documented_format(schema: str | None, prompt: str) -> None:
    header = dataclasses.replace(HEADER, schema=schema)
    assert keys([prompt], header) == [oracle_key(header, prompt)]
    frame = pl.DataFrame({"k": [*keys([prompt], header), None]}, schema={"k": pl.String})
    retry = frame.select(retry_key(pl.col("k"))).to_series().to_list()
    assert retry == [digest("pllm/v1/retry\n" + oracle_key(header, prompt)), None]


def test_null_prompts_have_no_key() -> None:
    assert keys([None, "a"])[0] is None


@given(params=st.dictionaries(TEXT, JSON, max_size=4))
def test_order_of_parameters_does_not_matter(params: dict[str, Any]) -> None:
    backwards = dict(reversed(params.items()))
    assert canonical(params) == canonical(backwards)
    assert list(canonical(params) or {}) == sorted(params)  # type: ignore[arg-type]
    first = RequestHeader(provider="p", base_url=None, endpoint="e", model="m", body=params)
    second = RequestHeader(provider="p", base_url=None, endpoint="e", model="m", body=backwards)
    assert first.digest() == second.digest()


@given(value=JSON)
def test_canonical_form_is_a_fixed_point(value: Any) -> None:
    assert canonical(canonical(value)) == canonical(value)
    assert json.dumps(canonical(canonical(value))) == json.dumps(canonical(value))


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 0.0), (1, 1.0), (0, -0.0), ((1, 2), [1, 2]), ({"a": 1, "b": 2}, {"b": 2.0, "a": 1.0})],
)
def test_same_content_has_one_form(one: Any, other: Any) -> None:
    assert json.dumps(canonical(one)) == json.dumps(canonical(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [(True, 1), (False, 0), (None, False), ("1", 1), ([], {}), ("é", "e\u0301"), ({"a": None}, {})],
)
def test_different_content_has_different_keys(one: Any, other: Any) -> None:
    headers = [
        RequestHeader(provider="p", base_url=None, endpoint="e", model="m", body={"x": canonical(v)})
        for v in (one, other)
    ]
    assert headers[0].digest() != headers[1].digest()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, object(), b"x", "\ud800"])
def test_what_json_cannot_say_is_refused(value: object) -> None:
    with pytest.raises(InvalidRequest, match="Nothing was sent"):
        canonical({"a": value})


CHANGES: list[dict[str, Any]] = [
    {"provider": "vllm"},
    {"base_url": "https://elsewhere.example/v1"},
    {"endpoint": "/v1/responses"},
    {"model": "gpt-6-sol"},
    {"body": {"temperature": 0}},
    {"body": {"temperature": 1}},
    {"body": {"seed": 0}},
    {"headers": {"x-beta": "on"}},
    {"schema": "{}"},
]


def test_every_field_of_the_header_changes_the_key() -> None:
    base = {"provider": "openai", "base_url": None, "endpoint": "/v1/chat/completions", "model": "gpt-6-luna"}
    digests = [RequestHeader(**{**base, **change}).digest() for change in [{}, *CHANGES]]
    assert len(set(digests)) == len(digests)


@given(
    a=st.tuples(TEXT, st.none() | TEXT, st.integers(0, 3)),
    b=st.tuples(TEXT, st.none() | TEXT, st.integers(0, 3)),
)
def test_keys_are_equal_exactly_when_requests_are(
    a: tuple[str, str | None, int], b: tuple[str, str | None, int]
) -> None:
    first, second = (keys([p], system=s, sample=n) for p, s, n in (a, b))
    assert (first == second) == (a == b)


@pytest.mark.parametrize("text", ["e\u0301", "é", "\u2028", "\u0085", "a\x00b", "", " ", "\ufeffa"])
def test_text_is_hashed_as_it_is(text: str) -> None:
    assert keys([text]) == [oracle_key(HEADER, text)]


@given(key=st.binary(min_size=32, max_size=32))
def test_custom_id_round_trip(key: bytes) -> None:
    text = custom_id(key)
    assert len(text) == 49
    assert text.replace("-", "").replace("_", "").isalnum()
    assert key_from_custom_id(text) == key
    assert pl.DataFrame({"k": [key]}).select(c=custom_ids(pl.col("k")))["c"].to_list() == [text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "request-1",
        "pllm1-",
        "pllm1-" + "A" * 42,
        "pllm2-" + "A" * 43,
        "pllm1-" + "A" * 42 + "B",
        "pllm1-" + "é" * 43,
    ],
)
def test_foreign_custom_ids_are_not_ours(text: str) -> None:
    assert key_from_custom_id(text) is None


@given(prompt=TEXT)
def test_lookup_prefix_is_the_first_sixteen_bytes(prompt: str) -> None:
    frame = pl.DataFrame({"p": [prompt]}).select(k=key_hex(HEADER.digest(), pl.col("p")))
    prefix = frame.select(key_prefix(pl.col("k"))).item()
    assert prefix == int.from_bytes(bytes.fromhex(frame["k"][0])[:16], "big")


def test_a_conversation_that_is_no_more_than_a_prompt_is_that_prompt() -> None:
    assert conversation(["user"], ["hi"]) == ("t", None, "hi")
    assert conversation(["system", "user"], ["s", "hi"]) == ("t", "s", "hi")
    assert conversation(["user"], ["hi"], "s") == ("t", "s", "hi")
    assert conversation(["system", "user"], ["", "hi"]) == ("t", "", "hi")


def test_conversations_have_one_form() -> None:
    kind, system, text = conversation(["user", "assistant", "user"], ["a", 'b"\n', "é\u2028"])
    assert (kind, system) == ("m", None)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": 'b"\n'},
        {"role": "user", "content": "é\u2028"},
    ]
    assert text == json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def test_a_system_prompt_beside_a_conversation_comes_before_its_own() -> None:
    first = conversation(["system", "system", "user"], ["outer", "inner", "hi"])
    assert first == conversation(["system", "user"], ["inner", "hi"], "outer")
    assert first == ("m", "outer", '[{"content":"inner","role":"system"},{"content":"hi","role":"user"}]')
    assert conversation(["system"], ["s"]) == ("m", None, '[{"content":"s","role":"system"}]')
    assert conversation(["developer", "user"], ["d", "hi"])[:2] == ("m", None)


TALK = st.lists(
    st.tuples(st.sampled_from(["system", "developer", "user", "assistant"]), TEXT), min_size=1, max_size=5
)


def spoken(talk: list[tuple[str, str]], system: str | None) -> list[tuple[str, str]]:
    return talk if system is None else [("system", system), *talk]


@given(a=st.tuples(TALK, st.none() | TEXT), b=st.tuples(TALK, st.none() | TEXT))
def test_conversations_are_equal_exactly_when_what_is_said_is(
    a: tuple[list[tuple[str, str]], str | None], b: tuple[list[tuple[str, str]], str | None]
) -> None:
    forms = [conversation([r for r, _ in talk], [c for _, c in talk], s) for talk, s in (a, b)]
    assert (forms[0] == forms[1]) == (spoken(*a) == spoken(*b))


@given(talk=TALK, system=st.none() | TEXT, sample=st.integers(0, 9))
def test_keys_of_conversations_follow_the_documented_format(
    talk: list[tuple[str, str]], system: str | None, sample: int
) -> None:
    kind, beside, text = conversation([r for r, _ in talk], [c for _, c in talk], system)
    got = keys([text], kind=kind, system=beside, sample=sample)
    assert got == [oracle_key(HEADER, text, beside, sample, kind)]


def test_v1_is_frozen_for_conversations_and_images() -> None:
    talk = [("user", "What is this?"), ("assistant", 'A "cat"\n\t\u2028\x7f\x00é.'), ("user", "Sure?")]
    kind, system, text = conversation([r for r, _ in talk], [c for _, c in talk], "Be brief.")
    assert keys([text], kind=kind, system=system) == [
        "07cf544c4f9dff32eadba14223f269e815bd2d3fa0e598436a12fcd282fcb8ba"
    ]
    png = b"\x89PNG\r\n\x1a\n" + bytes(16)
    images = pl.Series([[png], [png, b"GIF89a"]], dtype=pl.List(pl.Binary))
    links = pl.Series([["https://host.example/a.png"]])
    assert digests(images).to_list() == [
        "fcf6884886b6e1be234ddbbc303b9e19c34f4492aac819d48d2a6b4f6e860b20",
        "94255e774bb627c11eca7ff90976bc1c0474989acf17264bc826d5caf51d154e",
    ]
    assert digests(links).to_list() == ["1e62dbeeebe7b92afc0f185c463577ddb19814550f28a2e410833e5ba4b1d26e"]
    frame = pl.DataFrame({"p": ["What is this?"], "a": digests(images.head(1))})
    expr = key_hex(HEADER.digest(), pl.col("p"), attachments=pl.col("a"))
    assert frame.select(expr).item() == "3ed0a2b8cd37d958cc458e42f44a6f1423cd8a690fabac35ed9092cd6193fbb0"
