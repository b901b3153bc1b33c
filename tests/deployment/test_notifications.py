"""Alerts reach people: a real Alertmanager, a real mail server, and an endpoint that knows Slack's limits."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from people import Endpoint, MailServer, http_endpoint, mail_server
from slack_limits import check_slack
from stack_tools import get_json, processes_naming
from stack_versions import StackVersion, each_version
from terminal import Terminal
from waiting import wait_for

from obsinfra.alerting.messages import StackLinks
from obsinfra.cli import alerts as commands
from obsinfra.cli import main as cli
from obsinfra.config.notify import Notify
from obsinfra.control.alertmanager import Alertmanager, AlertmanagerError
from obsinfra.deployment.native_stack import NativeStack
from obsinfra.deployment.ports import StackPorts, free_port
from obsinfra.deployment.stack_configuration import write_configuration
from obsinfra.errors import ConfigError

pytestmark = [pytest.mark.stack]

USER, PASSWORD = "obsinfra", "correct horse battery staple"
FAST = {"group_wait": "1s", "group_interval": "1s"}
SLOW_STEPS = "http://127.0.0.1:9465/?run={run}#slow-steps"
ALWAYS = {"times": "00:00-24:00"}

NASTY = "<!channel> & \"quoted\" 'x'\n\t{{ .Labels }} *b* `c` |> é😀 <script>alert(1)</script> "


@dataclass
class People:
    """Everybody an Alertmanager can tell, and the settings that make it do so."""

    http: Endpoint
    mail: MailServer
    folder: Path

    def settings(self, **changed: Any) -> dict[str, Any]:
        """`[notify]` with all channels; `changed` replaces parts, None takes one away."""
        secret = self.folder / "secrets"
        parts: dict[str, Any] = {
            "slack": {"api_url_file": str(secret / "slack"), "channel": "#training"},
            "email": {
                "smarthost": f"localhost:{self.mail.port}",
                "from": "obsinfra@example.org",
                "to": ["a@example.org", "b@example.org"],
                "auth_username": USER,
                "auth_password_file": str(secret / "smtp"),
                "ca_file": str(self.mail.certificate),
            },
            "webhook": {"url": self.http.url("/hook"), "bearer_token_file": str(secret / "token")},
            "pagerduty": {
                "routing_key_file": str(secret / "pagerduty"),
                "url": self.http.url("/pagerduty"),
            },
            "grafana_url": "https://grafana.example.org/d/obsinfra?var-run={run}",
        }
        return {key: value for key, value in (parts | FAST | changed).items() if value is not None}


@pytest.fixture
def people(tmp_path: Path) -> Iterator[People]:
    with http_endpoint() as http, mail_server(tmp_path / "mail", USER, PASSWORD) as mail:
        (tmp_path / "secrets").mkdir(mode=0o700)
        for name, secret in (
            ("slack", http.url("/slack/T0/B0/slack-secret")),
            ("smtp", PASSWORD),
            ("token", "hook-secret"),
            ("pagerduty", "pagerduty-secret"),
        ):
            (tmp_path / "secrets" / name).write_text(secret if name == "smtp" else secret + "\n")
        yield People(http, mail, tmp_path)


Start = Callable[..., Alertmanager]


@pytest.fixture
def start(people: People, version: StackVersion, tmp_path: Path) -> Iterator[Start]:
    """Starts Alertmanager with these settings; the endpoint's /webhook stands for the sidecar."""
    with ExitStack() as running:

        def begin(**parts: Any) -> Alertmanager:
            settings = Notify.model_validate(parts)
            return running.enter_context(alertmanager(version, tmp_path / "state", settings, people.http))

        yield begin


