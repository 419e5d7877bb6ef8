"""SIGKILL at every durable write and every provider call, before and after, on both protocols.

A life is recorded first: a few processes, one after another, that evaluate the same frame until it is
answered. Then each event of it gets two cases, in which the process dies just before it, and just after.
After each case plain evaluations must give every answer on its row, and the bill must show every request
exactly once. Assumption: the provider's list of batches lags at most as long as the quiet period.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Literal

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

# Everything that a life writes or sends, wherever it comes from. The tracer finds it; here it is only
# written down, so that nothing is added without anybody thinking of a crash between it and the next.
_DIRECTORY = """
mkdir . | mkdir jobs | mkdir results | mkdir spool | mkdir locks
create .README.txt.*.tmp | fsync .README.txt.*.tmp | replace README.txt
create .CACHEDIR.TAG.*.tmp | fsync .CACHEDIR.TAG.*.tmp | replace CACHEDIR.TAG
create .layout.*.tmp | fsync .layout.*.tmp | replace layout | fsync .
create locks/probe-* | unlink locks/probe-*
"""
_LEDGER = """
create jobs/.creating.lock | unlink jobs/.creating.lock
create jobs/cache.db | pragma auto_vacuum in jobs/cache.db | pragma journal_mode in jobs/cache.db
create table in jobs/cache.db | insert in jobs/cache.db
create unique index in jobs/cache.db | create index in jobs/cache.db | create trigger in jobs/cache.db
create jobs/.format.*.tmp | fsync jobs/.format.*.tmp | replace jobs/format | fsync jobs
commit in jobs/cache.db | close jobs/cache.db
"""
_JOB = """
create locks/submitter-* | unlink locks/submitter-* | create locks/job_*.lock | unlink locks/job_*.lock
create spool/.job_*.keys.arrow.*.tmp | fsync spool/.job_*.keys.arrow.*.tmp | replace spool/job_*.keys.arrow
create spool/.job_*.requests.jsonl.*.tmp | fsync spool/.job_*.requests.jsonl.*.tmp
replace spool/job_*.requests.jsonl | fsync spool
write spool/job_*.results.jsonl | unlink spool/job_*.results.jsonl
unlink spool/job_*.requests.jsonl | unlink spool/job_*.keys.arrow
"""
_RESULTS = """
create results/.*.parquet.*.tmp | fsync results/.*.parquet.*.tmp | replace results/*.parquet | fsync results
create results/.compact.lock | unlink results/.compact.lock
write results/.removals | unlink results/*.parquet
"""
_PROTOCOLS = {
    "openai": """
write spool/recover_*.jsonl | unlink spool/recover_*.jsonl
send POST /v1/files | send the body of POST /v1/files | receive POST /v1/files
send POST /v1/batches | send the body of POST /v1/batches | receive POST /v1/batches
send GET /v1/batches | receive GET /v1/batches
send GET /v1/batches/batch_* | receive GET /v1/batches/batch_*
send GET /v1/files/file_* | receive GET /v1/files/file_*
send GET /v1/files/file_*/content | receive GET /v1/files/file_*/content
""",
    "anthropic": """
write spool/recover_*.jsonl | unlink spool/recover_*.jsonl
send GET /v1/messages/batches | receive GET /v1/messages/batches
send POST /v1/messages/batches | send the body of POST /v1/messages/batches
receive POST /v1/messages/batches
send GET /v1/messages/batches/msgbatch_* | receive GET /v1/messages/batches/msgbatch_*
send GET /v1/messages/batches/msgbatch_*/results | receive GET /v1/messages/batches/msgbatch_*/results
""",
}


def known_events(protocol: str) -> set[str]:
    text = _DIRECTORY + _LEDGER + _JOB + _RESULTS + _PROTOCOLS[protocol]
    return {name.strip() for line in text.splitlines() for name in line.split("|")} - {""}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A life: what goes wrong in it, and what its processes do.

    Parameters
    ----------
    faults
        Kind and options of each fault that the provider has on order.
    then
        What the second process does; the others evaluate until all is answered.
    lost
        The cache directory is lost after the first process.
    die_at
        ``every`` event; the ``last`` one from each place; or those only from a ``new`` place, where no
        earlier scenario ever came by. In any case not where an earlier one had come by the same way.
    """

    name: str
    faults: Sequence[tuple[str, Mapping[str, Any]]] = ()
    prompts: int = 2
    per_batch: int = 1_000
    then: str = "generate"
    lost: bool = False
    die_at: Literal["every", "last", "new"] = "new"
    protocols: Sequence[str] = ("openai", "anthropic")


