"""SharedResults: the contract on a mounted directory and on S3, and what several hosts see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from polars_llm.store.place import Place
from polars_llm.store.shared import SharedResults
from tests.s3 import ObjectStore
from tests.store.results_contract import ResultStoreContract


class TestMounted(ResultStoreContract):
    def open(self, path: Path) -> SharedResults:
        # Each object is a host with a disk of its own.
        self.hosts = getattr(self, "hosts", 0) + 1
        return SharedResults(Place(path), path.parent / f"host {self.hosts}")


class TestOneHost(ResultStoreContract):
    def open(self, path: Path) -> SharedResults:
        return SharedResults(Place(path), path.parent / "host")


@pytest.fixture(scope="module")
def bucket() -> Iterator[ObjectStore]:
    with ObjectStore.running() as store:
        yield store


class TestS3(ResultStoreContract):
    @pytest.fixture(autouse=True)
    def begin(self, bucket: ObjectStore) -> None:
        bucket.make_bucket()
        self.bucket = bucket

    def open(self, path: Path) -> SharedResults:
        self.hosts = getattr(self, "hosts", 0) + 1
        return SharedResults(Place(self.bucket.url), path.parent / f"host {self.hosts}")
