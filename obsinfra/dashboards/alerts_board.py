"""The board of alerts and what is done about them: firing, decided, commanded, saved; the stack's health.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.alerting.prometheus_rules import RUNBOOKS
from obsinfra.catalog import metrics
from obsinfra.catalog import stack_metrics as stack
from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.metrics import Metric
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import ALERTS, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import (
    SEVERITY_COLOURS,
    lines,
    link,
    named,
    number,
    rows,
    states_over_time,
    value_names,
)
from obsinfra.dashboards.queries import RUNS as THESE
from obsinfra.dashboards.queries import Query, of, quantile_so_far, risen

ABOUT_RUNS = 'run=~"$run|"'
"""Alerts about these runs, and those about the stack, which name no run."""

FAILED = 'outcome=~"expired|failed|rejected|undelivered|unacknowledged"'
HELD = "Watchdog"
"""Fires always, to show that alerts arrive; it is no trouble."""

FIRING = f'ALERTS{{alertstate="firing", alertname!="{HELD}", {ABOUT_RUNS}'


def alerts_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=ALERTS,
        title="Alerts & actions",
        about="What fires, what was done about it and how long that took; and whether the stack is well.",
        variables=[variables.datasource(), variables.model(), variables.runs()],
        marks=marks(THESE),
        rows=[
            Row("Now", _now(alerts)),
            Row("History", _history()),
            Row("From alert to checkpoint", _latency(alerts)),
            Row("The sidecar's decisions", _decisions(alerts)),
            Row("Health of the stack", _health(alerts)),
        ],
    )


def _now(alerts: Mapping[str, Alert]) -> list[Panel]:
    firing = f"{FIRING}}}"
    colours = [value_names({name: (name, colour) for name, colour in SEVERITY_COLOURS.items()})]
    alive = [value_names({"0": ("down", "red"), "1": ("up", "green")})]
    services = [
        number(
            title,
            [Query(f'min(up{{job="{job}"}})', job)],
            unit="none",
            width=4,
            graph=False,
            mappings=alive,
            empty="not scraped",
            about=about,
            alerts=named(alerts, alert),
        )
        for title, job, alert, about in (
            ("Sidecar", "sidecar", "SidecarGone", "Turns alerts into commands. Down: trainers act alone."),
            ("Alertmanager", "alertmanager", "AlertmanagerGone", "Groups alerts and hands them on."),
        )
    ]
    return [
        number(
            "Firing",
            [Query(f"count({firing}) or vector(0)", "alerts")],
            unit="none",
            width=4,
            about="Alerts firing about these runs and the stack; the watchdog, which fires always, left out.",
        ),
        number(
            "Critical",
            [Query(f'count({FIRING}, severity="critical"}}) or vector(0)', "critical")],
            unit="none",
            width=4,
            about="Of those, the ones that ask for somebody now.",
        ),
        *services,
        number(
            "Alerting works",
            [Query(f'max(ALERTS{{alertname="{HELD}", alertstate="firing"}})', "watchdog")],
            unit="none",
            width=4,
            graph=False,
            mappings=alive,
            empty="silent",
            about="The alert that fires always reaches Prometheus's list. Silent: rules are not evaluated.",
            mentions=named(alerts, HELD),
        ),
        number(
            "Commands without effect",
            [
                Query(
                    f"sum({risen(of(metrics.SIDECAR_COMMANDS, FAILED))}) or vector(0)",
                    "commands",
                    instant=True,
                )
            ],
            unit="none",
            width=4,
            graph=False,
            about="Within the time range: expired, failed, rejected, undelivered or never acknowledged.",
            mentions=named(alerts, "DeliveryFailing"),
        ),
        rows(
            "Firing now",
            [Query(f"max by (alertname, severity, scope, run, rank, device, action) ({firing})")],
            columns={
                "alertname": "Alert",
                "severity": "Severity",
                "run": "Run",
                "rank": "Rank",
                "device": "GPU",
                "scope": "Speaks of",
                "action": "Asks for",
            },
            mappings={"Severity": colours},
            links={
                "Alert": link("Its runbook", f"{RUNBOOKS}/${{__value.raw}}"),
                "Run": link("The run", board_url(RUN, run="${__value.raw}")),
            },
            sort=("Severity", False),
            height=6,
            empty="nothing fires",
            about="Click an alert for its runbook, a run for its board. What an alert asks for is done by "
            "the sidecar, or by the trainer where there is none.",
        ),
    ]


def _history() -> list[Panel]:
    def held(state: str) -> str:
        where = f'alertstate="{state}", alertname!="{HELD}", {ABOUT_RUNS}'
        return f"max by (alertname, run) (ALERTS{{{where}}})"

    return [
        states_over_time(
            "Alerts over time",
            [Query(f"2 * {held('firing')} or {held('pending')}", "{{alertname}} {{run}}")],
            mappings=[value_names({"1": ("pending", "yellow"), "2": ("firing", "red")})],
            empty="nothing fired in this time",
            about="One band per alert and run: yellow while its condition holds but not yet long enough, red "
            "while it fires. Green marks below a red one are the checkpoints it asked for.",
        ),
        lines(
            "In the trainers' own eyes",
            [
                Query(
                    f"max by (alert, run) ({of(metrics.ALERT_FIRING, THESE)})",
                    "{{alert}} {{run}}",
                )
            ],
            unit="none",
            width=12,
            height=7,
            stacked=True,
            floor=0,
            empty="nothing fired in this time",
            about="Alerts that trainers judge by themselves from the same table, half a second to a scrape "
            "earlier. They act on them only where no sidecar lives.",
        ),
        lines(
            "Commands to the runs",
            [
                Query(
                    f"sum by (run, action, outcome) ({of(metrics.CONTROL_COMMANDS, THESE)})",
                    "{{run}} {{action}} {{outcome}}",
                )
            ],
            unit="none",
            width=12,
            height=7,
            floor=0,
            empty="no command in this time",
            about="As the trainers count them since their process began, from all doors: sidecar, people, "
            "signals.",
        ),
    ]


def _latency(alerts: Mapping[str, Alert]) -> list[Panel]:
    def mean(histogram: Metric, where: str, by: str) -> str:
        count = f"sum by ({by}) ({of(histogram, where, '_count')})"
        return f"sum by ({by}) ({of(histogram, where, '_sum')}) / ({count} > 0)"

    return [
        lines(
            "Webhook to final word",
            [Query(mean(metrics.SIDECAR_DELIVERY_SECONDS, "", "action"), "{{action}}")],
            unit="s",
            width=8,
            floor=0,
            empty="no command sent yet",
            about="Mean time from Alertmanager's webhook to the trainer's final acknowledgement, since the "
            "sidecar began: delivery, the wait for the next step, and the action itself.",
        ),
        lines(
            "The action itself",
            [Query(mean(metrics.CONTROL_ACTION_SECONDS, THESE, "run, action"), "{{run}} {{action}}")],
            unit="s",
            width=8,
            floor=0,
            empty="no command in this time",
            about="Mean time from an action's start in the trainer to its outcome. What the panel to the "
            "left has above it is the way there.",
        ),
        lines(
            "Request to durable checkpoint",
            [
                Query(
                    quantile_so_far(0.99, metrics.CHECKPOINT_DURATION_SECONDS, THESE, by="run"),
                    "{{run}}, p99",
                )
            ],
            unit="s",
            width=8,
            floor=0,
            empty="nothing committed yet",
            about="From the request to the commit, since the process began, exact to a bucket. "
            "It goes on in the background; the loop waits for the snapshot alone.",
            mentions=named(alerts, "CheckpointFailing"),
        ),
    ]


def _decisions(alerts: Mapping[str, Alert]) -> list[Panel]:
    return [
        rows(
            "Decided about alerts",
            [Query(f"sum by (decision) ({risen(of(metrics.SIDECAR_ALERTS))}) > 0")],
            columns={"decision": "Decision", "Value": "Times"},
            width=6,
            sort=("Times", True),
            empty="no alert heard in this time",
            about="`accepted` became a command; `informed` asks for none; `cool_down` and `hourly_limit` "
            "were held back by the policy; `duplicate` is Alertmanager repeating itself.",
        ),
        rows(
            "Commands sent on",
            [Query(f"sum by (action, outcome) ({risen(of(metrics.SIDECAR_COMMANDS))}) > 0")],
            columns={"action": "Action", "outcome": "Outcome", "Value": "Times"},
            width=6,
            sort=("Times", True),
            empty="none sent in this time",
            about="By the sidecar, and what became of them. Anything but `done` alerts.",
            mentions=named(alerts, "DeliveryFailing"),
        ),
        rows(
            "Webhook calls",
            [Query(f"sum by (outcome) ({risen(of(metrics.SIDECAR_WEBHOOKS))}) > 0")],
            columns={"outcome": "Outcome", "Value": "Times"},
            width=6,
            sort=("Times", True),
            empty="none in this time",
            about="Alertmanager's calls. `unauthorized` is a wrong token, `journal_failed` a full disk.",
            mentions=named(alerts, "SidecarJournalFailing"),
        ),
        rows(
            "Escalated and held back",
            [
                Query(
                    f"sum by (alert, action) ({risen(of(metrics.SIDECAR_ESCALATIONS))}) > 0 or "
                    f"sum by (reason) ({risen(of(metrics.SIDECAR_HELD_BACK))}) > 0"
                )
            ],
            columns={"alert": "Alert", "action": "Further step", "reason": "Held back by", "Value": "Times"},
            width=6,
            sort=("Times", True),
            empty="neither in this time",
            about="Further steps of the policy because an alert went on firing, and commands that the policy "
            "held back, with its reason.",
        ),
    ]


def _health(alerts: Mapping[str, Alert]) -> list[Panel]:
    return [
        states_over_time(
            "Services that answer",
            [Query('min by (job) (up{job=~"sidecar|prometheus|alertmanager"})', "{{job}}")],
            mappings=[value_names({"0": ("down", "red"), "1": ("up", "green")})],
            width=8,
            height=7,
            about="Whether Prometheus could scrape each service. A red band is a time in which alerts may "
            "have become neither messages nor commands.",
            mentions=named(alerts, "SidecarGone", "AlertmanagerGone"),
        ),
        lines(
            "Handing alerts on",
            [
                Query(f"sum({of(stack.RULE_FAILURES)})", "rules that failed"),
                Query(f"sum({of(stack.NOTIFICATIONS_DROPPED)})", "alerts no Alertmanager took"),
                Query(
                    f"sum by (integration) ({of(stack.NOTIFICATIONS_FAILED)}) > 0", "{{integration}} failed"
                ),
                Query(f"sum({of(stack.NOTIFICATION_ERRORS)})", "failures to reach Alertmanager"),
            ],
            unit="none",
            width=8,
            height=7,
            floor=0,
            about="Counted since each program began. Flat lines are well; a rise alerts, except of alerts "
            "that no Alertmanager took: Prometheus drops some at its start.",
            mentions=named(
                alerts, "PrometheusRuleFailures", "PrometheusDroppingAlerts", "NotificationsFailing"
            ),
        ),
        lines(
            "Runs by state, as the sidecar finds them",
            [Query(f"sum by (state) ({of(metrics.SIDECAR_RUNS)})", "{{state}}")],
            unit="none",
            width=8,
            height=7,
            stacked=True,
            floor=0,
            about="Run folders by what their run.json says; `dead` is a trainer that went without a word.",
            mentions=named(alerts, "TrainerGone"),
        ),
    ]
