"""The back door: what the handle in the test process asks of the server, as JSON over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .batches import Batch, Plan
from .faults import Fault
from .parent_model import ParentModel
from .wire import Request, Response
from .world import World

PREFIX = "/_emulator/"
_encode = msgspec.json.Encoder().encode


def answer(world: World, request: Request, stop: Callable[[], None]) -> Response:
    name = request.path.removeprefix(PREFIX)
    if name == "model":
        assert isinstance(world.model, ParentModel)
        return Response(101, headers={"upgrade": "parcels"}, takeover=world.model.serve)
    body = request.read()
    arguments: dict[str, Any] = msgspec.json.decode(body) if body else {}
    if name == "stop":
        stop()
        return _json(None)
    if name not in _COMMANDS:
        return Response(404)
    try:
        return _json(_COMMANDS[name](world, **arguments))
    except LookupError as problem:
        return Response(400, str(problem.args[0]).encode())


def _json(value: Any) -> Response:
    return Response(200, _encode(value), {"content-type": "application/json"})


def _bill(world: World) -> Any:
    world.batches.settle(world)
    return world.account.bill()


def _batches(world: World) -> list[dict[str, Any]]:
    world.batches.settle(world)
    return [_facts(batch) for batch in world.batches.listing()]


def _facts(batch: Batch) -> dict[str, Any]:
    pending = 0 if batch.ended else batch.total
    return {
        "id": batch.id,
        "protocol": batch.protocol,
        "state": batch.stage,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "metadata": batch.metadata,
        "input_file_id": batch.input_file_id,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created": batch.created,
        "owner": batch.owner,
        "total": batch.total,
        "counts": {"pending": pending, **batch.counts},
        "errors": batch.errors,
        "custom_ids": batch.custom_ids,
    }


def _requests(world: World, batch_id: str) -> list[dict[str, Any]]:
    batch = _some(world, batch_id)[0]
    rows = batch.dialect.rows(list(batch.source.lines()))
    return [{"custom_id": row.custom_id, "body": row.body} for row in rows]


def _some(world: World, batch_id: str | None) -> list[Batch]:
    chosen = [b for b in world.batches.listing() if batch_id in (None, b.id)]
    if batch_id is not None and not chosen:
        raise LookupError(f"there is no batch {batch_id!r}")
    return chosen


def _advance(world: World, batch_id: str | None, steps: int) -> list[str]:
    batches = _some(world, batch_id)
    for batch in batches:
        for _ in range(steps):
            batch.step(world)
    return [batch.stage for batch in batches]


def _finish(world: World, batch_id: str | None, fraction: float, outcome: Any) -> list[str]:
    batches = _some(world, batch_id)
    for batch in batches:
        with batch.lock:
            if not batch.ended and outcome is not None:
                message = "The batch was made to fail."
                batch.plan = Plan(outcome, fraction, "server_error", message)
            batch.finish(world)
    return [batch.stage for batch in batches]


def _fault(world: World, fault: Any) -> int:
    return world.faults.add(msgspec.convert(fault, Fault))


_COMMANDS: dict[str, Callable[..., Any]] = {
    "bill": _bill,
    "batches": _batches,
    "requests": _requests,
    "files": lambda world: [file.shown() for file in world.files.listing()],
    "log": lambda world: world.journal.lines(),
    "exchanges": lambda world: world.journal.details(),
    "clear_log": lambda world: world.journal.clear(),
    "reset": lambda world: world.reset(),
    "advance": _advance,
    "finish": _finish,
    "fault": _fault,
    "faults": lambda world: world.faults.listing(),
    "clear_faults": lambda world: world.faults.clear(),
    "release": lambda world, fault_id: world.faults.release(fault_id),
    "held": lambda world, fault_id, seconds: world.faults.held(fault_id, seconds),
}
