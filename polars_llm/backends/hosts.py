"""Hosts: the table of what those that speak OpenAI's protocol can do, and how addresses are written.

The table is all that is known of their differences; `docs/hosts.md` shows it. Sources: OpenAI's batch guide,
Azure's how-to-batch (2026-03-19), DeepInfra's batch introduction, Groq's SDK (1.7.0), autobatcher (0.12) for
Doubleword; ollama/ollama#7125 and huggingface/text-generation-inference#2925 for the name of the token limit.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit, urlunsplit

from polars_llm.errors import InvalidRequest

__all__ = [
    "ANTHROPIC",
    "HOSTS",
    "OPENAI",
    "Host",
    "host_of",
    "is_at",
    "is_loopback",
    "normalise_base_url",
    "redact",
]

_CHAT, _RESPONSES, _EMBEDDINGS = "/v1/chat/completions", "/v1/responses", "/v1/embeddings"
_MESSAGES = "/v1/messages"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What a host can do.

    Parameters
    ----------
    name
        What ``pllm.OpenAI(..., host=...)`` takes.
    title
        What people call it.
    domains, ports
        Its addresses end in one of these names, or have one of these ports.
    batch_endpoints
        What its batches take; empty if it has no batches.
    requests, size_bytes
        What one batch may hold.
    windows
        Completion windows that it offers; the first one is asked for.
    needs_key
        False where a server of one's own asks for no API key unless it is told to.
    limit_field
        Name of the field for ``max_tokens``.
    """

    name: str
    title: str
    domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    batch_endpoints: tuple[str, ...] = ()
    requests: int = 50_000
    size_bytes: int = 200_000_000
    windows: tuple[str, ...] = ("24h",)
    needs_key: bool = True
    limit_field: str = "max_completion_tokens"

    def check_batch(self, endpoint: str | None = None) -> None:
        """Raise InvalidRequest if it has no batches, or they do not take the endpoint."""
        if not self.batch_endpoints:
            fact = f"{self.title} has no batches"
        elif endpoint is not None and endpoint not in self.batch_endpoints:
            fact = f"Batches of {self.title} do not take {endpoint}"
        else:
            return
        raise InvalidRequest(
            fact, hint="mode='realtime' asks it while you wait, at its usual price. Nothing was sent."
        )


OPENAI = Host(
    name="openai",
    title="OpenAI",
    domains=("api.openai.com",),
    batch_endpoints=(_CHAT, _RESPONSES, _EMBEDDINGS),
)

ANTHROPIC = Host(
    name="anthropic",
    title="Anthropic",
    batch_endpoints=(_MESSAGES,),
    requests=100_000,
    size_bytes=256_000_000,
    limit_field="max_tokens",
)

# Those that speak OpenAI's protocol.
HOSTS: tuple[Host, ...] = (
    OPENAI,
    Host(
        name="azure",
        title="Azure OpenAI",
        domains=("openai.azure.com", "services.ai.azure.com", "cognitiveservices.azure.com"),
        batch_endpoints=(_CHAT, _RESPONSES),
        requests=100_000,
    ),
    Host(
        name="groq",
        title="Groq",
        domains=("api.groq.com",),
        batch_endpoints=(_CHAT,),
        size_bytes=100_000_000,
        windows=("24h", "7d"),
    ),
    Host(
        name="deepinfra",
        title="DeepInfra",
        domains=("api.deepinfra.com",),
        batch_endpoints=(_CHAT, _EMBEDDINGS),
    ),
    Host(
        name="doubleword",
        title="Doubleword",
        domains=("api.doubleword.ai",),
        batch_endpoints=(_CHAT, _RESPONSES, _EMBEDDINGS),
    ),
    Host(name="vllm", title="vLLM serve", needs_key=False),
    Host(name="sglang", title="SGLang", needs_key=False),
    Host(name="tgi", title="Text Generation Inference", needs_key=False, limit_field="max_tokens"),
    Host(name="ollama", title="Ollama", ports=(11434,), needs_key=False, limit_field="max_tokens"),
    Host(name="other", title="any other host", batch_endpoints=OPENAI.batch_endpoints),
)
_BY_NAME = {host.name: host for host in HOSTS}


def host_of(base_url: str | None, name: str | None = None) -> Host:
    """The entry for a normalised address (None: OpenAI's own), or the one that the user named.

    Raises
    ------
    InvalidRequest
        At call: no host of that name.
    """
    if name is not None:
        if name not in _BY_NAME:
            known = ", ".join(repr(known) for known in _BY_NAME)
            raise InvalidRequest(f"host is {name!r}", hint=f"host takes {known}. Nothing was sent.")
        return _BY_NAME[name]
    if base_url is None:
        return OPENAI
    parts = urlsplit(base_url)
    domain = "." + (parts.hostname or "")
    for host in HOSTS:
        if parts.port in host.ports or domain.endswith(tuple("." + d for d in host.domains)):
            return host
    return _BY_NAME["other"]


_DEFAULT_PORTS = {"http": 80, "https": 443}
_SECRET_LENGTH = 8
_KEY_SHAPES = re.compile(r"\b(sk|key|gsk|hf|xai)[-_][A-Za-z0-9_\-*]{6,}")


def normalise_base_url(address: str | None, *, own: str) -> str | None:
    """The address without user info, query, fragment, default port and trailing slash.

    None if it is the provider's own: then the key of a request doesn't depend on it.

    Raises
    ------
    InvalidRequest
        At call: not an http or https address.
    """
    if not address:
        return None
    try:
        parts = urlsplit(address.strip())
        known = parts.scheme.lower() in _DEFAULT_PORTS and bool(parts.hostname)
        port = parts.port
    except ValueError:  # a port that is no number, a bracket that is not closed
        known = False
    if not known or not parts.hostname:
        raise InvalidRequest(
            "base_url is not an http or https address",
            hint="for example base_url='https://host/v1'. Nothing was sent.",
        )
    host = parts.hostname.lower()
    if ":" in host:
        host = f"[{host}]"
    if port and port != _DEFAULT_PORTS[parts.scheme.lower()]:
        host = f"{host}:{port}"
    clean = urlunsplit((parts.scheme.lower(), host, parts.path.rstrip("/"), "", ""))
    return None if clean == own.rstrip("/") else clean


def is_at(address: str, base_url: str) -> bool:
    """True if `address` is relative, or of the same scheme, host and port as `base_url`.

    Only then may it get the credentials that are meant for `base_url`.
    """
    theirs, ours = urlsplit(address), urlsplit(base_url)
    if not theirs.scheme and not theirs.netloc:
        return True
    return _origin(theirs) == _origin(ours)


def _origin(parts: SplitResult) -> tuple[str, str | None, int | None]:
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS.get(parts.scheme)


def redact(text: str, secrets: Iterable[str | None]) -> str:
    """`text` without the given secrets and without anything shaped like an API key."""
    for secret in secrets:
        # Servers of one's own are given "x" or "EMPTY": no secrets, and parts of ordinary words.
        if secret and len(secret) >= _SECRET_LENGTH:
            text = text.replace(secret, "***")
    return _KEY_SHAPES.sub(r"\1-***", text)


def is_loopback(base_url: str | None) -> bool:
    """A host on this machine: nobody sends a bill."""
    name = urlsplit(base_url).hostname if base_url else None
    if name is None or name == "localhost":
        return name is not None
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
