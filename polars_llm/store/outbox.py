"""Answers on their way to a shared place: on the local disk before they travel, so that none is lost.

A file here is removed once the place has it. What a process left that died, or could not reach the place,
is sent by whoever looks next.
"""

from __future__ import annotations

import re
import secrets
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import locks
from polars_llm.store.directory import os_errors, write_atomic

__all__ = ["Outbox"]

_NAME = re.compile(r"\d{20}-(?P<checksum>[0-9a-f]{8})-[0-9a-f]{16}")


class Outbox:
    """A directory of segments that have no name at the place yet.

    Parameters
    ----------
    directory
        Where; made when the first one is written.
    send
        Makes a segment durable at the place. Doing it twice is harmless.
    """

    def __init__(self, directory: Path, send: Callable[[memoryview], None]) -> None:
        self._directory = directory
        self._send = send

    def put(self, data: memoryview) -> None:
        """Send a segment; durable at the place on return, and in any case here.

        Raises
        ------
        CacheError
            The place cannot be written now, or this disk cannot.
        """
        with os_errors(self._directory):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / f"{time.time_ns():020d}-{zlib.crc32(data):08x}-{secrets.token_hex(8)}"
        with os_errors(path), locks.hold(path.with_suffix(".lock")):
            write_atomic(path, lambda file: _write(file, data))
            try:
                self._send(data)
            except CacheError as error:
                raise CacheError(
                    f"The answers that came are not stored yet: {str(error).partition(chr(10))[0]}",
                    path=error.path,
                    hint=f"they are safe in {path}; the same line, run again, stores them there once it can."
                    " Nothing of them is paid twice.",
                ) from error
            path.unlink(missing_ok=True)

    def flush(self) -> None:
        """Send what others left here. What somebody is sending just now is left to them.

        Raises
        ------
        CacheError, CacheCorrupt
            It cannot be sent, or a file is damaged.
        """
        try:
            found = sorted(self._directory.iterdir())
        except FileNotFoundError:
            return
        for path in found:
            if not _NAME.fullmatch(path.name):
                continue
            with os_errors(path), locks.try_hold(path.with_suffix(".lock")) as ours:
                # Its sender may have ended in between.
                if ours and path.exists():
                    self._send(_checked(path))
                    path.unlink(missing_ok=True)


def _checked(path: Path) -> memoryview:
    data = memoryview(path.read_bytes())
    found = _NAME.fullmatch(path.name)
    if found is None or found["checksum"] != f"{zlib.crc32(data):08x}":
        raise CacheCorrupt(
            f"{path} holds answers that were not stored yet, and it is damaged.",
            path=str(path),
            hint="move it away; then pllm.recover('openai') (or 'anthropic') reads them back from the"
            " provider. Nothing was sent.",
        )
    return data


def _write(file: BinaryIO, data: memoryview) -> None:
    file.write(data)