@contextmanager
def alertmanager(
    version: StackVersion, state: Path, settings: Notify, sidecar: Endpoint
) -> Iterator[Alertmanager]:
    """A real Alertmanager on the files that the native stack would write."""
    [program] = version.require("alertmanager")
    state.mkdir(mode=0o700)
    (state / "token").write_text("sidecar-secret")
    port = free_port("127.0.0.1", 0, set())
    addresses = {
        "prometheus": "127.0.0.1:1",
        "alertmanager": f"127.0.0.1:{port}",
        "sidecar": f"127.0.0.1:{sidecar.port}",
    }
    write_configuration(
        state, addresses, state / "token", notify=settings, links=StackLinks(slow_steps=SLOW_STEPS)
    )
    with (state / "alertmanager.log").open("wb") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={state / 'alertmanager/alertmanager.yml'}",
                f"--storage.path={state / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--cluster.listen-address=",
            ],
            stdout=log,
            stderr=log,
        )
    found = Alertmanager(f"http://127.0.0.1:{port}")

    def ready() -> bool:
        assert process.poll() is None, (state / "alertmanager.log").read_text()
        try:
            return bool(found.receivers())
        except AlertmanagerError:
            return False

    try:
        wait_for(ready, "Alertmanager answers")
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def fire(running: Alertmanager, name: str, severity: str = "critical", **changed: str) -> dict[str, str]:
    """Send an alert as Prometheus would; returns its labels."""
    labels, annotations = alert(name, severity, **changed)
    starts = datetime.now(UTC)
    running.post(labels, annotations, starts=starts, ends=starts + timedelta(hours=1))
    return labels


def alert(name: str, severity: str = "critical", **changed: str) -> tuple[dict[str, str], dict[str, str]]:
    """Labels and annotations."""
    labels = {"alertname": name, "severity": severity, "run": "my-run", "model": "byte_gpt", "rank": "0"}
    annotations = {
        "summary": f"{name} it is",
        "description": "Divergence may follow.",
        "value": "250",
        "threshold": "100",
        "runbook_url": "https://example.org/runbook.md",
        "outcome": "",
    }
    for key, value in changed.items():
        (annotations if key in annotations else labels)[key] = value
    return labels, annotations


@each_version
def test_one_alert_reaches_everybody_with_what_they_need_to_know(start: Start, people: People) -> None:
    running = start(**people.settings())
    done = "done: emergency_checkpoint, step 60, 0.3 s"
    labels = fire(running, "GradientExplosion", action="emergency_checkpoint", outcome=done)

    [slack] = wait_for(lambda: people.http.at("/slack/T0/B0/slack-secret"), "Slack hears")
    check_slack(slack.body)
    assert slack.body["channel"] == "#training"
    [attachment] = slack.body["attachments"]
    assert attachment["title"] == "[CRITICAL] GradientExplosion · my-run"
    assert attachment["color"] == "danger"
    for part in (
        "GradientExplosion it is", "my-run", "model byte_gpt", "value 250", "threshold 100",
        "Done: emergency_checkpoint, step 60, 0.3 s", "<https://example.org/runbook.md|Runbook>",
        "<https://grafana.example.org/d/obsinfra?var-run=my-run|Grafana>",
        "<http://127.0.0.1:9465/?run=my-run#slow-steps|Slow steps>",
    ):  # fmt: skip
        assert part in attachment["text"]

    [mail] = wait_for(lambda: people.mail.mails, "a mail arrives")
    assert (people.mail.encrypted, people.mail.users) == ([True], [USER.encode()])
    assert people.mail.recipients == [["a@example.org", "b@example.org"]]
    assert mail["Subject"] == "[CRITICAL] GradientExplosion · my-run"
    for kind in ("plain", "html"):
        body = mail.get_body((kind,))
        assert body is not None
        for part in (
            "GradientExplosion it is",
            "my-run",
            "250",
            "Done: emergency_checkpoint, step 60, 0.3 s",
            "runbook.md",
            "?run=my-run#slow-steps",
        ):
            assert part in body.get_content()

    [hook] = wait_for(lambda: people.http.at("/hook"), "the webhook is called")
    assert hook.headers["authorization"] == "Bearer hook-secret"
    assert hook.body["alerts"][0]["labels"] == labels
    assert hook.body["alerts"][0]["annotations"]["outcome"] == done
    [page] = wait_for(lambda: people.http.at("/pagerduty"), "PagerDuty hears")
    assert page.body["routing_key"] == "pagerduty-secret"
    assert page.body["payload"]["severity"] == "critical"
    assert page.body["payload"]["summary"] == "[CRITICAL] GradientExplosion · my-run"
    paged = page.body["payload"]["custom_details"]["alerts"]
    assert "GradientExplosion it is" in paged
    assert "Done – emergency_checkpoint, step 60, 0.3 s" in paged
    [sidecar] = people.http.at("/webhook")
    assert sidecar.headers["authorization"] == "Bearer sidecar-secret"

    now = datetime.now(UTC)
    running.post(labels, {"summary": "over"}, starts=now - timedelta(minutes=1), ends=now)
    over = wait_for(lambda: people.http.at("/slack/T0/B0/slack-secret")[1:], "Slack hears that it is over")
    check_slack(over[0].body)
    assert over[0].body["attachments"][0]["title"] == "[RESOLVED] GradientExplosion · my-run"
    assert over[0].body["attachments"][0]["color"] == "good"
    resolved = wait_for(lambda: people.mail.mails[1:], "a mail says that it is over")
    assert resolved[0]["Subject"] == "[RESOLVED] GradientExplosion · my-run"
    wait_for(lambda: people.http.alerts("/webhook", "resolved"), "the sidecar hears that it is over")


