"""HTTP/1.1 over plain sockets: one thread per connection, keep-alive, streamed bodies.

Smaller and quicker than `http.server` (whose header parsing costs more than answering does), and
able to misbehave on purpose: cut a body, leave out its length, hang up without a word.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

_BLOCK = 1 << 20
_REASONS = {status.value: status.phrase for status in HTTPStatus} | {529: "Overloaded"}


@dataclass(frozen=True, slots=True)
class Slice:
    """A stretch of a file on disk: an upload is one inside the multipart body it came in."""

    path: Path
    offset: int
    size: int

    def lines(self) -> Iterator[bytes]:
        """The lines, split at LF only, each with its LF."""
        left = self.size
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left > 0:
                line = file.readline(left)
                left -= len(line)
                yield line

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(slots=True)
class Response:
    """What goes back. `cut` is the share of the body sent before the connection is closed."""

    status: int
    body: bytes | Slice = b""
    headers: dict[str, str] = field(default_factory=dict)
    framing: Literal["length", "chunked", "close"] = "length"
    cut: float | None = None
    takeover: Callable[[BufferedIOBase, BufferedIOBase], None] | None = None


class Hangup(Exception):
    """Close the connection without a reply."""


@dataclass(slots=True)
class Request:
    """One request, its body still on the wire until `read` or `spool`."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    peer: tuple[str, int]
    stream: BodyReader

    def read(self) -> bytes:
        return b"".join(self.stream.blocks())

    def spool(self, path: Path) -> int:
        """Write the body to `path`, block by block, and give its size."""
        with path.open("wb") as file:
            return sum(file.write(block) for block in self.stream.blocks())

    def drain(self) -> None:
        for _ in self.stream.blocks():
            pass


class BodyReader:
    """A request's body, by Content-Length or chunked, read once."""

    def __init__(self, source: BufferedIOBase, headers: dict[str, str], proceed: BufferedIOBase) -> None:
        self._source = source
        self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        self.length = int(headers.get("content-length") or 0)
        self._left = self.length
        self._done = not self._chunked and self.length == 0
        self._proceed = proceed if headers.get("expect", "").lower() == "100-continue" else None

    def blocks(self) -> Iterator[bytes]:
        if self._done:
            return
        if self._proceed is not None:
            self._proceed.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._done = True
        yield from self._chunks() if self._chunked else self._counted(self._left)

    def _counted(self, left: int) -> Iterator[bytes]:
        while left > 0:
            block = self._source.read(min(left, _BLOCK))
            if not block:
                raise ConnectionResetError("the client hung up inside its request")
            left -= len(block)
            yield block

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._source.readline(1024).split(b";")[0], 16):
            yield from self._counted(size)
            self._source.readline(1024)
        while self._source.readline(65536) not in (b"\r\n", b"\n", b""):
            pass


class Server(socketserver.ThreadingTCPServer):
    """Listens, and gives every connection a thread of its own."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2048

    def __init__(self, address: tuple[str, int], app: Callable[[Request], Response]) -> None:
        self.app = app
        super().__init__(address, _Connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away is everyday life here; anything else is a bug to be seen.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Connection(socketserver.StreamRequestHandler):
    disable_nagle_algorithm = True
    rbufsize = 1 << 16

    def handle(self) -> None:
        while self._exchange():
            pass

    def finish(self) -> None:
        # Where the client has gone, there is nobody to finish for.
        with contextlib.suppress(OSError):
            super().finish()

    def _exchange(self) -> bool:
        request = self._read_head()
        if request is None:
            return False
        assert isinstance(self.server, Server)
        try:
            response = self.server.app(request)
        except Hangup:
            return False
        request.drain()
        if response.takeover is not None:
            self.wfile.write(_head(response, 0, keep=True))
            response.takeover(self.rfile, self.wfile)
            return False
        keep = request.headers.get("connection", "").lower() != "close"
        return self._send(response, keep=keep and request.method != "HEAD")

    def _read_head(self) -> Request | None:
        line = self.rfile.readline(65536)
        if not line.strip():
            return None
        method, target, *_ = line.decode("latin-1").split()
        headers: dict[str, str] = {}
        while (line := self.rfile.readline(65536)) not in (b"\r\n", b"\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True)) if parts.query else {}
        stream = BodyReader(self.rfile, headers, self.wfile)
        return Request(method, unquote(parts.path), query, headers, self.client_address, stream)

    def _send(self, response: Response, *, keep: bool) -> bool:
        size = response.body.size if isinstance(response.body, Slice) else len(response.body)
        whole = response.cut is None
        send = size if response.cut is None else min(int(size * response.cut), max(size - 1, 0))
        keep = keep and whole and response.framing != "close"
        head = _head(response, size, keep=keep)
        if response.framing == "chunked":
            self._send_chunked(head, response.body, send, whole=whole)
        elif isinstance(response.body, Slice):
            self.wfile.write(head)
            self._send_file(response.body, send)
        else:
            self.wfile.write(head + response.body[:send])
        return keep

    def _send_file(self, piece: Slice, size: int) -> None:
        with piece.path.open("rb") as file:
            if size:
                self.request.sendfile(file, piece.offset, size)

    def _send_chunked(self, head: bytes, body: bytes | Slice, size: int, *, whole: bool) -> None:
        data = memoryview(body.read() if isinstance(body, Slice) else body)[:size]
        self.wfile.write(head)
        for start in range(0, size, 1 << 16):
            block = data[start : start + (1 << 16)]
            self.wfile.write(b"%x\r\n" % len(block) + block + b"\r\n")
        if whole:
            self.wfile.write(b"0\r\n\r\n")


def _head(response: Response, size: int, *, keep: bool) -> bytes:
    status = response.status
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in response.headers.items()]
    if response.framing == "length":
        lines.append(f"content-length: {size}")
    elif response.framing == "chunked":
        lines.append("transfer-encoding: chunked")
    lines.append(f"connection: {'keep-alive' if keep else 'close'}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def process_behind(peer: tuple[str, int]) -> int:
    """The process at the other end of a loopback connection (Linux only)."""
    number = int.from_bytes(socket.inet_aton(peer[0]), sys.byteorder)
    local = f"{number:08X}:{peer[1]:04X}"
    table = Path("/proc/net/tcp").read_text().splitlines()[1:]
    inodes = {f"socket:[{row[9]}]" for row in map(str.split, table) if row[1] == local}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            held = {str(entry.readlink()) for entry in (process / "fd").iterdir()}
        except OSError:
            continue  # It ended meanwhile, or belongs to somebody else.
        if inodes & held:
            return int(process.name)
    raise ProcessLookupError(f"no process holds the connection from {peer[0]}:{peer[1]}")
