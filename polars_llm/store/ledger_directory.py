"""The local directory beside a shared place: ledger, working files, locks, and what is known of the place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from polars_llm.errors import CacheCorrupt, CacheError, CacheUnsafe
from polars_llm.store.directory import SHARED_MARK, CacheDirectory, os_errors, write_atomic
from polars_llm.store.place import Place

__all__ = ["LedgerDirectory", "default_ledger"]

_LAYOUT = b"1\n"
_MARK = "layout"


def default_ledger(place: Place) -> Path:
    """A directory under the platform's cache directory, one for each place."""
    import platformdirs  # here and not above: `import polars_llm` stays quick

    digest = hashlib.sha256(place.identity.encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("polars_llm_ledgers") / digest


class LedgerDirectory(CacheDirectory):
    """What stays on this host where the results are shared. Making the object touches nothing.

    Parameters
    ----------
    path
        A directory on a local disk.
    place
        Where the results are.
    """

    readme = """This directory belongs to polars_llm (https://pypi.org/project/polars-llm-batch).
The answers are not here but at the shared place that results/place names.

jobs/     one record for each batch sent to a provider
results/  an index of the answers, made again if it is removed; results/outbox: answers on their way
spool/    working files of jobs under way: your prompts, removed once the answers are stored
locks/    who is at work now

Deleting it while jobs are open means paying again for what is not read back with pllm.recover().
"""
    _elsewhere = (
        "set ledger_dir (pllm.Config or POLARS_LLM_LEDGER_DIR) to a directory on a local disk; the results"
        " may stay where they are. Nothing was sent."
    )

    def __init__(self, path: Path | str, place: Place) -> None:
        super().__init__(path)
        self.lasting = (self.jobs,)
        self._place = place
        self._reached = False

    def prepare(self, *, anew: bool = False) -> None:
        """Make the directory, or make sure that it and the place can be used. Cheap when it was done before.

        Raises
        ------
        CacheUnsafe, CacheError
            As of `CacheDirectory`; and the place cannot be reached or written, is empty though it was
            not, or is not the one that this directory belongs to.
        """
        self._refuse_cache()
        super().prepare(anew=anew)
        # A mounted directory may be gone from one moment to the next.
        if self._reached and (self._place.path is None or (self._place.path / "results" / _MARK).exists()):
            return
        known = self._known()
        self._refuse_answers()
        self._check_place(used_before=known is not None)
        if known is None:
            write_atomic(self.results / SHARED_MARK, lambda file: _write(file, self._place.identity))
        self._place.sweep()
        self._reached = True

    def _refuse_ledger(self) -> None:
        """It may well be one."""

    def _refuse_cache(self) -> None:
        """A cache of its own has a ledger beside its answers, whose open jobs would be paid again."""
        path = self._place.path
        if path is None:
            return
        with os_errors(path):
            if path.resolve() == self.path.resolve():
                raise CacheError(
                    f"cache_dir and ledger_dir are the same directory, {path}.",
                    path=str(path),
                    hint="leave ledger_dir out if it is this host's own cache; where hosts share the results,"
                    " ledger_dir is another directory, on a local disk. Nothing was sent.",
                )
            if not (path / "jobs").is_dir() or not (path / "layout").is_file():
                return
        raise CacheError(
            f"{path} is a cache of its own, with a ledger in it: its open jobs would be paid again.",
            path=str(path),
            hint="leave ledger_dir out to use it as before. To share its answers, and keep its jobs: move the"
            f" .parquet files in {path / 'results'} to DIRECTORY/results of a new directory, and set"
            f" cache_dir to DIRECTORY and ledger_dir to {path}. Nothing was sent.",
        )

    def _known(self) -> str | None:
        mark = self.results / SHARED_MARK
        try:
            known = mark.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        if known != self._place.identity:
            raise CacheError(
                f"The ledger {self.path} belongs to the results in {known}, not to {self._place.name}.",
                path=str(self.path),
                hint=f"give each place a ledger_dir of its own; if it is the same place under a new address,"
                f" remove {mark}. Nothing was sent.",
            )
        return known

    def _refuse_answers(self) -> None:
        if any(self.results.glob("*.parquet")):
            raise CacheError(
                f"{self.path} was a cache of its own: it holds answers that would be paid again.",
                path=str(self.path),
                hint=f"copy the .parquet files in {self.results} to {self._place.name}/results and remove"
                " them here (the format is the same), or choose another ledger_dir. Nothing was sent.",
            )

    def _check_place(self, *, used_before: bool) -> None:
        found = self._place.read_small(_MARK)
        if found is None and used_before:
            raise CacheError(
                f"{self._place.name} is empty, and it was not: it is not mounted, or was removed.",
                path=self._place.name,
                hint=f"mount it or put it back. To begin anew, remove {self.results}; then"
                " pllm.recover('openai') (or 'anthropic') reads back what was sent before, so that it isn't"
                " paid again. Nothing was sent.",
            )
        if found is None:
            self._place.put(_MARK, memoryview(_LAYOUT))
            found = self._place.read_small(_MARK)
            if found != _LAYOUT:
                raise CacheUnsafe(
                    f"A file that was written to {self._place.name} does not have its content.",
                    path=self._place.name,
                    hint="set cache_dir to another place. Nothing was sent.",
                )
        if _MARK not in self._place.listed():
            raise CacheUnsafe(
                f"A file that is in {self._place.name} is not listed there: answers would not be found, and"
                " paid again.",
                path=self._place.name,
                hint="if another host began to use this place within the last minute, run the same line"
                " again; else set cache_dir to another place. Nothing was sent.",
            )
        if not found.strip().isdigit():
            raise CacheCorrupt(
                f"{self._place.name}/results/{_MARK} is damaged.",
                path=self._place.name,
                hint="if the .parquet files beside it are ours, write 1 into it. Nothing was sent.",
            )
        if int(found) > int(_LAYOUT):
            raise CacheError(
                f"{self._place.name} has layout {int(found)}; this version reads {int(_LAYOUT)}.",
                path=self._place.name,
                hint="upgrade polars-llm-batch, or set cache_dir to another place. Nothing was sent.",
            )


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode())
