"""OpenAI request bodies: what they must be, and what they ask of a model."""

from __future__ import annotations

import re
from typing import Any, Literal

from .dialogue import ModelRequest, body_digest, count_tokens, refuse
from .schema_rules import check_openai_schema, check_references

ENDPOINTS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
IMAGE_TOKENS = 85
_ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}
_NAME = re.compile(r"^[a-zA-Z0-9_-]{1,64}$")
_REASONING = re.compile(r"^(o\d|gpt-[5-9])")
_NO_SAMPLING = re.compile(r"^gpt-6\.2")
Mode = Literal["batch", "realtime"]


def read_openai(
    endpoint: str, body: Any, *, mode: Mode = "realtime", custom_id: str | None = None
) -> ModelRequest:
    """Check a body as the provider does, and say what it asks. Raises Refused."""
    if not isinstance(body, dict):
        raise refuse("We could not parse the JSON body of your request: expected an object.")
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise refuse("you must provide a model parameter", param="model")
    if body.get("stream"):
        message = "Unsupported value: 'stream' is not supported here."
        raise refuse(message, code="unsupported_value", param="stream")
    facts = _READERS[endpoint](body)
    return ModelRequest(
        endpoint=endpoint,
        mode=mode,
        custom_id=custom_id,
        model=body["model"],
        body=body,
        digest=body_digest(body),
        **facts,
    )


def embedding_dimensions(body: dict[str, Any]) -> int:
    given = body.get("dimensions")
    return given if isinstance(given, int) else _DIMENSIONS.get(body["model"], 1536)


def count_inputs(body: dict[str, Any]) -> int:
    """How many embedding inputs a body holds."""
    given = body.get("input")
    return len(given) if isinstance(given, list) and not _is_tokens(given) else 1


def _read_chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise refuse("Missing required parameter: 'messages'.", param="messages", code=_MISSING)
    if not messages:
        message = "Invalid 'messages': empty array. Expected an array with minimum length 1."
        raise refuse(message, param="messages", code="empty_array")
    spoken = _spoken(messages, "messages")
    _check_sampling(body, "max_tokens")
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    _check_limit(limit, "max_completion_tokens", 1)
    stop = body.get("stop") or []
    format_ = body.get("response_format") or {}
    schema = _schema(format_, format_.get("json_schema"), "response_format")
    return {
        **spoken,
        **_format(format_, schema, spoken, "messages"),
        "max_tokens": limit,
        "stop": [stop] if isinstance(stop, str) else stop,
    }


