"""A cluster answers a column: Ray Data's own LLM processor, one execution for each evaluation."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from polars_llm.answer import DONE, FAILED, RETRY
from polars_llm.backends.replies import Reply, after_ctrl_c, frame
from polars_llm.backends.vllm import cluster, on_nodes, sampling
from polars_llm.backends.vllm.backend import LIVE_SCHEMA, VLLMBackend
from polars_llm.backends.vllm.on_nodes import ERROR, TEMPLATE_ERROR
from polars_llm.errors import InvalidRequest, PolarsLLMError
from polars_llm.request import Requests

__all__ = ["RayCluster"]

# Restarts of an engine that dies, and how often a block of rows that it had is asked again: enough for
# machines that come and go, and an end for an engine that dies of its rows or for want of memory.
_RESTARTS, _RETRIES = 8, 3
# Where nobody said how much an engine on CPUs may keep for attention states: as in local mode.
_CPU_SHARE, _CPU_MOST = 0.25, 4 << 30
_MEMORY_SETTINGS = {"kv_cache_memory_bytes", "gpu_memory_utilization", "num_gpu_blocks_override"}
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Ray Data's settings are of the process, not of a thread.
_current = threading.Lock()
_ANSWER = ("row", "text", "input_tokens", "output_tokens", "finish_reason", "vector", "seconds", ERROR)


class RayCluster(VLLMBackend):
    """One model and its settings on a cluster; every run starts its engines anew."""

    def __init__(
        self,
        model: str,
        *,
        digest: str | None,
        engine: Mapping[str, Any],
        concurrency: int | tuple[int, int],
        batch_size: int,
        accelerator_type: str | None,
        runtime_env: Mapping[str, Any],
        secrets: Mapping[str, str],
        ray_address: str | None,
        processor: Mapping[str, Any],
        **facts: Any,
    ) -> None:
        """`digest` is of a model on disk, `secrets` the environment that no log may show; for `facts` see
        `VLLMBackend`, for the others `pllm.RayVLLM`.
        """
        super().__init__(model, **facts)
        self._digest = digest
        self._engine = dict(engine)
        self._template = _text(self._engine.pop("chat_template", None))
        self._engines = (1, concurrency) if isinstance(concurrency, int) else concurrency
        self._concurrency = concurrency
        self._batch_size = batch_size
        self._accelerator = accelerator_type
        env = {**_ENVIRONMENT, **runtime_env.get("env_vars", {})}
        self._runtime_env = {**runtime_env, "env_vars": env}
        self._secrets = dict(secrets)
        self._address = ray_address
        self._processor = dict(processor)
        self._rendering = self._processor.pop("chat_template_stage", None) or {}

    def run(self, requests: Sequence[Requests]) -> Generator[pl.DataFrame, None, None]:
        """Answer them all in one execution; a block of replies as each block of rows is done.

        Raises
        ------
        InvalidRequest
            The cluster cannot run this: no GPU, no vLLM, not this model, no room.
        ProviderError
            The cluster stopped; what it answered before is kept.
        """
        for r in requests:
            self._check(r)
        self.note = "joining the Ray cluster"
        yield pl.DataFrame(schema=LIVE_SCHEMA)  # the time to show it
        ray = cluster.connect(self._address, self._engines[1])
        self.note = "starting engines on the Ray cluster"
        yield pl.DataFrame(schema=LIVE_SCHEMA)
        hidden = [v for v in (*self._secrets.values(), *self._runtime_env["env_vars"].values()) if len(v) > 7]
        with cluster.quiet():
            try:
                yield from self._blocks(ray, requests)
            except (PolarsLLMError, ImportError):
                raise
            except Exception as error:  # noqa: BLE001  # Ray Data raises what its stages raise
                # Not "from error": Ray's messages repeat what a runtime environment holds.
                raise cluster.failure(ray, self._model, error, hidden) from None

    def _blocks(self, ray: Any, requests: Sequence[Requests]) -> Iterator[pl.DataFrame]:
        keys, dataset = self._dataset(ray, requests)
        # One block at a time, and no thread of its own: what is not taken waits in the cluster's memory,
        # and whoever stops taking, or is interrupted while waiting, ends the execution.
        bundles = dataset.iter_internal_ref_bundles()
        began = since = time.monotonic()
        tokens = 0
        table: Any = None
        took = 0.0
        try:
            for bundle in bundles:
                for ref in bundle.block_refs:
                    table = ray.get(ref)
                    replies, seconds = self._replies(table, keys)
                    now = time.monotonic()
                    if since == began:  # until now it was the engines' start
                        began = since = now - min(seconds, now - began)
                    block = self._block(replies, now - since)
                    tokens += int(block["output_tokens"].sum())
                    self.note = f"{tokens / max(now - began, 1e-3):,.0f} tokens/s"
                    since, took = now, now - since
                    yield block
        except KeyboardInterrupt:
            bundles = dataset = None
            if table is None:
                raise
            # Perhaps the last one had not been handed over.
            yield from after_ctrl_c(lambda: self._block(self._replies(table, keys)[0], took))
        finally:
            # Ray ends an execution, and frees its engines, when nobody holds its iterator any more.
            bundles = dataset = None

    def _dataset(self, ray: Any, requests: Sequence[Requests]) -> tuple[pl.Series, Any]:
        """The keys by number of row, and what answers them."""
        chat = self._endpoint == sampling.CHAT
        embeds = self._endpoint == sampling.EMBEDDINGS
        settings = {**self._engine, "chat_template": self._template}
        secrets = on_nodes.Secrets(self._secrets)
        facts = cluster.look(
            ray,
            self._model,
            settings,
            digest=self._digest,
            chat=chat,
            runtime_env=self._runtime_env,
            secrets=secrets,
            gpu=self._accelerator,
        )
        placement = self._placement(ray, cpu_build=facts["cpu"])
        keys, tables = self._tables(requests)
        defaults = {} if embeds else facts["defaults"]
        columns = [{**defaults, **_column(r, embeds=embeds)} for r in requests]
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        with _current, ray.data.DataContext.current(context):
            rows = ray.data.from_arrow(tables)
            if chat:
                templates = [sampling.template_arguments(r.header) for r in requests]
                rows = self._rendered(ray, rows, settings, facts, templates, secrets)
            config = self._config(facts, placement)
            asks = on_nodes.Asks(columns, "pooling_params" if embeds else "sampling_params")
            longest = self._engine.get("max_model_len")
            answers = on_nodes.Answers(columns, facts["ends"], longest if isinstance(longest, int) else None)
            return keys, self._built(ray, config, asks, answers, len(tables))(rows)

    def _tables(self, requests: Sequence[Requests]) -> tuple[pl.Series, list[Any]]:
        """Blocks of neighbours, as Arrow; rows are known by their number."""
        keys: list[pl.Series] = []
        tables: list[Any] = []
        start = 0
        for column, r in enumerate(requests):
            rows, _ = self._arranged(r, budget=1 << 40)
            keys.append(rows["key"])
            sent = rows.drop("key").with_columns(
                pl.int_range(start, start + rows.height).alias("row"), pl.lit(column).alias("column")
            )
            tables += [part.to_arrow() for part in sent.iter_slices(self._batch_size)]
            start += rows.height
        return pl.concat(keys, rechunk=True), tables

    def _rendered(
        self,
        ray: Any,
        rows: Any,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        templates: list[dict[str, Any]],
        secrets: on_nodes.Secrets,
    ) -> Any:
        chosen = dict(self._rendering)
        most = chosen.pop("concurrency", self._engines[1])
        pool = (
            {"min_size": 1, "max_size": most}
            if isinstance(most, int)
            else dict(zip(("min_size", "max_size"), most, strict=True))
        )
        return rows.map_batches(
            on_nodes.Rendering,
            fn_constructor_args=(
                self._model,
                settings,
                facts["template"],
                facts["parts"],
                templates,
                secrets,
            ),
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(**pool),
            **{
                "batch_size": self._batch_size,
                "num_cpus": cluster.SMALL,
                "runtime_env": self._runtime_env,
                "max_restarts": _RESTARTS,
                "max_task_retries": _RETRIES,
                **chosen,
            },
        )

    def _placement(self, ray: Any, *, cpu_build: bool) -> Mapping[str, Any] | None:
        """What an engine takes of the cluster; None is the processor's own, a GPU for each worker."""
        given: Mapping[str, Any] | None = self._processor.get("placement_group_config")
        if given is not None:
            return given
        resources = ray.cluster_resources()
        cluster.check_accelerators(resources, kind=self._accelerator, cpu_build=cpu_build)
        workers = 1
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            said = self._engine.get(name) or 1
            if not isinstance(said, int):
                raise InvalidRequest(
                    f"engine={{{name!r}: {said!r}}}",
                    hint=f"it is a whole number: engine={{{name!r}: 2}}. Nothing was asked.",
                )
            workers *= said
        bundles = [{"CPU": 1.0} if cpu_build else {"GPU": 1.0}] * workers
        cluster.check_room(resources, bundles, self._engines[0])
        return {"bundles": bundles} if cpu_build else None

    def _config(self, facts: Mapping[str, Any], placement: Any) -> Any:
        import pydantic
        from ray.data.llm import vLLMEngineProcessorConfig

        metrics = bool(self._processor.get("log_engine_metrics", False))
        engine: dict[str, Any] = {
            # A model that is free to put whitespace between JSON tokens may never stop doing so.
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
            "disable_log_stats": not metrics,
            "hf_token": on_nodes.Secrets(self._secrets, engine=True),
            **{name: value for name, value in self._engine.items() if value is not None},
        }
        if facts["cpu"] and not _MEMORY_SETTINGS & engine.keys():
            room = _CPU_SHARE * facts["memory"] / self._engines[1]
            engine["kv_cache_memory_bytes"] = int(min(_CPU_MOST, room))
        own = {"log_engine_metrics": metrics, "max_concurrent_batches": 8}
        try:
            return vLLMEngineProcessorConfig(
                model_source=self._model,
                engine_kwargs=engine,
                task_type="embed" if self._endpoint == sampling.EMBEDDINGS else "generate",
                batch_size=self._batch_size,
                concurrency=self._concurrency,
                accelerator_type=self._accelerator,
                runtime_env=self._runtime_env,
                should_continue_on_error=True,
                chat_template_stage=False,
                tokenize_stage=False,
                detokenize_stage=False,
                **{**own, **self._processor, "placement_group_config": placement},
            )
        except pydantic.ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InvalidRequest(
                f"Ray's processor does not take this: {wrong}",
                hint="docs/ray.md has what processor={...} may hold. Nothing was asked.",
            ) from None

    def _built(
        self, ray: Any, config: Any, asks: on_nodes.Asks, answers: on_nodes.Answers, blocks: int
    ) -> Any:
        from ray.data.llm import build_processor

        # Ray Data warns of more tasks than it has blocks.
        pool = ray.data.TaskPoolStrategy(size=min(1 + self._engines[1], blocks))
        light = {"num_cpus": cluster.SMALL, "compute": pool}
        processor = build_processor(
            config,
            preprocess=asks,
            postprocess=answers,
            preprocess_map_kwargs=light,
            postprocess_map_kwargs=light,
        )
        stage = processor.get_stage_by_name("vLLMEngineStage")
        # In place: to set the attribute would make the stage forget its placement.
        stage.map_batches_kwargs.update(max_restarts=_RESTARTS, max_task_retries=_RETRIES)
        return processor

    def _replies(self, table: Any, keys: pl.Series) -> tuple[pl.DataFrame, float]:
        """A block as replies, and the seconds that its longest row took."""
        found = [name for name in _ANSWER if name in table.column_names]
        rows: list[dict[str, Any]] = table.select(found).to_pylist()
        seconds = max((row.get("seconds") or 0.0 for row in rows), default=0.0)
        made = frame([_reply(keys[row["row"]], row) for row in rows])
        return made.with_columns(cost_usd=pl.lit(None, pl.Float64)), seconds


