"""Images per row: one key for one content, and what each provider is sent."""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

import polars_llm as pllm
from polars_llm import images, testing
from polars_llm.frame import inputs, verbs
from tests.conftest import MODEL

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(40))
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(40))
GIF = b"GIF89a" + bytes(range(40))
WEBP = b"RIFF\x00\x00\x00\x00WEBPVP8 "
LINK = "https://host.example/cat.png"
CLAUDE = "anthropic/claude-haiku-5-5"

PICTURE = st.binary(max_size=12).map(lambda tail: PNG + tail)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def collected(frame: Any, **options: Any) -> Any:
    return frame.llm.generate("q", **{"model": MODEL, "on_pending": "wait", "images": "image", **options})


def keys(column: pl.Series, prompt: str = "What?") -> list[int]:
    verb = verbs.generate("q", model=pllm.OpenAI("m", api_key="k"), images="image")
    rows = pl.DataFrame({inputs.PROMPT: [prompt] * column.len(), inputs.IMAGES: column})
    return verb.keys(verb.checked(rows)).to_list()


class Seen:
    """A model that remembers the last message of each request."""

    def __init__(self) -> None:
        self.contents: list[Any] = []

    def __call__(self, request: testing.ModelRequest) -> str:
        said = request.body.get("messages") or request.body["input"]
        self.contents.append(said[-1]["content"] if isinstance(said, list) else said)
        return "seen"


def test_bytes_files_and_data_urls_are_one_request(provider: testing.Provider, tmp_path: Path) -> None:
    path = tmp_path / "a cat.png"
    path.write_bytes(PNG)
    columns: list[pl.Series] = [
        pl.Series("image", [PNG, None]),
        pl.Series("image", [str(path), None]),
        pl.Series("image", [data_url(PNG), None]),
        pl.Series("image", [data_url(PNG, "application/octet-stream"), None]),
        pl.Series("image", [[PNG], []], dtype=pl.List(pl.Binary)),
        pl.Series("image", [[None, str(path)], None], dtype=pl.List(pl.String)),
        pl.Series("image", [[PNG], [None]], dtype=pl.Array(pl.Binary, 1)),
    ]
    for column in columns:
        out = collected(pl.DataFrame({"q": ["What?", "What?"], "image": column}))
        assert out["response"].to_list() == ["What?", "What?"]
    collected(pl.DataFrame({"q": ["What?"]}), images=None)
    assert provider.bill().billed == 2


def test_all_forms_are_the_same_requests(provider: testing.Provider) -> None:
    df = pl.DataFrame({"q": ["a", None, "b", "a"], "image": [PNG, PNG, None, PNG]})
    want = collected(df)["response"].to_list()
    assert want == ["a", None, "b", "a"]
    assert collected(df.lazy()).collect()["response"].to_list() == want
    assert collected(df.lazy(), on_pending="raise").collect()["response"].to_list() == want
    expr = pl.col("q").llm.generate(model=MODEL, images=pl.col("image"))
    assert df.select(expr)["response"].to_list() == want
    assert df.lazy().select(expr).collect()["response"].to_list() == want
    assert df["q"].llm.generate(model=MODEL, images=df["image"]).to_list() == want
    assert provider.bill().billed == 2


