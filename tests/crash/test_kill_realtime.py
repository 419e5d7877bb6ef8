"""SIGKILL at every durable write and every call of a run in realtime, before and after.

Then one plain evaluation must give every answer on its row, at once; what was durable when the process
died is not asked again, the rest (here: what was in flight) at most once more.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import polars as pl
import pytest

from tests.crash.client import Report
from tests.crash.trace import Side
from tests.crash.worker import Worker, Workers

pytestmark = [
    pytest.mark.crash,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL"),
]

MODELS = {"openai": "openai/gpt-6-luna", "anthropic": "anthropic/claude-haiku-5-5"}
# Where a run lives: the claim and all that follows, and the thread that calls the provider. What comes
# before is the same as for batches, and is killed in their suite.
_PLACES = ("run_live", "backends/realtime.py")
_numbers = count()

Case = tuple[str, str, int, Side]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers.started() as started:
        yield started


def prompts_of(label: object) -> list[str]:
    number = next(_numbers)
    return [f"{n} of case {number}, {label}" for n in range(2)]


def kept(cache: str) -> int:
    """Answers that are durable."""
    if not list(Path(cache).glob("results/*.parquet")):
        return 0
    answers = pl.scan_parquet(f"{cache}/results/*.parquet").filter(pl.col("state") == 0)
    return answers.select(pl.col("key").n_unique()).collect().item()  # type: ignore[no-any-return]


def run(worker: Worker, cache: str, protocol: str, prompts: list[str], case: Case | None = None) -> Report:
    return worker.run(cache=cache, model=MODELS[protocol], mode="realtime", prompts=prompts, die_at=case)


def cases_of(report: Report) -> list[Case]:
    seen: Counter[tuple[str, str]] = Counter()
    cases: list[Case] = []
    for name, place, idle in report.events:
        if not idle and any(part in place for part in _PLACES):
            cases += [(name, place, seen[name, place], "before"), (name, place, seen[name, place], "after")]
        seen[name, place] += 1
    return cases


@pytest.mark.parametrize("protocol", MODELS)
def test_killed_at_every_event_of_a_run(workers: Workers, figures: Counter[str], protocol: str) -> None:
    worker = workers.all[0]
    prompts = prompts_of("recorded")
    plain = run(worker, worker.new_cache(), protocol, prompts)
    assert plain.answers == prompts, plain.trace
    cases = cases_of(plain)
    names = {name for name, *_ in cases}
    route = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages"}[protocol]
    assert {f"send POST {route}", f"receive POST {route}", "replace results/*.parquet"} <= names

    def one(worker: Worker, case: Case) -> None:
        label = f"{protocol}: {case}"
        prompts, cache = prompts_of(case[:1]), worker.new_cache()
        died = run(worker, cache, protocol, prompts, case)
        assert died.killed or died.answers == prompts, f"{label}; {died.trace}"
        figures["processes killed in a realtime run"] += died.killed
        durable = kept(cache)
        after = run(worker, cache, protocol, prompts)
        assert after.answers == prompts, f"{label}; {after.trace}"
        assert after.open_jobs == [], label
        # What the killed process had sent may be counted after it died: only the sum is certain.
        assert sum(worker.asked[p] for p in prompts) <= 4 - durable, label
        assert all(worker.asked[p] in (1, 2) for p in prompts), label

    workers.map(one, cases)
    assert figures["processes killed in a realtime run"] > len(cases) // 2
