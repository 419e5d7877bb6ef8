"""What people see while waiting, in a terminal (a real pseudo-terminal), a pipe, a log, a notebook."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live

from polars_llm.progress import Progress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A program whose standard streams are a terminal of 100 columns."""

    def __init__(self, source: str, **env: str) -> None:
        self.master, slave = pty.openpty()
        self.text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source)],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=_environment(TERM="xterm-256color", COLUMNS="100", **env),
            start_new_session=True,
        )
        os.close(slave)

    def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            read = self._read(30)
            assert read, f"no {wanted!r} in {self.text!r}"

    def finish(self) -> int:
        while self._read(30):
            pass
        os.close(self.master)
        return self.process.wait(timeout=30)

    def hang_up(self) -> None:
        os.close(self.master)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], seconds)
        try:
            piece = os.read(self.master, 65536) if ready else b""
        except OSError:  # Linux says so when the last writer has closed its end
            piece = b""
        self.text += piece.decode()
        return bool(piece)


def _environment(**more: str) -> dict[str, str]:
    ours = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "TERM", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **more}


def _in_pipes(source: str, **env: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        capture_output=True,
        timeout=60,
        env=_environment(**env),
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    # Decoded here, because text=True would turn a carriage return into a new line.
    return done.stdout.decode(), done.stderr.decode()


@contextlib.contextmanager
def _logged(level: int) -> Iterator[list[str]]:
    """What the library logs; a handler of our own, because pytest's would not tell the level."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("polars_llm"), Keep()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back() -> None:
    terminal = Terminal("""
        import sys
        from polars_llm.progress import Progress
        with Progress(1200, "LLM [answers] {x}") as bar:
            bar.update(340, note="[batch] {1}")
            import time; time.sleep(1.5)
            print("said meanwhile")
            bar.update(1200)
        sys.stdout.write("after\\n")
    """)
    assert terminal.finish() == 0
    assert "LLM [answers] {x}" in terminal.text
    assert "340/1200" in terminal.text
    assert "[batch] {1}" in terminal.text
    assert "1200/1200" in terminal.text
    assert "said meanwhile" in terminal.text
    assert terminal.text.count(HIDE) == 1
    assert terminal.text.rindex(HIDE) < terminal.text.rindex(SHOW) < terminal.text.index("after")


def test_the_bar_is_drawn_on_stderr_only() -> None:
    terminal = Terminal("""
        import os, sys
        from polars_llm.progress import Progress
        read, write = os.pipe()
        os.dup2(write, 1)
        with Progress(5, "answers") as bar:
            bar.update(5)
        sys.stdout.flush(); os.close(write); os.close(1)
        assert os.read(read, 100) == b""
    """)
    assert terminal.finish() == 0
    assert "5/5" in terminal.text


@pytest.mark.parametrize("moment", ["waiting", "starting"])
def test_ctrl_c_gives_the_cursor_back(moment: str) -> None:
    # "starting": the interrupt comes from inside rich, as soon as it has hidden the cursor.
    terminal = Terminal(f"""
        import signal, time
        from rich.console import Console
        from polars_llm.progress import Progress
        if {moment == "starting"}:
            hide = Console.show_cursor
            def interrupted(self, show=True):
                hide(self, show)
                if not show:
                    signal.raise_signal(signal.SIGINT)
            Console.show_cursor = interrupted
        try:
            with Progress(10, "answers") as bar:
                bar.update(3)
                print("ready")
                time.sleep(30)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    if moment == "waiting":
        terminal.read_until("ready")
        terminal.process.send_signal(signal.SIGINT)
    assert terminal.finish() == 0
    assert "interrupted" in terminal.text
    assert HIDE in terminal.text
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)


def test_a_terminal_that_goes_away_does_not_stop_the_waiting(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    terminal = Terminal(f"""
        import pathlib, signal, time
        from polars_llm.progress import Progress
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with Progress(10, "answers") as bar:
            bar.update(3)
            print("ready", flush=True)
            time.sleep(1.5)
            bar.update(10)
        with Progress(10, "again") as bar:
            bar.update(1)
        pathlib.Path({str(proof)!r}).write_text("went on")
        import os; os._exit(0)
    """)
    terminal.read_until("ready")
    terminal.hang_up()
    assert terminal.process.wait(timeout=30) == 0
    assert proof.read_text() == "went on"


def test_switched_off_it_says_nothing_even_in_a_terminal() -> None:
    terminal = Terminal("""
        import logging, sys
        logging.basicConfig(level=logging.INFO)
        from polars_llm.progress import Progress
        with Progress(10, "answers", enabled=False) as bar:
            bar.update(3)
        assert "rich" not in sys.modules
    """)
    assert terminal.finish() == 0
    assert terminal.text == ""


def test_a_dumb_terminal_gets_no_escapes() -> None:
    terminal = Terminal("""
        import os
        os.environ["TERM"] = "dumb"
        from polars_llm.progress import Progress
        with Progress(10, "answers", enabled=True) as bar:
            bar.update(3)
    """)
    assert terminal.finish() == 0
    assert terminal.text == "answers: 3 of 10\r\n"


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}])
def test_a_pipe_without_logging_stays_silent(env: dict[str, str]) -> None:
    done = _in_pipes(
        """
        from polars_llm.progress import Progress
        with Progress(10, "answers") as bar:
            bar.update(3); bar.update(10)
        """,
        **env,
    )
    assert done == ("", "")


