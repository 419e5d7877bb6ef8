"""The emulator itself: finds the operation, lets the faults strike, shapes errors, keeps the log."""

from __future__ import annotations

import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

from . import anthropic_api, control, openai_api
from .anthropic_output import anthropic_error
from .dialogue import Failure, Refused, refuse
from .exchange import Exchange, ProtocolName, Route, reply
from .faults import Fault
from .openai_output import new_id, openai_error
from .spoiling import spoil
from .wire import Hangup, Request, Response, process_behind
from .world import World

_HEX_ID = re.compile(r"\{(\w+)\}")
_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"
_HIDDEN = ("accept", "accept-encoding", "host", "connection")


class Emulator:
    """Answers every request that comes in."""

    def __init__(self, world: World, stop: Callable[[], None]) -> None:
        self._world = world
        self._stop = stop
        self._routes = [("openai", r) for r in openai_api.ROUTES]
        self._routes += [("anthropic", r) for r in anthropic_api.ROUTES]
        self._exact = {(r.method, r.path): (p, r) for p, r in self._routes if "{" not in r.path}
        self._patterns = [
            (p, r, re.compile(_HEX_ID.sub(r"(?P<\1>[^/]+)", r.path) + "$"))
            for p, r in self._routes
            if "{" in r.path
        ]

    def __call__(self, request: Request) -> Response:
        if request.path.startswith(control.PREFIX):
            return control.answer(self._world, request, self._stop)
        line = self._world.journal.open(request.method, request.path)
        response = self._answer(request)
        line[2] = response.status
        return response

    def _answer(self, request: Request) -> Response:
        protocol, route, params = self._find(request)
        x = Exchange(self._world, request, route.operation, protocol, params, [])
        x.detail = {
            "operation": route.operation,
            "method": request.method,
            "path": request.path,
            "query": request.query,
            "headers": {k: v for k, v in request.headers.items() if k not in _HIDDEN},
            "body": None,
            "at": time.time(),
        }
        self._world.journal.detail(x.detail)
        x.faults = self._world.faults.take(route.operation, request.method, request.path)
        response = self._carry_out(x, route)
        for fault in x.faults:
            response = _afterwards(x, fault, response)
        return self._signed(response, protocol)

    def _carry_out(self, x: Exchange, route: Route) -> Response:
        try:
            for fault in x.faults:
                _beforehand(x, fault)
            x.owner = _authenticate(x)
            if x.protocol == "anthropic":
                anthropic_api.check_version(x)
            return spoil(route.handler(x), x.faults)
        except Refused as refused:
            if any(fault.options.get("html") for fault in x.faults):
                return Response(refused.failure.status, _HTML, {"content-type": "text/html"})
            return _shaped(x.protocol, refused)
        except (Hangup, ConnectionError):
            raise
        except Exception:  # noqa: BLE001 - it is shown, and answered as the error it is
            # A bug of the emulator must look like one: the trace here, a 500 at the client.
            traceback.print_exc()
            bug = Failure(status=500, message="The emulator has a bug: see its standard error.")
            return _shaped(x.protocol, Refused(bug))

    def _find(self, request: Request) -> tuple[ProtocolName, Route, dict[str, str]]:
        path = request.path.rstrip("/")
        if request.path.startswith("/v1/models") and "anthropic-version" in request.headers:
            return "anthropic", anthropic_api.MODELS, {}
        if (exact := self._exact.get((request.method, path))) is not None:
            return exact[0], exact[1], {}  # type: ignore[return-value]
        for protocol, route, pattern in self._patterns:
            if route.method == request.method and (found := pattern.match(path)):
                return protocol, route, found.groupdict()  # type: ignore[return-value]
        anthropic = path.startswith("/v1/messages")
        return "anthropic" if anthropic else "openai", _UNKNOWN, {}

    def _signed(self, response: Response, protocol: str) -> Response:
        if protocol == "openai":
            response.headers.setdefault("x-request-id", new_id("req_"))
            response.headers.setdefault("openai-organization", "org-emulated")
            response.headers.setdefault("openai-version", "2020-10-01")
        else:
            response.headers.setdefault("request-id", new_id("req_"))
            response.headers.setdefault("anthropic-organization-id", "emulated")
        return response


def _no_such_route(x: Exchange) -> Response:
    message = f"Invalid URL ({x.request.method} {x.request.path})"
    raise refuse(message, status=404)


_UNKNOWN = Route("unknown", "GET", "", _no_such_route)


def _shaped(protocol: str, refused: Refused) -> Response:
    failure = refused.failure
    if protocol == "openai":
        return reply(openai_error(failure), status=failure.status, headers=refused.headers)
    request_id = new_id("req_")
    headers = {**refused.headers, "request-id": request_id}
    return reply(anthropic_error(failure, request_id), status=failure.status, headers=headers)


def _authenticate(x: Exchange) -> str:
    """The key of the request: any will do, unless it says of itself that it is invalid."""
    headers = x.request.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not key:
        message = (
            "You didn't provide an API key."
            if x.protocol == "openai"
            else "Authentication is missing: neither x-api-key nor Authorization was sent."
        )
        raise Refused(Failure(status=401, message=message))
    if "invalid" in key:
        raise Refused(Failure(status=401, message="Incorrect API key provided."))
    return key


def _beforehand(x: Exchange, fault: Fault) -> None:
    """Strike before anything is accepted."""
    options: dict[str, Any] = fault.options
    match fault.kind:
        case "status" | "not-found" | "gone":
            x.request.drain()
            raise _status(options)
        case "drop":
            x.request.drain()
            raise Hangup
        case "kill":
            x.request.drain()
            _kill(x, options["pid"])
        case "hold":
            x.world.faults.hold(fault)
        case "slow":
            time.sleep(options["seconds"])


def _afterwards(x: Exchange, fault: Fault, response: Response) -> Response:
    """Strike when the request was carried out, before its reply leaves."""
    if response.status >= 400:
        return response
    match fault.kind:
        case "create-then-500":
            return _shaped(x.protocol, _status(fault.options))
        case "create-then-drop":
            raise Hangup
        case "create-then-kill":
            _kill(x, fault.options["pid"])
        case "create-then-hold":
            x.world.faults.hold(fault)
        case "create-then-garbage":
            return Response(200, b'{"id": "batch_', {"content-type": "application/json"})
    return response


def _status(options: dict[str, Any]) -> Refused:
    status = options["status"]
    message = options.get("message") or f"An error with status {status} was asked for."
    facts = {"type": options.get("type"), "code": options.get("code")}
    wait = options.get("retry_after")
    headers = {} if wait is None else {"retry-after": str(wait)}
    return Refused(Failure(status=status, message=message, **facts), headers)


def _kill(x: Exchange, pid: int | None) -> None:
    """Kill the client, as the kernel would for want of memory, and hang up."""
    os.kill(process_behind(x.request.peer) if pid is None else pid, signal.SIGKILL)
    raise Hangup
