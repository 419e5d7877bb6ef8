"""ParquetResults: the contract, and what lies on disk."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet
import pytest
from polars.testing import assert_frame_equal

from polars_llm.answer import ANSWER_SCHEMA, DONE, FAILED, RETRY
from polars_llm.errors import CacheCorrupt
from polars_llm.store.results import ParquetResults
from tests.store.results_contract import ResultStoreContract, answers, key, keys

ROOT = Path(__file__).parents[2]


class TestParquetResults(ResultStoreContract):
    def open(self, path: Path) -> ParquetResults:
        return ParquetResults(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture
def store(path: Path) -> ParquetResults:
    return ParquetResults(path)


def segments(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet"))


def read(store: ParquetResults, numbers: Any, column: str = "text") -> list[Any]:
    return store.read(store.find(keys(numbers)), [column])[column].to_list()


def place(path: Path, order: int, table: pl.DataFrame) -> Path:
    """A segment as another version would have written it."""
    file = io.BytesIO()
    table.write_parquet(file)
    path = path / f"{order:020d}-{zlib.crc32(file.getvalue()):08x}.parquet"
    path.write_bytes(file.getvalue())
    return path


def add_each(store: ParquetResults, numbers: range) -> None:
    for number in numbers:
        store.add(answers([number], text=str(number)))


def add_many(store: ParquetResults, count: int) -> None:
    """Enough for the index to be written."""
    store.add(answers(range(count), text=[str(n) for n in range(count)]))
    store.find(keys([0]))


# --- segments ------------------------------------------------------------------------------------------


def test_polars_reads_the_directory_without_us(store: ParquetResults, path: Path) -> None:
    store.add(answers([1, 2], text=["one", "two"]))
    store.add(answers([1], text="again"))
    (path / ".crashed.parquet.x1.tmp").write_bytes(b"half a file")
    add_many(store, 60_000)
    plain = pl.scan_parquet(path / "*.parquet")
    assert plain.collect_schema() == ANSWER_SCHEMA
    assert plain.head(3).collect()["text"].to_list() == ["one", "two", "again"]


def test_body_is_the_last_column(store: ParquetResults, path: Path) -> None:
    store.add(answers([1]))
    assert next(reversed(pl.read_parquet_schema(segments(path)[0]))) == "body"


def test_segments_are_private(store: ParquetResults, path: Path) -> None:
    store.add(answers([1]))
    assert segments(path)[0].stat().st_mode & 0o777 == 0o600
    assert path.stat().st_mode & 0o777 == 0o700


def test_columns_that_an_older_version_did_not_write_are_null(store: ParquetResults, path: Path) -> None:
    store.add(answers([1], text="new", finish_reason="stop"))
    old = answers([2], text="old").select("key", "state", "text")
    place(path, 1, old)
    assert read(store, [1, 2]) == ["new", "old"]
    assert read(store, [2, 1], "finish_reason") == [None, "stop"]
    assert store.find(keys([2]))["attempt"].to_list() == [1]
    assert store.scan().collect()["text"].to_list() == ["old", "new"]


def test_columns_that_a_newer_version_wrote_are_left_alone(store: ParquetResults, path: Path) -> None:
    add_each(store, range(10))
    newer = answers([10], text="newer").with_columns(invented=pl.lit("later"))
    place(path, 1, newer)
    store.compact()
    assert read(store, [*range(11)]) == [*(str(n) for n in range(10)), "newer"]
    assert "invented" in pl.read_parquet_schema(segments(path)[0])


def test_a_segment_under_a_name_of_ones_own_is_read_and_never_moved(
    store: ParquetResults, path: Path
) -> None:
    add_each(store, range(10))
    answers([99], text="mine").write_parquet(path / "copied.parquet")
    store.compact()
    assert read(store, [99, 3]) == ["mine", "3"]
    assert (path / "copied.parquet").exists()


def test_names_go_up_when_the_clock_goes_back(store: ParquetResults, path: Path) -> None:
    path.mkdir()
    future = place(path, 10**19, answers([1], text="first"))
    store.add(answers([1, 2], text=["second", "two"]))
    assert segments(path)[0] == future
    assert read(ParquetResults(path), [1, 2]) == ["first", "two"]


@pytest.mark.parametrize("name", ["a[1]b", "year=2026", "with *.parquet", "ümlaut \\ space"])
def test_any_name_of_a_directory_will_do(tmp_path: Path, name: str) -> None:
    store = ParquetResults(tmp_path / name)
    for number in range(10):
        store.add(answers([number], text=str(number)))
    assert read(store, range(10)) == [str(n) for n in range(10)]
    store.compact()
    assert store.scan().collect().height == 10


def test_a_directory_that_went_away_is_an_empty_store(store: ParquetResults, path: Path) -> None:
    store.add(answers([1], text="one"))
    assert read(store, [1]) == ["one"]
    segments(path)[0].unlink()
    path.rmdir()
    assert store.find(keys([1]))["state"].to_list() == [None]
    store.add(answers([1], text="again"))
    assert read(store, [1]) == ["again"]


def held(column: pl.Series) -> int:
    """Bytes that a column keeps in memory, those that it does not show included."""
    return column.to_arrow(compat_level=pl.CompatLevel.newest()).get_total_buffer_size()


@pytest.mark.parametrize(("count", "step"), [(60_000, 7), (60_000, 1000), (8_000, 3000), (60_000, 30_000)])
def test_a_few_of_many_rows_do_not_keep_the_others_in_memory(
    store: ParquetResults, count: int, step: int
) -> None:
    store.add(answers(range(count), text=[f"{n:0200}" for n in range(count)]))
    some = range(11, count, step)
    texts = store.read(store.find(keys(some)), ["text"])["text"]
    assert texts.to_list() == [f"{n:0200}" for n in some]
    assert held(texts) < 2 * len(some) * 300 + 10_000


def test_long_answers_have_fewer_rows_in_a_group(store: ParquetResults, path: Path) -> None:
    vectors = pl.int_range(3000).cast(pl.Float32).repeat_by(3072).alias("vector")
    store.add(answers(range(3000)).with_columns(vectors))
    groups = pyarrow.parquet.read_metadata(segments(path)[0])
    assert groups.row_group(0).num_rows == 1024
    assert [v[0] for v in read(store, [2999, 5, 2500], "vector")] == [2999.0, 5.0, 2500.0]


def test_rows_of_more_than_one_span(store: ParquetResults) -> None:
    count = 540_000
    rows = pl.DataFrame({"output_tokens": pl.int_range(count, eager=True)}).with_columns(
        key=pl.col("output_tokens").cast(pl.String).str.zfill(16).repeat_by(2).list.join("").cast(pl.Binary)
    )
    blank = answers([0]).drop("key", "output_tokens")
    store.add(rows.join(blank, how="cross").select(*ANSWER_SCHEMA))
    asked = rows.select(
        pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")
    ).to_series()
    for order in (slice(None), slice(None, None, -1), slice(3, None, 5), slice(None, None, -9000)):
        found = store.find(asked[order])
        read = store.read(found, ["output_tokens"])["output_tokens"]
        assert read.equals(rows["output_tokens"][order])


# --- damage ----------------------------------------------------------------------------------------------


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def _emptied(file: Path) -> None:
    file.write_bytes(b"")


def _overwritten(file: Path) -> None:
    file.write_bytes(b"this is no Parquet file, and was never one\n" * 100)


def _other_table(file: Path) -> None:
    pl.DataFrame({"a": [1, 2]}).write_parquet(file)


def _short_keys(file: Path) -> None:
    pl.read_parquet(file).with_columns(key=pl.lit(b"short")).write_parquet(file)


def _no_states(file: Path) -> None:
    pl.read_parquet(file).drop("state").write_parquet(file)


def _other_types(file: Path) -> None:
    pl.read_parquet(file).with_columns(pl.col("state").cast(pl.String)).write_parquet(file)


DAMAGE = [_cut_short, _emptied, _overwritten, _other_table, _short_keys, _no_states, _other_types]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("indexed", [False, True], ids=["small", "indexed"])
def test_a_damaged_segment_is_named_and_nothing_is_guessed(
    store: ParquetResults, path: Path, damage: Callable[[Path], None], indexed: bool
) -> None:
    add_many(store, 60_000 if indexed else 100)
    store.add(answers([-1], text="sound"))
    victim = segments(path)[0]
    before = victim.read_bytes()
    damage(victim)
    store = ParquetResults(path)
    for _ in range(2):
        with pytest.raises(CacheCorrupt, match=r"(?s)Hint: move it out.*recover") as caught:
            store.find(keys([-1]))
        assert caught.value.path == str(victim)
    assert victim.exists()
    with pytest.raises(CacheCorrupt):
        store.scan().collect()
    store.compact()
    store.add(answers([-2], text="still added"))

    victim.rename(path / "damaged")
    assert read(store, [-1, -2, 1]) == ["sound", "still added", None]
    victim.write_bytes(before)
    assert read(store, [-1, -2, 1]) == ["sound", "still added", "1"]


@pytest.mark.parametrize(
    "table",
    [
        pl.DataFrame({"a": [1, 2]}),
        answers([1]).with_columns(key=pl.lit(b"short")),
        answers([1]).with_columns(key=pl.lit(b"x" * 33)),
        answers([1], key=[None]),
        answers([1]).drop("state"),
        answers([1], state=[None]),
        answers([1], state=RETRY + 1),
        answers([1]).with_columns(pl.col("attempt").cast(pl.String)),
    ],
    ids=["other", "short key", "long key", "no key", "no states", "no state", "unknown state", "dtype"],
)
def test_a_table_of_another_kind_is_named(store: ParquetResults, path: Path, table: pl.DataFrame) -> None:
    store.add(answers([1]))
    table.write_parquet(path / "found somewhere.parquet")
    with pytest.raises(CacheCorrupt) as caught:
        store.find(keys([1]))
    assert caught.value.path == str(path / "found somewhere.parquet")


def test_a_directory_is_no_segment(store: ParquetResults, path: Path) -> None:
    store.add(answers([1], text="one"))
    (path / "old.parquet").mkdir()
    answers([2], text="two").write_parquet(path / "old.parquet" / "a.parquet")
    (path / "dangling.parquet").symlink_to(path / "nowhere")
    assert read(store, [1, 2]) == ["one", None]


def test_what_changed_under_a_known_name_is_looked_up_again(store: ParquetResults, path: Path) -> None:
    store.add(answers([0], text="ours"))
    answers([1, 2], text=["one", "two"]).write_parquet(path / "mine.parquet")
    assert read(store, [0, 1, 2]) == ["ours", "one", "two"]
    answers([3, 2, 1], text=["three", "two", "one"]).write_parquet(path / "mine.parquet")
    assert read(store, [0, 1, 2]) == ["ours", "one", "two"]


def _text_damaged(file: Path) -> None:
    texts = pyarrow.parquet.read_metadata(file).row_group(0).column(3)
    assert texts.path_in_schema == "text"
    with file.open("r+b") as open_file:
        open_file.seek(texts.data_page_offset + texts.total_compressed_size // 2)
        byte = open_file.read(1)[0]
        open_file.seek(-1, os.SEEK_CUR)
        open_file.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("indexed", [False, True], ids=["small", "indexed"])
def test_one_flipped_bit_is_noticed(store: ParquetResults, path: Path, indexed: bool) -> None:
    add_many(store, 60_000 if indexed else 1000)
    store.add(answers([-1], text="sound"))
    _text_damaged(segments(path)[0])
    with pytest.raises(CacheCorrupt, match="checksum") as caught:
        ParquetResults(path).find(keys([-1]))
    assert caught.value.path == str(segments(path)[0])


def test_a_segment_cut_short_after_it_was_seen_is_an_error(store: ParquetResults, path: Path) -> None:
    store.add(answers([1], text="one"))
    found = store.find(keys([1]))
    _cut_short(segments(path)[0])
    with pytest.raises(CacheCorrupt):
        store.read(found, ["text"])


def test_a_segment_that_was_taken_away_takes_its_answers_with_it(store: ParquetResults, path: Path) -> None:
    store.add(answers([1, 2], text=["first", "two"], attempt=[3, 1]))
    store.add(answers([1], text="hidden by the first"))
    found = store.find(keys([1, 2]))
    segments(path)[0].unlink()
    with pytest.raises(CacheCorrupt, match="1 answers were removed"):
        store.read(found, ["text"])
    assert read(store, [1, 2]) == ["hidden by the first", None]


# --- the index file ----------------------------------------------------------------------------------------


def _index(path: Path) -> Path:
    (file,) = path.glob("*.index")
    return file


def test_a_new_process_reads_the_index_instead_of_the_segments(store: ParquetResults, path: Path) -> None:
    add_many(store, 60_000)
    status = segments(path)[0].stat()
    segments(path)[0].write_bytes(b"\0" * status.st_size)  # unreadable, but nothing about it looks new
    os.utime(segments(path)[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ParquetResults(path).find(keys([59_999, 60_000]))["state"].to_list() == [DONE, None]


def test_the_index_is_extended_by_what_came_later(store: ParquetResults, path: Path) -> None:
    add_many(store, 60_000)
    store.add(answers([5, -1], text=["later", "new"]))
    assert read(ParquetResults(path), [5, -1, 6]) == ["5", "new", "6"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data.replace(b'"crc32"', b'"crc33"'),
        lambda data: b"\n" + data,
        lambda data: b"[]\n" + data.split(b"\n", 1)[1],
        lambda data: os.urandom(1000),
    ],
    ids=["empty", "half", "last byte", "head", "no head", "other head", "noise"],
)
def test_a_damaged_index_is_made_again(
    store: ParquetResults, path: Path, harm: Callable[[bytes], bytes]
) -> None:
    add_many(store, 60_000)
    sound = _index(path).read_bytes()
    _index(path).write_bytes(harm(sound))
    assert read(ParquetResults(path), [7, 59_999, -1]) == ["7", "59999", None]
    assert _index(path).read_bytes() == sound


def test_the_index_of_another_directory_is_not_believed(tmp_path: Path) -> None:
    here, there = ParquetResults(tmp_path / "here"), ParquetResults(tmp_path / "there")
    add_many(here, 60_000)
    there.add(answers(range(60_000), text="there", state=FAILED))
    _index(tmp_path / "here").rename(tmp_path / "there" / "keys.index")
    assert there.find(keys([1]))["state"].to_list() == [FAILED]
    assert read(there, [1]) == ["there"]


def test_an_index_that_lost_its_segments_to_a_merge_is_still_right(store: ParquetResults, path: Path) -> None:
    add_many(store, 60_000)
    index = _index(path).read_bytes()
    add_each(store, range(-200, 0))
    store.compact()
    store.find(keys([1]))
    _index(path).write_bytes(index)
    assert read(ParquetResults(path), [5, -7, 60_000]) == ["5", "-7", None]


def test_a_directory_that_cannot_be_written_is_read(store: ParquetResults, path: Path) -> None:
    add_many(store, 60_000)
    add_each(store, range(-10, 0))
    _index(path).unlink()
    script = """
