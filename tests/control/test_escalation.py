"""Cool-downs, limits, fan-out, escalation and undoing: what the policy makes of alerts over time."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import record_payloads
from sidecar_face import AT_ONCE, Face
from sidecar_tools import ago, alert
from trainer_double import command, run_folder, trainer
from waiting import wait_for

from obsinfra.alerting.prometheus_rules import firing_labels
from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.policy import Policy, Response, Step
from obsinfra.control.command import Command
from obsinfra.control.firing_check import FiringCheck
from obsinfra.control.journal import CommandEntry, Firing
from obsinfra.deployment.native_stack import find_binary

HOT = Policy(
    cool_down_seconds=0.0,
    responses={
        "GradientExplosion": Response(
            escalate=(
                Step("pause", {"max_seconds": 60.0}, after_minutes=5, undo=True),
                Step("stop", {"grace_seconds": 5.0}, after_minutes=15),
            )
        )
    },
)
MINUTE = 60.0
needs_alertmanager = pytest.mark.skipif(
    find_binary("Alertmanager") is None, reason="Alertmanager is not installed"
)
DEAD = {"0": {"pid": 2**22 + 1, "created": 1.0}}


class Scene:
    """A run with a trainer double, and a sidecar whose clock is told."""

    def __init__(self, output_dir: Path, executed: list[Command], policy: Policy, **more: Any) -> None:
        self.output_dir, self.executed, self.policy, self.more = output_dir, executed, policy, more
        self.face = Face(output_dir, policy, **more)

    def restart(self) -> None:
        self.face.sidecar.stop()
        self.face = Face(self.output_dir, self.policy, **self.more)

    def later(self, minutes: float) -> None:
        """Take what is due so many minutes from now."""
        self.face.sidecar.take_due_steps(time.time() + minutes * MINUTE)

    def done(self) -> list[str]:
        """Actions the trainer carried out, once nothing waits."""
        wait_for(lambda: self.face.sidecar.journal.waiting() == [], "settled")
        return [command.action for command in self.executed]

    def counted(self, action: str) -> float:
        return self.face.sidecar.instruments.get(
            catalog.SIDECAR_ESCALATIONS, alert="GradientExplosion", action=action
        )

    def held_back(self, reason: str) -> float:
        return self.face.sidecar.instruments.get(catalog.SIDECAR_HELD_BACK, reason=reason)

    def decisions(self) -> list[str]:
        return [entry.decision for entry in reversed(self.face.sidecar.journal.alerts())]


@pytest.fixture
def executed(tmp_path: Path) -> Iterator[list[Command]]:
    with trainer(run_folder(tmp_path)) as executed:
        yield executed


@pytest.fixture
def scenes(tmp_path: Path, executed: list[Command]) -> Iterator[Any]:
    made: list[Scene] = []

    def make(policy: Policy, **more: Any) -> Scene:
        made.append(Scene(tmp_path, executed, policy, **more))
        return made[-1]

    yield make
    for scene in made:
        scene.face.sidecar.stop()


# ---- escalation --------------------------------------------------------------------------------------


def test_an_alert_that_goes_on_firing_is_answered_step_by_step(scenes: Any) -> None:
    scene = scenes(HOT)
    scene.face.decide(alert())
    scene.later(4.9)
    assert scene.done() == ["emergency_checkpoint"]
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.later(5.2)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.later(5.1 + 15.1)
    assert scene.done() == ["emergency_checkpoint", "pause", "stop"]
    scene.later(600)
    assert scene.done() == ["emergency_checkpoint", "pause", "stop"]
    pause, stop = scene.executed[1:]
    assert pause.args == {"max_seconds": 60.0, "alert": "GradientExplosion"}
    assert stop.args == {"grace_seconds": 5.0, "alert": "GradientExplosion"}
    assert "still firing" in stop.reason and stop.source == "sidecar"
    assert (scene.counted("pause"), scene.counted("stop")) == (1, 1)
    assert scene.decisions() == ["accepted", "escalated", "escalated"]


def test_a_resolved_alert_escalates_no_further_and_what_was_done_is_undone(scenes: Any) -> None:
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    scene.later(5.1)
    assert scene.face.decide(firing | {"status": "resolved"}) == {"resolved": 1, "undone": 1}
    assert scene.done() == ["emergency_checkpoint", "pause", "resume"]
    scene.later(600)
    assert scene.face.decide(firing | {"status": "resolved"}) == {"resolved": 1}
    assert scene.done() == ["emergency_checkpoint", "pause", "resume"]
    assert scene.executed[2].reason.endswith("(resolved)") and scene.counted("resume") == 1
    assert scene.face.sidecar.journal.firing() == []


def test_what_resolved_before_its_second_step_needs_no_undoing(scenes: Any) -> None:
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    assert scene.face.decide(firing | {"status": "resolved"}) == {"resolved": 1}
    scene.later(600)
    assert scene.done() == ["emergency_checkpoint"]


def test_a_run_is_not_resumed_while_another_alert_wants_it_paused(scenes: Any) -> None:
    """Two devices are hot; one cools down first."""
    scene = scenes(HOT)
    one, other = alert(fingerprint="device0"), alert(fingerprint="device1")
    scene.face.decide(one, other)
    scene.later(5.1)
    scene.face.decide(one | {"status": "resolved"})
    assert "resume" not in scene.done()
    scene.face.decide(other | {"status": "resolved"})
    assert scene.done()[-1] == "resume" and scene.done().count("resume") == 1


def with_pause(undo: bool) -> Response:
    return Response(escalate=(Step("pause", after_minutes=1, undo=undo),))


@pytest.mark.parametrize("which_ends_first", ["the lasting one", "the passing one"])
def test_a_pause_without_undo_is_not_ended_by_the_end_of_another_alerts_pause(
    scenes: Any, which_ends_first: str
) -> None:
    """The run is told `resume` for alerts alone, and the pause that nobody undoes is not one of theirs."""
    scene = scenes(
        replace(HOT, responses={"GradientExplosion": with_pause(True), "Lasting": with_pause(False)})
    )
    passing, lasting = alert(fingerprint="passing"), alert(fingerprint="lasting")
    lasting["labels"] = lasting["labels"] | {"alertname": "Lasting"}
    scene.face.decide(passing, lasting)
    scene.later(1.1)
    assert scene.done().count("pause") == 2
    assert sorted(
        command.args.get("alert", "") for command in scene.executed if command.action == "pause"
    ) == [
        "",
        "GradientExplosion",
    ]
    if which_ends_first == "the passing one":
        assert scene.face.decide(passing | {"status": "resolved"}) == {"resolved": 1}
        assert "resume" not in scene.done()
        return
    assert scene.face.decide(lasting | {"status": "resolved"}) == {"resolved": 1}
    assert scene.face.decide(passing | {"status": "resolved"}) == {"resolved": 1, "undone": 1}
    assert scene.done()[-1] == "resume"
    assert scene.executed[-1].args == {"alert": "GradientExplosion"}


def test_the_end_of_an_earlier_firing_does_not_end_the_present_one(scenes: Any) -> None:
    scene = scenes(HOT)
    earlier, present = alert(startsAt=ago(minutes=9)), alert(startsAt=ago(seconds=1))
    scene.face.decide(present)
    scene.face.decide(earlier | {"status": "resolved"})
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_a_new_firing_takes_over_what_an_unheard_end_left_paused(scenes: Any) -> None:
    scene = scenes(HOT)
    scene.face.decide(alert(startsAt=ago(minutes=30)))
    scene.later(5.1)
    again = alert(startsAt=ago(seconds=1))
    scene.face.decide(again)
    assert len(scene.face.sidecar.journal.firing()) == 1
    assert scene.face.decide(again | {"status": "resolved"}) == {"resolved": 1, "undone": 1}
    assert scene.done() == ["emergency_checkpoint", "pause", "emergency_checkpoint", "resume"]


def test_a_repetition_does_not_begin_anew(scenes: Any) -> None:
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    scene.later(5.1)
    assert scene.face.decide(firing) == {"duplicate": 1}
    scene.later(5.2 + 5)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_escalation_goes_on_after_a_restart_and_does_nothing_twice(scenes: Any) -> None:
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    scene.restart()
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.restart()
    scene.later(5.2)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.later(30)
    scene.restart()
    scene.later(600)
    assert scene.done() == ["emergency_checkpoint", "pause", "stop"]


def test_steps_that_a_change_of_the_policy_added_are_taken_for_what_fires_already(scenes: Any) -> None:
    """Due as long after the last step as the policy says, not as long after the restart."""
    scene = scenes(replace(HOT, responses={}), still_firing=lambda firing: True)
    scene.face.decide(alert())
    assert scene.face.sidecar.journal.firing()[0].next_at is None
    scene.policy = HOT
    scene.restart()
    scene.later(4.9)
    assert scene.done() == ["emergency_checkpoint"]
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.later(5.1 + 15.1)
    assert scene.done() == ["emergency_checkpoint", "pause", "stop"]


@pytest.mark.parametrize("undo", [False, True])
def test_a_step_added_after_one_that_waits_for_the_end_is_taken_in_its_time(scenes: Any, undo: bool) -> None:
    pause = Step("pause", after_minutes=1, undo=undo)
    scene = scenes(
        replace(HOT, responses={"GradientExplosion": Response(escalate=(pause,))}),
        still_firing=lambda firing: True,
    )
    firing = alert()
    scene.face.decide(firing)
    scene.later(1.1)
    assert scene.face.decide(firing) == {"duplicate": 1}  # which is no step
    (shown,) = scene.face.get("/v1/runs/r1")["firing"]
    assert (shown["next_step"], shown["next_at"]) == (None, None)  # though it is watched for its end
    more = Response(escalate=(pause, Step("stop", after_minutes=9)))
    scene.policy = replace(HOT, responses={"GradientExplosion": more})
    scene.restart()
    scene.later(1.1 + 8.9)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    scene.later(1.1 + 9.1)
    assert scene.done() == ["emergency_checkpoint", "pause", "stop"]


def test_a_restarted_sidecar_waits_for_word_of_what_resolved_meanwhile(scenes: Any) -> None:
    """The step came due while it was down; Alertmanager repeats the end of the alert within seconds."""
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    scene.done()
    for column, table in (("received_at", "alerts"), ("next_at", "firings")):
        scene.face.sidecar.journal._database.execute(f"UPDATE {table} SET {column} = {column} - 400")
    scene.restart()
    scene.later(0.0)
    assert scene.done() == ["emergency_checkpoint"]
    scene.later(0.5)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_a_journal_of_an_older_version_goes_on(scenes: Any) -> None:
    scene = scenes(HOT)
    scene.face.decide(alert())
    scene.done()
    for table, column in (("firings", "again"), ("alerts", "action")):
        scene.face.sidecar.journal._database.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    scene.restart()
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_a_journal_that_fails_loses_no_step(scenes: Any) -> None:
    scene = scenes(HOT)
    scene.face.decide(alert())
    scene.done()
    database = scene.face.sidecar.journal._database
    database.execute("CREATE TRIGGER f BEFORE INSERT ON commands BEGIN SELECT RAISE(FAIL, 'full'); END")
    with pytest.raises(Exception, match="full"):
        scene.later(5.1)
    database.execute("DROP TRIGGER f")
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_a_run_that_has_ended_is_left_alone(scenes: Any, tmp_path: Path) -> None:
    scene = scenes(HOT)
    firing = alert()
    scene.face.decide(firing)
    assert scene.done() == ["emergency_checkpoint"]
    folder = run_folder(tmp_path, state="finished")
    wait_for(lambda: not scene.face.sidecar.watch.runs()[0].live, "seen")
    scene.later(5.1)
    folder.update_info(state="running")
    scene.later(600)
    assert scene.done() == ["emergency_checkpoint"]


@pytest.mark.parametrize(
    ("answer", "minutes", "expected"),
    [
        (True, (5.1,), ["emergency_checkpoint", "pause"]),
        (False, (5.1, 600), ["emergency_checkpoint"]),
        (None, (5.1, 5.1), ["emergency_checkpoint"]),
    ],
    ids=["fires", "resolved unheard", "nobody knows"],
)
def test_a_step_is_taken_only_when_the_alert_is_known_to_fire(
    scenes: Any, answer: bool | None, minutes: tuple[float, ...], expected: list[str]
) -> None:
    asked: list[Firing] = []
    scene = scenes(HOT, still_firing=lambda firing: (asked.append(firing), answer)[1])
    scene.face.decide(alert())
    for moment in minutes:
        scene.later(moment)
    assert scene.done() == expected
    assert asked[0].fingerprint == alert()["fingerprint"]


def test_a_step_put_off_for_want_of_an_answer_is_taken_when_there_is_one(scenes: Any) -> None:
    answers = itertools.chain([None], itertools.repeat(True))
    scene = scenes(HOT, still_firing=lambda firing: next(answers))
    scene.face.decide(alert())
    scene.later(5.1)
    assert scene.done() == ["emergency_checkpoint"]
    scene.later(5.1 + 0.5)
    assert scene.done() == ["emergency_checkpoint", "pause"]


def test_the_sidecar_takes_steps_by_itself(scenes: Any) -> None:
    quick = replace(
        HOT, responses={"GradientExplosion": Response(escalate=(Step("dump_stacks", after_minutes=0.001),))}
    )
    scene = scenes(quick)
    scene.face.decide(alert())
    wait_for(lambda: scene.done() == ["emergency_checkpoint", "dump_stacks"], "escalated")


# ---- cool-down and limit -----------------------------------------------------------------------------


def test_what_was_done_before_the_clock_was_set_back_holds_nothing_back(scenes: Any) -> None:
    """Else no emergency checkpoint were made until the clock has caught up."""
    scene = scenes(Policy(emergency_checkpoints_per_hour=1))
    later = time.time() + 3_600.0
    before = CommandEntry(command("emergency_checkpoint"), "", later, later, outcome="done")
    scene.face.sidecar.journal.add([], [before])
    assert scene.face.decide(alert()) == {"accepted": 1}
    assert scene.face.decide(alert(fingerprint="another")) == {"cool_down": 1}


def test_what_was_done_a_moment_ago_counts_for_every_alert_that_asks_for_it(scenes: Any) -> None:
    scene = scenes(replace(AT_ONCE, cool_down_seconds=600.0))
    assert scene.face.decide(alert(), alert(fingerprint="other")) == {"accepted": 1, "cool_down": 1}
    assert scene.face.decide(alert(fingerprint="third")) == {"cool_down": 1}
    assert scene.face.decide(alert(fingerprint="third", action="checkpoint")) == {"accepted": 1}
    assert sorted(scene.done()) == ["checkpoint", "emergency_checkpoint"]
    assert scene.held_back("cool_down") == 2
    assert len(scene.face.sidecar.journal.firing()) == 3


def test_a_cool_down_is_per_run(scenes: Any, tmp_path: Path) -> None:
    scene = scenes(replace(AT_ONCE, cool_down_seconds=600.0))
    with trainer(run_folder(tmp_path, "r2")) as others:
        assert scene.face.decide(alert(), alert(run="r2")) == {"accepted": 2}
        assert scene.done() == ["emergency_checkpoint"] and len(others) == 1


def test_a_command_that_failed_cools_nothing_down(tmp_path: Path) -> None:
    def refuse(channel: Any, command: Command) -> None:
        channel.ack(command.id, "failed", error="disk full")

    with trainer(run_folder(tmp_path), refuse) as executed:
        face = Face(tmp_path, replace(AT_ONCE, cool_down_seconds=600.0))
        try:
            assert face.decide(alert()) == {"accepted": 1}
            wait_for(lambda: face.sidecar.journal.waiting() == [], "settled")
            assert face.decide(alert(fingerprint="other")) == {"accepted": 1}
            wait_for(lambda: len(executed) == 2, "tried again")
        finally:
            face.sidecar.stop()


def test_an_alert_repeated_after_the_cool_down_is_acted_on(scenes: Any) -> None:
    scene = scenes(replace(AT_ONCE, cool_down_seconds=600.0))
    second = alert(fingerprint="other")
    scene.face.decide(alert(), second)
    scene.done()
    journal = scene.face.sidecar.journal
    journal.submit(lambda pages: pages._cursor.execute("UPDATE commands SET received_at = received_at - 700"))
    assert scene.face.decide(second) == {"accepted": 1}
    assert scene.done() == ["emergency_checkpoint"] * 2


def test_emergency_checkpoints_are_limited_by_the_hour_and_other_actions_are_not(scenes: Any) -> None:
    scene = scenes(replace(AT_ONCE, emergency_checkpoints_per_hour=3))
    wanted = [alert(fingerprint=f"f{number}") for number in range(5)]
    assert scene.face.decide(*wanted) == {"accepted": 3, "hourly_limit": 2}
    assert scene.face.decide(
        *[one | {"labels": one["labels"] | {"action": "checkpoint"}} for one in wanted]
    ) == {"accepted": 5}
    assert scene.held_back("hourly_limit") == 2
    assert scene.done().count("emergency_checkpoint") == 3


def test_an_escalation_held_back_goes_on_with_the_step_after_it(scenes: Any) -> None:
    policy = replace(
        HOT,
        cool_downs={"emergency_checkpoint": 3_600.0},
        responses={
            "GradientExplosion": Response(
                escalate=(Step("emergency_checkpoint", after_minutes=1), Step("stop", after_minutes=1))
            )
        },
    )
    scene = scenes(policy)
    scene.face.decide(alert())
    scene.later(1.1)
    scene.later(2.2)
    assert scene.done() == ["emergency_checkpoint", "stop"]
    assert scene.decisions() == ["accepted", "cool_down", "escalated"]


# ---- the end of an alert, and what comes after it ------------------------------------------------------


def ended_before(scene: Scene, seconds: float) -> None:
    """Let the end of every alert have been heard so long ago."""
    database = scene.face.sidecar.journal._database
    database.execute("UPDATE firings SET resolved_at = resolved_at - ?", (seconds,))


def test_an_alert_that_fires_again_with_the_same_start_is_answered_again(scenes: Any) -> None:
    """Prometheus was cut off, Alertmanager gave the alert up, and now it is back."""
    scene = scenes(HOT, still_firing=lambda firing: True)
    firing = alert()
    scene.face.decide(firing)
    scene.later(5.1)
    for _ in range(2):
        scene.face.decide(firing | {"status": "resolved"})
        assert scene.face.decide(firing) == {"again": 1}
        assert scene.face.decide(firing) == {"duplicate": 1}
        scene.later(0.1)
        scene.later(0.2)
        scene.later(5.3)
    once = ["emergency_checkpoint", "pause", "resume"]
    assert scene.done() == [*once, *once, *once[:2]]
    assert scene.executed[3].reason.endswith("(firing again)")


def test_what_was_sent_before_the_end_and_is_heard_after_it_changes_nothing(scenes: Any) -> None:
    scene = scenes(HOT, still_firing=lambda firing: False)
    firing = alert()
    scene.face.decide(firing)
    scene.face.decide(firing | {"status": "resolved"})
    assert scene.face.decide(firing) == {"again": 1}
    scene.later(0.1)
    scene.later(600)
    assert scene.done() == ["emergency_checkpoint"] and scene.face.sidecar.journal.firing() == []


@pytest.mark.parametrize("about_host", [False, True])
def test_an_end_heard_before_its_beginning_is_its_end(scenes: Any, about_host: bool) -> None:
    """With no Alertmanager to be asked."""
    scene = scenes(HOT)
    firing = host_alert() if about_host else alert()
    assert scene.face.decide(firing | {"status": "resolved"}) == {"resolved": 1}
    assert scene.face.decide(firing) == {"duplicate": 1}
    scene.later(600)
    assert scene.done() == [] and scene.face.sidecar.journal.firing() == []
    ended_before(scene, 61)
    assert scene.face.decide(firing) == {"again": 1}
    scene.later(0.1)
    assert scene.done() == ["emergency_checkpoint"]


def test_a_pause_with_no_step_after_it_ends_with_an_alert_whose_end_went_unheard(scenes: Any) -> None:
    fires = True
    pause = Response(escalate=(Step("pause", after_minutes=5, undo=True),))
    scene = scenes(replace(HOT, responses={"GradientExplosion": pause}), still_firing=lambda firing: fires)
    scene.face.decide(alert())
    scene.later(5.1)
    scene.later(7)
    assert scene.done() == ["emergency_checkpoint", "pause"]
    fires = False
    scene.later(9)
    assert scene.done() == ["emergency_checkpoint", "pause", "resume"]


def test_a_step_that_cannot_be_taken_keeps_no_other_from_being_taken(scenes: Any) -> None:
    scene = scenes(
        replace(
            HOT, responses={**HOT.responses, "Other": Response(escalate=(Step("stop", after_minutes=6),))}
        )
    )
    one, other = alert(fingerprint="one"), alert(fingerprint="other")
    scene.face.decide(one, other | {"labels": other["labels"] | {"alertname": "Other"}})
    scene.done()
    scene.face.sidecar.journal._database.execute(
        "CREATE TRIGGER f BEFORE INSERT ON commands WHEN NEW.action = 'pause'"
        " BEGIN SELECT RAISE(FAIL, 'no'); END"
    )
    with pytest.raises(Exception, match="no"):
        scene.later(6.1)
    assert scene.done()[-1] == "stop"


def test_an_action_whose_package_is_gone_is_told_and_passed_over(scenes: Any) -> None:
    steps = (Step("reboot", after_minutes=1), Step("stop", after_minutes=1))
    scene = scenes(replace(HOT, responses={"GradientExplosion": Response(escalate=steps)}))
    scene.face.decide(alert())
    scene.later(1.1)
    scene.later(2.2)
    assert scene.decisions() == ["accepted", "unknown_action", "escalated"]
    assert scene.done() == ["emergency_checkpoint", "stop"]


# ---- dry run -----------------------------------------------------------------------------------------


def test_a_dry_run_journals_every_step_and_takes_none(scenes: Any) -> None:
    scene = scenes(replace(HOT, dry_run=True))
    firing = alert()
    assert scene.face.decide(firing) == {"dry_run": 1}
    scene.later(5.1)
    assert scene.face.decide(firing | {"status": "resolved"}) == {"resolved": 1, "dry_run": 1}
    assert sorted((entry.decision, entry.action) for entry in scene.face.sidecar.journal.alerts()) == [
        ("dry_run", "emergency_checkpoint"),
        ("dry_run", "pause"),
        ("dry_run", "resume"),
        ("resolved", ""),
    ]
    assert scene.executed == [] and scene.face.sidecar.journal.commands() == []
    assert scene.held_back("dry_run") == 3


# ---- alerts about a host -----------------------------------------------------------------------------


def host_alert(**labels: str) -> dict[str, Any]:
    made = alert(run=None)
    return made | {"labels": made["labels"] | {"scope": "host", **labels}}


def test_an_alert_about_the_host_goes_to_each_live_run_on_it(scenes: Any, tmp_path: Path) -> None:
    scene = scenes(AT_ONCE)
    run_folder(tmp_path, "killed", processes=DEAD)
    run_folder(tmp_path, "over", state="finished")
    with trainer(run_folder(tmp_path, "r2")) as others:
        wait_for(lambda: len(scene.face.sidecar.watch.runs()) == 4, "seen")
        assert scene.face.decide(host_alert()) == {"accepted": 2}
        assert scene.done() == ["emergency_checkpoint"] and len(others) == 1
        assert scene.executed[0].id != others[0].id
        assert scene.face.decide(host_alert()) == {"accepted": 2}  # began at another moment
    assert {entry.run for entry in scene.face.sidecar.journal.alerts()} == {"r1", "r2"}


def test_its_end_is_the_end_for_each_of_them(scenes: Any, tmp_path: Path) -> None:
    scene = scenes(HOT)
    with trainer(run_folder(tmp_path, "r2")) as others:
        wait_for(lambda: len(scene.face.sidecar.watch.runs()) == 2, "seen")
        hot = host_alert()
        scene.face.decide(hot)
        scene.later(5.1)
        assert scene.face.decide(hot | {"status": "resolved"}) == {"resolved": 1, "undone": 2}
        assert scene.done() == ["emergency_checkpoint", "pause", "resume"]
        assert [command.action for command in others] == scene.done()


def test_an_alert_about_the_host_that_names_a_run_is_for_that_run(scenes: Any, tmp_path: Path) -> None:
    """Each trainer tells its host's memory: each run has an alert of its own."""
    scene = scenes(AT_ONCE)
    with trainer(run_folder(tmp_path, "r2")) as others:
        wait_for(lambda: len(scene.face.sidecar.watch.runs()) == 2, "seen")
        assert scene.face.decide(host_alert(run="r1")) == {"accepted": 1}
        assert scene.done() == ["emergency_checkpoint"] and others == []


