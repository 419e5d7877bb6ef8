"""The life of the server process: it listens, says where, and ends with its parent."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time

import msgspec

from .model import BuiltInModel
from .parent_model import ParentModel
from .server import Emulator
from .settings import Settings
from .wire import Server
from .world import World

_LOOK_SECONDS = 0.5


def host(settings_json: str, parent: int) -> None:
    """Serve until asked to stop, or until the parent is gone (unless detached)."""
    settings = msgspec.json.decode(settings_json, type=Settings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A batch of 100,000 requests makes no cycles worth looking for.
    gc.set_threshold(100_000)
    # Threads that wait for their turn get it soon, also while a big batch is being answered.
    sys.setswitchinterval(0.001)
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    world = World(settings, ParentModel() if settings.asks_parent else BuiltInModel())
    try:
        server = _listening(settings, Emulator(world, stopped.set))
        host_, port = server.server_address[:2]
        world.url = f"http://{host_!s}:{port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        print(msgspec.json.encode({"url": world.url}).decode(), flush=True)
        if not settings.detached:
            threading.Thread(target=_watch, args=(parent, stopped), daemon=True).start()
        stopped.wait()
        # The reply to `stop` is still on its way.
        time.sleep(0.02)
    finally:
        shutil.rmtree(settings.directory, ignore_errors=True)
    # Connections may hang in a held request: nothing here needs an orderly end.
    os._exit(0)


def _listening(settings: Settings, emulator: Emulator) -> Server:
    try:
        return Server((settings.host, settings.port), emulator)
    except (OSError, OverflowError) as error:  # in use, nobody's, or no port at all
        sys.exit(f"{settings.host}:{settings.port} cannot be listened at: {error}")


def _watch(parent: int, stopped: threading.Event) -> None:
    """Stop when the parent closes our standard input, or is no longer our parent.

    Both: a forked child of the parent can hold the pipe open, and other systems than POSIX don't
    change the parent of an orphan.
    """
    threading.Thread(target=_read_to_end, args=(stopped,), daemon=True).start()
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    stopped.set()


def _read_to_end(stopped: threading.Event) -> None:
    sys.stdin.buffer.read()
    stopped.set()
