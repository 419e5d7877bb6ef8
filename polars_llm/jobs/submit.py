"""Upload and create: each step is durable before the next one starts.

``creating`` is written before the one call that costs money, ``submitted`` after its reply. Between
the two a crash leaves a job that `settle` looks for at the provider.
"""

from __future__ import annotations

import time

from polars_llm import clock
from polars_llm.backends.base import BatchBackend, CallFailed
from polars_llm.errors import CacheError
from polars_llm.job import Job, State
from polars_llm.jobs.lookup import Policy
from polars_llm.jobs.settle import settle
from polars_llm.store import Store

__all__ = ["check_durable", "create", "put_off", "release", "submit"]


def check_durable(store: Store) -> None:
    """Raise CacheError where the ledger would forget, if the process died now, what it is about to be told.

    A claim that has looked in vain ten times looks up inside of its transaction, and Polars may run another
    verb on top of that.
    """
    if store.ledger.in_transaction():
        raise CacheError(
            "Polars evaluates this on top of another evaluation, which is just claiming its requests.",
            path=str(store.directory.jobs),
            hint="run the same line again. Nothing was sent for it.",
        )


def submit(job: Job, backend: BatchBackend, store: Store, policy: Policy, *, owner: str) -> Job:
    """From planned to submitted, deferred or unknown.

    Raises
    ------
    ProviderError
        The provider refused; nothing was created and the keys are free again.
    """
    if backend.uploads and job.state is State.PLANNED:
        try:
            file_id = backend.upload(job, store.spool.requests_path(job.id))
        except CallFailed as error:
            release(job, store, reason=str(error))
            raise error.public("uploading the requests") from error
        job = store.ledger.move(job, State.UPLOADED, input_file_id=file_id)
    return create(job, backend, store, policy, owner=owner)


def create(job: Job, backend: BatchBackend, store: Store, policy: Policy, *, owner: str) -> Job:
    """Call create once, and write down what is known afterwards."""
    check_durable(store)
    try:
        marker = backend.newest_batch()
    except CallFailed as error:
        release(job, store, reason=str(error))
        raise error.public("reading the list of batches") from error
    job = store.ledger.move(
        job,
        State.CREATING,
        owner=owner,
        marker=marker,
        create_called=clock.stamp(),
        quiet_since=None,
        reason=None,
    )
    if job.state is not State.CREATING or job.owner != owner:
        return job  # somebody else moved it first
    try:
        batch_id = backend.create(job, store.spool.requests_path(job.id))
    except CallFailed as error:
        return _not_created(job, backend, store, policy, error)
    return store.ledger.move(job, State.SUBMITTED, batch_id=batch_id, owner=None)


def _not_created(job: Job, backend: BatchBackend, store: Store, policy: Policy, error: CallFailed) -> Job:
    if error.verdict.uncertain:
        job = store.ledger.move(job, State.UNKNOWN, owner=None, reason=str(error), quiet_since=clock.stamp())
        try:
            return settle(job, backend, store, policy)
        except CallFailed as blind:
            # It can't be seen now: the job stays unknown, and the next evaluation looks again.
            if blind.verdict.transient:
                return job
            raise blind.public(f"looking for {job.id}") from blind
    if error.verdict.transient:
        return put_off(job, store, policy, reason=str(error), wait=error.retry_after)
    release(job, store, reason=str(error))
    raise error.public("creating the batch") from error


def put_off(job: Job, store: Store, policy: Policy, *, reason: str, wait: float | None = None) -> Job:
    """The provider's queue is full: the same file goes again later."""
    delay = min(3600.0, wait or policy.poll_interval * 2 ** min(job.attempts, 10))
    return store.ledger.move(
        job,
        State.DEFERRED,
        owner=None,
        batch_id=None,
        reason=reason,
        attempts=job.attempts + 1,
        not_before=time.time() + delay,
    )


def release(job: Job, store: Store, *, reason: str) -> Job:
    """Nothing was created: the keys are free, the files go."""
    job = store.ledger.move(job, State.RELEASED, owner=None, reason=reason)
    if job.state is State.RELEASED:
        store.spool.remove(job.id)
    return job
