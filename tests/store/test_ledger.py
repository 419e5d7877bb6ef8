"""The ledger on disk: durable, exclusive between processes, and suspicious of what it finds."""

from __future__ import annotations

import os
import pickle
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diskcache
import pytest

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.job import Job, State
from polars_llm.store.ledger import DiskcacheLedger, Ledger
from polars_llm.store.textcache import open_text_cache
from tests.store.child import Child
from tests.store.disks import make_read_only, mounted
from tests.store.ledger_contract import LedgerContract, a_job, in_thread


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


@pytest.fixture
def ledger(home: Path) -> DiskcacheLedger:
    return DiskcacheLedger(home, timeout=10)


class TestDiskcacheLedger(LedgerContract):
    @pytest.fixture
    def ledger(self, home: Path) -> Ledger:
        return DiskcacheLedger(home, timeout=10)


def rows(home: Path) -> sqlite3.Connection:
    return sqlite3.connect(home / "cache.db", isolation_level=None)


def checkpointed(home: Path) -> None:
    """All that was committed lies in cache.db alone."""
    assert sorted(path.name for path in home.iterdir()) == ["cache.db", "format"]


class TestOpening:
    def test_nothing_is_made_before_the_first_write(self, ledger: DiskcacheLedger, home: Path) -> None:
        repr(ledger)
        ledger.close()
        assert ledger.jobs() == []
        assert ledger.get("job_0") is None
        assert not home.exists()

    def test_files_are_private(self, ledger: DiskcacheLedger, home: Path) -> None:
        with ledger.transaction():
            ledger.put(a_job())
            modes = {path.name: path.stat().st_mode & 0o777 for path in (home, *home.iterdir())}
        assert modes.pop("jobs") == 0o700
        assert set(modes.values()) == {0o600}

    def test_no_connection_is_left_open(self, ledger: DiskcacheLedger, home: Path) -> None:
        ledger.put(a_job())
        in_thread(ledger.jobs)
        checkpointed(home)  # SQLite removes its log when the last connection closes

    def test_another_handle_reads_what_was_written(self, ledger: DiskcacheLedger, home: Path) -> None:
        job = a_job()
        ledger.put(job)
        assert DiskcacheLedger(home).jobs() == [job]

    def test_opening_and_reading_do_not_wait_for_a_transaction(
        self, ledger: DiskcacheLedger, home: Path
    ) -> None:
        job = a_job()
        ledger.put(job)
        with ledger.transaction():
            assert in_thread(DiskcacheLedger(home, timeout=0.1).jobs) == [job]

    def test_processes_that_open_a_new_one_at_once_share_it(self, home: Path) -> None:
        with Child(_OPEN_AT_ONCE, home) as child:
            assert child.lines() == []
        assert len(DiskcacheLedger(home).jobs()) == 6

    def test_an_interrupted_creation_is_finished(self, ledger: DiskcacheLedger, home: Path) -> None:
        ledger.put_fact("x", 1)
        (home / "format").unlink()
        with rows(home) as connection:
            connection.execute("DELETE FROM Cache")
            connection.execute("DROP TRIGGER Settings_size_update")
        connection.close()
        job = a_job()
        DiskcacheLedger(home).put(job)
        assert DiskcacheLedger(home).jobs() == [job]

    def test_a_removed_directory_is_a_new_ledger(self, ledger: DiskcacheLedger, home: Path) -> None:
        old, new = a_job(), a_job()
        ledger.put(old)
        shutil.rmtree(home)
        assert ledger.jobs() == []
        with pytest.raises(CacheError, match="recover"):
            ledger.move(old, State.CREATING)
        ledger.put(new)
        assert DiskcacheLedger(home).jobs() == [new]

    def test_a_ledger_put_back_from_a_backup_is_read(
        self, ledger: DiskcacheLedger, home: Path, tmp_path: Path
    ) -> None:
        job = a_job()
        ledger.put(job)
        shutil.copytree(home, tmp_path / "backup")
        ledger.move(job, State.CREATING)
        shutil.rmtree(home)
        shutil.copytree(tmp_path / "backup", home)
        assert ledger.jobs() == [job]


