"""The working files of jobs: exact, private, suspicious of damage, and gone when asked."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import spool as spool_module
from polars_llm.store.spool import Spool
from tests.store.child import Child
from tests.store.disks import make_read_only, mounted

ONE, TWO = "job_0123456789abcdef", "job_fedcba9876543210"
KEYS = st.lists(st.tuples(st.binary(min_size=32, max_size=32), st.integers(0, 2**16 - 1)), max_size=20)
SCHEMA = {"key": pl.Binary, "attempt": pl.UInt16}


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def frame(*names: str, attempt: int = 1) -> pl.DataFrame:
    """Keys that start with these names."""
    rows = [(name.encode().ljust(32, b"."), attempt) for name in names]
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


class TestKeys:
    @settings(deadline=None)
    @given(st.dictionaries(st.sampled_from([ONE, TWO, "recovered_batch-1"]), KEYS))
    def test_what_was_written_is_read(self, jobs: dict[str, list[tuple[bytes, int]]]) -> None:
        with tempfile.TemporaryDirectory() as home:
            spool = Spool(Path(home))
            for job, rows in jobs.items():
                spool.write_keys(job, pl.DataFrame(rows, schema=SCHEMA, orient="row"))
            expected = [(key, attempt, job) for job, rows in jobs.items() for key, attempt in rows]
            assert spool.keys(list(jobs)).rows() == expected
            assert spool.keys(list(jobs)).schema == {**SCHEMA, "job_id": pl.String}
            prefixes = spool.key_prefixes(list(jobs))
            assert prefixes.rows() == [(int.from_bytes(key[:16], "big"), job) for key, _, job in expected]
            assert prefixes.schema == {"key": pl.UInt128, "job_id": pl.String}
            assert Spool(Path(home)).key_prefixes(list(jobs)).equals(prefixes)

    def test_files_are_private(self, spool: Spool, tmp_path: Path) -> None:
        spool.write_keys(ONE, frame("a"))
        spool.write_requests(ONE, [b"my diary"])
        (directory,) = tmp_path.iterdir()
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}

    def test_columns_may_come_in_any_order_and_width(self, spool: Spool) -> None:
        spool.write_keys(ONE, frame("a").select(pl.col("attempt").cast(pl.Int64), "key", extra=pl.lit(1)))
        assert spool.keys([ONE]).drop("job_id").equals(frame("a"))

    @pytest.mark.parametrize(
        "keys",
        [
            pl.DataFrame({"key": [b"short"], "attempt": [1]}),
            pl.DataFrame({"key": [None], "attempt": [1]}, schema_overrides={"key": pl.Binary}),
            pl.DataFrame({"key": [b"." * 32], "attempt": [None]}, schema_overrides={"attempt": pl.UInt16}),
        ],
    )
    def test_what_is_not_a_key_is_not_written(self, spool: Spool, keys: pl.DataFrame) -> None:
        with pytest.raises(ValueError, match="32 bytes"):
            spool.write_keys(ONE, keys)
        with pytest.raises(CacheCorrupt):
            spool.keys([ONE])

    def test_prefixes_are_read_once(self, spool: Spool) -> None:
        spool.write_keys(ONE, frame("a", "b"))
        before = spool.key_prefixes([ONE])
        (spool.requests_path(ONE).parent / f"{ONE}.keys.arrow").write_bytes(b"")
        assert spool.key_prefixes([ONE]).equals(before)
        spool.write_keys(ONE, frame("c"))
        assert spool.key_prefixes([ONE])["key"].to_list() == [int.from_bytes(b"c".ljust(16, b"."), "big")]

    def test_what_is_in_memory_needs_no_file(self, spool: Spool) -> None:
        spool.write_keys(ONE, frame("a", "b"))
        keys = spool.key_prefixes([ONE])["key"].to_list()
        assert spool.prefixes_in_memory([ONE]) == [keys]
        assert spool.prefixes_in_memory([]) == []
        assert spool.prefixes_in_memory([ONE, TWO]) is None
        other = Spool(spool.requests_path(ONE).parent)
        assert other.prefixes_in_memory([ONE]) is None
        other.key_prefixes([ONE])
        assert other.prefixes_in_memory([ONE]) == [keys]
        spool.remove(ONE)
        assert spool.prefixes_in_memory([ONE]) is None

    def test_threads_may_share_it(self, spool: Spool) -> None:
        for job in (ONE, TWO):
            spool.write_keys(job, frame(job))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: spool.key_prefixes([ONE, TWO]).rows(), range(20)))
        assert all(rows == found[0] for rows in found)

    def test_a_thread_that_waits_for_polars_may_ask_again(
        self, spool: Spool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for job in (ONE, TWO):
            spool.write_keys(job, frame(job))
        made, found = spool_module._prefixes, []
        other = Spool(spool.requests_path(ONE).parent)

        def ask() -> None:
            found.append(other.key_prefixes([ONE, TWO]).rows())

        def made_while_another_verb_runs(keys: pl.DataFrame) -> pl.DataFrame:
            # A thread of Polars runs other calls while it waits for part of a query.
            monkeypatch.setattr(spool_module, "_prefixes", made)
            ask()
            return made(keys)

        monkeypatch.setattr(spool_module, "_prefixes", made_while_another_verb_runs)
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        assert len(found) == 2
        assert found[0] == found[1]

    def test_verbs_side_by_side_on_polars_threads(self, spool: Spool) -> None:
        jobs = [f"job{number}" for number in range(40)]
        for job in jobs:
            spool.write_keys(job, frame(*(f"{job} {row}" for row in range(1_000))))
        ended = subprocess.run(
            [sys.executable, "-c", _SIDE_BY_SIDE, spool.requests_path(ONE).parent, *jobs],
            env={**os.environ, "POLARS_MAX_THREADS": "2"},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert ended.stdout == "done\n"


# With a lock that is held while Polars works, it hung in the first seconds.
_SIDE_BY_SIDE = """
import sys
import polars as pl
from polars_llm.store.spool import Spool

