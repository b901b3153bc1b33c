"""The metrics that tell what was done about what fires: what the rules look up for people's messages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sidecar_face import AT_ONCE, Face
from sidecar_tools import ago, alert
from trainer_double import run_folder, trainer
from waiting import wait_for

from obsinfra.catalog.policy import Policy, Response, Step
from obsinfra.control import outcomes
from obsinfra.control.command import Command

PAUSES = Policy(
    cool_down_seconds=60.0,
    responses={"GradientExplosion": Response(escalate=(Step("pause", after_minutes=5, undo=True),))},
)


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[list[Command]]:
    with trainer(run_folder(tmp_path)) as executed:
        yield executed


@pytest.fixture
def paused(tmp_path: Path) -> Iterator[Face]:
    """A sidecar that has a run saved, after five minutes paused."""
    made = Face(tmp_path, PAUSES)
    yield made
    made.sidecar.stop()


def told(face: Face) -> dict[tuple[str, str, str], float]:
    """(alert, action, outcome) → seconds, as a scrape finds it for the run r1."""
    found = {}
    for family in text_string_to_metric_families(face.ask("GET", "/metrics").text):
        if family.name == "obsinfra_sidecar_action_seconds":
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("run") == "r1"
                found[labels["alert"], labels["action"], labels["outcome"]] = sample.value
    return found


def settled(face: Face) -> dict[tuple[str, str, str], float]:
    wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
    return told(face)


SAVED = ("GradientExplosion", "emergency_checkpoint", "done")


def test_an_action_is_told_while_its_alert_fires(paused: Face, executed: list[Command]) -> None:
    assert told(paused) == {}
    firing = alert()
    paused.decide(firing)
    found = settled(paused)
    assert list(found) == [SAVED] and 0 < found[SAVED] < 10
    text = paused.ask("GET", "/metrics").text
    step = 'obsinfra_sidecar_action_step{action="emergency_checkpoint",alert="GradientExplosion",run="r1"}'
    assert f"{step} 7.0" in text
    paused.sidecar.take_due_steps(time.time() + 301)
    assert set(settled(paused)) == {SAVED, ("GradientExplosion", "pause", "done")}
    paused.decide(firing | {"status": "resolved"})
    assert settled(paused) == {}


def test_what_is_under_way_is_told_as_such(face: Face, tmp_path: Path) -> None:
    """No trainer takes it: its seconds go on."""
    face.decide(alert())
    [(key, first)] = told(face).items()
    assert key == ("GradientExplosion", "emergency_checkpoint", "under_way")
    wait_for(lambda: told(face)[key] > first > 0, "its seconds go on")


def test_what_the_policy_held_back_is_told_unless_it_was_done_for_another_rank(
    paused: Face, executed: list[Command]
) -> None:
    """A thousand ranks make one series, of what was done for one of them."""
    first, other = alert(), alert(fingerprint="aaaa")
    paused.decide(first)
    settled(paused)
    assert paused.decide(other) == {"cool_down": 1}
    assert list(settled(paused)) == [SAVED]
    late = alert(fingerprint="bbbb")
    late["labels"] |= {"alertname": "NonFiniteLoss"}
    assert paused.decide(late) == {"cool_down": 1}
    held = ("NonFiniteLoss", "emergency_checkpoint", "cool_down")
    assert settled(paused)[held] == 0.0
    paused.decide(first | {"status": "resolved"})  # the others still fire
    assert settled(paused) == {("GradientExplosion", "emergency_checkpoint", "cool_down"): 0.0, held: 0.0}


def test_a_new_firing_is_not_told_what_was_done_about_an_earlier_one(
    face: Face, executed: list[Command]
) -> None:
    first = alert(startsAt=ago(minutes=1))
    face.decide(first)
    settled(face)
    face.decide(first | {"status": "resolved"})
    assert settled(face) == {}
    face.decide(alert())
    assert list(settled(face)) == [SAVED]
    assert len(executed) == 2


def test_outcomes_survive_a_restart(tmp_path: Path, executed: list[Command]) -> None:
    face = Face(tmp_path, AT_ONCE)
    face.decide(alert())
    before = settled(face)
    face.sidecar.stop()
    again = Face(tmp_path, AT_ONCE)
    try:
        assert told(again) == before != {}
    finally:
        again.sidecar.stop()


def test_a_storm_of_alerts_makes_no_more_series_than_a_scrape_can_bear(
    face: Face, executed: list[Command], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcomes, "MOST_FIRINGS", 3)
    for number in range(8):
        one = alert(fingerprint=f"{number:x}" * 4, startsAt=ago(seconds=60 - number))
        one["labels"] |= {"alertname": f"Alert{number}"}
        face.decide(one)
    assert {name for name, _, _ in settled(face)} == {"Alert5", "Alert6", "Alert7"}


def test_what_was_done_about_a_run_that_ended_is_told_for_an_hour(
    face: Face, executed: list[Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of its alert may never be heard."""
    face.decide(alert())
    assert list(settled(face)) == [SAVED]
    run_folder(tmp_path, state="finished")
    wait_for(lambda: not any(run.live for run in face.sidecar.watch.runs()), "the run ended")
    assert list(told(face)) == [SAVED]
    monkeypatch.setattr(outcomes, "KEPT_SECONDS", 0.0)
    assert told(face) == {}