@each_version
def test_sixty_alerts_of_a_run_are_one_message_within_slacks_limits(start: Start, people: People) -> None:
    running = start(**people.settings(group_wait="2s"))
    many = [
        alert(
            "HighGPUMemory", rank=str(rank), model=NASTY * 3, device=NASTY,
            summary=NASTY * 20, description=NASTY * 60, value=NASTY,
        )
        for rank in range(60)
    ]  # fmt: skip
    # In one request, as Prometheus does, so that all are there when the group's turn comes.
    documents = [{"labels": labels, "annotations": annotations} for labels, annotations in many]
    httpx.post(f"{running.url}/api/v2/alerts", json=documents, trust_env=False).raise_for_status()
    [slack] = wait_for(lambda: people.http.at("/slack/T0/B0/slack-secret"), "Slack hears")
    check_slack(slack.body)
    [attachment] = slack.body["attachments"]
    assert attachment["title"] == "[CRITICAL] HighGPUMemory (60) · my-run"
    assert "60 in all" in attachment["text"]
    [mail] = wait_for(lambda: people.mail.mails, "a mail arrives")
    assert mail["Subject"] == "[CRITICAL] HighGPUMemory (60) · my-run"
    html, text = mail.get_body(("html",)), mail.get_body(("plain",))
    assert html is not None and text is not None
    assert "<script" not in html.get_content() and "&lt;script&gt;" in html.get_content()
    assert "The first 50 of 60 alerts." in text.get_content()
    assert html.get_content().count("<b>HighGPUMemory</b>") == 50
    [page] = wait_for(lambda: people.http.at("/pagerduty"), "PagerDuty hears")
    assert page.body["payload"]["summary"] == "[CRITICAL] HighGPUMemory (60) · my-run"


@each_version
def test_runs_are_told_apart_and_severities_go_where_they_are_wanted(start: Start, people: People) -> None:
    running = start(**people.settings(group_wait="2s"))
    fire(running, "SlowStep", "warning", run="first")
    fire(running, "DataStarvation", "warning", run="first")
    fire(running, "SlowStep", "warning", run="second")
    fire(running, "HighGPUUtilization", "info", run="first")
    fire(running, "OfSomebodyElse", "page", run="third")

    def titles() -> set[str]:
        return {post.body["attachments"][0]["title"] for post in people.http.at("/slack/T0/B0/slack-secret")}

    expected = {
        "[WARNING] 2 alerts · first", "[WARNING] SlowStep · second", "[INFO] HighGPUUtilization · first",
        "[PAGE] OfSomebodyElse · third",
    }  # fmt: skip
    wait_for(lambda: titles() == expected, f"Slack hears of {expected}")
    wait_for(lambda: len(people.mail.mails) == 3, "mails of the warnings")
    assert {str(mail["Subject"]) for mail in people.mail.mails} == expected - {
        "[INFO] HighGPUUtilization · first"
    }
    assert people.http.at("/pagerduty") == []


