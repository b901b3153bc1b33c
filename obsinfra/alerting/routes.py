"""`[notify]` as Alertmanager's configuration: routes, inhibition, quiet hours, receivers.

Called by `obsinfra alerts`, the native stack and the tests. Knows no address of a running stack and no
secret, only the files in which Alertmanager finds them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from obsinfra.config.notify import SEVERITIES, WEEKDAYS, Notify, QuietHours
from obsinfra.errors import ConfigError

SIDECAR_URL = "http://sidecar:9465/webhook"
TOKEN_FILE = "/run/secrets/obsinfra_token"
"""As in a container network; the native stack puts this machine's in their place."""

SIDECAR_ALERTS = 500
"""Of one group in one notification to the sidecar: its limits are 1,000 alerts and 1 MB. All of a group are
of one run and ask for one action, so the first one says it all."""

TEST_LABEL = "obsinfra_test"
"""An alert with this label is a test: it goes to the channel that the label's value names."""

HEADER = """\
# Generated from the [notify] settings by 'obsinfra alerts write'; do not edit by hand.
# Every alert goes to the sidecar, which acts or only keeps the journal, and to people: docs/notifications.md.
"""

SUBJECTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "memory": (("HighMemory", "CgroupLimitNear"), ("MemoryCreep", "SwapInUse")),
    "loss": (("NonFiniteLoss", "GradientExplosion"), ("LossSpike", "GradientNormRising")),
    "progress": (
        ("TrainerGone", "NoProgress"),
        ("TrainerUnreachable", "SlowStep", "DataStarvation", "GPUIdle", "StragglerRank", "GoodputLow"),
    ),
    "device": (
        ("HighGPUTemperature", "GPUMemoryFault", "GPUXidError"),
        ("GPUThrottling", "GPUIdle", "HighGPUUtilization", "NVLinkErrors", "PCIeReplays"),
    ),
    "disk": (("DiskLow",), ("DiskFilling",)),
    "checkpoint": (
        ("CheckpointFailing",),
        ("CheckpointTooOld", "CheckpointWriterRestarting", "RemoteBehind"),
    ),
}
"""Subject → (alerts which, critical, say it all; alerts which, less severe, then only repeat it)."""

_SAME = {"device": ["run", "rank", "device"], "memory": ["run", "rank"], "disk": ["run", "rank"]}
"""What must be equal for two alerts to be of one subject; else the run."""


def render_alertmanager(notify: Notify) -> str:
    """alertmanager.yml, the same text for the same settings. Its templates: `messages.render_templates`."""
    document: dict[str, Any] = {"templates": ["templates/*.tmpl"], "route": _route(notify)}
    if notify.quiet_hours:
        intervals = [interval for hours in notify.quiet_hours for interval in _intervals(hours)]
        document["time_intervals"] = [{"name": "quiet_hours", "time_intervals": intervals}]
    document["inhibit_rules"] = _inhibitions()
    document["receivers"] = _receivers(notify)
    return HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def check_secret_files(notify: Notify) -> None:
    """See that each file with a secret is there, readable and not empty; nothing of its content is shown.

    Raises:
        ConfigError: one is not; names the setting and the file.
    """
    for setting, path in notify.secret_files.items():
        path = absolute(path)
        try:
            content = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(
                f"{setting} = {str(path)!r}: {reason}", "a file with the secret", "write it there, mode 0600"
            ) from None
        if not content.strip():
            raise ConfigError(f"{setting} = {str(path)!r}: the file is empty", "a file with the secret")
        if setting.endswith("password_file") and content[-1] in "\r\n":
            raise ConfigError(
                f"{setting} = {str(path)!r}: it ends in a line break, which old Alertmanagers send too",
                "the password alone",
                "write it with printf %s instead of echo",
            )
        if setting.endswith("url_file") and not re.fullmatch(r"https?://[^\s/]+\S*", content.strip()):
            raise ConfigError(
                f"{setting} = {str(path)!r}: its content is no URL", "one line, as https://host/path"
            )


def open_secret_files(notify: Notify) -> dict[str, Path]:
    """Setting → file, for each secret that others on this machine may read. For files that are there."""
    files = {setting: absolute(path) for setting, path in notify.secret_files.items()}
    return {setting: path for setting, path in files.items() if path.stat().st_mode & 0o007}


def absolute(path: Path) -> Path:
    """A path of the settings as Alertmanager is told it: `~` expanded, from the working folder."""
    return Path(os.path.abspath(path.expanduser()))


