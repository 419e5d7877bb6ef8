"""The vLLM engines of this process, each with the one thread that ever touches it.

vLLM is not thread-safe: two threads on one engine hang or crash. So an engine is built, fed, stepped and
closed by a thread of its own; whoever wants answers puts a `Run` into its inbox and reads the run's outbox.
While one block of answers is being written to disk the engine works on. Several runs share it.

Nor are two engines in one process safe beside each other: what a step tells its layers lies in globals of
vLLM, so that two steps at once read each other's attention states: wrong answers, or a crash. Engines in
this process take turns, a step each.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import itertools
import logging
import os
import queue
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from polars_llm.backends.vllm import binding, sampling

if TYPE_CHECKING:
    import vllm
    from vllm.outputs import RequestOutput

    from polars_llm.errors import InvalidRequest

__all__ = ["Ask", "Engine", "Finished", "Refused", "Run", "close", "close_all", "engine_for", "running"]

_logger = logging.getLogger("polars_llm")

# How long the end of the process waits for an engine that does not answer, in seconds.
_PATIENCE = 60.0
# Requests that wait in the engine beside those that it works on: enough for several seconds.
_WAITING = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Ask:
    """One request for an engine.

    Parameters
    ----------
    key
        Given back with the answer.
    prompt
        Text, sent as it is; or messages, for the model's chat template.
    sampling
        Keyword arguments of vllm.SamplingParams, or of PoolingParams for a pooling model.
    template
        Arguments of the chat template.
    """

    key: bytes
    prompt: str | list[dict[str, Any]]
    sampling: Mapping[str, Any]
    template: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Finished:
    """An answer, as the engine gave it."""

    key: bytes
    output: RequestOutput


@dataclasses.dataclass(frozen=True, slots=True)
class Refused:
    """A request that the engine would not take; the others go on."""

    key: bytes
    kind: str
    message: str


Event: TypeAlias = "Finished | Refused | BaseException | None"


class Run:
    """One evaluation's requests in an engine."""

    def __init__(self, packs: Iterator[Sequence[Ask]]) -> None:
        self.packs = packs
        self.outbox: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.closed = threading.Event()
        self.stopped = threading.Event()
        self.in_flight: dict[str, Ask] = {}
        self.fed = False
        self.over = False

    def next_pack(self) -> Sequence[Ask] | None:
        """None after the last; what goes wrong in making it is this run's affair alone."""
        try:
            return next(self.packs, None)
        except Exception as error:  # noqa: BLE001  # carried to the thread whose run it is
            self.stop(error)
            self.closed.set()
            return None

    def events(self, seconds: float) -> Iterator[Finished | Refused]:
        """What has come after `seconds`, or earlier if that was all; raises what stopped the engine.

        `over` says whether that was all.
        """
        # Not woken by every answer: two threads of Python that take turns hold each other up.
        self.stopped.wait(seconds)
        while True:
            try:
                event = self.outbox.get_nowait()
            except queue.Empty:
                return
            if event is None:
                self.over = True
                return
            if isinstance(event, BaseException):
                raise event
            yield event

    def stop(self, event: BaseException | None) -> None:
        """Nothing comes after this: all is answered, or what stopped it."""
        self.outbox.put(event)
        self.stopped.set()


