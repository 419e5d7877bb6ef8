"""Addresses of object stores, as `cache_dir` takes them: told from paths, and without secrets."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from polars_llm.errors import InvalidRequest

__all__ = ["options_of", "store_url"]

# Which options each kind of store takes; anything else may be a credential.
_OPTIONS = {
    "s3": frozenset({"region", "scheme", "endpoint_override", "tls_ca_file_path"}),
    "gs": frozenset({"scheme", "endpoint_override"}),
    "az": frozenset[str](),
    "abfs": frozenset[str](),
    "abfss": frozenset[str](),
    "file": frozenset[str](),
}
_SAME = {"gcs": "gs", "azure": "az", "s3a": "s3"}


def store_url(text: str) -> str | None:
    """The address in its one form, None if `text` is a path.

    Raises
    ------
    InvalidRequest
        At call: no store of that kind is known, or a secret may be in it, or it is no URL as written. The
        message repeats nothing of it.
    """
    scheme, separator, _ = text.strip().partition("://")
    scheme = _SAME.get(scheme.lower(), scheme.lower())
    if not separator or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        _refuse_half_a_url(text)
        return None
    if scheme not in _OPTIONS:
        raise InvalidRequest(
            "cache_dir is a URL of a kind that is not known",
            hint="s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or a directory."
            " Nothing was sent.",
        )
    if re.search(r"[^!-~]", text):
        raise InvalidRequest(
            "cache_dir is a URL with a blank, or with a letter that no URL has",
            hint="leave blanks at its ends out; within a name write in percent: %20 is a blank, %C3%A4 an ä."
            " Nothing was sent.",
        )
    parts = urlsplit(text)
    bucket, path = parts.netloc, parts.path.strip("/")
    if scheme == "file":
        bucket, path = "", parts.path.strip("/")
    given = parse_qsl(parts.query, keep_blank_values=True)
    container = scheme in {"abfs", "abfss"}  # CONTAINER@ACCOUNT is not user info
    secret = parts.password is not None or ("@" in parts.netloc and not container)
    if secret or parts.fragment or {name for name, _ in given} - _OPTIONS[scheme]:
        known = ", ".join(sorted(_OPTIONS[scheme])) or "none"
        raise InvalidRequest(
            "cache_dir is a URL with user info, or with options that may be credentials",
            hint=f"credentials come from the environment or the SDK's own configuration (docs/scale.md);"
            f" options that a {scheme}:// URL takes: {known}. Nothing was sent.",
        )
    if any("@" in value for _, value in given):
        raise InvalidRequest(
            "cache_dir is a URL with user info in one of its options",
            hint="give endpoint_override=http://HOST:PORT alone; credentials come from the environment."
            " Nothing was sent.",
        )
    if not bucket and scheme != "file":
        raise InvalidRequest(
            f"cache_dir is a {scheme}:// URL without a bucket",
            hint=f"{scheme}://BUCKET/PREFIX. Nothing was sent.",
        )
    if scheme != "file" and {"", ".", ".."} & set(unquote(path).split("/") if path else ()):
        # What is written under s3://bucket/./p lies in another place than the one that is listed.
        raise InvalidRequest(
            "cache_dir is a URL with '.', '..' or nothing between two slashes",
            hint="an object store has names, not directories: write the prefix out. Nothing was sent.",
        )
    given = [(name, value.rstrip("/") if name == "endpoint_override" else value) for name, value in given]
    query = f"?{urlencode(sorted(given), safe=':/')}" if given else ""
    return f"{scheme}://{bucket}/{path}".rstrip("/") + query


def options_of(url: str) -> dict[str, str]:
    """The options of an address that `store_url` gave."""
    return dict(parse_qsl(urlsplit(url).query))


def _refuse_half_a_url(text: str) -> None:
    # pathlib makes s3:/bucket of s3://bucket; a directory of that name would be an empty cache.
    scheme, separator, rest = text.strip().partition(":")
    scheme = scheme.lower()
    if separator and (scheme in _OPTIONS or scheme in _SAME):
        raise InvalidRequest(
            f"cache_dir begins with {scheme}:{rest[:1] if rest[:1] == '/' else ''}, and is no URL",
            hint=f"give it as text, not as a pathlib.Path: cache_dir='{scheme}://BUCKET/PREFIX'."
            " Nothing was sent.",
        )
