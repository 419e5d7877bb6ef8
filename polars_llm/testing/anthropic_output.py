"""Anthropic's answers: a message, and the shape of an error."""

from __future__ import annotations

import hashlib
from typing import Any

from .anthropic_input import cached_for, cached_prefix
from .dialogue import Failure, ModelRequest, Reply, Usage, count_tokens
from .openai_output import new_id

_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_STOP_REASONS = {
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "stop_sequence": "stop_sequence",
    "refusal": "refusal",
    "content_filter": "refusal",
}


def anthropic_error(failure: Failure, request_id: str) -> dict[str, Any]:
    usual = "api_error" if failure.status >= 500 else "invalid_request_error"
    type_ = failure.type or _TYPES.get(failure.status, usual)
    error = {"type": type_, "message": failure.message}
    return {"type": "error", "error": error, "request_id": request_id}


def anthropic_body(
    request: ModelRequest, reply: Reply, usage: Usage, *, prefix_known: bool
) -> dict[str, Any]:
    """The message of a successful answer."""
    reason = _STOP_REASONS.get(reply.finish or "", "end_turn")
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "model": request.model,
        "content": _content(request, reply),
        "stop_reason": reason,
        "stop_sequence": reply.stopped_by,
        "stop_details": None,
        "container": None,
        "usage": _usage(request, usage, prefix_known=prefix_known),
    }


def prefix_digest(request: ModelRequest) -> str:
    """Names the cached prefix of a request; empty if it asks for no caching."""
    prefix = cached_prefix(request)
    return hashlib.sha256(f"{request.model}\0{prefix}".encode()).hexdigest() if prefix else ""


def _content(request: ModelRequest, reply: Reply) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    thinking = request.body.get("thinking") or {}
    if thinking.get("type") in ("adaptive", "enabled"):
        blocks.append({"type": "thinking", "thinking": "Let me see.", "signature": "emulated"})
    blocks += [{"type": "text", "text": text} for text in reply.texts if text]
    for tool in reply.tools:
        facts = {"id": new_id("toolu_"), "name": tool.name, "input": tool.arguments}
        blocks.append({"type": "tool_use", **facts})
    return blocks


def _usage(request: ModelRequest, usage: Usage, *, prefix_known: bool) -> dict[str, Any]:
    """Cached tokens are counted beside the input, not in it."""
    prefix = count_tokens(cached_prefix(request))
    read = usage.cached_tokens or (prefix if prefix_known else 0)
    written = usage.cache_write_tokens or (0 if prefix_known else prefix)
    hour = cached_for(request) == "1h"
    thinks = (request.body.get("thinking") or {}).get("type") in ("adaptive", "enabled")
    return {
        "input_tokens": max(0, usage.input_tokens - read - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": 0 if hour else written,
            "ephemeral_1h_input_tokens": written if hour else 0,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens} if thinks else None,
        "service_tier": "batch" if request.mode == "batch" else "standard",
        "inference_geo": request.body.get("inference_geo") or "global",
    }
