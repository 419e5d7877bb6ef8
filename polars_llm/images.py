"""Images of a row: what they are, their digest in the key (format v1), and how they are read when sent.

An image is bytes (a Binary value, a file, a data URL: all the same in the key) or an http(s) address,
which nobody here fetches: it enters the key as its text. The digest of a row's images is::

    part        = "b" blake3 of the bytes, or "u" blake3 of the address
    attachments = blake3("pllm/v1/images" NL part part ...)

Digests enter as 64 lowercase hex characters, so no two lists of images are joined to the same text. A
row without images has no digest.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import itertools
import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from polars_llm.errors import InvalidRequest
from polars_llm.request import blake3

__all__ = [
    "LIMITS",
    "Image",
    "ImageLimits",
    "Link",
    "as_sent",
    "digests",
    "media_type",
    "of_rows",
    "with_parts",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """An image that travels with the request."""

    media_type: str
    data: bytes

    @property
    def base64(self) -> str:
        """The bytes as JSON can carry them."""
        return base64.b64encode(self.data).decode()

    @property
    def url(self) -> str:
        """The bytes as a data URL."""
        return f"data:{self.media_type};base64,{self.base64}"


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """An image that the provider fetches."""

    url: str


@dataclasses.dataclass(frozen=True, slots=True)
class ImageLimits:
    """What a provider takes.

    Parameters
    ----------
    count
        Images in one request.
    size_bytes
        Of one image in base64; None if there is only the limit of the whole request.
    """

    count: int
    size_bytes: int | None = None


LIMITS: Mapping[str, ImageLimits] = {
    # developers.openai.com/api/docs/guides/images-vision: 1,500 images and 512 MB a request
    "openai": ImageLimits(count=1_500),
    # platform.claude.com/docs/en/build-with-claude/vision: 600 images, 10 MB each in base64
    "anthropic": ImageLimits(count=600, size_bytes=10 * 1024 * 1024),
}

_MAGIC: Sequence[tuple[str, bytes]] = (
    ("image/png", b"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", b"\xff\xd8\xff"),
    ("image/gif", b"GIF87a"),
    ("image/gif", b"GIF89a"),
)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
# So many bytes of files are held at once to be hashed together.
_AT_ONCE = 32 * 1024 * 1024


def media_type(data: bytes) -> str | None:
    """Type by the first bytes, whatever a name or a data URL says; None if it is none of the four."""
    for name, magic in _MAGIC:
        if data.startswith(magic):
            return name
    return "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def digests(images: pl.Series, limits: ImageLimits | None = None) -> pl.Series:
    """The digest of each row's images, null where it has none; reads every file once.

    Parameters
    ----------
    images
        List of Binary or List of String (path, http(s) address or data URL). Null items are no images.
    limits
        Of the provider.

    Raises
    ------
    InvalidRequest
        A file that cannot be read, bytes that are no image, or more than the provider takes. The
        message names the row.
    """
    flat = pl.DataFrame({"row": pl.int_range(images.len(), eager=True), "item": images})
    flat = flat.explode("item", empty_as_null=False).drop_nulls("item")
    if limits is not None:
        _check_count(flat, limits)
    binary = flat.schema["item"] == pl.Binary
    parts = _of_bytes(flat, limits) if binary else _of_texts(flat, limits)
    joined = pl.concat_str(pl.lit("pllm/v1/images\n"), pl.col("part").str.join(""))
    per_row = parts.group_by("row", maintain_order=True).agg(joined.first().alias("text"))
    known = per_row.select("row", digest=blake3(pl.col("text")))
    rows = pl.DataFrame({"row": pl.int_range(images.len(), eager=True)})
    return rows.join(known, on="row", how="left", maintain_order="left")["digest"]


def _of_bytes(flat: pl.DataFrame, limits: ImageLimits | None) -> pl.DataFrame:
    """``row``, ``part`` of Binary items, without a Python object for any of them."""
    data = pl.col("item")
    known = pl.any_horizontal(data.bin.starts_with(magic) for _, magic in _MAGIC)
    webp = data.bin.starts_with(b"RIFF") & (data.bin.slice(8, 4) == b"WEBP")
    strange = flat.filter(~(known | webp)).head(1)
    for row, item in strange.iter_rows():
        raise _no_image(row, f"{len(item):,} bytes")
    if limits is not None and limits.size_bytes is not None:
        for row, size in flat.select("row", data.bin.size()).iter_rows():
            _check_size(row, size, limits)
    return flat.select("row", part=pl.concat_str(pl.lit("b"), blake3(data)))


def _of_texts(flat: pl.DataFrame, limits: ImageLimits | None) -> pl.DataFrame:
    """``row``, ``part`` of paths, addresses and data URLs; each different one is read once."""
    once = flat.unique("item", keep="first", maintain_order=True)
    kinds, hashes, waiting, held = [], [], [], 0
    for row, item in once.iter_rows():
        read = _read(item, row)
        if isinstance(read, Image):
            _check_size(row, len(read.data), limits)
        kinds.append("b" if isinstance(read, Image) else "u")
        waiting.append(read.data if isinstance(read, Image) else read.url.encode())
        held += len(waiting[-1])
        if held > _AT_ONCE:
            hashes.append(_hashed(waiting))
            waiting, held = [], 0
    hashes.append(_hashed(waiting))
    parts = once.select("item", part=pl.Series(kinds, dtype=pl.String) + pl.concat(hashes))
    return flat.join(parts, on="item", how="left", maintain_order="left").select("row", "part")


def _hashed(data: list[bytes]) -> pl.Series:
    return pl.DataFrame({"data": data}, schema={"data": pl.Binary}).select(blake3(pl.col("data"))).to_series()


def as_sent(images: pl.Series) -> pl.Series:
    """Images as the frame of `Requests` has them: of one dtype, whatever the user's column was."""
    item = pl.element()
    binary = images.dtype == pl.List(pl.Binary)
    given = {"data": item} if binary else {"text": item}
    other = {"text": pl.lit(None, pl.String)} if binary else {"data": pl.lit(None, pl.Binary)}
    fields = {**given, **other}
    return images.list.eval(pl.struct(fields["data"].alias("data"), fields["text"].alias("text")))


