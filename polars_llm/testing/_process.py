"""The server's process. Run by its path: it must not import polars_llm, and polars with it.

The files beside it are loaded as a package of another name, so that a client's `polars_llm` and
the server have nothing in common but these files.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from pathlib import Path

_PACKAGE = "polars_llm_emulator"


def _main() -> None:
    # The child watches its parent from its very first line on.
    parent = os.getppid()
    package = types.ModuleType(_PACKAGE)
    package.__path__ = [str(Path(__file__).parent)]
    sys.modules[_PACKAGE] = package
    importlib.import_module(f"{_PACKAGE}.hosting").host(sys.argv[1], parent)


if __name__ == "__main__":
    _main()
