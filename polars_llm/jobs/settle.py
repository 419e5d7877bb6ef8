"""After a lost reply or a dead submitter: what does the provider say?

A batch that can be found is taken over. An empty list is proof only after a quiet period: the create
call may still be on its way, and lists may lag. Until then, and while batches that may be ours cannot
be told apart from others, the job stays unknown: pending, and never sent again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from polars_llm import clock
from polars_llm.backends.base import BatchBackend, IsOurs
from polars_llm.job import Job, State
from polars_llm.jobs.lookup import Policy
from polars_llm.request import key_from_custom_id
from polars_llm.store import Store

__all__ = ["settle"]

# So many ids that are all ours, or all foreign, decide about a batch.
_ENOUGH = 1_000


def settle(job: Job, backend: BatchBackend, store: Store, policy: Policy) -> Job:
    """From creating (submitter dead) or unknown to submitted, released, or still unknown."""
    # A submitter that died may have been at work until just now.
    since = job.quiet_since or clock.stamp()
    known = {j.batch_id for j in store.ledger.jobs() if j.batch_id}
    found = backend.find(job, known, _is_ours(job, store))
    if found.batch_id is not None:
        return store.ledger.move(job, State.SUBMITTED, batch_id=found.batch_id, owner=None)
    if found.candidates:
        several = f"{len(found.candidates)} batches may be this one; waiting until they can be read"
        return store.ledger.move(job, State.UNKNOWN, owner=None, reason=several, quiet_since=since)
    if clock.seconds_since(since) > backend.create_timeout + policy.quiet_period:
        released = store.ledger.move(
            job, State.RELEASED, owner=None, reason="the provider never had this batch"
        )
        if released.state is State.RELEASED:
            store.spool.remove(job.id)
        return released
    lost = job.reason or "the reply to create was lost"
    return store.ledger.move(job, State.UNKNOWN, owner=None, reason=lost, quiet_since=since)


def _is_ours(job: Job, store: Store) -> IsOurs:
    def look(custom_ids: Iterable[str]) -> bool | None:
        keys = set(store.spool.keys([job.id])["key"])
        names = map(key_from_custom_id, custom_ids)
        first = list(islice(names, _ENOUGH))
        if not keys.intersection(first):
            # Foreign, if this is not just the beginning of a file that was cut.
            return False if len(first) >= min(_ENOUGH, job.requests) else None
        if keys.issuperset(first):
            return True
        # Some ours, some not: a dirty file, or a batch of another cache that shares requests.
        return True if keys <= {*first, *names} else None

    return look