class TestSettings:
    def test_every_connection_commits_durably(self, ledger: DiskcacheLedger, home: Path) -> None:
        ledger.put(a_job())

        def pragmas(_: int) -> tuple[Any, ...]:
            cache = open_text_cache(home, 10)
            try:
                names = ("synchronous", "journal_mode", "mmap_size")
                return tuple(cache._con.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
            finally:
                cache.close()

        with ThreadPoolExecutor(2) as pool:
            assert set(pool.map(pragmas, range(4))) == {(2, "wal", 0)}

    def test_another_opener_cannot_make_it_forget(self, ledger: DiskcacheLedger, home: Path) -> None:
        first = a_job()
        ledger.put(first)
        hostile = diskcache.Cache(
            str(home),
            eviction_policy="least-recently-stored",
            size_limit=1,
            cull_limit=100,
            sqlite_synchronous=0,
            sqlite_journal_mode="delete",
            disk_min_file_size=1,
            statistics=1,
        )
        hostile.close()
        fresh = DiskcacheLedger(home)
        jobs = [a_job() for _ in range(30)]
        for number, job in enumerate(jobs):
            (ledger if number % 2 else fresh).put(job)
        assert len(ledger.jobs()) == len(fresh.jobs()) == 31
        checkpointed(home)
        connection = rows(home)
        stored = dict(connection.execute("SELECT key, value FROM Settings"))
        connection.close()
        assert stored["eviction_policy"] == "none"
        assert stored["cull_limit"] == 0
        assert stored["sqlite_synchronous"] == 2
        assert stored["sqlite_journal_mode"] == "wal"
        assert stored["size_limit"] == 2**62

    def test_a_record_that_is_too_large_is_refused(self, ledger: DiskcacheLedger, home: Path) -> None:
        job = a_job()
        ledger.put(job)
        with pytest.raises(CacheError, match=r"33,\d\d\d bytes"):
            ledger.move(job, State.CREATING, marker="x" * 33_000)
        assert ledger.get(job.id) == job
        large = ledger.move(job, State.CREATING, marker="x" * 32_000)
        assert ledger.get(job.id) == large
        checkpointed(home)

    def test_open_jobs_are_found_among_many_closed_ones(self, ledger: DiskcacheLedger) -> None:
        still_open = [a_job() for _ in range(3)]
        with ledger.transaction():
            for _ in range(10_000):
                ledger.put(a_job().to(State.RELEASED))
            for job in still_open:
                ledger.put(job)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            found = ledger.jobs(open_only=True)
            times.append(time.perf_counter() - start)
            assert {job.id for job in found} == {job.id for job in still_open}
        assert min(times) < 0.02  # all of them take 0.13 s
        assert len(ledger.jobs()) == 10_003

    def test_a_record_has_no_field_for_a_secret(self) -> None:
        fields = {*a_job().to_dict(), *Job.__dataclass_fields__}
        telling = ("secret", "token", "password", "auth", "header", "api_key", "credential", "bearer")
        # `headers` are those that change answers: API version and betas, never the authorization.
        allowed = ["headers", "output_tokens_max"]
        assert [name for name in sorted(fields) if any(word in name for word in telling)] == allowed


class _Runs:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self._path),)


