"""What this library calls of Ray outside of a run: joining a cluster, whether there is room, its errors.

Written for Ray 2.60 (docs/ray.md). For `ray.py` beside it, and for `RayVLLM.close`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from polars_llm.backends.vllm import on_nodes, weights
from polars_llm.backends.vllm.binding import OutOfMemory, is_memory
from polars_llm.errors import InvalidRequest, ProviderError

__all__ = ["SMALL", "check_accelerators", "check_room", "connect", "disconnect", "failure", "look", "quiet"]

SMALL = 0.2
"""Of a CPU, for each stage beside the engine: a small cluster must not wait for itself."""

_LOGGERS = ("ray", "ray._private.worker", "ray.data", "ray.llm", "vllm")
_PATIENCE = 10.0  # seconds until the head node has to answer
_ADDRESSES_HERE = (None, "local", "auto")
_STATUS = "`ray status` on its head node says whether it runs; its port is 6379 as a rule."
_TOKEN = (
    "set RAY_AUTH_MODE=token, and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token, before Python"
    " starts."
)

_door = threading.RLock()
_joined_by: int | None = None  # the process that called ray.init, if that was ours
_joined_at: str | None = None  # as it was said: Ray itself says the address of the node
_left = threading.Event()  # set when this process leaves the cluster that it started
_quiet: dict[str, int] = {}
_depth = 0


def _import() -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves this machine
    try:
        # Warnings are of the process: one thread at a time, and for no longer than it takes.
        with _door, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports, for its developers
            import ray
            import ray.data.llm
    except ImportError as error:
        raise ImportError(
            "A cluster needs Ray.\n\nHint: pip install 'polars-llm-batch[ray]'; what the cluster's nodes need"
            " is in docs/ray.md."
        ) from error
    return ray


def connect(address: str | None, engines: int) -> Any:
    """Ray, joined to the cluster that the user said, or to one of this process.

    Parameters
    ----------
    address
        None: ``RAY_ADDRESS``, else a cluster of this process. A Ray that the user has initialised is taken
        as it is.
    engines
        How many a cluster of this process has room for.

    Raises
    ------
    ImportError
        Ray is not installed.
    InvalidRequest
        An address of Ray Client; or this process has joined another cluster already.
    ProviderError
        Nobody answers at the address, or it wants a token.
    """
    global _joined_by, _joined_at
    ray = _import()
    address = address or os.environ.get("RAY_ADDRESS") or None
    with _door:
        through = ray.is_initialized() and ray.util.client.ray.is_connected()
        if through or (address or "").startswith("ray://"):
            raise InvalidRequest(
                "This process joined its cluster by Ray Client, through which Ray Data does not work"
                if through
                else f"{address} is an address of Ray Client, through which Ray Data does not work",
                hint="run this on a node of the cluster (`ray job submit`) with ray_address='auto', or"
                " HOST:6379 on a machine that reaches all nodes. Nothing was asked.",
            )
        # What is pickled by value needs nothing of this library on the nodes.
        for module in (on_nodes, weights):
            ray.cloudpickle.register_pickle_by_value(module)
        if ray.is_initialized():
            _check_same(ray, address)
            return ray
        own: dict[str, Any] = {}
        if address in {None, "local"}:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            own = {"num_cpus": max(os.cpu_count() or 1, 2 + engines), "include_dashboard": False}
        try:
            _knock(address)
            with quiet():
                _init(ray, address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            said = _gist(_cause(error))
            raise ProviderError(
                f"No Ray cluster could be joined at {address or 'this machine'}: {said}",
                provider="ray",
                hint=f"{_TOKEN if 'AuthenticationError' in said else _STATUS} Nothing was asked.",
            ) from None
        _joined_by, _joined_at = os.getpid(), address
        return ray


def _init(ray: Any, **settings: Any) -> None:
    """`ray.init` on a thread that lives as long as the cluster.

    The kernel ends a cluster of this process together with the thread that started it (Ray asks it to, by
    PR_SET_PDEATHSIG), and Ray's native code then ends the process, without a word. The main thread stays; one
    of a server, or of an event loop's pool, may be gone in a second.
    """
    global _left
    _left.set()  # where the user has called ray.shutdown(), nobody has told the thread of that cluster
    if threading.current_thread() is threading.main_thread():
        ray.init(**settings)
        return
    _left = left = threading.Event()
    started: Future[None] = Future()

    def stay() -> None:
        try:
            ray.init(**settings)
        except BaseException as error:  # noqa: BLE001  # raised where it was asked for
            started.set_exception(error)
            return
        started.set_result(None)
        left.wait()

    threading.Thread(target=stay, name="polars_llm-ray", daemon=True).start()
    started.result()


def _knock(address: str | None) -> None:
    """Raise OSError where nobody listens: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def _check_same(ray: Any, address: str | None) -> None:
    here = ray.get_runtime_context().gcs_address
    ours = _joined_at if _joined_by == os.getpid() else None
    if address not in {*_ADDRESSES_HERE, here, ours, os.environ.get("RAY_ADDRESS")}:
        raise InvalidRequest(
            f"ray_address is {address!r}, and this process has joined the cluster at {here}",
            hint="leave ray_address out to use that one, or call ray.shutdown() first. Nothing was asked.",
        )


