"""`/v1`: runs, commands, alerts, events and annotations, and who may ask for them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sidecar_face import AT_ONCE, AUTHORIZED, Face
from sidecar_tools import alert
from trainer_double import channel_of, run_folder, trainer
from waiting import wait_for

from obsinfra.catalog.policy import Response, Step
from obsinfra.control import gate
from obsinfra.control.command import Command

DEAD = {"0": {"pid": 2**22 + 1, "created": 1.0}}


@pytest.fixture
def face(tmp_path: Path) -> Iterator[Face]:
    """As everywhere, but that no test here is told to ask less often."""
    run_folder(tmp_path)
    made = Face(tmp_path, requests_per_second=1e6)
    yield made
    made.sidecar.stop()


def give(face: Face, run: str = "r1", **body: Any) -> httpx.Response:
    return face.ask("POST", f"/v1/runs/{run}/commands", content=json.dumps(body), headers=AUTHORIZED)


# ---- runs ----------------------------------------------------------------------------------------------


def test_runs_are_listed_with_their_state(face: Face, tmp_path: Path) -> None:
    run_folder(tmp_path, "killed", processes=DEAD)
    run_folder(tmp_path, "over", state="finished", reason="all epochs")
    wait_for(lambda: len(face.get("/v1/runs")) == 3, "seen")
    runs = {run["id"]: run for run in face.get("/v1/runs")}
    assert {name: (run["state"], run["live"]) for name, run in runs.items()} == {
        "r1": ("running", True),
        "killed": ("dead", False),
        "over": ("finished", False),
    }
    assert runs["over"]["reason"] == "all epochs" and runs["r1"]["model"] == "digits"
    assert runs["r1"]["metrics_urls"] == {"0": "http://127.0.0.1:9464/metrics"}
    assert [run["id"] for run in face.get("/v1/runs", live="true")] == ["r1"]
    assert [run["id"] for run in face.get("/v1/runs", live="false")] == ["killed", "over"]


def test_a_run_is_shown_with_its_step_and_with_what_fires_and_comes_next(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder.root / "progress.json").write_text(json.dumps({"step": 12, "at": 5.0}))
    policy = replace(
        AT_ONCE, responses={"GradientExplosion": Response(escalate=(Step("stop", after_minutes=5),))}
    )
    face = Face(tmp_path, policy)
    try:
        assert face.get("/v1/runs/r1")["firing"] == []
        face.decide(alert())
        shown = face.get("/v1/runs/r1")
        assert (shown["step"], shown["progress_at"], shown["alerts_act"]) == (12, 5.0, "in-process")
        (firing,) = shown["firing"]
        assert (firing["alert"], firing["steps_taken"]) == ("GradientExplosion", 1)
        assert firing["next_step"] == "stop"
        assert 290 < firing["next_at"] - time.time() < 301
        face.get("/sd")
        assert face.get("/v1/runs/r1")["alerts_act"] == "sidecar"
    finally:
        face.sidecar.stop()


# ---- commands ------------------------------------------------------------------------------------------


def test_a_command_is_journalled_delivered_and_told_with_who_what_when_and_outcome(
    face: Face, executed: list[Command]
) -> None:
    answer = give(face, action="dump_stacks", args={"native": False}, reason="looks stuck", who="anna")
    assert answer.status_code == 202, answer.text
    assert answer.json()["action"] == "dump_stacks" and answer.json()["id"]
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    (told,) = face.get("/v1/runs/r1/commands")
    assert (told["source"], told["reason"], told["args"]) == ("api: anna", "looks stuck", {"native": False})
    assert (told["outcome"], told["step"], told["result"]) == ("done", 7, {"path": "m.json"})
    assert told["received_at"] <= told["settled_at"] <= time.time()
    (command,) = executed
    assert (command.id, command.args, command.source) == (told["id"], {"native": False}, "api: anna")


def test_the_same_id_is_the_same_command(face: Face, executed: list[Command]) -> None:
    body = {"action": "checkpoint", "id": "nightly-1"}
    assert [give(face, **body).status_code for _ in range(3)] == [202, 200, 200]
    assert give(face, action="stop", id="nightly-1").status_code == 409
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    assert [command.action for command in executed] == ["checkpoint"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "action"),
        ({"action": "explode"}, "action"),
        ({"action": "stop", "args": {"grace_seconds": 0}}, "expected a number from 1 to 3600"),
        ({"action": "stop", "args": {"x": 1}}, "unknown argument 'x' of stop"),
        ({"action": "stop", "args": {"alert": {"a": 1}}}, "args"),
        ({"action": "stop", "id": "../../x"}, "id"),
        ({"action": "stop", "reason": "x" * 2_001}, "reason"),
        ({"action": "stop", "who": "a\nb"}, "who"),
        ({"action": "stop", "sudo": True}, "sudo"),
        ({"action": "set_log_level"}, "level"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_no_command_is_a_422_that_says_what_was_expected(
    face: Face, body: dict[str, Any], says: str
) -> None:
    answer = give(face, **body)
    assert answer.status_code == 422 and says in answer.json()["detail"]
    assert face.nothing_done()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"action": "stop"} x'])
def test_a_body_that_is_no_json_object_is_a_422(face: Face, content: bytes) -> None:
    answer = face.ask("POST", "/v1/runs/r1/commands", content=content, headers=AUTHORIZED)
    assert answer.status_code == 422 and face.nothing_done()


def test_a_run_that_does_not_live_is_a_409_and_an_unknown_one_a_404(face: Face, tmp_path: Path) -> None:
    run_folder(tmp_path, "over", state="finished")
    assert give(face, "over", action="stop").status_code == 409
    assert give(face, "nobody", action="stop").status_code == 404
    assert face.nothing_done()


def test_a_dry_run_takes_no_commands(tmp_path: Path) -> None:
    run_folder(tmp_path)
    face = Face(tmp_path, replace(AT_ONCE, dry_run=True))
    try:
        answer = give(face, action="stop")
        assert answer.status_code == 409 and "dry run" in answer.json()["detail"]
        assert face.nothing_done()
    finally:
        face.sidecar.stop()


def test_a_journal_that_cannot_be_written_is_a_503_and_delivers_nothing(
    face: Face, executed: list[Command]
) -> None:
    blocker = sqlite3.connect(face.sidecar.state_dir / "journal.sqlite")
    face.sidecar.journal._database.execute("PRAGMA busy_timeout = 50")
    with blocker:
        blocker.execute("BEGIN IMMEDIATE")
        answer = give(face, action="stop")
    blocker.close()
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
    assert executed == [] and face.nothing_done()


def test_policy_holds_no_persons_command_back(tmp_path: Path) -> None:
    with trainer(run_folder(tmp_path)) as executed:
        face = Face(tmp_path, replace(AT_ONCE, cool_down_seconds=600.0))
        try:
            assert [give(face, action="checkpoint").status_code for _ in range(2)] == [202, 202]
            wait_for(lambda: len(executed) == 2, "executed")
        finally:
            face.sidecar.stop()


# ---- alerts, events, annotations -------------------------------------------------------------------------


def test_alerts_tell_what_fires_and_what_was_decided(face: Face, executed: list[Command]) -> None:
    firing = alert()
    face.decide(firing, alert(action=None))
    shown = face.get("/v1/alerts")
    assert [one["alert"] for one in shown["firing"]] == ["GradientExplosion"]
    assert sorted(one["decision"] for one in shown["heard"]) == ["accepted", "informed"]
    face.decide(firing | {"status": "resolved"})
    assert face.get("/v1/alerts")["firing"] == []
    assert len(face.get("/v1/alerts", limit=1)["heard"]) == 1
    assert face.get("/v1/alerts", run="other")["heard"] == []


def test_events_and_annotations_tell_the_runs_story_in_order(
    face: Face, executed: list[Command], tmp_path: Path
) -> None:
    folder = run_folder(tmp_path)
    began = time.time()
    stamp = "2026-01-01T00:00:00+00:00"
    starts = [
        {"timestamp": stamp, "event": "run_started", "model": "digits", "resumed_from_step": None},
        {"timestamp": stamp[:-7] + "1+00:00", "event": "run_started", "resumed_from_step": 40, "step": 40},
    ]
    (folder.logs / "system.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    lines = [
        {
            "timestamp": stamp[:-7] + "2+00:00",
            "event": "checkpoint",
            "kind": "best",
            "step": 41,
            "path": "/x/000000000041-best-aa.json",
            "reason": "best accuracy",
        },
        {"timestamp": "no moment", "event": "checkpoint"},
        {"event": "checkpoint"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder.logs / "training.jsonl").write_text(text + 'half a line, "event": "checkpoint"')
    manifests = folder.checkpoints / "manifests"
    manifests.mkdir()
    for name in ("000000000041-best-aa.json", "000000000050-emergency-bb.json", "garbage.json"):
        (manifests / name).write_text("{}")
    face.decide(alert())
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    events = face.get("/v1/runs/r1/events")
    assert [(event["kind"], event["what"], event["outcome"], event["step"]) for event in events[:3]] == [
        ("start", "training digits", "", None),
        ("restart", "resumed from step 40", "", 40),
        ("checkpoint", "best checkpoint", "committed", 41),
    ]
    later = {(event["kind"], event["what"], event["who"], event["outcome"]) for event in events[3:]}
    assert later == {
        ("checkpoint", "emergency checkpoint", "writer", "committed"),
        ("alert", "GradientExplosion fires", "alertmanager", "accepted"),
        ("command", "emergency_checkpoint", "sidecar", "done"),
    }
    notes = face.get("/v1/annotations", run="r1", **{"from": int(began * 1e3) - 5})
    assert {note["title"] for note in notes} == {
        "checkpoint: emergency checkpoint",
        "alert: GradientExplosion fires",
        "command: emergency_checkpoint",
    }
    command = next(note for note in notes if note["title"].startswith("command"))
    assert command["time"] <= command["timeEnd"] and command["tags"] == ["obsinfra", "command", "r1"]
    assert command["text"].startswith("done · step 7 · by sidecar · alert GradientExplosion: gradient norm")
    assert face.get("/v1/annotations", **{"from": int(began * 1e3) - 5}) == notes
    assert face.get("/v1/annotations", to=1_000) == []
    assert len(face.get("/v1/annotations", limit=1)) == 1


def test_a_run_that_was_quiet_in_that_time_is_not_read(face: Face, tmp_path: Path) -> None:
    old = run_folder(tmp_path, "old", state="finished")
    (old.checkpoints / "manifests").mkdir()
    (old.checkpoints / "manifests" / "000000000001-final-cc.json").write_text("{}")
    os.utime(old.run_json, (time.time() - 9_000, time.time() - 9_000))
    wait_for(lambda: len(face.get("/v1/runs")) == 2, "seen")
    recent = {"from": int((time.time() - 600) * 1e3)}
    assert "old" not in str(face.get("/v1/annotations", **recent))
    assert "old" in str(face.get("/v1/annotations", run="old"))


# ---- who may ask ---------------------------------------------------------------------------------------

ONE_RUN = ["/v1/runs/{}", "/v1/runs/{}/commands", "/v1/runs/{}/events", "/v1/annotations?run={}"]
GUARDED = ["/v1/runs", "/v1/alerts", *(path.format("r1") for path in ONE_RUN)]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("token", [None, "Bearer nonsense", "Basic eDp5"])
def test_without_the_token_nothing_is_told(face: Face, path: str, token: str | None) -> None:
    answer = face.ask("GET", path, headers={"authorization": token} if token else {})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert "r1" not in answer.text


def test_without_the_token_nothing_is_read_or_done(face: Face, executed: list[Command]) -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while read < 1 << 24:
            read += 1 << 16
            yield b" " * (1 << 16)

    answer = face.ask("POST", "/v1/runs/r1/commands", content=endless())
    assert answer.status_code == 401 and read <= 1 << 17
    assert executed == [] and face.nothing_done()


def test_a_body_of_more_than_a_megabyte_is_a_413(face: Face) -> None:
    assert give(face, action="stop", reason="x" * (1 << 20)).status_code == 413


def test_who_asks_too_fast_is_told_when_to_come_again(tmp_path: Path) -> None:
    run_folder(tmp_path)
    face = Face(tmp_path, requests_per_second=2.0)
    try:
        statuses = [face.ask("GET", "/v1/runs", headers=AUTHORIZED) for _ in range(5)]
        assert [one.status_code for one in statuses[:3]] == [200] * 3
        assert {one.status_code for one in statuses[3:]} == {429}
        assert statuses[-1].headers["retry-after"] == "1"
        assert face.ask("GET", "/v1/runs").status_code == 401
        assert face.decide(alert(run=None)) == {"no_run": 1}
    finally:
        face.sidecar.stop()


def test_a_flood_of_notifications_is_told_to_come_again_and_counted(tmp_path: Path) -> None:
    run_folder(tmp_path)
    face = Face(tmp_path, webhooks_per_second=2.0)
    try:
        answers = [face.post({"version": "4", "alerts": []}) for _ in range(5)]
        assert [one.status_code for one in answers] == [200, 200, 200, 503, 503]
        assert answers[-1].headers["retry-after"] == "1" and face.webhooks("too_many") == 2
        assert face.post({}, token=None).status_code == 401
    finally:
        face.sidecar.stop()


def test_a_bucket_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(gate.time, "monotonic", lambda: now)
    bucket = gate.Bucket(10, 2)
    assert [bucket.take() for _ in range(3)] == [True, True, False]
    now += 0.15
    assert [bucket.take() for _ in range(2)] == [True, False]
    now += 60
    assert [bucket.take() for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/v1/runs", {"live": "perhaps"}),
        ("/v1/runs", {"lvie": "true"}),
        ("/v1/runs/r1", {"x": "1"}),
        ("/v1/alerts", {"limit": "0"}),
        ("/v1/alerts", {"limit": "many"}),
        ("/v1/runs/r1/commands", {"limit": "1001"}),
        ("/v1/runs/r1/events", {"since": "-1"}),
        ("/v1/runs/r1/events", {"since": "nan"}),
        ("/v1/annotations", {"from": "yesterday"}),
        ("/v1/annotations", {"to": "1e400"}),
        ("/v1/annotations", {"run": "x" * 101}),
    ],
    ids=str,
)
def test_a_parameter_that_is_unknown_or_wrong_is_a_422_that_names_it(
    face: Face, path: str, query: dict[str, str]
) -> None:
    answer = face.ask("GET", path, params=query, headers=AUTHORIZED)
    assert answer.status_code == 422, answer.text
    assert next(iter(query)) in answer.json()["detail"] and len(answer.text) < 500


# ---- what is asked for by name ----------------------------------------------------------------------------

TRAVERSALS = [
    "..",
    "../x",
    "..%2fx",
    "%2e%2e",
    "%2e%2e%2fx",
    "....//x",
    "r1%2f..",
    "r1%2f..%2f..%2fx",
    "r1/../../x",
    "%00",
    "r1%00",
    ".stack",
    "%5c..%5cx",
    "~",
    "x" * 5_000,
    "%ff",
    "r1%0a",
    "r1%20",
]


@pytest.mark.parametrize("name", TRAVERSALS, ids=lambda name: name[:20])
@pytest.mark.parametrize("route", ONE_RUN)
def test_no_name_leads_out_of_the_folder_of_runs(face: Face, tmp_path: Path, route: str, name: str) -> None:
    outside = run_folder(tmp_path.parent / f"{tmp_path.name}-outside", "x")
    run_folder(tmp_path.parent, f"{tmp_path.name}-sibling")
    with channel_of(outside) as (channel, _):
        for method in ("GET", "POST"):
            url = httpx.URL("http://sidecar" + route.format(name))
            answer = face.ask(
                method,
                str(url),
                headers=AUTHORIZED,
                content=b'{"action":"stop"}' if method == "POST" else b"",
            )
            assert answer.status_code in (404, 405, 422), answer.text
            assert "digits" not in answer.text
        assert channel.take() == [] and list(outside.acks.iterdir()) == []
    assert face.nothing_done()


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.text(min_size=1, max_size=40).filter(lambda name: name not in ("r1",)))
def test_any_name_is_a_run_of_the_folder_or_none(face: Face, name: str) -> None:
    path = "/v1/runs/" + quote(name, safe="")
    for suffix in ("", "/commands", "/events"):
        answer = face.ask("GET", path + suffix, headers=AUTHORIZED)
        assert answer.status_code in (404, 405, 422), (name, answer.text)
    annotated = face.ask("GET", "/v1/annotations", params={"run": name}, headers=AUTHORIZED)
    assert annotated.status_code in (404, 422)


def test_the_whole_address_space_is_described(face: Face) -> None:
    document = face.ask("GET", "/openapi.json").json()
    assert set(document["paths"]) == {
        "/webhook",
        "/healthz",
        "/metrics",
        "/sd",
        "/v1/runs",
        "/v1/runs/{run}",
        "/v1/runs/{run}/commands",
        "/v1/journal",
        "/v1/runs/{run}/slow_steps",
        "/v1/runs/{run}/events",
        "/v1/alerts",
        "/v1/annotations",
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            guarded = path.startswith("/v1") or path == "/webhook"
            assert bool(operation.get("security")) == guarded, path


def test_away_from_this_machine_everything_but_the_pulse_asks_for_the_token(tmp_path: Path) -> None:
    run_folder(tmp_path)
    face = Face(tmp_path, guard_all=True)
    try:
        for path in ("/metrics", "/sd", "/openapi.json"):
            assert face.ask("GET", path).status_code == 401
            assert face.ask("GET", path, headers=AUTHORIZED).status_code == 200
        assert face.ask("GET", "/healthz").status_code == 200
    finally:
        face.sidecar.stop()


def test_a_journal_that_cannot_be_read_is_a_503_and_the_rest_is_served(
    face: Face, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*given: Any) -> Any:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(face.sidecar.journal, "_read", damaged)
    answer = face.ask("GET", "/v1/journal", headers=AUTHORIZED)
    assert answer.status_code == 503 and "malformed" in answer.json()["detail"]
    assert face.get("/v1/runs") != []
    assert "obsinfra_sidecar_webhooks_total" in face.ask("GET", "/metrics").text