class Engine:
    """One engine; made and used on its own thread."""

    def __init__(self, model: str, arguments: Mapping[str, Any]) -> None:
        self._model = model
        self.arguments = dict(arguments)
        self._inbox: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._runs: list[Run] = []
        self._ids = itertools.count()
        self._last: tuple[Mapping[str, Any], vllm.SamplingParams] | None = None
        self._thread = threading.Thread(target=self._main, name="polars_llm vllm", daemon=True)
        self._gone = False
        self._door = threading.Lock()
        self._thread.start()

    def wait(self) -> None:
        """Until it is built; raises what its construction raised. Ctrl+C ends the waiting alone."""
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    @property
    def alive(self) -> bool:
        """False once it is closed or has died."""
        return not self._gone

    @property
    def idle(self) -> bool:
        """True while nobody waits for answers."""
        return not self._runs and self._inbox.empty()

    def take(self, run: Run) -> bool:
        """Answer these too; False if it is closed already."""
        with self._door:
            if not self._gone:
                self._inbox.put(run)
            return not self._gone

    def close(self, patience: float | None = None) -> None:
        """Stop and free the memory; runs that still go on are told so. Waits `patience` seconds."""
        self._inbox.put(None)
        self._thread.join(patience)

    # What follows runs on the engine's own thread.

    def _main(self) -> None:
        try:
            self._build()
        except BaseException as error:  # noqa: BLE001  # carried to the thread that asked for the engine
            self._gone, self._failure = True, error
            return
        finally:
            self._started.set()
        stopped: BaseException = binding.closed()
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001  # carried to everybody who waits for answers
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error keeps no engine
            stopped = binding.died(error)
        with self._door:
            self._gone = True
            while not self._inbox.empty():
                if (late := self._inbox.get()) is not None:
                    self._runs.append(late)
        for run in self._runs:
            run.stop(stopped)
        self._runs.clear()
        self._tear_down()

    def _build(self) -> None:
        global _built
        with _turns:
            self._llm: vllm.LLM = binding.construct(self._model, self.arguments)
            _built += 1
        self._turns = _turns if binding.in_this_process(self._llm) else contextlib.nullcontext()
        self._watch = binding.outlived(self._llm)
        config = self._llm.llm_engine.vllm_config
        self._room = int(config.scheduler_config.max_num_seqs) + _WAITING
        self._longest = int(config.model_config.max_model_len)
        self._pooling = config.model_config.runner_type == "pooling"
        self._defaults = {} if self._pooling else dict(config.model_config.get_diff_sampling_param())
        self.refused = self._refused()

    def _refused(self) -> dict[str, InvalidRequest]:
        """What every request to an endpoint would fail of."""
        if self._pooling:
            error = binding.no_text()
            return {sampling.CHAT: error, sampling.RAW: error}
        no_template = binding.no_template(self._llm)
        return {} if no_template is None else {sampling.CHAT: no_template}

    def _tear_down(self) -> None:
        global _built
        if "_llm" not in self.__dict__:  # it could not be made again
            return
        with _turns:
            _built -= 1
            if self._watch is not None:
                self._watch.kill()
                self._watch.communicate()
            binding.shut_down(self.__dict__.pop("_llm"), last=_built == 0)
            gc.collect()
        binding.release_memory()

    def _turn(self) -> bool:
        """Hear, feed, step, deliver. False: stop."""
        if not self._hear():
            return False
        for run in [r for r in self._runs if r.closed.is_set()]:
            self._llm.llm_engine.abort_request(list(run.in_flight))
            self._runs.remove(run)
        self._feed()
        if any(run.in_flight for run in self._runs):
            self._step()
        for run in [r for r in self._runs if r.fed and not r.in_flight]:
            run.stop(None)
            self._runs.remove(run)
        return True

    def _hear(self) -> bool:
        """Take what is in the inbox; with nothing to do, wait for it."""
        while not self._runs or not self._inbox.empty():
            new = self._inbox.get()
            if new is None:
                return False
            self._runs.append(new)
        return True

    def _feed(self) -> None:
        """Hand packs in while there is room; the runs take turns."""
        for run in self._runs:
            if not run.fed and sum(len(r.in_flight) for r in self._runs) < self._room:
                pack = run.next_pack()
                run.fed = pack is None
                for ask in pack or ():
                    self._add(run, ask)

    def _add(self, run: Run, ask: Ask) -> None:
        name = f"pllm-{next(self._ids)}"
        try:
            inputs = binding.render(self._llm, ask.prompt, ask.template)
            length = len(inputs.get("prompt_token_ids") or ())
            if length >= self._longest + self._pooling:
                run.outbox.put(Refused(ask.key, "prompt_too_long", self._too_long(length)))
                return
            self._llm.llm_engine.add_request(name, inputs, self._parameters(ask.sampling))
        except binding.refusals() as error:
            kind = "empty_prompt" if not ask.prompt else binding.kind_of(error)
            run.outbox.put(Refused(ask.key, kind, binding.message_of(error)))
            return
        run.in_flight[name] = ask

    def _parameters(self, sampling: Mapping[str, Any]) -> vllm.SamplingParams:
        """Made once for all rows that share them; vLLM copies what it is given."""
        if self._last is None or self._last[0] is not sampling:
            make = binding.pooling_parameters if self._pooling else binding.sampling_parameters
            self._last = sampling, make({**self._defaults, **sampling})
        return self._last[1]

    def _too_long(self, length: int) -> str:
        return (
            f"the prompt has {length:,} tokens, and the model reads {self._longest:,}, its answer included;"
            " a larger engine={'max_model_len': ...} may be possible"
        )

    def _step(self) -> None:
        try:
            with self._turns:
                outputs = self._llm.llm_engine.step()
        except Exception as error:
            if not binding.is_out_of_memory(error):
                raise
            self._halve(error)
            return
        for output in outputs:
            if not output.finished:
                continue
            for run in self._runs:
                ask = run.in_flight.pop(output.request_id, None)
                if ask is not None:
                    run.outbox.put(Finished(ask.key, output))

    def _halve(self, error: Exception) -> None:
        """Go on with half as many requests at once; what was in flight is asked again."""
        seats = (self._room - _WAITING) // 2
        if seats < 1:
            raise error
        _logger.warning("out of memory: the engine is made again with max_num_seqs=%d", seats)
        asked = [(run, list(run.in_flight.values())) for run in self._runs]
        traceback.clear_frames(error.__traceback__)  # they hold the old engine's memory
        self._tear_down()
        self.arguments["max_num_seqs"] = seats
        self._build()
        for run, asks in asked:
            run.in_flight.clear()
            for ask in asks:
                self._add(run, ask)


