"""The sidecar as a real process beside a trainer: from Alertmanager's call to the ack, through kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from certificates import self_signed
from prometheus_client.parser import text_string_to_metric_families
from sidecar_tools import SidecarProcess, alert, counted, notification, sidecar
from trainer_double import channel_of, done, run_folder, trainer
from waiting import wait_for

from obsinfra.control.command import Command
from obsinfra.control.journal import CommandEntry, Journal
from obsinfra.monitoring.tracing import parse_traceparent
from obsinfra.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return run_folder(tmp_path)


def journalled(sidecar: SidecarProcess) -> list[CommandEntry]:
    journal = Journal(sidecar.state_dir / "journal.sqlite")
    try:
        return journal.commands()
    finally:
        journal.close()


def settled(sidecar: SidecarProcess) -> CommandEntry:
    """The one command of the journal, once it has an outcome."""

    def found() -> CommandEntry | None:
        (entry,) = journalled(sidecar)
        return entry if entry.outcome else None

    return wait_for(found, "settled")


def spans(sidecar: SidecarProcess) -> list[dict[str, Any]]:
    lines = (sidecar.state_dir / "traces" / "spans.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_an_alert_becomes_a_command_an_ack_an_entry_a_trace_and_a_count(
    folder: RunFolder, tmp_path: Path
) -> None:
    with sidecar(tmp_path) as process, trainer(folder) as executed:
        assert process.token_file.stat().st_mode & 0o777 == 0o600
        assert process.state_dir.stat().st_mode & 0o777 == 0o700
        firing = alert()
        assert process.post(firing, alert(action=None), alert(status="resolved")) == {
            "accepted": 1,
            "informed": 1,
            "resolved": 1,
        }
        entry = settled(process)
        assert process.post(firing) == {"duplicate": 1}
        stranger = process.client.post("/webhook", json=notification(), headers={"authorization": "x"})
        assert stranger.status_code == 401
        assert process.client.post("/webhook", content=b"{").status_code == 422
        obeyed = {"action": "emergency_checkpoint", "outcome": "done"}

        def exposition() -> str:
            text = process.client.get("/metrics").text
            return text if counted(text, "obsinfra_sidecar_commands_total", **obeyed) else ""

        text = wait_for(exposition, "the command is counted")
        assert process.end() in (0, -signal.SIGTERM)
    (command,) = executed
    assert entry.command == command and entry.outcome == "done"
    assert entry.ack is not None and (entry.ack["step"], entry.ack["result"]) == (7, {"path": "m.json"})

    parent = parse_traceparent(command.traceparent)
    assert parent is not None
    by_name = {span["name"]: span for span in spans(process)}
    cause, delivery = by_name["alert GradientExplosion"], by_name["delivery emergency_checkpoint"]
    assert (cause["trace_id"], cause["span_id"]) == (parent.trace_id, parent.span_id)
    assert (delivery["trace_id"], delivery["parent_id"]) == (parent.trace_id, parent.span_id)

    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"obsinfra_sidecar_webhooks", "obsinfra_sidecar_alerts", "obsinfra_sidecar_runs"} <= families
    assert counted(text, "obsinfra_sidecar_webhooks_total", outcome="accepted") == 2
    assert counted(text, "obsinfra_sidecar_webhooks_total", outcome="unauthorized") == 1
    assert counted(text, "obsinfra_sidecar_webhooks_total", outcome="malformed") == 1
    assert counted(text, "obsinfra_sidecar_alerts_total", decision="duplicate") == 1
    assert counted(text, "obsinfra_sidecar_commands_total", **obeyed) == 1
    assert counted(text, "obsinfra_sidecar_delivery_seconds_count", action="emergency_checkpoint") == 1
    assert counted(text, "obsinfra_sidecar_runs", state="running") == 1
    if promtool := shutil.which("promtool"):
        checked = subprocess.run(
            [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_a_sidecar_killed_before_the_trainer_listens_delivers_exactly_once(
    folder: RunFolder, tmp_path: Path
) -> None:
    with sidecar(tmp_path) as process:
        firing = alert()
        assert process.post(firing) == {"accepted": 1}
        process.end(signal.SIGKILL)
        assert [entry.outcome for entry in journalled(process)] == [None]
        process.start()
        with trainer(folder) as executed:
            assert settled(process).outcome == "done"
            assert process.post(firing) == {"duplicate": 1}
        assert len(executed) == 1


@pytest.mark.parametrize("obeyed", ["while the sidecar is down", "after its restart"])
def test_a_sidecar_killed_after_delivery_hears_of_the_end_after_its_restart(
    folder: RunFolder, tmp_path: Path, obeyed: str
) -> None:
    with sidecar(tmp_path) as process, channel_of(folder) as (channel, _):
        process.post(alert())
        taken: list[Command] = wait_for(channel.take, "delivered")
        process.end(signal.SIGKILL)
        if obeyed == "while the sidecar is down":
            done(channel, taken[0])
        process.start()
        if obeyed == "after its restart":
            done(channel, taken[0])
        assert settled(process).outcome == "done"
        assert channel.take() == [] and list(folder.inbox.iterdir()) == []


TRAINER = """
import os, sys
from pathlib import Path
from trainer_double import channel_of, done, run_folder
with channel_of(run_folder(Path(sys.argv[1]))) as (channel, heard):
    print("ready", flush=True)
    while heard.arrived.wait():
        heard.arrived.clear()
        for command in channel.take():
            done(channel, command)
            print(command.id, flush=True)
