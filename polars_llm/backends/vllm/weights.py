"""A model on disk as a digest: the same files under another path are the same model."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from polars_llm.errors import InvalidRequest

__all__ = ["directory_digest", "model_path"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")
# A fine-tuned copy has the same tensors' names, shapes and sizes: only the values tell it from its base.
# Reading them all takes minutes for a large model, so that they are sampled over the whole length.
_SAMPLES = 256
_SAMPLE_BYTES = 4_096
_LONGEST_HEADER = 64 << 20


def model_path(name: str) -> Path | None:
    """The directory or file that a model's name means, None for the name of a hub.

    Raises
    ------
    InvalidRequest
        At call: a path that is not there.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path.resolve()
    if name.startswith(("/", ".", "~")):
        raise InvalidRequest(
            f"There is no model at {name}",
            hint="give the directory that holds its config.json, or a name of the hub. Nothing was sent.",
        )
    return None


def directory_digest(path: Path) -> str:
    """32 hex digits: config, tokenizer and template in full, weights by header, size and samples."""
    digest = hashlib.blake2b(b"pllm/v1/model\n", digest_size=16)
    for name, file in _files(path):
        digest.update(f"{name}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            for part in _weights(opened) if file.suffix in _WEIGHTS else _whole(opened):
                digest.update(part)
    return digest.hexdigest()


def _files(path: Path) -> list[tuple[str, Path]]:
    """Everything that can matter, in an order of its own: no hidden files, no READMEs, no pictures."""
    if path.is_file():
        return [("model" + path.suffix, path)]
    kept = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", *_WEIGHTS)
    found = []
    for folder, names, files in os.walk(path):
        names[:] = [n for n in names if not n.startswith(".")]
        for name in files:
            file = Path(folder, name)
            if file.suffix in kept and not name.startswith("."):
                found.append((file.relative_to(path).as_posix(), file))
    return sorted(found)


def _whole(file: BinaryIO) -> Iterator[bytes]:
    while part := file.read(1 << 20):
        yield part


def _weights(file: BinaryIO) -> Iterator[bytes]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= _SAMPLES * _SAMPLE_BYTES:
        yield from _whole(file)
        return
    # A safetensors file begins with the length of its header.
    (header,) = struct.unpack("<Q", file.read(8))
    file.seek(0)
    yield file.read(8 + header if header <= min(size, _LONGEST_HEADER) else _SAMPLE_BYTES)
    for i in range(_SAMPLES):
        file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
        yield file.read(_SAMPLE_BYTES)
