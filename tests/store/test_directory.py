"""The cache directory: atomic writes, locks that die with their process, and what is refused."""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.errors import CacheCorrupt, CacheError, CacheUnsafe
from polars_llm.store.directory import CacheDirectory, default_path, write_atomic
from polars_llm.store.filesystem import is_shared, mounted_at, mounted_on
from tests.store.child import Child
from tests.store.disks import make_read_only, mounted

DAY = 86_400.0


@pytest.fixture
def directory(tmp_path: Path) -> CacheDirectory:
    made = CacheDirectory(tmp_path / "cache")
    made.prepare()
    return made


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


class TestWriteAtomic:
    def test_writes_for_the_user_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_atomic(path, lambda file: _put(file, b"content"))
        assert path.read_bytes() == b"content"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert names(tmp_path) == {"file"}

    def test_replaces(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        write_atomic(path, lambda file: _put(file, b"old and long"))
        write_atomic(path, lambda file: _put(file, b"new"))
        assert path.read_bytes() == b"new"

    def test_polars_can_write_into_it(self, tmp_path: Path) -> None:
        frame = pl.DataFrame({"a": [1, 2, 3]})
        write_atomic(tmp_path / "file", frame.write_parquet)
        assert pl.read_parquet(tmp_path / "file").equals(frame)

    @pytest.mark.parametrize("error", [RuntimeError("half way"), KeyboardInterrupt()])
    def test_a_writer_that_fails_leaves_the_old_content(self, tmp_path: Path, error: BaseException) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")

        def fail(file: BinaryIO) -> None:
            file.write(b"half")
            raise error

        with pytest.raises(type(error)):
            write_atomic(path, fail)
        assert path.read_bytes() == b"old"
        assert names(tmp_path) == {"file"}

    def test_a_full_disk_is_a_cache_error(self, tmp_path: Path) -> None:
        def fill(file: BinaryIO) -> None:
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(b"x")

        with pytest.raises(CacheError, match="Hint: free space") as caught:
            write_atomic(tmp_path / "file", fill)
        assert caught.value.path == str(tmp_path / "file")
        assert not names(tmp_path)

    def test_a_full_disk_under_polars_is_a_cache_error(self, tmp_path: Path) -> None:
        # Polars raises an OSError without errno.
        frame = pl.DataFrame({"a": range(100_000)})

        def fill(file: BinaryIO) -> None:
            with Path("/dev/full").open("wb", buffering=0) as full:
                frame.write_ipc(full, compression="uncompressed")

        with pytest.raises(CacheError, match="Hint: free space"):
            write_atomic(tmp_path / "file", fill)

    def test_a_disk_that_fills_up_keeps_the_old_content(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "256k"):
            path = tmp_path / "disk" / "file"
            write_atomic(path, lambda file: _put(file, b"old"))
            with pytest.raises(CacheError, match="No space left"):
                write_atomic(path, lambda file: _put(file, bytes(1_000_000)))
            assert path.read_bytes() == b"old"
            assert names(path.parent) == {"file"}

    def test_a_directory_that_is_gone_is_a_cache_error(self, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match="made anew"):
            write_atomic(tmp_path / "gone" / "file", lambda file: _put(file, b""))

    @pytest.mark.crash
    def test_a_kill_leaves_all_of_the_old_or_all_of_the_new(self, tmp_path: Path) -> None:
        with Child(_DIES_AT_EACH_STEP, tmp_path) as child:
            seen = [line.split() for line in child.lines()]
        steps = [step for step, _ in seen]
        assert steps == ["write", "fsync-1", "replace", "fsync-2", "end"]
        assert [content for _, content in seen] == ["old", "old", "old", "new", "new"]
        # What a kill leaves behind is hidden, and swept later.
        assert all(name.startswith(".") and name.endswith(".tmp") for name in names(tmp_path) - {"file"})


# Kills a fork of itself before each step in turn.
_DIES_AT_EACH_STEP = """
import os, signal, sys
from pathlib import Path
from polars_llm.store.directory import write_atomic

path = Path(sys.argv[1]) / "file"
real = {"fsync": os.fsync, "replace": os.replace}

def die_at(step, wanted):
    if step == wanted:
        os.kill(os.getpid(), signal.SIGKILL)

def run(wanted):
    count = 0
    def fsync(fd):
        nonlocal count
        count += 1
        die_at(f"fsync-{count}", wanted)
        real["fsync"](fd)
    def replace(*a, **k):
        die_at("replace", wanted)
        real["replace"](*a, **k)
    os.fsync, os.replace = fsync, replace
    def write(file):
        file.write(b"ne")
        file.flush()
        die_at("write", wanted)
        file.write(b"w")
    write_atomic(path, write)

for wanted in ("write", "fsync-1", "replace", "fsync-2", "end"):
    path.write_bytes(b"old")
    pid = os.fork()
    if pid == 0:
        run(wanted)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) == (wanted != "end"), (wanted, status)
    print(wanted, path.read_text())
"""


class TestPrepare:
    def test_making_the_object_touches_nothing(self, tmp_path: Path) -> None:
        repr(CacheDirectory(tmp_path / "cache"))
        assert not names(tmp_path)

    def test_everything_is_private_and_tagged(self, directory: CacheDirectory) -> None:
        rooms = (directory.jobs, directory.results, directory.spool, directory.locks)
        for room in (directory.path, *rooms):
            assert stat.S_IMODE(room.stat().st_mode) == 0o700
        assert (directory.path / "layout").read_text() == "1\n"
        assert (directory.path / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f0688")
        assert "pllm.recover" in (directory.path / "README.txt").read_text()
        assert not names(directory.locks)

    def test_again_changes_nothing(self, directory: CacheDirectory) -> None:
        before = {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")}
        directory.prepare()
        CacheDirectory(directory.path).prepare()
        after = {path: path.stat().st_mtime_ns for path in directory.path.rglob("*")}
        del before[directory.locks], after[directory.locks]  # locks are tried in it
        assert before == after

    def test_a_removed_directory_comes_back_after_a_word(self, directory: CacheDirectory) -> None:
        shutil.rmtree(directory.path)
        with pytest.raises(CacheError, match=r"was removed(.|\n)*Hint: .*recover"):
            directory.prepare()
        directory.prepare()
        assert directory.spool.is_dir()

    @pytest.mark.parametrize("room", ["jobs", "results"])
    def test_a_directory_that_lost_a_part_is_refused(self, directory: CacheDirectory, room: str) -> None:
        shutil.rmtree(directory.path / room)
        for path in (directory, CacheDirectory(directory.path)):
            for _ in range(2):
                with pytest.raises(CacheError, match=rf"^{room} of the cache(.|\n)*Hint: .*recover"):
                    path.prepare()
        directory.prepare(anew=True)
        assert (directory.path / room).is_dir()

    def test_working_files_and_locks_come_back(self, directory: CacheDirectory) -> None:
        for room in (directory.spool, directory.locks):
            shutil.rmtree(room)
            directory.prepare()
            assert room.is_dir()

    def test_a_newer_layout_is_refused(self, directory: CacheDirectory) -> None:
        (directory.path / "layout").write_text("2\n")
        with pytest.raises(CacheError, match="upgrade"):
            CacheDirectory(directory.path).prepare()

    @pytest.mark.parametrize("content", [b"", b"one", b"\xff\xfe", b"1 2"])
    def test_a_damaged_layout_is_refused(self, directory: CacheDirectory, content: bytes) -> None:
        (directory.path / "layout").write_bytes(content)
        with pytest.raises(CacheCorrupt, match="layout"):
            CacheDirectory(directory.path).prepare()

    def test_a_directory_with_other_files_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("")
        with pytest.raises(CacheError, match=r"thesis.tex(.|\n)*of its own"):
            CacheDirectory(tmp_path).prepare()
        assert names(tmp_path) == {"thesis.tex"}

    def test_hidden_files_and_the_rest_of_a_first_try_are_not_strangers(self, tmp_path: Path) -> None:
        (tmp_path / ".gitkeep").write_text("")
        (tmp_path / "jobs").mkdir()
        CacheDirectory(tmp_path).prepare()

    def test_a_file_in_its_place_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("")
        with pytest.raises(CacheError, match="there is a file"):
            CacheDirectory(tmp_path / "cache").prepare()

    def test_a_place_where_nobody_may_write_is_refused(self) -> None:
        with pytest.raises(CacheError, match=r"Hint: .*POLARS_LLM_CACHE_DIR"):
            CacheDirectory("/sys/polars_llm").prepare()

    def test_a_read_only_disk_is_refused(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "1m"):
            CacheDirectory(tmp_path / "disk" / "cache").prepare()
            make_read_only(tmp_path / "disk")
            for name in ("cache", "other"):
                with pytest.raises(CacheError, match=r"Read-only(.|\n)*Hint: set POLARS_LLM_CACHE_DIR"):
                    CacheDirectory(tmp_path / "disk" / name).prepare()

    def test_default_path(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("POLARS_LLM_CACHE_DIR", "~/mine")
        assert default_path() == tmp_path / "mine"
        assert CacheDirectory("~/other").path == tmp_path / "other"
        monkeypatch.delenv("POLARS_LLM_CACHE_DIR")
        assert "polars_llm" in default_path().parts

    def test_what_the_dead_left_is_swept_a_day_later(self, directory: CacheDirectory) -> None:
        old, young = directory.results / ".a.parquet.x.tmp", directory.results / ".b.parquet.y.tmp"
        answers, dead = directory.results / "a.parquet", directory.locks / "submitter-dead"
        for path in (old, young, answers, dead):
            path.write_bytes(b"")
        with directory.submitter() as owner:
            for path in (old, answers, dead, directory.locks / owner):
                os.utime(path, (time.time() - DAY - 60,) * 2)
            CacheDirectory(directory.path).prepare()
            assert names(directory.results) == {young.name, "a.parquet"}
            assert names(directory.locks) == {owner}
            assert directory.is_alive(owner)


MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
36 27 0:40 / /home rw,relatime shared:1 master:2 - nfs4 server:/home rw,vers=4.2
37 36 0:41 / /home/ada/local rw - xfs /dev/vdb rw
38 27 0:42 / /mnt/two\040words\134x rw - cifs //server/share rw
39 27 0:43 / /data rw - ext4 /dev/vdc rw
40 39 0:44 / /data rw - fuse.sshfs host:/data rw
41 27 0:45 / /homeless rw - tmpfs tmpfs rw
broken line
"""
MAC = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse)
//ada@server/share on /Volumes/My (old) share (smbfs, nodev, nosuid, mounted by ada)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
"""


class TestFileSystem:
    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/", "ext4"),
            ("/tmp/x", "ext4"),
            ("/home", "nfs4"),
            ("/home/ada/.cache/polars_llm", "nfs4"),
            ("/home/ada/local/cache", "xfs"),
            ("/homeless/cache", "tmpfs"),
            ("/mnt/two words\\x/cache", "cifs"),
            ("/data/cache", "fuse.sshfs"),
        ],
    )
    def test_the_innermost_mount_counts(self, path: str, kind: str) -> None:
        assert mounted_at(Path(path), MOUNTINFO) == kind

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/Users/ada", "apfs"),
            ("/Volumes/My (old) share/x", "smbfs"),
            ("/System/Volumes/Data/home", "autofs"),
        ],
    )
    def test_the_same_on_a_mac(self, path: str, kind: str) -> None:
        assert mounted_on(Path(path), MAC) == kind

    @given(st.text())
    def test_any_table_can_be_read(self, text: str) -> None:
        assert mounted_at(Path("/a"), text) is None or " - " in text
        mounted_on(Path("/a"), text)

    @pytest.mark.parametrize(
        "kind",
        [
            *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "NFS4"),
            *("fuse", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.nobody-knows"),
        ],
    )
    def test_shared(self, kind: str) -> None:
        assert is_shared(kind)

    @pytest.mark.parametrize(
        "kind",
        [
            *("ext4", "xfs", "btrfs", "zfs", "apfs", "tmpfs", "overlay", "virtiofs"),
            *("fuseblk", "fuse.mergerfs", "fuse.fuse-overlayfs"),
        ],
    )
    def test_local(self, kind: str) -> None:
        assert not is_shared(kind)

    def test_a_network_disk_is_refused_unless_allowed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # The kernel's table as it would be; nothing here can mount NFS.
        real = Path.read_text
        table = f"1 0 0:1 / / rw - ext4 /dev/a rw\n2 1 0:2 / {tmp_path.resolve()} rw - nfs4 server:/x rw\n"

        def read_text(path: Path, *arguments: str | None, **keywords: str | None) -> str:
            return table if str(path) == "/proc/self/mountinfo" else real(path, *arguments, **keywords)

        monkeypatch.setattr(Path, "read_text", read_text)
        directory = CacheDirectory(tmp_path / "cache")
        said = r"nfs4(.|\n)*pay(.|\n)*POLARS_LLM_ALLOW_NETWORK_CACHE=1"
        with pytest.raises(CacheUnsafe, match=said) as caught:
            directory.prepare()
        assert caught.value.path == str(directory.path)
        assert not names(tmp_path)
        monkeypatch.setenv("POLARS_LLM_ALLOW_NETWORK_CACHE", "1")
        directory.prepare()
        assert directory.jobs.is_dir()


