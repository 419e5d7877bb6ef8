"""`python -m polars_llm.testing`: the local provider in a terminal."""

from __future__ import annotations

import argparse

from .emulate import run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m polars_llm.testing", description=run.__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds a realtime call takes")
    parser.add_argument("--batch-seconds", type=float, default=10.0, help="seconds a batch takes")
    options = parser.parse_args()
    run(
        options.host,
        options.port,
        latency=options.latency,
        batch_seconds=options.batch_seconds,
    )


if __name__ == "__main__":
    main()
