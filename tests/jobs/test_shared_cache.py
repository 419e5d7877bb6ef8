"""Hosts that share the results, or results and ledger: what is paid, and when nothing may be sent."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import cli, testing
from polars_llm.errors import CacheError, CacheUnsafe, InvalidRequest, JobsPending
from polars_llm.jobs import evaluate
from polars_llm.jobs.claim import batches
from polars_llm.store import directory, place, shared
from tests.conftest import MODEL
from tests.s3 import ObjectStore
from tests.store.child import Child

FRAME = pl.DataFrame({"prompt": [f"prompt {n}" for n in range(20)]})
ANSWERS = FRAME["prompt"].to_list()

HOST = """
import sys, socket
import polars as pl
import polars_llm as pllm
frame = pl.DataFrame({"prompt": [f"prompt {n}" for n in range(20)]})
print(socket.gethostname(), flush=True)
sys.stdin.readline()
try:
    answers = frame.llm.generate("prompt", model=sys.argv[1], on_pending=sys.argv[2])
    print("|".join(answers["response"]), flush=True)
except pllm.JobsPending:
    print("pending", flush=True)
"""


@pytest.fixture(params=["mount", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "mount":
        return str(tmp_path / "mount")
    return str(request.getfixturevalue("bucket").url)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "_PATIENCE_S", 0.5)
    monkeypatch.setattr(shared, "_LAG_S", 0.5)


def ask(results: str, ledger: Path, **options: Any) -> list[str | None]:
    with pllm.Config(cache_dir=results, ledger_dir=ledger):
        return FRAME.llm.generate("prompt", model=MODEL, **options)["response"].to_list()


class Host(Child):
    """A process on a host of that name: a UTS namespace of its own, where the machine allows one."""

    def __init__(self, name: str, results: str, ledger: Path, *, wait: bool = True) -> None:
        own = ["env", f"POLARS_LLM_CACHE_DIR={results}", f"POLARS_LLM_LEDGER_DIR={ledger}"]
        super().__init__(HOST, MODEL, "wait" if wait else "raise", before=[*_named(name), *own])
        self.name = self.line()


def _named(name: str) -> list[str]:
    own = ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', name]
    works = (
        shutil.which("unshare")
        and not subprocess.run([*own, "true"], capture_output=True, check=False).returncode
    )
    return own if works else []


# --- both are shared -------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait", [True, False])
def test_hosts_that_share_ledger_and_results_never_pay_twice(
    provider: testing.Provider, tmp_path: Path, address: str, wait: bool
) -> None:
    names = ["alpha", "beta", "gamma"]
    hosts = [Host(name, address, tmp_path / "ledger", wait=wait) for name in names]
    for each in hosts:
        each.go_on()
    said = [each.line() for each in hosts]
    for each in hosts:
        each.process.wait(timeout=30)
        each.__exit__(None, None, None)
    if wait:
        assert said == ["|".join(ANSWERS)] * 3
    if _named("x"):
        assert [each.name for each in hosts] == names
    assert ask(address, tmp_path / "ledger", on_pending="wait") == ANSWERS
    assert provider.bill().billed == len(ANSWERS)
    assert provider.bill().duplicates == {}
    assert len(provider.batches()) == 1


# --- only the results are shared -------------------------------------------------------------------------


def test_what_one_host_has_stored_another_never_pays(
    provider: testing.Provider, tmp_path: Path, address: str
) -> None:
    assert ask(address, tmp_path / "one", on_pending="wait") == ANSWERS
    sent = len(provider.log())
    with Host("beta", address, tmp_path / "two") as other:
        other.go_on()
        assert other.line() == "|".join(ANSWERS)
    assert len(provider.log()) == sent
    assert provider.bill().billed == len(ANSWERS)


def test_what_is_stored_while_another_plans_is_not_paid_again(
    provider: testing.Provider, tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim looks at the results once more, in its transaction."""

    def pack(*given: Any, **options: Any) -> Any:
        monkeypatch.setattr(evaluate, "batches", batches)
        jobs = list(batches(*given, **options))
        with Host("beta", address, tmp_path / "two") as other:
            other.go_on()
            assert other.line() == "|".join(ANSWERS)
        return iter(jobs)

    monkeypatch.setattr(evaluate, "batches", pack)
    assert ask(address, tmp_path / "one", on_pending="wait") == ANSWERS
    assert provider.bill().billed == len(ANSWERS)


