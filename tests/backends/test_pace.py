"""Limits as hosts tell them, and the breaker: pure, with a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polars_llm.backends.clients import retry_after
from polars_llm.backends.pace import Breaker, Pace, allowances, backoff


def told(limit: float, remaining: float, reset: str = "", name: str = "requests") -> dict[str, str]:
    return {
        f"x-ratelimit-limit-{name}": str(limit),
        f"x-ratelimit-remaining-{name}": str(remaining),
        f"x-ratelimit-reset-{name}": reset,
    }


@pytest.mark.parametrize(
    ("reset", "per_second"),
    [("6ms", 1 / 0.006), ("1s", 1.0), ("7m12s", 1 / 432), ("2m59.5s", 1 / 179.5), ("1h", 1 / 3600)],
)
def test_the_reset_tells_how_fast_a_limit_comes_back(reset: str, per_second: float) -> None:
    found = allowances(told(200, 199, reset))["requests"]
    assert found.per_second == pytest.approx(per_second)
    assert (found.limit, found.remaining) == (200, 199)


@pytest.mark.parametrize("reset", ["", "0s", "soon", "-3"])
def test_without_a_usable_reset_a_limit_is_a_minutes(reset: str) -> None:
    assert allowances(told(600, 599, reset))["requests"].per_second == 10


def test_anthropics_limits_are_read() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2026-11-21T10:00:01Z",
        "anthropic-ratelimit-input-tokens-limit": "30000",
        "anthropic-ratelimit-input-tokens-remaining": "29000",
        "anthropic-ratelimit-output-tokens-limit": "8000",
        "anthropic-ratelimit-output-tokens-remaining": "0",
    }
    found = allowances(headers)
    assert {name: (a.remaining, a.per_second) for name, a in found.items()} == {
        "requests": (49, 50 / 60),
        "input-tokens": (29000, 500),
        "output-tokens": (0, 8000 / 60),
    }


@given(st.dictionaries(st.sampled_from(sorted(told(1, 1, "1s"))), st.text(max_size=8)))
def test_whatever_a_proxy_writes_is_no_error(headers: dict[str, str]) -> None:
    for found in allowances(headers).values():
        assert found.limit > 0
        assert found.per_second > 0
        assert 0 <= found.remaining <= found.limit


def run(pace: Pace, seconds: float, *, start: float = 0.0, size: int = 40) -> int:
    """Requests that go in so many seconds, each answered at once."""
    now, count = start, 0
    while now < start + seconds:
        amounts = pace.amounts(size)
        wait = pace.wait(amounts, now)
        if wait > 0:
            now += max(wait, 1e-6)
            continue
        pace.sent(amounts)
        pace.landed(amounts, {}, now)
        count += 1
        if count > 10_000:
            break
    return count


def test_no_limit_is_known_before_the_first_reply() -> None:
    assert run(Pace(4), 1.0) > 10_000


def test_a_limit_of_requests_is_kept() -> None:
    pace = Pace(4)
    pace.landed(pace.amounts(0), allowances(told(60, 5, "55s")), 0.0)
    assert run(pace, 10.0) in {14, 15}  # five at once, then one a second


def test_a_limit_of_tokens_is_kept() -> None:
    pace = Pace(4)
    pace.landed(pace.amounts(0), allowances(told(600, 0, "60s", "tokens")), 0.0)
    assert run(pace, 10.0, size=40) in {9, 10}  # ten tokens each, ten tokens a second


def test_what_is_in_flight_is_not_spent_twice() -> None:
    pace = Pace(100)
    for _ in range(10):
        pace.sent(pace.amounts(40))
    pace.landed(pace.amounts(40), allowances(told(60, 12, "48s")), 0.0)
    assert run(pace, 0.5) == 3  # nine of the twelve are on their way


def test_a_request_larger_than_the_limit_goes_when_the_bucket_is_full() -> None:
    pace = Pace(4)
    pace.landed(pace.amounts(0), allowances(told(100, 50, "30s", "tokens")), 0.0)
    amounts = pace.amounts(40_000)
    assert 0 < pace.wait(amounts, 0.0) <= 31
    assert pace.wait(amounts, 31.0) == 0


def test_width_halves_once_for_all_that_was_in_flight_and_grows_back() -> None:
    pace = Pace(8)
    for _ in range(8):
        pace.brake(1.0, None, 2.0)
    pace.taken(None)
    sent = 0
    while pace.wait(pace.amounts(0), 1000.0) == 0:
        pace.sent(pace.amounts(0))
        sent += 1
    assert sent == 5
    for _ in range(200):
        pace.taken(None)
    while pace.wait(pace.amounts(0), 1000.0) == 0:
        pace.sent(pace.amounts(0))
        sent += 1
    assert sent == 8


def test_a_pause_that_the_host_asks_for_is_kept() -> None:
    pace = Pace(8)
    pace.brake(0.0, 7.0, 1.0)
    assert pace.wait(pace.amounts(0), 1.0) == pytest.approx(7.0)
    assert pace.wait(pace.amounts(0), 8.0) == 0


@pytest.mark.parametrize("asked", [None, 0.0, -5.0])
def test_a_pause_of_nothing_is_no_pause(asked: float | None) -> None:
    pace = Pace(8)
    pace.brake(0.0, asked, 1.0)
    assert 0.5 <= pace.wait(pace.amounts(0), 1.0) <= 1.0


def test_the_breaker_opens_at_more_than_half_and_closes_with_one_success() -> None:
    breaker = Breaker()
    assert not any(breaker.bad(False, 0.0) for _ in range(4))
    assert breaker.bad(False, 0.0)
    assert 0 < breaker.wait(0.0) <= 1
    assert breaker.wait(2.0) == 0
    trying = breaker.sent()
    assert trying
    assert breaker.wait(2.0) > 0  # one at a time
    breaker.bad(trying, 2.0)
    assert breaker.wait(2.5) > 0
    trying = breaker.sent()
    breaker.good(trying)
    assert not breaker.is_open
    assert breaker.wait(3.0) == 0
    assert not breaker.sent()


@given(st.lists(st.booleans(), max_size=200).filter(lambda o: sum(o) >= len(o) / 2))
def test_some_failures_are_no_reason_to_stop(outcomes: list[bool]) -> None:
    # However they come, in an order in which never more than half of the last ones fail.
    breaker = Breaker()
    for ok in sorted(outcomes)[::-1][: len(outcomes) // 2]:
        breaker.good(False)
        if not ok:
            assert not breaker.bad(False, 0.0)


def test_an_older_success_does_not_close_it() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.bad(False, 0.0)
    breaker.good(False)
    assert breaker.is_open


@given(st.integers(0, 10_000))
def test_backoff_doubles_up_to_its_longest(number: int) -> None:
    assert 0.5 <= backoff(number) <= 60
    assert backoff(0) <= 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        (
            {"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"},
            30,
        ),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
