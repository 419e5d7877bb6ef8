"""What is asked and answered: prompts, answers, a cache that holds them, and digests of results."""

from __future__ import annotations

import hashlib
import random
import urllib.request
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

if TYPE_CHECKING:
    from polars_llm.testing import Provider

MODEL = "gpt-6-luna"
CHARACTERS = 400
_SEGMENT = 50_000
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def texts(rows: int, *, seed: int, mark: str, first: int = 0) -> pl.Series:
    """Distinct texts of `CHARACTERS` characters, numbered from `first`, of words as frequent as words are.

    Words are drawn afresh for each row, so that the texts compress like text and not better.
    """
    chance = random.Random(seed)
    kinds = 20_000
    words = [
        "".join(chance.choices(_LETTERS, weights=range(26, 0, -1), k=chance.randint(2, 10)))
        for _ in range(kinds)
    ]
    drawn = pl.Series(chance.choices(words, weights=[1 / (i + 2) for i in range(kinds)], k=1 << 18))
    most = CHARACTERS // 2 - 20
    parts = []
    for start in range(first, first + rows, _SEGMENT):
        here = min(_SEGMENT, first + rows - start)
        places = pl.int_range(start * most, (start + here) * most).hash(seed) % drawn.len()
        body = drawn.gather(pl.select(places).to_series()).reshape((here, most)).arr.join(" ")
        number = pl.int_range(start, start + here).cast(pl.String).str.zfill(10)
        text = pl.concat_str(pl.lit(mark), number, pl.lit(" "), body).str.slice(0, CHARACTERS)
        parts.append(pl.select(text).to_series())
    return pl.concat(parts).alias("prompt").rechunk()


def write_input(rows: int, path: Path) -> pl.Series:
    """The user's frame: an id and a prompt a row."""
    prompts = texts(rows, seed=1, mark="p")
    pl.DataFrame({"id": pl.int_range(rows, eager=True), "prompt": prompts}).write_parquet(path)
    return prompts


def fill_cache(directory: Path, prompts: pl.Series, *, first: int = 0) -> None:
    """Put an answer to each prompt into a cache, in segments as ingesting batches makes them.

    The model is OpenAI's own, so evaluating needs neither key nor network.
    """
    from polars_llm.request import key_hex
    from polars_llm.store import open_store

    store = open_store(directory)
    store.directory.prepare()
    answers = texts(prompts.len(), seed=2, mark="a", first=first)
    header = header_digest()
    for start in range(0, prompts.len(), _SEGMENT):
        part = pl.DataFrame({"prompt": prompts, "text": answers}).slice(start, _SEGMENT)
        key = key_hex(header, pl.col("prompt")).str.decode("hex")
        store.results.add(_answers(part.select("text", key=key), f"job_{first + start}"))


def header_digest(base_url: str | None = None) -> str:
    """What the key holds of the model, without options, at OpenAI's own address or another one."""
    import polars_llm
    from polars_llm.backends.options import Options

    address = base_url or "https://api.openai.com/v1"
    return str(polars_llm.OpenAI(MODEL, base_url=address).backend().header(Options()).digest())


def key_head(base_url: str | None = None) -> str:
    """The constant part of a key in format v1: header, kind text, no system, sample 0, no images.

    Written out here a second time, as the floor's author would have to: the digests tell if it differs.
    """
    from polars_hash import CryptographicHashingNameSpace as Hash

    absent = "0" * 64
    text = f"pllm/v1/request\n{header_digest(base_url)}t{absent}{0:020d}{absent}"
    return str(pl.select(Hash(pl.lit(text)).blake3()).item())


def _answers(part: pl.DataFrame, job: str) -> pl.DataFrame:
    from polars_llm.answer import ANSWER_SCHEMA

    facts = {
        "state": 0,
        "attempt": 1,
        "finish_reason": "stop",
        "input_tokens": 100,
        "cached_input_tokens": 0,
        "output_tokens": 100,
        "provider": "openai",
        "model": MODEL,
        "job_id": job,
        "received_at": datetime(2026, 11, 21, tzinfo=UTC),
    }
    body = pl.concat_str(
        pl.lit(
            '{"id":"chatcmpl-1","object":"chat.completion","created":1795227726,"model":"' + MODEL + '",'
            '"choices":[{"index":0,"message":{"role":"assistant","content":"'
        ),
        pl.col("text"),
        pl.lit(
            '","refusal":null},"finish_reason":"stop"}],"usage":{"prompt_tokens":100,'
            '"completion_tokens":100,"total_tokens":200}}'
        ),
    )
    known = part.with_columns(body.alias("body"), *(pl.lit(v).alias(n) for n, v in facts.items()))
    missing = [pl.lit(None).alias(n) for n in ANSWER_SCHEMA if n not in known.columns]
    return known.with_columns(missing).select(pl.col(n).cast(t) for n, t in ANSWER_SCHEMA.items())


def digest_of(answers: pl.Series) -> str:
    """Of a column: its values and their order."""
    return hashlib.sha256(answers.hash().to_arrow().buffers()[1]).hexdigest()


def digest_of_files(server: Provider, file_ids: Iterable[str]) -> str:
    """Of the request lines in uploaded files, whichever file they came in."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.addheaders = [("Authorization", f"Bearer {server.env['OPENAI_API_KEY']}")]
    lines: list[bytes] = []
    for file_id in file_ids:
        with direct.open(f"{server.openai_base_url}/files/{file_id}/content") as reply:
            lines += reply.read().rstrip(b"\n").split(b"\n")
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()