import os, sys
from pathlib import Path
import polars as pl
from polars_llm.store.results import ParquetResults
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    open("probe", "w")
except PermissionError:
    pass
else:
    raise SystemExit("the directory can be written")
store = ParquetResults(Path("."))
everything = store.scan().select("key", "text").collect()
prefix = pl.col("key").bin.slice(0, 16).bin.reinterpret(dtype=pl.UInt128, endianness="big")
found = store.find(everything.select(prefix).to_series())
assert store.read(found, ["key", "text"]).equals(everything)
store.compact()
print(everything.height)
"""
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    try:
        done = run(script, str(path))
    finally:
        path.chmod(0o700)
    assert done.stdout == "60010\n", done.stderr


# --- merging ---------------------------------------------------------------------------------------------


def test_small_segments_become_few(store: ParquetResults, path: Path) -> None:
    for number in range(120):
        store.add(answers([number], text=str(number)))
        store.compact()
        assert len(segments(path)) <= 10
    assert read(store, range(120)) == [str(n) for n in range(120)]


def test_nothing_is_done_when_there_is_nothing_to_do(store: ParquetResults, path: Path) -> None:
    add_each(store, range(3))
    before = sorted(p.name for p in path.iterdir())
    store.compact()
    assert sorted(p.name for p in path.iterdir()) == before


@pytest.mark.parametrize("left", [20, 3, 1])
def test_a_merge_that_died_before_it_removed_the_old_segments(
    store: ParquetResults, path: Path, left: int
) -> None:
    for number in range(20):
        store.add(answers([number, 5], text=str(number), attempt=number + 1, state=[DONE, RETRY]))
    old = {file: file.read_bytes() for file in segments(path)}
    before = store.find(keys(range(20))).select("key", "state", "attempt"), store.scan().collect()
    store.compact()
    assert len(segments(path)) == 1
    for file, data in list(old.items())[:left]:
        file.write_bytes(data)
    for each in (store, ParquetResults(path)):
        assert_frame_equal(each.find(keys(range(20))).select("key", "state", "attempt"), before[0])
        assert_frame_equal(each.scan().collect(), before[1])
    ParquetResults(path).compact()
    assert len(segments(path)) == 1
    assert_frame_equal(store.scan().collect(), before[1])


def test_what_a_damaged_merge_replaced_is_not_removed(store: ParquetResults, path: Path) -> None:
    store.add(answers([0], text="0"))
    (first,) = segments(path)
    data = first.read_bytes()
    add_each(store, range(1, 9))
    store.compact()
    (merged,) = segments(path)
    first.write_bytes(data)
    _text_damaged(merged)
    ParquetResults(path).compact()
    assert segments(path) == [merged, first]


def test_a_merge_keeps_the_written_order(store: ParquetResults, path: Path) -> None:
    store.add(answers(range(70_000), text="big and first"))
    for number in range(20):
        store.add(answers([number, 100_000 + number], text=str(number)))
    other = ParquetResults(path)
    other.compact()
    store.add(answers([100_000], text="too late"))
    for each in (store, other, ParquetResults(path)):
        assert read(each, [3, 100_000, 100_019]) == ["big and first", "0", "19"]


def test_two_who_merge_at_once(store: ParquetResults, path: Path) -> None:
    add_each(store, range(60))
    others = [ParquetResults(path) for _ in range(4)]
    threads = [threading.Thread(target=other.compact) for other in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(segments(path)) < 60
    assert store.scan().collect()["text"].to_list() == [str(n) for n in range(60)]


@pytest.mark.parametrize("damage", [_cut_short, _text_damaged])
def test_a_damaged_segment_is_not_merged_and_stops_nothing(
    store: ParquetResults, path: Path, damage: Callable[[Path], None]
) -> None:
    add_each(store, range(12))
    damage(segments(path)[4])
    store.compact()
    assert len(segments(path)) == 12


def test_a_listing_during_which_segments_were_merged_is_made_again(
    store: ParquetResults, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long directory is read in pieces: the merged one came behind the cursor, the others went before."""
    add_each(store, range(12))
    listings = 0

    class Torn:
        def __init__(self, directory: Path) -> None:
            self._entries: list[os.DirEntry[str]] = []

        def __enter__(self) -> list[os.DirEntry[str]]:
            nonlocal listings
            listings += 1
            ParquetResults(path).compact()
            return self._entries

        def __exit__(self, *_: object) -> None: ...

    scandir = os.scandir
    reader = ParquetResults(path)

    calls = 0

    def torn_once(directory: Path) -> Any:
        nonlocal calls
        calls += 1
        if calls < 2:  # a first look only tells that there is something new
            return scandir(directory)
        monkeypatch.setattr(os, "scandir", scandir)
        return Torn(directory)

    monkeypatch.setattr(os, "scandir", torn_once)
    assert read(reader, range(12)) == [str(n) for n in range(12)]
    assert listings == 1
    assert len(segments(path)) < 12