def test_what_both_ask_before_it_is_answered_both_pay_and_agree_on(tmp_path: Path, address: str) -> None:
    asked = iter(range(1000))
    with testing.provider(model=lambda request: f"{request.prompt}, time {next(asked)}") as provider:
        with pytest.raises(JobsPending):
            ask(address, tmp_path / "one")
        with Host("beta", address, tmp_path / "two") as other:
            other.go_on()
            second = other.line().split("|")
        assert ask(address, tmp_path / "one", on_pending="wait") == second
        assert provider.bill().billed == 2 * len(ANSWERS)
        assert ask(address, tmp_path / "three") == second
        assert provider.bill().billed == 2 * len(ANSWERS)


# --- the store fails -------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_reached_sends_nothing(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    bucket.fail(status=403)
    with pytest.raises(CacheError, match="Nothing was sent"):
        ask(bucket.url, tmp_path / "one", on_pending="wait")
    assert provider.log() == []


def test_a_store_that_cannot_be_written_sends_nothing(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    bucket.fail("put", status=403)
    with pytest.raises(CacheError, match="ACCESS_DENIED"):
        ask(bucket.url, tmp_path / "one", on_pending="wait")
    assert provider.log() == []


def test_a_bucket_that_is_not_there_sends_nothing(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match="NO_SUCH_BUCKET"):
        ask(bucket.url.replace(bucket.bucket, "no-such-bucket"), tmp_path / "one", on_pending="wait")
    assert provider.log() == []


def test_answers_are_stored_before_the_job_is_closed(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(JobsPending):
        ask(bucket.url, tmp_path / "one")
    bucket.fail("put", status=403)
    with pytest.raises(CacheError, match="not stored yet"):
        ask(bucket.url, tmp_path / "one")
    bucket.calm()
    with pllm.Config(cache_dir=bucket.url, ledger_dir=tmp_path / "one"):
        assert pllm.jobs(open_only=True)["state"].to_list() == ["ended"]
    assert ask(bucket.url, tmp_path / "one") == ANSWERS
    assert ask(bucket.url, tmp_path / "two") == ANSWERS
    assert provider.bill().billed == len(ANSWERS)


def test_realtime_answers_outlive_an_outage_of_the_store(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    ask(bucket.url, tmp_path / "one", mode="realtime", on_pending="wait")
    more = pl.DataFrame({"prompt": ["another"]})
    bucket.fail("put", status=403)
    with pllm.Config(cache_dir=bucket.url, ledger_dir=tmp_path / "one"):
        with pytest.raises(CacheError, match="not stored yet"):
            more.llm.generate("prompt", model=MODEL, mode="realtime")
        bucket.calm()
        assert more.llm.generate("prompt", model=MODEL)["response"].to_list() == ["another"]
    assert provider.bill().billed == len(ANSWERS) + 1


# --- what is refused -------------------------------------------------------------------------------------


def test_a_network_mount_needs_a_ledger_on_a_local_disk(
    provider: testing.Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    monkeypatch.setattr(directory, "file_system", lambda path: "nfs4" if "mount" in path.parts else "ext4")
    with pllm.Config(cache_dir=mount), pytest.raises(CacheUnsafe, match=r"(?s)nfs4.*ledger_dir.*both pay"):
        FRAME.llm.generate("prompt", model=MODEL)
    with pytest.raises(CacheUnsafe, match=r"(?s)nfs4.*ledger_dir"):
        ask(str(mount), mount / "ledger")
    assert provider.log() == []
    assert ask(str(mount), tmp_path / "ledger", on_pending="wait") == ANSWERS


def test_a_place_that_was_used_and_is_empty_is_not_mounted(
    quick: None, provider: testing.Provider, tmp_path: Path
) -> None:
    mount = tmp_path / "mount"
    assert ask(str(mount), tmp_path / "ledger", on_pending="wait") == ANSWERS
    billed = provider.bill().billed
    shutil.rmtree(mount)
    mount.mkdir()
    with pytest.raises(CacheError, match="not mounted"):
        ask(str(mount), tmp_path / "ledger")
    with pllm.Config(cache_dir=mount, ledger_dir=tmp_path / "ledger"):
        with pytest.raises(CacheError, match="not mounted"):
            pl.DataFrame({"prompt": ["new"]}).llm.generate("prompt", model=MODEL)
    assert provider.bill().billed == billed


def test_a_ledger_is_not_a_cache_and_a_cache_is_not_a_ledger(
    provider: testing.Provider, tmp_path: Path
) -> None:
    assert ask(str(tmp_path / "mount"), tmp_path / "ledger", on_pending="wait") == ANSWERS
    with pllm.Config(cache_dir=tmp_path / "ledger"), pytest.raises(CacheError, match="is the ledger of"):
        FRAME.llm.generate("prompt", model=MODEL)
    with pytest.raises(CacheError, match="belongs to"):
        ask(str(tmp_path / "elsewhere"), tmp_path / "ledger")
    with pllm.Config(cache_dir=tmp_path / "ordinary"):
        FRAME.llm.generate("prompt", model=MODEL, on_pending="wait", sample=1)
    with pytest.raises(CacheError, match=r"(?s)was a cache of its own.*copy"):
        ask(str(tmp_path / "mount 2"), tmp_path / "ordinary")


def test_one_directory_for_results_and_ledger_is_refused(provider: testing.Provider, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    for ledger in ["cache", "link"]:
        with pytest.raises(CacheError, match="the same directory"):
            ask(str(tmp_path / "cache"), tmp_path / ledger)
    assert provider.log() == []


def test_a_cache_with_jobs_does_not_become_shared_by_a_ledger_beside_it(
    provider: testing.Provider, tmp_path: Path
) -> None:
    with pllm.Config(cache_dir=tmp_path / "cache"), pytest.raises(JobsPending):
        FRAME.llm.generate("prompt", model=MODEL)
    with pytest.raises(
        CacheError, match=r"(?s)open jobs would.*leave ledger_dir out.*cache_dir to DIRECTORY"
    ):
        ask(str(tmp_path / "cache"), tmp_path / "ledger")
    # What the hint says.
    (tmp_path / "new" / "results").mkdir(parents=True)
    assert ask(str(tmp_path / "new"), tmp_path / "cache", on_pending="wait") == ANSWERS
    assert provider.bill().duplicates == {}


def test_a_shared_place_without_a_ledger_beside_it_is_not_a_cache(
    provider: testing.Provider, tmp_path: Path
) -> None:
    with pytest.raises(JobsPending):
        ask(str(tmp_path / "mount"), tmp_path / "ledger")
    with pllm.Config(cache_dir=tmp_path / "mount"), pytest.raises(CacheError, match=r"(?s)share.*ledger_dir"):
        FRAME.llm.generate("prompt", model=MODEL)
    assert ask(str(tmp_path / "mount"), tmp_path / "ledger", on_pending="wait") == ANSWERS
    assert provider.bill().duplicates == {}


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAXX:sesame@bucket/p",
        "s3://sesame@bucket/p",
        "s3://bucket/p?secret_key=sesame",
        "s3://bucket/p?sesame",
        "s3://bucket/p?endpoint_override=http://me:sesame@host",
        "s3://bucket/p#sesame",
        "abfss://container:sesame@account.dfs.core.windows.net/p",
        "az://container/p?sv=1&sig=sesame",
        "https://sesame.example/p",
    ],
)
def test_urls_with_secrets_are_refused_and_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest) as raised:
        pllm.Config(cache_dir=url)
    assert "sesame" not in str(raised.value)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", url)
    with pytest.raises(InvalidRequest) as raised:
        FRAME.llm.generate("prompt", model=MODEL)
    assert "sesame" not in str(raised.value)


def test_half_a_url_is_not_a_directory() -> None:
    with pytest.raises(InvalidRequest, match="as text"):
        pllm.Config(cache_dir=Path("s3://bucket/prefix"))
    with pytest.raises(InvalidRequest, match="ledger_dir is a URL"):
        pllm.Config(ledger_dir="s3://bucket/prefix")
    for text in ["s3:bucket/prefix", "S3:/bucket", "gs:bucket"]:
        with pytest.raises(InvalidRequest, match="is no URL"):
            pllm.Config(cache_dir=text)


@pytest.mark.parametrize("prefix", ["./p", "a/../p", "a/.", "..", "%2E%2E/p", "a//p"])
def test_a_prefix_that_is_written_elsewhere_than_listed_is_refused(prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="write the prefix out"):
        pllm.Config(cache_dir=f"s3://bucket/{prefix}")


@pytest.mark.parametrize("url", [" s3://bucket/p", "s3://bucket/p\n", "s3://bucket/a b", "s3://bucket/ä"])
def test_a_blank_makes_no_directory_of_a_url(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="%20"):
        pllm.Config(cache_dir=url)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", url)
    with pytest.raises(InvalidRequest, match="%20"):
        pllm.jobs()


def test_a_name_in_percent_is_one_place(
    provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    address = bucket.url.replace("some", "%C3%A4%20b")
    for host in ("one", "two"):
        assert ask(address, tmp_path / host, on_pending="wait") == ANSWERS
    assert provider.bill().billed == len(ANSWERS)


def test_jobs_are_shown_while_the_store_cannot_be_reached(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    with pytest.raises(JobsPending):
        ask(bucket.url, tmp_path / "one")
    bucket.fail()
    with pllm.Config(cache_dir=bucket.url, ledger_dir=tmp_path / "one"):
        with pytest.warns(pllm.LLMWarning, match="cannot be listed"):
            jobs = pllm.jobs()
        assert jobs.select("state", "requests", "cost_usd").rows() == [("submitted", len(ANSWERS), None)]
        bucket.calm()
        assert pllm.jobs().drop("age").equals(jobs.drop("age"))


def test_a_place_whose_list_does_not_show_what_is_in_it_sends_nothing(
    quick: None, provider: testing.Provider, bucket: ObjectStore, tmp_path: Path
) -> None:
    """Answers that no list shows would be paid again by each evaluation."""
    bucket.hide("layout")
    with pytest.raises(CacheUnsafe, match="not listed"):
        ask(bucket.url, tmp_path / "one")
    assert provider.log() == []


# --- everything else works with it -----------------------------------------------------------------------


def test_the_ledger_of_a_url_is_under_the_platforms_cache_directory(
    provider: testing.Provider, bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", bucket.url)
    FRAME.llm.generate("prompt", model=MODEL, on_pending="wait")
    [ledger] = (tmp_path / "home" / "polars_llm_ledgers").iterdir()
    assert (ledger / "jobs" / "cache.db").exists()
    assert FRAME.llm.generate("prompt", model=MODEL)["response"].to_list() == ANSWERS


def test_two_spellings_of_an_address_have_one_ledger(
    provider: testing.Provider, bucket: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is in flight would be paid twice."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    plain, host = bucket.url.partition("?")[0], bucket.address.removeprefix("http://")
    spelled = [
        bucket.url,
        f"{bucket.url}/",
        f"{bucket.url}&region=eu-west-1",
        f"{plain}/?scheme=http&endpoint_override={host}",
        plain.replace("s3://", "S3A://"),
    ]
    provider.fault("batch-seconds", seconds=600)
    for url in spelled:
        with monkeypatch.context() as context, pllm.Config(cache_dir=url):
            if "?" not in url:
                context.setenv("AWS_ENDPOINT_URL", f"{bucket.address}/")
            assert FRAME.llm.estimate("prompt", model=MODEL)["to_send"].to_list() == [
                len(ANSWERS) if url == bucket.url else 0
            ]
            with pytest.raises(JobsPending):
                FRAME.llm.generate("prompt", model=MODEL)
    assert len(provider.batches()) == 1
    assert len(list((tmp_path / "home" / "polars_llm_ledgers").iterdir())) == 1


def test_operating_on_a_shared_cache(
    provider: testing.Provider, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pllm.Config(cache_dir=address, ledger_dir=tmp_path / "one"):
        before = FRAME.llm.estimate("prompt", model=MODEL)
        assert before["to_send"].to_list() == [len(ANSWERS)]
        with pytest.raises(JobsPending):
            FRAME.llm.generate("prompt", model=MODEL)
    given = ["--cache-dir", address, "--ledger-dir", str(tmp_path / "one")]
    pllm.Config.restore_defaults()
    assert cli.main(["watch", *given]) == 0
    assert cli.main(["results", *given, "--json", "--limit", "100"]) == 0
    assert capsys.readouterr().out.count('"status":"done"') == len(ANSWERS)
    pllm.Config.restore_defaults()
    with pllm.Config(cache_dir=address, ledger_dir=tmp_path / "two"):
        assert pllm.jobs().is_empty()
        assert pllm.results().collect().height == len(ANSWERS)
        assert FRAME.llm.estimate("prompt", model=MODEL)["cached"].to_list() == [len(ANSWERS)]
        assert set(pllm.recover("openai")["answers"]) == {0}
        lazy = FRAME.lazy().llm.generate("prompt", model=MODEL).filter(pl.col("prompt") == "prompt 7")
        assert lazy.collect()["response"].to_list() == ["prompt 7"]


def test_recover_fills_a_place_that_was_lost(provider: testing.Provider, tmp_path: Path) -> None:
    mount, ledger = tmp_path / "mount", tmp_path / "ledger"
    assert ask(str(mount), ledger, on_pending="wait") == ANSWERS
    shutil.rmtree(mount)
    shutil.rmtree(ledger)
    with Child(
        "import sys, polars_llm as pllm\n"
        "pllm.Config(cache_dir=sys.argv[1], ledger_dir=sys.argv[2])\n"
        "print(pllm.recover('openai')['answers'].sum(), flush=True)",
        mount,
        ledger,
    ) as child:
        assert child.line() == str(len(ANSWERS))
    assert ask(str(mount), tmp_path / "other") == ANSWERS
    assert provider.bill().billed == len(ANSWERS)
