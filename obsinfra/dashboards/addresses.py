"""Where each board is found in Grafana: uids that never change, and links that carry a choice along.

Called by the boards.
"""

from __future__ import annotations

FLEET = "obsinfra-fleet"
RUN = "obsinfra-run"
GPU_HOST = "obsinfra-gpu-host"
RANKS = "obsinfra-ranks"
ALERTS = "obsinfra-alerts"
COMPARE = "obsinfra-compare"

UIDS = (FLEET, RUN, GPU_HOST, RANKS, ALERTS, COMPARE)


def board_url(uid: str, **choices: str) -> str:
    """A link to a board with these variables set, the time range kept. Values may hold Grafana's macros."""
    chosen = "".join(f"&var-{name}={value}" for name, value in choices.items())
    return f"/d/{uid}?${{__url_time_range}}{chosen}"
