"""The cache directory: where it is, whether it can be trusted, its locks, and atomic writes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from polars_llm.errors import CacheCorrupt, CacheError, CacheUnsafe
from polars_llm.store import locks
from polars_llm.store.filesystem import file_system, is_shared

__all__ = ["SHARED_MARK", "CacheDirectory", "default_path", "os_errors", "sync_directory", "write_atomic"]

_UNPAID = "Nothing was sent for it; what was paid for before stays at the provider and is fetched later."
_CHOOSE = (
    "set POLARS_LLM_CACHE_DIR to a directory that can be written. That one begins empty: if this one was used"
    " before, pllm.recover(...) comes first there, or what was sent from here is paid again."
)
_HINTS = {
    errno.ENOSPC: "free space on that disk, then run the same line again.",
    errno.EDQUOT: "free some of your quota on that disk, then run the same line again.",
    errno.EROFS: _CHOOSE,
    errno.EACCES: "make it writable for this user, or " + _CHOOSE,
    errno.EPERM: "make it writable for this user, or " + _CHOOSE,
    errno.EIO: "the disk reports an error: check it, or " + _CHOOSE,
    errno.ENOENT: "run the same line again; the directory is then made anew.",
    errno.EEXIST: "there is a file where a directory is needed: remove it, or " + _CHOOSE,
    errno.ENOTDIR: "there is a file where a directory is needed: remove it, or " + _CHOOSE,
    errno.ENAMETOOLONG: _CHOOSE,
    errno.ELOOP: _CHOOSE,
}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def write_atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that, whatever happens, `path` holds the old content or all of the new.

    Parameters
    ----------
    path
        The file; its directory must exist. The new file has mode 0600.
    write
        Called once with the open temporary file, in the same directory.

    Raises
    ------
    CacheError
        The disk is full, read-only or not ours. What `write` raises itself passes through.
    """
    with os_errors(path):
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                _flush_to_disk(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a CacheError with a hint."""
    try:
        yield
    except OSError as error:
        number = _errno(error)
        if number not in _HINTS:
            raise
        raise CacheError(
            f"{path} in the cache cannot be written: {os.strerror(number)}.",
            path=str(path),
            hint=f"{_HINTS[number]} {_UNPAID}",
        ) from error


def _errno(error: OSError) -> int:
    # Polars writes with Rust and raises OSError("No space left on device (os error 28)"), errno None.
    if error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def _flush_to_disk(descriptor: int) -> None:
    if sys.platform == "darwin":
        # There fsync only hands the data to the drive, which may keep it in its cache.
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames and removals in `directory` durable."""
    if sys.platform == "win32":
        return  # directories cannot be opened there; renames are journalled
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        _flush_to_disk(descriptor)
    finally:
        os.close(descriptor)


_LAYOUT = 1
_DAY = 86_400.0
_README = """This directory belongs to polars_llm (https://pypi.org/project/polars-llm-batch).

jobs/     one record for each batch sent to a provider
results/  answers that were paid for, as Parquet
spool/    working files of jobs under way: your prompts, removed once the answers are stored
locks/    who is at work now

Deleting it means paying again for what is not read back with pllm.recover().
"""
_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# See https://bford.info/cachedir/\n"
SHARED_MARK = "place"
"""In ``results``: this is the ledger of results elsewhere, and here is where."""
_OURS = frozenset({"jobs", "results", "spool", "locks", "layout", "README.txt", "CACHEDIR.TAG", "lost+found"})


def default_path() -> Path:
    """`POLARS_LLM_CACHE_DIR`, else the platform's cache directory."""
    chosen = os.environ.get("POLARS_LLM_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs  # here and not above: `import polars_llm` stays quick

    return platformdirs.user_cache_path("polars_llm")


class CacheDirectory:
    """One cache directory. Making the object touches nothing.

    Parameters
    ----------
    path
        Where it is, or shall be; ``~`` is the user's home.
    """

    readme = _README
    _elsewhere = (
        "set ledger_dir (pllm.Config or POLARS_LLM_LEDGER_DIR) to a directory on a local disk: then only the"
        " results are shared, and what two hosts ask at the same time, before it is answered, both pay. Or"
        " set cache_dir to a local disk. If only one host ever uses this directory, set"
        " POLARS_LLM_ALLOW_NETWORK_CACHE=1. Nothing was sent."
    )

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser().absolute()
        self.jobs = self.path / "jobs"
        self.results = self.path / "results"
        self.spool = self.path / "spool"
        self.locks = self.path / "locks"
        # What, once removed, is lost.
        self.lasting: tuple[Path, ...] = (self.jobs, self.results)
        self._trusted: tuple[int, int] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    def prepare(self, *, anew: bool = False) -> None:
        """Make the directory, or make sure that it can be used. Cheap when it was done before.

        Parameters
        ----------
        anew
            What was removed may be made again: the caller reads back what was lost with it.

        Raises
        ------
        CacheUnsafe
            On a file system that hosts share, or without working locks; nothing was sent.
        CacheError
            It cannot be written, holds other files, or a newer version of this library made it; or it, or
            a part of it, was removed, and what was paid for would be paid again. That is said once.
        """
        rooms = (self.jobs, self.results, self.spool, self.locks)
        identity = _identity(self.path)
        if self._trusted is not None and self._trusted == identity and all(room.is_dir() for room in rooms):
            return
        with os_errors(self.path):
            furnished = self._check_layout()
            self._refuse_ledger()
            if not anew:
                self._refuse_loss(identity, furnished=furnished)
            self._check_file_system()
            for directory in (self.path, *rooms):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_locks()
            if not furnished:
                self._furnish()
            self._sweep()
            self._trusted = _identity(self.path)

    def _refuse_loss(self, identity: tuple[int, int] | None, *, furnished: bool) -> None:
        """Whoever begins again where jobs were open pays for them a second time."""
        gone = [room.name for room in self.lasting if furnished and not room.is_dir()]
        if gone:
            fact = f"{' and '.join(gone)} of the cache directory {self.path} was removed."
            remedy = "restore it from a backup, or"
        elif self._trusted is not None and self._trusted != identity:
            self._trusted = None
            fact = f"The cache directory {self.path} was removed, or replaced, while this process used it."
            remedy = "to begin anew, run the same line again. If jobs were open in it,"
        else:
            return
        raise CacheError(
            fact,
            path=str(self.path),
            hint=f"{remedy} pllm.recover('openai') (or 'anthropic') reads back what was sent before, so that"
            " it isn't paid again. Nothing was sent.",
        )

    @contextlib.contextmanager
    def submitter(self) -> Iterator[str]:
        """Hold a lock of one's own while submitting; yields its name, which goes into the ledger."""
        self.prepare()
        name = f"submitter-{secrets.token_hex(8)}"
        with self._hold(name) as got:
            if not got:
                raise AssertionError(f"{name} is taken")  # 64 random bits
            yield name

    def is_alive(self, owner: str) -> bool:
        """Is the submitter of that name still at work, in whatever process?"""
        path = self._lock(owner)
        with os_errors(path), _lock_errors(path):
            return locks.is_held(path)

    @contextlib.contextmanager
    def try_lock(self, name: str) -> Iterator[bool]:
        """Hold the lock `name` for the block unless somebody else does; yields whether it does.

        It is not re-entrant: inside the block the same name is taken.
        """
        self.prepare()
        with self._hold(f"{name}.lock") as got:
            yield got

    @contextlib.contextmanager
    def _hold(self, name: str) -> Iterator[bool]:
        path = self._lock(name)
        with contextlib.ExitStack() as stack:
            # Only taking it is a matter of the cache; what the block raises is not touched.
            with os_errors(path), _lock_errors(path):
                got = stack.enter_context(locks.try_hold(path))
            yield got

    def _lock(self, name: str) -> Path:
        # Names come from the ledger too, which others may have written.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", name):
            raise ValueError(f"not a name of a lock: {name!r}")
        return self.locks / name

    def _check_layout(self) -> bool:
        """Is it a directory of ours already?"""
        try:
            text = (self.path / "layout").read_text(encoding="ascii", errors="replace").strip()
        except FileNotFoundError:
            self._refuse_strangers()
            return False
        if not text.isdecimal():
            raise CacheCorrupt(
                f"{self.path / 'layout'} is damaged: it holds {text[:40]!r} instead of a number.",
                path=str(self.path / "layout"),
                hint=f"if jobs/ and results/ beside it are intact, write {_LAYOUT} into it."
                " Nothing was sent.",
            )
        if int(text) > _LAYOUT:
            raise CacheError(
                f"The cache directory {self.path} has layout {text}; this version reads {_LAYOUT}.",
                path=str(self.path),
                hint="upgrade polars-llm-batch, or set POLARS_LLM_CACHE_DIR to another directory."
                " Nothing was sent.",
            )
        return True

    def _refuse_strangers(self) -> None:
        # CACHEDIR.TAG would take the rest of such a directory out of backups, and its results/ or
        # jobs/ may be somebody else's.
        try:
            names = [entry.name for entry in os.scandir(self.path)]
        except FileNotFoundError:
            return
        strangers = sorted(name for name in names if name not in _OURS and not name.startswith("."))
        if strangers:
            raise CacheError(
                f"{self.path} holds other files ({', '.join(strangers[:3])}), so it cannot be the cache.",
                path=str(self.path),
                hint=f"set POLARS_LLM_CACHE_DIR to a directory of its own, for example"
                f" {self.path / 'polars_llm'}. Nothing was sent.",
            )

    def _refuse_ledger(self) -> None:
        mark = self.results / SHARED_MARK
        if mark.exists():
            place = mark.read_text(encoding="utf-8")
            raise CacheError(
                f"{self.path} is the ledger of the results in {place}, not a cache of its own.",
                path=str(self.path),
                hint="set cache_dir to that address, and ledger_dir to this directory: else what was answered"
                " is paid again. Nothing was sent.",
            )

        if (self.results / "layout").exists():
            raise CacheError(
                f"The results in {self.path} are those that hosts share, not a cache of its own.",
                path=str(self.path),
                hint="set ledger_dir (pllm.Config or POLARS_LLM_LEDGER_DIR) to a directory on a local disk,"
                f" as the other hosts do. If none does so any more, remove {self.results / 'layout'}."
                " Nothing was sent.",
            )

    def _check_file_system(self) -> None:
        # Looking into the nearest directory that exists makes an automounter mount it.
        nearest = next(p for p in (self.path, *self.path.parents) if p.exists())
        kind = file_system(nearest)
        if kind is None or not is_shared(kind) or _is_network_allowed():
            return
        raise CacheUnsafe(
            f"The directory {self.path} lies on {kind}, a file system on which locks and SQLite cannot"
            " be trusted: two processes could pay for the same requests.",
            path=str(self.path),
            hint=self._elsewhere,
        )

    def _check_locks(self) -> None:
        # Locks are tried, not believed: two descriptors of one file must exclude each other.
        probe = self.locks / f"probe-{secrets.token_hex(8)}"
        with _lock_errors(probe), locks.hold(probe), locks.try_hold(probe) as second:
            works = not second and locks.is_held(probe)
        if not works:
            raise _no_locks(self.locks)

    def _furnish(self) -> None:
        write_atomic(self.path / "README.txt", lambda file: _write(file, self.readme))
        write_atomic(self.path / "CACHEDIR.TAG", lambda file: _write(file, _TAG))
        layout = self.path / "layout"
        write_atomic(layout, lambda file: _write(file, f"{_LAYOUT}\n"))
        if layout.read_text(encoding="ascii") != f"{_LAYOUT}\n":
            raise CacheUnsafe(
                f"A file that was renamed to {layout} does not have its content.",
                path=str(layout),
                hint="set POLARS_LLM_CACHE_DIR to a local disk. Nothing was sent.",
            )

    def _sweep(self) -> None:
        """Remove what processes left that died while writing or holding a lock, a day later."""
        before = time.time() - _DAY
        for room in (self.path, self.jobs, self.results, self.spool):
            for path in _older(room, before):
                if path.name.startswith(".") and path.name.endswith(".tmp"):
                    path.unlink(missing_ok=True)
        for path in _older(self.locks, before):
            with locks.try_hold(path):
                pass  # leaving the block removes the file of a lock that was free


def _older(room: Path, before: float) -> Iterator[Path]:
    with os.scandir(room) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if entry.is_file(follow_symlinks=False) and status.st_mtime < before:
                    yield Path(entry.path)


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode())


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_network_allowed() -> bool:
    return os.environ.get("POLARS_LLM_ALLOW_NETWORK_CACHE", "").lower() in {"1", "true", "yes"}


@contextlib.contextmanager
def _lock_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise _no_locks(path) from error
        raise


def _no_locks(path: Path) -> CacheUnsafe:
    return CacheUnsafe(
        f"File locks do not work at {path}: two processes could pay for the same requests.",
        path=str(path),
        hint="set POLARS_LLM_CACHE_DIR or pllm.Config(cache_dir=...) to a local disk. Nothing was sent.",
    )