def _route(notify: Notify) -> dict[str, Any]:
    routes: list[dict[str, Any]] = [
        # Alerts that ask for an action wait for nothing: neither for company nor for the group's next turn.
        {
            "receiver": "sidecar",
            "matchers": ['action!=""'],
            "group_by": ["alertname", "run"],
            "group_wait": "0s",
            "group_interval": "1s",
            "repeat_interval": "1h",
            "continue": True,
        },
        {
            "receiver": "sidecar",
            "matchers": ['action=""'],
            "group_by": ["alertname", "run"],
            "group_wait": "10s",
            "group_interval": "1m",
            "repeat_interval": "4h",
            "continue": True,
        },
    ]
    channels = notify.channels
    if channels:
        routes.append(
            {
                "receiver": "nobody",
                "matchers": [f'{TEST_LABEL}!=""'],
                "group_by": ["..."],
                "group_wait": "0s",
                "group_interval": "5s",
                "routes": [
                    {"receiver": channel, "matchers": [f'{TEST_LABEL}="{channel}"']} for channel in channels
                ],
            }
        )
    routes.append(_watchdog_route(notify))
    routes.append({"receiver": "nobody", "matchers": ['severity="none"']})
    for severity in SEVERITIES:
        for channel, wanted in channels.items():
            if severity in wanted:
                routes.append(_people_route(notify, channel, severity))
    return {
        "receiver": "nobody",
        "group_by": ["run"],
        "group_wait": notify.group_wait,
        "group_interval": notify.group_interval,
        "repeat_interval": notify.repeat_warning,
        "routes": routes,
    }


def _people_route(notify: Notify, channel: str, severity: str) -> dict[str, Any]:
    # An alert of somebody else's rules may carry another severity or none; it is better heard than lost.
    matcher = 'severity!~"critical|info|none"' if severity == "warning" else f'severity="{severity}"'
    route: dict[str, Any] = {
        "receiver": channel,
        "matchers": [matcher],
        "repeat_interval": getattr(notify, f"repeat_{severity}"),
        "continue": True,
    }
    if notify.quiet_hours and severity != "critical":
        route["mute_time_intervals"] = ["quiet_hours"]
    return route


def _watchdog_route(notify: Notify) -> dict[str, Any]:
    route: dict[str, Any] = {"receiver": "nobody", "matchers": ['alertname="Watchdog"']}
    if notify.watchdog is not None:
        every = _seconds(notify.watchdog.every)
        # Repeated at the group's turn only, and only if the last is older than repeat_interval.
        route |= {
            "receiver": "watchdog",
            "group_by": ["alertname"],
            "group_wait": "0s",
            "group_interval": _duration(every / 2),
            "repeat_interval": _duration(every * 3 / 4),
        }
    return route


def _inhibitions() -> list[dict[str, Any]]:
    """Who silences whom.

    An inhibited alert reaches nobody, the sidecar neither. So an alert with an action is inhibited only where
    that action is no use: its trainer or host is gone, or it asks for a checkpoint while the critical one has
    an emergency checkpoint made.
    """
    rules: list[dict[str, Any]] = [
        {
            "source_matchers": ['alertname="HostDown"', 'host!=""'],
            "target_matchers": ['alertname!="HostDown"'],
            "equal": ["host"],
        },
        {
            "source_matchers": ['alertname="TrainerGone"', 'run!=""'],
            "target_matchers": ['alertname="NoProgress"'],
            "equal": ["run"],
        },
    ]
    for subject, (sources, targets) in SUBJECTS.items():
        # Labels that both lack are equal too; an alert of no run must not speak for all others of no run.
        source = ['severity="critical"', f'alertname=~"{"|".join(sources)}"', 'run!=""']
        target = ['severity=~"warning|info"', f'alertname=~"{"|".join(targets)}"']
        for does, wants in ((None, ""), ("emergency_checkpoint", "checkpoint")):
            rules.append(
                {
                    "source_matchers": source + ([f'action="{does}"'] if does else []),
                    "target_matchers": [*target, f'action="{wants}"'],
                    "equal": _SAME.get(subject, ["run"]),
                }
            )
    return rules


