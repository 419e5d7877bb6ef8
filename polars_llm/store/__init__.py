"""What we know. Only here is the disk touched: the ledger, the results, and the working files."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

from polars_llm.forks import refuse_hanging
from polars_llm.store.directory import CacheDirectory, default_path
from polars_llm.store.ledger import DiskcacheLedger, Ledger
from polars_llm.store.results import ParquetResults, ResultStore
from polars_llm.store.spool import Spool

__all__ = ["Store", "open_store"]


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """One cache directory. Making it opens and creates nothing."""

    directory: CacheDirectory
    ledger: Ledger
    spool: Spool
    results: ResultStore


_open: dict[tuple[int, Path], Store] = {}
_lock = threading.Lock()


def open_store(path: Path | None = None) -> Store:
    """The store at `path` (default: `default_path()`), the same object for all of this process.

    Raises
    ------
    PolarsLLMError
        This process is a fork in which Polars would hang.
    """
    refuse_hanging()
    directory = CacheDirectory(path or default_path())
    with _lock:
        # A forked child starts anew: it must not share its parent's database handles.
        name = (os.getpid(), directory.path)
        if name not in _open:
            _open[name] = Store(
                directory=directory,
                ledger=DiskcacheLedger(directory.jobs),
                spool=Spool(directory.spool),
                results=ParquetResults(directory.results),
            )
        return _open[name]