"""


def test_a_suspended_trainer_obeys_once_when_it_goes_on_though_the_sidecar_was_killed(
    tmp_path: Path,
) -> None:
    with (
        subprocess.Popen(
            [sys.executable, "-c", TRAINER, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
            stdout=subprocess.PIPE,
            text=True,
        ) as suspended,
        sidecar(tmp_path) as process,
    ):
        try:
            assert suspended.stdout is not None and suspended.stdout.readline() == "ready\n"
            suspended.send_signal(signal.SIGSTOP)
            wait_for(lambda: psutil.Process(suspended.pid).status() == psutil.STATUS_STOPPED, "stopped")
            assert process.post(alert()) == {"accepted": 1}
            process.end(signal.SIGKILL)
            process.start()
            suspended.send_signal(signal.SIGCONT)
            entry = settled(process)
            assert entry.outcome == "done"
            assert process.post(alert(action="checkpoint")) == {"accepted": 1}
            assert suspended.stdout.readline() == f"{entry.command.id}\n"
            assert suspended.stdout.readline() not in ("", f"{entry.command.id}\n")
        finally:
            suspended.kill()


def test_a_restart_with_a_run_that_has_ended_since_settles_its_command(
    folder: RunFolder, tmp_path: Path
) -> None:
    with sidecar(tmp_path) as process:
        process.post(alert())
        process.end(signal.SIGKILL)
        folder.update_info(state="finished")
        process.start()
        assert settled(process).outcome == "undelivered"
    assert list(folder.acks.iterdir()) == []


def test_the_heartbeat_comes_with_the_first_question_for_targets_and_goes_with_the_sidecar(
    folder: RunFolder, tmp_path: Path
) -> None:
    with sidecar(tmp_path) as process:
        assert process.client.get("/healthz").json() == {
            "ok": True,
            "prometheus_asks": False,
            "alertmanager_answers": None,
        }
        assert not folder.heartbeat.exists()
        answer = process.client.get("/sd")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == [
            {
                "targets": ["127.0.0.1:9464"],
                "labels": {"run": "r1", "model": "digits", "rank": "0", "host": socket.gethostname()},
            }
        ]
        assert folder.sidecar_page(time.time()) == process.url
        assert process.client.get("/healthz").json()["prometheus_asks"] is True
        process.end(signal.SIGTERM)
        assert not folder.heartbeat.exists()
        assert folder.sidecar_page(time.time()) is None


def test_big_slow_and_silent_callers_keep_nobody_waiting(folder: RunFolder, tmp_path: Path) -> None:
    with sidecar(tmp_path) as process:
        token = process.client.headers["authorization"]
        callers = [socket.create_connection(("127.0.0.1", process.port)) for _ in range(20)]
        for caller in callers[:10]:
            caller.sendall(
                f"POST /webhook HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\n"
                "Content-Length: 1000\r\n\r\n{".encode()
            )
        assert process.client.post("/webhook", content=b" " * (10 << 20)).status_code == 413
        assert process.post(alert(run=None)) == {"no_run": 1}
        for caller in callers:
            caller.close()
        assert process.end() in (0, -signal.SIGTERM)
        assert "Traceback" not in process.log.read_text()


# ---- a start that cannot be ----------------------------------------------------------------------------


def refused(tmp_path: Path, *more: str) -> str:
    """The one line a sidecar ends with."""
    process = SidecarProcess(tmp_path, *more)
    process.client.close()
    found = subprocess.run(process.arguments, capture_output=True, text=True, timeout=30)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1
    return found.stderr


def test_a_taken_or_impossible_address_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "Address already in use" in refused(tmp_path, f"--port={port}")
    assert "cannot listen on 127.0.0.1:70000" in refused(tmp_path, "--port=70000")
    assert "cannot listen on" in refused(tmp_path, f"--host={'x' * 70}")
    assert "--page-url 'javascript:1'" in refused(tmp_path, "--page-url=javascript:1")
    assert not (tmp_path / ".stack").exists()


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        ("a-token-long-enough", 0o644, "others may read the token file"),
        ("a-token-long-enough", 0o620, "others may read the token file"),
        ("short", 0o600, "16 or more"),
        ("a token with spaces in it", 0o600, "16 or more"),
        ("a-tökèn-löng-ènöugh", 0o600, "16 or more"),
        (None, 0o700, "cannot use the token file"),
    ],
)
def test_a_token_file_that_keeps_no_secret_is_one_line_and_exit_code_2(
    tmp_path: Path, content: str | None, mode: int, says: str
) -> None:
    token = tmp_path / ".stack" / "token"
    token.parent.mkdir()
    if content is None:
        token.mkdir()
    else:
        token.write_text(content)
    token.chmod(mode)
    line = refused(tmp_path)
    assert says in line and str(token) in line
    assert content is None or content not in line


def test_a_damaged_journal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    state = tmp_path / ".stack" / "sidecar"
    state.mkdir(parents=True)
    (state / "journal.sqlite").write_bytes(b"not a database, but long enough to look like one" * 100)
    assert "cannot keep the journal" in refused(tmp_path)


def test_a_second_sidecar_of_the_same_state_does_not_start_and_the_first_goes_on(
    folder: RunFolder, tmp_path: Path
) -> None:
    with sidecar(tmp_path) as process:
        process.client.get("/sd")
        wait_for(folder.heartbeat.exists, "a heartbeat")
        assert f"another sidecar keeps its journal in {process.state_dir}" in refused(tmp_path)
        assert folder.heartbeat.exists()
        process.end(signal.SIGKILL)
        process.start()  # the lock went with the process


def test_a_sidecar_ends_with_what_it_began(folder: RunFolder, tmp_path: Path) -> None:
    """SIGTERM during a delivery: the process ends promptly, and the command stays in the journal."""
    with sidecar(tmp_path) as process, channel_of(folder) as (channel, heard):
        process.post(alert())
        wait_for(heard.arrived.is_set, "delivered")
        assert process.process is not None
        children = psutil.Process(process.process.pid).children()
        assert process.end() in (0, -signal.SIGTERM)
        assert children == [] and [entry.outcome for entry in journalled(process)] == [None]
        assert channel.take() != []


# ---- beyond this machine ---------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 signed by itself, and its key."""
    return self_signed(tmp_path)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1"])