def disconnect() -> None:
    """Leave the cluster that `connect` joined; one of this process ends with that."""
    global _joined_by, _joined_at
    with _door:
        if _joined_by == os.getpid():
            with quiet():
                _import().shutdown()
            _joined_by = _joined_at = None
            _left.set()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray's messages in this process off; several threads may be in it at once."""
    global _depth
    with _door:
        _depth += 1
        if _depth == 1:
            _quiet.update({name: logging.getLogger(name).level for name in _LOGGERS})
            # Without a handler here each of its loggers would make itself one, to the terminal.
            if not logging.getLogger("ray.llm").handlers:
                logging.getLogger("ray.llm").addHandler(logging.NullHandler())
        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        with _door:
            _depth -= 1
            if _depth == 0:
                for name, level in _quiet.items():
                    if logging.getLogger(name).level == logging.CRITICAL:  # else it was configured since
                        logging.getLogger(name).setLevel(level)


def look(
    ray: Any,
    model: str,
    settings: Mapping[str, Any],
    *,
    digest: str | None,
    chat: bool,
    runtime_env: Mapping[str, Any],
    secrets: object,
    gpu: str | None,
) -> dict[str, Any]:
    """`on_nodes.look` from a node of the kind that engines run on, before one is started.

    Raises
    ------
    InvalidRequest
        The node has no vLLM, not this model, or one without a chat template.
    """
    needs: dict[str, Any] = {"num_cpus": 0, "max_retries": 2, "runtime_env": dict(runtime_env)}
    if ray.cluster_resources().get("GPU"):
        needs |= {"num_gpus": 0.01} | ({"accelerator_type": gpu} if gpu else {})
    task = ray.remote(on_nodes.look).options(**needs)
    of_path = weights.directory_digest if digest else None
    found: dict[str, Any] = ray.get(task.remote(model, settings, of_path, chat=chat, secrets=secrets))
    if found["vllm"] is None:
        raise InvalidRequest(
            "There is no vLLM on the nodes of this cluster.",
            hint="install it there (docs/ray.md), or runtime_env={'pip': ['vllm==...']}. Nothing was asked.",
        )
    if not found["there"]:
        raise InvalidRequest(
            f"The nodes of this cluster have no {model}.",
            hint="put the model where all nodes see it under this path, or give its name of the hub."
            " Nothing was asked.",
        )
    if digest and found["digest"] != digest:
        raise InvalidRequest(
            f"The nodes of this cluster have another model at {model} than this machine.",
            hint="its answers would be kept under a wrong key: give both the same files. Nothing was asked.",
        )
    if chat and found["template"] is None:
        raise InvalidRequest(
            "This model has no chat template.",
            hint="pllm.RayVLLM(..., raw=True) sends the text as it is; or give one with"
            " engine={'chat_template': ...}. Nothing was asked.",
        )
    return found