@each_version
def test_quiet_hours_hold_back_warnings_never_what_is_critical_nor_the_sidecar(
    start: Start, people: People
) -> None:
    running = start(**people.settings(quiet_hours=ALWAYS, group_wait="1s"))
    fire(running, "SlowStep", "warning", action="checkpoint")
    fire(running, "HighGPUUtilization", "info")
    wait_for(lambda: "SlowStep" in people.http.alerts("/webhook"), "the sidecar hears of the warning")
    wait_for(lambda: "HighGPUUtilization" in people.http.alerts("/webhook"), "and of the information")
    fire(running, "GradientExplosion")
    wait_for(lambda: "GradientExplosion" in people.http.alerts("/hook"), "people hear what is critical")
    # The warnings' groups had their turn long before: the sidecar's waits 10 s, people's 1 s.
    assert people.http.alerts("/hook") == ["GradientExplosion"]
    [slack] = wait_for(lambda: people.http.at("/slack/T0/B0/slack-secret"), "Slack hears of it")
    assert slack.body["attachments"][0]["title"] == "[CRITICAL] GradientExplosion · my-run"


@each_version
def test_outside_quiet_hours_warnings_are_told(start: Start, people: People) -> None:
    today = datetime.now(UTC)
    other = (today + timedelta(days=3)).strftime("%A").lower()
    running = start(**people.settings(quiet_hours={"weekdays": [other]}))
    fire(running, "SlowStep", "warning")
    wait_for(lambda: people.http.alerts("/hook") == ["SlowStep"], "people hear of the warning")


@each_version
def test_what_only_repeats_a_worse_alert_is_held_back_but_no_action_that_is_of_use(
    start: Start, people: People
) -> None:
    running = start(**people.settings(group_wait="3s"))
    fire(running, "NonFiniteLoss", action="emergency_checkpoint")
    fire(running, "LossSpike", "warning")
    fire(running, "LossSpike", "warning", run="another")
    fire(running, "GradientNormRising", "warning", action="checkpoint")
    fire(running, "GradientNormRising", "warning", action="profile", rank="1")
    fire(running, "CheckpointFailing", "warning")
    heard = {"NonFiniteLoss", "GradientNormRising", "CheckpointFailing", "LossSpike"}
    wait_for(lambda: set(people.http.alerts("/hook")) == heard, "people hear of the rest")
    # Of the other run, and with another action than the checkpoint that is made anyway.
    for name in ("LossSpike", "GradientNormRising"):
        assert people.http.alerts("/hook").count(name) == 1
    wait_for(
        lambda: {"NonFiniteLoss", "GradientNormRising"} <= set(people.http.alerts("/webhook")), "sidecar"
    )


@each_version
def test_a_gone_trainer_explains_why_there_is_no_progress(start: Start, people: People) -> None:
    running = start(**people.settings(group_wait="2s"))
    fire(running, "TrainerGone")
    fire(running, "NoProgress", action="dump_stacks")
    fire(running, "NoProgress", run="another")
    wait_for(lambda: len(people.http.alerts("/hook")) == 2, "people hear")
    assert sorted(people.http.alerts("/hook")) == ["NoProgress", "TrainerGone"]
    [inhibited] = [alert for alert in running.alerts() if alert.inhibited_by]
    assert (inhibited.labels["alertname"], inhibited.labels["run"]) == ("NoProgress", "my-run")


@each_version
def test_a_host_that_is_down_explains_what_is_wrong_with_its_runs(start: Start, people: People) -> None:
    running = start(**people.settings(group_wait="3s"))
    fire(running, "HostDown", run="", model="", rank="", host="gpu-1", scope="stack")
    fire(running, "TrainerUnreachable", "warning", host="gpu-1")
    fire(running, "DataStarvation", "warning", run="second", host="gpu-1")
    fire(running, "TrainerUnreachable", "warning", run="third", host="gpu-2")
    wait_for(lambda: len(people.http.alerts("/hook")) == 2, "people hear")
    assert sorted(people.http.alerts("/hook")) == ["HostDown", "TrainerUnreachable"]
    held_back = sorted(alert.labels["run"] for alert in running.alerts() if alert.inhibited_by)
    assert held_back == ["my-run", "second"]


