"""The Embeddings wire form: options -> body, replies -> vectors. Pure; no SDK, no network.

One input a request, so that a batch's 50,000 requests are its 50,000 inputs. Vectors are asked for as
decimals, which every host's batches have; base64 is read as well, where the user asks for it (``params``,
then it is part of the key) or a host sends it. Otherwise how vectors travel is not in the key.
"""

from __future__ import annotations

import binascii
import itertools
import sys
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply
from polars_llm.backends.wire import lines
from polars_llm.backends.wire.lines import merged, not_read, read_error
from polars_llm.errors import InvalidRequest
from polars_llm.request import Json, RequestHeader, Requests

__all__ = ["ENDPOINT", "WIDTHS", "body", "lengths", "read_reply", "render"]

ENDPOINT = "/v1/embeddings"

WIDTHS: Mapping[str, int] = {
    # developers.openai.com/api/docs/guides/embeddings: length of the vectors by default
    "text-embedding-3-small": 1_536,
    "text-embedding-3-large": 3_072,
    "text-embedding-ada-002": 1_536,
}
"""How long the vectors of a model are where nothing else is asked for."""

_FIXED = frozenset({"text-embedding-ada-002"})
"""Models that do not take ``dimensions``."""

_OURS = frozenset({"model", "input", "dimensions"})


def lengths(model: str, dimensions: int | None, own: int | None = None) -> tuple[int | None, int]:
    """What is sent as ``dimensions``, and how long the vectors will be.

    A model's own length is not sent: it is what comes anyway, and so the same request.

    Parameters
    ----------
    own
        The model's own length, where the user says it.

    Raises
    ------
    InvalidRequest
        At call: the length is neither given nor known, is no length, or is more than the model has.
    """
    own = own or WIDTHS.get(model)
    if dimensions is None:
        if own is None:
            raise InvalidRequest(
                f"The length of the vectors of {model!r} is not known",
                hint="pass dimensions=, which the host is asked for, or say how long they are anyway:"
                f" pllm.OpenAI({model!r}, vector_length=1024). Nothing was sent.",
            )
        return None, own
    wrong = None
    if isinstance(dimensions, bool) or not isinstance(dimensions, int) or dimensions < 1:
        wrong = f"dimensions is {dimensions!r}; it is a whole number from 1 up"
    elif own is not None and dimensions > own:
        wrong = f"dimensions is {dimensions:,}, and {model!r} has {own:,}"
    elif model in _FIXED and dimensions != own:
        wrong = f"{model!r} has {own:,} dimensions and takes no other number"
    if wrong:
        raise InvalidRequest(wrong, hint="dimensions= makes vectors shorter. Nothing was sent.")
    return (None if dimensions == own else dimensions), dimensions


def body(options: Options, *, limit_field: str = "") -> dict[str, Json]:  # noqa: ARG001 (chat has it)
    """Fields of the request body beside model and input; nothing that the user did not set."""
    return merged({"dimensions": options.dimensions}, options, _OURS)


def render(requests: Requests) -> Iterator[bytes]:
    """Request lines of a batch file, in the order of the rows."""
    return lines.render(requests, _inputs, _tails)


def _inputs(part: pl.DataFrame) -> Iterator[bytes]:
    encode = msgspec.json.Encoder().encode
    for text in part["prompt"].to_list():
        yield b'"input":' + encode(text)


def _tails(header: RequestHeader, part: pl.DataFrame) -> Iterator[bytes]:
    rest = b"," + msgspec.json.encode({"encoding_format": "float", **header.body})[1:]
    return itertools.repeat(rest, part.height)


# --- replies ------------------------------------------------------------------------------------


class _Vector(msgspec.Struct):
    embedding: msgspec.Raw


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None


class _Embeddings(msgspec.Struct):
    data: list[_Vector]
    model: str | None = None
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Embeddings)
_numbers = msgspec.json.Decoder(list[float])


def read_reply(status: int, raw: bytes) -> Reply:
    """One reply of the endpoint, whatever its status, as a row.

    The reply is kept without its numbers, which are in ``vector``.
    """
    if status != 200:
        return read_error(status, raw)
    try:
        reply = _decoder.decode(raw)
        (only,) = reply.data
        embedding = bytes(only.embedding)
        vector = _bits(embedding)
    except (msgspec.DecodeError, ValueError, OverflowError):
        return not_read("an embedding of one input", raw)
    return {
        "state": DONE,
        "finish_reason": "stop",
        "input_tokens": (reply.usage or _Usage()).prompt_tokens,
        "cached_input_tokens": 0,
        "output_tokens": 0,
        "model": reply.model,
        "vector": vector,
        "body": _without(raw, embedding),
    }


def _without(raw: bytes, embedding: bytes) -> bytes:
    """The reply with null in place of the numbers."""
    # Looking for the beginning alone: a search for thousands of bytes prepares for longer than it takes.
    at = raw.find(embedding[:64])
    after = at + len(embedding)
    return raw[:at] + b"null" + raw[after:] if raw[at:after] == embedding else raw


def _bits(embedding: bytes) -> bytes:
    """Little-endian Float32, from base64 or decimals."""
    if embedding.startswith(b'"'):
        data = binascii.a2b_base64(embedding[1:-1].replace(b"\\/", b"/"), strict_mode=True)
        if not data or len(data) % 4:
            raise binascii.Error
        return data
    numbers: Any = array("f", _numbers.decode(embedding))
    if not numbers:
        raise ValueError("no numbers")
    if sys.byteorder == "big":
        numbers.byteswap()
    return bytes(numbers)
