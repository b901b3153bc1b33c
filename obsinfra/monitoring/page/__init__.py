"""The files of the live page a trainer serves at `/`, and the policy a browser is told to hold them to.

The exporter calls this; the page itself speaks to `/api/live` only. Knows no run and no metric.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    "": "text/plain; charset=utf-8",
}

_FILES = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/charts.js": "charts.js",
    "/history.js": "history.js",
    "/format.js": "format.js",
    "/vendor/uPlot.iife.min.js": "vendor/uPlot.iife.min.js",
    "/vendor/uPlot.min.css": "vendor/uPlot.min.css",
    "/vendor/LICENSE": "vendor/LICENSE",
}

ASSET_PATHS: tuple[str, ...] = tuple(_FILES)
"""Every path the page needs, beside `/api/live`."""

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Value of the `Content-Security-Policy` header: nothing inline, nothing from elsewhere."""


def asset(path: str) -> tuple[bytes, str] | None:
    """The file served at `path`, read once per process.

    Args:
        path: request path without query, e.g. `/page.js`; `/` is the page itself.

    Returns:
        Its bytes and content type, or None when the page has no such file. Only the paths in `ASSET_PATHS`
        exist: the path is looked up, never joined to a folder, so it cannot lead out of the package.
    """
    name = _FILES.get(path)
    return None if name is None else _read(name)


@cache
def _read(name: str) -> tuple[bytes, str]:
    suffix = name[name.rfind(".") :] if "." in name else ""
    return files(__name__).joinpath(name).read_bytes(), _TYPES[suffix]
