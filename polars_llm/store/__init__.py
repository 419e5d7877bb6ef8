"""What we know. Only here is the disk touched: the ledger, the results, and the working files."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable
from pathlib import Path

from polars_llm.address import store_url
from polars_llm.forks import refuse_hanging
from polars_llm.store.directory import CacheDirectory, default_path
from polars_llm.store.ledger import DiskcacheLedger, Ledger
from polars_llm.store.ledger_directory import LedgerDirectory, default_ledger
from polars_llm.store.place import Place
from polars_llm.store.results import ParquetResults, ResultStore
from polars_llm.store.shared import SharedResults
from polars_llm.store.spool import Spool

__all__ = ["Store", "open_store"]


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """One cache. Making it opens and creates nothing."""

    directory: CacheDirectory
    ledger: Ledger
    spool: Spool
    results: ResultStore


_open: dict[tuple[int, Path, str], Store] = {}
_lock = threading.RLock()  # re-entrant: a signal's handler, or a finalizer, may come in between


def open_store(cache: Path | str | None = None, ledger: Path | None = None) -> Store:
    """The store at a place, the same object for all of this process.

    Parameters
    ----------
    cache
        A directory (default: `default_path()`), or the address of an object store.
    ledger
        A local directory for all but the results, which several hosts may then share. Default for an
        object store: one under the platform's cache directory.

    Raises
    ------
    PolarsLLMError
        This process is a fork in which Polars would hang.
    """
    refuse_hanging()
    url = store_url(str(cache)) if cache is not None else None
    if url is None and ledger is None:
        return _opened(CacheDirectory(cache or default_path()), "", lambda d: ParquetResults(d.results))
    place = Place(url or cache or default_path())
    directory = LedgerDirectory(ledger or default_ledger(place), place)
    # By its spelling too: one with a wrong region must not live on when the right one is given.
    named = f"{place.identity} {place.name}"
    return _opened(directory, named, lambda d: SharedResults(place, d.results))


def _opened(directory: CacheDirectory, place: str, results: Callable[[CacheDirectory], ResultStore]) -> Store:
    with _lock:
        # A forked child starts anew: it must not share its parent's database handles.
        name = (os.getpid(), directory.path, place)
        if name not in _open:
            made = Store(
                directory=directory,
                ledger=DiskcacheLedger(directory.jobs),
                spool=Spool(directory.spool),
                results=results(directory),
            )
            _open.setdefault(name, made)
        return _open[name]
