"""An object store on a real socket (moto), with faults in front of it."""

from __future__ import annotations

import dataclasses
import http.client
import itertools
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

__all__ = ["ObjectStore"]

Operation = Literal["list", "get", "put", "delete", "complete", "any"]


@dataclasses.dataclass
class Fault:
    """What happens to the next requests of a kind."""

    operation: Operation
    act: Callable[[dict[str, Any]], str | None]
    times: int
    after: bool = False
    skip: int = 0
    query: str = ""

    def is_due(self, operation: str, query: str) -> bool:
        if self.operation not in {operation, "any"} or self.query not in query or self.times <= 0:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class ObjectStore:
    """One bucket. Requests are seen before and after moto answers them.

    Attributes
    ----------
    log
        (operation, name) of each request.
    sent
        Bytes of all replies.
    """

    def __init__(self, port: int, app: Any) -> None:
        self._app = app
        self.address = f"http://127.0.0.1:{port}"
        self.bucket = ""
        self._numbers = itertools.count()
        self.log: list[tuple[str, str]] = []
        self.sent = 0
        self._faults: list[Fault] = []
        self._hidden: list[str] = []
        self._kept: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        """Start one, and stop it after the block."""
        from moto.moto_server.werkzeug_app import create_backend_app
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        stores: list[Self] = []
        server = make_server("127.0.0.1", 0, lambda *call: stores[0]._answer(*call), threaded=True)
        stores.append(cls(server.port, create_backend_app("s3")))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            stores[0].make_bucket()
            yield stores[0]
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def url(self) -> str:
        """Of a prefix in the bucket, as `cache_dir` takes it."""
        return f"s3://{self.bucket}/some/prefix?endpoint_override={self.address}"

    def make_bucket(self) -> None:
        """Begin with an empty bucket and without faults."""
        self.calm()
        self.bucket = f"bucket-{next(self._numbers)}"
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"))
        connection.request("PUT", f"/{self.bucket}")
        assert connection.getresponse().read() is not None
        connection.close()
        self.log.clear()

    # --- faults ----------------------------------------------------------------------------------------

    def fail(self, operation: Operation = "any", *, status: int = 503, times: int = 10**6) -> None:
        """Answer with an error instead."""
        self._faults.append(Fault(operation, lambda _: f"{status} no", times))

    def fail_parts(self, number: int) -> None:
        """Refuse that part of every upload that is sent in parts."""
        self._faults.append(Fault("put", lambda _: "503 no", 10**6, query=f"partNumber={number}&"))

    def call(
        self,
        operation: Operation,
        act: Callable[[], object],
        *,
        times: int = 1,
        skip: int = 0,
        after: bool = False,
    ) -> None:
        """Call `act` before (or after) such a request has its effect; not for the first few of them."""

        def call(_: dict[str, Any]) -> None:
            act()

        self._faults.append(Fault(operation, call, times, after, skip))

    def hide(self, pattern: str) -> None:
        """Objects whose names match are not listed, from now on."""
        self._hidden.append(pattern)

    def show_removed(self) -> None:
        """From now on, what is removed stays in the list."""
        self._kept = {**self._kept, "": 0}

    def calm(self) -> None:
        """No faults any more."""
        self._faults.clear()
        self._hidden.clear()
        self._kept.clear()

    # --- answering -------------------------------------------------------------------------------------

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        operation, name = _operation(environ)
        with self._lock:
            self.log.append((operation, name))
            due = [f for f in self._faults if f.is_due(operation, environ["QUERY_STRING"])]
        for fault in due:
            refused = None if fault.after else fault.act(environ)
            if refused:
                start(refused, [("Content-Type", "application/xml"), ("Connection", "close")])
                code = "AccessDenied" if refused.startswith("403") else "ServiceUnavailable"
                return [f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()]
        said: list[Any] = []
        body = b"".join(self._app(environ, lambda *head: said.extend(head[:2])))
        for fault in due:
            if fault.after:
                fault.act(environ)
        self.sent += len(body)
        if operation == "list":
            body = self._listing(body)
        if operation == "delete" and "" in self._kept:
            self._kept[name] = 1
        headers = [(k, v) for k, v in said[1] if k.lower() != "content-length" or operation != "list"]
        start(said[0], headers + ([("Content-Length", str(len(body)))] if operation == "list" else []))
        return [body]

    def _listing(self, body: bytes) -> bytes:
        def shown(found: re.Match[bytes]) -> bytes:
            key = found[1].decode().rpartition("/")[2]
            return b"" if any(re.search(pattern, key) for pattern in self._hidden) else found[0]

        body = re.sub(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", shown, body, flags=re.DOTALL)
        ghosts = b"".join(
            b"<Contents><Key>some/prefix/results/%s</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified>"
            b"<ETag>x</ETag><Size>1</Size></Contents>" % name.encode()
            for name in self._kept
            if name
        )
        return body.replace(b"</ListBucketResult>", ghosts + b"</ListBucketResult>")


def _operation(environ: dict[str, Any]) -> tuple[Operation, str]:
    method, path, query = environ["REQUEST_METHOD"], environ["PATH_INFO"], environ["QUERY_STRING"]
    name = path.rpartition("/")[2]
    if method == "GET" and "list-type" in query:
        return "list", ""
    if method == "POST":
        return ("complete" if query.startswith("uploadId") else "put"), name
    kinds: dict[str, Operation] = {"GET": "get", "HEAD": "get", "PUT": "put", "DELETE": "delete"}
    return kinds.get(method, "any"), name
