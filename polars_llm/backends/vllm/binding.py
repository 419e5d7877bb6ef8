"""What this library calls of vLLM: building an engine, rendering a request, reading its errors.

Written for vLLM 0.32 (docs/local.md says which versions are tested). Nothing else imports it at run time.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polars_llm.errors import InvalidRequest, ProviderError
from polars_llm.stacks import stacks

if TYPE_CHECKING:
    import vllm

__all__ = [
    "OutOfMemory",
    "closed",
    "construct",
    "died",
    "fits_beside",
    "in_this_process",
    "is_memory",
    "is_out_of_memory",
    "kind_of",
    "message_of",
    "no_template",
    "no_text",
    "outlived",
    "pooling_parameters",
    "refusals",
    "release_memory",
    "render",
    "sampling_parameters",
    "shut_down",
]

_IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
_GIB = 1 << 30
# Of the memory that is free, where nobody said how much a CPU engine may keep for attention states.
_CPU_SHARE, _CPU_MOST = 0.25, 4 * _GIB
_DEFAULT_UTILISATION = 0.92  # vLLM's own
_ALL_OF_A_GPU = 0.95


class OutOfMemory(ProviderError):
    """The model, or its attention states, do not fit."""


def construct(model: str, arguments: Mapping[str, Any]) -> vllm.LLM:
    """Build an engine, in this process where vLLM would otherwise have to start the script again.

    Raises
    ------
    ImportError
        vLLM is not installed.
    OutOfMemory
        With the two settings to change.
    ProviderError
        What else vLLM says.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what they import, for their developers
        return _construct(model, arguments)


def _construct(model: str, arguments: Mapping[str, Any]) -> vllm.LLM:
    _import()
    import vllm

    chosen = {
        "disable_log_stats": True,
        "use_tqdm_on_load": False,  # beside a progress bar of ours
        # A model that is free to put whitespace between JSON tokens may never stop doing so.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        **_memory(arguments),
        **{name: value for name, value in arguments.items() if value is not None},
    }
    with _multiprocessing(), _random_state():
        try:
            return vllm.LLM(model=model, **chosen)
        except Exception as error:
            if _is_memory(error):
                raise _out_of_memory(error) from error
            said = str(error)
            if isinstance(token := arguments.get("hf_token"), str) and token:
                said = said.replace(token, "***")
            raise ProviderError(
                f"vLLM could not start {model}: {said}",
                provider="vllm",
                hint=f"{_mend(model, error)} Nothing was asked.",
            ) from (None if said != str(error) else error)


def _mend(model: str, error: Exception) -> str:
    if isinstance(error, TypeError) and "unexpected keyword" in str(error):
        return "engine= takes the settings of vllm.LLM, by its own names."
    if not Path(model).exists():
        return (
            f"there is no directory {model!r} here, so that it was looked up at the hub. A name there is"
            " ORGANISATION/MODEL; a gated one needs HF_TOKEN; HF_HUB_OFFLINE=1 forbids to fetch it."
        )
    return (
        "VLLM_LOGGING_LEVEL=INFO shows its log. If it speaks of memory, set"
        f" engine={{'max_model_len': ..., {_memory_setting()!r}: ...}}."
    )