def test_an_alert_about_another_host_is_for_nobody_here(scenes: Any) -> None:
    scene = scenes(AT_ONCE)
    assert scene.face.decide(host_alert(host="elsewhere")) == {"no_run": 1}
    here = scene.face.sidecar.watch.runs()[0].info.host
    assert scene.face.decide(host_alert(host=here)) == {"accepted": 1}


def as_prometheus_sends(key: str, change: dict[str, Any], **series: str) -> dict[str, Any]:
    """A firing of that alert with the labels that the generated rule gives it."""
    [row] = [alert for alert in alert_table({}, {key: change}) if alert.key == key]
    return alert() | {"labels": {"alertname": row.name, **firing_labels(row, series)}}


def test_an_alert_given_another_scope_reaches_the_runs_that_it_then_speaks_of(
    scenes: Any, tmp_path: Path
) -> None:
    """That of a host without a run goes to every run there; that of a series of a run to that run alone."""
    scene = scenes(AT_ONCE)
    here = scene.face.sidecar.watch.runs()[0].info.host
    with trainer(run_folder(tmp_path, "r2")) as others:
        wait_for(lambda: len(scene.face.sidecar.watch.runs()) == 2, "seen")
        about_host = {"scope": "host", "action": "checkpoint"}
        there = as_prometheus_sends("host_down", about_host, job="hosts", host="elsewhere")
        assert scene.face.decide(there) == {"no_run": 1}
        assert scene.face.decide(as_prometheus_sends("host_down", about_host, job="hosts", host=here)) == {
            "accepted": 2
        }
        assert scene.done() == ["checkpoint"] == [command.action for command in others]
        of_run = as_prometheus_sends(
            "gpu_temperature", {"scope": "host"}, run="r1", model="m", rank="0", device="0", host=here
        )
        assert scene.face.decide(of_run | {"fingerprint": "other"}) == {"accepted": 1}
        assert scene.done() == ["checkpoint", "emergency_checkpoint"] and len(others) == 1


