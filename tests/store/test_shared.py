"""SharedResults: the contract on a mounted directory and on S3, and what several hosts see."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from polars_llm.answer import ANSWER_SCHEMA, FAILED, RETRY
from polars_llm.errors import CacheCorrupt, CacheError
from polars_llm.store import place, shared
from polars_llm.store.place import Place
from polars_llm.store.results import ParquetResults
from polars_llm.store.shared import SharedResults
from tests.s3 import ObjectStore
from tests.store.child import Child
from tests.store.results_contract import ResultStoreContract, answers, keys


class TestHostsOnAMount(ResultStoreContract):
    """Each object is a host with a disk of its own."""

    def open(self, path: Path) -> SharedResults:
        self.hosts = getattr(self, "hosts", 0) + 1
        return SharedResults(Place(path), path.parent / f"host {self.hosts}")


class TestProcessesOfOneHost(ResultStoreContract):
    def open(self, path: Path) -> SharedResults:
        return SharedResults(Place(path), path.parent / "host")


class TestHostsOnS3(ResultStoreContract):
    @pytest.fixture(autouse=True)
    def begin(self, bucket: ObjectStore) -> None:
        self.bucket = bucket

    def open(self, path: Path) -> SharedResults:
        self.hosts = getattr(self, "hosts", 0) + 1
        return SharedResults(Place(self.bucket.url), path.parent / f"host {self.hosts}")


@pytest.fixture
def mount(tmp_path: Path) -> Path:
    return tmp_path / "mount"


@pytest.fixture(params=["mount", "s3"])
def address(request: pytest.FixtureRequest, mount: Path) -> str:
    return str(mount) if request.param == "mount" else request.getfixturevalue("bucket").url


@pytest.fixture
def hosts(address: str, tmp_path: Path) -> tuple[SharedResults, SharedResults]:
    return host(address, tmp_path / "one"), host(address, tmp_path / "two")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has minutes here: what is merged goes at once, a place that fails is soon given up."""
    monkeypatch.setattr(shared, "_GRACE_S", 0.0)
    monkeypatch.setattr(shared, "_LAG_S", 1.0)
    monkeypatch.setattr(place, "_PATIENCE_S", 0.5)


def host(address: str, disk: Path) -> SharedResults:
    return SharedResults(Place(address if "://" in address else Path(address)), disk)


def read(store: SharedResults | ParquetResults, numbers: Any, column: str = "text") -> list[Any]:
    return store.read(store.find(keys(numbers)), [column])[column].to_list()


def add_each(store: SharedResults, numbers: range, mark: str = "") -> None:
    for number in numbers:
        store.add(answers([number], text=f"{mark}{number}"))


def files(address: str) -> set[str]:
    return {name for name in Place(address if "://" in address else Path(address)).listed() if "-" in name}


# --- the format ----------------------------------------------------------------------------------------


def test_polars_reads_the_place_without_us(hosts: Any, address: str, bucket: ObjectStore) -> None:
    hosts[0].add(answers([1, 2], text=["one", "two"], vector=[[1.0], None]))
    hosts[1].add(answers([1], text="again"))
    url, _, _ = address.partition("?")
    options = {"aws_endpoint_url": bucket.address, "aws_allow_http": "true", "aws_region": "us-east-1"}
    plain = pl.scan_parquet(f"{url}/results/*.parquet", storage_options=options if "://" in address else None)
    assert plain.collect_schema() == ANSWER_SCHEMA
    assert plain.sort("text").collect()["text"].to_list() == ["again", "one", "two"]


def test_an_ordinary_cache_becomes_a_shared_one_by_copying_and_back(mount: Path, tmp_path: Path) -> None:
    ordinary = ParquetResults(tmp_path / "ordinary")
    for number in range(20):
        ordinary.add(answers([number], text=str(number)))
    ordinary.compact()
    shutil.copytree(tmp_path / "ordinary", mount / "results")
    together = host(str(mount), tmp_path / "host")
    assert read(together, range(20)) == [str(n) for n in range(20)]
    add_each(together, range(20, 40))
    together.compact()
    back = ParquetResults(mount / "results")
    assert read(back, range(40)) == [str(n) for n in range(40)]
    back.compact()
    assert read(ParquetResults(mount / "results"), range(40)) == [str(n) for n in range(40)]


