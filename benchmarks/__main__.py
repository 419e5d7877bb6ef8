"""All benchmarks, one after the other: ``python -m benchmarks [--quick]``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPTS = ("bench_import.py", "bench_warm.py", "bench_cold.py", "bench_realtime.py")


def main() -> int:
    """Run each in a process of its own; 1 if one of them failed."""
    failed = 0
    for name in _SCRIPTS:
        print(f"--- {name}", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(name)), *sys.argv[1:]]
        failed |= subprocess.run(command, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
