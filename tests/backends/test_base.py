"""The table of errors: what passes by itself, what is the account's, what may have worked."""

from __future__ import annotations

import pytest

from polars_llm.backends.base import CallFailed, Verdict, retrying, verdict
from polars_llm.errors import AccountError, ProviderError


@pytest.mark.parametrize("status", [408, 409, 425, 429, 499, 500, 502, 503, 504, 529, None])
def test_transient(status: int | None) -> None:
    assert verdict(status).transient


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 410, 413, 422])
def test_permanent(status: int) -> None:
    assert not verdict(status).transient


@pytest.mark.parametrize("status", [401, 402, 403])
def test_account(status: int) -> None:
    assert verdict(status).account


@pytest.mark.parametrize(
    "kind", ["insufficient_quota", "model_not_found", "invalid_api_key", "billing_error"]
)
@pytest.mark.parametrize("status", [400, 404, 429, 500])
def test_the_accounts_own_codes_win_over_the_status(kind: str, status: int) -> None:
    assert verdict(status, kind=kind) == Verdict(transient=False, account=True, uncertain=False)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422, 425, 429])
def test_certainly_not_created(status: int) -> None:
    assert not verdict(status).uncertain


@pytest.mark.parametrize("status", [408, 409, 499, 500, 502, 503, 504, 529, None])
def test_may_have_been_created(status: int | None) -> None:
    assert verdict(status).uncertain


def test_no_connection_means_not_created() -> None:
    assert verdict(None, connected=False) == Verdict(transient=True, account=False, uncertain=False)


def test_public_error_says_what_happened_to_the_money() -> None:
    for doing in ("creating the batch", "looking at job_0", "cancelling job_0"):
        account = CallFailed("no such key", provider="openai", status=401).public(doing)
        assert isinstance(account, AccountError)
        # It must be true of a job that goes on as well.
        assert "no batch that runs; what was sent before is still there" in str(account)
    other = CallFailed("down", provider="openai", status=503).public("looking")
    assert type(other) is ProviderError
    assert other.status == 503


def test_retrying_goes_on_through_transient_failures_and_obeys_retry_after() -> None:
    left = [CallFailed("busy", status=429, retry_after=0.0), CallFailed("down", status=503, retry_after=0.0)]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    assert retrying(call) == "done"
    assert left == []


def test_retrying_stops_at_what_will_not_pass() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise CallFailed("bad", status=400)

    with pytest.raises(CallFailed):
        retrying(call)
    assert len(calls) == 1


def test_retrying_is_bounded() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise CallFailed("busy", status=429, retry_after=0.0)

    with pytest.raises(CallFailed):
        retrying(call)
    assert len(calls) == 5
