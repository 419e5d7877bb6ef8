"""The handle on an emulated provider: starts its process, asks for its bill, orders faults."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from .bill import Bill
from .dialogue import ModelRequest
from .environment import Environment, variables
from .faults import order
from .settings import LIMITS, Settings
from .worker import Worker

_START_SECONDS = 30.0
_STOP_SECONDS = 5.0
_CONTROL_SECONDS = 600.0
# Kept, so that a handle which is let go leaves a process that is meant to go on in peace.
_DETACHED: list[subprocess.Popen[bytes]] = []
_PROCESS = Path(__file__).with_name("_process.py")


class Seen(NamedTuple):
    """One line of the log. `status` is None while there is no reply, and where none was sent."""

    method: str
    path: str
    status: int | None


def provider(
    model: Callable[[ModelRequest], Any] | None = None,
    *,
    latency: float = 0.0,
    batch_seconds: float = 0.0,
    auto: bool = True,
    stepwise: bool = False,
    models: Collection[str] | None = None,
    rpm: int | None = None,
    tpm: int | None = None,
    limits: Mapping[str, int] | None = None,
    scoped: bool = False,
    set_env: bool = True,
    host: str = "127.0.0.1",
    port: int = 0,
    detached: bool = False,
) -> Provider:
    """Run a local LLM provider: OpenAI's and Anthropic's batch and realtime APIs on loopback.

    The provider is a process of its own and keeps its bill there: it outlives a killed client,
    and several processes can use it at once. It ends with the process that started it.

    Parameters
    ----------
    model
        Who answers. A callable gets a `ModelRequest` and returns the text, or a dict or list (see
        Notes). It runs in this process, in a thread of its own, one request at a time; where this
        process is gone, requests fail with status 500. None: the built-in model, which gives a
        sentence of the prompt, a JSON value that obeys the schema, or an embedding.
    latency
        Seconds that each realtime request takes at least.
    batch_seconds
        Seconds from the creation of a batch to its end. With 0 it has ended when it is first
        looked at.
    auto
        False: batches stay where they are until `Provider.advance` or `Provider.finish`.
    stepwise
        A batch takes one step per retrieval: validating, in_progress, finalizing, completed.
    models
        The models that exist. None: every name does.
    rpm, tpm
        Realtime requests and tokens per minute, for each protocol; more is answered with 429.
    limits
        Other limits than the real ones, by name: ``openai_requests``, ``openai_bytes``,
        ``openai_embedding_inputs``, ``openai_batches_per_hour``, ``openai_enqueued_tokens`` (0:
        no limit), ``anthropic_requests``, ``anthropic_bytes``, ``anthropic_queue``.
    scoped
        Batches and files are seen only with the API key that made them.
    set_env
        Set the environment variables `Provider.env` inside the ``with`` block.
    host, port
        Where to listen; port 0 is a free one.
    detached
        Go on when this process ends, until `Provider.stop`. Others reach it by `Provider.attach`.

    Returns
    -------
    Provider
        A context manager that starts and stops the process.

    Notes
    -----
    A callable may return a string (the text), a list of strings (text blocks; for an embedding
    request numbers, or a list of numbers for each input), or a dict with some of the keys
    ``text``, ``parts``, ``json`` (a value to be sent as JSON text), ``finish_reason`` (``stop``,
    ``length``, ``content_filter``, ``refusal``, ``tool_calls``), ``refusal``, ``tool_calls``,
    ``usage`` (``input_tokens``, ``output_tokens``, ``cached_input_tokens``, ``reasoning_tokens``)
    and ``error`` (a status, or a dict with ``status``, ``message``, ``type``, ``code``).
    It must not use the handle: a bill may have to wait for an answer of the callable itself.
    A callable that raises fails its request with status 500; the first such exception is raised
    again at the end of the ``with`` block.

    Examples
    --------
    >>> import polars_llm.testing
    >>> with polars_llm.testing.provider() as p:  # doctest: +SKIP
    ...     df.llm.generate("prompt", model="openai/gpt-6-luna", on_pending="wait")
    ...     assert not p.bill().duplicates
    """
    if unknown := (limits or {}).keys() - LIMITS.keys():
        message = f"no limit is called {', '.join(sorted(unknown))}\n\nHint: one of {', '.join(LIMITS)}."
        raise ValueError(message)
    settings = Settings(
        directory="",
        host=host,
        port=port,
        latency=latency,
        batch_seconds=batch_seconds,
        auto=auto,
        stepwise=stepwise,
        scoped=scoped,
        models=None if models is None else list(models),
        rpm=rpm,
        tpm=tpm,
        limits=dict(limits or {}),
        asks_parent=model is not None,
        detached=detached,
    )
    return Provider(settings, model=model, set_env=set_env)


class Provider:
    """A running local provider. Made by `provider`, or by `Provider.attach` for a running one.

    Attributes
    ----------
    url
        The root, ``http://127.0.0.1:PORT``.
    pid
        The server's process id; None for an attached one.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        model: Callable[[ModelRequest], Any] | None = None,
        set_env: bool = True,
    ) -> None:
        self.url = ""
        self.pid: int | None = None
        self._attached = False
        self._settings = settings
        self._model = model
        self._environment = Environment() if set_env else None
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: str | None = None
        self._worker: Worker | None = None

    @classmethod
    def attach(cls, url: str) -> Provider:
        """A handle on a provider that runs already, for instance from another process.

        Leaving a ``with`` block of such a handle stops nothing; `stop` does.

        Parameters
        ----------
        url
            The `url` of the other handle, or one of its base URLs.
        """
        handle = cls(Settings(directory=""), set_env=False)
        handle._attached = True
        parts = urlsplit(url)
        handle.url = f"{parts.scheme}://{parts.netloc}"
        return handle

    # ---- life

    def start(self) -> Self:
        """Start the process, and wait until it listens. ``with`` does this."""
        directory = tempfile.mkdtemp(prefix="polars-llm-provider-")
        self._directory = directory
        settings = msgspec.structs.replace(self._settings, directory=directory)
        command = [sys.executable, "-P", str(_PROCESS), msgspec.json.encode(settings).decode()]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if settings.detached else subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.pid = self._process.pid
        if settings.detached:
            _DETACHED.append(self._process)
        try:
            self.url = self._listening(self._process)
            if self._model is not None:
                self._worker = Worker(self.url, self._model)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self.stop()
            raise
        if self._environment is not None:
            self._environment.enter(self.env)
        return self

    def _listening(self, process: subprocess.Popen[bytes]) -> str:
        assert process.stdout is not None
        line = process.stdout.readline()
        process.stdout.close()
        if not line:
            code = process.wait(_START_SECONDS)
            message = (
                f"the local provider did not start: its process ended with code {code}\n\n"
                "Hint: its own error is on standard error, above; is the port free?"
            )
            raise RuntimeError(message)
        url: str = msgspec.json.decode(line)["url"]
        return url

    def stop(self) -> None:
        """End the process, and remove what it kept on disk. ``with`` does this."""
        if self._environment is not None:
            self._environment.leave()
        self._end_process()
        if self._worker is not None:
            self._worker.join()
        self._clean()

    def _end_process(self) -> None:
        process = self._process
        if process is None:  # An attached handle stops somebody else's process.
            self._call("stop")
            return
        if process.poll() is None:
            try:
                self._call("stop", _seconds=_STOP_SECONDS)
                process.wait(_STOP_SECONDS)
            except (OSError, http.client.HTTPException, subprocess.TimeoutExpired):
                process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def _clean(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self if self._attached else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._attached:
            return
        self.stop()
        if problem is None and self._worker is not None and self._worker.problem is not None:
            raise self._worker.problem

    # ---- where it is

    @property
    def openai_base_url(self) -> str:
        """What ``OPENAI_BASE_URL`` must be."""
        return f"{self.url}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """What ``ANTHROPIC_BASE_URL`` must be."""
        return self.url

    @property
    def env(self) -> dict[str, str]:
        """The environment variables with which a subprocess finds this provider."""
        return variables(self.openai_base_url, self.anthropic_base_url)

    # ---- what happened

    def bill(self) -> Bill:
        """What was charged so far; batches that are due are brought to their end first."""
        return msgspec.json.decode(self._raw("bill"), type=Bill)

    def batches(self) -> list[dict[str, Any]]:
        """All batches, oldest first.

        Each has id, protocol, state, endpoint, model, metadata, input_file_id, output_file_id,
        error_file_id, created, owner (the API key), total, counts (pending, succeeded, errored,
        expired, cancelled), errors, custom_ids.
        """
        found: list[dict[str, Any]] = self._call("batches")
        return found

    def requests(self, batch_id: str) -> list[dict[str, Any]]:
        """What was asked in a batch: dicts with custom_id and body, in the order sent."""
        found: list[dict[str, Any]] = self._call("requests", batch_id=batch_id)
        return found

    def files(self) -> list[dict[str, Any]]:
        """All files that were not deleted, uploaded or produced, as OpenAI shows them."""
        found: list[dict[str, Any]] = self._call("files")
        return found

    def log(self) -> list[Seen]:
        """Every request that arrived, in order."""
        return [Seen(*line) for line in self._call("log")]

    def exchanges(self) -> list[dict[str, Any]]:
        """The last thousand requests in detail.

        Each has operation, method, path, query, headers, body (the first 16 KiB, JSON bodies
        only) and at (unix time).
        """
        found: list[dict[str, Any]] = self._call("exchanges")
        return found

    def clear_log(self) -> None:
        """Forget the log and the exchanges; the bill stays."""
        self._call("clear_log")

    def reset(self) -> None:
        """Forget the bill, batches, files, faults and the log: as if it had just been started.

        Cheaper than another provider, for a suite that keeps one for all of its tests.
        """
        self._call("reset")

    # ---- what is to happen

    def advance(self, batch_id: str | None = None, *, steps: int = 1) -> list[str]:
        """Take one batch, or all, `steps` states further; gives their states."""
        states: list[str] = self._call("advance", batch_id=batch_id, steps=steps)
        return states

    def finish(
        self,
        batch_id: str | None = None,
        *,
        fraction: float = 1.0,
        outcome: Literal["completed", "expired", "cancelled", "failed"] | None = None,
    ) -> list[str]:
        """Bring one batch, or all, to the end; gives their states.

        Parameters
        ----------
        batch_id
            None for all batches that have not ended.
        fraction
            The share of requests that is answered; with less than 1 the batch expires, unless
            `outcome` says otherwise.
        outcome
            How it ends; None: as the faults have it, else completed.
        """
        if outcome is None and fraction < 1:
            outcome = "expired"
        states: list[str] = self._call("finish", batch_id=batch_id, fraction=fraction, outcome=outcome)
        return states

    def fault(
        self,
        kind: str,
        *,
        operation: str | None = None,
        method: str | None = None,
        path: str | None = None,
        times: int | None = 1,
        after: int = 0,
        **options: Any,
    ) -> int:
        """Order a fault.

        Parameters
        ----------
        kind
            What goes wrong: see `polars_llm.testing`.
        operation
            Which operations, a pattern such as ``"batches.create"`` or ``"*batches.*"``; several
            with ``|`` between them. None: those that the kind is meant for.
        method, path
            Narrow it to an HTTP method, or to paths that match a pattern.
        times
            How many requests it strikes; None: all of them.
        after
            How many matching requests it lets pass first.
        **options
            What the kind takes, for instance ``status=503, retry_after=2``.

        Returns
        -------
        int
            The fault's id, for `release` and `held`.
        """
        facts = {"method": method, "path": path, "times": times, "after": after}
        fault = order(kind, operation=operation, options=options, **facts)
        ordered: int = self._call("fault", fault=msgspec.to_builtins(fault))
        return ordered

    def faults(self) -> list[dict[str, Any]]:
        """The faults on order; ``struck`` says how often each one struck."""
        found: list[dict[str, Any]] = self._call("faults")
        return found

    def clear_faults(self) -> None:
        """Forget all faults, and let held requests go."""
        self._call("clear_faults")

    def release(self, fault_id: int | None = None) -> None:
        """Let go what a hold (or every hold) keeps; the fault is over."""
        self._call("release", fault_id=fault_id)

    def held(self, fault_id: int | None = None, *, seconds: float = 0.0) -> int:
        """How many requests are held now; waits up to `seconds` for the first."""
        count: int = self._call("held", fault_id=fault_id, seconds=seconds)
        return count

    # ---- the back door

    def _call(self, name: str, *, _seconds: float = _CONTROL_SECONDS, **arguments: Any) -> Any:
        return msgspec.json.decode(self._raw(name, _seconds=_seconds, **arguments))

    def _raw(self, name: str, *, _seconds: float = _CONTROL_SECONDS, **arguments: Any) -> bytes:
        host = urlsplit(self.url).netloc
        connection = http.client.HTTPConnection(host, timeout=_seconds)
        try:
            connection.request("POST", f"/_emulator/{name}", msgspec.json.encode(arguments))
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise LookupError(body.decode() or f"the provider knows no {name!r}")
        return body

    def wait_until_gone(self, seconds: float = 10.0) -> bool:
        """Whether the server has ended, within `seconds`: for tests of its end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self._call("log", _seconds=1.0)
            except (OSError, http.client.HTTPException):
                return True
            time.sleep(0.02)
        return False
