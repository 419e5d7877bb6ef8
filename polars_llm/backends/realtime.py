"""Realtime calls: the same requests as in a batch, one HTTP call each, answered while the process waits.

An event loop in a thread of its own does the calls, so that it works where a loop runs already (a
notebook), and so that Ctrl+C reaches the thread that waits. What the hosts have in common is here; how
one is called is in its own file (`openai.py`, `anthropic.py`), when in `gate.py`, how fast in `pace.py`.

What a failure means (the verdicts are those of `base.py`):

- The host did not take the request (429, 503, 529, no connection): nothing was done or billed. It goes
  again after a pause, and is not counted as an attempt.
- It failed for a passing reason (500, a lost reply): that is its reply, one of its bounded attempts.
- It was refused for a reason of the account, or the address is wrong: three in a row end the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Protocol

import msgspec
import polars as pl

from polars_llm.answer import ACCOUNT, FAILED, RETRY
from polars_llm.backends.base import BatchBackend, CallFailed
from polars_llm.backends.clients import Ask, HttpReply
from polars_llm.backends.gate import NOT_TAKEN, Gate
from polars_llm.backends.options import Options
from polars_llm.backends.pace import Breaker, backoff
from polars_llm.backends.replies import Reply, after_ctrl_c, failed, frame
from polars_llm.errors import PolarsLLMError
from polars_llm.job import Mode
from polars_llm.pricing import Prices
from polars_llm.request import RequestHeader, Requests, key_from_custom_id

__all__ = ["MAX_CONCURRENCY", "Realtime", "RealtimeHost"]

MAX_CONCURRENCY = 32
"""Requests at once where the user does not say."""

# A block of replies is handed over, and made durable, so often or when there are so many of them; so
# many more may wait for that before no new requests are sent.
_BLOCK_SECONDS, _BLOCK_REPLIES, _MOST_WAITING = 1.0, 250, 2_000

_NOT_TAKEN_TRIES = 10
_WRONG_ADDRESS = frozenset({301, 302, 303, 307, 308, 404, 405})


class RealtimeHost(Protocol):
    """What a provider's own file knows of calls in realtime."""

    @property
    def provider(self) -> str:
        """As in the key."""

    @property
    def base_url(self) -> str | None:
        """Normalised, None for the provider's own."""

    @property
    def prices(self) -> Prices | None:
        """The user's own."""

    @property
    def writes_cache(self) -> bool:
        """See `BatchBackend.writes_cache`."""

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column."""

    def render(self, requests: Requests) -> Iterator[bytes]:
        """Request lines of a batch: their bodies are sent."""

    def asking(self, connections: int) -> AbstractAsyncContextManager[Ask]:
        """A client for one event loop."""

    def read_reply(self, endpoint: str, status: int, body: bytes) -> Reply:
        """One reply of the endpoint as a row."""

    def close(self) -> None:
        """Close the connections of this thread."""


class Realtime:
    """A live backend for a host that answers one request a call.

    Parameters
    ----------
    host
        Who is asked.
    batch
        What reads batches there; None where the host has none.
    max_concurrency
        Most requests at once.
    """

    mode: Mode = "realtime"
    first_backoff: ClassVar[float] = 1.0
    """Seconds of the first pause after a failure; the next ones double."""
    patience: ClassVar[float] = 600.0
    """Seconds without one request that the host took, after which the run ends."""
    patience_unreachable: ClassVar[float] = 30.0
    """The same while no connection was ever made: then the address may be wrong."""

    def __init__(
        self, host: RealtimeHost, *, batch: BatchBackend | None = None, max_concurrency: int | None = None
    ) -> None:
        self._host = host
        self._batch = batch
        self._width = max_concurrency or MAX_CONCURRENCY
        self._breaker = Breaker(first_backoff=self.first_backoff)
        self._work: _Work | None = None

    def __repr__(self) -> str:
        return f"Realtime({self._host!r}, max_concurrency={self._width})"

    @property
    def provider(self) -> str:
        """As in the key."""
        return self._host.provider

    @property
    def base_url(self) -> str | None:
        """Normalised, None for the provider's own."""
        return self._host.base_url

    @property
    def prices(self) -> Prices | None:
        """The user's own."""
        return self._host.prices

    @property
    def writes_cache(self) -> bool:
        """See `BatchBackend.writes_cache`."""
        return self._host.writes_cache

    @property
    def batch(self) -> BatchBackend | None:
        """What reads batches of the same host."""
        return self._batch

    @property
    def note(self) -> str:
        """What holds the run up now; empty as a rule."""
        return self._work.gate.note if self._work is not None else ""

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column: the same as for a batch, and so the same keys."""
        return self._host.header(options)

    def run(self, requests: Sequence[Requests]) -> Generator[pl.DataFrame, None, None]:
        """Answer them all, in any order, a block of replies at a time; a block may be empty.

        After Ctrl+C come the blocks of `after_ctrl_c`: what had come until then.
        """
        work = self._work = _Work(self, self._host, self._width, requests, self._breaker)
        work.start()
        try:
            yield from work.blocks()
        except KeyboardInterrupt:
            # One Ctrl+C may come twice where Polars was at work: it has seen it as well.
            with contextlib.suppress(KeyboardInterrupt):
                work.stop()
            work.stop()
            yield from after_ctrl_c(work.not_handed_over)
        finally:
            work.stop()
            self._work = None

    def close(self) -> None:
        """Close connections; the next call opens new ones."""
        self._host.close()


class _Line(msgspec.Struct):
    """A request line of either protocol, its body still as it will be sent."""

    custom_id: str
    body: msgspec.Raw = msgspec.Raw(b"")
    params: msgspec.Raw = msgspec.Raw(b"")


_line_decoder = msgspec.json.Decoder(_Line)


@dataclasses.dataclass(frozen=True, slots=True)
class _Item:
    key: bytes
    endpoint: str
    body: bytes


def _items(host: RealtimeHost, requests: Sequence[Requests]) -> Iterator[_Item]:
    """Requests as they are sent, rendered a few thousand at a time."""
    for r in requests:
        for text in host.render(r):
            line = _line_decoder.decode(text)
            key = key_from_custom_id(line.custom_id)
            assert key is not None, line.custom_id
            yield _Item(key, r.header.endpoint, bytes(line.body) or bytes(line.params))


class _Work:
    """One run: the thread with its loop, and the replies that arrived and were not handed over yet."""

    def __init__(
        self,
        settings: Realtime,
        host: RealtimeHost,
        width: int,
        requests: Sequence[Requests],
        breaker: Breaker,
    ) -> None:
        count = sum(r.height for r in requests)
        self.gate = Gate(settings, width, breaker)
        self._host = host
        self._workers = min(width, count)
        self._items = _items(host, requests)
        attempts = [r.frame["attempt"].min() for r in requests if r.height]
        again = min((int(str(a)) for a in attempts), default=1) - 1
        self._pause = backoff(again - 1, first=settings.first_backoff) if again else 0.0
        self._replies: list[Reply] = []
        self._handed: list[Reply] = []
        self._changed = threading.Condition()
        self._ended = False
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._main, name="polars_llm-realtime", daemon=True)

    # --- the thread that waits

    def start(self) -> None:
        """Begin; nothing is sent before."""
        self._thread.start()

    def blocks(self) -> Iterator[pl.DataFrame]:
        """Replies as they arrive, until there are no more; raises what ended the run."""
        ended = False
        while not ended:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._ended or len(self._replies) >= _BLOCK_REPLIES, timeout=_BLOCK_SECONDS
                )
                ended = self._ended
            yield self.arrived()
        if self._error is not None:
            raise self._error

    def arrived(self) -> pl.DataFrame:
        """What has arrived since the last time."""
        with self._changed:
            self._handed, self._replies = self._replies, []
        return frame(self._handed)

    def not_handed_over(self) -> pl.DataFrame:
        """After an interruption: what has arrived, and the last block, which may not have got through."""
        with self._changed:
            self._handed, self._replies = [*self._handed, *self._replies], []
        return frame(self._handed)

    def stop(self) -> None:
        """End all work in flight, and wait until it has ended."""
        with self._changed:
            self._stopped = True
            loop, task = self._loop, self._task
            if loop is not None and task is not None:
                with contextlib.suppress(RuntimeError):  # it has ended
                    loop.call_soon_threadsafe(task.cancel)
        self._thread.join()

    # --- the thread of the loop

    def _main(self) -> None:
        try:
            asyncio.run(self._ask_all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001  # it is raised again by whoever waits
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    async def _ask_all(self) -> None:
        with self._changed:
            self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
            if self._stopped:
                return
        async with self._host.asking(self._workers) as ask:
            await asyncio.sleep(self._pause)
            await asyncio.gather(*(self._worker(ask) for _ in range(self._workers)))
        if self.gate.problem is not None:
            raise self.gate.problem

    async def _worker(self, ask: Ask) -> None:
        try:
            for item in self._items:
                reply = await self._reply(ask, item)
                if reply is None:
                    return
                await self._deliver({"key": item.key, **reply})
        except PolarsLLMError as error:
            # The others finish what they have sent: it is paid for.
            self.gate.halt(error)

    async def _deliver(self, reply: Reply) -> None:
        with self._changed:
            self._replies.append(reply)
            waiting = len(self._replies)
            if waiting >= _BLOCK_REPLIES:
                self._changed.notify_all()
        while waiting > _MOST_WAITING:
            await asyncio.sleep(0.05)
            waiting = len(self._replies)

    async def _reply(self, ask: Ask, item: _Item) -> Reply | None:
        """The reply to one request, sent again while the host does not take it; None: the run ends."""
        for number in itertools.count(1):
            sent = await self.gate.enter(len(item.body))
            if sent is None:
                return None
            try:
                http = await ask(item.endpoint, item.body)
            except CallFailed as error:
                taken, reply = error.verdict.uncertain, _lost(error)
                self.gate.failed(sent, error)
            except BaseException:
                self.gate.left(sent)
                raise
            else:
                taken, reply = http.status not in NOT_TAKEN, self._read(item, http)
                self.gate.answered(sent, http, reply)
            if taken or reply["state"] == ACCOUNT or number >= _NOT_TAKEN_TRIES:
                return reply
        raise AssertionError("unreachable")

    def _read(self, item: _Item, http: HttpReply) -> Reply:
        if http.status in _WRONG_ADDRESS:
            # Never the fault of one prompt: a wrong address, a model that is not there.
            return {**self._host.read_reply(item.endpoint, http.status, http.body), "state": ACCOUNT}
        status = 200 if 200 <= http.status < 300 else http.status
        reply = self._host.read_reply(item.endpoint, status, http.body)
        if status == 200 and reply["state"] == FAILED:
            return {**reply, "state": RETRY}  # a proxy's web page
        return reply


def _lost(error: CallFailed) -> Reply:
    return failed(None, "connection_lost" if error.verdict.uncertain else "no_connection", str(error), b"")
