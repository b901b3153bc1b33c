"""What the sidecar makes of a notification, asked through its HTTP face in this process."""

from __future__ import annotations

import contextlib
import copy
import json
import socket
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_face import AT_ONCE, AUTHORIZED, Face
from sidecar_tools import TOKEN, ago, alert, notification
from trainer_double import channel_of, command, done, run_folder, trainer
from waiting import wait_for

from obsinfra.catalog import metrics as catalog
from obsinfra.control import delivery, gate, idle_connections, responder
from obsinfra.control.channel import ControlChannel
from obsinfra.control.client import NoAnswerError
from obsinfra.control.command import Command
from obsinfra.control.journal import CommandEntry, Journal
from obsinfra.control.responder import ALERT_DECISIONS
from obsinfra.control.webhook import WebhookAlert
from obsinfra.errors import CommandError

# ---- decisions ---------------------------------------------------------------------------------------


def test_a_firing_alert_becomes_one_command_however_often_it_is_repeated(
    face: Face, executed: list[Any]
) -> None:
    firing = alert()
    assert face.decide(firing) == {"accepted": 1}
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert face.decide(firing, firing) == {"duplicate": 2}
    (entry,) = face.sidecar.journal.commands()
    assert (entry.outcome, entry.alert, entry.command.source) == ("done", "GradientExplosion", "sidecar")
    assert entry.ack is not None and entry.ack["result"] == {"path": "m.json"}
    assert entry.command.args == {"alert": "GradientExplosion"}
    assert entry.command.reason == "alert GradientExplosion: gradient norm 1e9"
    assert [one.id for one in executed] == [entry.command.id]
    assert [one.decision for one in face.sidecar.journal.alerts()] == ["duplicate"] * 2 + ["accepted"]


def test_one_alert_twice_in_a_notification_is_one_command(face: Face, executed: list[Any]) -> None:
    firing = alert()
    face.decide(firing, firing)
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert len(executed) == 1