class TestForeignContent:
    """Nothing that was planted runs, and nothing that was lost is taken for empty."""

    @pytest.fixture
    def job(self, ledger: DiskcacheLedger) -> Job:
        job = a_job()
        ledger.put(job)
        return job

    def test_a_planted_pickle_is_not_executed(
        self, ledger: DiskcacheLedger, home: Path, job: Job, tmp_path: Path
    ) -> None:
        bait = tmp_path / "executed"
        connection = rows(home)
        connection.execute("UPDATE Cache SET mode = 4, value = ?", (pickle.dumps(_Runs(bait)),))
        connection.close()
        for read in (ledger.jobs, lambda: ledger.get(job.id), DiskcacheLedger(home).jobs):
            with pytest.raises(CacheCorrupt, match="not unpickled"):
                read()
        assert not bait.exists()
        # The bait is good: diskcache as it is does run it.
        with diskcache.Cache(str(home)) as plain:
            assert plain.get(f"open/{job.id}") is None
        assert bait.exists()

    def test_a_planted_key_is_not_executed(
        self, ledger: DiskcacheLedger, home: Path, job: Job, tmp_path: Path
    ) -> None:
        bait = tmp_path / "executed"
        connection = rows(home)
        key = pickle.dumps(_Runs(bait), protocol=0)
        connection.execute("UPDATE Cache SET key = ?, raw = 0", (key.decode(),))
        connection.execute("UPDATE Cache SET key = 'open/' || key")
        connection.close()
        with pytest.raises(CacheCorrupt, match="not text"):
            ledger.jobs()
        assert not bait.exists()

    @pytest.mark.parametrize(
        "change",
        [
            "value = x'7b7d'",
            "value = x'ff', mode = 2, filename = 'format'",
            "filename = '../layout'",
            "value = CAST(x'ff22' AS TEXT)",
            "value = 7",
            "value = NULL",
            "value = '{'",
            "value = '[]'",
            "value = '{}'",
            "value = replace(value, 'planned', 'telepathic')",
            "value = replace(value, 'planned', 'released')",
            "value = replace(value, 'job_', 'job_0')",
            "value = replace(value, 'requests', 'requestz')",
            "key = 'open/job_other'",
            "key = replace(key, 'open', 'closed')",
        ],
    )
    def test_a_damaged_record_is_never_skipped(
        self, ledger: DiskcacheLedger, home: Path, job: Job, change: str
    ) -> None:
        connection = rows(home)
        connection.execute(f"UPDATE Cache SET {change}")
        connection.close()
        with pytest.raises(CacheCorrupt, match=r"Hint: (.|\n)*nothing"):
            ledger.jobs()

    @pytest.mark.parametrize("size", [0, 1, 100, 4096, 5000, 8192, 12288])
    def test_a_truncated_file_is_corrupt(
        self, ledger: DiskcacheLedger, home: Path, job: Job, size: int
    ) -> None:
        checkpointed(home)
        os.truncate(home / "cache.db", size)
        before = (home / "cache.db").read_bytes()
        for handle in (ledger, DiskcacheLedger(home)):
            with pytest.raises(CacheCorrupt, match="recover"):
                handle.jobs()
            with pytest.raises(CacheCorrupt):
                handle.put(a_job())
        assert (home / "cache.db").read_bytes() == before

    def test_a_missing_file_is_corrupt(self, ledger: DiskcacheLedger, home: Path, job: Job) -> None:
        (home / "cache.db").unlink()
        for handle in (ledger, DiskcacheLedger(home)):
            with pytest.raises(CacheCorrupt, match="missing"):
                handle.jobs()
            with pytest.raises(CacheCorrupt, match="missing"):
                handle.put(a_job())
        assert not (home / "cache.db").exists()

    def test_lost_tables_are_corrupt(self, ledger: DiskcacheLedger, home: Path, job: Job) -> None:
        connection = rows(home)
        connection.execute("DROP TABLE Cache")
        connection.close()
        for handle in (ledger, DiskcacheLedger(home)):
            with pytest.raises(CacheCorrupt, match="table"):
                handle.jobs()

    def test_garbage_is_corrupt(self, ledger: DiskcacheLedger, home: Path, job: Job) -> None:
        (home / "cache.db").write_bytes(b"To whom it may concern\n" * 1000)
        for handle in (ledger, DiskcacheLedger(home)):
            with pytest.raises(CacheCorrupt, match="not a database"):
                handle.jobs()

    def test_the_database_of_another_program_is_left_alone(self, ledger: DiskcacheLedger, home: Path) -> None:
        home.mkdir()
        connection = rows(home)
        connection.execute("CREATE TABLE savings (account, amount)")
        connection.close()
        before = (home / "cache.db").read_bytes()
        with pytest.raises(CacheCorrupt, match="another program"):
            ledger.put(a_job())
        assert (home / "cache.db").read_bytes() == before

    def test_the_cache_of_another_program_is_left_alone(self, ledger: DiskcacheLedger, home: Path) -> None:
        with diskcache.Cache(str(home)) as theirs:
            theirs["a"] = 1
        with pytest.raises(CacheCorrupt, match="another program"):
            ledger.put(a_job())
        with diskcache.Cache(str(home)) as theirs:
            assert dict.fromkeys(theirs) == {"a": None}

    def test_a_newer_format_is_refused(self, ledger: DiskcacheLedger, home: Path, job: Job) -> None:
        (home / "format").write_bytes(b"2\n")
        with pytest.raises(CacheError, match="upgrade"):
            DiskcacheLedger(home).jobs()


