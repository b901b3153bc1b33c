"""`/` of the sidecar: the page of all runs, alerts, commands and slow steps. Static files, without a build.

Made by `sidecar.create_app`. The files are the same everywhere, so no token guards them: the page asks for
the token and speaks to `/v1` with it. Knows no run and no alert.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from fastapi import APIRouter, Response

from obsinfra.monitoring import page as live_page

ASSETS = {
    "index.html": "text/html; charset=utf-8",
    "index.css": "text/css; charset=utf-8",
    "index.js": "text/javascript; charset=utf-8",
}
"""Own files of the page; its looks are those of the trainer's page, `page.css`."""

HEADERS = {
    "Content-Security-Policy": live_page.CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_index_router() -> APIRouter:
    """The routes of the page's files."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def index() -> Response:
        """The page."""
        return _own("index.html")

    @router.get("/index.css")
    async def style() -> Response:
        return _own("index.css")

    @router.get("/index.js")
    async def script() -> Response:
        return _own("index.js")

    @router.get("/page.css")
    async def looks() -> Response:
        found = live_page.asset("page.css")
        assert found is not None
        return Response(found[0], media_type=found[1], headers=HEADERS)

    return router


def _own(name: str) -> Response:
    return Response(_read(name), media_type=ASSETS[name], headers=HEADERS)


@cache
def _read(name: str) -> bytes:
    return files(__name__).joinpath(name).read_bytes()
