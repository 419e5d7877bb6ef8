"""A request and its name: the canonical form, the key (format v1) and the custom_id.

The key is blake3 over fixed-width digests, so no joined text can be read in two ways::

    header   = blake3("pllm/v1/header" NL canonical JSON of what is constant over the column)
    head     = blake3("pllm/v1/request" NL header  kind  system  sample  attachments)
    key      = blake3(head  prompt)
    retry    = blake3("pllm/v1/retry" NL key)

Digests enter as 64 lowercase hex characters, `kind` as one letter (``t`` text, ``m`` messages), `sample`
as 20 decimal digits, an absent system or attachment as 64 zeros (an empty system is not an absent one).
A header has its schema only if it has one. A request that is made because the answer to another did not fit
their schema has the key `retry` of that other's.
Text is hashed as its UTF-8 bytes, with no Unicode normalisation: the model sees the difference.
What the digest of attachments is made of: `polars_llm.images`.

`tests/test_request.py` freezes v1 with golden vectors. A key that changes costs users money.
"""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import msgspec
import polars as pl
from polars_hash import CryptographicHashingNameSpace

from polars_llm.errors import InvalidRequest

__all__ = [
    "CUSTOM_ID_PREFIX",
    "Json",
    "RequestHeader",
    "Requests",
    "blake3",
    "canonical",
    "conversation",
    "custom_id",
    "custom_ids",
    "key_from_custom_id",
    "key_hex",
    "key_prefix",
    "retry_key",
]

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

CUSTOM_ID_PREFIX = "pllm1-"
"""Marks a request as ours and versions the format; 43 base64url characters of the key follow."""

_ABSENT = "0" * 64
_encode = msgspec.json.Encoder().encode
_CUSTOM_ID_LENGTH = len(CUSTOM_ID_PREFIX) + 43


def canonical(value: Any, path: str = "params") -> Json:
    """Return `value` in the one form that is hashed and sent.

    Mappings are sorted by key, tuples become lists, a float that is a whole number becomes an int
    (``0.0`` is ``0``, on the wire too), ``bool`` stays ``bool``.

    Raises
    ------
    InvalidRequest
        At call: NaN and infinities, keys that are not strings, text that is not Unicode (lone
        surrogates), and types that JSON does not have.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequest(
                f"{path} is {value!r}, which JSON cannot say",
                hint="give a finite number. Nothing was sent.",
            )
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, str):
        return _unicode(value, path)
    if isinstance(value, Mapping):
        items = {}
        for name in value:
            if not isinstance(name, str):
                raise InvalidRequest(
                    f"{path} has the key {name!r}, and keys in JSON are strings",
                    hint="make every key a string. Nothing was sent.",
                )
            items[_unicode(name, path)] = canonical(value[name], f"{path}.{name}")
        return {name: items[name] for name in sorted(items)}
    if isinstance(value, (list, tuple)):
        return [canonical(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise InvalidRequest(
        f"{path} is a {type(value).__name__}, which JSON cannot say",
        hint="use None, bool, int, float, str, lists and dicts. Nothing was sent.",
    )


def _unicode(text: str, path: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"{path} holds a lone surrogate, which is not Unicode text",
            hint="decode the text with errors='replace' first. Nothing was sent.",
        ) from None
    return text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestHeader:
    """What is constant over a column and can change the answer.

    Parameters
    ----------
    provider
        ``"openai"``, ``"anthropic"``, ``"vllm"`` (local and Ray alike).
    base_url
        None for the provider's own host; else normalised, without user info and query.
    endpoint
        For example ``"/v1/chat/completions"``.
    model
        The model's name for that provider.
    body
        Canonical fields of the request body beside model and messages.
    headers
        Headers that change answers (API version, betas), lower-case names.
    schema
        Text of the JSON Schema that the answer must obey, as it goes on the wire: property order is
        part of it. It enters the digest only where it is set.
    """

    provider: str
    base_url: str | None
    endpoint: str
    model: str
    body: Mapping[str, Json] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    schema: str | None = None

    def digest(self) -> str:
        """Hex blake3 of the canonical header."""
        facts = canonical(
            {k: v for k, v in dataclasses.asdict(self).items() if k != "schema" or v is not None}, "request"
        )
        return _blake3_of("pllm/v1/header\n" + _canonical_json(facts))


def _canonical_json(value: Json) -> str:
    """JSON text of a canonical value: sorted, no spaces, no escapes but those JSON demands."""
    # msgspec writes floats in the shortest form that reads back, and raw non-ASCII text.
    return msgspec.json.encode(value).decode()


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """Distinct requests under one header.

    Parameters
    ----------
    header
        What they have in common.
    frame
        One row a request: ``key`` Binary (32 bytes), ``attempt`` UInt16 (1 for the first),
        ``prompt`` String (or, where `kind` is ``"m"``, the messages as canonical JSON), ``kind``
        String, ``system`` String or null, ``sample`` Int64 (what a set seed is raised by). With a schema
        also ``retry`` Int64: how many answers to the same request did not fit. Where rows may have
        images: ``images`` and ``attachments`` (their digest), for `polars_llm.images.of_rows`.
    """

    header: RequestHeader
    frame: pl.DataFrame

    def keys_only(self) -> Requests:
        """The same without its texts: for who remembers what was asked."""
        return Requests(self.header, self.frame.select("key"))

    @property
    def height(self) -> int:
        """Number of requests."""
        return self.frame.height

    @property
    def has_images(self) -> bool:
        """True if any has; nobody here knows how many tokens an image is."""
        return "attachments" in self.frame.columns and self.frame["attachments"].count() > 0


def blake3(expr: pl.Expr) -> pl.Expr:
    """Hex blake3 of each text's UTF-8 bytes; null stays null."""
    return CryptographicHashingNameSpace(expr).blake3()