def test_two_alertmanagers_at_once_cause_one_command(face: Face, executed: list[Any]) -> None:
    firing = alert()
    threads = [threading.Thread(target=face.decide, args=(firing,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert len(executed) == len(face.sidecar.journal.commands()) == 1


def test_the_same_moment_in_another_time_zone_is_the_same_firing(face: Face, executed: list[Any]) -> None:
    """Alertmanager writes its local time: daylight saving must not make a repetition a new alert."""
    firing = alert(startsAt=ago(seconds=9)[:19] + ".5Z")
    hour = WebhookAlert.model_validate_json(json.dumps(firing)).startsAt.timestamp() + 3600
    shifted = datetime.fromtimestamp(hour, UTC).isoformat()
    assert face.decide(firing) == {"accepted": 1}
    assert face.decide({**firing, "startsAt": shifted.replace("+00:00", "+01:00")}) == {"duplicate": 1}


def test_a_new_firing_is_a_new_command(face: Face, executed: list[Any]) -> None:
    assert face.decide(alert(startsAt=ago(minutes=5))) == {"accepted": 1}
    assert face.decide(alert(startsAt=ago(seconds=1))) == {"accepted": 1}
    wait_for(lambda: len(executed) == 2, "both executed")
    assert len({one.id for one in executed}) == 2


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({"status": "resolved"}, "resolved"),
        ({"action": None}, "informed"),
        ({"action": ""}, "informed"),
        ({"action": "explode"}, "unknown_action"),
        ({"run": None}, "no_run"),
        ({"run": "r2"}, "unknown_run"),
        ({"run": "../../x"}, "unknown_run"),
        ({"run": ".."}, "unknown_run"),
        ({"run": "."}, "unknown_run"),
        ({"run": "a/b"}, "unknown_run"),
        ({"run": "/etc"}, "unknown_run"),
        ({"run": "r1/../r1"}, "unknown_run"),
        ({"run": "r1\0"}, "unknown_run"),
        ({"run": "x" * 4_000}, "unknown_run"),
        ({"run": ".stack"}, "unknown_run"),
        ({"run": "over"}, "run_ended"),
        ({"run": "killed"}, "run_ended"),
        pytest.param({"startsAt": ago(days=2)}, "expired", id="two-days-old-expired"),
        ({"startsAt": "0001-01-01T00:00:00+23:59"}, "expired"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_asks_for_nothing_that_can_be_done_is_journalled_and_delivers_nothing(
    face: Face, tmp_path: Path, changes: dict[str, Any], decision: str
) -> None:
    run_folder(tmp_path, "over", state="finished")
    run_folder(tmp_path, "killed", processes={"0": {"pid": 2**22 + 1, "created": 1.0}})
    victim = run_folder(tmp_path.parent / f"{tmp_path.name}-outside", "x")
    with channel_of(victim) as (channel, _):
        assert face.decide(alert(**changes)) == {decision: 1}
        assert channel.take() == [] and list(victim.acks.iterdir()) == []
    assert [one.decision for one in face.sidecar.journal.alerts()] == [decision]
    assert face.sidecar.journal.commands() == []
    assert face.sidecar.instruments.get(catalog.SIDECAR_ALERTS, decision=decision) == 1


def test_a_run_that_began_after_the_last_scan_is_found(face: Face, tmp_path: Path) -> None:
    assert face.decide(alert(run="late")) == {"unknown_run": 1}
    with trainer(run_folder(tmp_path, "late")) as executed:
        assert face.decide(alert(run="late")) == {"accepted": 1}
        wait_for(lambda: executed, "executed")


def test_dry_run_journals_and_does_nothing(tmp_path: Path) -> None:
    face = Face(tmp_path, replace(AT_ONCE, dry_run=True))
    try:
        with channel_of(run_folder(tmp_path)) as (channel, _):
            assert face.decide(alert()) == {"dry_run": 1}
            assert [one.decision for one in face.sidecar.journal.alerts()] == ["dry_run"]
            assert face.sidecar.journal.commands() == [] and channel.take() == []
    finally:
        face.sidecar.stop()


def test_a_trainer_that_hangs_does_not_hold_up_the_others(face: Face, tmp_path: Path) -> None:
    """Its commands wait until they expire; so many of them that a small pool of workers would be taken."""
    with channel_of(run_folder(tmp_path, "hangs")), trainer(run_folder(tmp_path, "lively")) as executed:
        waiting = [alert(run="hangs", fingerprint=f"f{number}") for number in range(40)]
        assert face.decide(*waiting) == {"accepted": 40}
        assert face.decide(alert(run="lively")) == {"accepted": 1}
        wait_for(lambda: executed, "the other run obeyed")


# ---- what is refused ---------------------------------------------------------------------------------


def without(document: dict[str, Any], *path: Any) -> dict[str, Any]:
    document = copy.deepcopy(document)
    place: Any = document
    for part in path[:-1]:
        place = place[part]
    del place[path[-1]]
    return document


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"version": "4"}',
        notification(alert(), version="3"),
        notification(alert(), version=4),
        without(notification(alert()), "version"),
        without(notification(alert()), "alerts", 0, "labels"),
        without(notification(alert()), "alerts", 0, "startsAt"),
        without(notification(alert()), "alerts", 0, "fingerprint"),
        notification(alert(startsAt="2026-01-01T00:00:00")),
        notification(alert(startsAt="yesterday")),
        notification(alert(status="pending")),
        notification(alert(labels={"run": 5})),
        notification(alert(labels=[["run", "r1"]])),
        notification(alert(run="x" * 10_000)),
        notification(*[alert()] * 1_001),
        b'{"version":"4","alerts":[{"status":"firing","labels":{"run":"\\ud800"},"startsAt":"'
        + ago().encode()
        + b'","fingerprint":"a"}]}',
    ],
    ids=lambda content: f"{str(content)[:30]}",
)
def test_what_is_no_notification_of_version_4_is_a_422_and_does_nothing(face: Face, content: Any) -> None:
    answer = face.post(content)
    assert (
        answer.status_code == 422 and "expected Alertmanager's webhook version 4" in answer.json()["detail"]
    )
    assert len(answer.content) < 1_000
    assert face.webhooks("malformed") == 1 and face.nothing_done()


@pytest.mark.parametrize(
    "token",
    [None, "", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"bearer {TOKEN}", TOKEN],
)
def test_without_the_token_nothing_is_done(face: Face, token: str | None) -> None:
    answer = face.post(notification(alert()), token)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert face.webhooks("unauthorized") == 1 and face.nothing_done()


def test_10_mb_are_a_413_and_are_not_read(face: Face) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        for _ in range(160):
            read += 1 << 16
            yield b" " * (1 << 16)

    answer = face.ask("POST", "/webhook", content=endless(), headers={"authorization": f"Bearer {TOKEN}"})
    assert answer.status_code == 413 and read <= 2 << 20
    assert face.webhooks("too_large") == 1 and face.nothing_done()


@pytest.mark.parametrize("length", ["abc", "-1", "9" * 5_000, "²"])
def test_a_nonsensical_length_is_no_error_of_ours(face: Face, length: str) -> None:
    headers = [(b"authorization", f"Bearer {TOKEN}".encode()), (b"content-length", length.encode())]
    answer = face.ask("POST", "/webhook", content=json.dumps(notification(alert(run=None))), headers=headers)
    assert answer.status_code == 200


def test_a_journal_that_cannot_be_written_is_a_503_and_delivers_nothing(
    face: Face, executed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = sqlite3.connect(face.sidecar.state_dir / "journal.sqlite")
    face.sidecar.journal._database.execute("PRAGMA busy_timeout = 50")
    firing = alert()
    with blocker:
        blocker.execute("BEGIN IMMEDIATE")
        answer = face.post(notification(firing))
    blocker.close()
    assert answer.status_code == 503 and "journal" in answer.json()["detail"]
    assert face.webhooks("journal_failed") == 1 and face.nothing_done()
    assert face.decide(firing) == {"accepted": 1}  # as Alertmanager tries again
    wait_for(lambda: len(executed) == 1, "executed once")


def test_nothing_of_a_notification_is_kept_when_a_part_fails(
    tmp_path: Path, face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    face.sidecar.journal._database.execute(
        "CREATE TRIGGER full BEFORE INSERT ON commands BEGIN SELECT RAISE(FAIL, 'disk is full'); END"
    )
    assert face.post(notification(alert(), alert(run=None))).status_code == 503
    assert face.nothing_done()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
stamps = st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat()) | json_values
alerts_of_any_kind = st.fixed_dictionaries(
    {
        "status": st.sampled_from(["firing", "resolved"]) | json_values,
        "labels": st.dictionaries(
            st.sampled_from(["alertname", "run", "action", "severity", "x"]),
            st.text() | st.sampled_from(["r1", "../r1", "stop", "explode"]),
        )
        | json_values,
        "startsAt": stamps,
        "fingerprint": st.text(min_size=1, max_size=120) | json_values,
    },
    optional={"annotations": st.dictionaries(st.text(), st.text()) | json_values, "endsAt": stamps},
)
notifications_of_any_kind = st.builds(
    lambda alerts, version: notification(*alerts, version=version),
    st.lists(alerts_of_any_kind | json_values, max_size=3),
    st.just("4") | json_values,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(document=notifications_of_any_kind | json_values)
def test_no_document_makes_the_webhook_fail(face: Face, executed: list[Any], document: Any) -> None:
    answer = face.post(json.dumps(document))
    assert answer.status_code in (200, 422)
    if answer.status_code == 200:
        assert set(answer.json()) <= set(ALERT_DECISIONS)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=st.binary(max_size=300), accept=st.text(st.characters(codec="ascii", exclude_categories=["C"]))
)
def test_no_bytes_and_no_header_make_the_face_fail(face: Face, content: bytes, accept: str) -> None:
    assert face.post(content).status_code == 422
    assert face.ask("GET", "/metrics", headers={"accept": accept}).status_code == 200


# ---- connections -------------------------------------------------------------------------------------


@pytest.fixture
def served(face: Face) -> Iterator[tuple[str, int]]:
    """The face behind a real server of this process."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        face.app, log_config=None, lifespan="off", http=idle_connections.PatientForAWhile, limit_concurrency=8
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield listener.getsockname()
    server.should_exit = server.force_exit = True
    thread.join()
    listener.close()


def test_a_body_that_never_ends_is_a_408_and_others_are_served_meanwhile(
    face: Face, served: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 1.0)
    with socket.create_connection(served, timeout=20) as slow:
        slow.sendall(
            f"POST /webhook HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
        url = f"http://127.0.0.1:{served[1]}"
        with httpx.Client(trust_env=False) as client:
            assert client.get(f"{url}/healthz").status_code == 200
            answer = client.post(
                f"{url}/webhook",
                json=notification(alert(run=None)),
                headers={"authorization": f"Bearer {TOKEN}"},
            )
            assert answer.status_code == 200
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    assert face.webhooks("too_slow") == 1


def test_a_caller_that_hangs_up_in_its_body_is_no_error_of_ours(
    face: Face, served: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(served, timeout=20) as short:
        short.sendall(
            f"POST /webhook HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Length: 1000\r\n\r\n{".encode()
        )
    wait_for(lambda: face.webhooks("malformed") == 1, "the half body is counted")
    assert not [record for record in caplog.records if record.name == "uvicorn.error" and record.exc_info]


def test_connections_that_never_ask_are_closed_so_that_alerts_get_through(
    face: Face, served: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle_connections, "HEAD_SECONDS", 0.3)
    idle = [socket.create_connection(served, timeout=20) for _ in range(10)]
    for connection in idle[:5]:
        connection.sendall(b"POST /webhook HTTP/1.1\r\nHost:")

    def through() -> bool:
        with httpx.Client(trust_env=False) as client:
            return client.get(f"http://127.0.0.1:{served[1]}/healthz").status_code == 200

    wait_for(through, "somebody else is served")
    for connection in idle:
        assert connection.recv(100) == b""
        connection.close()


def test_the_journal_survives_being_opened_again(tmp_path: Path, face: Face, executed: list[Any]) -> None:
    face.decide(alert(), alert(action=None))
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    path = face.sidecar.state_dir / "journal.sqlite"
    again = Journal(path)
    assert again.commands() == face.sidecar.journal.commands() and len(again.commands()) == 1
    assert again.alerts() == face.sidecar.journal.alerts() and len(again.alerts()) == 2
    again.close()
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700


def test_stop_ends_every_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    face = Face(tmp_path)
    assert {thread.name for thread in set(threading.enumerate()) - before} >= {"obsinfra-delivery-0"}
    face.sidecar.stop()
    wait_for(lambda: set(threading.enumerate()) <= before, "its threads have ended")


# ---- delivery ------------------------------------------------------------------------------------------


def test_a_trainer_that_cannot_be_reached_for_a_moment_is_tried_again(
    face: Face, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither socket nor inbox can be used, as on a disk that is full for a while."""
    attempts: list[Any] = []
    send = delivery.send_command

    def seen(*given: Any, **more: Any) -> Any:
        try:
            return send(*given, **more)
        except CommandError as error:
            attempts.append(error)
            raise

    monkeypatch.setattr(delivery, "send_command", seen)
    folder = run_folder(tmp_path)
    folder.inbox.rmdir()
    folder.inbox.write_text("in the way")
    assert face.decide(alert()) == {"accepted": 1}
    wait_for(lambda: len(attempts) >= 2, "attempts failed")
    folder.inbox.unlink()
    folder.inbox.mkdir(mode=0o700)
    with trainer(folder) as executed:
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
        assert len(executed) == 1
    assert face.sidecar.journal.commands()[0].outcome == "done"


def test_a_run_gets_its_commands_in_order_though_it_could_not_be_reached_for_a_moment(
    face: Face, tmp_path: Path
) -> None:
    """Else it might hear `resume` before the `pause` that came first, and stay paused."""
    folder = run_folder(tmp_path)
    folder.inbox.rmdir()
    folder.inbox.write_text("in the way")
    wanted = ["pause", "resume"] * 4
    for number, action in enumerate(wanted):
        body = json.dumps({"action": action, "id": f"{9 - number}"})
        answer = face.ask("POST", "/v1/runs/r1/commands", content=body, headers=AUTHORIZED)
        assert answer.status_code == 202, answer.text
    folder.inbox.unlink()
    folder.inbox.mkdir(mode=0o700)
    with trainer(folder) as executed:
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
        assert [command.action for command in executed] == wanted


def test_a_run_that_ends_before_its_command_reached_it_is_not_tried_again(face: Face, tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    folder.inbox.rmdir()
    assert face.decide(alert()) == {"accepted": 1}
    folder.update_info(state="finished")
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert face.sidecar.journal.commands()[0].outcome == "undelivered"
    assert (
        face.sidecar.instruments.get(
            catalog.SIDECAR_COMMANDS, action="emergency_checkpoint", outcome="undelivered"
        )
        == 1
    )


@pytest.mark.parametrize("door", ["socket", "inbox"])
def test_a_command_nobody_acknowledges_is_counted_as_such(
    face: Face, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """The trainer took it and hangs; or it never looks into its inbox."""
    monkeypatch.setattr(delivery, "LATEST_ACK_SECONDS", 0.2)
    monkeypatch.setattr(responder, "COMMAND_SECONDS", 0.5)
    folder = run_folder(tmp_path)
    with channel_of(folder) if door == "socket" else contextlib.nullcontext():
        assert face.decide(alert()) == {"accepted": 1}
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert face.sidecar.journal.commands()[0].outcome == "unacknowledged"
    labels = {"action": "emergency_checkpoint", "outcome": "unacknowledged"}
    assert face.sidecar.instruments.get(catalog.SIDECAR_COMMANDS, **labels) == 1


@pytest.mark.parametrize("door", ["socket", "inbox"])
@pytest.mark.parametrize("ends", [True, False], ids=["it-ends", "its-trainer-dies"])
def test_what_takes_longer_than_a_command_is_valid_is_waited_for_while_its_trainer_lives(
    face: Face, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str, ends: bool
) -> None:
    """A checkpoint of many gigabytes on slow storage, a profile of a thousand slow steps."""
    monkeypatch.setattr(delivery, "LATEST_ACK_SECONDS", 0.1)
    monkeypatch.setattr(responder, "COMMAND_SECONDS", 0.5)
    over = threading.Event()
    waited: list[Any] = []
    send = delivery.send_command

    def seen(*given: Any, **more: Any) -> Any:
        try:
            return send(*given, **more)
        except NoAnswerError as error:
            waited.append(error)
            raise

    def slow(channel: ControlChannel, command: Command) -> None:
        channel.ack(command.id, "running", step=7)
        over.wait(60)
        if ends:
            channel.ack(command.id, "done", step=7)

    monkeypatch.setattr(delivery, "send_command", seen)
    folder = run_folder(tmp_path)
    with trainer(folder, slow) as executed:
        if door == "inbox":
            folder.socket.unlink()
        assert face.decide(alert()) == {"accepted": 1}
        try:
            wait_for(lambda: len(waited) >= 3, "it is waited for, again and again")
            assert face.sidecar.journal.commands()[0].outcome is None
            if not ends:
                folder.update_info(processes={})
                wait_for(lambda: face.sidecar.journal.waiting() == [], "given up")
        finally:
            over.set()
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
        assert len(executed) == 1
    assert face.sidecar.journal.commands()[0].outcome == ("done" if ends else "unacknowledged")


def test_an_outcome_is_written_down_once_the_journal_can_be_written_again(
    face: Face, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "LATEST_RETRY_SECONDS", 0.05)
    full = threading.Event()
    blocker = sqlite3.connect(face.sidecar.state_dir / "journal.sqlite", check_same_thread=False)

    def fills_the_disk(channel: ControlChannel, command: Command) -> None:
        face.sidecar.journal._database.execute("PRAGMA busy_timeout = 0")
        blocker.execute("BEGIN IMMEDIATE")
        done(channel, command)

    settle = face.sidecar.journal.settle

    def seen(*given: Any) -> None:
        try:
            settle(*given)
        except sqlite3.Error:
            full.set()
            raise

    monkeypatch.setattr(face.sidecar.journal, "settle", seen)
    with contextlib.closing(blocker), trainer(run_folder(tmp_path), fills_the_disk):
        assert face.decide(alert()) == {"accepted": 1}
        assert full.wait(60)
        blocker.rollback()
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert face.sidecar.journal.commands()[0].outcome == "done"


def test_a_message_the_trainer_cannot_read_is_not_sent_again(face: Face, tmp_path: Path) -> None:
    garbage = command(id="not an id")
    with channel_of(run_folder(tmp_path)) as (_, heard):
        entry = CommandEntry(garbage, "", 0.0, 0.0)
        face.sidecar.journal.add([], [entry])
        face.sidecar.deliverer.deliver(entry)
        wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
        assert face.sidecar.journal.commands()[0].outcome == "rejected" and len(heard.garbage) == 1