def test_a_pipe_gets_plain_lines_if_asked_for() -> None:
    done = _in_pipes("""
        from polars_llm.progress import Progress
        with Progress(10_000, "answers", enabled=True) as bar:
            bar.update(3, note="2 batches"); bar.update(5); bar.update(10_000)
    """)
    assert done == ("", "answers: 3 of 10,000 (2 batches)\nanswers: 10,000 of 10,000\n")


def test_importing_it_imports_no_rich() -> None:
    _in_pipes("""
        import sys
        import polars_llm.progress
        assert "rich" not in sys.modules
    """)


def test_the_log_gets_a_line_per_change_but_not_many() -> None:
    with _logged(logging.INFO) as lines:
        with Progress(100, "answers") as bar:
            bar.update(0)
            assert lines == []
            for done in range(1, 50):
                bar.update(done)
            assert lines == ["answers: 1 of 100"]
            bar.update(49)
            time.sleep(5.1)
            bar.update(49)  # nothing new, but 49 was never said
            bar.update(49)
            assert lines == ["answers: 1 of 100", "answers: 49 of 100"]
            bar.update(100, note="done")
            assert len(lines) == 2
        assert lines[2:] == ["answers: 100 of 100 (done)"]


def test_a_log_below_info_gets_nothing() -> None:
    with _logged(logging.WARNING) as lines, Progress(10, "answers") as bar:
        bar.update(10)
    assert lines == []


def test_the_last_count_is_logged_when_the_waiting_is_interrupted() -> None:
    with _logged(logging.INFO) as lines:
        with pytest.raises(KeyboardInterrupt), Progress(10, "answers") as bar:
            bar.update(1)
            bar.update(2)
            raise KeyboardInterrupt
        assert lines == ["answers: 1 of 10", "answers: 2 of 10"]


def test_another_display_keeps_the_screen() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    live = Live("theirs", console=console, refresh_per_second=20)
    with _logged(logging.INFO) as lines, live, Progress(4, "ours") as bar:
        bar.update(2)
        bar.update(4)
    assert lines == ["ours: 2 of 4", "ours: 4 of 4"]
    assert "ours" not in screen.getvalue()
    assert screen.getvalue().count(HIDE) == 1


def test_two_at_once_in_a_terminal() -> None:
    terminal = Terminal("""
        from polars_llm.progress import Progress
        from rich.progress import track
        with Progress(10, "outer") as outer:
            with Progress(10, "inner") as inner:
                inner.update(5)
            outer.update(10)
        for _ in track(range(3), description="theirs"):
            with Progress(10, "inner") as inner:
                inner.update(5)
        print("fine")
    """)
    assert terminal.finish() == 0
    assert "fine" in terminal.text
    assert "inner" not in terminal.text
    assert terminal.text.rindex(SHOW) > terminal.text.rindex(HIDE)


NOTEBOOK = """
    import builtins
    class ZMQInteractiveShell:  # what rich looks for
        pass
    builtins.get_ipython = ZMQInteractiveShell
"""


def test_a_notebook_without_widgets_gets_one_line_that_grows() -> None:
    _, seen = _in_pipes(
        "import sys; sys.modules['ipywidgets'] = None\n"
        + textwrap.dedent(NOTEBOOK)
        + textwrap.dedent("""
            import warnings; warnings.simplefilter("error")
            from polars_llm.progress import Progress
            with Progress(10, "answers") as bar:
                bar.update(3); bar.update(10)
        """)
    )
    assert [line.rstrip() for line in seen.split("\r")] == [
        "",
        "answers: 0 of 10",  # at once: a batch may stand there for hours
        "answers: 10 of 10",
    ]


def test_a_notebook_with_widgets_gets_the_bar(tmp_path: Path) -> None:
    # The two packages as rich sees them: a widget that is a context manager, and display().
    modules = {
        "ipywidgets.py": """
            class Output:
                def __enter__(self): return self
                def __exit__(self, *args): return None
                def clear_output(self, wait=False): pass
        """,
        "IPython/__init__.py": "",
        "IPython/display.py": """
            import sys
            def display(*shown, **more):
                for one in shown:
                    if hasattr(one, "_repr_mimebundle_"):
                        text = one._repr_mimebundle_([], [])["text/plain"]
                        sys.__stdout__.write(text)
        """,
    }
    for name, source in modules.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
    seen, _ = _in_pipes(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        + textwrap.dedent(NOTEBOOK)
        + textwrap.dedent("""
            import time
            from polars_llm.progress import Progress
            with Progress(10, "answers") as bar:
                bar.update(3); time.sleep(1.5)
                bar.update(10)
        """)
    )
    assert "answers" in seen
    assert "3/10" in seen
    assert "10/10" in seen  # the bar that stays in the notebook


def test_updates_from_another_thread() -> None:
    with _logged(logging.INFO) as lines:
        with Progress(10, "answers") as bar:
            thread = threading.Thread(target=bar.update, args=(7,))
            thread.start()
            thread.join()
        bar.update(8)  # after the end: nothing, and no error
    assert lines == ["answers: 7 of 10"]