def test_verbs_with_and_without_images_share_a_job(provider: testing.Provider, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    lf = pl.LazyFrame(
        {"q": ["a", "b"], "bytes": [PNG, None], "path": [str(path), None], "link": [LINK, LINK]}
    )
    for name in ("bytes", "path", "link"):
        lf = lf.llm.generate("q", model=MODEL, images=name, name=f"seen_{name}")
    lf = lf.llm.generate("q", model=MODEL, name="plain")
    out = lf.llm.collect()
    assert out.select("plain", pl.col("^seen.*$")).unpivot()["value"].to_list() == ["a", "b"] * 4
    assert (provider.bill().batches, provider.bill().billed) == (1, 5)


def test_openai_gets_the_text_and_then_the_images() -> None:
    seen = Seen()
    with testing.provider(model=seen):
        collected(pl.DataFrame({"q": ["What?"], "image": [[data_url(PNG), LINK]]}))
    assert seen.contents == [
        [
            {"type": "text", "text": "What?"},
            {"type": "image_url", "image_url": {"url": data_url(PNG)}},
            {"type": "image_url", "image_url": {"url": LINK}},
        ]
    ]


def test_anthropic_gets_the_images_and_then_the_text() -> None:
    seen = Seen()
    with testing.provider(model=seen):
        collected(pl.DataFrame({"q": ["What?"], "image": [[data_url(JPEG), LINK]]}), model=CLAUDE)
    data = base64.b64encode(JPEG).decode()
    assert seen.contents == [
        [
            {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": data}},
            {"type": "image", "source": {"type": "url", "url": LINK}},
            {"type": "text", "text": "What?"},
        ]
    ]


@pytest.mark.parametrize("model", [MODEL, CLAUDE])
def test_in_a_conversation_they_belong_to_the_users_last_words(model: str) -> None:
    seen: list[Any] = []

    def answer(request: testing.ModelRequest) -> str:
        seen.extend((m["role"], m["content"]) for m in request.body["messages"])
        return "ok"

    talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
    messages = [[{"role": r, "content": c} for r, c in talk]]
    with testing.provider(model=answer):
        collected(pl.DataFrame({"q": messages, "image": [PNG]}), model=model)
    assert seen[:2] == talk[:2]
    assert seen[2][0] == "user"
    assert sorted(part["type"] for part in seen[2][1]) in (["image", "text"], ["image_url", "text"])


@pytest.mark.parametrize(
    ("data", "kind"),
    [(PNG, "image/png"), (JPEG, "image/jpeg"), (GIF, "image/gif"), (WEBP, "image/webp"), (b"%PDF-1", None)],
)
def test_the_type_is_that_of_the_bytes(data: bytes, kind: str | None) -> None:
    assert images.media_type(data) == kind


@given(
    a=st.lists(PICTURE | st.just(LINK) | st.just("http://host.example/"), max_size=3),
    b=st.lists(PICTURE | st.just(LINK), max_size=3),
)
def test_keys_are_equal_exactly_when_images_are(a: list[bytes | str], b: list[bytes | str]) -> None:
    texts = [[data_url(i) if isinstance(i, bytes) else i for i in row] for row in (a, b)]
    first, second = keys(pl.Series(texts, dtype=pl.List(pl.String)))
    assert (first == second) == (a == b)


@given(
    rows=st.lists(st.none() | st.lists(PICTURE, max_size=3), min_size=1, max_size=6), cut=st.integers(0, 6)
)
def test_binary_and_text_and_chunks_give_the_same_keys(rows: list[list[bytes] | None], cut: int) -> None:
    binary = pl.Series(rows, dtype=pl.List(pl.Binary))
    text = pl.Series([r if r is None else [data_url(i) for i in r] for r in rows], dtype=pl.List(pl.String))
    want = keys(binary)
    assert keys(text) == want
    assert keys(pl.concat([binary.head(cut), binary.slice(cut)], rechunk=False)) == want
    assert [keys(binary.slice(i, 1))[0] for i in range(len(rows))] == want


BAD: list[tuple[Any, str]] = [
    (["", "no/such/file.png"], "Row 0: the image '' cannot be read"),
    ([LINK, "no/such/file.png"], "Row 1: the image 'no/such/file.png' cannot be read: No such file"),
    ([LINK, "."], "Row 1: the image '.' cannot be read: Is a directory"),
    ([LINK, "s3://bucket/a.png"], "Row 1: nobody here reads images from s3://"),
    ([LINK, "data:image/png;base64,@@@"], "Row 1: the image .* is not a data URL"),
    ([LINK, data_url(b"hello")], "Row 1: .* is not an image"),
    ([PNG, b"hello"], "Row 1: 5 bytes is not an image"),
    ([PNG, b""], "Row 1: 0 bytes is not an image"),
    ([1, 2], "images has dtype Int64"),
    ([[[PNG]], [[PNG]]], "images has dtype List"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such files")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(pllm.InvalidRequest, match=r"Row 0: the image .* cannot be read: it is no file"):
        collected(pl.DataFrame({"q": ["a"], "image": [str(tmp_path / "pipe")]}))


@pytest.mark.parametrize(("column", "said"), BAD)
def test_what_cannot_be_sent_is_said_before_anything_is_sent(
    provider: testing.Provider, column: Any, said: str
) -> None:
    frame = pl.DataFrame({"q": ["a", "b"], "image": column})
    for ask in (lambda: collected(frame), lambda: collected(frame.lazy()).collect()):
        with pytest.raises(pllm.InvalidRequest, match=said) as error:
            ask()
        assert "Nothing was sent" in str(error.value)
    assert provider.log() == []


def test_images_of_null_prompts_are_not_read(provider: testing.Provider) -> None:
    out = collected(pl.DataFrame({"q": ["a", None], "image": [LINK, "no/such/file"]}))
    assert out["response"].to_list() == ["a", None]


def test_limits_of_the_provider(provider: testing.Provider) -> None:
    large = PNG + bytes(8 * 1024 * 1024)
    frame = pl.DataFrame({"q": ["a"], "image": [large]})
    with pytest.raises(pllm.InvalidRequest, match=r"Row 0: an image of 8,388,656 bytes"):
        collected(frame, model=CLAUDE)
    many = pl.DataFrame({"q": ["a"], "image": [[LINK] * 601]})
    with pytest.raises(pllm.InvalidRequest, match="Row 0: 601 images, and the provider takes 600"):
        collected(many, model=CLAUDE)
    assert provider.log() == []
    collected(frame)
    collected(many)
    assert provider.bill().billed == 2


def test_what_images_cost_is_not_known_beforehand(provider: testing.Provider) -> None:
    frame = pl.DataFrame({"q": ["a", "b"], "image": [PNG, None]})
    priced = pllm.OpenAI("gpt-6-luna", prices=pllm.Prices(input=1, output=1))
    options = {"model": priced, "max_tokens": 10}
    told = frame.llm.estimate("q", images="image", **options)
    assert told.select("to_send", "input_tokens", "cost_usd_max").row(0) == (2, None, None)
    with pytest.raises(pllm.BudgetExceeded, match="not known"):
        collected(frame, max_cost=100.0, **options)
    assert provider.bill().accepted == 0
    out = collected(frame.with_columns(image=pl.lit(None, pl.Binary)), max_cost=100.0, **options)
    assert out["response"].to_list() == ["a", "b"]


def test_who_is_not_sent_images_says_so_at_call() -> None:
    with pytest.raises(pllm.InvalidRequest, match="vllm is not asked with images"):
        pl.LazyFrame({"q": ["a"]}).llm.generate("q", model="vllm/org/name", images="q")


@pytest.mark.parametrize("given", [1, b"x", ["a"]])
def test_images_is_a_column(given: Any) -> None:
    with pytest.raises(pllm.InvalidRequest, match="neither a column's name nor an expression"):
        verbs.generate("q", model=MODEL, images=given)


def test_a_file_that_changes_meanwhile_is_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    column = pl.Series([[str(path)]])
    frame = pl.DataFrame({"images": images.as_sent(column), "attachments": images.digests(column)})
    assert [len(found) for found in images.of_rows(frame)] == [1]
    path.write_bytes(PNG + b"x")
    with pytest.raises(pllm.InvalidRequest, match="changed"):
        list(images.of_rows(frame))


@pytest.mark.parametrize("options", [{}, {"mode": "realtime"}])
def test_a_conversation_without_the_user_has_no_place_for_images(
    provider: testing.Provider, options: dict[str, Any]
) -> None:
    fine = [{"role": "user", "content": "q"}]
    talk = [{"role": "system", "content": "s"}, {"role": "assistant", "content": 'a "role":"user"'}]
    frame = pl.DataFrame({"q": [fine, None, talk, talk], "image": [PNG, PNG, PNG, None]})
    with pytest.raises(pllm.InvalidRequest, match=r"Row 2: .* no message from the user") as refused:
        collected(frame, **options)
    assert "Nothing was sent" in str(refused.value)
    assert provider.log() == []
    assert collected(frame.filter(pl.int_range(pl.len()) != 2), **options)["response"].null_count() == 1
