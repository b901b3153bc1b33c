"""Alertmanager's configuration from [notify]: routed as meant, no secret inside, messages within limits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from stack_versions import StackVersion, each_version

from obsinfra.alerting.messages import (
    OUTCOME_WORDS,
    SLACK_TEXT_CHARACTERS,
    StackLinks,
    jaeger_search,
    render_templates,
)
from obsinfra.alerting.routes import SUBJECTS, TEST_LABEL, check_secret_files, render_alertmanager
from obsinfra.catalog.alerts import ALERTS
from obsinfra.catalog.policy import DEFAULT_POLICY, Policy, policy_with
from obsinfra.config.notify import LINK_CHARACTERS, LINK_LABEL_CHARACTERS, SEVERITIES, Notify
from obsinfra.config.resolve import dump_toml, resolve
from obsinfra.config.settings import Settings
from obsinfra.control.delivery import OUTCOMES
from obsinfra.control.outcomes import UNDER_WAY
from obsinfra.control.responder import HELD_BACK
from obsinfra.errors import ConfigError

COMMITTED = Path(__file__).parents[2] / "alertmanager"

SLACK = {"api_url_file": "/secrets/slack", "channel": "#training"}
EMAIL = {
    "smarthost": "smtp.example.org:587",
    "from": "obsinfra@example.org",
    "to": ["a@example.org", "b@example.org"],
    "auth_username": "obsinfra",
    "auth_password_file": "/secrets/smtp",
}
WEBHOOK = {"url": "https://example.org/hook", "bearer_token_file": "/secrets/token"}
PAGERDUTY = {"routing_key_file": "/secrets/pagerduty"}
EVERYTHING = {
    "slack": SLACK,
    "email": EMAIL,
    "webhook": WEBHOOK,
    "pagerduty": PAGERDUTY,
    "watchdog": {"url": "https://example.org/alive"},
    "quiet_hours": [
        {"times": ["22:00-07:00"], "location": "Europe/Berlin"},
        {"weekdays": ["saturday", "sunday"]},
    ],
    "grafana_url": "https://grafana.example.org/d/obsinfra?var-run={run}&var-rank={rank}",
}


def notify(**parts: Any) -> Notify:
    return Notify.model_validate(parts)


def rendered(settings: Notify) -> dict[str, Any]:
    document = yaml.safe_load(render_alertmanager(settings))
    assert isinstance(document, dict)
    return document


def write(
    folder: Path, settings: Notify, links: StackLinks | None = None, policy: Policy = DEFAULT_POLICY
) -> Path:
    """The generated files below `folder`; returns alertmanager.yml."""
    (folder / "templates").mkdir(parents=True, exist_ok=True)
    for name, text in render_templates(settings, links, policy).items():
        (folder / "templates" / name).write_text(text)
    (folder / "alertmanager.yml").write_text(render_alertmanager(settings))
    return folder / "alertmanager.yml"


def test_the_committed_files_are_what_the_generator_writes() -> None:
    assert (COMMITTED / "alertmanager.yml").read_text() == render_alertmanager(Notify())
    committed = {path.name: path.read_text() for path in (COMMITTED / "templates").iterdir()}
    assert committed == render_templates(Notify())


# --- whatever the settings


severities = st.lists(st.sampled_from(SEVERITIES), min_size=1, unique=True)


def some_of(part: Mapping[str, Any]) -> st.SearchStrategy[dict[str, Any] | None]:
    return st.none() | severities.map(lambda chosen: dict(part, severities=chosen))


any_settings = st.fixed_dictionaries(
    {
        "slack": some_of(SLACK),
        "email": some_of(EMAIL),
        "webhook": some_of(WEBHOOK),
        "pagerduty": some_of(PAGERDUTY),
        "watchdog": st.none() | st.just(EVERYTHING["watchdog"]),
        "quiet_hours": st.lists(
            st.fixed_dictionaries(
                {
                    "times": st.lists(
                        st.sampled_from(["22:00-07:00", "12:00-13:30", "00:00-24:00"]), min_size=1, max_size=2
                    ),
                    "weekdays": st.lists(st.sampled_from(["monday", "sunday"]), unique=True),
                }
            ),
            max_size=2,
        ),
        "group_wait": st.sampled_from(["10s", "5m"]),
        "repeat_critical": st.sampled_from(["10m", "1h"]),
    }
).map(Notify.model_validate)


@given(any_settings)
def test_the_sidecar_gets_every_alert_whatever_peoples_routes_do(settings: Notify) -> None:
    routes = rendered(settings)["route"]["routes"]
    acting, informing = routes[:2]
    assert [route["matchers"] for route in (acting, informing)] == [['action!=""'], ['action=""']]
    for route in (acting, informing):
        assert route["receiver"] == "sidecar" and route["continue"] is True
        assert "mute_time_intervals" not in route and "routes" not in route
    # An action waits for nothing, and people's waiting times are not the sidecar's.
    assert (acting["group_wait"], acting["group_interval"], informing["group_wait"]) == ("0s", "1s", "10s")


@given(any_settings)
def test_each_channel_gets_its_severities_and_critical_is_never_muted(settings: Notify) -> None:
    document = rendered(settings)
    defined = {receiver["name"] for receiver in document["receivers"]}
    assert set(settings.channels) <= defined
    for channel, wanted in settings.channels.items():
        routes = [
            route
            for route in document["route"]["routes"]
            if route["receiver"] == channel and TEST_LABEL not in route["matchers"][0]
        ]
        found = {
            "warning" if "!~" in route["matchers"][0] else route["matchers"][0].split('"')[1]: route
            for route in routes
        }
        assert len(routes) == len(found) and set(found) == set(wanted)
        for severity, route in found.items():
            assert route["continue"] is True
            muted = route.get("mute_time_intervals", [])
            assert muted == (["quiet_hours"] if settings.quiet_hours and severity != "critical" else [])


@given(any_settings)
def test_each_receiver_that_tells_people_says_when_it_is_over(settings: Notify) -> None:
    for receiver in rendered(settings)["receivers"]:
        for configs in (value for key, value in receiver.items() if key != "name"):
            assert all(config["send_resolved"] is (receiver["name"] != "watchdog") for config in configs)


SECRET_KEYS = {
    "api_url",
    "auth_password",
    "bearer_token",
    "credentials",
    "routing_key",
    "service_key",
    "password",
}


@given(any_settings)
def test_secrets_are_named_by_file_and_never_written(settings: Notify) -> None:
    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node) | {key for item in node.values() for key in keys(item)}
        return {key for item in node for key in keys(item)} if isinstance(node, list) else set()

    document = rendered(settings)
    assert not keys(document) & SECRET_KEYS
    text = json.dumps(document)
    assert all(f'"{path}"' in text for path in settings.secret_files.values())


@given(any_settings)
def test_config_toml_reads_back_to_the_same_notify_settings(settings: Notify) -> None:
    import tomllib

    whole = Settings(notify=settings)
    assert Settings(**tomllib.loads(dump_toml(whole))) == whole


# --- what is refused


@pytest.mark.parametrize(
    "text",
    [
        'notify.slack.api_url = "https://hooks.example.org/SECRET"',
        'notify.slack = {api_url_file = "/x", channel = "#a", url = "https://hooks.example.org/SECRET"}',
        'notify.slack = {api_url_file = "/x", channel = "#a", misspelt = "SECRET"}',
        'notify.email = {smarthost = "h:587", from = "a@x", to = "b@x", auth_password = "SECRET"}',
        'notify.webhook = {url = "https://user:SECRET@example.org/"}',
        'notify.webhook = {url = "https://example.org/", bearer_token = "SECRET"}',
        'notify.pagerduty.routing_key = "SECRET"',
        'notify.watchdog = {url = "https://example.org/", token = "SECRET"}',
        'notify.smtp_auth_password = "SECRET"',
        'notify = "SECRET"',
    ],
)
def test_a_secret_in_the_settings_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    file = tmp_path / "obsinfra.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve({}, file=file, environ={})
    assert caught.value.exit_code == 2
    assert "notify" in str(caught.value) and str(file) in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('slack = {channel = "#a"}', ["notify.slack.api_url_file", "no default"]),
        ('slack = {api_url_file = "/x", channel = "{{ .x }}"}', ["notify.slack.channel", "without {{"]),
        ('slack = {api_url_file = "/x", channel = "#a", severities = ["fatal"]}', ["'fatal'", "critical"]),
        ('email = {smarthost = "h", from = "a@x", to = "b@x"}', ["notify.email.smarthost", "host:port"]),
        ('email = {smarthost = "h:70000", from = "a@x", to = "b@x"}', ["notify.email.smarthost"]),
        ('email = {smarthost = "h:587", from = "a", to = "b@x"}', ["notify.email.from", "mail address"]),
        (
            'email = {smarthost = "h:587", from = "a@x", to = "b@x", auth_username = "u"}',
            ["auth_password_file", "together"],
        ),
        (
            'email = {smarthost = "h:25", from = "a@x", to = "b@x", auth_username = "u", '
            'auth_password_file = "/x", require_tls = false}',
            ["require_tls"],
        ),
        ("webhook = {}", ["either url, or url_file"]),
        ('webhook = {url = "ftp://x/"}', ["http or https"]),
        ('webhook = {url = "http://x:70000/"}', ["notify.webhook.url"]),
        ('quiet_hours = {times = "25:00-26:00"}', ["notify.quiet_hours", "22:00-07:00"]),
        ('quiet_hours = {times = "07:00-07:00"}', ["notify.quiet_hours", "22:00-07:00"]),
        ('quiet_hours = {times = "22:00-07:00", location = "Moon/Base"}', ["time zone"]),
        ("quiet_hours = {}", ["times, weekdays, or both"]),
        ('grafana_url = "https://g/{loss}"', ["{run}", "{loss}"]),
        (f'run_url = "https://g/{"x" * 400}"', ["at most 320"]),
        ('repeat_info = "0s"', ["notify.repeat_info"]),
    ],
)
def test_an_impossible_setting_is_named_with_what_was_expected(
    tmp_path: Path, text: str, names: list[str]
) -> None:
    file = tmp_path / "obsinfra.toml"
    file.write_text(f"[notify]\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        resolve({}, file=file, environ={})
    for name in names:
        assert name in str(caught.value)


def test_the_environment_sets_the_same_settings_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "obsinfra.toml"
    file.write_text(
        '[notify.slack]\napi_url_file = "/x"\nchannel = "#a"\nseverities = ["critical", "info"]\n'
    )
    text = "slack.api_url_file=/x,slack.channel=#a,slack.severities=critical info"
    from_file = resolve({}, file=file, environ={}).settings.notify
    assert resolve({}, environ={"OBSINFRA_NOTIFY": text}).settings.notify == from_file
    assert from_file.channels == {"slack": ("critical", "info")}


# --- files with secrets


def test_a_missing_an_empty_and_a_nonsense_secret_file_are_one_clear_error_each(tmp_path: Path) -> None:
    path = tmp_path / "slack_url"
    settings = notify(slack=dict(SLACK, api_url_file=str(path)))
    with pytest.raises(ConfigError, match=r"notify\.slack\.api_url_file = .*slack_url.*No such file"):
        check_secret_files(settings)
    path.write_text(" \n")
    with pytest.raises(ConfigError, match="the file is empty"):
        check_secret_files(settings)
    path.write_text("hunter2\n")
    with pytest.raises(ConfigError, match="is no URL") as caught:
        check_secret_files(settings)
    assert "hunter2" not in str(caught.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text"):
        check_secret_files(settings)
    password = notify(email=dict(EMAIL, auth_password_file=str(path)))
    path.write_text("hunter2\n")
    with pytest.raises(ConfigError, match="ends in a line break") as caught:
        check_secret_files(password)
    assert "hunter2" not in str(caught.value)
    path.write_text("hunter2")
    check_secret_files(password)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        check_secret_files(settings)
    path.rmdir()
    path.write_text("https://hooks.example.org/services/1\n")
    check_secret_files(settings)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_secret_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("k")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        check_secret_files(notify(pagerduty={"routing_key_file": str(path)}))


def test_relative_and_home_paths_are_written_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    settings = notify(slack=dict(SLACK, api_url_file="secrets/slack"), pagerduty={"routing_key_file": "~/pd"})
    receivers = {receiver["name"]: receiver for receiver in rendered(settings)["receivers"]}
    assert receivers["slack"]["slack_configs"][0]["api_url_file"] == str(tmp_path / "secrets/slack")
    assert receivers["pagerduty"]["pagerduty_configs"][0]["routing_key_file"] == "/home/someone/pd"


# --- quiet hours, inhibition


def test_a_night_is_two_intervals_and_its_morning_belongs_to_the_next_day() -> None:
    document = rendered(notify(quiet_hours={"times": "22:00-07:00", "weekdays": "friday sunday"}))
    [named] = document["time_intervals"]
    assert named["name"] == "quiet_hours"
    assert named["time_intervals"] == [
        {
            "times": [{"start_time": "22:00", "end_time": "24:00"}],
            "weekdays": ["friday", "sunday"],
            "location": "UTC",
        },
        {
            "times": [{"start_time": "00:00", "end_time": "07:00"}],
            "weekdays": ["saturday", "monday"],
            "location": "UTC",
        },
    ]


def test_until_midnight_is_one_interval_and_whole_days_are_too() -> None:
    document = rendered(notify(quiet_hours=[{"times": "22:00-00:00"}, {"weekdays": "sunday"}]))
    assert document["time_intervals"][0]["time_intervals"] == [
        {"times": [{"start_time": "22:00", "end_time": "24:00"}], "location": "UTC"},
        {
            "times": [{"start_time": "00:00", "end_time": "24:00"}],
            "weekdays": ["sunday"],
            "location": "UTC",
        },
    ]


def test_an_alert_with_an_action_is_inhibited_only_where_that_action_is_no_use() -> None:
    for rule in rendered(Notify())["inhibit_rules"]:
        source = " ".join(rule["source_matchers"])
        assert (
            'action=""' in rule["target_matchers"]
            or (
                'action="checkpoint"' in rule["target_matchers"] and 'action="emergency_checkpoint"' in source
            )
            or "HostDown" in source
            or source.startswith('alertname="TrainerGone"')
        )
        # Two alerts that both lack a label are equal in it: the source must have one.
        assert any(f'{label}!=""' in source for label in rule["equal"])


def test_inhibition_names_alerts_of_the_table() -> None:
    named = {name for sources, targets in SUBJECTS.values() for name in (*sources, *targets)}
    table = {alert.name: alert for alert in ALERTS}
    assert named <= set(table)
    for sources, targets in SUBJECTS.values():
        assert {table[name].severity for name in sources} == {"critical"}
        assert "critical" not in {table[name].severity for name in targets}


# --- judged by amtool


@each_version
@pytest.mark.parametrize(
    "parts",
    [{}, EVERYTHING, {"slack": SLACK}, {"email": EMAIL, "quiet_hours": {"times": "22:00-07:00"}}],
    ids=["default", "everything", "slack", "mail"],
)
def test_amtool_accepts_the_files(tmp_path: Path, version: StackVersion, parts: dict[str, Any]) -> None:
    version.require("amtool")
    checked = version.run("amtool", "check-config", write(tmp_path, notify(**parts)))
    assert checked.returncode == 0, checked.stderr


ROUTED = [
    ("alertname=GradientExplosion severity=critical action=emergency_checkpoint run=r",
     "sidecar,slack,email,webhook,pagerduty"),
    ("alertname=SlowStep severity=warning action=checkpoint run=r rank=3", "sidecar,slack,email,webhook"),
    ("alertname=HighCPU severity=warning", "sidecar,slack,email,webhook"),
    ("alertname=HighGPUUtilization severity=info run=r device=0", "sidecar,slack,webhook"),
    ("alertname=OfSomebodyElse severity=page", "sidecar,slack,email,webhook"),
    ("alertname=WithoutSeverity", "sidecar,slack,email,webhook"),
    ("alertname=InfoInhibitor severity=none", "sidecar,nobody"),
    ("alertname=Watchdog severity=info", "sidecar,watchdog"),
    ("alertname=Watchdog severity=none", "sidecar,watchdog"),
    ("alertname=Watchdog severity=critical", "sidecar,watchdog"),
    ("alertname=ObsinfraTest obsinfra_test=email severity=warning", "sidecar,email"),
    ("alertname=ObsinfraTest obsinfra_test=pagerduty severity=warning", "sidecar,pagerduty"),
    ("alertname=ObsinfraTest obsinfra_test=fax severity=critical", "sidecar,nobody"),
]  # fmt: skip


@each_version
@pytest.mark.parametrize(("labels", "receivers"), ROUTED, ids=[labels for labels, _ in ROUTED])
def test_amtool_routes_each_alert_to_whom_it_is_meant_for(
    tmp_path: Path, version: StackVersion, labels: str, receivers: str
) -> None:
    version.require("amtool")
    file = write(tmp_path, notify(**EVERYTHING))
    routed = version.run("amtool", "config", "routes", "test", f"--config.file={file}", *labels.split())
    assert routed.stdout.strip() == receivers, routed.stderr


@each_version
def test_with_nobody_set_up_only_the_sidecar_hears(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    file = write(tmp_path, Notify())
    for labels in ("alertname=A severity=critical", "alertname=A severity=info run=r action=checkpoint"):
        routed = version.run("amtool", "config", "routes", "test", f"--config.file={file}", *labels.split())
        assert routed.stdout.strip() == "sidecar", routed.stderr


# --- messages, rendered by amtool


LONGEST_LINK = "https://g.example.org/{run}?" + "x" * (
    LINK_CHARACTERS - len("https://g.example.org/?") - LINK_LABEL_CHARACTERS - len("{run}")
)


def alert(status: str = "firing", **changed: str) -> dict[str, Any]:
    labels = {
        "alertname": "GradientExplosion", "run": "my-run", "model": "byte_gpt", "rank": "0", "device": "0",
        "severity": "critical", "action": "emergency_checkpoint", "instance": "127.0.0.1:9464",
        "job": "trainers",
    }  # fmt: skip
    annotations = {
        "summary": "Gradient norm above 100", "description": "Divergence may follow.", "value": "250",
        "threshold": "100", "step": "1234", "runbook_url": "https://example.org/GradientExplosion.md",
    }  # fmt: skip
    for key, value in changed.items():
        (labels if key in labels else annotations)[key] = value
    return {
        "status": status,
        "labels": labels,
        "annotations": annotations,
        "startsAt": "2026-01-02T03:04:05Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/",
        "fingerprint": "0",
    }


def render(
    version: StackVersion, folder: Path, template: str, alerts: list[dict[str, Any]], kind: str = "text"
) -> str:
    """What Alertmanager's own template engine makes of a group of alerts."""
    shared = dict(alerts[0]["labels"])
    for one in alerts:
        shared = {key: value for key, value in shared.items() if one["labels"].get(key) == value}
    resolved = all(one["status"] == "resolved" for one in alerts)
    data = {
        "receiver": "slack",
        "status": "resolved" if resolved else "firing",
        "alerts": alerts,
        "groupLabels": {"run": shared.get("run", "")},
        "commonLabels": shared,
        "commonAnnotations": {},
        "externalURL": "http://alertmanager:9093",
    }
    (folder / "data.json").write_text(json.dumps(data))
    done = version.run(
        "amtool", "template", "render",
        f"--template.glob={folder}/templates/*.tmpl",
        f'--template.text={{{{ template "{template}" . }}}}',
        f"--template.data={folder / 'data.json'}",
        f"--template.type={kind}",
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.removesuffix("\n")


@each_version
def test_slack_says_what_one_needs_to_know(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, notify(**EVERYTHING))
    text = render(version, tmp_path, "obsinfra.slack.text", [alert()])
    assert text.split("\n") == [
        "*GradientExplosion* Gradient norm above 100",
        "my-run · model byte_gpt · rank 0 · device 0 · step 1234 · value 250 · threshold 100",
        "Asked for: emergency_checkpoint, outcome not known yet",
        "Divergence may follow.",
        "<https://example.org/GradientExplosion.md|Runbook>  ",
        "<https://grafana.example.org/d/obsinfra?var-run=my-run&amp;var-rank=0|Grafana>  "
        "<http://127.0.0.1:9464/|Run page>  ",
    ]
    title = render(version, tmp_path, "obsinfra.slack.title", [alert()])
    assert title == "[CRITICAL] GradientExplosion · my-run"
    assert render(version, tmp_path, "obsinfra.slack.color", [alert()]) == "danger"


@each_version
def test_messages_say_what_the_sidecar_does_by_the_policy(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    odd = 'an "odd" }} na\tme 😀'
    policy: dict[str, Any] = {
        "alerts": {
            "GradientExplosion": {"action": "none"},
            "SlowStep": {"action": "profile", "escalate": [{"action": "stop", "after_minutes": 1.5}]},
            odd: {"action": "pause"},
        }
    }
    hot = ("emergency_checkpoint", "; if it goes on, pause after 5 min, then stop after 15 min")
    unknown = ", outcome not known yet"
    for dry_run, acts, known in (
        (False, "Asked for: ", unknown),
        (True, "Dry run; would be asked for: ", ""),
    ):
        write(tmp_path, Notify(), policy=policy_with(policy | {"dry_run": dry_run}))
        for name, action, says in (
            ("GradientExplosion", "emergency_checkpoint", None),
            ("SlowStep", "checkpoint", ("profile", "; if it goes on, stop after 1.5 min")),
            ("HighGPUTemperature", "emergency_checkpoint", hot),
            ("HighGPUTemperature", "", None),
            (odd, "", ("pause", "")),
            ("Mine", "scale_lr", ("scale_lr", "")),
        ):
            one = alert(alertname=name, action=action)
            for template, end in (("slack.text", "\n"), ("mail.text", "\n"), ("mail.html", "<br>")):
                kind = "html" if template == "mail.html" else "text"
                text = render(version, tmp_path, f"obsinfra.{template}", [one], kind)
                assert ("sked for" in text) == (says is not None)
                assert says is None or f"{acts}{says[0]}{known}{says[1]}{end}" in text


DONE = "done: emergency_checkpoint, step 60, 0.3 s"
PAUSED = f"{DONE} · under_way: pause, 1.0 s"
STOPPED = f"{DONE} · done: pause, step 70, 0.1 s · failed: stop, 2.0 s"


@each_version
def test_messages_say_what_came_of_it(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    again = {"SlowStep": {"action": "profile", "escalate": [{"action": "profile", "after_minutes": 9}]}}
    write(tmp_path, Notify(), policy=policy_with({"alerts": again}))
    saved = "Done: emergency_checkpoint, step 60, 0.3 s"
    for name, status, outcome, says in (
        ("GradientExplosion", "firing", DONE, saved),
        ("GradientExplosion", "firing", "cool_down: checkpoint", "Told a moment ago already: checkpoint"),
        (
            "GradientExplosion",
            "firing",
            "done: a, 1.0 s · hourly_limit: done",
            "Done: a, 1.0 s · Not done, limit of the hour reached: done",
        ),
        ("GradientExplosion", "firing", "new_one: it", "new_one: it"),
        (
            "HighGPUTemperature",
            "firing",
            DONE,
            f"{saved}; if it goes on, pause after 5 min, then stop after 15 min",
        ),
        (
            "HighGPUTemperature",
            "firing",
            PAUSED,
            f"{saved} · Under way: pause, 1.0 s; if it goes on, stop after 15 min",
        ),
        (
            "HighGPUTemperature",
            "firing",
            STOPPED,
            f"{saved} · Done: pause, step 70, 0.1 s · Failed: stop, 2.0 s",
        ),
        ("HighGPUTemperature", "resolved", PAUSED, f"{saved} · Under way: pause, 1.0 s"),
        # The same action first and later: which of the two it was is not known.
        (
            "SlowStep",
            "firing",
            "done: profile, 3.0 s",
            "Done: profile, 3.0 s; if it goes on, profile after 9 min",
        ),
    ):
        one = alert(status, alertname=name, outcome=outcome)
        for template, end in (("slack.text", "\n"), ("mail.text", "\n"), ("mail.html", "<br>")):
            kind = "html" if template == "mail.html" else "text"
            text = render(version, tmp_path, f"obsinfra.{template}", [one], kind)
            assert f"{says}{end}" in text and "sked for" not in text, (template, text)
    paged = render(version, tmp_path, "obsinfra.pagerduty.alerts", [alert(outcome=STOPPED)])
    assert "; Done – emergency_checkpoint, step 60, 0.3 s · Done – pause" in paged
    assert isinstance(yaml.safe_load(paged), str)  # as newer Alertmanagers read it


def test_every_outcome_is_put_into_words() -> None:
    told = (*OUTCOMES, UNDER_WAY, *HELD_BACK, "unknown_action")
    assert sorted(OUTCOME_WORDS) == sorted(told)


@each_version
def test_what_is_over_is_told_as_over(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, Notify())
    over = [alert("resolved")]
    assert render(version, tmp_path, "obsinfra.title", over) == "[RESOLVED] GradientExplosion · my-run"
    assert render(version, tmp_path, "obsinfra.slack.color", over) == "good"
    text = render(version, tmp_path, "obsinfra.slack.text", over)
    assert "Gradient norm above 100" in text and "Asked for" not in text
    mixed = render(version, tmp_path, "obsinfra.slack.text", [alert(), alert("resolved", rank="1")])
    assert "Asked for" in mixed and "1 resolved" in mixed


@each_version
def test_what_an_alert_does_not_have_is_left_out(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, notify(**EVERYTHING))
    bare = alert()
    bare["labels"], bare["annotations"] = {"alertname": "Bare"}, {}
    text = render(version, tmp_path, "obsinfra.slack.text", [bare])
    assert text.split() == ["*Bare*"]
    for template in ("obsinfra.title", "obsinfra.mail.text", "obsinfra.pagerduty.alerts"):
        made = render(version, tmp_path, template, [bare])
        assert "Bare" in made and "no value" not in made and "http" not in made
    html = render(version, tmp_path, "obsinfra.mail.html", [bare], "html")
    assert "Bare" in html and "<a " not in html


worst = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(
    lambda text: text * 60
) | st.sampled_from(["&" * 3000, "<!channel>" * 300, "é\n" * 2000, "\"'`*_~|{{ }}" * 200, "\\" * 3000])


@each_version
def test_a_message_leads_to_the_runs_traces_where_they_are(tmp_path: Path, version: StackVersion) -> None:
    """In the stack's own store, else on its page of slow steps; where the settings say otherwise, there."""
    version.require("amtool")
    store, page = jaeger_search("http://127.0.0.1:16686"), "http://127.0.0.1:9465/?run={run}#slow-steps"
    no_run = alert()
    del no_run["labels"]["run"]
    for number, (settings, links, name, url) in enumerate(
        [
            (notify(), StackLinks(slow_steps=page), "Slow steps", page),
            (notify(), StackLinks(traces=store, slow_steps=page), "Trace", store),
            (notify(trace_url="https://t.example.org/{run}"), StackLinks(traces=store), "Trace", None),
            (notify(), None, None, None),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, settings, links)
        expected = (url or "https://t.example.org/{run}").replace("{run}", "my-run")
        for template, link in (
            ("slack.text", f"<{expected.replace('&', '&amp;')}|{name}>"),
            ("mail.text", f"{name}: {expected}"),
            ("mail.html", f'<a href="{expected}">{name}</a>'),
        ):
            kind = "html" if template == "mail.html" else "text"
            text = render(version, folder, f"obsinfra.{template}", [alert()], kind)
            shown = [title for title in ("Slow steps", "Trace") if title in text]
            assert shown == ([name] if name else []) and (name is None or link in text), text
            assert not name or name not in render(version, folder, f"obsinfra.{template}", [no_run], kind)


@each_version
@given(label=worst, annotation=worst, count=st.sampled_from([1, 7, 60]), outcome=st.none() | worst)
@hypothesis_settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_slack_messages_stay_within_the_limits_whatever_the_alerts_say(
    tmp_path: Path, version: StackVersion, label: str, annotation: str, count: int, outcome: str | None
) -> None:
    version.require("amtool")
    longest: dict[str, Any] = {"action": "x" * 200, "escalate": [{"action": "stop", "after_minutes": 1}] * 10}
    write(
        tmp_path,
        notify(grafana_url=LONGEST_LINK, run_url=LONGEST_LINK, trace_url=LONGEST_LINK),
        policy=policy_with({"alerts": {"A" * 40: longest}, "dry_run": True}, known_actions_only=False),
    )
    alerts = []
    for _ in range(count):
        one = alert()
        for key in one["labels"]:
            one["labels"][key] = label
        for key in one["annotations"]:
            one["annotations"][key] = annotation
        # Everything that makes a link, or what the sidecar does, as long as it may be.
        one["labels"]["alertname"] = "A" * 40
        one["labels"]["run"] = "r" * LINK_LABEL_CHARACTERS
        one["annotations"]["runbook_url"] = one["annotations"]["trace_url"] = "https://" + "x" * 170
        if outcome is not None:
            one["annotations"]["outcome"] = outcome
        alerts.append(one)
    text = render(version, tmp_path, "obsinfra.slack.text", alerts)
    assert len(text) <= SLACK_TEXT_CHARACTERS
    # No mention can be smuggled in: a "<" begins a link of ours alone, and no entity is cut in two.
    for after in text.split("<")[1:]:
        assert after.startswith("https://")
    for after in text.split("&")[1:]:
        assert after.startswith(("amp;", "lt;", "gt;"))
    title = render(version, tmp_path, "obsinfra.slack.title", alerts)
    assert len(title) <= 150 and "<" not in title and "\n" not in title


@each_version
def test_html_mail_escapes_what_alerts_say(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, notify(grafana_url="https://g.example.org/?run={run}"))
    nasty = alert(
        summary="<script>alert(1)</script>",
        description='" onmouseover="x" & <b>bold</b>',
        runbook_url='https://example.org/"><script>',
        model="<img src=x>",
    )
    html = render(version, tmp_path, "obsinfra.mail.html", [nasty], "html")
    assert "<script" not in html and "<img" not in html and "<b>bold" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&lt;img src=x&gt;" in html
    assert html.count("<a ") == 3 and html.count('href="') == 3
    assert '<a href="https://g.example.org/?run=my-run">Grafana</a>' in html
    javascript = alert(runbook_url="javascript:alert(1)")
    assert "javascript" not in render(version, tmp_path, "obsinfra.mail.html", [javascript], "html")


@each_version
def test_a_run_whose_name_does_not_fit_a_url_makes_no_link(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, notify(grafana_url="https://g.example.org/?run={run}"))
    for name in ("a b", "a&b=c", 'a">x', "x" * 101, ""):
        text = render(version, tmp_path, "obsinfra.slack.text", [alert(run=name)])
        assert "g.example.org" not in text


@each_version
def test_a_subject_is_one_line(tmp_path: Path, version: StackVersion) -> None:
    version.require("amtool")
    write(tmp_path, Notify())
    title = render(version, tmp_path, "obsinfra.title", [alert(run="my\r\nBcc: all@example.org")])
    assert title == "[CRITICAL] GradientExplosion · my Bcc: all@example.org"
    many = [alert(), alert(alertname="SlowStep", severity="warning")]
    assert render(version, tmp_path, "obsinfra.title", many) == "[FIRING] 2 alerts · my-run"


@each_version
@pytest.mark.parametrize(
    ("severity", "sent"), [("critical", "critical"), ("info", "info"), ("page", "warning"), ("", "warning")]
)
def test_pagerduty_gets_a_severity_it_knows(
    tmp_path: Path, version: StackVersion, severity: str, sent: str
) -> None:
    version.require("amtool")
    write(tmp_path, Notify())
    assert render(version, tmp_path, "obsinfra.pagerduty.severity", [alert(severity=severity)]) == sent