class _Turns:
    """A lock that nobody takes twice in a row while another waits for it."""

    def __init__(self) -> None:
        self._next, self._now = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._now.acquire()

    def __exit__(self, *_: object) -> None:
        self._now.release()


# Engines of one process share vLLM's globals and torch's distributed state: one of them is built, takes a
# step or is closed at a time.
_turns = _Turns()
_built = 0

_engines: dict[str, Engine] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def running(
    model: str, arguments: Mapping[str, Any], packs: Iterator[Sequence[Ask]], *, endpoint: str
) -> Iterator[Run]:
    """A run of these requests; leaving early takes back what is in flight."""
    run = Run(packs)
    while not engine_for(model, arguments, endpoint=endpoint).take(run):
        pass  # somebody closed it between the two
    try:
        yield run
    finally:
        run.closed.set()


def engine_for(model: str, arguments: Mapping[str, Any], *, endpoint: str) -> Engine:
    """The engine of this configuration; made if this process has none yet.

    Others that nobody uses are closed if there is no room for it beside them. A model that cannot answer
    at `endpoint` raises InvalidRequest.
    """
    name = _name(model, arguments)
    with _lock:
        engine = _engines.get(name)
        if engine is None or not engine.alive:
            others = [other.arguments for other in _engines.values() if other.alive]
            if others and not binding.fits_beside(arguments, others):
                _close_idle()
            _engines[name] = Engine(model, arguments)
        try:
            engine = _started(name)
        except binding.OutOfMemory:
            if not _close_idle():
                raise
            _engines[name] = Engine(model, arguments)
            engine = _started(name)
    if endpoint in engine.refused:
        raise engine.refused[endpoint]
    return engine


def _started(name: str) -> Engine:
    """Wait until it is built. After Ctrl+C it goes on with that, for whoever asks next."""
    try:
        _engines[name].wait()
    except Exception:
        del _engines[name]
        raise
    return _engines[name]


def _close_idle() -> bool:
    idle = [name for name, engine in _engines.items() if engine.idle]
    for name in idle:
        _engines.pop(name).close()
    return bool(idle)


def close(model: str, arguments: Mapping[str, Any]) -> None:
    """Close the engine of this configuration, if there is one."""
    with _lock:
        engine = _engines.pop(_name(model, arguments), None)
    if engine is not None:
        engine.close()


def _name(model: str, arguments: Mapping[str, Any]) -> str:
    return f"{model} {sorted(arguments.items())!r}"


def close_all() -> None:
    """Close every engine of this process; also done at exit.

    One that another thread is just building is waited for as long as one that does not answer.
    """
    if not _lock.acquire(timeout=_PATIENCE):
        return
    try:
        for engine in _engines.values():
            engine.close(_PATIENCE)
        _engines.clear()
    finally:
        _lock.release()


def _forget() -> None:
    # A forked child has its parent's memory, and none of its threads.
    global _lock, _turns, _built
    _lock, _turns, _built = threading.Lock(), _Turns(), 0
    _engines.clear()


atexit.register(close_all)
os.register_at_fork(after_in_child=_forget)
