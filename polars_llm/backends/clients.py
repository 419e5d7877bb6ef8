"""What the SDKs' clients have in common: one a process, and how their errors are read."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Generic, Protocol, TypeAlias, TypeVar

__all__ = ["Ask", "HttpReply", "PerProcess", "retry_after"]


@dataclasses.dataclass(frozen=True, slots=True)
class HttpReply:
    """A reply of an endpoint, whatever its status."""

    status: int
    headers: Mapping[str, str]
    body: bytes


Ask: TypeAlias = Callable[[str, bytes], Awaitable[HttpReply]]
"""One call of an endpoint (``"/v1/..."``) with a body; `CallFailed` where no reply came."""


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
        self._lock = threading.RLock()  # a signal's handler may ask the same provider

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
    """Seconds that a reply asks to wait; None if it does not say."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return float(headers.get(name, "")) * unit
        except ValueError:
            continue
    try:
        # A date is meant by the clock of the host, which says what that one shows.
        until, now = (parsedate_to_datetime(headers.get(name, "")) for name in ("retry-after", "date"))
        return (until - now).total_seconds()
    except (ValueError, TypeError):
        return None
