"""Small disks that are full or read-only, where the machine lets us mount some."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def mounted(path: Path, size: str) -> Iterator[None]:
    """A disk of that size at `path` for the block; skips the test where mounting is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "polars_llm_test", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not allowed here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_read_only(path: Path, *, but: str = "ro") -> None:
    """Mount the disk at `path` again, read-only; or, with ``rw``, writable again."""
    subprocess.run(["mount", "-o", f"remount,{but}", str(path)], check=True)
