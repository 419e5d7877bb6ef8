"""Anthropic's Message Batches, and every host that speaks them. The only file that imports the SDK.

Limits and behaviour: Anthropic's batch guide (platform.claude.com/docs/en/build-with-claude/batch-processing,
read 2026-09-26): 100,000 requests or 256 MB a batch, sent inline with the call that creates it; it expires
after 24 hours; results can be read for 29 days; half price. Requests are checked one by one while the batch
runs, so a bad one fails alone, and hours later. A batch carries nothing of our own but the custom_ids of its
requests, and those can be read only from its results.

The SDK's credentials go to the host of `base_url` and nowhere else: no call that carries much or brings
results follows a redirect, and a ``results_url`` on another host (a gateway that passes Anthropic's own
through) is not called; the results are then asked for at the gateway, under the documented route.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

import polars as pl

from polars_llm import clock
from polars_llm.backends.base import (
    BatchStatus,
    CallFailed,
    Found,
    IsOurs,
    Limits,
    ListedBatch,
    Phase,
    retrying,
)
from polars_llm.backends.clients import Ask, HttpReply, PerProcess, retry_after
from polars_llm.backends.hosts import is_at, normalise_base_url, redact
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply
from polars_llm.backends.wire import messages
from polars_llm.errors import AccountError
from polars_llm.job import Job, Mode
from polars_llm.pricing import Prices
from polars_llm.request import RequestHeader, Requests
from polars_llm.schema.rules import ANTHROPIC, worded

if TYPE_CHECKING:
    import anthropic
    import httpx2
    from anthropic.types.messages import MessageBatch

__all__ = ["AnthropicBatch"]

_OWN = "https://api.anthropic.com"

_ROUTE = "/v1/messages/batches"
_OPEN, _CLOSE = b'{"requests":[', b"]}"
_LIMITS = Limits(requests=100_000, size_bytes=256_000_000 - len(_OPEN) - len(_CLOSE))

# Parts of `create_timeout`, seconds: to connect, for all of the body, for one piece of it, for the reply.
_CONNECT, _SENDING, _PIECE_SENT, _REPLY = 15.0, 540.0, 30.0, 300.0
# Small pieces going out, so that the time for all of them is looked at often.
_PIECE, _CHUNK = 1 << 16, 1 << 20
_PAGE = 100

# Results are kept for 29 days after a batch was created: one without them is older than a younger job.
_ARCHIVED_AFTER = 28 * 24 * 3600.0

T = TypeVar("T")
C = TypeVar("C")


class AnthropicBatch:
    """One host, one model, one key, one version of the API."""

    provider = "anthropic"
    mode: Mode = "batch"
    prices: Prices | None = None
    """The user's own."""
    limits = _LIMITS
    create_timeout = _CONNECT + _SENDING + _PIECE_SENT + _REPLY + 15.0
    """Seconds. Creating sends the whole body, up to 256 MB; no call to create goes on for longer."""
    reply_timeout = 600.0
    """Seconds that an answer in realtime may take."""
    uploads = False
    cache_system: messages.CacheSystem | None = None
    """How long the provider's prompt cache is asked to keep system prompts; not in the key."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        address: str | None = None,
        key_url: str | None = None,
        api_key: str | None = None,
        headers: dict[str, str],
    ) -> None:
        """`base_url` is normalised (None: Anthropic's own), `address` is what the SDK gets.

        `key_url` stands for the host in keys, `headers` are those that change answers.
        """
        self._model = model
        self.base_url = base_url
        self._address = address
        self._key_url = key_url
        self._api_key = api_key
        self._headers = headers
        self._clients = PerProcess(self._connect)

    def __repr__(self) -> str:
        return f"AnthropicBatch({self._model!r}, base_url={self.base_url!r})"

    @property
    def writes_cache(self) -> bool:
        """Writes to the provider's prompt cache cost more than plain input."""
        return self.cache_system is not None

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column."""
        return RequestHeader(
            provider=self.provider,
            base_url=self._key_url,
            endpoint=messages.ENDPOINT,
            model=self._model,
            body=messages.body(options, api_version=self._headers["anthropic-version"]),
            headers=self._headers,
            schema=worded(options.schema, ANTHROPIC) if options.schema else None,
        )

    def render(self, requests: Requests) -> Iterator[bytes]:
        """Lines of the request file: one element of the batch's ``requests`` each."""
        return messages.render(requests, cache_system=self.cache_system)

    def upload(self, job: Job, path: Path) -> str:
        """Not needed: requests go with the call that creates the batch."""
        raise NotImplementedError("requests go with the call that creates the batch")

    def newest_batch(self) -> str | None:
        """The mark before create: a lost batch is newer than this one."""
        page = retrying(functools.partial(self._page, None, limit=1))
        return page.data[0].id if page.data else None

    def create(self, job: Job, path: Path) -> str:
        """Create the batch: one POST, whatever happens, streamed from disk.

        While the body is not complete no server can have read the requests: a call that fails until
        then has certainly created nothing.
        """
        import httpx2
        from anthropic.types.messages import MessageBatch

        client = self._clients.get()
        with path.open("rb") as file:
            body = _Body(file)
            with self._errors(body):
                batch = client.post(
                    _ROUTE,
                    cast_to=MessageBatch,
                    content=body,
                    options={
                        "headers": {
                            "Content-Type": "application/json",
                            "Content-Length": str(body.size_bytes),
                        },
                        "max_retries": 0,
                        "follow_redirects": False,
                        "timeout": httpx2.Timeout(_REPLY, connect=_CONNECT, write=_PIECE_SENT, pool=_CONNECT),
                    },
                )
        return self._checked(batch).id

    def find(self, job: Job, known: Collection[str], is_ours: IsOurs) -> Found:
        """Look through the batches newer than the job's mark, newest first.

        What was in a batch shows only in its results: one of the job's size that still runs, or whose
        results are gone, can't be told from the job's. If the mark itself is not in the list any more,
        all batches are looked through, which takes longer and decides no less safely.
        """
        undecided = []
        for batch in self._batches():
            if batch.id == job.marker:
                break
            if batch.id in known or not _may_be(batch, job):
                continue
            ours = self._is_ours(batch, is_ours)
            if ours:
                return Found(batch_id=batch.id)
            if ours is None:
                undecided.append(batch.id)
        return Found(candidates=tuple(undecided))

    def _is_ours(self, batch: MessageBatch, is_ours: IsOurs) -> bool | None:
        status = _status(batch)
        if status.phase is not Phase.ENDED or not status.sources:
            return None

        def read(reply: httpx2.Response) -> bool | None:
            return is_ours(messages.custom_ids_of(_lines(reply.iter_bytes())))

        try:
            return self._with_results(batch.id, status, read)
        except CallFailed as error:
            if error.verdict.transient or error.verdict.account:
                raise
            return None

    def status(self, job: Job) -> BatchStatus:
        """One look at the batch. Until it has ended the API does not say how much is done."""
        assert job.batch_id is not None
        try:
            return _status(retrying(functools.partial(self._retrieve, job.batch_id)))
        except CallFailed as error:
            if error.status == 404:
                return BatchStatus(phase=Phase.MISSING, why=str(error))
            raise

    def _retrieve(self, batch_id: str) -> MessageBatch:
        with self._errors():
            return self._checked(self._clients.get().messages.batches.retrieve(batch_id))

    def _checked(self, batch: MessageBatch) -> MessageBatch:
        """The SDK gives whatever came with status 200: a proxy's web page, an empty object."""
        if not isinstance(getattr(batch, "id", None), str):
            raise CallFailed("the reply is not a batch", provider=self.provider)
        return batch

    def download(self, job: Job, status: BatchStatus, target: Path) -> None:
        """The results as they come, streamed to disk."""
        assert job.batch_id is not None
        if not status.sources:
            raise CallFailed("the batch is archived", provider=self.provider, status=410)

        def write(reply: httpx2.Response) -> None:
            with target.open("wb") as file:
                for chunk in reply.iter_bytes(_CHUNK):
                    file.write(chunk)

        self._with_results(job.batch_id, status, write)

    def _with_results(self, batch_id: str, status: BatchStatus, read: Callable[[httpx2.Response], T]) -> T:
        """Open the results and read them; from the start again after a passing failure."""
        (given,) = status.sources
        documented = f"{_ROUTE}/{batch_id}/results"
        foreign = not is_at(given, str(self._clients.get().base_url))
        problem = CallFailed(provider=self.provider, status=404)
        for route in [documented] if foreign else [given, documented]:
            try:
                return retrying(functools.partial(self._read, route, read))
            except CallFailed as error:
                if error.status != 404:
                    raise
                problem = error
        if not foreign:
            raise problem
        raise CallFailed(
            f"the results of {batch_id} are on another host than the API, which does not get the key; the"
            " API's own host has no route to them",
            provider=self.provider,
            status=400,
            kind="foreign_results_url",
        ) from problem

    def _read(self, url: str, read: Callable[[httpx2.Response], T]) -> T:
        import anthropic
        import httpx2

        with self._errors():
            opened = self._clients.get().get(
                url,
                cast_to=httpx2.Response,
                options={"headers": {"Accept": "application/binary"}, "follow_redirects": False},
                stream=True,
                stream_cls=anthropic.Stream[Any],
            )
            # With this cast_to the SDK gives the reply itself, whatever its annotations say.
            with contextlib.closing(cast("httpx2.Response", opened)) as reply:
                return read(reply)

    def parse(self, lines: Iterable[bytes], status: BatchStatus) -> pl.DataFrame:
        """Result lines as answers."""
        del status
        return messages.parse_lines(lines)

    def cancel(self, job: Job) -> None:
        """Ask the provider to stop. Cancelling what has ended is no error."""
        assert job.batch_id is not None
        retrying(functools.partial(self._cancel, job.batch_id))

    def _cancel(self, batch_id: str) -> None:
        try:
            with self._errors():
                self._clients.get().messages.batches.cancel(batch_id)
        except CallFailed as error:
            if error.status not in (400, 409):
                raise

    def list_batches(self) -> Iterator[ListedBatch]:
        """All batches of the workspace: only the custom_ids in their results say which are ours."""
        for batch in self._batches():
            yield ListedBatch(
                batch_id=batch.id,
                status=_status(batch),
                requests=_size(batch) or 0,
                endpoint=messages.ENDPOINT,
            )

    def sent_custom_ids(self, batch: ListedBatch, target: Path) -> Iterator[str] | None:
        """None: what was sent cannot be read back while a batch runs."""
        del batch, target
        return None

    def _batches(self) -> Iterator[MessageBatch]:
        after: str | None = None
        while True:
            page = retrying(functools.partial(self._page, after))
            yield from page.data
            if not page.data or not page.has_more:
                return
            after = page.data[-1].id

    def _page(self, after: str | None, *, limit: int = _PAGE) -> Any:
        with self._errors():
            batches = self._clients.get().messages.batches
            page = batches.list(limit=limit) if after is None else batches.list(limit=limit, after_id=after)
        if not isinstance(getattr(page, "data", None), list):
            raise CallFailed("the reply is not a list of batches", provider=self.provider)
        return page

    def close(self) -> None:
        """Close this process' connections."""
        self._clients.close()

    @contextlib.asynccontextmanager
    async def asking(self, connections: int) -> AsyncIterator[Ask]:
        """A client for calls in realtime, in one event loop."""
        _require_sdk()
        import anthropic
        import httpx2

        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        transport = anthropic.DefaultAsyncHttpxClient(limits=limits)
        timeout = httpx2.Timeout(self.reply_timeout, connect=_CONNECT)

        async def ask(endpoint: str, body: bytes) -> HttpReply:
            with self._errors():
                try:
                    reply = await client.post(
                        endpoint,
                        cast_to=httpx2.Response,
                        content=body,
                        options={
                            "headers": {"Content-Type": "application/json"},
                            "follow_redirects": False,
                            "timeout": timeout,
                        },
                    )
                except anthropic.APIStatusError as error:
                    reply = error.response
                    said = redact(reply.text, self._secrets()).encode()
                    return HttpReply(reply.status_code, reply.headers, said)
                return HttpReply(reply.status_code, reply.headers, reply.content)

        async with transport:
            client = self._made(anthropic.AsyncAnthropic, http_client=transport)
            yield ask

    def read_reply(self, endpoint: str, status: int, body: bytes) -> Reply:
        """One reply of an endpoint as a row."""
        del endpoint
        return messages.read_reply(status, body)

    def _connect(self) -> anthropic.Anthropic:
        _require_sdk()
        import anthropic

        return self._made(anthropic.Anthropic)

    def _made(self, kind: Callable[..., C], **options: Any) -> C:
        import anthropic

        # A beta that an environment variable asks for would change answers behind the key: what is not
        # in our headers is not sent.
        headers: dict[str, Any] = {"anthropic-beta": anthropic.Omit(), **self._headers}
        try:
            client: Any = kind(
                api_key=self._api_key,
                base_url=self._address,
                max_retries=0,
                default_headers=headers,
                **options,
            )
        except anthropic.AnthropicError as error:
            raise self._no_account(
                redact(f"The SDK found no usable credentials: {error}", self._secrets())
            ) from error
        if client.api_key is None and client.auth_token is None and client.credentials is None:
            raise self._no_account("No API key for Anthropic.")
        if normalise_base_url(str(client.base_url), own=_OWN) != self.base_url:
            raise self._no_account("The credentials that the SDK found are for another host.")
        return cast("C", client)

    def _no_account(self, fact: str) -> AccountError:
        return AccountError(
            fact,
            provider=self.provider,
            hint="set ANTHROPIC_API_KEY (and ANTHROPIC_BASE_URL for another host), or pass"
            " pllm.Anthropic(NAME, api_key=...). Nothing was sent.",
        )

    @contextlib.contextmanager
    def _errors(self, body: _Body | None = None) -> Iterator[None]:
        """SDK and HTTP exceptions become CallFailed."""
        import anthropic
        import httpx2

        try:
            yield
        except anthropic.APIStatusError as error:
            raise CallFailed(
                redact(_said(error) or error.message, self._secrets()),
                provider=self.provider,
                status=error.status_code,
                kind=messages.error_kind(error.type, getattr(error, "error_code", None), _said(error)),
                retry_after=retry_after(error.response.headers),
            ) from None
        except (anthropic.APIConnectionError, httpx2.RequestError, httpx2.StreamError) as error:
            cause = error.__cause__ or error
            raise CallFailed(
                redact(f"{type(cause).__name__}: {cause}", self._secrets()),
                provider=self.provider,
                connected=body is None or body.complete,
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CallFailed(
                redact(f"the reply cannot be read: {error}", self._secrets()), provider=self.provider
            ) from None

    def _secrets(self) -> tuple[str | None, ...]:
        names = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
        return (self._api_key, *(os.environ.get(name) for name in names))


def _require_sdk() -> None:
    try:
        import anthropic  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Anthropic models need the anthropic SDK.\n\nHint: pip install 'polars-llm-batch[anthropic]'"
        ) from error


def _said(error: Any) -> str | None:
    """The API's own sentence; older releases of the SDK keep it in the body only."""
    if hasattr(error, "api_message"):
        return cast("str | None", error.api_message)
    inner = error.body.get("error") if isinstance(error.body, dict) else None
    return inner.get("message") if isinstance(inner, dict) else None


class _Body:
    """The body of a create call: the lines of the request file as one JSON document.

    The lines are JSON texts, in which a line feed can't stand: between them it becomes a comma, and
    nothing is decoded.

    Attributes
    ----------
    complete
        True from the moment when the last piece was handed over.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - 1))
        self._lines = size - 1 if file.read(1) == b"\n" else size
        self.size_bytes = len(_OPEN) + self._lines + len(_CLOSE)
        self.complete = False

    def __iter__(self) -> Iterator[bytes]:
        deadline = time.monotonic() + _SENDING
        self._file.seek(0)
        yield _OPEN
        left = self._lines
        while left:
            piece = self._file.read(min(_PIECE, left))
            if not piece:
                raise EOFError("the request file became shorter while it was sent")
            yield piece.replace(b"\n", b",")
            left -= len(piece)
            if time.monotonic() > deadline:
                raise TimeoutError(f"sending the requests took more than {_SENDING:.0f} s")
        self.complete = True
        yield _CLOSE


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines of a stream, split on LF alone."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _status(batch: MessageBatch) -> BatchStatus:
    counts = batch.request_counts
    if batch.processing_status != "ended":
        # All counts are zero until the end.
        return BatchStatus(phase=Phase.RUNNING, why=str(batch.processing_status))
    results = batch.results_url or f"{_ROUTE}/{batch.id}/results"
    return BatchStatus(
        phase=Phase.ENDED,
        done=(counts.succeeded if counts else 0) or 0,
        failed=sum((counts.errored or 0, counts.canceled or 0, counts.expired or 0)) if counts else 0,
        # However it ended, there is a line for each request: one without is missing, not unsent.
        why="completed",
        sources=() if batch.archived_at else (results,),
    )


def _size(batch: MessageBatch) -> int | None:
    """Number of requests, None if it is not shown."""
    counts = batch.request_counts
    if not counts:
        return None
    each = (counts.processing, counts.succeeded, counts.errored, counts.canceled, counts.expired)
    return sum(n or 0 for n in each)


def _may_be(batch: MessageBatch, job: Job) -> bool:
    """False if a batch is certainly not that of a lost create call, by its size or its age."""
    if _size(batch) not in (None, job.requests):
        return False
    # No two clocks are compared: the archive's rule and our own stop watch are enough.
    young = job.create_called is not None and clock.seconds_since(job.create_called) < _ARCHIVED_AFTER
    return not (batch.archived_at and young)
