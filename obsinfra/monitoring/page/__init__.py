"""The files of the live page a trainer serves at `/`, and the policy a browser is told to hold them to.

The exporter calls this; the page itself speaks to `/api/live` only. Knows no run and no metric.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    "": "text/plain; charset=utf-8",
}

ASSETS = frozenset(
    {
        "index.html",
        "page.css",
        "page.js",
        "charts.js",
        "history.js",
        "format.js",
        "vendor/uPlot.iife.min.js",
        "vendor/uPlot.min.css",
        "vendor/LICENSE",
    }
)
"""Every file of the page, by its path below `/`."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Value of the `Content-Security-Policy` header: nothing inline, nothing from elsewhere."""


def asset(path: str) -> tuple[bytes, str] | None:
    """The file served at `path`, read once per process.

    Args:
        path: path of the request without query, with or without the leading slash; `/` is `index.html`.

    Returns:
        Its bytes and content type, or None when the page has no such file. Only what `ASSETS` lists exists:
        a path is looked up before it is opened, so it cannot lead out of the package.
    """
    name = path.removeprefix("/") or "index.html"
    return _read(name) if name in ASSETS else None


@cache
def _read(name: str) -> tuple[bytes, str]:
    return files(__name__).joinpath(name).read_bytes(), _TYPES[PurePosixPath(name).suffix]