def _intervals(hours: QuietHours) -> list[dict[str, Any]]:
    """Alertmanager's time intervals; a night is two, the morning's on the day after."""
    pieces: list[tuple[str, str, int]] = []
    for text in hours.times:
        start, _, end = text.partition("-")
        if start < end:
            pieces.append((start, end, 0))
        else:
            pieces.append((start, "24:00", 0))
            if end != "00:00":
                pieces.append(("00:00", end, 1))
    if not pieces:
        pieces = [("00:00", "24:00", 0)]
    found = []
    for start, end, later in pieces:
        interval: dict[str, Any] = {"times": [{"start_time": start, "end_time": end}]}
        if hours.weekdays:
            interval["weekdays"] = [WEEKDAYS[(WEEKDAYS.index(day) + later) % 7] for day in hours.weekdays]
        found.append(interval | {"location": hours.location})
    return found


def _receivers(notify: Notify) -> list[dict[str, Any]]:
    sidecar = {
        "url": SIDECAR_URL,
        "send_resolved": True,
        # A thousand ranks make a group that the sidecar would refuse for its size, and no alert were heard.
        "max_alerts": SIDECAR_ALERTS,
        "http_config": {"authorization": {"credentials_file": TOKEN_FILE}},
    }
    receivers: list[dict[str, Any]] = [
        {"name": "sidecar", "webhook_configs": [sidecar]},
        {"name": "nobody"},
    ]
    if (slack := notify.slack) is not None:
        text = '{{ template "obsinfra.slack.title" . }}'
        config: dict[str, Any] = {
            "send_resolved": True,
            "api_url_file": str(absolute(slack.api_url_file)),
            "channel": slack.channel,
            "color": '{{ template "obsinfra.slack.color" . }}',
            "title": text,
            "title_link": "{{ .ExternalURL }}/#/alerts",
            "text": '{{ template "obsinfra.slack.text" . }}',
            "fallback": text,
            "footer": "obsinfra",
            "username": "obsinfra",
        }
        receivers.append({"name": "slack", "slack_configs": [config]})
    if (email := notify.email) is not None:
        config = {
            "send_resolved": True,
            "to": ", ".join(email.to),
            "from": email.sender,
            "smarthost": email.smarthost,
            "require_tls": email.require_tls,
        }
        if email.auth_username is not None and email.auth_password_file is not None:
            config["auth_username"] = email.auth_username
            config["auth_password_file"] = str(absolute(email.auth_password_file))
        if email.ca_file is not None:
            config["tls_config"] = {"ca_file": str(absolute(email.ca_file))}
        config |= {
            "headers": {"Subject": '{{ template "obsinfra.title" . }}'},
            "text": '{{ template "obsinfra.mail.text" . }}',
            "html": '{{ template "obsinfra.mail.html" . }}',
        }
        receivers.append({"name": "email", "email_configs": [config]})
    if (webhook := notify.webhook) is not None:
        config = {"send_resolved": True} | _webhook(webhook.url, webhook.url_file, webhook.bearer_token_file)
        receivers.append({"name": "webhook", "webhook_configs": [config]})
    if (pagerduty := notify.pagerduty) is not None:
        config = {
            "send_resolved": True,
            "routing_key_file": str(absolute(pagerduty.routing_key_file)),
            "url": pagerduty.url,
            "severity": '{{ template "obsinfra.pagerduty.severity" . }}',
            "description": '{{ template "obsinfra.title" . }}',
            "client": "obsinfra",
            "client_url": "{{ .ExternalURL }}/#/alerts",
            "details": {
                "alerts": '{{ template "obsinfra.pagerduty.alerts" . }}',
                "firing": "{{ len .Alerts.Firing }}",
                "resolved": "{{ len .Alerts.Resolved }}",
            },
        }
        receivers.append({"name": "pagerduty", "pagerduty_configs": [config]})
    if (watchdog := notify.watchdog) is not None:
        config = {"send_resolved": False} | _webhook(
            watchdog.url, watchdog.url_file, watchdog.bearer_token_file
        )
        receivers.append({"name": "watchdog", "webhook_configs": [config]})
    return receivers


def _webhook(url: str | None, url_file: Path | None, token_file: Path | None) -> dict[str, Any]:
    config: dict[str, Any] = {"url": url} if url is not None else {}
    if url_file is not None:
        config["url_file"] = str(absolute(url_file))
    if token_file is not None:
        config["http_config"] = {"authorization": {"credentials_file": str(absolute(token_file))}}
    return config


def _seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60, "h": 3_600, "d": 86_400}[duration[-1]]


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values on one line, as a person would, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _sequence(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    flow = all(isinstance(item, str) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _sequence)