def _text(template: Any) -> Any:
    """A template that was given as a file: the nodes may not have it."""
    if isinstance(template, (str, Path)) and "\n" not in str(template) and len(str(template)) < 4_096:
        path = Path(template).expanduser()
        return path.read_text() if path.is_file() else template
    return template


def _column(requests: Requests, *, embeds: bool) -> dict[str, Any]:
    asked = sampling.arguments(requests.header, 0)
    return {k: v for k, v in asked.items() if k == "dimensions"} if embeds else asked


def _reply(key: bytes, row: Mapping[str, Any]) -> Reply:
    if message := row.get(ERROR):
        state, kind, said = _refusal(message)
        return {"key": key, "state": state, "error": kind, "error_message": said}
    return {
        "key": key,
        "state": DONE,
        "text": row["text"],
        "finish_reason": row["finish_reason"],
        "input_tokens": row["input_tokens"],
        "output_tokens": row["output_tokens"],
        "vector": row.get("vector"),
    }


# What one row is refused for, whatever engine has it; all else may pass when it is asked again.
_FOR_GOOD = ("VLLM", "ValueError", "TypeError", "ValidationError", TEMPLATE_ERROR, "NotImplementedError")
_TOO_LONG = re.compile(r"maximum context length|longer than the maximum model length")
_EMPTY = re.compile(r"EmptyPrompt|prompt cannot be empty|'prompt_token_ids' must be provided")


def _refusal(message: str) -> tuple[int, str, str]:
    """State, kind and text of a row that the engine did not answer."""
    # What vLLM adds in brackets may be the whole prompt.
    said = re.sub(r" \(parameter=.*\Z", "", message, flags=re.DOTALL)
    said = re.sub(r"\A(VLLM\w+|TemplateError): ", "", said)[:2_000]
    if _TOO_LONG.search(said):
        return FAILED, "prompt_too_long", said
    if _EMPTY.search(said):
        return FAILED, "empty_prompt", "the prompt is empty, and this model cannot read that"
    if message.startswith(_FOR_GOOD):
        return FAILED, "invalid_request", said
    return RETRY, "engine_error", said
