"""One request on its way through the emulator, and what all handlers do with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from .batches import Batch, Plan
from .dialogue import ModelRequest, Refused, refuse
from .faults import Fault
from .wire import Request, Response
from .world import Answer, World

ProtocolName = Literal["openai", "anthropic"]
_KEPT_BODY = 16_384
_encode = msgspec.json.Encoder().encode


@dataclass(slots=True)
class Exchange:
    """What a handler gets."""

    world: World
    request: Request
    operation: str
    protocol: ProtocolName
    params: dict[str, str]
    faults: list[Fault]
    owner: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def scope(self) -> str | None:
        """Whose batches and files this request may see; None for all."""
        return self.owner if self.world.settings.scoped else None

    def read(self) -> bytes:
        body = self.request.read()
        self.detail["body"] = body[:_KEPT_BODY].decode(errors="replace")
        return body

    def json(self) -> dict[str, Any]:
        try:
            body = msgspec.json.decode(self.read())
        except msgspec.DecodeError as problem:
            message = f"We could not parse the JSON body of your request: {problem}"
            raise refuse(message) from None
        if not isinstance(body, dict):
            raise refuse("We could not parse the JSON body of your request: not an object.")
        return body

    def struck(self, kind: str) -> Fault | None:
        return next((fault for fault in self.faults if fault.kind == kind), None)


@dataclass(frozen=True, slots=True)
class Route:
    """An operation: its name, where it is found, and who carries it out."""

    operation: str
    method: str
    path: str
    handler: Callable[[Exchange], Response]


def reply(body: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, _encode(body), {"content-type": "application/json", **(headers or {})})


def limit_of(x: Exchange, *, default: int, most: int) -> int:
    """The `limit` of a list request."""
    given = x.request.query.get("limit", str(default))
    if not given.isdigit() or not 1 <= int(given) <= most:
        raise refuse(f"Invalid 'limit': {given!r}. Expected 1 to {most}.", param="limit")
    return int(given)


def create(x: Exchange, batch: Batch) -> None:
    """Let a batch begin its life, the way the faults and settings have it."""
    batch.owner = x.owner
    batch.seconds = x.world.settings.batch_seconds
    for fault in x.faults:
        options = fault.options
        match fault.kind:
            case "expire":
                batch.plan = Plan("expired", options["fraction"])
            case "cancel":
                batch.plan = Plan("cancelled", options["fraction"])
            case "fail":
                batch.plan = Plan("failed", 0.0, options["code"], options["message"])
            case "list-lag":
                batch.visible_at = time.time() + options["seconds"]
            case "batch-seconds":
                batch.seconds = options["seconds"]
    x.world.batches.add(batch)
    x.world.account.note(batches=1)


def look(x: Exchange, batch: Batch) -> None:
    """Bring a batch up to date before it is shown."""
    if x.world.settings.auto:
        batch.settle(x.world, steps=1 if x.world.settings.stepwise else None)


def cancel(x: Exchange, batch: Batch) -> None:
    """Cancel at the client's wish; the share that was done by then is answered."""
    if batch.seconds > 0:
        look(x, batch)
    if batch.ended or batch.stage == "cancelling":
        message = f"Cannot cancel a batch with status '{batch.stage}'."
        raise refuse(message, status=409)
    struck = x.struck("cancel")
    share = batch.progress(time.time()) if batch.seconds > 0 else 0.0
    batch.cancel(struck.options["fraction"] if struck else share)


def ask_realtime(x: Exchange, request: ModelRequest) -> tuple[Answer, dict[str, str]]:
    """Answer one request now: rate limits, latency, the model, and the bill."""
    world, started = x.world, time.monotonic()
    headers = world.rates.draw(x.protocol, request.model, request.input_tokens)
    answer = world.ask([request])[0]
    rest = world.settings.latency - (time.monotonic() - started)
    if rest > 0:
        time.sleep(rest)
    if answer.reply.failure is not None:
        raise Refused(answer.reply.failure, headers)
    world.account.charge([answer.charge(request)])
    return answer, headers