@each_version
def test_the_dead_mans_switch_is_told_again_and_again_and_people_never(start: Start, people: People) -> None:
    running = start(**people.settings(watchdog={"url": people.http.url("/alive"), "every": "2s"}))
    fire(running, "Watchdog", "none")
    wait_for(lambda: len(people.http.at("/alive")) >= 3, "the switch is told three times")
    assert people.http.at("/hook") == [] and people.mail.mails == []


@each_version
def test_a_webhooks_address_may_be_a_secret_where_alertmanager_can_read_it(
    start: Start, people: People, version: StackVersion, tmp_path: Path
) -> None:
    if version.number("alertmanager") < (0, 26):
        pytest.skip("Alertmanager before 0.26 has no url_file; the native stack says so, see below")
    (tmp_path / "address").write_text(people.http.url("/hidden") + "\n")
    running = start(**people.settings(webhook={"url_file": str(tmp_path / "address")}))
    fire(running, "GradientExplosion")
    wait_for(lambda: people.http.alerts("/hidden") == ["GradientExplosion"], "the webhook is called")
    assert "/hidden" not in (tmp_path / "state/alertmanager/alertmanager.yml").read_text()


# --- obsinfra alerts


@pytest.fixture
def obsinfra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for console in (commands.console, cli.stderr):
        monkeypatch.setattr(console, "_width", 250)
    return Terminal("alerts", capsys, monkeypatch)


@each_version
def test_a_test_alert_takes_the_real_path_to_each_channel(
    start: Start, people: People, obsinfra: Terminal
) -> None:
    running = start(**people.settings(quiet_hours=ALWAYS))
    result = obsinfra("test", "--to", "all", "--alertmanager", running.url)
    assert result.code == 0, result.out + result.err
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["delivered", channel] for channel in ("slack", "email", "webhook", "pagerduty")
    ]
    [slack] = people.http.at("/slack/T0/B0/slack-secret")[:1]
    check_slack(slack.body)
    assert slack.body["attachments"][0]["title"] == "[TEST] [WARNING] ObsinfraTest · test"
    assert "nothing is wrong" in slack.body["attachments"][0]["text"]
    assert people.mail.mails[0]["Subject"] == "[TEST] [WARNING] ObsinfraTest · test"
    assert people.http.alerts("/hook")[:1] == ["ObsinfraTest"]
    [hook, *_] = people.http.at("/hook")
    assert datetime.fromisoformat(hook.body["alerts"][0]["startsAt"]) <= datetime.now(UTC)
    assert people.http.at("/pagerduty")[0].body["payload"]["summary"].startswith("[TEST]")
    # Each channel was told of its own test alone, and the tests are over.
    hooks = people.http.at("/hook")
    assert {post.body["alerts"][0]["labels"]["obsinfra_test"] for post in hooks} == {"webhook"}
    wait_for(lambda: not running.alerts(), "no test alert stays")


@each_version
def test_a_channel_that_refuses_is_reported_with_the_reason(
    start: Start, people: People, obsinfra: Terminal
) -> None:
    (people.folder / "secrets" / "smtp").write_text("wrong")
    running = start(**people.settings())
    people.http.status, people.http.answer = 403, b"invalid_token"
    for channel in ("slack", "email"):
        result = obsinfra("test", "--to", channel, "--alertmanager", running.url)
        assert result.code == 1
        assert result.out.startswith("failed") and "1 of them failed" in result.out
    assert people.mail.mails == []


@each_version
def test_a_channel_that_is_not_set_up_is_said_to_be_missing(
    start: Start, people: People, obsinfra: Terminal
) -> None:
    running = start(**people.settings(email=None))
    result = obsinfra("test", "--to", "slack,email", "--alertmanager", running.url)
    assert (result.code, result.out) == (2, "")
    assert "email is not set up" in result.err and "[notify.email]" in result.err
    Path("obsinfra.toml").write_text(
        '[notify.email]\nsmarthost = "h:25"\nfrom = "a@x"\nto = "b@x"\nrequire_tls = false\n'
    )
    result = obsinfra("test", "--to", "email", "--alertmanager", running.url)
    assert result.code == 2 and "'obsinfra down', then 'obsinfra up'" in result.err
    assert people.http.posts == []