def test_only_the_row_groups_that_are_hit_are_fetched(
    bucket: ObjectStore, hosts: tuple[SharedResults, SharedResults], address: str, mount: Path
) -> None:
    if "://" not in address:
        pytest.skip("requests are counted at the object store")
    many = 60_000
    hosts[0].add(answers(range(many), text=[f"{n} {'x' * 50}" for n in range(many)]))
    found = hosts[1].find(keys([17]))
    bucket.sent = 0
    assert hosts[1].read(found, ["text"])["text"].to_list() == ["17 " + "x" * 50]
    size = sum(item.size for item in Place(address).listed().values())
    assert 0 < bucket.sent < size / 4


# --- several hosts -------------------------------------------------------------------------------------


def test_the_first_success_wins_on_every_host_also_after_merges(quick: None, hosts: Any) -> None:
    one, two = hosts
    one.add(answers([1], state=RETRY, text="no"))
    two.add(answers([1], text="first"))
    one.add(answers([1], text="second"))
    two.add(answers([2], state=FAILED, text="failed"))
    one.add(answers([2], text="mended"))
    for round_ in range(4):
        add_each(hosts[round_ % 2], range(10 * round_ + 10, 10 * round_ + 20))
        hosts[round_ % 2].compact()
        for each in hosts:
            assert read(each, [1, 2]) == ["first", "mended"]
    fresh = SharedResults(one._place, one._local.parent / "three")
    assert read(fresh, [1, 2]) == ["first", "mended"]
    assert_frame_equal(fresh.scan().collect(), one.scan().collect())


def test_hosts_that_merge_the_same_segments_lose_nothing(quick: None, hosts: Any, address: str) -> None:
    """Each sees a listing in which the other's merged segments are not yet shown."""
    one, two = hosts
    add_each(one, range(12))
    one.find(keys([0])), two.find(keys([0]))
    views = one._refresh_now(), two._refresh_now()
    assert one._merge(views[0], one._due(views[0]))
    add_each(two, range(12, 14))
    assert two._merge(two._refresh_now(), two._due(views[1])[:9])
    for each in (one, two, one, two):
        each.compact()
    assert read(one, range(14)) == read(two, range(14)) == [str(n) for n in range(14)]
    assert len(files(address)) < 14
    third = SharedResults(one._place, one._local.parent / "three")
    assert read(third, range(14)) == [str(n) for n in range(14)]
    assert third.scan().collect().height == 14


def test_of_two_with_the_same_parts_only_one_may_go() -> None:
    same = {"b": shared._File(1, ((1, 1), (2, 1))), "a": shared._File(1, ((2, 1), (1, 1)))}
    more = {"c": shared._File(1, ((1, 1), (2, 1), (3, 1))), "d": shared._File(1, ((3, 0),))}
    assert shared._covered(same) == {"b": "a"}
    assert shared._covered(same | more) == {"a": "c", "b": "a", "d": "c"}
    overlapping = {"x": shared._File(1, ((1, 1), (2, 1))), "y": shared._File(1, ((2, 1), (3, 1)))}
    assert shared._covered(overlapping) == {}


def test_merged_segments_stay_beside_the_old_ones_for_a_while(hosts: Any, address: str) -> None:
    add_each(hosts[0], range(10))
    hosts[0].compact()
    hosts[0].compact()
    assert len(files(address)) == 11


def test_many_small_segments_become_few(quick: None, hosts: Any, address: str) -> None:
    add_each(hosts[0], range(40))
    for _ in range(3):
        hosts[0].compact()
    assert len(files(address)) < 8
    assert read(hosts[1], range(40)) == [str(n) for n in range(40)]


