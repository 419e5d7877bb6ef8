"""Files that were uploaded or produced: what is known of them, and reading a multipart body."""

from __future__ import annotations

import mmap
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec

from .dialogue import refuse
from .wire import Request, Slice

DAY = 86_400


class StoredFile(msgspec.Struct, kw_only=True):
    """One file, and where its bytes lie."""

    id: str
    filename: str
    purpose: str
    piece: Slice
    created: int
    expires: int | None
    owner: str

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.piece.size,
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "expires_at": self.expires,
            "status_details": None,
        }


class FileShelf:
    """All files of the provider, by id, in the order they came."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._files: dict[str, StoredFile] = {}
        self._spools = 0

    def new_path(self) -> Path:
        with self._lock:
            self._spools += 1
            return self._directory / f"spool-{self._spools}"

    def add(self, file: StoredFile) -> StoredFile:
        with self._lock:
            self._files[file.id] = file
        return file

    def get(self, file_id: str, owner: str | None) -> StoredFile | None:
        file = self._files.get(file_id)
        return file if file is not None and owner in (None, file.owner) else None

    def remove(self, file_id: str, *, keep_bytes: bool) -> None:
        with self._lock:
            file = self._files.pop(file_id)
        if not keep_bytes:
            file.piece.path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all, and remove all bytes."""
        with self._lock:
            self._files.clear()
            for path in self._directory.glob("spool-*"):
                path.unlink(missing_ok=True)

    def listing(self) -> list[StoredFile]:
        with self._lock:
            return list(self._files.values())

    @contextmanager
    def writing(self) -> Iterator[tuple[Path, IO[bytes]]]:
        path = self.new_path()
        with path.open("wb") as file:
            yield path, file


def stored(
    file_id: str, purpose: str, piece: Slice, owner: str, *, filename: str, lives: int | None
) -> StoredFile:
    now = int(time.time())
    return StoredFile(
        id=file_id,
        filename=filename,
        purpose=purpose,
        piece=piece,
        created=now,
        expires=None if lives is None else now + lives,
        owner=owner,
    )


_BOUNDARY = re.compile(r'boundary="?([^";]+)"?')
_NAME = re.compile(rb'[; ]name="([^"]*)"')
_FILENAME = re.compile(rb'filename="((?:[^"\\]|\\.)*)"')


def receive_form(request: Request, path: Path) -> tuple[dict[str, str], tuple[str, Slice] | None]:
    """Spool a multipart body to `path`: its fields, and (name, bytes) of its file.

    The file isn't copied out of the spooled body, only pointed at.
    """
    found = _BOUNDARY.search(request.headers.get("content-type", ""))
    if found is None:
        raise refuse("The request must be multipart/form-data with a boundary.")
    delimiter = b"--" + found[1].encode("latin-1")
    if request.spool(path) == 0:
        raise refuse("The request body is empty.")
    fields: dict[str, str] = {}
    file: tuple[str, Slice] | None = None
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as body:
        for head, start, end in _parts(body, delimiter):
            name = _NAME.search(head)
            filename = _FILENAME.search(head)
            if filename is not None:
                file = (filename[1].decode(), Slice(path, start, end - start))
            elif name is not None:
                fields[name[1].decode()] = body[start:end].decode()
    return fields, file


def _parts(body: mmap.mmap, delimiter: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each part's head, and where its content starts and ends."""
    at = body.find(delimiter)
    while at >= 0:
        start = at + len(delimiter)
        if body[start : start + 2] == b"--":
            return
        head_end = body.find(b"\r\n\r\n", start)
        following = body.find(b"\r\n" + delimiter, head_end)
        if head_end < 0 or following < 0:
            raise refuse("The multipart body ends too early.")
        # An empty content shares its CRLF with the delimiter that follows the head.
        yield body[start:head_end], head_end + 4, max(following, head_end + 4)
        at = following + 2