def check_room(resources: Mapping[str, float], bundles: Iterable[Mapping[str, float]], engines: int) -> None:
    """Raise InvalidRequest where the cluster is too small: Ray would wait for ever."""
    wanted: dict[str, float] = {"CPU": 3 * SMALL}
    for bundle in bundles:
        for name, amount in bundle.items():
            wanted[name] = wanted.get(name, 0.0) + amount * engines
    for name, amount in wanted.items():
        if amount > resources.get(name, 0.0) + 1e-6:
            raise InvalidRequest(
                f"This cluster has {resources.get(name, 0.0):g} {name}, and {amount:g} are needed to begin",
                hint="ask for less (concurrency=, engine={'tensor_parallel_size': ...}), or, where it grows"
                " by itself, say what an engine takes: processor={'placement_group_config': {'bundles':"
                " [{'CPU': 1, 'GPU': 1}]}}. Nothing was asked.",
            )


def check_accelerators(resources: Mapping[str, float], *, kind: str | None, cpu_build: bool) -> None:
    """Raise InvalidRequest where the cluster has none of what an engine runs on."""
    if kind and f"accelerator_type:{kind}" not in resources:
        have = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        raise InvalidRequest(
            f"This cluster has no accelerator of type {kind!r}; it has {', '.join(have) or 'none'}",
            hint="where it grows by itself, say what an engine takes with processor="
            "{'placement_group_config': {'bundles': [{'CPU': 1, 'GPU': 1}]}}. Nothing was asked.",
        )
    if not cpu_build and not resources.get("GPU"):
        raise InvalidRequest(
            "This cluster has no GPU, and the vLLM on its nodes is not a build for CPUs",
            hint="where it grows by itself, say what an engine takes: processor={'placement_group_config':"
            " {'bundles': [{'CPU': 1, 'GPU': 1}]}}. Nothing was asked.",
        )


def failure(ray: Any, model: str, error: BaseException, hidden: Iterable[str]) -> ProviderError:
    """What stopped a run, in one line of the cause; `hidden` are values that nobody may read."""
    said = _cause(error)
    text = _gist(said)
    pid, ip = re.search(r"pid=(\d+)", said), re.search(r"ip=([\w.:]+)", said)
    if "initialization failed" in text and pid and ip:
        text = _last_words(ray, int(pid[1]), ip[1]) or text
    for value in hidden:
        text = text.replace(value, "...")
    again = "then run the same line again: what was answered is kept."
    if is_memory(text):
        return OutOfMemory(
            f"There is not enough memory on the cluster for {model}: {text}",
            provider="ray",
            kind="out_of_memory",
            hint="set engine={'max_model_len': ..., 'gpu_memory_utilization': ...} (on CPUs"
            f" 'kv_cache_memory_bytes'), or more GPUs with 'tensor_parallel_size'; {again}",
        )
    kinds = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError)
    lost = isinstance(error, kinds) and "creation task" not in said
    fact = (
        f"The cluster lost an engine of {model} too often" if lost else f"The cluster could not run {model}"
    )
    where = "the logs of Ray are in /tmp/ray/session_latest/logs on its nodes"
    if "unexpected keyword" in text:
        where = "engine= takes the settings of vLLM's AsyncEngineArgs, by its own names"
    return ProviderError(f"{fact}: {text}", provider="ray", hint=f"{where}; {again}")


def _cause(error: BaseException) -> str:
    """The error that began it: Ray's and Ray Data's own only carry it."""
    found, seen = error, {id(error)}
    while (error := getattr(error, "cause", None) or error.__cause__ or error) and id(error) not in seen:
        seen.add(id(error))
        found = error if str(error).strip() else found
    return f"{type(found).__name__}: {found}"


def _gist(text: str) -> str:
    """Of a traceback the last line, of anything else the first ones."""
    lines = [line.strip() for line in re.sub(r"\x1b\[\d+m", "", text).splitlines() if line.strip()]
    if any(line.startswith(("Traceback ", 'File "')) for line in lines):
        raised = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception)\b", line)]
        lines = raised[-1:] or lines[-1:]
    return " ".join(lines[:6])[:2_000]


def _last_words(ray: Any, pid: int, ip: str) -> str | None:
    task = ray.remote(on_nodes.last_words).options(num_cpus=0, resources={f"node:{ip}": 0.001})
    try:
        words: str | None = ray.get(task.remote(pid), timeout=30)
    except ray.exceptions.RayError:
        return None  # the node is gone; the error in hand is what there is
    return words
