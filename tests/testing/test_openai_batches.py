"""OpenAI's files and batches, through the real SDK."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import openai
import pytest

from polars_llm.testing import Provider, provider

from .conftest import CHAT, by_id, chat_line, chats, raises, rows, submit, upload

bad_request = raises(openai.BadRequestError)
not_found = raises(openai.NotFoundError)
conflict = raises(openai.ConflictError)


def test_a_batch_from_file_to_answers(p: Provider, oai: openai.OpenAI) -> None:
    batch = submit(oai, chats(5), metadata={"job": "J1"})
    assert (batch.status, batch.metadata) == ("validating", {"job": "J1"})
    done = oai.batches.retrieve(batch.id)
    assert done.status == "completed"
    assert done.error_file_id is None
    assert (done.request_counts.total, done.request_counts.completed) == (5, 5)
    lines = by_id(rows(oai, done.output_file_id))
    assert lines.keys() == {f"r{i}" for i in range(5)}
    completion = lines["r3"]["response"]["body"]
    assert completion["choices"][0]["message"]["content"] == "The sea is wide and blue."
    assert done.usage.output_tokens == sum(
        line["response"]["body"]["usage"]["completion_tokens"] for line in lines.values()
    )


def test_the_bill_counts_each_request_once(p: Provider, oai: openai.OpenAI) -> None:
    batch = submit(oai, [*chats(3), chat_line("bad", "[[fail:400]]")])
    bill = p.bill()
    assert bill.by_custom_id == {"r0": 1, "r1": 1, "r2": 1}
    assert (bill.billed, bill.accepted, bill.free) == (3, 4, 1)
    assert (bill.batches, bill.files, bill.realtime) == (1, 1, 0)
    assert not bill.duplicates
    usage = oai.batches.retrieve(batch.id).usage
    assert usage is not None
    assert (bill.input_tokens, bill.output_tokens) == (usage.input_tokens, usage.output_tokens)
    expected = (usage.input_tokens * 1e-6 + usage.output_tokens * 4e-6) / 2
    assert bill.cost_usd == pytest.approx(expected)


def test_a_second_batch_of_the_same_requests_shows_up_as_duplicates(p: Provider, oai: openai.OpenAI) -> None:
    submit(oai, chats(2))
    submit(oai, chats(3))
    bill = p.bill()
    assert bill.duplicates == {"r0": 2, "r1": 2}
    assert sorted(bill.duplicate_bodies.values()) == [2, 2]
    assert "2 custom ids billed more than once" in str(bill)


def test_errors_go_to_a_file_of_their_own(oai: openai.OpenAI) -> None:
    lines = [
        chat_line("good", "Hello."),
        chat_line("bad", "[[fail:400]]"),
        chat_line("limit", "Hello.", max_completion_tokens=0),
    ]
    done = oai.batches.retrieve(submit(oai, lines).id)
    assert done.status == "completed"
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    assert [row["custom_id"] for row in rows(oai, done.output_file_id)] == ["good"]
    errors = by_id(rows(oai, done.error_file_id))
    assert errors.keys() == {"bad", "limit"}
    assert errors["bad"]["response"]["status_code"] == 400
    assert errors["bad"]["response"]["body"]["error"]["type"] == "invalid_request_error"


def test_a_batch_of_failures_has_no_output_file(oai: openai.OpenAI) -> None:
    done = oai.batches.retrieve(submit(oai, [chat_line("bad", "[[fail:500]]")]).id)
    assert done.output_file_id is None
    assert done.error_file_id is not None


def test_output_is_never_in_the_order_of_the_input(oai: openai.OpenAI) -> None:
    done = oai.batches.retrieve(submit(oai, chats(2)).id)
    assert done.output_file_id is not None
    assert [row["custom_id"] for row in rows(oai, done.output_file_id)] == ["r1", "r0"]


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        ([], "empty_file"),
        ([b"{not json}\n"], "invalid_json_line"),
        ([{"custom_id": "a"}], "missing_required_parameter"),
        ([*chats(1), *chats(1)], "duplicate_custom_id"),
        ([{**chats(1)[0], "url": "/v1/responses"}], "mismatched_endpoint"),
        ([{**chats(1)[0], "method": "GET"}], "invalid_method"),
        ([*chats(1), chat_line("b", "x", model="other")], "mismatched_model"),
        ([chat_line("a", "x", stream=True)], "invalid_request"),
    ],
)
def test_a_bad_file_fails_the_batch(p: Provider, oai: openai.OpenAI, lines: list[Any], code: str) -> None:
    batch = oai.batches.retrieve(submit(oai, lines).id)
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    assert batch.errors.data[-1].code == code
    assert (batch.output_file_id, batch.error_file_id) == (None, None)
    assert p.bill().billed == 0


def test_limits_are_enforced() -> None:
    limits = {"openai_requests": 3, "openai_bytes": 2_000, "openai_batches_per_hour": 2}
    with provider(limits=limits), openai.OpenAI(max_retries=0) as oai:
        batch = oai.batches.retrieve(submit(oai, chats(4)).id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "too_many_tasks"
        assert bad_request(lambda: upload(oai, chats(50))).param == "file"
        submit(oai, chats(3))
        assert raises(openai.RateLimitError)(lambda: submit(oai, chats(1))).status_code == 429


def test_too_many_embedding_inputs_fail_the_batch() -> None:
    body = {"model": "text-embedding-3-small", "input": ["a", "b", "c"], "dimensions": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    limits = {"openai_embedding_inputs": 2}
    with provider(limits=limits), openai.OpenAI(max_retries=0) as oai:
        batch = oai.batches.retrieve(submit(oai, [line], endpoint="/v1/embeddings").id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "too_many_tasks"


def test_the_token_queue_fails_what_is_too_much() -> None:
    limits = {"openai_enqueued_tokens": 60}
    with (
        provider(limits=limits, batch_seconds=60) as p,
        openai.OpenAI(max_retries=0) as oai,
    ):
        first, second = submit(oai, chats(1)), submit(oai, chats(1))
        p.advance()
        assert oai.batches.retrieve(first.id).status == "in_progress"
        refused = oai.batches.retrieve(second.id)
        assert refused.errors is not None
        assert refused.errors.data is not None
        assert refused.errors.data[0].code == "token_limit_exceeded"
        p.finish(first.id)
        assert p.bill().billed == 1


def test_an_unknown_model_fails_the_batch() -> None:
    with provider(models=["gpt-6.1-sol"]), openai.OpenAI(max_retries=0) as oai:
        batch = oai.batches.retrieve(submit(oai, chats(1)).id)
        assert batch.errors is not None
        assert batch.errors.data is not None
        assert batch.errors.data[0].code == "model_not_found"
        assert [model.id for model in oai.models.list()] == ["gpt-6.1-sol"]


@pytest.mark.parametrize(
    "metadata",
    [
        {f"k{i}": "v" for i in range(17)},
        {"k" * 65: "v"},
        {"k": "v" * 513},
    ],
)
def test_metadata_has_limits(oai: openai.OpenAI, metadata: dict[str, str]) -> None:
    assert bad_request(lambda: submit(oai, chats(1), metadata=metadata)).param == "metadata"


def test_a_batch_needs_a_batch_file_and_a_known_endpoint(oai: openai.OpenAI) -> None:
    bad_request(lambda: submit(oai, chats(1), endpoint="/v1/completely-else"))
    options: Any = {"endpoint": CHAT, "completion_window": "24h"}
    not_found(lambda: oai.batches.create(input_file_id="file-nope", **options))
    other = oai.files.create(file=("x.txt", io.BytesIO(b"x")), purpose="user_data")
    bad_request(lambda: oai.batches.create(input_file_id=other.id, **options))
    file_id = upload(oai, chats(1))
    window: Any = "48h"
    bad_request(lambda: oai.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window=window))


def test_lists_are_paged_newest_first(oai: openai.OpenAI) -> None:
    made = [submit(oai, chats(1)).id for _ in range(5)]
    assert [batch.id for batch in oai.batches.list(limit=2)] == made[::-1]
    page = oai.batches.list(limit=2)
    assert page.has_more
    assert [batch.id for batch in page.data] == made[:2:-1]
    bad_request(lambda: oai.batches.list(limit=101))


def test_files_can_be_listed_read_and_deleted(oai: openai.OpenAI) -> None:
    first = oai.files.create(
        file=("one.jsonl", io.BytesIO(b"one")),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    second = oai.files.create(file=("two.txt", io.BytesIO(b"")), purpose="user_data")
    assert (first.filename, first.bytes) == ("one.jsonl", 3)
    assert first.expires_at == first.created_at + 3600
    assert second.bytes == 0
    assert [file.id for file in oai.files.list()] == [second.id, first.id]
    assert [file.id for file in oai.files.list(purpose="batch")] == [first.id]
    assert oai.files.content(first.id).content == b"one"
    assert oai.files.delete(first.id).deleted
    not_found(lambda: oai.files.content(first.id))
    not_found(lambda: oai.files.retrieve(first.id))


def test_a_deleted_input_file_does_not_stop_its_batch(p: Provider, oai: openai.OpenAI) -> None:
    batch = submit(oai, chats(2))
    oai.files.delete(batch.input_file_id)
    assert oai.batches.retrieve(batch.id).status == "completed"
    assert p.bill().billed == 2


def test_batch_files_expire_after_thirty_days_by_default(oai: openai.OpenAI) -> None:
    file = oai.files.retrieve(upload(oai, chats(1)))
    assert file.expires_at == file.created_at + 30 * 86_400
    expires: Any = {"anchor": "created_at", "seconds": 60}
    bad_request(
        lambda: oai.files.create(file=("a", io.BytesIO(b"a")), purpose="batch", expires_after=expires)
    )


def test_a_key_is_needed(p: Provider) -> None:
    unauthenticated = raises(openai.AuthenticationError)
    with openai.OpenAI(api_key="sk-invalid", max_retries=0) as oai:
        assert unauthenticated(lambda: oai.batches.list()).code == "invalid_api_key"
        headers = {"Authorization": openai.Omit()}
        unauthenticated(lambda: oai.batches.list(extra_headers=headers))


def test_keys_can_be_kept_apart() -> None:
    with (
        provider(scoped=True),
        openai.OpenAI(api_key="one", max_retries=0) as one,
        openai.OpenAI(api_key="two", max_retries=0) as two,
    ):
        batch = submit(one, chats(1))
        assert not_found(lambda: two.batches.retrieve(batch.id)).status_code == 404
        assert list(two.batches.list()) == []
        assert one.batches.retrieve(batch.id).status == "completed"


def test_a_cancelled_batch_keeps_what_was_answered() -> None:
    with provider(auto=False) as p, openai.OpenAI(max_retries=0) as oai:
        batch = submit(oai, chats(10))
        p.advance(batch.id)
        p.fault("cancel", operation="batches.cancel", fraction=0.3)
        assert oai.batches.cancel(batch.id).status == "cancelling"
        conflict(lambda: oai.batches.cancel(batch.id))
        assert p.advance(batch.id) == ["cancelled"]
        done = oai.batches.retrieve(batch.id)
        assert (done.status, p.bill().billed) == ("cancelled", 3)
        assert done.output_file_id is not None
        assert done.error_file_id is not None
        answered = by_id(rows(oai, done.output_file_id)).keys()
        left = by_id(rows(oai, done.error_file_id))
        assert (len(answered), len(left)) == (3, 7)
        assert not answered & left.keys()
        assert {line["error"]["code"] for line in left.values()} == {"batch_cancelled"}
        assert {line["response"] for line in left.values()} == {None}
        conflict(lambda: oai.batches.cancel(batch.id))


def test_a_batch_cancelled_at_once_costs_nothing(p: Provider, oai: openai.OpenAI) -> None:
    batch = submit(oai, chats(3))
    oai.batches.cancel(batch.id)
    assert oai.batches.retrieve(batch.id).status == "cancelled"
    assert (p.bill().billed, p.bill().accepted) == (0, 3)


def test_an_expired_batch_keeps_what_was_answered() -> None:
    with provider(auto=False) as p, openai.OpenAI(max_retries=0) as oai:
        batch = submit(oai, chats(10))
        assert oai.batches.retrieve(batch.id).status == "validating"
        assert p.finish(batch.id, fraction=0.5) == ["expired"]
        done = oai.batches.retrieve(batch.id)
        assert done.error_file_id is not None
        assert p.bill().billed == 5
        codes = {row["error"]["code"] for row in rows(oai, done.error_file_id)}
        assert codes == {"batch_expired"}


def test_one_row_can_expire(p: Provider, oai: openai.OpenAI) -> None:
    done = oai.batches.retrieve(submit(oai, [*chats(1), chat_line("late", "[[expire]]")]).id)
    assert done.status == "expired"
    assert p.bill().by_custom_id == {"r0": 1}


def test_a_transient_failure_goes_away(p: Provider, oai: openai.OpenAI) -> None:
    lines = [chat_line("a", "Tell me something. [[fail:500:1]]")]
    assert oai.batches.retrieve(submit(oai, lines).id).output_file_id is None
    assert oai.batches.retrieve(submit(oai, lines).id).output_file_id is not None
    assert p.bill().billed == 1


def test_states_can_be_walked_step_by_step() -> None:
    with provider(stepwise=True) as p, openai.OpenAI(max_retries=0) as oai:
        batch = submit(oai, chats(2))
        assert p.bill().billed == 0
        states = [batch.status] + [oai.batches.retrieve(batch.id).status for _ in range(4)]
        assert states == ["validating", "in_progress", "finalizing", "completed", "completed"]
        assert p.bill().billed == 2


def test_states_follow_the_clock() -> None:
    with provider(batch_seconds=0.6), openai.OpenAI(max_retries=0) as oai:
        batch = submit(oai, chats(100))
        time.sleep(0.3)
        midway = oai.batches.retrieve(batch.id)
        assert midway.status == "in_progress"
        assert midway.request_counts is not None
        assert 30 <= midway.request_counts.completed < 100
        assert midway.output_file_id is None
        time.sleep(0.4)
        assert oai.batches.retrieve(batch.id).status == "completed"


def test_the_other_endpoints_work_in_batches(p: Provider, oai: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "gpt-6-luna", "input": "The sea is blue. Yes."}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": body}
    done = oai.batches.retrieve(submit(oai, [line], endpoint="/v1/responses").id)
    assert done.output_file_id is not None
    answer = rows(oai, done.output_file_id)[0]["response"]["body"]
    assert answer["output"][-1]["content"][0]["text"] == "The sea is blue."
    body = {"model": "text-embedding-3-small", "input": "sea", "dimensions": 8}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body}
    done = oai.batches.retrieve(submit(oai, [line], endpoint="/v1/embeddings").id)
    assert done.output_file_id is not None
    answer = rows(oai, done.output_file_id)[0]["response"]["body"]
    assert len(answer["data"][0]["embedding"]) == 8


def test_raw_separators_survive_in_an_output_file(oai: openai.OpenAI) -> None:
    done = oai.batches.retrieve(submit(oai, [chat_line("a", "[[separators]]")]).id)
    assert done.output_file_id is not None
    data = oai.files.content(done.output_file_id).content
    assert "\u2028".encode() in data
    assert data.count(b"\n") == 1
    text = json.loads(data)["response"]["body"]["choices"][0]["message"]["content"]
    assert text == "one\u2028two\u2029three\u0085four\nfive"


def test_what_was_asked_can_be_read_back(p: Provider, oai: openai.OpenAI) -> None:
    batch = submit(oai, chats(2), metadata={"a": "b"})
    assert p.requests(batch.id) == [
        {"custom_id": line["custom_id"], "body": line["body"]} for line in chats(2)
    ]
    with pytest.raises(LookupError, match="no batch"):
        p.requests("batch_nope")
    (facts,) = p.batches()
    assert facts["custom_ids"] == ["r0", "r1"]
    assert (facts["state"], facts["metadata"]) == ("completed", {"a": "b"})
    assert facts["counts"]["succeeded"] == 2
    assert {file["purpose"] for file in p.files()} == {"batch", "batch_output"}
