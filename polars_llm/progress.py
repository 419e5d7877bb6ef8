"""How waiting looks: a bar on stderr, lines in the log, or nothing.

A terminal and a notebook get a bar (rich). Anything else (a pipe, cron, CI) gets a line per change in
the logger ``polars_llm`` at INFO, if that is enabled, and nothing if it isn't.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

__all__ = ["Progress"]

_Place: TypeAlias = Literal["bar", "notebook", "log", "plain"]

_logger = logging.getLogger("polars_llm")

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows how far something is; a context manager.

    Parameters
    ----------
    total
        What `done` counts up to.
    what
        What is counted, for example ``"LLM answers"``.
    enabled
        False shows and logs nothing. True writes plain lines to stderr where there is neither a
        terminal nor a notebook nor a log. Default: a bar or the log, as the place allows.

    Notes
    -----
    Where another rich display is active, two would overwrite each other: then this one logs.
    """

    def __init__(self, total: int, what: str, enabled: bool | None = None) -> None:
        self._total = total
        self._what = what
        self._enabled = enabled
        self._done = 0
        self._bar: Bar | None = None
        self._lines: _Lines | None = None

    def __enter__(self) -> Self:
        if self._enabled is not False:
            from rich.console import Console

            console = Console(stderr=True)
            place = _place(console)
            if place == "bar":
                self._bar = _start_bar(console, self._total, self._what)
            else:
                wanted = place == "log" and self._enabled and sys.stderr is not None
                self._lines = _Lines("plain" if wanted else place)
                if place == "notebook":
                    # A batch may stand at 0 for hours; a cell that shows nothing looks stuck.
                    self._lines.say(self._line())
        return self

    def update(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are done; `note` is shown beside it."""
        changed = done != self._done
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, note=note)
        elif self._lines is not None:
            self._lines.say(self._line(note) if changed else None)

    def _line(self, note: str = "") -> str:
        beside = f" ({note})" if note else ""
        return f"{self._what}: {self._done:,} of {self._total:,}{beside}"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            _stop_bar(self._bar)
        elif self._lines is not None:
            self._lines.finish()
        self._bar = self._lines = None


class _Lines:
    """The latest line at most every few seconds, and the last one in any case."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._next = float("-inf")
        self._held: str | None = None
        self._written = False

    def say(self, line: str | None) -> None:
        """Write `line`, or what is still held back, as soon as it is time."""
        self._held = line or self._held
        if self._held is not None and time.monotonic() >= self._next:
            self._write(self._held)

    def finish(self) -> None:
        if self._held is not None:
            self._write(self._held)
        if self._place == "notebook" and self._written:
            sys.stderr.write("\n")

    def _write(self, line: str) -> None:
        self._next = time.monotonic() + _SECONDS_BETWEEN_LINES
        self._held = None
        self._written = True
        if self._place == "notebook":
            sys.stderr.write(f"\r{line:<79}")
        elif self._place == "plain" and not _logger.isEnabledFor(logging.INFO):
            sys.stderr.write(f"{line}\n")
        else:
            _logger.info("%s", line)


def _place(console: Console) -> _Place:
    from rich.file_proxy import FileProxy

    # Every rich display, on whatever console, puts its proxy before the standard streams.
    if isinstance(sys.stderr, FileProxy) or isinstance(sys.stdout, FileProxy):
        return "log"
    if console.is_jupyter:
        # Without ipywidgets rich draws nothing and warns at every refresh.
        return "bar" if importlib.util.find_spec("ipywidgets") else "notebook"
    # FORCE_COLOR makes rich take a pipe for a terminal; a log full of escapes helps nobody.
    return "bar" if console.is_interactive and console.file.isatty() else "log"


def _start_bar(console: Console, total: int, what: str) -> Bar | None:
    """A bar that is being drawn; None if the terminal has gone away."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        # Batches take hours; between two polls only the clock moves.
        refresh_per_second=1,
    )
    bar.add_task(what, total=total, note="")
    try:
        bar.start()
    except BaseException as error:  # also Ctrl+C, before the with statement holds us
        # What a start that was cut off has put in place is undone; rich trips over what it hasn't.
        with contextlib.suppress(IndexError):
            _stop_bar(bar)
        if isinstance(error, OSError):
            return None
        raise
    return bar


def _stop_bar(bar: Bar) -> None:
    # The terminal may be gone (nohup, a dropped ssh session): no reason to stop waiting, and no
    # place to say so. The cursor comes back even if a second Ctrl+C cuts the last drawing short.
    try:
        with contextlib.suppress(OSError):
            if bar.console.is_jupyter:
                # rich leaves a notebook's bar as the last tick found it: 10 of 15 for ever.
                bar.refresh()
            bar.stop()
    finally:
        with contextlib.suppress(OSError):
            bar.console.show_cursor(True)
