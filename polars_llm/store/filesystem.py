"""What kind of file system is this, and can two processes trust each other's locks on it?"""

from __future__ import annotations

import re
import sys
from pathlib import Path

__all__ = ["file_system", "is_shared", "mounted_at", "mounted_on"]

# The ledger is SQLite with a write-ahead log, whose index is memory shared by the processes of one host
# (sqlite.org/wal.html: it "does not work over a network filesystem"). So every file system that two
# hosts can mount at once is refused, also the ones whose locks are right (ceph, lustre, gpfs, ocfs2), and
# so are those that share a directory with another kernel (9p, vboxsf, vmhgfs, prl_fs). virtiofs is not: it
# is the ordinary disk of many containers, and all of them see one kernel's locks and pages.
_SHARED = frozenset(
    {
        *("nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afpfs", "webdav", "davfs"),
        *("afs", "openafs", "auristorfs", "coda", "9p", "vboxsf", "vmhgfs", "prl_fs", "drvfs", "macfuse"),
        *("ceph", "lustre", "gpfs", "beegfs", "beegfs_nodev", "glusterfs", "orangefs", "pvfs2", "panfs"),
        *("ocfs2", "gfs", "gfs2", "wekafs", "osxfuse"),
    }
)
# What FUSE programs do about locks and shared memory is their own affair: only those that stand for a
# directory of this host are let in.
_LOCAL_FUSE = frozenset(
    {
        *("bindfs", "mergerfs", "unionfs", "fuse-overlayfs", "ntfs-3g", "zfs-fuse", "grpcfuse", "osxfs"),
        *("encfs", "gocryptfs", "cryfs", "securefs", "veracrypt"),
    }
)


def is_shared(kind: str) -> bool:
    """Is this a type of file system on which locks and SQLite cannot be trusted?"""
    kind = kind.lower()
    if kind == "fuse" or kind.startswith("fuse."):
        return kind.removeprefix("fuse.") not in _LOCAL_FUSE
    return kind in _SHARED


def file_system(path: Path) -> str | None:
    """Type of the file system that holds `path`, None where the platform does not say."""
    if sys.platform == "darwin":
        return _mounted_on_mac(path.resolve())
    try:
        table = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    return mounted_at(path.resolve(), table)


def mounted_at(path: Path, mountinfo: str) -> str | None:
    """The type of the innermost mount above `path`, read from the text of Linux' mountinfo."""
    mounts = []
    for line in mountinfo.split("\n"):
        left, separator, right = line.partition(" - ")
        fields = left.split(" ")
        if separator and len(fields) >= 5:
            mounts.append((_unescape(fields[4]), right.split(" ")[0]))
    return _innermost(path, mounts)


def mounted_on(path: Path, mount_output: str) -> str | None:
    """The same, read from what macOS' and BSD's ``mount`` prints."""
    pattern = re.compile(r".*? on (/.*) \(([^,)]+)[^)]*\)")
    found = map(pattern.fullmatch, mount_output.split("\n"))
    return _innermost(path, [(match[1], match[2]) for match in found if match])


def _innermost(path: Path, mounts: list[tuple[str, str]]) -> str | None:
    best: tuple[int, str] | None = None
    for point, kind in mounts:
        depth = len(Path(point).parts)
        # A later line covers an earlier one at the same point.
        if path.is_relative_to(point) and (best is None or depth >= best[0]):
            best = depth, kind
    return best[1] if best else None


def _unescape(field: str) -> str:
    # The kernel writes blanks and backslashes as three octal digits of a byte.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _mounted_on_mac(path: Path) -> str | None:
    import subprocess

    try:
        listed = subprocess.run(["/sbin/mount"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return mounted_on(path, listed.stdout)
