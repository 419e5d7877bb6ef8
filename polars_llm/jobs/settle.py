"""After a lost reply or a dead submitter: what does the provider say?

A batch that can be found is taken over. An empty list is proof only after a quiet period: the create
call may still be on its way, and lists may lag. Until then, and while batches that may be ours cannot
be told apart from others, the job stays unknown: pending, and never sent again.
"""

from __future__ import annotations

from polars_llm import clock
from polars_llm.backends.base import BatchBackend
from polars_llm.job import Job, State
from polars_llm.jobs.lookup import Policy
from polars_llm.store import Store

__all__ = ["settle"]


def settle(job: Job, backend: BatchBackend, store: Store, policy: Policy) -> Job:
    """From creating (submitter dead) or unknown to submitted, released, or still unknown."""
    known = {j.batch_id for j in store.ledger.jobs() if j.batch_id}
    found = backend.find(job, known)
    if found.batch_id is not None:
        return store.ledger.move(job, State.SUBMITTED, batch_id=found.batch_id, owner=None)
    if found.candidates:
        several = f"{len(found.candidates)} batches may be this one; waiting until they can be read"
        return store.ledger.move(job, State.UNKNOWN, owner=None, reason=several)
    if job.create_called and clock.seconds_since(job.create_called) > (
        backend.create_timeout + policy.quiet_period
    ):
        released = store.ledger.move(
            job, State.RELEASED, owner=None, reason="the provider never had this batch"
        )
        if released.state is State.RELEASED:
            store.spool.remove(job.id)
        return released
    return store.ledger.move(
        job, State.UNKNOWN, owner=None, reason=job.reason or "the reply to create was lost"
    )
