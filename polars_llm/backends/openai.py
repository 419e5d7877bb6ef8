"""OpenAI's Batch service, and every host that speaks it. The only file that imports the SDK.

Limits and behaviour: OpenAI's batch guide (developers.openai.com/api/docs/guides/batch, read
2026-09-26): 50,000 requests and 200 MB a batch, one model a file, results kept 30 days, half price.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl

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
from polars_llm.backends.hosts import Host, host_of, redact
from polars_llm.backends.options import Options
from polars_llm.backends.replies import Reply
from polars_llm.backends.wire import chat, embeddings, responses
from polars_llm.backends.wire.lines import Wire, custom_ids_of, parse
from polars_llm.errors import AccountError
from polars_llm.job import Job, Mode
from polars_llm.pricing import Prices
from polars_llm.request import RequestHeader, Requests
from polars_llm.schema.rules import OPENAI, worded

if TYPE_CHECKING:
    import openai
    from openai.types import Batch

__all__ = ["OpenAIBatch"]

C = TypeVar("C")

_WIRES: Mapping[str, Wire] = {wire.ENDPOINT: wire for wire in (chat, responses, embeddings)}

_ENDED = {"completed": "completed", "expired": "expired", "cancelled": "cancelled"}


class OpenAIBatch:
    """One host, one model, one key."""

    provider = "openai"
    mode: Mode = "batch"
    prices: Prices | None = None
    """The user's own."""
    create_timeout = 60.0
    """Seconds. Creating is one small request: longer than this and the reply counts as lost."""
    reply_timeout = 600.0
    """Seconds that an answer in realtime may take."""
    uploads = True
    writes_cache = False
    """OpenAI's prompt cache works unasked."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        address: str | None = None,
        key_url: str | None = None,
        api_key: str | None = None,
        host: Host | None = None,
        endpoint: str = chat.ENDPOINT,
    ) -> None:
        """`base_url` is normalised (None: the provider's own), `address` is what the SDK gets.

        `key_url` stands for the host in keys; `host` says what it can do.
        """
        self._model = model
        self._host = host or host_of(base_url)
        self.base_url = base_url
        self._address = address
        self._key_url = key_url
        self._api_key = api_key
        self._endpoint = endpoint
        self._clients = PerProcess(self._connect)

    def __repr__(self) -> str:
        return f"OpenAIBatch({self._model!r}, base_url={self.base_url!r})"

    @property
    def limits(self) -> Limits:
        """What one batch may hold."""
        return Limits(requests=self._host.requests, size_bytes=self._host.size_bytes)

    def header(self, options: Options) -> RequestHeader:
        """What is constant over a column."""
        return RequestHeader(
            provider=self.provider,
            base_url=self._key_url,
            endpoint=self._endpoint,
            model=self._model,
            body=_WIRES[self._endpoint].body(options, limit_field=self._host.limit_field),
            schema=worded(options.schema, OPENAI) if options.schema else None,
        )

    def render(self, requests: Requests) -> Iterator[bytes]:
        """Lines of the request file."""
        return _WIRES[requests.header.endpoint].render(requests)

    def upload(self, job: Job, path: Path) -> str:
        """Upload the request file, streamed from disk."""

        def call() -> str:
            with path.open("rb") as file, self._errors():
                made = self._client().files.create(
                    file=(f"{job.id}.jsonl", file, "application/jsonl"), purpose="batch"
                )
                return made.id

        try:
            return retrying(call)
        except CallFailed as error:
            if error.status not in (404, 405, 501):
                raise
            fact = f"{error}. Has this host no batches? Then mode='realtime' asks it while you wait"
            raise CallFailed(fact, provider=self.provider, status=error.status, kind=error.kind) from None

    def newest_batch(self) -> str | None:
        """Not needed: a batch carries our job id in its metadata."""
        return None

    def create(self, job: Job, path: Path) -> str:
        """Create the batch: one POST, whatever happens."""
        assert job.input_file_id is not None
        client = self._client().with_options(max_retries=0, timeout=self.create_timeout)
        with self._errors():
            batch = client.batches.create(
                input_file_id=job.input_file_id,
                endpoint=job.endpoint,  # type: ignore[arg-type]  # hosts have endpoints of their own
                completion_window=self._host.windows[0],  # type: ignore[arg-type]
                metadata={"pllm_job": job.id},
            )
        # A proxy's web page comes as text, with status 200.
        batch_id = getattr(batch, "id", None)
        if not batch_id:
            raise CallFailed("the reply to create has no id", provider=self.provider)
        return str(batch_id)

    def find(self, job: Job, known: Collection[str], is_ours: IsOurs) -> Found:
        """Look through the account's batches, newest first, back to the upload of the file."""
        del known, is_ours  # a batch says itself whose it is
        oldest = self._uploaded_at(job)
        for batch in self._batches():
            if batch.created_at is not None and batch.created_at < oldest:
                break
            if batch.status == "failed":
                continue  # nothing was billed; it may be one that the queue refused before this call
            ours = (batch.metadata or {}).get("pllm_job") == job.id
            if ours or batch.input_file_id == job.input_file_id:
                return Found(batch_id=batch.id)
        return Found()

    def _uploaded_at(self, job: Job) -> float:
        """By the provider's clock, like the batches' own times: no two clocks are compared."""
        assert job.input_file_id is not None
        try:
            return retrying(functools.partial(self._file, job.input_file_id)).created_at - 1
        except CallFailed as error:
            if error.status != 404:
                raise
            return 0.0

    def _file(self, file_id: str) -> openai.types.FileObject:
        with self._errors():
            return self._client().files.retrieve(file_id)

    def status(self, job: Job) -> BatchStatus:
        """One look at the batch."""
        assert job.batch_id is not None
        try:
            batch = retrying(functools.partial(self._retrieve, job.batch_id))
        except CallFailed as error:
            if error.status == 404:
                return BatchStatus(phase=Phase.MISSING, why=str(error))
            raise
        return _status(batch)

    def _retrieve(self, batch_id: str) -> Batch:
        with self._errors():
            batch = self._client().batches.retrieve(batch_id)
        if not hasattr(batch, "status"):
            raise CallFailed("the reply is not a batch", provider=self.provider)
        return batch

    def download(self, job: Job, status: BatchStatus, target: Path) -> None:
        """Output and error file, one after the other, streamed to disk."""
        self._fetch(status.sources, target)

    def _fetch(self, sources: Iterable[str], target: Path) -> None:
        def call() -> None:
            with target.open("wb") as file:
                for source in sources:
                    self._append(source, file)
                    file.write(b"\n")

        retrying(call)

    def _append(self, file_id: str, file: Any) -> None:
        with (
            self._errors(),
            self._client().files.with_streaming_response.content(file_id) as reply,
        ):
            for chunk in reply.iter_bytes(1 << 20):
                file.write(chunk)

    def parse(self, lines: Iterable[bytes], status: BatchStatus) -> pl.DataFrame:
        """Result lines as answers."""
        wire = _WIRES.get(status.endpoint or "", _WIRES[self._endpoint])
        return parse(lines, wire.read_reply)

    def cancel(self, job: Job) -> None:
        """Ask the provider to stop. Cancelling what has ended is no error."""
        assert job.batch_id is not None

        def call() -> None:
            with self._errors():
                self._client().batches.cancel(job.batch_id or "")

        try:
            retrying(call)
        except CallFailed as error:
            if error.status not in (400, 409):
                raise

    def list_batches(self) -> Iterator[ListedBatch]:
        """Batches that this library made, or that do not say who made them."""
        for batch in self._batches():
            if batch.metadata and "pllm_job" not in batch.metadata:
                continue
            yield ListedBatch(
                batch_id=batch.id,
                status=_status(batch),
                requests=batch.request_counts.total if batch.request_counts else 0,
                job_id=(batch.metadata or {}).get("pllm_job"),
                model=batch.model,
                endpoint=batch.endpoint,
                input_file_id=batch.input_file_id,
            )

    def sent_custom_ids(self, batch: ListedBatch, target: Path) -> Iterator[str] | None:
        """Read back from the request file, which the provider keeps."""
        file_id = batch.input_file_id
        if file_id is None:
            return None
        try:
            size = retrying(functools.partial(self._file, file_id)).bytes

            def whole() -> None:
                self._fetch((file_id,), target)
                # What a cut download leaves out would be sent again.
                if target.stat().st_size < (size or 0):
                    raise CallFailed(f"{file_id} came incomplete", provider=self.provider)

            retrying(whole)
        except CallFailed as error:
            if error.status in {404, 410}:
                return None
            raise
        return custom_ids_of(target)

    def _batches(self) -> Iterator[Batch]:
        after: str | None = None
        while True:
            page = retrying(functools.partial(self._page, after))
            yield from page.data
            if not page.data or not page.has_more:
                return
            after = page.data[-1].id

    def _page(self, after: str | None) -> Any:
        with self._errors():
            client = self._client()
            if after is None:
                return client.batches.list(limit=100)
            return client.batches.list(limit=100, after=after)

    def close(self) -> None:
        """Close this process' connections."""
        self._clients.close()

    @contextlib.asynccontextmanager
    async def asking(self, connections: int) -> AsyncIterator[Ask]:
        """A client for calls in realtime, in one event loop."""
        _require_sdk()
        import httpx2
        import openai

        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        transport = openai.DefaultAsyncHttpxClient(limits=limits)
        timeout = httpx2.Timeout(self.reply_timeout, connect=15.0)

        async def ask(endpoint: str, body: bytes) -> HttpReply:
            with self._errors():
                try:
                    reply = await client.post(
                        endpoint.removeprefix("/v1"),
                        cast_to=httpx2.Response,
                        content=body,
                        options={"headers": {"Content-Type": "application/json"}, "timeout": timeout},
                    )
                except openai.APIStatusError as error:
                    reply = error.response
                    said = redact(reply.text, self._secrets()).encode()
                    return HttpReply(reply.status_code, reply.headers, said)
                return HttpReply(reply.status_code, reply.headers, reply.content)

        async with transport:
            client = self._made(openai.AsyncOpenAI, http_client=transport)
            yield ask

    def read_reply(self, endpoint: str, status: int, body: bytes) -> Reply:
        """One reply of an endpoint as a row."""
        return _WIRES[endpoint].read_reply(status, body)

    def _client(self) -> openai.OpenAI:
        return self._clients.get()

    def _connect(self) -> openai.OpenAI:
        _require_sdk()
        import openai

        return self._made(openai.OpenAI)

    def _made(self, kind: Callable[..., C], **options: Any) -> C:
        import openai

        try:
            return kind(api_key=self._key(), base_url=self._address, max_retries=0, **options)
        except openai.OpenAIError as error:
            raise AccountError(
                "No API key for OpenAI.",
                provider=self.provider,
                hint="set OPENAI_API_KEY, or pass pllm.OpenAI(NAME, api_key=...). Nothing was sent.",
            ) from error

    def _key(self) -> str | None:
        # The SDK insists on a key, also where the server does not look at it.
        if self._api_key or self._host.needs_key or os.environ.get("OPENAI_API_KEY"):
            return self._api_key
        return "unused"

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """SDK and HTTP exceptions become CallFailed."""
        import httpx2
        import openai

        try:
            yield
        except openai.APIStatusError as error:
            raise CallFailed(
                redact(error.message, self._secrets()),
                provider=self.provider,
                status=error.status_code,
                kind=error.code or error.type,
                retry_after=retry_after(error.response.headers),
            ) from None
        except (openai.APIConnectionError, httpx2.TransportError, httpx2.StreamError) as error:
            raise self._lost(error.__cause__ or error) from None
        except (openai.APIError, json.JSONDecodeError) as error:
            # A reply that cannot be read says nothing of what was done.
            raise self._lost(error) from None

    def _lost(self, cause: BaseException) -> CallFailed:
        import httpx2

        before = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)
        return CallFailed(
            redact(f"{type(cause).__name__}: {cause}", self._secrets()),
            provider=self.provider,
            connected=not isinstance(cause, (*before, httpx2.UnsupportedProtocol)),
        )

    def _secrets(self) -> tuple[str | None, ...]:
        return (self._api_key, os.environ.get("OPENAI_API_KEY"))


