"""The first message about an alert says what came of it: the stack as users start it, its intervals too."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from people import Endpoint, MailServer, http_endpoint, mail_server
from stack_versions import StackVersion, each_version
from waiting import wait_for

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.config.notify import Notify
from obsinfra.deployment.native_stack import NativeStack
from obsinfra.deployment.ports import StackPorts
from obsinfra.run.folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.stack, pytest.mark.timeout(400)]

PASSWORD = "only for this test"
SAVED = r"emergency_checkpoint, step (\d+), \d+\.\d s"


@dataclass
class People:
    """Where Slack, PagerDuty and a webhook are thought to be, and the mail server."""

    http: Endpoint
    mail: MailServer
    settings: Notify

    def texts(self) -> list[str]:
        """The first message in each form: Slack, mail as text and as HTML, PagerDuty, the webhook."""
        [slack, *_] = wait_for(lambda: self.http.at("/slack"), "Slack hears", seconds=120)
        [mail, *_] = wait_for(lambda: self.mail.mails, "a mail arrives")
        [page, *_] = wait_for(lambda: self.http.at("/pagerduty"), "PagerDuty hears")
        [hook, *_] = wait_for(lambda: self.http.at("/hook"), "the webhook is called")
        bodies = [mail.get_body((kind,)) for kind in ("plain", "html")]
        return [
            slack.body["attachments"][0]["text"],
            *[body.get_content() for body in bodies if body is not None],
            page.body["payload"]["custom_details"]["alerts"].replace(" – ", ": "),
            hook.body["alerts"][0]["annotations"]["outcome"].replace("done", "Done"),
        ]


@pytest.fixture
def people(tmp_path: Path) -> Iterator[People]:
    with http_endpoint() as http, mail_server(tmp_path / "mail", "stack", PASSWORD) as mail:
        secrets = {"slack": http.url("/slack"), "smtp": PASSWORD, "pagerduty": "key"}
        for name, secret in secrets.items():
            (tmp_path / name).touch(mode=0o600)
            (tmp_path / name).write_text(secret)
        email = {
            "smarthost": f"localhost:{mail.port}",
            "from": "stack@example.org",
            "to": ["people@example.org"],
            "auth_username": "stack",
            "auth_password_file": str(tmp_path / "smtp"),
            "ca_file": str(mail.certificate),
        }
        settings = {
            "slack": {"api_url_file": str(tmp_path / "slack"), "channel": "#training"},
            "email": email,
            "pagerduty": {"routing_key_file": str(tmp_path / "pagerduty"), "url": http.url("/pagerduty")},
            "webhook": {"url": http.url("/hook")},
        }
        yield People(http, mail, Notify.model_validate(settings))


@contextmanager
def trainer(runs: Path, log: Path) -> Iterator[None]:
    """A trainer whose gradient explodes after a while, gone at the end of the block."""
    command = [sys.executable, "-m", "obsinfra.cli.main", "train", "--model-name=digits", "--run=exploding"]
    command += [f"--output-dir={runs}", "--epochs=100000", "--threads=1", "--stack=off"]
    command += ["--inject=explode@2000", "--on-nonfinite=continue"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@each_version
def test_the_first_message_has_the_outcome_of_the_emergency_checkpoint(
    tmp_path: Path, people: People, version: StackVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To everybody, at the step at which the checkpoint on the disk was made."""
    version.require("prometheus", "alertmanager")
    if version.search_path is not None:
        monkeypatch.setenv("PATH", version.search_path, prepend=":")
    runs = tmp_path / "runs"
    native = NativeStack(runs / ".stack")
    native.up(runs, ports=StackPorts(0, 0, 0), notify=people.settings)
    try:
        with trainer(runs, tmp_path / "trainer.log"):
            texts = people.texts()
        folder = RunFolder(runs / "exploding").checkpoints
        steps = [m.step for m in create_backup_system(folder).list() if m.kind == "emergency"]
        for text in texts:
            told = re.search(f"Done: {SAVED}", text)
            assert told is not None and int(told[1]) in steps, text
    finally:
        native.down()
