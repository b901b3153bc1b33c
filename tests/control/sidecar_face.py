"""The sidecar and its HTTP face in this process, without a socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from sidecar_tools import TOKEN, notification

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.policy import Policy
from obsinfra.control.responder import Sidecar
from obsinfra.control.sidecar import create_app

AT_ONCE = Policy(cool_down_seconds=0.0, emergency_checkpoints_per_hour=3_600)
"""Every alert gets the action of its label, however often."""

AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class Face:
    """A started sidecar and its HTTP face; an exception of the app is raised here.

    Args:
        more: of `Sidecar`.
    """

    def __init__(self, output_dir: Path, policy: Policy = AT_ONCE, **more: Any) -> None:
        limits = {name: more.pop(name) for name in list(more) if name.endswith(("_per_second", "guard_all"))}
        self.sidecar = Sidecar(output_dir, output_dir / ".stack" / "sidecar", policy, **more)
        self.app = create_app(self.sidecar, TOKEN, **limits)
        self.sidecar.start()

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        async def asked() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self.app), base_url="http://sidecar"
            ) as client:
                return await client.request(method, path, **request)

        return asyncio.run(asked())

    def get(self, path: str, **query: Any) -> Any:
        """The JSON document of a route under the token."""
        answer = self.ask("GET", path, params=query, headers=AUTHORIZED)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, content: Any, token: str | None = f"Bearer {TOKEN}") -> httpx.Response:
        """Send something to the webhook."""
        if not isinstance(content, (bytes, str)):
            content = json.dumps(content)
        return self.ask(
            "POST", "/webhook", content=content, headers={"authorization": token} if token else {}
        )

    def decide(self, *alerts: Any) -> dict[str, int]:
        """Send a notification; the decisions by number."""
        answer = self.post(notification(*alerts))
        assert answer.status_code == 200, answer.text
        decisions: dict[str, int] = answer.json()
        return decisions

    def webhooks(self, outcome: str) -> float:
        return self.sidecar.instruments.get(catalog.SIDECAR_WEBHOOKS, outcome=outcome)

    def nothing_done(self) -> bool:
        return self.sidecar.journal.alerts() == [] and self.sidecar.journal.commands() == []