def test_an_address_beyond_this_machine_without_tls_is_refused(tmp_path: Path, host: str) -> None:
    line = refused(tmp_path, f"--host={host}")
    assert "without TLS" in line and "--tls-cert and --tls-key" in line
    assert not (tmp_path / ".stack").exists()


def test_where_people_open_the_page_can_be_told(folder: RunFolder, tmp_path: Path) -> None:
    with sidecar(tmp_path, "--page-url=https://gpu-17.example/runs/") as process:
        process.client.get("/sd")
        assert folder.sidecar_page(time.time()) == "https://gpu-17.example/runs/"


def test_in_a_trusted_network_commands_need_the_token_and_discovery_does_not(
    folder: RunFolder, tmp_path: Path
) -> None:
    process = SidecarProcess(tmp_path, "--host=0.0.0.0", "--trusted-network")
    try:
        process.start()
        with trainer(folder) as executed:
            assert process.post(alert()) == {"accepted": 1}
            wait_for(lambda: executed, "executed")
        stranger = {"authorization": "Bearer nobody"}
        for path, status in (("/sd", 200), ("/metrics", 200), ("/v1/runs", 401)):
            assert process.client.get(path, headers=stranger).status_code == status, path
        assert process.client.post("/webhook", headers=stranger, content=b"{}").status_code == 401
        assert process.end() in (0, -signal.SIGTERM)
    finally:
        if process.process is not None and process.process.poll() is None:
            process.end(signal.SIGKILL)


def test_half_a_certificate_a_wrong_one_and_an_open_key_are_refused(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    assert "--tls-cert and --tls-key alone" in refused(tmp_path, f"--tls-cert={cert}")
    assert "cannot use certificate" in refused(tmp_path, f"--tls-cert={key}", f"--tls-key={key}")
    assert "cannot use certificate" in refused(tmp_path, f"--tls-cert={cert}", f"--tls-key={tmp_path}/x")
    key.chmod(0o644)
    assert "others may read the key" in refused(tmp_path, f"--tls-cert={cert}", f"--tls-key={key}")


def test_beyond_this_machine_it_speaks_tls_and_asks_for_the_token(
    folder: RunFolder, tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    cert, key = certificate
    process = SidecarProcess(tmp_path, "--host=0.0.0.0", f"--tls-cert={cert}", f"--tls-key={key}")
    process.client.close()
    context = ssl.create_default_context(cafile=cert)
    process.client = httpx.Client(
        base_url=f"https://127.0.0.1:{process.port}", verify=context, trust_env=False
    )
    try:
        process.start()
        with trainer(folder) as executed:
            assert process.post(alert()) == {"accepted": 1}
            wait_for(lambda: executed, "executed")
        assert process.client.get("/sd").status_code == 200
        stranger = {"authorization": "Bearer nobody"}
        for path in ("/sd", "/metrics", "/v1/runs", "/openapi.json"):
            assert process.client.get(path, headers=stranger).status_code == 401
        with httpx.Client(trust_env=False) as plain, pytest.raises(httpx.HTTPError):
            plain.get(f"http://127.0.0.1:{process.port}/healthz")
        assert process.end() in (0, -signal.SIGTERM)
    finally:
        process.client.close()
        if process.process is not None and process.process.poll() is None:
            process.end(signal.SIGKILL)