_HOLDS = """
import os, sys
from polars_llm.store.directory import CacheDirectory
with CacheDirectory(sys.argv[1]).submitter() as owner:
    print(owner, flush=True)
    input()
print("left", flush=True)
input()
"""

# The parent dies; its child, which was forked while the lock was held, lives on.
_FORKS_AND_DIES = """
import os, sys
from polars_llm.store.directory import CacheDirectory
with CacheDirectory(sys.argv[1]).submitter() as owner:
    ready, tell = os.pipe()
    if os.fork():
        os.read(ready, 1)
        print(owner, flush=True)
    else:
        os.write(tell, b"x")
    sys.stdin.read()
"""

# Children leave the block by its end, by an exception and by exit(); the parent still holds.
_FORKS_CHILDREN_THAT_LEAVE = """
import os, sys
from polars_llm.store.directory import CacheDirectory
directory = CacheDirectory(sys.argv[1])
pid, way = None, None
try:
    with directory.submitter() as owner, directory.try_lock("ingest") as got:
        assert got
        for way in ("end", "exception", "exit"):
            pid = os.fork()
            if not pid:
                if way == "exception":
                    raise RuntimeError
                if way == "exit":
                    sys.exit()
                break
            assert os.waitpid(pid, 0)[1] == 0, way
        if pid:
            print(owner, flush=True)
            input()
except RuntimeError:
    pass
"""