def ask(rows):
    spool.key_prefixes(sys.argv[2:])
    return rows

frame = pl.DataFrame({f"c{n}": [1, 2] for n in range(16)})
for _ in range(20):
    spool = Spool(sys.argv[1])
    frame.select(pl.col(name).map_batches(ask, return_dtype=pl.Int64) for name in frame.columns)
print("done")
"""


class TestDamage:
    """Polars itself aborts the process on some damaged Arrow files, so none must reach it."""

    @pytest.fixture
    def path(self, spool: Spool) -> Path:
        spool.write_keys(ONE, frame(*map(str, range(50))))
        return spool.requests_path(ONE).parent / f"{ONE}.keys.arrow"

    def refused(self, path: Path) -> None:
        spool = Spool(path.parent)
        for read in (spool.keys, spool.key_prefixes):
            with pytest.raises(CacheCorrupt, match=rf"{ONE}(.|\n)*pllm.abandon\('{ONE}'\)") as caught:
                read([ONE])
            assert caught.value.path == str(path)

    def test_missing(self, path: Path) -> None:
        path.unlink()
        self.refused(path)

    def test_truncated_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for size in {*range(120), *range(0, len(whole), 97), len(whole) - 1}:
            path.write_bytes(whole[:size])
            self.refused(path)

    def test_flipped_anywhere(self, path: Path) -> None:
        whole = path.read_bytes()
        for place in {*range(120), *range(0, len(whole), 31)}:
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            self.refused(path)

    def test_longer(self, path: Path) -> None:
        path.write_bytes(path.read_bytes() + b"\0")
        self.refused(path)

    def test_foreign(self, path: Path) -> None:
        frame("a").write_ipc(path)
        self.refused(path)
        path.write_text("{}")
        self.refused(path)
        path.unlink()
        path.mkdir()
        self.refused(path)

    def test_one_bad_job_among_good_ones_is_named(self, path: Path) -> None:
        spool = Spool(path.parent)
        spool.write_keys(TWO, frame("z"))
        path.write_bytes(b"")
        with pytest.raises(CacheCorrupt, match=ONE):
            spool.keys([TWO, ONE])
        assert spool.keys([TWO]).height == 1


class TestRequests:
    def test_chunks_are_streamed_and_counted(self, spool: Spool) -> None:
        assert spool.write_requests(ONE, (f"{n}\n".encode() for n in range(3))) == 6
        assert spool.requests_path(ONE).read_bytes() == b"0\n1\n2\n"
        assert spool.write_requests(TWO, []) == 0
        assert spool.requests_path(TWO).read_bytes() == b""

    def test_a_source_that_fails_leaves_nothing(self, spool: Spool) -> None:
        def chunks() -> Iterator[bytes]:
            yield b"first"
            raise RuntimeError

        with pytest.raises(RuntimeError):
            spool.write_requests(ONE, chunks())
        assert not spool.requests_path(ONE).exists()
        assert spool.leftovers([], idle=0) == []

    def test_a_full_disk_is_a_cache_error(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "256k"):
            spool = Spool(tmp_path / "disk" / "spool")
            with pytest.raises(CacheError, match="Hint: free space"):
                spool.write_requests(ONE, (bytes(10_000) for _ in range(100)))
            with pytest.raises(CacheError, match="Hint: free space"):
                spool.write_keys(ONE, frame(*map(str, range(20_000))))
            assert spool.leftovers([], idle=0) == []

    def test_a_read_only_disk_is_a_cache_error(self, tmp_path: Path) -> None:
        with mounted(tmp_path / "disk", "1m"):
            spool = Spool(tmp_path / "disk" / "spool")
            spool.write_keys(ONE, frame("a"))
            make_read_only(tmp_path / "disk")
            with pytest.raises(CacheError, match="POLARS_LLM_CACHE_DIR"):
                spool.write_keys(TWO, frame("a"))
            with pytest.raises(CacheError, match="Read-only"):
                spool.remove(ONE)
            assert spool.keys([ONE]).height == 1


class TestRemoval:
    def test_all_files_of_the_job_and_no_others(self, spool: Spool) -> None:
        longer = ONE + "0"
        for job in (ONE, TWO, longer):
            spool.write_keys(job, frame(job))
            spool.write_requests(job, [b"x"])
            spool.download_path(job, "results.jsonl").write_bytes(b"x")
            spool.key_prefixes([job])
        spool.remove(ONE)
        assert spool.leftovers([], idle=0) == sorted([longer, TWO])
        assert not spool.requests_path(ONE).exists()
        assert not spool.download_path(ONE, "results.jsonl").exists()
        for read in (spool.keys, spool.key_prefixes):
            with pytest.raises(CacheCorrupt):
                read([ONE])
            assert read([TWO, longer]).height == 2
        spool.remove(ONE)

    def test_nothing_there_is_fine(self, spool: Spool, tmp_path: Path) -> None:
        spool.remove(ONE)
        assert spool.leftovers([]) == []
        assert not list(tmp_path.iterdir())

    def test_what_another_process_removed_is_forgotten(self, spool: Spool, tmp_path: Path) -> None:
        spool.write_keys(ONE, frame("a"))
        spool.key_prefixes([ONE])
        Spool(tmp_path / "spool").remove(ONE)
        assert spool.key_prefixes([]).is_empty()
        with pytest.raises(CacheCorrupt):
            spool.key_prefixes([ONE])

    def test_leftovers_are_what_is_not_open(self, spool: Spool) -> None:
        for job in (ONE, TWO):
            spool.write_requests(job, [b"x"])
        assert spool.leftovers([ONE, TWO], idle=0) == []
        assert spool.leftovers([ONE], idle=0) == [TWO]

    def test_files_that_a_claim_is_just_writing_are_no_leftovers(self, spool: Spool) -> None:
        spool.write_keys(ONE, frame("a"))
        spool.write_requests(ONE, [b"x"])
        assert spool.leftovers([]) == []
        hours_ago = time.time() - 7200
        for path in spool.requests_path(ONE).parent.iterdir():
            assert spool.leftovers([]) == []
            os.utime(path, (hours_ago, hours_ago))
        assert spool.leftovers([]) == [ONE]

    @pytest.mark.crash
    def test_what_a_killed_process_was_writing_is_found_and_removed(
        self, spool: Spool, tmp_path: Path
    ) -> None:
        with Child(_WRITES_FOREVER, tmp_path / "spool", ONE) as child:
            assert child.line() == "begun"
            child.kill()
        (half,) = (tmp_path / "spool").iterdir()
        assert half.stat().st_size > 0
        assert half != spool.requests_path(ONE)
        assert spool.leftovers([], idle=0) == [ONE]
        spool.remove(ONE)
        assert not half.exists()

    @pytest.mark.parametrize("job", ["", ".", "..", "../x", "a/b", "a.b", "a\0", "ü", "a\n"])
    def test_ids_that_lead_elsewhere_are_refused(self, spool: Spool, job: str) -> None:
        with pytest.raises(ValueError, match="not a job"):
            spool.download_path(job, "results.jsonl")

    @pytest.mark.parametrize("name", ["", "a/b", "../x", "a\0", "a\n"])
    def test_names_that_lead_elsewhere_are_refused(self, spool: Spool, name: str) -> None:
        with pytest.raises(ValueError, match="not a job"):
            spool.download_path(ONE, name)


_WRITES_FOREVER = """
import sys
from pathlib import Path
from polars_llm.store.spool import Spool

def chunks():
    while True:
        yield bytes(100_000)
        print("begun", flush=True)
        input()

Spool(Path(sys.argv[1])).write_requests(sys.argv[2], chunks())
"""
