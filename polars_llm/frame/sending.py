"""What verbs have no answer to, brought by the heart: together, and asked again where it does not fit."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import polars as pl

from polars_llm.answer import DONE
from polars_llm.backends.base import is_batch
from polars_llm.backends.hosts import is_loopback
from polars_llm.errors import UnansweredInput
from polars_llm.frame.column import warn
from polars_llm.frame.verbs import Verb
from polars_llm.jobs.evaluate import Need, Pending, evaluate
from polars_llm.jobs.lookup import prefixes
from polars_llm.pricing import is_known
from polars_llm.request import Requests

__all__ = ["Wanted", "bring", "needs", "spent", "warn_of_unknown_prices"]

Wanted: TypeAlias = tuple[Verb, Requests]
"""What a verb has no answer to."""


def bring(wanted: Sequence[Wanted]) -> Pending:
    """Let the heart get these answers for verbs of one policy, everything in one evaluation.

    What comes and does not fit its schema is asked again, in an evaluation of its own.

    Raises
    ------
    JobsPending
        ``on_pending="raise"`` and not everything is there.
    UnansweredInput
        It takes long (realtime), and this is a thread of Polars'.
    """
    verb = wanted[0][0]
    _refuse_on_polars_thread(wanted)
    warn_of_unknown_prices([v for v, _ in wanted if v.output == "full"])
    pending = evaluate(needs(wanted), verb.store, verb.policy)
    while more := _asked_again(wanted):
        wanted, before = more, pending
        policy = dataclasses.replace(verb.once().policy, spent=spent(verb, wanted))
        pending = evaluate(needs(wanted), verb.store, policy)
        pending = dataclasses.replace(pending, sent=before.sent + pending.sent)
    if pending.jobs and verb.on_pending == "raise":
        raise pending.error(verb.policy.poll_interval)
    return pending


_warned: set[tuple[str, str, str | None]] = set()


def warn_of_unknown_prices(verbs: Sequence[Verb]) -> None:
    """Say once for each model of this process that what it costs will be null."""
    for verb in verbs:
        backend, model = verb.backend, verb.header.model
        name = (backend.provider, model, backend.base_url)
        if name in _warned or backend.mode == "local" or is_loopback(backend.base_url):
            continue
        _warned.add(name)
        known = is_known(
            provider=backend.provider,
            model=model,
            mode="batch" if is_batch(backend) else "realtime",
            prices=backend.prices,
            base_url=backend.base_url,
        )
        if not known:
            warn(
                f"The price of {backend.provider}/{model} is not known: its costs are null.\n\n"
                f"Hint: pass it, for example prices=pllm.Prices(input=1, output=5) of the model object."
            )


def _refuse_on_polars_thread(wanted: Sequence[Wanted]) -> None:
    # A thread that Python did not start is one of Polars' workers: waiting there may block the query
    # for ever, and Ctrl+C does not reach it.
    live = [requests for verb, requests in wanted if not is_batch(verb.backend)]
    if live and isinstance(threading.current_thread(), threading._DummyThread):
        missing = sum(requests.height for requests in live)
        raise UnansweredInput(
            f"{missing:,} requests have no answer yet, and they cannot be asked from inside this query.",
            hint="lf.llm.collect() asks them (of an eager frame df.lazy() makes a lazy one), or call each"
            " verb on the frame: df.llm.generate(...). Nothing was sent.",
        )


def _asked_again(wanted: Sequence[Wanted]) -> list[Wanted] | None:
    """The same, and what follows on answers that came and do not fit; None if they all do."""
    more = [v.typed.again(asked, v.store.results) if v.typed else None for v, asked in wanted]
    if not any(more):
        return None
    return [(v, r or asked) for (v, asked), r in zip(wanted, more, strict=True)]


def spent(verb: Verb, asked: Sequence[Wanted]) -> float | None:
    """What requests of verbs with this one's max_cost have cost by now, in USD; None if that is not known."""
    limit = (verb.cache, verb.policy.max_cost)
    keys = [prefixes(r.frame) for v, r in asked if (v.cache, v.policy.max_cost) == limit]
    if verb.policy.max_cost is None or not keys:
        return 0.0
    results = verb.store.results
    found = results.find(pl.concat(keys).unique())
    cost = results.read(found.filter(pl.col("state") == DONE), ["cost_usd"])["cost_usd"]
    return None if cost.has_nulls() else float(cost.sum())


def needs(wanted: Sequence[Wanted]) -> list[Need]:
    """One need for each model and host: what can go into one batch goes together."""
    groups: list[list[Wanted]] = []
    for verb, requests in wanted:
        for group in groups:
            if _go_together(group[0][0], verb):
                group.append((verb, requests))
                break
        else:
            groups.append([(verb, requests)])
    return [Need(group[0][0].backend, _merged([r for _, r in group])) for group in groups]


def _go_together(a: Verb, b: Verb) -> bool:
    def facts(verb: Verb) -> tuple[Any, ...]:
        header, key = verb.header, getattr(verb.model, "api_key", None)
        return verb.model, key, verb.backend.mode, header.endpoint, dict(header.headers)

    return facts(a) == facts(b)


def _merged(requests: Sequence[Requests]) -> list[Requests]:
    """Those under one header in one frame, each request once."""
    by_header: dict[str, list[Requests]] = {}
    for r in requests:
        by_header.setdefault(r.header.digest(), []).append(r)
    return [
        Requests(
            same[0].header,
            pl.concat([r.frame for r in same], how="diagonal").unique("key", maintain_order=True),
        )
        for same in by_header.values()
    ]
