"""All generated files of Grafana: the boards and what provisions them.

Called by `obsinfra dashboards` and the tests. Writes nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from obsinfra.catalog.alerts import ALERTS, Alert
from obsinfra.dashboards.alerts_board import alerts_board
from obsinfra.dashboards.board import Board, render
from obsinfra.dashboards.compare_board import compare_board
from obsinfra.dashboards.fleet_board import fleet_board
from obsinfra.dashboards.gpu_host_board import gpu_host_board
from obsinfra.dashboards.provisioning import provisioning_files
from obsinfra.dashboards.ranks_board import ranks_board
from obsinfra.dashboards.run_board import run_board

MAKERS: tuple[Callable[[Mapping[str, Alert]], Board], ...] = (
    fleet_board,
    run_board,
    gpu_host_board,
    ranks_board,
    alerts_board,
    compare_board,
)


def boards(alerts: Sequence[Alert] = ALERTS) -> list[Board]:
    """Every board, its thresholds those of this table."""
    by_name = {alert.name: alert for alert in alerts}
    return [make(by_name) for make in MAKERS]


def dashboard_files(alerts: Sequence[Alert] = ALERTS) -> dict[Path, str]:
    """Path below Grafana's folder → content, of every board and of the provisioning."""
    rendered = {Path("dashboards") / board.file: render(board) for board in boards(alerts)}
    return rendered | provisioning_files()