def of_rows(requests: pl.DataFrame) -> Iterator[Sequence[Image | Link]]:
    """The images of each row of a `Requests` frame, read one row at a time as they are asked for.

    Raises
    ------
    InvalidRequest
        A file is not what it was when its key was computed.
    """
    if "images" not in requests.columns:
        yield from itertools.repeat((), requests.height)
        return
    for items, digest in zip(requests["images"], requests["attachments"], strict=True):
        if digest is None:
            yield ()
            continue
        given = [item["text"] if item["data"] is None else item["data"] for item in items]
        found = [_read(item) for item in given if item is not None]
        if any(isinstance(item, str) for item in given) and _digest(found) != digest:
            raise InvalidRequest(
                "An image file changed while it was being sent.",
                hint="run the same line again when nobody writes to the files. Its request was not sent.",
            )
        yield found


def with_parts(
    kind: str,
    prompt: str,
    images: Sequence[Image | Link],
    parts: Callable[[str, Sequence[Image | Link]], list[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """The messages of a request with images: they belong to the last message from the user.

    Parameters
    ----------
    kind, prompt
        As in the frame of `Requests`.
    images
        As `of_rows` gives them.
    parts
        The provider's content for that message's text and the images.

    Raises
    ------
    InvalidRequest
        A conversation in which the user says nothing.
    """
    if kind != "m":
        return [{"role": "user", "content": parts(prompt, images)}]
    messages: list[dict[str, Any]] = msgspec.json.decode(prompt)
    for message in reversed(messages):
        if message["role"] == "user":
            message["content"] = parts(message["content"], images)
            return messages
    raise InvalidRequest(
        "A conversation has images and no message from the user that they could belong to.",
        hint="give it a message with role 'user', or null images. Its request was not sent.",
    )


def _digest(images: Sequence[Image | Link]) -> str:
    """As `digests` has it, for one row."""
    data = [i.data if isinstance(i, Image) else i.url.encode() for i in images]
    kinds = ["b" if isinstance(i, Image) else "u" for i in images]
    text = "".join(kind + digest for kind, digest in zip(kinds, _hashed(data), strict=True))
    return str(_hashed([b"pllm/v1/images\n" + text.encode()]).item())


def _read(item: bytes | str, row: int | None = None) -> Image | Link:
    if isinstance(item, str) and _WEB.match(item):
        return Link(item)
    data = item if isinstance(item, bytes) else _bytes_of(item, row)
    kind = media_type(data)
    if kind is None:
        raise _no_image(row, _shown(item) if isinstance(item, str) else f"{len(data):,} bytes")
    return Image(kind, data)


def _bytes_of(item: str, row: int | None) -> bytes:
    """The bytes of a data URL or a file."""
    if item[:5].lower() == "data:":
        return _bytes_of_data_url(item, row)
    scheme = _SCHEME.match(item)
    if scheme is not None:
        raise InvalidRequest(
            f"{_at(row)}nobody here reads images from {scheme[1]}:// addresses: {_shown(item)}",
            hint="give a path, an http(s) address, a data URL, or the bytes themselves. Nothing was sent.",
        )
    try:
        path = Path(item).expanduser()
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise ValueError("it is no file")  # reading a pipe waits for somebody who writes
        return path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(
            f"{_at(row)}the image {_shown(item)} cannot be read: {why}",
            hint="paths are relative to the working directory of this process. Nothing was sent.",
        ) from error


def _bytes_of_data_url(item: str, row: int | None) -> bytes:
    head, comma, body = item.partition(",")
    try:
        if not comma:
            raise ValueError
        if head.lower().endswith(";base64"):
            return base64.b64decode(urllib.parse.unquote_to_bytes(body), validate=True)
        return urllib.parse.unquote_to_bytes(body)
    except (ValueError, binascii.Error):
        raise InvalidRequest(
            f"{_at(row)}the image {_shown(item)} is not a data URL that can be decoded",
            hint="for example 'data:image/png;base64,iVBORw0...'. Nothing was sent.",
        ) from None


def _check_count(flat: pl.DataFrame, limits: ImageLimits) -> None:
    many = flat.group_by("row").len().filter(pl.col("len") > limits.count).sort("row").head(1)
    for row, count in many.iter_rows():
        raise InvalidRequest(
            f"{_at(row)}{count:,} images, and the provider takes {limits.count:,} in one request",
            hint="split the row. Nothing was sent.",
        )


def _check_size(row: int, size: int, limits: ImageLimits | None) -> None:
    if limits is None or limits.size_bytes is None:
        return
    encoded = (size + 2) // 3 * 4
    if encoded > limits.size_bytes:
        raise InvalidRequest(
            f"{_at(row)}an image of {size:,} bytes, {encoded:,} in base64, and the provider takes"
            f" {limits.size_bytes:,}",
            hint="make it smaller; models scale large images down anyway. Nothing was sent.",
        )


def _no_image(row: int | None, what: str) -> InvalidRequest:
    return InvalidRequest(
        f"{_at(row)}{what} is not an image",
        hint="providers take PNG, JPEG, GIF and WebP, known by their first bytes. Nothing was sent.",
    )


def _at(row: int | None) -> str:
    return "" if row is None else f"Row {row}: "


def _shown(item: str) -> str:
    return repr(item if len(item) <= 120 else item[:60] + "...")