def test_a_clock_that_is_behind_does_not_make_an_answer_the_first(
    hosts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts[0].add(answers([1], text="first"))
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    hosts[1].add(answers([1], text="second"))
    assert read(hosts[0], [1]) == read(hosts[1], [1]) == ["first"]


# --- what is read once -----------------------------------------------------------------------------------


def test_a_new_process_does_not_read_again_what_the_index_has(
    bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = host(bucket.url, tmp_path / "one")
    monkeypatch.setattr(shared, "_UNSAVED_FILES", 1)
    monkeypatch.setattr(shared, "_GRACE_S", 0.0)
    add_each(store, range(10))
    store.compact()
    store.find(keys([0]))
    bucket.log.clear()
    again = host(bucket.url, tmp_path / "one")
    assert again.find(keys(range(10)))["state"].null_count() == 0
    assert [operation for operation, _ in bucket.log] == ["list"]
    assert read(again, range(10)) == [str(n) for n in range(10)]


@pytest.mark.parametrize("harm", ["gone", "cut", "noise"])
def test_the_index_is_only_a_cache(hosts: Any, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr(shared, "_UNSAVED_FILES", 1)
    one, _ = hosts
    add_each(one, range(3))
    one.find(keys([0]))
    index = one._local / "keys.index"
    data = index.read_bytes()
    index.unlink()
    if harm != "gone":
        index.write_bytes(data[: len(data) // 2] if harm == "cut" else b"noise\n")
    again = SharedResults(one._place, one._local)
    assert read(again, range(4)) == ["0", "1", "2", None]


# --- lists that lag ------------------------------------------------------------------------------------


def test_what_was_merged_away_is_read_when_the_list_shows_where_to(
    quick: None, bucket: ObjectStore, tmp_path: Path
) -> None:
    """The old ones are gone, and the list does not show the merged one: it is waited for."""
    one, two = host(bucket.url, tmp_path / "one"), host(bucket.url, tmp_path / "two")
    add_each(one, range(10))
    found = two.find(keys(range(10)))
    one.compact()
    one.compact()
    bucket.hide(r"-\w{8}-\w{8}\.parquet")
    assert two.find(keys(range(10)))["state"].null_count() == 0
    bucket.call("list", bucket.calm, times=1, after=True)
    assert two.read(found, ["text"])["text"].to_list() == [str(n) for n in range(10)]


def test_a_list_that_shows_what_is_gone_is_not_believed(
    quick: None, bucket: ObjectStore, tmp_path: Path
) -> None:
    one, two, three = (host(bucket.url, tmp_path / name) for name in ("one", "two", "three"))
    add_each(one, range(10))
    found = two.find(keys(range(10)))
    bucket.show_removed()
    one.compact()
    one.compact()
    assert two.read(found, ["text"])["text"].to_list() == [str(n) for n in range(10)]
    with pytest.raises(CacheError, match=r"is listed in .* and is not there"):
        three.find(keys([1]))
    bucket.calm()
    assert read(three, range(10)) == [str(n) for n in range(10)]


def test_what_was_removed_is_never_taken_for_unanswered(quick: None, hosts: Any, address: str) -> None:
    one, two = hosts
    add_each(one, range(3))
    assert two.find(keys(range(3)))["state"].to_list() == [0, 0, 0]
    there = Place(address if "://" in address else Path(address))
    for name in files(address):
        there.remove(name)
    assert two.find(keys(range(3)))["state"].to_list() == [0, 0, 0]
    with pytest.raises(CacheCorrupt, match="not there any more"):
        two.read(two.find(keys(range(3))), ["text"])


# --- damage --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [True, False], ids=["indexed before", "new to the host"])
def test_a_damaged_segment_is_said_and_blocks(hosts: Any, address: str, mount: Path, seen: bool) -> None:
    if "://" in address:
        pytest.skip("objects are not changed in place")
    one, two = hosts
    one.add(answers(range(1000), text=[f"text {n} {n * 7919}" for n in range(1000)]))
    if seen:
        found = two.find(keys(range(1000)))
    [file] = (mount / "results").glob("*.parquet")
    data = file.read_bytes()
    for place_ in range(100, len(data) // 2, 997):
        data = data[:place_] + bytes([data[place_] ^ 1]) + data[place_ + 1 :]
    file.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="damaged"):
        two.read(found, ["text"]) if seen else two.find(keys([1]))


def test_a_cut_segment_is_said(hosts: Any, address: str, mount: Path) -> None:
    if "://" in address:
        pytest.skip("objects are not changed in place")
    hosts[0].add(answers(range(1000)))
    [file] = (mount / "results").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CacheCorrupt, match="damaged"):
        hosts[1].find(keys([1]))


# --- the store fails -----------------------------------------------------------------------------------


def test_passing_failures_are_not_seen(bucket: ObjectStore, tmp_path: Path) -> None:
    store = host(bucket.url, tmp_path / "one")
    for operation in ("list", "put", "get"):
        bucket.fail(operation, times=1)  # type: ignore[arg-type]
    store.add(answers([1], text="one"))
    assert read(store, [1]) == ["one"]


@pytest.mark.parametrize("operation", ["list", "get"])
def test_a_store_that_cannot_be_read_is_an_error(
    quick: None, bucket: ObjectStore, tmp_path: Path, operation: Any
) -> None:
    host(bucket.url, tmp_path / "one").add(answers([1], text="one"))
    bucket.fail(operation)
    with pytest.raises(CacheError, match=r"(?s)cannot be .*Nothing was sent") as raised:
        host(bucket.url, tmp_path / "two").find(keys([1]))
    assert "hunter2" not in str(raised.value)


def test_no_permission_is_said_at_once(bucket: ObjectStore, tmp_path: Path) -> None:
    bucket.fail("list", status=403)
    began = time.monotonic()
    with pytest.raises(CacheError, match="ACCESS_DENIED"):
        host(bucket.url, tmp_path / "one").find(keys([1]))
    assert time.monotonic() - began < 5


def test_answers_that_cannot_be_stored_wait_on_the_local_disk(
    quick: None, bucket: ObjectStore, tmp_path: Path
) -> None:
    store = host(bucket.url, tmp_path / "one")
    bucket.fail("put", status=403)
    with pytest.raises(CacheError, match=r"(?s)not stored yet.*they are safe in"):
        store.add(answers([1], text="one"))
    bucket.calm()
    # Not before: who looks sends them first, whatever process it is.
    assert files(bucket.url) == set()
    assert read(host(bucket.url, tmp_path / "one"), [1]) == ["one"]
    assert read(host(bucket.url, tmp_path / "two"), [1]) == ["one"]
    assert not list((tmp_path / "one" / "outbox").iterdir())


def test_an_upload_that_breaks_off_is_never_visible(quick: None, bucket: ObjectStore, tmp_path: Path) -> None:
    """Larger than one part: the second part never arrives."""
    import random

    store = host(bucket.url, tmp_path / "one")
    body = random.Random(1).randbytes(15 << 20)
    bucket.fail_parts(2)
    with pytest.raises(CacheError, match="not stored yet"):
        store.add(answers([1], body=body))
    assert files(bucket.url) == set()
    assert ("complete", bucket.log[-1][1]) not in bucket.log
    bucket.calm()
    assert read(store, [1], "body") == [body]


# --- kill -9 -------------------------------------------------------------------------------------------

LIFE = """
import sys
from pathlib import Path
from polars_llm.store import shared
from polars_llm.store.place import Place
from tests.store.results_contract import answers, keys
shared._GRACE_S = 0.0
shared._UNSAVED_FILES = 3
address = sys.argv[1]
store = shared.SharedResults(Place(address if "://" in address else Path(address)), Path(sys.argv[2]))
for number in range(10):
    if store.find(keys([number]))["state"][0] is None:
        print("paid", number, flush=True)
        store.add(answers([number], text=str(number)))
        print("stored", number, flush=True)
store.compact()
store.compact()
print("end", flush=True)
"""


def live(url: str, disk: Path) -> list[str]:
    with Child(LIFE, url, disk) as child:
        assert child.process.stdout is not None
        return child.process.stdout.read().splitlines()


@pytest.mark.crash
@pytest.mark.timeout(600)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_kill_at_every_request(bucket: ObjectStore, tmp_path: Path, after: bool) -> None:
    """Dead at each write to the place, and at some reads: what was stored is there, nothing is half there."""
    live(bucket.url, tmp_path / "whole")
    log = [operation for operation, _ in bucket.log]
    cases = [("put", n) for n in range(log.count("put"))] + [("delete", n) for n in range(3)]
    cases += [("list", 3), ("get", 2)]
    assert log.count("put") >= 11
    assert log.count("delete") >= 10
    for number, (operation, count) in enumerate(cases):
        bucket.make_bucket()
        disk = tmp_path / f"host {number}"
        with Child(LIFE, bucket.url, disk) as child:
            bucket.call(operation, child.process.kill, skip=count, after=after)
            assert child.process.stdout is not None
            said = child.process.stdout.read().splitlines()
        assert "end" not in said, (operation, count)
        bucket.calm()
        stored = [int(line.split()[1]) for line in said if line.startswith("stored")]
        paid = [int(line.split()[1]) for line in said if line.startswith("paid")]
        other = host(bucket.url, tmp_path / f"other {number}")
        assert other.find(keys(stored))["state"].null_count() == 0
        again = live(bucket.url, disk)
        assert again[-1] == "end"
        repaid = {int(line.split()[1]) for line in again if line.startswith("paid")} & set(paid)
        # In the outbox before it travels: even what was on its way is not asked again.
        assert repaid <= set(paid) - set(stored)
        if operation == "put":
            assert repaid == set()
        assert read(other, range(10)) == [str(n) for n in range(10)]
        assert other.scan().collect().height == 10