SCENARIOS = [
    Scenario("plain", die_at="every"),
    Scenario("half-expired", [("expire", {"fraction": 0.5})], die_at="last"),
    Scenario("reply-lost", [("create-then-drop", {})], die_at="last"),
    Scenario("two-batches", per_batch=1, die_at="last"),
    Scenario("never-created", [("drop", {"operation": "*batches.create"})]),
    Scenario("queue-full", [("token-limit", {})], protocols=["openai"]),
    Scenario("busy", [("status", {"operation": "*batches.create", "status": 429, "retry_after": 0})]),
    Scenario("refused", [("fail", {})], protocols=["openai"]),
    Scenario("many-batches", prompts=10, per_batch=1),
    Scenario("watched", then="watch"),
    Scenario("recovered", then="recover", lost=True),
]


@dataclasses.dataclass(frozen=True)
class Recording:
    """A life without a crash: its events, in order, and what was written behind the tracer's back."""

    scenario: Scenario
    protocol: str
    events: Sequence[tuple[str, str, bool]]
    untraced: Sequence[str]

    @property
    def names(self) -> set[str]:
        return {name for name, _, idle in self.events if not idle}

    def same_history(self, other: Recording) -> int:
        """How many events both begin with."""
        pairs = zip(self.events, other.events, strict=False)
        return next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), len(other.events))


@dataclasses.dataclass(frozen=True)
class Case:
    """Die at an event, the `occurrence`-th time that it comes from that place."""

    name: str
    place: str
    occurrence: int
    side: Side

    def __str__(self) -> str:
        return f"killed {self.side} {self.name}, number {self.occurrence} of {self.place}"


class Life:
    """One cache directory, the prompts that are evaluated there, and one process after another."""

    def __init__(self, worker: Worker, scenario: Scenario, protocol: str, prompts: Sequence[str]) -> None:
        self._worker = worker
        self._scenario = scenario
        self._order = {"model": MODELS[protocol], "prompts": prompts, "per_batch": scenario.per_batch}
        self._cache = worker.new_cache()
        self._number = 0
        if scenario.lost:  # recovering reads all that the account ever had
            worker.forget()
        worker.provider.clear_faults()
        for kind, options in scenario.faults:
            worker.provider.fault(kind, **options)

    def next(self, **facts: Any) -> Report:
        """Run the next process."""
        if self._number == 1 and self._scenario.lost:
            self._cache = self._worker.new_cache()
        do = self._scenario.then if self._number == 1 else "generate"
        self._number += 1
        return self._run(do=do, on_pending="raise", **facts)

    def until(self, case: Case) -> Report:
        """Run processes until one dies as the case has it, or all is answered."""
        left = case.occurrence
        while True:
            report = self.next(die_at=(case.name, case.place, left, case.side))
            if report.killed or report.answers is not None or report.trace is not None:
                return report
            left -= sum((name, place) == (case.name, case.place) for name, place, _ in report.events)

    def finished(self) -> Report:
        """After a crash: whoever lost the cache recovers; then a plain evaluation waits for the answers."""
        if self._scenario.lost and self._number > 1:
            recovered = self._run(do="recover")
            assert recovered.trace is None, recovered.trace
        return self._run(on_pending="wait")

    def _run(self, **facts: Any) -> Report:
        return self._worker.run(cache=self._cache, **self._order, **facts)


_numbers = count()


def new_prompts(label: object, scenario: Scenario) -> list[str]:
    """Prompts that were never used: each is one request on the bill."""
    number = next(_numbers)
    return [f"{n} of case {number}, {label}" for n in range(scenario.prompts)]


def check(worker: Worker, report: Report, prompts: Sequence[str], label: object) -> None:
    """Every answer is on its row and billed once, nothing is left open, nobody saw a traceback."""
    assert report.trace is None, f"{label}\n{report.trace}"
    assert report.answers == prompts, label
    assert report.open_jobs == [], label
    worker.check_bill(prompts, label)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with Workers.started() as started:
        yield started


@pytest.fixture(scope="module")
def recordings(workers: Workers) -> list[Recording]:
    """All lives, without a crash."""
    return [
        recorded(workers.all[0], s, protocol)
        for protocol in MODELS
        for s in SCENARIOS
        if protocol in s.protocols
    ]


