"""Addresses: how a host enters the key and the ledger, and how secrets stay out of text."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit, urlunsplit

from polars_llm.errors import InvalidRequest

__all__ = ["is_at", "is_loopback", "normalise_base_url", "redact"]

_DEFAULT_PORTS = {"http": 80, "https": 443}
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
    parts = urlsplit(address.strip())
    if parts.scheme.lower() not in _DEFAULT_PORTS or not parts.hostname:
        raise InvalidRequest(
            "base_url is not an http or https address",
            hint="for example base_url='https://host/v1'. Nothing was sent.",
        )
    host = parts.hostname.lower()
    if ":" in host:
        host = f"[{host}]"
    if parts.port and parts.port != _DEFAULT_PORTS[parts.scheme.lower()]:
        host = f"{host}:{parts.port}"
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
        if secret:
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
