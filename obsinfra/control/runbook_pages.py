"""`/runbooks/…` of the sidecar: each runbook as a plain page, for whoever follows the link in a message.

Made by `sidecar.create_app`. The text is the product's own and the same everywhere, so no token guards it.
Knows nothing of runs and alerts.
"""

from __future__ import annotations

import html
import re

from fastapi import APIRouter, HTTPException
from fastapi.responses import HTMLResponse, RedirectResponse

from obsinfra.errors import UserError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.run.runbooks import INDEX, find_runbooks, read_runbook

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; max-width: 120ch; margin: 1rem auto; padding: 0 1rem }}
</style>
<pre>{text}</pre>
"""

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

_LINK = re.compile(r"\[([^\]\n]+)\]\((\w+)\.md\)")


def create_runbook_router() -> APIRouter:
    """The routes under `/runbooks`. Where no runbooks are installed, every one is unknown."""
    router = APIRouter(prefix="/runbooks", include_in_schema=False)
    try:
        folder = find_runbooks()
    except UserError as error:  # a sidecar without them does all the rest
        get_logger("system").warning("no_runbooks", error=str(error))
        folder = None

    @router.get("")
    def index() -> RedirectResponse:
        """To the list of them."""
        return RedirectResponse(f"runbooks/{INDEX}")

    @router.get("/{name}", response_class=HTMLResponse)
    def runbook(name: str) -> HTMLResponse:
        """One runbook."""
        text = read_runbook(folder, name) if folder is not None else None
        if text is None:
            raise HTTPException(404, f"no runbook {name[:80]!r}; all of them are listed at /runbooks/{INDEX}")
        return HTMLResponse(as_page(name.removesuffix(".md"), text), headers=_HEADERS)

    return router


def as_page(title: str, text: str) -> str:
    """Markdown as it stands, on a page; links to other runbooks can be followed."""
    linked = _LINK.sub(r'<a href="\2">\1</a>', html.escape(text, quote=False))
    return _PAGE.format(title=html.escape(title), text=linked)
