"""A remote's URL: whether a text is one, and whether a mirror can be kept there. Nothing is asked of it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import fsspec

from obsinfra.backup.remote import RemoteError, package_missing

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{2,254}")
_UNFIT = {
    "http": "cannot be written to",
    "https": "cannot be written to",
    "memory": "ends with its process",
}


def is_url(text: str) -> bool:
    """Whether `text` names a remote rather than a run or a path."""
    protocol, mark, _ = text.partition("://")
    return bool(mark) and protocol in fsspec.available_protocols()


def check_url(url: str) -> None:
    """Whether a mirror can be kept at `url`; nothing is asked of it.

    Raises:
        RemoteError: it is malformed, holds credentials, is of a kind that cannot be used, or a package is
            missing. The message never shows what may be a secret.
    """
    protocol, mark, rest = url.partition("://")
    form = "s3://bucket/folder, file:///folder, or another URL that fsspec knows"
    if not mark or not protocol or not url.isprintable():
        shown = repr(url) if "@" not in url else "text with an '@' (not shown)"
        raise RemoteError(f"checkpoint_remote {shown} is no URL", form)
    try:
        parts = urlsplit(url)
        secret = "@" in parts.netloc or "?" in rest or "#" in rest
    except ValueError as error:
        raise RemoteError(f"checkpoint_remote: a malformed {protocol}:// URL: {error}", form) from error
    if secret:
        raise RemoteError(
            f"checkpoint_remote: the {protocol}:// URL holds a user, password, query or fragment (not shown)",
            form,
            "give credentials in the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )
    if protocol in _UNFIT:
        raise RemoteError(f"checkpoint_remote {url!r}: {protocol}:// {_UNFIT[protocol]}", form)
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise package_missing(protocol, error) from error
    except ValueError as error:
        raise RemoteError(f"checkpoint_remote {url!r}: {error}", form) from error
    local = protocol in ("file", "local")
    if local and not (parts.netloc == "" and parts.path.strip("/")):
        raise RemoteError(f"checkpoint_remote {url!r} names no folder", "file:///an/absolute/folder")
    if protocol in ("s3", "s3a") and not _BUCKET.fullmatch(parts.netloc):
        raise RemoteError(f"checkpoint_remote {url!r} names no bucket", "s3://bucket/folder")
    if not local and not rest.strip("/"):
        raise RemoteError(f"checkpoint_remote {url!r} names no place", form)