@each_version
def test_list_and_silence(start: Start, people: People, obsinfra: Terminal) -> None:
    running = start(**people.settings())
    at = ("--alertmanager", running.url)
    assert obsinfra("list", *at).out == "nothing fires\n"
    fire(running, "GradientExplosion", value="[red]250[/]")
    fire(running, "GradientExplosion", run="another")
    for integration in ("slack", "email"):
        fire(running, "NotificationsFailing", run="stack", integration=integration)
    shown = wait_for(
        lambda: (
            (r := obsinfra("list", *at)).out.count("GradientExplosion") == 2
            and r.out.count("NotificationsFailing") == 2
            and r
        ),
        "all listed",
    )
    assert "integration slack" in shown.out and "integration email" in shown.out
    assert "[red]250[/]" in shown.out and "my-run" in shown.out and "another" in shown.out
    assert "my-run" not in obsinfra("list", "--run", "another", *at).out

    wrong = obsinfra("silence", "GradientExplosoin", *at)
    assert wrong.code == 2 and "GradientExplosion" in wrong.err
    made = obsinfra(
        "silence", "GradientExplosion", "--run", "my-run", "--for", "2h", "--comment", "known [x]", *at
    )
    assert made.code == 0 and 'run="my-run"' in made.out and "sidecar does not act" in made.out
    [silence] = running.silences()
    left = (silence.ends - datetime.now(UTC)).total_seconds()
    assert 7_100 < left <= 7_200 and silence.comment == "known [x]"

    def silenced() -> bool:
        document = json.loads(obsinfra("list", "--json", *at).out)
        return [bool(alert["silenced_by"]) for alert in document["alerts"]].count(True) == 1

    wait_for(silenced, "one of the two is silenced")
    assert "known [x]" in obsinfra("list", *at).out

    ended = obsinfra("unsilence", silence.id, *at)
    assert ended.code == 0
    assert running.silences() == []
    again = obsinfra("unsilence", silence.id, *at)
    assert again.code == 2 and silence.id in again.err


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["history"],
        ["test"],
        ["test", "--to", "fax"],
        ["test", "--to", ""],
        ["test", "--to", "all,slack"],
        ["silence"],
        ["silence", "GradientExplosion"],
        ["silence", "GradientExplosion", "--for", "soon"],
        ["silence", "GradientExplosion", "--for", "0s"],
        ["silence", "GradientExplosion", "--for", "99999999w"],
        ["history", "--since", "yesterday"],
        ["list", "--alertmanager", "http://127.0.0.1:1"],
        ["list", "--alertmanager", "nonsense"],
        ["list", "--alertmanager", "http://[::1"],
        ["history", "--prometheus", "http://127.0.0.1:1"],
    ],
    ids=" ".join,
)
def test_wrong_input_is_one_line_and_exit_code_2(obsinfra: Terminal, words: list[str]) -> None:
    result = obsinfra(*words)
    assert result.code == 2
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    "answer",
    [b"", b"ok", b"\xff", b"null", b"1", b"{}", b"[1]", b'[{"name": "slack"}]', b'{"status": "success"}',
     b'{"status": "success", "data": {"result": [{"metric": {}, "values": [["x", 1]]}]}}',
     b'{"status": "success", "data": {"result": [{"metric": {}, "values": []}]}}'],
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 500])
def test_a_stranger_at_the_address_is_one_line_and_exit_code_2(
    people: People, obsinfra: Terminal, answer: bytes, status: int
) -> None:
    people.http.status, people.http.answer = status, answer
    for words in (
        ["list", "--alertmanager"],
        ["test", "--to", "slack", "--alertmanager"],
        ["silence", "--run", "r", "--alertmanager"],
        ["history", "--prometheus"],
    ):
        result = obsinfra(*words, people.http.url(""))
        # An empty list is what an Alertmanager without alerts answers too.
        assert result.code == 2 or (words[0] == "list" and answer == b"{}"), words
        if result.code == 2:
            assert result.err.startswith("error: ") and result.err.count("\n") == 1