class TestSubmitter:
    def test_alive_while_it_holds(self, directory: CacheDirectory) -> None:
        with directory.submitter() as owner:
            assert directory.is_alive(owner)
            assert CacheDirectory(directory.path).is_alive(owner)
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(directory.is_alive, owner).result()
        assert not directory.is_alive(owner)
        assert not names(directory.locks)

    def test_dead_after_an_exception(self, directory: CacheDirectory) -> None:
        with pytest.raises(RuntimeError), directory.submitter() as owner:
            raise RuntimeError
        assert not directory.is_alive(owner)

    def test_each_is_its_own(self, directory: CacheDirectory) -> None:
        with directory.submitter() as one, directory.submitter() as two:
            assert one != two
            assert directory.is_alive(one)
        assert not directory.is_alive(two)

    @pytest.mark.parametrize("owner", ["", "..", "../layout", "a/b", ".hidden", "x" * 300, "a\0b"])
    def test_names_that_lead_elsewhere_are_refused(self, directory: CacheDirectory, owner: str) -> None:
        with pytest.raises(ValueError, match="not a name"):
            directory.is_alive(owner)

    def test_a_name_nobody_ever_had_is_dead(self, directory: CacheDirectory) -> None:
        assert not directory.is_alive("submitter-0123456789abcdef")

    def test_whoever_asks_about_the_dead_does_not_look_alive(self, directory: CacheDirectory) -> None:
        (directory.locks / "submitter-dead").write_bytes(b"")
        with ThreadPoolExecutor(8) as pool:
            asked = pool.map(lambda _: directory.is_alive("submitter-dead"), range(2000))
            assert not any(asked)

    def test_another_process(self, directory: CacheDirectory) -> None:
        with Child(_HOLDS, directory.path) as child:
            owner = child.line()
            assert directory.is_alive(owner)
            child.go_on()
            assert child.line() == "left"
            assert not directory.is_alive(owner)

    @pytest.mark.crash
    def test_a_killed_process_is_dead_at_once(self, directory: CacheDirectory) -> None:
        with Child(_HOLDS, directory.path) as child:
            owner = child.line()
            child.kill()
            assert (directory.locks / owner).exists()
            assert not directory.is_alive(owner)

    @pytest.mark.crash
    def test_a_forked_child_does_not_keep_its_dead_parent_alive(self, directory: CacheDirectory) -> None:
        with Child(_FORKS_AND_DIES, directory.path) as child:
            owner = child.line()
            assert directory.is_alive(owner)
            child.kill()
            assert not directory.is_alive(owner)

    def test_a_forked_child_that_leaves_does_not_release_its_parent(self, directory: CacheDirectory) -> None:
        with Child(_FORKS_CHILDREN_THAT_LEAVE, directory.path) as child:
            owner = child.line()
            assert directory.is_alive(owner)
            with directory.try_lock("ingest") as got:
                assert not got
            child.go_on()
            assert child.lines() == []
            assert not directory.is_alive(owner)
            assert not names(directory.locks)