def recorded(worker: Worker, scenario: Scenario, protocol: str) -> Recording:
    label = f"{protocol} {scenario.name}"
    prompts = new_prompts(label, scenario)
    life = Life(worker, scenario, protocol, prompts)
    reports = [life.next()]
    while reports[-1].answers is None:
        assert reports[-1].trace is None, f"{label}\n{reports[-1].trace}"
        reports.append(life.next())
    check(worker, reports[-1], prompts, label)
    events = [event for report in reports for event in report.events]
    return Recording(scenario, protocol, events, [file for report in reports for file in report.untraced])


def cases_of(recording: Recording, earlier: Sequence[Recording]) -> list[Case]:
    """Both sides of each event at which a process is to die in this life."""
    known = {(name, place) for r in earlier for name, place, _ in r.events}
    begun = max((recording.same_history(r) for r in earlier), default=0)
    occurrences: Counter[tuple[str, str]] = Counter()
    found: dict[tuple[str, str], list[int]] = {}
    cases = []
    for position, (name, place, idle) in enumerate(recording.events):
        if not idle and position >= begun:
            found.setdefault((name, place), []).append(occurrences[name, place])
        occurrences[name, place] += 1
    for event, times in found.items():
        if event in known and recording.scenario.die_at == "new":
            continue
        chosen = {"every": times, "last": times[-1:], "new": times[:1]}[recording.scenario.die_at]
        # From a place that is known, dying after each, which is also before the next, is enough.
        once = event in known and recording.scenario.die_at != "every"
        sides: list[Side] = ["after"] if once else ["before", "after"]
        cases += [Case(*event, occurrence, side) for occurrence in chosen for side in sides]
    return cases


@pytest.mark.parametrize("protocol", MODELS)
def test_the_list_of_events_is_complete(recordings: list[Recording], protocol: str) -> None:
    seen = {name: r.scenario.name for r in recordings if r.protocol == protocol for name in r.names}
    new = sorted(f"{name}   (in {seen[name]})" for name in seen.keys() - known_events(protocol))
    assert not new, (
        "There are durable writes or provider calls that this suite does not know:\n  "
        + "\n  ".join(new)
        + "\nThink of a crash just before and just after each; then add them to the list above. The cases"
        " come by themselves."
    )
    gone = sorted(known_events(protocol) - seen.keys())
    assert not gone, f"No life does this any more, take it off the list above, or add a life: {gone}"


def test_nothing_is_written_behind_the_tracer(recordings: list[Recording]) -> None:
    behind = {file for recording in recordings for file in recording.untraced}
    assert behind == set(), "teach the tracer how these files are written"


@pytest.mark.parametrize(
    ("protocol", "scenario"),
    [pytest.param(p, s, id=f"{p}-{s.name}") for p in MODELS for s in SCENARIOS if p in s.protocols],
)
def test_killed_at_every_event(
    workers: Workers,
    recordings: list[Recording],
    figures: Counter[str],
    protocol: str,
    scenario: Scenario,
) -> None:

    def run(worker: Worker, case: Case) -> None:
        label = f"{protocol} {scenario.name}: {case}"
        for _ in range(5):
            prompts = new_prompts(label, scenario)
            life = Life(worker, scenario, protocol, prompts)
            died = life.until(case)
            assert died.trace is None, f"{label}\n{died.trace}"
            check(worker, life.finished(), prompts, label)
            if died.killed:
                return
            # On a busy machine the quiet period may be over sooner than in the recorded life.
        raise AssertionError(f"{label} was not reached")

    number = next(n for n, r in enumerate(recordings) if (r.protocol, r.scenario) == (protocol, scenario))
    cases = cases_of(recordings[number], recordings[:number])
    workers.map(run, cases)
    figures["processes killed at an event"] += len(cases)


@pytest.mark.parametrize("protocol", MODELS)
def test_killed_again_and_again(workers: Workers, figures: Counter[str], protocol: str) -> None:
    """Each process dies at a moment of its own, also while it repairs what another one left."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    scenarios = [s for s in SCENARIOS if protocol in s.protocols and not s.lost]
    chains = [(n, dice.choice(scenarios), [dice.uniform(0, 0.15) for _ in range(3)]) for n in range(20)]

    def run(worker: Worker, chain: tuple[int, Scenario, list[float]]) -> None:
        number, scenario, moments = chain
        label = f"{protocol} {scenario.name}: chain {number} of seed {seed}"
        prompts = new_prompts(label, scenario)
        life = Life(worker, scenario, protocol, prompts)
        for moment in moments:
            died = life.next(die_after=moment)
            assert died.trace is None, f"{label}\n{died.trace}"
            figures["processes killed at a random moment"] += died.killed
        check(worker, life.finished(), prompts, label)

    workers.map(run, chains)
