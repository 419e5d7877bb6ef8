"""A place that several hosts reach: an object store, or a directory that they mount.

Four things are done there: a file appears whole under a name that is used once, the names are listed, parts
of a file are read, a file is removed. Nothing is changed in place,
nothing is locked, nothing is mapped into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from polars_llm.address import options_of
from polars_llm.errors import CacheError
from polars_llm.store.directory import os_errors, write_atomic

if TYPE_CHECKING:
    import pyarrow.fs

__all__ = ["Item", "Place"]

T = TypeVar("T")

_ROOM = "results"
# How long a store that fails is asked again. Others may wait for a claim (60 s) while it looks answers up.
_PATIENCE_S = 20.0
_DAY = 86_400.0
# What does not pass by itself. The first are Arrow's names for what S3 says, the others those of the others.
_FINAL = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID"
    r"|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|EXPIRED_TOKEN|INVALID_TOKEN|INVALID_SIGNATURE"
    r"|REQUEST_EXPIRED|Bucket '.*' not found|HTTP status 40[0134]"
    r"|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|AuthenticationFailed|AuthorizationFailure"
    r"|AuthorizationPermissionMismatch|ContainerNotFound|40[13] "
)
_FINAL_NUMBERS = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}
)
_BROKEN: list[Any] = []
_SIGNED = re.compile(r"(?i)\b(sig|signature|token|key|credential)=[^&\s'\"]+")


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """What a listing says of a file: its size in bytes, and how long ago it came, in seconds."""

    size: int
    age: float


class Place:
    """Files in ``results`` under an address. Making the object reaches nobody.

    Parameters
    ----------
    address
        What `store_url` gives, or a path.
    """

    def __init__(self, address: str | Path) -> None:
        if isinstance(address, str) and address.startswith("file://"):
            address = Path(address.removeprefix("file://"))
        self.path = None if isinstance(address, str) else Path(address).expanduser().absolute()
        self.name = str(self.path or address)
        self._opened: tuple[pyarrow.fs.FileSystem, str] | None = None

    def __repr__(self) -> str:
        return f"Place({self.name!r})"

    @property
    def identity(self) -> str:
        """Tells one place from another: bucket, prefix and server, whoever names the server.

        Two spellings of one place have one ledger; with two, what is in flight would be paid twice.
        """
        if self.path is not None:
            return self.name
        address, _, _ = self.name.partition("?")
        kind, options = address.partition("://")[0], options_of(self.name)
        said = options.get("endpoint_override")
        if said and "://" not in said:
            said = f"{options.get('scheme', 'https')}://{said}"
        names = {"s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"), "az": ("AZURE_STORAGE_ACCOUNT_NAME",)}
        found = said or next((os.environ[n] for n in names.get(kind, ()) if os.environ.get(n)), None)
        return f"{address} at {re.sub(r'//.*@', '//', found).rstrip('/')}" if found else address

    def listed(self) -> dict[str, Item]:
        """All files there now; empty if there are none, or the place was never used."""

        def call() -> dict[str, Item]:
            from pyarrow.fs import FileSelector, FileType

            files, base = self._files()
            now = time.time()
            found = files.get_file_info(FileSelector(base, allow_not_found=True))
            return {
                info.base_name: Item(info.size or 0, now - (info.mtime_ns or now * 1e9) / 1e9)
                for info in found
                if info.type == FileType.File
            }

        return self.tried("listed", call)

    def put(self, name: str, data: memoryview) -> None:
        """Write a file: all of it or nothing, durable on return."""
        if self.path is not None:
            room = self.path / _ROOM
            with os_errors(room):
                room.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(room / name, lambda file: _write(file, data))
            return
        # On a thread of its own: a stream that Ctrl+C leaves half written is closed, and then is an object.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(self.tried, "written", lambda: self._upload(name, data)).result()

    def _upload(self, name: str, data: memoryview) -> None:
        files, base = self._files()
        path = f"{base}/{name}"
        stream = files.open_output_stream(path)
        try:
            stream.write(data)
            stream.close()
        except BaseException:
            # Forgotten, it would send all of it again, and hold up the whole interpreter meanwhile.
            _BROKEN.append(stream)
            raise
        size = files.get_file_info(path).size
        if size != len(data):
            raise OSError(f"{name} has {size} bytes after {len(data)} were written")

    def open(self, name: str) -> Any:
        """A file for reading at random; FileNotFoundError if it is not there."""
        files, base = self._files()
        return files.open_input_file(f"{base}/{name}")

    def remove(self, name: str) -> None:
        """Remove a file; a missing one is fine."""

        def call() -> None:
            files, base = self._files()
            with contextlib.suppress(FileNotFoundError):
                files.delete_file(f"{base}/{name}")

        self.tried("removed", call)

    def read_small(self, name: str) -> bytes | None:
        """All of a small file, None if it is not there."""

        def call() -> bytes | None:
            try:
                with self.open(name) as file:
                    content: bytes = file.read()
                    return content
            except FileNotFoundError:
                return None

        return self.tried("read", call)

    def sweep(self) -> None:
        """Remove what processes left that died while writing, a day later. Object stores have none."""
        if self.path is None or not (self.path / _ROOM).is_dir():
            return
        with os.scandir(self.path / _ROOM) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    old = entry.stat().st_mtime < time.time() - _DAY
                    if old and entry.name.startswith(".") and entry.name.endswith(".tmp"):
                        Path(entry.path).unlink(missing_ok=True)

    def tried(self, what: str, call: Callable[[], T]) -> T:
        """Call again while the store fails for a passing reason.

        Raises
        ------
        FileNotFoundError
            The file is not there.
        CacheError
            It still fails, or always will.
        """
        import tenacity  # here and not above: `import polars_llm` stays quick

        again = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passes),
            stop=tenacity.stop_after_delay(_PATIENCE_S),
            wait=tenacity.wait_exponential(multiplier=0.1, max=4) + tenacity.wait_random(0, 0.2),
            reraise=True,
        )
        with self._errors(what):
            return again(call)

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        import pyarrow

        try:
            yield
        except (FileNotFoundError, CacheError):
            raise
        except (OSError, pyarrow.ArrowException) as error:
            said = _SIGNED.sub(r"\1=...", next(iter(str(error).splitlines()), type(error).__name__))
            raise CacheError(
                f"The results in {self.name} cannot be {what}: {said}.",
                path=self.name,
                hint="check that the address is right, that this host reaches it, and that its credentials"
                " (from the environment) may list, read, write and delete there; then run the same line"
                " again. Nothing was sent for it.",
            ) from error

    def _files(self) -> tuple[pyarrow.fs.FileSystem, str]:
        if self._opened is None:
            files, base = self._connected()
            self._opened = files, f"{base.rstrip('/')}/{_ROOM}"
        return self._opened

    def _connected(self) -> tuple[pyarrow.fs.FileSystem, str]:
        from pyarrow import ArrowInvalid, fs

        if self.path is not None:
            return fs.LocalFileSystem(use_mmap=False), str(self.path)
        if self.name.startswith("az://"):
            return _azure(self.name.removeprefix("az://"))
        if self.name.startswith("s3://"):
            # Small objects are then one request, and leave nothing behind if the process dies. Arrow has
            # it since 20 or so.
            with contextlib.suppress(ArrowInvalid):
                return _from_uri(_with(self.name, "allow_delayed_open=true"))
        return _from_uri(self.name)


def _from_uri(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    from pyarrow import fs

    found: tuple[pyarrow.fs.FileSystem, str] = fs.FileSystem.from_uri(url)
    return found


def _azure(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """By the variables that Polars reads too; without a key, by Azure's default credential."""
    from pyarrow import fs

    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account:
        raise CacheError(
            f"No storage account is given for az://{path}.",
            path=f"az://{path}",
            hint="set AZURE_STORAGE_ACCOUNT_NAME, or use abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX."
            " Nothing was sent.",
        )
    key, sas = os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"), os.environ.get("AZURE_STORAGE_SAS_TOKEN")
    return fs.AzureFileSystem(account, account_key=key, sas_token=None if key else sas), path


def _with(url: str, option: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{option}"


def _passes(error: BaseException) -> bool:
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno not in _FINAL_NUMBERS and not _FINAL.search(str(error))


def _write(file: BinaryIO, data: memoryview) -> None:
    file.write(data)