_TRIES = """
import os, sys
from polars_llm.store.directory import CacheDirectory
with CacheDirectory(sys.argv[1]).try_lock("ingest") as got:
    print(got, flush=True)
    input()
"""

# Whoever holds the lock is alone: a file that says so is there for one holder at a time.
_TAKE_TURNS = """
import os, sys
from pathlib import Path
from polars_llm.store.directory import CacheDirectory
directory = CacheDirectory(sys.argv[1])
alone, tally = directory.path / "alone", directory.path / "tally"
pids = []
for _ in range(3):
    pid = os.fork()
    if not pid:
        done = 0
        while done < 60:
            with directory.try_lock("turn") as got:
                if got:
                    os.close(os.open(alone, os.O_CREAT | os.O_EXCL))
                    tally.write_text(str(int(tally.read_text()) + 1))
                    alone.unlink()
                    done += 1
        os._exit(0)
    pids.append(pid)
assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
"""


class TestTryLock:
    def test_one_at_a_time(self, directory: CacheDirectory) -> None:
        with directory.try_lock("a") as first, directory.try_lock("a") as second:
            assert (first, second) == (True, False)
            with directory.try_lock("b") as other, ThreadPoolExecutor(1) as pool:
                assert other
                assert not pool.submit(_is_free, directory, "a").result()
        assert _is_free(directory, "a")
        assert not names(directory.locks)

    def test_the_loser_releases_nothing(self, directory: CacheDirectory) -> None:
        with directory.try_lock("a"):
            assert not _is_free(directory, "a")
            assert not _is_free(directory, "a")

    def test_an_error_of_the_block_is_not_touched(self, directory: CacheDirectory) -> None:
        error = FileNotFoundError(2, "the block's own")
        with pytest.raises(FileNotFoundError) as caught, directory.try_lock("a"):
            raise error
        assert caught.value is error
        assert _is_free(directory, "a")

    def test_it_makes_the_directory_when_needed(self, tmp_path: Path) -> None:
        assert _is_free(CacheDirectory(tmp_path / "new"), "a")

    @pytest.mark.crash
    def test_a_killed_process_releases_it(self, directory: CacheDirectory) -> None:
        with Child(_TRIES, directory.path) as child:
            assert child.line() == "True"
            assert not _is_free(directory, "ingest")
            child.kill()
            assert _is_free(directory, "ingest")

    def test_processes_exclude_each_other_although_the_file_goes_each_time(
        self, directory: CacheDirectory
    ) -> None:
        (directory.path / "tally").write_text("0")
        with Child(_TAKE_TURNS, directory.path) as child:
            assert child.lines() == []
        assert (directory.path / "tally").read_text() == "180"

    def test_threads_exclude_each_other(self, directory: CacheDirectory) -> None:
        inside, most, guard = 0, 0, threading.Lock()

        def work(_: int) -> None:
            nonlocal inside, most
            with directory.try_lock("turn") as got:
                if got:
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with guard:
                        inside -= 1

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(200)))
        assert most == 1


def _is_free(directory: CacheDirectory, name: str) -> bool:
    with directory.try_lock(name) as got:
        return got


def _put(file: BinaryIO, content: bytes) -> None:
    file.write(content)