class TestTrouble:
    def test_waiting_ends_with_a_hint(self, ledger: DiskcacheLedger, home: Path) -> None:
        ledger.put(a_job())
        other = DiskcacheLedger(home, timeout=0.2)
        with ledger.transaction():
            start = time.monotonic()
            with pytest.raises(CacheError, match=r"0\.2 s(.|\n)*Hint: run the same line again"):
                in_thread(other.put, a_job())
            assert time.monotonic() - start < 5
        other.put(a_job())
        assert len(ledger.jobs()) == 2

    def test_waiting_for_a_thread_ends_too(self, home: Path) -> None:
        ledger = DiskcacheLedger(home, timeout=0.2)
        with ledger.transaction(), pytest.raises(CacheError, match=r"0\.2 s"):
            in_thread(ledger.put, a_job())
        ledger.put(a_job())

    def test_a_full_disk_keeps_what_was_committed(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "512k"):
            ledger = DiskcacheLedger(tmp_path / "disk" / "jobs")
            kept: list[Job] = []
            with pytest.raises(CacheError, match=r"Hint: free space(.|\n)*found again"):
                while len(kept) < 100:
                    job = a_job(model="x" * 10_000)
                    ledger.put(job)
                    kept.append(job)
            assert len(kept) >= 3
            assert [job.id for job in ledger.jobs()] == [job.id for job in kept]
            assert DiskcacheLedger(tmp_path / "disk" / "jobs").jobs() == ledger.jobs()

    def test_a_file_that_cannot_grow_keeps_what_was_committed(self, home: Path) -> None:
        with Child(_CANNOT_GROW, home) as child:
            outcome, *kept = child.lines()
        assert outcome == "CacheError"
        assert [job.id for job in DiskcacheLedger(home).jobs()] == kept

    def test_a_read_only_disk_is_a_cache_error(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "2m"):
            ledger = DiskcacheLedger(tmp_path / "disk" / "jobs")
            ledger.put(a_job())
            make_read_only(tmp_path / "disk")
            for handle in (ledger, DiskcacheLedger(tmp_path / "disk" / "jobs")):
                with pytest.raises(CacheError, match="Hint: make it writable"):
                    handle.put(a_job())

    def test_a_file_in_its_place_is_a_cache_error(self, ledger: DiskcacheLedger, home: Path) -> None:
        home.write_text("")
        with pytest.raises(CacheError, match="there is a file"):
            ledger.put(a_job())

    def test_an_error_of_the_block_is_not_touched(self, ledger: DiskcacheLedger) -> None:
        for error in (sqlite3.OperationalError("theirs"), diskcache.Timeout(), OSError(28, "theirs")):
            with pytest.raises(type(error)) as caught, ledger.transaction():
                raise error
            assert caught.value is error


class TestProcesses:
    def test_of_processes_that_move_the_same_job_one_wins(self, home: Path, ledger: DiskcacheLedger) -> None:
        jobs = [a_job() for _ in range(30)]
        with ledger.transaction():
            for job in jobs:
                ledger.put(job)
        with Child(_RACE, home, 4) as child:
            wins = [line.split() for line in child.lines()]
        assert sorted(job for _, job in wins) == sorted(job.id for job in jobs)
        assert {job.id: job.owner for job in ledger.jobs()} == {job: owner for owner, job in wins}
        assert len({owner for owner, _ in wins}) > 1, "there was no contention"

    def test_processes_count_without_losing_one(self, home: Path, ledger: DiskcacheLedger) -> None:
        with Child(_COUNT, home, 4) as child:
            assert child.lines() == []
        assert ledger.get_fact("n") == 4 * 25

    @pytest.mark.crash
    def test_a_kill_in_a_transaction_leaves_nothing_and_nobody_waiting(
        self, home: Path, ledger: DiskcacheLedger
    ) -> None:
        job = a_job()
        ledger.put(job)
        with Child(_STOPS_IN_TRANSACTION, home) as child:
            assert child.line() == "inside"
            child.kill()
        quick = DiskcacheLedger(home, timeout=0.5)
        assert quick.jobs() == [job]
        assert quick.move(job, State.RELEASED).state is State.RELEASED

    @pytest.mark.crash
    def test_what_was_put_before_a_kill_is_there(self, home: Path, ledger: DiskcacheLedger) -> None:
        with Child(_PUTS_UNTIL_KILLED, home) as child:
            told = [child.line() for _ in range(20)]
            child.kill()
            told += child.process.stdout.read().split() if child.process.stdout else []
        stored = [job.id for job in ledger.jobs()]
        assert stored[: len(told)] == told
        assert len(stored) - len(told) in {0, 1}

    def test_a_forked_child_uses_the_ledger(self, home: Path, ledger: DiskcacheLedger) -> None:
        with Child(_FORKS, home) as child:
            assert child.lines() == []
        assert ledger.get_fact("parent") == ["child"]

    def test_a_child_forked_in_a_transaction_cannot_spoil_it(
        self, home: Path, ledger: DiskcacheLedger
    ) -> None:
        with Child(_FORKS_IN_TRANSACTION, home) as child:
            assert child.lines() == ["child: This process was forked", "parent: 2 jobs"]
        assert len(ledger.jobs()) == 2