def _read_responses(body: dict[str, Any]) -> dict[str, Any]:
    given = body.get("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise refuse("Missing required parameter: 'input'.", param="input", code=_MISSING)
    spoken = _spoken(given, "input")
    if isinstance(body.get("instructions"), str):
        spoken["system"] = body["instructions"] + spoken["system"]
        spoken["input_tokens"] += count_tokens(body["instructions"])
    _check_sampling(body, "max_tokens")
    limit = body.get("max_output_tokens")
    _check_limit(limit, "max_output_tokens", 16)
    format_ = (body.get("text") or {}).get("format") or {}
    schema = _schema(format_, format_, "text.format")
    return {**spoken, **_format(format_, schema, spoken, "input"), "max_tokens": limit}


def _read_embeddings(body: dict[str, Any]) -> dict[str, Any]:
    given = body.get("input")
    if isinstance(given, str) or (isinstance(given, list) and _is_tokens(given)):
        given = [given]
    if not isinstance(given, list) or not given:
        raise refuse("Missing required parameter: 'input'.", param="input", code=_MISSING)
    if len(given) > 2048:
        raise refuse("Invalid 'input': array too long. Expected at most 2048.", param="input")
    texts: list[str] = []
    tokens = 0
    for item in given:
        if not isinstance(item, str | list) or not item:
            raise refuse("'$.input' is invalid: an input is empty or of a wrong type.")
        texts.append(item if isinstance(item, str) else " ".join(map(str, item)))
        here = count_tokens(item) if isinstance(item, str) else len(item)
        if here > 8192:
            raise refuse("This model's maximum context length is 8192 tokens.", param="input")
        tokens += here
    _check_embedding_options(body)
    return {"prompt": texts[0], "inputs": texts, "input_tokens": tokens}


def _check_embedding_options(body: dict[str, Any]) -> None:
    given, model = body.get("dimensions"), body["model"]
    if given is not None:
        most = _DIMENSIONS.get(model, 16_384)
        if model == "text-embedding-ada-002":
            raise refuse("This model does not support specifying dimensions.", param="dimensions")
        if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= most:
            message = f"Invalid value for 'dimensions' = {given}. Must be from 1 to {most}."
            raise refuse(message, param="dimensions")
    if body.get("encoding_format", "float") not in ("float", "base64"):
        raise refuse("Invalid 'encoding_format'.", param="encoding_format")


_MISSING = "missing_required_parameter"
_READERS = {
    "/v1/chat/completions": _read_chat,
    "/v1/responses": _read_responses,
    "/v1/embeddings": _read_embeddings,
}


def _is_tokens(given: list[Any]) -> bool:
    return bool(given) and isinstance(given[0], int)


def _spoken(messages: list[Any], where: str) -> dict[str, Any]:
    """Prompt, system and input tokens of a conversation."""
    system, prompt, tokens = "", "", 0
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            if where == "input" and isinstance(message, dict) and message.get("type"):
                continue  # Responses items that are no message, such as tool outputs.
            param = f"{where}[{position}].role"
            raise refuse(f"Invalid value: '{param}' is not a known role.", param=param)
        text, images = _content(message.get("content"), f"{where}[{position}].content", message)
        tokens += count_tokens(text) + images * IMAGE_TOKENS
        if message["role"] in ("system", "developer"):
            system += text
        elif message["role"] == "user":
            prompt = text
    return {"prompt": prompt, "system": system, "input_tokens": tokens}


def _content(content: Any, param: str, message: dict[str, Any]) -> tuple[str, int]:
    if isinstance(content, str):
        return content, 0
    if content is None and message["role"] == "assistant":
        return "", 0
    if not isinstance(content, list):
        raise refuse(f"Invalid type for '{param}': expected a string or an array.", param=param)
    texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
    return "".join(texts), len(content) - len(texts)


def _check_limit(limit: Any, param: str, least: int) -> None:
    if limit is None:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < least:
        message = f"Invalid '{param}': expected an integer of at least {least}, but got {limit!r}."
        raise refuse(message, param=param, code="integer_below_min_value")


def _check_sampling(body: dict[str, Any], deprecated: str) -> None:
    model = body["model"]
    if deprecated in body and _REASONING.match(model):
        message = (
            f"Unsupported parameter: '{deprecated}' is not supported with this model. "
            "Use 'max_completion_tokens' instead."
        )
        raise refuse(message, code="unsupported_parameter", param=deprecated)
    for name in ("temperature", "top_p"):
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2:
            raise refuse(f"Invalid '{name}': {value!r}.", param=name)
        if value != 1 and _NO_SAMPLING.match(model):
            message = f"Unsupported value: '{name}' does not support {value} with this model."
            raise refuse(message, code="unsupported_value", param=name)


def _schema(format_: Any, holder: Any, param: str) -> dict[str, Any] | None:
    kind = format_.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise refuse(f"Invalid value: '{kind}'.", param=f"{param}.type")
    if kind != "json_schema":
        return None
    if not isinstance(holder, dict) or not isinstance(holder.get("schema"), dict):
        raise refuse(f"Missing required parameter: '{param}.schema'.", param=param, code=_MISSING)
    if not isinstance(holder.get("name"), str) or not _NAME.match(holder["name"]):
        raise refuse(f"Invalid or missing '{param}.name'.", param=f"{param}.name")
    schema: dict[str, Any] = holder["schema"]
    check_references(schema, param)
    if holder.get("strict"):
        check_openai_schema(schema, holder["name"], param)
    return schema


def _format(
    format_: Any, schema: dict[str, Any] | None, spoken: dict[str, Any], where: str
) -> dict[str, Any]:
    json_only = format_.get("type") == "json_object"
    if json_only and "json" not in (spoken["prompt"] + spoken["system"]).lower():
        message = f"'{where}' must contain the word 'json' in some form, to use 'json_object'."
        raise refuse(message, param=where)
    return {"schema": schema, "json_only": json_only}