def _import() -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing leaves this machine
    try:
        import vllm
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "vllm":
            raise ImportError(
                "Models of your own need vLLM.\n\nHint: pip install 'polars-llm-batch[vllm]' on a machine"
                " with a GPU; without one, in an environment of its own: see docs/local.md."
            ) from error
        raise ImportError(
            f"vLLM is installed and cannot be imported: {type(error).__name__}: {error}\n\nHint: its packages"
            " do not fit each other or this machine; docs/local.md says what to install, and what to leave"
            " out without a GPU."
        ) from error
    del vllm


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _memory(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Room for attention states on a CPU: vLLM's own default there wants nearly all of the memory."""
    said = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
    if not _is_cpu() or said & arguments.keys() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return {}
    import psutil  # comes with vLLM

    return {"kv_cache_memory_bytes": int(min(_CPU_MOST, _CPU_SHARE * psutil.virtual_memory().available))}


@contextlib.contextmanager
def _multiprocessing() -> Iterator[None]:
    """Where the user has not said it: an engine in this process on a CPU, and where it would have to be
    started by a script that cannot be imported again.

    Raises
    ------
    InvalidRequest
        It was asked for, and cannot work from here.
    """
    said = os.environ.get(_IN_PROCESS)
    if said is not None:
        if said != "0" and _spawns() and not _can_be_imported():
            raise InvalidRequest(
                f"{_IN_PROCESS}={said} starts the engine in a new process, which runs this script again",
                hint='put what the script does below `if __name__ == "__main__":`, or leave the variable out.'
                " Nothing was asked.",
            )
        yield
        return
    if _is_cpu() or not _can_be_imported():
        os.environ[_IN_PROCESS] = "0"
    try:
        yield
    finally:
        os.environ.pop(_IN_PROCESS, None)


def _spawns() -> bool:
    import torch

    method = os.environ.get("VLLM_WORKER_MULTIPROCESSING_METHOD", multiprocessing.get_start_method(True))
    return _is_cpu() or method == "spawn" or torch.cuda.is_initialized()


def _can_be_imported() -> bool:
    """False if the main script is at work outside of ``if __name__ == "__main__"``."""
    main = sys.modules.get("__main__")
    source = getattr(main, "__file__", None)
    frame = stacks().get(threading.main_thread().ident or 0)
    while frame is not None and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if frame is None or source is None or not Path(source).is_file():
        return True  # a notebook, a terminal, a test runner
    for node in ast.parse(Path(source).read_text()).body:
        if node.lineno <= frame.f_lineno <= (node.end_lineno or node.lineno):
            return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)
    return True


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """vLLM seeds the generators of its process: in ours that would repeat the user's random numbers."""
    numpy = sys.modules.get("numpy")
    own, of_numpy = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def render(llm: vllm.LLM, prompt: str | list[dict[str, Any]], template: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids of a text as it is, or of messages in the model's chat template."""
    from vllm.renderers import ChatParams, merge_kwargs

    renderer = llm.llm_engine.renderer
    if isinstance(prompt, str):
        (rendered,) = renderer.render_cmpl([{"prompt": prompt}])
        return rendered  # type: ignore[no-any-return]
    ours = {"add_generation_prompt": True, "continue_final_message": False, "tools": None, "tokenize": False}
    params = ChatParams(
        chat_template=llm.chat_template,
        chat_template_content_format="auto",
        chat_template_kwargs=merge_kwargs(dict(template), ours),
    )
    # The template writes the special tokens itself.
    tokens = renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
    _, (rendered,) = renderer.render_chat([prompt], params, tokens)
    return rendered  # type: ignore[no-any-return]


def no_template(llm: vllm.LLM) -> InvalidRequest | None:
    """The error for a model without a chat template: every row would fail of it."""
    from vllm.renderers.chat_utils import ChatTemplateResolutionError

    try:
        render(llm, [{"role": "user", "content": "Hello"}], {})
    except ChatTemplateResolutionError:
        return InvalidRequest(
            "This model has no chat template.",
            hint="pllm.VLLM(..., raw=True) sends the text as it is; or give one with"
            " engine={'chat_template': ...}. Nothing was asked.",
        )
    return None


def no_text() -> InvalidRequest:
    """The error for a model that gives vectors, where text was asked for."""
    return InvalidRequest(
        "This model gives vectors, not text.",
        hint="df.llm.embed(...) asks it. Nothing was asked.",
    )


def sampling_parameters(arguments: Mapping[str, Any]) -> vllm.SamplingParams:
    """vLLM's own value; raises one of `refusals`."""
    import vllm
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    chosen = dict(arguments)
    if chosen.get("structured_outputs"):
        # Of vLLM's own call: where warnings are errors (a test suite), every typed answer would fail.
        warnings.filterwarnings("ignore", "max_rollback_tokens is deprecated", DeprecationWarning)
        chosen["structured_outputs"] = StructuredOutputsParams(**chosen["structured_outputs"])
    return vllm.SamplingParams(**chosen, output_kind=RequestOutputKind.FINAL_ONLY)


def pooling_parameters(arguments: Mapping[str, Any]) -> vllm.PoolingParams:
    """vLLM's own value, for embeddings."""
    import vllm

    return vllm.PoolingParams(task="embed", **arguments)


def refusals() -> tuple[type[Exception], ...]:
    """What vLLM raises where one request is wrong, and the engine is well."""
    from vllm.exceptions import VLLMClientError

    return (VLLMClientError, ValueError, TypeError)


def kind_of(error: Exception) -> str:
    """What a refusal is counted as."""
    too_long = getattr(error, "parameter", None) in {"input_text", "input_tokens"}
    return "prompt_too_long" if too_long else "invalid_request"


def message_of(error: Exception) -> str:
    """The fact alone: what vLLM prints beside it may be the whole prompt."""
    return str(error.args[0])[:2_000] if error.args else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """True for an engine in this process that ran out of memory at work."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


_MEMORY_WORDS = (
    "out of memory",
    "less than desired",
    "no available memory",
    "to serve at least one request",
    "kv cache",
    "cannot allocate memory",
    "can't allocate memory",
)


def is_memory(text: str) -> bool:
    """Whether an error speaks of memory."""
    return any(word in text.lower() for word in _MEMORY_WORDS)


def _is_memory(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or is_memory(str(seen)):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _memory_setting() -> str:
    return "kv_cache_memory_bytes" if _is_cpu() else "gpu_memory_utilization"


def _out_of_memory(error: BaseException) -> OutOfMemory:
    where = _memory_setting()
    return OutOfMemory(
        f"There is not enough memory for this model: {error}",
        provider="vllm",
        kind="out_of_memory",
        hint=f"set engine={{'max_model_len': ..., {where!r}: ...}}: a shorter context needs less, and"
        f" {where} is what the engine may take. Nothing was asked.",
    )


def died(error: BaseException) -> ProviderError:
    """For everybody who waits for an engine that has failed."""
    if isinstance(error, ProviderError):
        return error
    if _is_memory(error):
        hint = (
            "set engine={'max_num_seqs': ..., 'gpu_memory_utilization': ...} lower, then run the same line"
            " again: what was answered is kept."
        )
        return OutOfMemory(
            f"The engine ran out of memory: {error}", provider="vllm", kind="out_of_memory", hint=hint
        )
    made = ProviderError(
        f"The engine stopped: {type(error).__name__}: {error}",
        provider="vllm",
        hint="run the same line again: what was answered is kept, and a new engine is made.",
    )
    made.__cause__ = error
    return made


def closed() -> ProviderError:
    """For everybody who waits for an engine that somebody closed."""
    return ProviderError(
        "The engine was closed while it worked.",
        provider="vllm",
        hint="run the same line again: what was answered is kept.",
    )


def fits_beside(arguments: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> bool:
    """Whether another engine may stay: asked before anything is allocated."""
    if not others or _is_cpu():
        return True
    shares = (a.get("gpu_memory_utilization") or _DEFAULT_UTILISATION for a in (arguments, *others))
    return float(sum(shares)) <= _ALL_OF_A_GPU


def in_this_process(llm: vllm.LLM) -> bool:
    """False for an engine that vLLM has started a process for."""
    return hasattr(llm.llm_engine.engine_core, "engine_core")


# It waits for the end of its input, which comes when we are gone; psutil knows a process from a later one
# with its number.
_AFTER_US = """
import contextlib, sys
import psutil

engines = []
for pid in sys.argv[1:]:
    with contextlib.suppress(psutil.NoSuchProcess):
        engines.append(psutil.Process(int(pid)))
sys.stdin.buffer.read()
for engine in engines:
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*engine.children(recursive=True), engine]:
            process.kill()
"""


def outlived(llm: vllm.LLM) -> subprocess.Popen[bytes] | None:
    """A small process that ends an engine in a process of its own if this one is killed.

    vLLM leaves it alive, with all of its memory: the evaluation that goes on would find none. None for an
    engine in this process.
    """
    if in_this_process(llm):
        return None
    processes = getattr(llm.llm_engine.engine_core.resources.engine_manager, "processes", None)
    if not processes:
        return None  # where a cluster started it
    return subprocess.Popen(
        [sys.executable, "-c", _AFTER_US, *(str(process.pid) for process in processes)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl+C is not meant for it
    )


def shut_down(llm: vllm.LLM, *, last: bool) -> None:
    """End an engine. The shutdown of one in this process also takes down the distributed state, which all
    engines of a process share: unless it is the `last`, its parts are closed one by one.
    """
    client = llm.llm_engine.engine_core
    core = getattr(client, "engine_core", None)
    if last or core is None:
        client.shutdown()
        return
    client._finalizer.detach()  # it would call the same shutdown
    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # as vLLM does: what it froze at its start could never be freed


def release_memory() -> None:
    """Give back what a closed engine has left in torch's cache."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
