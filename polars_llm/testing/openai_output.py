"""OpenAI's answers: chat completions, responses, embeddings, and the shape of an error."""

from __future__ import annotations

import base64
import random
import time
from array import array
from typing import Any

import msgspec

from .dialogue import Failure, ModelRequest, Reply, ToolCall, Usage

_TYPES = {
    429: "requests",
    500: "server_error",
    502: "server_error",
    503: "server_error",
    504: "server_error",
}
_CODES = {401: "invalid_api_key", 404: None, 429: "rate_limit_exceeded"}


def new_id(prefix: str) -> str:
    return f"{prefix}{random.getrandbits(128):032x}"


def openai_error(failure: Failure) -> dict[str, Any]:
    return {
        "error": {
            "message": failure.message,
            "type": failure.type or _TYPES.get(failure.status, "invalid_request_error"),
            "param": failure.param,
            "code": failure.code or _CODES.get(failure.status),
        }
    }


def openai_body(request: ModelRequest, reply: Reply, usage: Usage) -> dict[str, Any]:
    """The body of a successful answer, at the request's endpoint."""
    return _WRITERS[request.endpoint](request, reply, usage)


def _chat(request: ModelRequest, reply: Reply, usage: Usage) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.text, "refusal": None}
    finish: str = reply.finish or "stop"
    if finish == "refusal":
        message["content"], message["refusal"], finish = None, reply.text, "stop"
    message["annotations"] = []
    if reply.tools:
        message["content"] = reply.text or None
        message["tool_calls"] = [_chat_tool(tool) for tool in reply.tools]
    finish = "stop" if finish == "stop_sequence" else finish
    choices = [
        {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
        for index in range(request.body.get("n") or 1)
    ]
    return {
        "id": new_id("chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": choices,
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        "service_tier": _tier(request),
        "system_fingerprint": None,
    }


def _tier(request: ModelRequest) -> str:
    """The tier that was asked for; a batch has none, and what is left to the project is the standard one."""
    asked = request.body.get("service_tier")
    return "default" if request.mode == "batch" or asked in (None, "auto") else str(asked)


def _chat_tool(tool: ToolCall) -> dict[str, Any]:
    arguments = msgspec.json.encode(tool.arguments).decode()
    return {
        "id": new_id("call_"),
        "type": "function",
        "function": {"name": tool.name, "arguments": arguments},
    }


def _responses(request: ModelRequest, reply: Reply, usage: Usage) -> dict[str, Any]:
    body = request.body
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reply.finish or "")
    status = "incomplete" if reason else "completed"
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": body.get("instructions"),
        "max_output_tokens": request.max_tokens,
        "model": request.model,
        "output": _response_items(reply, status),
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": (body.get("reasoning") or {}).get("effort"), "summary": None},
        "store": body.get("store", True),
        "temperature": body.get("temperature", 1.0),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools", []),
        "top_p": body.get("top_p", 1.0),
        "truncation": "disabled",
        "user": None,
        "metadata": body.get("metadata") or {},
        "service_tier": _tier(request),
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": usage.cache_write_tokens,
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.input_tokens + usage.output_tokens,
        },
    }


def _response_items(reply: Reply, status: str) -> list[dict[str, Any]]:
    # A reasoning item comes first, as reasoning models send it: a reader must not take output[0].
    items: list[dict[str, Any]] = [{"id": new_id("rs_"), "type": "reasoning", "summary": []}]
    if reply.finish == "refusal":
        content: list[dict[str, Any]] = [{"type": "refusal", "refusal": reply.text}]
    else:
        content = [
            {"type": "output_text", "annotations": [], "logprobs": [], "text": text} for text in reply.texts
        ]
    if content or not reply.tools:
        message = {"id": new_id("msg_"), "type": "message", "status": status, "role": "assistant"}
        items.append({**message, "content": content})
    for tool in reply.tools:
        arguments = msgspec.json.encode(tool.arguments).decode()
        ids = {"id": new_id("fc_"), "call_id": new_id("call_"), "status": "completed"}
        items.append({"type": "function_call", **ids, "name": tool.name, "arguments": arguments})
    return items


def _embeddings(request: ModelRequest, reply: Reply, usage: Usage) -> dict[str, Any]:
    vectors: list[Any] = list(reply.vectors or [])
    if request.body.get("encoding_format") == "base64":
        vectors = [base64.b64encode(array("f", v).tobytes()).decode() for v in vectors]
    data = [
        {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
    ]
    tokens = usage.input_tokens
    return {
        "object": "list",
        "data": data,
        "model": request.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


_WRITERS = {
    "/v1/chat/completions": _chat,
    "/v1/responses": _responses,
    "/v1/embeddings": _embeddings,
}
