"""A model that lives in the parent process: parcels of requests go there, replies come back.

The parent keeps a connection open and answers line by line. When it breaks, the parent is gone,
and every request that waits or comes later fails.
"""

from __future__ import annotations

import queue
import threading
from io import BufferedIOBase

import msgspec

from .dialogue import Failure, ModelRequest, Reply

_PARCEL = 256
_encode = msgspec.json.Encoder().encode
_replies = msgspec.json.Decoder(list[Reply])


class _Parcel:
    def __init__(self, requests: list[ModelRequest]) -> None:
        self.requests = requests
        self.replies: list[Reply] = []
        self.done = threading.Event()

    def fail(self) -> None:
        message = "The process that runs the model= callable is gone."
        self.replies = [Reply(failure=Failure(status=500, message=message))] * len(self.requests)
        self.done.set()


class ParentModel:
    """Hands requests to whoever serves: see `serve`."""

    def __init__(self) -> None:
        self._parcels: queue.SimpleQueue[_Parcel] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._workers = 0

    def answer(self, requests: list[ModelRequest]) -> list[Reply]:
        parcels = [_Parcel(requests[start : start + _PARCEL]) for start in range(0, len(requests), _PARCEL)]
        for parcel in parcels:
            with self._lock:
                if self._workers:
                    self._parcels.put(parcel)
                else:
                    parcel.fail()
        for parcel in parcels:
            parcel.done.wait()
        return [reply for parcel in parcels for reply in parcel.replies]

    def serve(self, source: BufferedIOBase, sink: BufferedIOBase) -> None:
        """Give parcels to the worker at the other end of a connection until it hangs up."""
        with self._lock:
            self._workers += 1
        try:
            # Said only now: whoever has heard it can count on being asked.
            sink.write(b"ready\n")
            while self._hand_over(self._parcels.get(), source, sink):
                pass
        finally:
            self._leave()

    def _hand_over(self, parcel: _Parcel, source: BufferedIOBase, sink: BufferedIOBase) -> bool:
        try:
            sink.write(_encode(parcel.requests) + b"\n")
            line = source.readline()
        except OSError:
            line = b""
        if not line:
            parcel.fail()
            return False
        parcel.replies = _replies.decode(line)
        parcel.done.set()
        return True

    def _leave(self) -> None:
        with self._lock:
            self._workers -= 1
            while not self._workers and not self._parcels.empty():
                self._parcels.get().fail()