# ---- asking Alertmanager ---------------------------------------------------------------------------------


def firing_of(fingerprint: str) -> Firing:
    return Firing("r1", fingerprint, 0.0, "GradientExplosion", "critical", "", "stop", 1, None)


@pytest.mark.stack
@needs_alertmanager
def test_a_real_alertmanager_tells_what_fires_and_what_was_silenced(tmp_path: Path) -> None:
    recorder = record_payloads.Recorder()
    binary = find_binary("Alertmanager")
    assert binary is not None
    with record_payloads.alertmanager(binary, recorder.server.server_port) as url:
        record_payloads.send(url, record_payloads.SCENES["one"], ended=False)
        (told,) = json.loads(recorder.last_of(1))["alerts"]
        firing = firing_of(told["fingerprint"])
        assert FiringCheck(url).still_fires(firing) is True
        # It was started a moment ago, perhaps anew, and may not have been told of another one yet.
        assert FiringCheck(url + "/").still_fires(firing_of("another")) is None
        assert FiringCheck(url + "/", told_seconds=0.0).still_fires(firing_of("another")) is False
        silence = {
            "matchers": [{"name": "alertname", "value": "GradientExplosion", "isRegex": False}],
            "startsAt": datetime.now(UTC).isoformat(),
            "endsAt": (datetime.now(UTC) + timedelta(hours=1)).isoformat(),
            "createdBy": "anna",
            "comment": "I am on it",
        }
        httpx.post(f"{url}/api/v2/silences", json=silence, trust_env=False).raise_for_status()
        wait_for(lambda: FiringCheck(url).still_fires(firing) is False, "silenced")
        asked_once = FiringCheck(url)
        assert asked_once.still_fires(firing) is False
    assert asked_once.still_fires(firing) is False  # of a moment ago
    assert FiringCheck(url).still_fires(firing) is None
    recorder.server.shutdown()


@pytest.mark.parametrize("answer", [b"nonsense", b"{}", b'[{"no": "fingerprint"}]', b"[5]"])
def test_what_is_no_answer_of_an_alertmanager_is_none(answer: bytes) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        told = FiringCheck(f"http://127.0.0.1:{server.server_port}").still_fires(firing_of("f"))
        server.shutdown()
        thread.join()
    assert told is None
