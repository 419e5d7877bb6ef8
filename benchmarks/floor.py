"""The floor: what somebody would write by hand for the same inputs and outputs, with bare Polars.

    python benchmarks/floor.py warm INPUT SEGMENTS HEAD
    python benchmarks/floor.py cold INPUT DIRECTORY HEAD

It computes the same keys, because it reads the same segments and sends the same bytes, and it takes no
shortcut that users of the library don't get. What it leaves out is what the library is for: it does
not know what is in flight, what failed, what was sent before, what a crash leaves behind; keys must
be unique, and every answer must be there.

HEAD is the part of the key that is constant over a column.
"""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
from data import MODEL, digest_of
from polars_hash import CryptographicHashingNameSpace as Hash
from rounds import Stopwatch, report

_ENDPOINT = "/v1/chat/completions"
_BATCH = 50_000


def _key(head: str) -> pl.Expr:
    return Hash(pl.concat_str(pl.lit(head), Hash(pl.col("prompt")).blake3())).blake3()


def warm(source: str, segments: str, head: str) -> None:
    """Hash, scan, join."""
    frame = pl.read_parquet(source)
    watch = Stopwatch()
    # 16 bytes of a key are enough to tell keys apart, and join faster than 32. Each step is left to the
    # in-memory engine: one streaming plan of all three takes a fifth longer.
    key = _key(head).str.slice(0, 32).str.to_integer(base=16, dtype=pl.UInt128)
    keys = frame.select(key=key)
    known = pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")
    answers = pl.scan_parquet(f"{segments}/*.parquet").select(key=known, response="text")
    laid = keys.join(answers.collect(engine="in-memory"), on="key", how="left", maintain_order="left")
    answered = frame.with_columns(laid["response"])
    watch.stop()
    report(watch, digest=digest_of(answered["response"]), nulls=answered["response"].null_count())


def cold(source: str, directory: str, head: str) -> None:
    """Hash, encode, write, fsync, upload, create."""
    import os

    frame = pl.read_parquet(source)
    watch = Stopwatch()
    import msgspec
    import openai

    client = openai.OpenAI()
    encode = msgspec.json.Encoder().encode
    text = _key(head).str.decode("hex").bin.encode("base64").str.slice(0, 43)
    text = text.str.replace_all("+", "-", literal=True).str.replace_all("/", "_", literal=True)
    named = frame.select("prompt", name=pl.concat_str(pl.lit("pllm1-"), text))
    for number, part in enumerate(named.iter_slices(_BATCH)):
        path = Path(directory) / f"{number}.jsonl"
        with path.open("wb") as file:
            for prompt, name in part.iter_rows():
                body = {"model": MODEL, "messages": [{"role": "user", "content": prompt}]}
                line = {"custom_id": name, "method": "POST", "url": _ENDPOINT, "body": body}
                file.write(encode(line) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        with path.open("rb") as file:
            uploaded = client.files.create(file=(path.name, file, "application/jsonl"), purpose="batch")
        client.batches.create(
            input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
    watch.stop()
    report(watch)


if __name__ == "__main__":
    {"warm": warm, "cold": cold}[sys.argv[1]](*sys.argv[2:])