def _require_sdk() -> None:
    try:
        import openai  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "OpenAI models need the openai SDK.\n\nHint: pip install 'polars-llm-batch[openai]'"
        ) from error


def _status(batch: Batch) -> BatchStatus:
    counts = batch.request_counts
    done = (counts.completed if counts else 0) or 0
    failed = (counts.failed if counts else 0) or 0
    look = BatchStatus(
        phase=Phase.RUNNING,
        done=done,
        failed=failed,
        why=str(batch.status),
        endpoint=batch.endpoint,
        counted=counts is not None,
    )
    if batch.status == "failed":
        return _refused(batch, look)
    if batch.status in _ENDED:
        files = (batch.output_file_id, batch.error_file_id)
        return dataclasses.replace(
            look,
            phase=Phase.ENDED,
            why=_ENDED[batch.status],
            sources=tuple(f for f in files if f),
        )
    return look


def _refused(batch: Batch, look: BatchStatus) -> BatchStatus:
    errors = (batch.errors.data if batch.errors else None) or []
    kind = errors[0].code if errors else None
    reason = (errors[0].message if errors else None) or "the provider gave no reason"
    if kind == "token_limit_exceeded":
        return dataclasses.replace(look, phase=Phase.QUEUE_FULL, kind=kind, why=reason)
    bad = {e.line: f"{e.code}: {e.message}" for e in errors if e.line is not None}
    return dataclasses.replace(look, phase=Phase.REFUSED, kind=kind, why=reason, bad_lines=bad)