_PRELUDE = """
import os, sys
from pathlib import Path
from polars_llm.errors import CacheError
from polars_llm.job import Job, State
from polars_llm.store.ledger import DiskcacheLedger

home = Path(sys.argv[1])
ledger = DiskcacheLedger(home, timeout=30)

def plan(**facts):
    return Job.plan(provider="openai", base_url=None, endpoint="/v1", requests=1, **{"model": "m", **facts})

def processes(number, work):
    ready, tell = os.pipe()
    pids = []
    for _ in range(number):
        pid = os.fork()
        if not pid:
            os.close(tell)
            os.read(ready, 1)  # all start when the parent closes its end
            try:
                work()
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        pids.append(pid)
    os.close(tell)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
"""

_OPEN_AT_ONCE = _PRELUDE + "processes(6, lambda: ledger.put(plan()))"

_RACE = (
    _PRELUDE
    + """
import multiprocessing
jobs = ledger.jobs()
start = multiprocessing.get_context("fork").Barrier(int(sys.argv[2]))
def work():
    me = str(os.getpid())
    for job in jobs:
        start.wait()  # or who is ahead would win them all
        if ledger.move(job, State.CREATING, owner=me).owner == me:
            os.write(1, f"{me} {job.id}\\n".encode())
processes(int(sys.argv[2]), work)
"""
)

_COUNT = (
    _PRELUDE
    + """
def work():
    for _ in range(25):
        with ledger.transaction():
            ledger.put_fact("n", (ledger.get_fact("n") or 0) + 1)
processes(int(sys.argv[2]), work)
"""
)

_STOPS_IN_TRANSACTION = (
    _PRELUDE
    + """
with ledger.transaction():
    ledger.put(plan())
    for job in ledger.jobs():
        ledger.move(job, State.CREATING)
    print("inside", flush=True)
    input()
"""
)

_PUTS_UNTIL_KILLED = (
    _PRELUDE
    + """
while True:
    job = plan()
    ledger.put(job)
    os.write(1, f"{job.id}\\n".encode())
"""
)

_CANNOT_GROW = (
    _PRELUDE
    + """
import resource
kept = []
ledger.put_fact("x", 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    while len(kept) < 100:
        job = plan(model="x" * 10_000)
        ledger.put(job)
        kept.append(job.id)
except CacheError as error:
    print(type(error).__name__)
print(*kept, sep="\\n")
"""
)

_FORKS = (
    _PRELUDE
    + """
ledger.put_fact("parent", [])
ledger.get_fact("parent")
pid = os.fork()
if not pid:
    ledger.put_fact("parent", [*ledger.get_fact("parent"), "child"])
    sys.exit()
assert os.waitpid(pid, 0)[1] == 0
assert ledger.get_fact("parent") == ["child"]
"""
)

_FORKS_IN_TRANSACTION = (
    _PRELUDE
    + """
with ledger.transaction():
    ledger.put(plan())
    pid = os.fork()
    if not pid:
        try:
            ledger.put(plan())
        except CacheError as error:
            print("child:", str(error).split(" from one")[0], flush=True)
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
    ledger.put(plan())
print("parent:", len(ledger.jobs()), "jobs")
"""
)
