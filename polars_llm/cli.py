"""polars-llm: jobs, watch, cancel, abandon, recover, results, emulate."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from polars_llm import operate
from polars_llm.config import Config
from polars_llm.errors import InvalidRequest, LLMWarning, PolarsLLMError

__all__ = ["main"]

# sysexits.h: "temporary failure, invite the user to try again later"; cron scripts know it.
WORK_LEFT = 75
ERROR = 1

# What a terminal takes for an order; a line feed and a tab are text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers hold what a terminal's own alphabet may not; JSON is UTF-8 wherever it goes.
        sys.stdout.reconfigure(encoding="utf-8" if chosen.json else None, errors="replace")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", LLMWarning)
            warnings.showwarning = _warn
            Config(cache_dir=chosen.cache_dir, ledger_dir=chosen.ledger_dir)
            code: int = chosen.run(chosen)
    except (PolarsLLMError, ImportError) as error:
        print(f"polars-llm: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        print("polars-llm: stopped; jobs go on at the provider.", file=sys.stderr)
        return 130
    return code


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    print(f"polars-llm: {message}", file=sys.stderr)


def _jobs(chosen: argparse.Namespace) -> int:
    _show(operate.jobs(open_only=chosen.open), chosen.json)
    return 0


def _watch(chosen: argparse.Namespace) -> int:
    while True:
        left = operate.watch()
        if left.is_empty() or chosen.interval is None:
            break
        time.sleep(chosen.interval)
    _show(left, chosen.json)
    return WORK_LEFT if left.height else 0


def _cancel(chosen: argparse.Namespace) -> int:
    for job in chosen.job:
        operate.cancel(job)
        _say({"job": job, "outcome": "cancelling"}, chosen.json)
    return 0


def _abandon(chosen: argparse.Namespace) -> int:
    for job in chosen.job:
        operate.abandon(job)
        _say({"job": job, "outcome": "abandoned"}, chosen.json)
    return 0


def _recover(chosen: argparse.Namespace) -> int:
    _show(operate.recover(chosen.provider), chosen.json)
    return 0


def _results(chosen: argparse.Namespace) -> int:
    answers = operate.results()
    if chosen.output is not None:
        try:
            answers.sink_parquet(chosen.output)
        except OSError as error:
            raise InvalidRequest(
                f"{chosen.output} cannot be written: {error}",
                hint="give --output a file in a directory that is there and can be written. The answers are"
                " in the cache as before.",
            ) from error
        _write(f"{chosen.output}\n")
        return 0
    if not chosen.json:
        answers = answers.drop("vector")  # a thousand numbers are no cell of a table
    _show(answers.head(chosen.limit).collect(engine="streaming"), chosen.json)
    return 0


def _emulate(chosen: argparse.Namespace) -> int:
    from polars_llm.testing import emulate

    try:
        emulate.run(host=chosen.host, port=chosen.port)
    except RuntimeError as error:
        print(f"polars-llm: {error}", file=sys.stderr)
        return ERROR
    return 0


def _say(facts: dict[str, object], as_json: bool) -> None:
    _show(pl.DataFrame([facts]), as_json)


def _show(frame: pl.DataFrame, as_json: bool) -> None:
    if as_json:
        shown = frame.with_columns(pl.col(pl.Duration).dt.total_seconds(fractional=True))
        _write(shown.write_ndjson() or "")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Columns that say nothing take no room; a pipe is not cut at 80 columns.
    said = [name for name in frame.columns if frame[name].null_count() < frame.height]
    readable = frame.select(said).with_columns(
        pl.col(pl.Datetime).dt.strftime("%Y-%m-%d %H:%M"),
        (pl.col(pl.Duration).dt.total_seconds() * 1_000_000).cast(pl.Duration).dt.to_string("polars"),
    )
    table = Table(*said, box=None, header_style="bold")
    for row in readable.iter_rows():
        # As text, and not as markup: brackets and escapes in an answer are the model's, not ours.
        table.add_row(*(Text("" if value is None else _CONTROL.sub("\ufffd", str(value))) for value in row))
    console = Console(width=None if sys.stdout.isatty() else 240)
    with console.capture() as captured:
        console.print(table if frame.height else "nothing")
    _write(captured.get())


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader left (`| head`): what is still in the buffer goes nowhere, and the exit code stays.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polars-llm",
        description="Look after the batch jobs of polars_llm. Nothing new is ever sent from here.",
        epilog="Exit codes: 0 done (watch: nothing left), 75 watch: work is left, 1 error, 2 wrong"
        " arguments.",
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object a line, for scripts")
    common.add_argument(
        "--cache-dir", help="directory or URL; default: POLARS_LLM_CACHE_DIR, then the platform's"
    )
    common.add_argument(
        "--ledger-dir", help="local directory of a shared cache; default: POLARS_LLM_LEDGER_DIR"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(run=run)
        return command

    jobs = add("jobs", _jobs, "List the jobs of this cache; asks no provider.")
    jobs.add_argument("--open", action="store_true", help="only what is not finished")
    watch = add("watch", _watch, "Look at every open job once, fetch what has ended. For cron.")
    watch.add_argument("--interval", type=_seconds, metavar="SECONDS", help="go on until nothing is left")
    cancel = add("cancel", _cancel, "Ask the provider to stop jobs; what is done is billed and kept.")
    cancel.add_argument("job", nargs="+")
    abandon = add("abandon", _abandon, "Give up jobs that are stuck; sending them again may be paid twice.")
    abandon.add_argument("job", nargs="+")
    recover = add("recover", _recover, "Read back from a provider what this library sent, into the cache.")
    recover.add_argument("provider", help="openai or anthropic")
    results = add("results", _results, "Show or export every answer of this cache.")
    results.add_argument("--limit", type=_count, default=20, help="rows to show (default 20)")
    results.add_argument("--output", type=Path, metavar="FILE.parquet", help="write all of them to a file")
    emulate = add(
        "emulate", _emulate, "Run the local provider in this terminal: no key, no network, no cost."
    )
    emulate.add_argument("--host", default="127.0.0.1")
    emulate.add_argument("--port", type=int, default=0, help="default: any free one")
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("a number of seconds above 0")
    return seconds


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError("a whole number from 0 on, below a thousand million")
    return int(text)
