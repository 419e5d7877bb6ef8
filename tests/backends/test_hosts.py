"""Hosts, addresses and secrets."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

import polars_llm as pllm
from polars_llm import testing
from polars_llm.backends.base import Limits
from polars_llm.backends.hosts import HOSTS, Host, host_of, normalise_base_url, redact
from polars_llm.backends.options import Options
from polars_llm.errors import InvalidRequest

OWN = "https://api.openai.com/v1"


@pytest.mark.parametrize(
    "address", [None, "", OWN, OWN + "/", "HTTPS://API.OpenAI.com:443/v1", OWN + "?key=s3cret"]
)
def test_the_providers_own_host_is_none(address: str | None) -> None:
    assert normalise_base_url(address, own=OWN) is None


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("http://user:s3cret@Host:8000/v1/?key=s3cret#x", "http://host:8000/v1"),
        ("https://host:443/v1", "https://host/v1"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("https://host/V1", "https://host/V1"),
    ],
)
def test_other_hosts_lose_secrets_and_spelling(address: str, name: str) -> None:
    assert normalise_base_url(address, own=OWN) == name


@pytest.mark.parametrize(
    "address",
    [
        "host/v1",
        "ftp://host",
        "https://",
        "file:///tmp",
        "http://host:99999/v1",
        "http://host:x",
        "http://[::1",
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest):
        normalise_base_url(address, own=OWN)


def test_secrets_leave_messages() -> None:
    text = redact("key sk-abcDEF123456 and my-secret are wrong", ["my-secret", None])
    assert "abcDEF" not in text
    assert "my-secret" not in text


# --- the table of hosts


@pytest.mark.parametrize(
    ("address", "name"),
    [
        (None, "openai"),
        ("https://res.openai.azure.com/openai/v1", "azure"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("https://api.deepinfra.com/v1/openai", "deepinfra"),
        ("https://api.doubleword.ai/v1", "doubleword"),
        ("http://localhost:11434/v1", "ollama"),
        ("http://localhost:8000/v1", "other"),
        ("https://api.groq.com.example.org/v1", "other"),
        ("https://notapi.groq.com/v1", "other"),
    ],
)
def test_a_host_is_told_by_its_address(address: str | None, name: str) -> None:
    assert host_of(address).name == name


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_every_host_is_told_by_its_name(host: Host) -> None:
    made = pllm.OpenAI("m", base_url="http://localhost:1/v1", host=host.name, api_key="x")
    live = made.backend("realtime")
    assert live.mode == "realtime"
    assert (live.batch is None) == (not host.batch_endpoints)
    if host.batch_endpoints:
        assert made.backend().limits == Limits(requests=host.requests, size_bytes=host.size_bytes)
    else:
        with pytest.raises(InvalidRequest, match="has no batches") as caught:
            made.backend()
        assert "mode='realtime'" in str(caught.value)
    assert host.limit_field in made.backend("realtime").header(Options(max_tokens=5)).body


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'ollama'"):
        pllm.OpenAI("m", host="olama")


def test_a_host_without_batches_says_so_before_anything_is_sent() -> None:
    frame = pl.DataFrame({"prompt": ["x"]})
    with pytest.raises(InvalidRequest, match="Ollama has no batches"):
        frame.llm.generate("prompt", model=pllm.OpenAI("m", base_url="http://localhost:11434/v1"))


def test_a_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    with testing.provider(set_env=False) as provider:
        model = pllm.OpenAI("m", base_url=provider.openai_base_url, host="vllm")
        frame = pl.DataFrame({"prompt": ["[[say:yes]]"]})
        assert frame.llm.generate("prompt", model=model, mode="realtime")["response"].to_list() == ["yes"]
        assert provider.exchanges()[0]["headers"]["authorization"] == "Bearer unused"


def test_an_unknown_host_without_batches_is_told_of_realtime() -> None:
    with testing.provider() as provider:
        provider.fault("status", operation="files.create", status=404)
        frame = pl.DataFrame({"prompt": ["x"]})
        with pytest.raises(pllm.ProviderError, match="mode='realtime'"):
            frame.llm.generate("prompt", model="openai/m")


def test_the_window_that_a_host_offers_is_asked_for() -> None:
    with testing.provider() as provider:
        model = pllm.OpenAI("m", base_url=provider.openai_base_url, host="groq")
        with pytest.raises(pllm.JobsPending):
            pl.DataFrame({"prompt": ["x"]}).llm.generate("prompt", model=model)
        made = next(e for e in provider.exchanges() if e["operation"] == "batches.create")
        assert '"completion_window":"24h"' in made["body"]


def test_the_docs_show_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text()
    assert hosts_table() in text, f"docs/hosts.md should hold:\n{hosts_table()}"


def hosts_table() -> str:
    """The table of hosts as the docs show it."""
    lines = [
        "| host | `host=` | told by | batches | requests, MB a batch | windows | `max_tokens` is sent as |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for host in HOSTS:
        told = [*(f"`{d}`" for d in host.domains), *(f"port {p}" for p in host.ports)]
        batches = ", ".join(e.removeprefix("/v1/") for e in host.batch_endpoints)
        size = f"{host.requests:,}, {host.size_bytes // 1_000_000}" if batches else ""
        windows = ", ".join(host.windows) if batches else ""
        cells = [host.title, f"`{host.name}`", ", ".join(told), batches or "no: realtime only", size]
        lines.append(f"| {' | '.join([*cells, windows, f'`{host.limit_field}`'])} |")
    return "\n".join(lines)