def test_write_and_check(obsinfra: Terminal, tmp_path: Path) -> None:
    secret = tmp_path / "slack"
    Path("obsinfra.toml").write_text(
        f'[notify.slack]\napi_url_file = "{secret}"\nchannel = "#a"\nseverities = ["critical"]\n'
    )
    missing = obsinfra("check")
    assert missing.code == 2 and str(secret) in missing.err
    secret.write_text("https://hooks.example.org/x")
    secret.chmod(0o600)
    assert obsinfra("check").code == 1
    assert obsinfra("write").code == 0
    fine = obsinfra("check")
    assert fine.code == 0 and "slack (critical)" in fine.out and "others" not in fine.out
    secret.chmod(0o604)
    known = obsinfra("check")
    assert known.code == 0 and f"others on this machine may read it; chmod 600 {secret}" in known.out
    document = yaml.safe_load(Path("alertmanager/alertmanager.yml").read_text())
    assert "slack" in {receiver["name"] for receiver in document["receivers"]}
    template = Path("alertmanager/templates/obsinfra-slack.tmpl")
    template.write_text(template.read_text() + "x")
    stale = obsinfra("check")
    assert stale.code == 1 and str(template) in stale.out
    secret.unlink()
    assert obsinfra("check", "--skip-secrets").code == 1


# --- the native stack


@pytest.fixture
def native(version: StackVersion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NativeStack]:
    """A native stack of this version that is down, and will be down again whatever the test did."""
    version.require("prometheus", "alertmanager")
    if version.search_path is not None:
        monkeypatch.setenv("PATH", version.search_path, prepend=":")
    stack = NativeStack(tmp_path / "runs" / ".stack")
    yield stack
    stack.down()
    assert processes_naming(tmp_path / "runs") == []


ANY_PORTS = StackPorts(0, 0, 0)


@each_version
def test_the_native_stack_tells_people_and_remembers(
    native: NativeStack, people: People, obsinfra: Terminal, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    settings = Notify.model_validate(people.settings())
    info = native.up(runs, ports=ANY_PORTS, scrape_interval="1s", notify=settings)
    at = ("--output-dir", runs)
    result = obsinfra("test", "--to", "all", *at)
    assert result.code == 0, result.out + result.err
    people.http.status, people.http.answer = 403, b"invalid_token"
    refused = obsinfra("test", "--to", "slack", *at)
    assert refused.code == 1 and "alertmanager.log says: " in refused.out and "403" in refused.out
    assert "slack-secret" not in refused.out
    people.http.status = 200
    assert obsinfra("list", *at).code == 0
    # Something that fires by itself: the rules see that nothing else does.
    rules = {
        rule["name"]
        for group in get_json(f"{info.prometheus_url}/api/v1/rules")["data"]["groups"]
        for rule in group["rules"]
        if rule["type"] == "alerting"
    }
    if "Watchdog" in rules:
        wait_for(lambda: "Watchdog" in obsinfra("history", *at).out, "the history has what fires")
        [firing] = [
            one for one in json.loads(obsinfra("history", "--json", *at).out) if one["ended"] is None
        ][:1]
        assert firing["labels"]["alertname"] and firing["step_seconds"] >= 1
    assert obsinfra("history", "--alert", "Nothing", *at).out == "nothing fired in the last 24h\n"


@each_version
def test_the_native_stack_does_not_start_without_a_secret_it_needs(
    native: NativeStack, people: People, version: StackVersion, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    (people.folder / "secrets" / "smtp").unlink()
    with pytest.raises(ConfigError, match=r"notify\.email\.auth_password_file = .*No such file"):
        native.up(runs, ports=ANY_PORTS, notify=Notify.model_validate(people.settings()))
    assert native.status() is None
    (tmp_path / "address").write_text("https://example.org/")
    hidden = Notify.model_validate({"webhook": {"url_file": str(tmp_path / "address")}})
    if version.number("alertmanager") < (0, 26):
        with pytest.raises(ConfigError, match=r"notify\.webhook\.url_file with Alertmanager 0\.\d+.*0\.26"):
            native.up(runs, ports=ANY_PORTS, notify=hidden)
        assert native.status() is None
