"""Anthropic request bodies: what they must be, and what they ask of a model."""

from __future__ import annotations

from typing import Any, Literal

from .dialogue import ModelRequest, body_digest, count_tokens, refuse
from .schema_rules import check_anthropic_schema, check_references

VERSIONS = ("2023-06-01", "2026-10-21")
WITHOUT_SAMPLING = "2026-10-21"
IMAGE_TOKENS = 85
_SAMPLING = ("temperature", "top_p", "top_k")
_MOST_OUTPUT = 128_000
_MOST_OUTPUT_EXTENDED = 300_000


def read_anthropic(
    params: Any,
    *,
    version: str,
    mode: Literal["batch", "realtime"] = "realtime",
    custom_id: str | None = None,
    extended: bool = False,
    counting: bool = False,
) -> ModelRequest:
    """Check a body as the provider does, and say what it asks. Raises Refused."""
    if not isinstance(params, dict):
        raise refuse("params: Input should be a valid dictionary")
    model = params.get("model")
    if not isinstance(model, str) or not model:
        raise refuse("model: Field required")
    if not counting:
        _check_limit(params, _MOST_OUTPUT_EXTENDED if extended else _MOST_OUTPUT)
    _check_sampling(params, version)
    if params.get("stream"):
        raise refuse("stream: streaming is not supported here")
    if mode == "batch" and "speed" in params:
        raise refuse("speed: not supported in batches")
    if "output_format" in params:
        raise refuse("output_format: Extra inputs are not permitted. Use output_config.format.")
    prompt, tokens = _messages(params.get("messages"))
    system = _text(params.get("system") or "", "system")[0]
    return ModelRequest(
        endpoint="/v1/messages",
        mode=mode,
        custom_id=custom_id,
        model=model,
        prompt=prompt,
        system=system,
        body=params,
        max_tokens=params.get("max_tokens"),
        schema=_schema(params),
        stop=params.get("stop_sequences") or [],
        input_tokens=tokens + count_tokens(system),
        digest=body_digest(params),
    )


def cached_prefix(request: ModelRequest) -> str:
    """The text up to the last cache mark of system prompt or request; empty if there is none."""
    if request.body.get("cache_control"):
        return (request.system or "") + request.prompt
    blocks = _system_blocks(request)
    marks = [place for place, block in enumerate(blocks) if block.get("cache_control")]
    return "".join(block["text"] for block in blocks[: marks[-1] + 1]) if marks else ""


def cached_for(request: ModelRequest) -> str:
    """How long what is marked is kept: "5m" or "1h"."""
    marks = [holder.get("cache_control") for holder in (*_system_blocks(request), request.body)]
    return next((mark.get("ttl", "5m") for mark in reversed(marks) if mark), "5m")


def _system_blocks(request: ModelRequest) -> list[dict[str, Any]]:
    system = request.body.get("system")
    return system if isinstance(system, list) else []


def _check_limit(params: dict[str, Any], most: int) -> None:
    if "max_tokens" not in params:
        raise refuse("max_tokens: Field required")
    limit = params["max_tokens"]
    if isinstance(limit, bool) or not isinstance(limit, int):
        raise refuse("max_tokens: Input should be a valid integer")
    if limit < 1:
        raise refuse("max_tokens: Input should be greater than or equal to 1")
    if limit > most:
        raise refuse(f"max_tokens: {limit} > {most}, which is the maximum allowed")


def _check_sampling(params: dict[str, Any], version: str) -> None:
    for name in _SAMPLING:
        if name in params and version >= WITHOUT_SAMPLING:
            raise refuse(f"{name}: Extra inputs are not permitted")
    temperature = params.get("temperature", 1)
    if not isinstance(temperature, int | float) or not 0 <= temperature <= 1:
        raise refuse("temperature: range: 0..1")


def _messages(messages: Any) -> tuple[str, int]:
    """The last user message's text, and what all messages count."""
    if not isinstance(messages, list):
        raise refuse("messages: Field required")
    if not messages:
        raise refuse("messages: at least one message is required")
    prompt, tokens = "", 0
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise refuse(f"messages.{place}.role: Input should be 'user' or 'assistant'")
        text, others = _text(message.get("content"), f"messages.{place}.content")
        if not text.strip() and not others:
            raise refuse(f"messages.{place}: all messages must have non-empty content")
        tokens += count_tokens(text) + others * IMAGE_TOKENS
        prompt = text if message["role"] == "user" else prompt
    if messages[-1]["role"] == "assistant":
        raise refuse(
            "This model does not support assistant message prefill. The conversation must end "
            "with a user message."
        )
    return prompt, tokens


def _text(content: Any, where: str) -> tuple[str, int]:
    """A content's text, and how many of its blocks are something else."""
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, list):
        raise refuse(f"{where}: Input should be a valid string or list")
    texts = []
    for place, block in enumerate(content):
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise refuse(f"{where}.{place}.type: Field required")
        if block["type"] == "text":
            if not isinstance(block.get("text"), str) or not block["text"]:
                raise refuse(f"{where}.{place}.text: text content blocks must be non-empty")
            texts.append(block["text"])
    return "".join(texts), len(content) - len(texts)


def _schema(params: dict[str, Any]) -> dict[str, Any] | None:
    format_ = (params.get("output_config") or {}).get("format")
    if format_ is None:
        return None
    if not isinstance(format_, dict) or format_.get("type") != "json_schema":
        raise refuse("output_config.format.type: Input should be 'json_schema'")
    schema = format_.get("schema")
    if not isinstance(schema, dict):
        raise refuse("output_config.format.schema: Field required")
    check_references(schema, "output_config.format.schema")
    check_anthropic_schema(schema)
    return schema
