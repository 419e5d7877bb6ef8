"""Addresses and secrets."""

from __future__ import annotations

import pytest

from polars_llm.backends.hosts import normalise_base_url, redact
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


@pytest.mark.parametrize("address", ["host/v1", "ftp://host", "https://", "file:///tmp"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequest):
        normalise_base_url(address, own=OWN)


def test_secrets_leave_messages() -> None:
    text = redact("key sk-abcDEF123456 and my-secret are wrong", ["my-secret", None])
    assert "abcDEF" not in text
    assert "my-secret" not in text
