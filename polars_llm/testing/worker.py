"""The parent's side of a `model=` callable: a thread that answers the server's parcels."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from .dialogue import Failure, ModelRequest, Reply, reply_from

_requests = msgspec.json.Decoder(list[ModelRequest])
_encode = msgspec.json.Encoder().encode
_JOIN_SECONDS = 5.0


class Worker:
    """Runs the callable here, where its closure lives, one request at a time."""

    def __init__(self, url: str, model: Callable[[ModelRequest], Any]) -> None:
        self.problem: BaseException | None = None
        self._model = model
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 0))
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"POST /_emulator/model HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        while self._lines.readline() not in (b"ready\n", b""):
            pass
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until the server has hung up and the thread is done."""
        self._thread.join(_JOIN_SECONDS)
        self._lines.close()
        self._socket.close()

    def _work(self) -> None:
        try:
            for line in self._lines:
                replies = [self._answer(request) for request in _requests.decode(line)]
                self._socket.sendall(_encode(replies) + b"\n")
        except OSError:
            return  # The server has ended.
        finally:
            # Whatever ended this thread: the server must not wait for it, and the SDK for the server.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _answer(self, request: ModelRequest) -> Reply:
        try:
            reply = reply_from(self._model(request), request)
            # Checked here, where a wrong value can be traced to the callable.
            reply = msgspec.convert(msgspec.to_builtins(reply), Reply)
            _encode(reply)
            return reply
        except BaseException as problem:  # noqa: BLE001 - pytest.fail and sys.exit too: the handle raises it
            self.problem = self.problem or problem
            message = f"The model= callable raised {problem!r}."
            return Reply(failure=Failure(status=500, message=message))
