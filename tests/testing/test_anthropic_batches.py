"""Anthropic's message batches, through the real SDK."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

from polars_llm.testing import Provider, provider

from .conftest import ask, asks, raises, results

bad_request = raises(anthropic.BadRequestError)
not_found = raises(anthropic.NotFoundError)


def submit(client: anthropic.Anthropic, requests: list[Any], **options: Any) -> Any:
    return client.messages.batches.create(requests=requests, **options)


def test_a_batch_from_requests_to_results(p: Provider, ant: anthropic.Anthropic) -> None:
    batch = submit(ant, asks(4))
    assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 4)
    assert batch.results_url is None
    done = ant.messages.batches.retrieve(batch.id)
    assert (done.processing_status, done.request_counts.succeeded) == ("ended", 4)
    found = results(ant, batch.id)
    assert found.keys() == {"r0", "r1", "r2", "r3"}
    message = found["r2"].message
    assert message.content[0].text == "The sea is wide and blue."
    assert (message.stop_reason, message.usage.service_tier) == ("end_turn", "batch")
    bill = p.bill()
    assert bill.by_custom_id == dict.fromkeys(found, 1)
    assert bill.output_tokens == sum(r.message.usage.output_tokens for r in found.values())


def test_results_are_never_in_the_order_of_the_requests(ant: anthropic.Anthropic) -> None:
    batch = submit(ant, [*asks(2), ask("bad", "[[fail:400]]"), ask("late", "[[expire]]")])
    ant.messages.batches.retrieve(batch.id)
    order = [line.custom_id for line in ant.messages.batches.results(batch.id)]
    assert order == ["late", "bad", "r1", "r0"]


@pytest.mark.parametrize("name", ["", "a" * 65, "with space", "dot.", "é"])
def test_custom_ids_have_a_form(p: Provider, ant: anthropic.Anthropic, name: str) -> None:
    error = bad_request(lambda: submit(ant, [ask(name, "Hello.")]))
    assert error.type == "invalid_request_error"
    assert "custom_id" in str(error)
    assert p.bill().batches == 0


def test_custom_ids_are_unique(ant: anthropic.Anthropic) -> None:
    assert "not unique" in str(bad_request(lambda: submit(ant, [*asks(2), *asks(1)])))


def test_a_batch_needs_requests(ant: anthropic.Anthropic) -> None:
    bad_request(lambda: submit(ant, []))
    bad_request(lambda: submit(ant, [{"custom_id": "a"}]))
    bad_request(lambda: submit(ant, [{"custom_id": "a", "params": [1]}]))


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": None},
        {"max_tokens": 0},
        {"temperature": 0.5},
        {"top_p": 1},
        {"stream": True},
        {"messages": []},
        {"messages": [{"role": "system", "content": "x"}]},
        {"output_format": {"type": "json_schema", "schema": {}}},
    ],
)
def test_a_bad_request_fails_alone_and_only_at_the_end(
    p: Provider, ant: anthropic.Anthropic, change: dict[str, Any]
) -> None:
    bad = ask("bad", "Hello.", **change)
    if change == {"max_tokens": None}:
        del bad["params"]["max_tokens"]
    batch = submit(ant, [*asks(1), bad])
    counts = ant.messages.batches.retrieve(batch.id).request_counts
    assert (counts.succeeded, counts.errored) == (1, 1)
    error = results(ant, batch.id)["bad"].error
    assert error.error.type == "invalid_request_error"
    assert error.request_id
    assert p.bill().by_custom_id == {"r0": 1}


def test_sampling_parameters_go_with_the_old_version(ant: anthropic.Anthropic) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    batch = submit(ant, [ask("a", "Hello.", temperature=0.5)], extra_headers=headers)
    assert ant.messages.batches.retrieve(batch.id).request_counts.succeeded == 1


def test_a_version_is_needed(ant: anthropic.Anthropic) -> None:
    headers: Any = {"anthropic-version": anthropic.Omit()}
    error = bad_request(lambda: ant.messages.batches.list(extra_headers=headers))
    assert "anthropic-version" in str(error)
    headers = {"anthropic-version": "1999-01-01"}
    bad_request(lambda: ant.messages.batches.list(extra_headers=headers))


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_a_key_is_needed_in_either_header(ant: anthropic.Anthropic, header: str) -> None:
    value = "sk-1" if header == "x-api-key" else "Bearer sk-1"
    only: Any = {"authorization": anthropic.Omit(), header: value}
    assert list(ant.messages.batches.list(extra_headers=only)) == []
    none: Any = {"authorization": anthropic.Omit()}
    unauthenticated = raises(anthropic.AuthenticationError)
    error = unauthenticated(lambda: ant.messages.batches.list(extra_headers=none))
    assert error.type == "authentication_error"
    assert error.request_id is not None


def test_limits_are_enforced() -> None:
    limits = {"anthropic_requests": 3, "anthropic_bytes": 5_000, "anthropic_queue": 4}
    too_large = raises(anthropic.RequestTooLargeError)
    with (
        provider(limits=limits, auto=False) as p,
        anthropic.Anthropic(max_retries=0) as ant,
    ):
        too_large(lambda: submit(ant, asks(4)))
        too_large(lambda: submit(ant, [ask("a", "x" * 6_000)]))
        submit(ant, asks(3))
        error = raises(anthropic.RateLimitError)(lambda: submit(ant, asks(2)))
        assert error.response.headers["retry-after"] == "60"
        p.finish()
        submit(ant, asks(2))
        assert p.bill().batches == 2


def test_lists_are_paged_newest_first_both_ways(ant: anthropic.Anthropic) -> None:
    made = [submit(ant, asks(1)).id for _ in range(5)][::-1]
    assert [batch.id for batch in ant.messages.batches.list(limit=2)] == made
    page = ant.messages.batches.list(limit=2, before_id=made[4])
    assert [batch.id for batch in page.data] == made[2:4]
    assert page.has_more
    page = ant.messages.batches.list(limit=2, after_id=made[2])
    assert [batch.id for batch in page.data] == made[3:]
    assert not page.has_more


def test_a_cancelled_batch_keeps_what_was_answered() -> None:
    with provider(auto=False) as p, anthropic.Anthropic(max_retries=0) as ant:
        batch = submit(ant, asks(10))
        p.fault("cancel", operation="messages.batches.cancel", fraction=0.4)
        assert ant.messages.batches.cancel(batch.id).processing_status == "canceling"
        assert ant.messages.batches.retrieve(batch.id).processing_status == "canceling"
        p.advance()
        done = ant.messages.batches.retrieve(batch.id)
        assert done.processing_status == "ended"
        assert done.cancel_initiated_at is not None
        assert (done.request_counts.succeeded, done.request_counts.canceled) == (4, 6)
        kinds = [result.type for result in results(ant, batch.id).values()]
        assert (kinds.count("succeeded"), kinds.count("canceled")) == (4, 6)
        assert p.bill().billed == 4


def test_an_expired_batch_keeps_what_was_answered(p: Provider, ant: anthropic.Anthropic) -> None:
    p.fault("expire", fraction=0.25)
    batch = submit(ant, asks(8))
    counts = ant.messages.batches.retrieve(batch.id).request_counts
    assert (counts.succeeded, counts.expired) == (2, 6)
    assert p.bill().billed == 2


def test_results_need_an_end() -> None:
    with provider(auto=False) as p, anthropic.Anthropic(max_retries=0) as ant:
        batch = submit(ant, asks(1))
        raises(anthropic.AnthropicError)(lambda: ant.messages.batches.results(batch.id))
        bad_request(lambda: ant.messages.batches.delete(batch.id))
        p.finish()
        assert results(ant, batch.id).keys() == {"r0"}


def test_an_ended_batch_can_be_deleted(p: Provider, ant: anthropic.Anthropic) -> None:
    batch = submit(ant, asks(1))
    ant.messages.batches.retrieve(batch.id)
    assert ant.messages.batches.delete(batch.id).type == "message_batch_deleted"
    not_found(lambda: ant.messages.batches.retrieve(batch.id))
    assert p.bill().billed == 1


def test_models_may_be_mixed_and_unknown_ones_fail_alone() -> None:
    with provider(models=["one", "two"]), anthropic.Anthropic(max_retries=0) as ant:
        requests = [ask(name, "Hello.", model=name) for name in ("one", "two", "three")]
        batch = submit(ant, requests)
        assert ant.messages.batches.retrieve(batch.id).request_counts.succeeded == 2
        assert results(ant, batch.id)["three"].error.error.type == "not_found_error"
        assert [model.id for model in ant.models.list()] == ["one", "two"]


def test_a_cached_prefix_is_written_once_and_then_read(p: Provider, ant: anthropic.Anthropic) -> None:
    system = [{"type": "text", "text": "rule " * 100, "cache_control": {"type": "ephemeral"}}]
    batch = submit(ant, [ask(f"r{i}", f"Prompt {i}. Go.", system=system) for i in range(3)])
    ant.messages.batches.retrieve(batch.id)
    usages = [result.message.usage for result in results(ant, batch.id).values()]
    assert sorted(u.cache_creation_input_tokens for u in usages) == [0, 0, 125]
    assert sorted(u.cache_read_input_tokens for u in usages) == [0, 125, 125]
    total = sum(u.input_tokens + u.cache_creation_input_tokens + u.cache_read_input_tokens for u in usages)
    assert p.bill().input_tokens == total


def test_the_beta_namespace_works(ant: anthropic.Anthropic) -> None:
    betas = ["output-300k-2026-03-24"]
    request: Any = ask("a", "Hello.", max_tokens=250_000)
    batch = ant.beta.messages.batches.create(requests=[request], betas=betas)
    counts = ant.beta.messages.batches.retrieve(batch.id).request_counts
    assert counts.succeeded == 1
    plain = submit(ant, [request])
    assert ant.messages.batches.retrieve(plain.id).request_counts.errored == 1
