"""The environment variables that point the SDKs at a local provider, set and restored."""

from __future__ import annotations

import os
from collections.abc import Mapping

API_KEY = "sk-local-provider"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
# Whatever a developer has set here would lead the SDKs past the local provider, or add to what
# they send to it.
_FOREIGN = (
    "ANTHROPIC_AUTH_TOKEN",
    "ANTHROPIC_CUSTOM_HEADERS",
    "ANTHROPIC_PROFILE",
    "OPENAI_CUSTOM_HEADERS",
    "OPENAI_ORG_ID",
    "OPENAI_PROJECT_ID",
)


def variables(openai_base_url: str, anthropic_base_url: str) -> dict[str, str]:
    env = {
        "OPENAI_API_KEY": API_KEY,
        "OPENAI_BASE_URL": openai_base_url,
        "ANTHROPIC_API_KEY": API_KEY,
        "ANTHROPIC_BASE_URL": anthropic_base_url,
    }
    if any(os.environ.get(name) for name in _PROXIES):
        known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        env["NO_PROXY"] = ",".join(filter(None, (known, "127.0.0.1,localhost")))
        env["no_proxy"] = env["NO_PROXY"]
    return env


class Environment:
    """Sets variables in `os.environ`, and puts back what was there."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}

    def enter(self, env: Mapping[str, str]) -> None:
        self._before = {name: os.environ.get(name) for name in (*env, *_FOREIGN)}
        for name in _FOREIGN:
            os.environ.pop(name, None)
        os.environ.update(env)

    def leave(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}
