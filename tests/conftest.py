"""A cache directory and settings of its own for every test; a local provider where one is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

import polars_llm as pllm
from polars_llm import testing
from tests.s3 import ObjectStore

hypothesis_settings.register_profile(
    "default", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
hypothesis_settings.load_profile("default")

MODEL = "openai/gpt-6-luna"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test sees another's cache, settings, or a developer's keys."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("POLARS_LLM_MODEL", raising=False)
    monkeypatch.setenv("POLARS_LLM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("POLARS_LLM_LEDGER_DIR", raising=False)
    monkeypatch.setenv("POLARS_LLM_POLL_INTERVAL", "0.05")
    monkeypatch.setenv("POLARS_LLM_QUIET_PERIOD", "0.2")
    pllm.Config.restore_defaults()
    yield tmp_path / "cache"
    pllm.Config.restore_defaults()


@pytest.fixture
def provider() -> Iterator[testing.Provider]:
    """A local provider, addressed by the environment, that answers with the prompt itself.

    A batch has ended when it is first looked at.
    """
    with testing.provider(model=lambda request: request.prompt) as running:
        yield running


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    with ObjectStore.running() as store:
        yield store


@pytest.fixture
def bucket(_object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """A local object store with an empty bucket; its credentials are in the environment, as anybody's are."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-hunter2")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    _object_store.make_bucket()
    return _object_store