def _blake3_of(text: str) -> str:
    return cast("str", pl.DataFrame({"t": [text]}).select(blake3(pl.col("t"))).item())


def key_hex(
    header: str,
    prompt: pl.Expr,
    *,
    kind: str | pl.Expr = "t",
    system: str | pl.Expr | None = None,
    sample: int | pl.Expr = 0,
    attachments: pl.Expr | None = None,
) -> pl.Expr:
    """The key of each row as 64 hex characters; a null prompt has no key.

    Parameters
    ----------
    header
        `RequestHeader.digest`.
    prompt
        String.
    kind, system, sample
        A constant, or an expression for one per row.
    attachments
        Hex digest of a row's images, null where it has none.
    """
    constant = not any(isinstance(part, pl.Expr) for part in (kind, system, sample, attachments))
    parts = [
        pl.lit("pllm/v1/request\n" + header),
        kind if isinstance(kind, pl.Expr) else pl.lit(kind),
        _system_digest(system),
        _sample_digits(sample),
        pl.lit(_ABSENT) if attachments is None else attachments.fill_null(_ABSENT),
    ]
    head = blake3(pl.concat_str(parts))
    if constant:
        head = pl.lit(pl.select(head).item())
    return blake3(pl.concat_str(head, blake3(prompt)))


def _system_digest(system: str | pl.Expr | None) -> pl.Expr:
    if system is None:
        return pl.lit(_ABSENT)
    if isinstance(system, str):
        return pl.lit(_blake3_of(system))
    return blake3(system).fill_null(_ABSENT)


def _sample_digits(sample: int | pl.Expr) -> pl.Expr:
    if isinstance(sample, int):
        return pl.lit(f"{sample:020d}")
    return sample.cast(pl.String).str.zfill(20)


def retry_key(key_as_hex: pl.Expr) -> pl.Expr:
    """The key of the same request asked again, because the answer to this one did not fit its schema."""
    return blake3(pl.concat_str(pl.lit("pllm/v1/retry\n"), key_as_hex))


def key_prefix(key_as_hex: pl.Expr) -> pl.Expr:
    """The first 16 bytes of a key as UInt128, the form in which keys are looked up."""
    return key_as_hex.str.slice(0, 32).str.to_integer(base=16, dtype=pl.UInt128)


def custom_ids(key: pl.Expr) -> pl.Expr:
    """Binary keys as custom_ids: 49 characters that every provider takes."""
    text = key.bin.encode("base64").str.slice(0, 43)
    for old, new in (("+", "-"), ("/", "_")):
        text = text.str.replace_all(old, new, literal=True)
    return pl.concat_str(pl.lit(CUSTOM_ID_PREFIX), text)


def custom_id(key: bytes) -> str:
    """One key as a custom_id."""
    return CUSTOM_ID_PREFIX + base64.urlsafe_b64encode(key).rstrip(b"=").decode()


def key_from_custom_id(text: str) -> bytes | None:
    """The key in a custom_id, or None if the id is not one of ours."""
    if len(text) != _CUSTOM_ID_LENGTH or not text.startswith(CUSTOM_ID_PREFIX):
        return None
    try:
        key = base64.b64decode(text[len(CUSTOM_ID_PREFIX) :] + "=", altchars=b"-_", validate=True)
    except ValueError:
        return None
    # Two spellings of the last character decode to one key; only ours is ours.
    return key if custom_id(key) == text else None


def conversation(
    roles: Sequence[str], contents: Sequence[str], system: str | None = None
) -> tuple[str, str | None, str]:
    """A whole conversation in the one form that is hashed and sent.

    A system prompt that is given comes before the conversation's own messages; where none is given, a
    system message at the beginning is it. What is then no more than one message from the user is the
    same request as that text.

    Parameters
    ----------
    roles, contents
        Of each message.
    system
        The row's system prompt beside the conversation.

    Returns
    -------
    tuple
        kind, system and prompt, as in the frame of `Requests`.
    """
    first = int(system is None and len(roles) > 1 and roles[0] == "system")
    if first:
        system = contents[0]
    if len(roles) == first + 1 and roles[first] == "user":
        return "t", system, contents[first]
    messages = [
        {"content": content, "role": role}
        for role, content in zip(roles[first:], contents[first:], strict=True)
    ]
    return "m", system, _encode(messages).decode()