# --- processes ----------------------------------------------------------------------------------------


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


WRITER = """
import sys
from pathlib import Path
from polars_llm.store.results import ParquetResults
from tests.store.results_contract import answers
store = ParquetResults(Path(sys.argv[1]))
for number in range(int(sys.argv[2]), 10**6, 10):
    store.add(answers(range(number, number + 10), text=[str(n) for n in range(number, number + 10)]))
    print(number, flush=True)
    if "compact" in sys.argv:
        store.compact()
"""


def start(path: Path, first: int, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(first), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_reader_sees_what_other_processes_add_and_merge(store: ParquetResults, path: Path) -> None:
    writers = [start(path, 0, "compact"), start(path, 500_000, "compact")]
    try:
        acknowledged: list[int] = []
        for _ in range(60):
            for writer in writers:
                assert writer.stdout is not None
                first = int(writer.stdout.readline())
                acknowledged += range(first, first + 10)
            found = store.find(keys(acknowledged))
            assert found["state"].null_count() == 0
            assert store.read(found, ["text"])["text"].to_list() == [str(n) for n in acknowledged]
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


@pytest.mark.crash
def test_what_was_acknowledged_survives_kill_9(path: Path) -> None:
    acknowledged: list[int] = []
    for life in range(3):
        writer = start(path, life * 100_000, "compact")
        assert writer.stdout is not None
        lines = [writer.stdout.readline() for _ in range(30 + 7 * life)]
        writer.kill()
        lines += writer.communicate()[0].splitlines()
        acknowledged += [int(line) + n for line in lines if line.strip() for n in range(10)]
        store = ParquetResults(path)
        assert read(store, acknowledged) == [str(n) for n in acknowledged]
        rows = store.scan().select("key", "text").collect()
        assert rows["key"].is_unique().all()
        assert rows["key"].to_list() == [key(int(text)) for text in rows["text"]]


# --- inside Polars ------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["in-memory", "streaming"])
def test_threads_of_polars_may_ask_while_segments_come_and_go(
    store: ParquetResults, path: Path, engine: Any
) -> None:
    count = 24
    add_each(store, range(count))
    other = ParquetResults(path)

    def look_up(column: pl.Series) -> pl.Series:
        other.add(answers([int(column[0])], text="late", state=FAILED))
        other.compact()
        return store.read(store.find(keys(column.to_list())), ["text"]).to_series()

    numbers = pl.LazyFrame({"n": range(count)})
    columns = [
        pl.col("n")
        .slice(i, 1)
        .map_batches(look_up, return_dtype=pl.String, is_elementwise=bool(i % 2))
        .alias(str(i))
        for i in range(count)
    ]
    assert numbers.select(columns).collect(engine=engine).row(0) == tuple(str(n) for n in range(count))


def test_a_query_over_scan_may_ask_again(store: ParquetResults) -> None:
    add_each(store, range(20))

    def look_up(column: pl.Series) -> pl.Series:
        return store.read(store.find(keys(map(int, column))), ["text"]).to_series()

    seen = store.scan().select("text", again=pl.col("text").map_batches(look_up, return_dtype=pl.String))
    for engine in ("in-memory", "streaming"):
        rows = seen.collect(engine=engine)
        assert rows["again"].to_list() == rows["text"].to_list()


def test_it_can_be_pickled(store: ParquetResults) -> None:
    import pickle

    add_each(store, range(3))
    assert read(pickle.loads(pickle.dumps(store)), [2, 0]) == ["2", "0"]
