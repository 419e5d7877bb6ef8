"""The local provider in a terminal: what `polars-llm emulate` runs."""

from __future__ import annotations

import signal
import threading
from typing import Any


def run(
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    latency: float = 0.05,
    batch_seconds: float = 10.0,
    **options: Any,
) -> None:
    """Run a local provider until Ctrl+C, then print its bill.

    Parameters
    ----------
    host, port
        Where to listen; port 0 is a free one.
    latency
        Seconds that each realtime request takes.
    batch_seconds
        Seconds from the creation of a batch to its end.
    **options
        Anything else that `polars_llm.testing.provider` takes.
    """
    from .handle import provider

    settings = {"latency": latency, "batch_seconds": batch_seconds, **options}
    with provider(host=host, port=port, set_env=False, **settings) as p:
        print(f"OpenAI     {p.openai_base_url}")
        print(f"Anthropic  {p.anthropic_base_url}")
        print("\nIn the shell that runs your code:\n")
        for name, value in p.env.items():
            print(f"export {name}={value}")
        print("\nCtrl+C ends it and prints the bill.", flush=True)
        _wait()
        print(f"\n{p.bill()}", flush=True)


def _wait() -> None:
    """Until Ctrl+C or SIGTERM."""
    ended = threading.Event()
    before = {sig: signal.signal(sig, lambda *_: ended.set()) for sig in _SIGNALS}
    try:
        # A bare wait can't be interrupted on every platform; this one looks up now and then.
        while not ended.wait(0.5):
            pass
    finally:
        for sig, handler in before.items():
            signal.signal(sig, handler)


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
