"""What the SDKs' clients have in common: one a process, and how their errors are read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

__all__ = ["PerProcess", "retry_after"]


class _Closable(Protocol):
    def close(self) -> None: ...


C = TypeVar("C", bound=_Closable)


class PerProcess(Generic[C]):
    """A client for each process and thread, connected when it is first needed.

    A forked child must not share its parent's connections, and closing must not cut off what another
    thread is waiting for.
    """

    def __init__(self, connect: Callable[[], C]) -> None:
        self._connect = connect
        self._clients: dict[tuple[int, int], C] = {}
        self._lock = threading.Lock()

    def get(self) -> C:
        """This process' and thread's client."""
        name = (os.getpid(), threading.get_ident())
        with self._lock:
            client = self._clients.get(name)
            if client is None:
                client = self._clients[name] = self._connect()
            return client

    def close(self) -> None:
        """Close the connections of this process and thread."""
        with self._lock:
            client = self._clients.pop((os.getpid(), threading.get_ident()), None)
        if client is not None:
            client.close()


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait; None if it does not say, or not in seconds."""
    try:
        return float(headers.get("retry-after", ""))
    except ValueError:
        return None
