"""The Embeddings wire form, without a network: vectors are the provider's own bits."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.answer import DONE, FAILED
from polars_llm.backends.options import Options
from polars_llm.backends.wire import embeddings, lines
from polars_llm.errors import InvalidRequest
from polars_llm.request import RequestHeader, Requests, custom_id

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
VECTOR = st.lists(FLOAT32, min_size=1, max_size=8)


def packed(vector: list[float]) -> bytes:
    return struct.pack(f"<{len(vector)}f", *vector)


def reply(embedding: Any) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": embedding}],
        "model": "m-2026",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


def parsed(*embeddings_: Any) -> pl.DataFrame:
    made = [
        json.dumps(
            {"custom_id": custom_id(bytes([n]) * 32), "response": {"status_code": 200, "body": reply(e)}}
        ).encode()
        for n, e in enumerate(embeddings_)
    ]
    return lines.parse(made, embeddings.read_reply)


def bits(column: pl.Series) -> list[bytes]:
    return [packed(vector) for vector in column.to_list()]


def test_a_request_asks_for_decimals_which_is_not_in_the_key() -> None:
    body = embeddings.body(Options(dimensions=8))
    assert body == {"dimensions": 8}
    header = RequestHeader(
        provider="openai", base_url=None, endpoint=embeddings.ENDPOINT, model="m", body=body
    )
    frame = pl.DataFrame({"key": [bytes(32)], "prompt": ["é\u2028"], "kind": ["t"], "system": [None]})
    (line,) = embeddings.render(Requests(header, frame))
    assert json.loads(line) == {
        "custom_id": custom_id(bytes(32)),
        "method": "POST",
        "url": "/v1/embeddings",
        "body": {"model": "m", "input": "é\u2028", "dimensions": 8, "encoding_format": "float"},
    }


@pytest.mark.parametrize(
    ("base_url", "params", "expected"),
    [
        (None, {}, "float"),
        ("https://host.example/v1", {}, "float"),
        (None, {"encoding_format": "base64"}, "base64"),
    ],
)
def test_how_vectors_travel(base_url: str | None, params: dict[str, Any], expected: str) -> None:
    body = embeddings.body(Options(params=params))
    header = RequestHeader(
        provider="openai", base_url=base_url, endpoint=embeddings.ENDPOINT, model="m", body=body
    )
    frame = pl.DataFrame({"key": [bytes(32)], "prompt": ["a"]})
    (line,) = embeddings.render(Requests(header, frame))
    assert json.loads(line)["body"]["encoding_format"] == expected


@given(vectors=st.lists(VECTOR, min_size=1, max_size=4))
def test_base64_gives_the_very_bits(vectors: list[list[float]]) -> None:
    found = parsed(*(base64.b64encode(packed(v)).decode() for v in vectors))
    assert found.schema["vector"] == pl.List(pl.Float32)
    assert bits(found["vector"]) == [packed(v) for v in vectors]
    assert set(found["state"]) == {DONE}


@given(vectors=st.lists(VECTOR, min_size=1, max_size=4))
def test_decimals_give_the_very_bits_too(vectors: list[list[float]]) -> None:
    assert bits(parsed(*vectors)["vector"]) == [packed(v) for v in vectors]


@given(vector=VECTOR)
def test_nine_digits_give_the_very_bits(vector: list[float]) -> None:
    # What a host prints that shows no more digits than a Float32 has.
    text = "[" + ",".join(f"{number:.8e}" for number in vector) + "]"
    raw = json.dumps(reply(None)).replace('"embedding": null', f'"embedding": {text}')
    assert embeddings.read_reply(200, raw.encode())["vector"] == packed(vector)


def test_vectors_and_failures_lie_in_one_frame() -> None:
    found = parsed([0.5], "@@", base64.b64encode(packed([1.0, 2.0])).decode(), [], None)
    assert found["vector"].to_list() == [[0.5], None, [1.0, 2.0], None, None]
    assert found["state"].to_list() == [DONE, FAILED, DONE, FAILED, FAILED]
    assert set(found["error"].drop_nulls()) == {"unreadable_reply"}


def test_what_is_kept_and_counted() -> None:
    row = parsed([0.25, -1.0]).row(0, named=True)
    assert (row["input_tokens"], row["output_tokens"], row["model"]) == (3, 0, "m-2026")
    assert json.loads(row["body"]) == reply(None)


def test_many_replies_cross_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polars_llm.backends.replies._STEP", 3)
    assert parsed(*([float(n)] for n in range(10)))["vector"].to_list() == [[float(n)] for n in range(10)]


@pytest.mark.parametrize(
    ("model", "dimensions", "own", "expected"),
    [
        ("text-embedding-3-small", None, None, (None, 1536)),
        ("text-embedding-3-small", 1536, None, (None, 1536)),
        ("text-embedding-3-large", 256, None, (256, 256)),
        ("text-embedding-ada-002", 1536, None, (None, 1536)),
        ("other", 64, None, (64, 64)),
        ("other", None, 1024, (None, 1024)),
        ("other", 64, 1024, (64, 64)),
    ],
)
def test_lengths(model: str, dimensions: int | None, own: int | None, expected: Any) -> None:
    assert embeddings.lengths(model, dimensions, own) == expected


@pytest.mark.parametrize(
    ("model", "dimensions", "said"),
    [
        ("other", None, "not known"),
        ("other", 0, "whole number"),
        ("other", True, "whole number"),
        ("other", 1.5, "whole number"),
        ("text-embedding-3-small", 1537, "has 1,536"),
        ("text-embedding-ada-002", 256, "no other"),
    ],
)
def test_lengths_that_are_not_to_be_had(model: str, dimensions: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as error:
        embeddings.lengths(model, dimensions)
    assert "Nothing was sent" in str(error.value)


@pytest.mark.parametrize("name", ["input", "model", "dimensions"])
def test_our_own_fields_are_refused_in_params(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        embeddings.body(Options(params={name: 1}))
