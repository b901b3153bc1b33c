"""The policy as data: what the defaults say, and what a user's `[policy]` table makes of them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from obsinfra.catalog.actions import ACTIONS
from obsinfra.catalog.alerts import BY_NAME
from obsinfra.catalog.policy import DEFAULT_POLICY, Policy, Step, policy_with
from obsinfra.config.resolve import dump_toml, resolve
from obsinfra.config.settings import Settings
from obsinfra.control.sidecar import read_policy
from obsinfra.errors import ConfigError


def names(steps: tuple[Step, ...]) -> list[str]:
    return [step.action for step in steps]


def test_the_defaults_name_alerts_and_actions_that_exist() -> None:
    assert DEFAULT_POLICY.responses.keys() <= BY_NAME.keys()
    assert DEFAULT_POLICY.cool_downs.keys() <= ACTIONS.keys()
    for response in DEFAULT_POLICY.responses.values():
        for step in response.escalate:
            assert ACTIONS[step.action].problem(step.args) is None
            assert not step.undo or ACTIONS[step.action].undo
            assert step.after_minutes > 0


def test_a_hot_gpu_is_saved_then_paused_then_stopped() -> None:
    steps = DEFAULT_POLICY.steps("HighGPUTemperature", "emergency_checkpoint")
    assert names(steps) == ["emergency_checkpoint", "pause", "stop"]
    assert [step.after_seconds for step in steps] == [0.0, 300.0, 900.0]
    assert [step.undo for step in steps] == [False, True, False]


def test_an_alert_without_a_response_gets_the_action_of_its_label_and_nothing_more() -> None:
    assert DEFAULT_POLICY.steps("MyOwnAlert", "checkpoint") == (Step("checkpoint"),)
    assert DEFAULT_POLICY.steps("MyOwnAlert", "") == ()


def test_an_alert_whose_action_was_taken_from_its_rule_does_not_escalate() -> None:
    assert DEFAULT_POLICY.steps("HighGPUTemperature", "") == ()


def test_no_changes_are_the_defaults() -> None:
    assert policy_with({}) == DEFAULT_POLICY


WRITTEN = """
[policy]
dry_run = true
cool_down_seconds = 5
emergency_checkpoints_per_hour = 3

[policy.cool_down]
profile = 60

[policy.alerts.HighGPUTemperature]
escalate = [
  { after_minutes = 2, action = "pause", args = { max_seconds = 600 }, undo = true },
]

[policy.alerts.HighMemory]
action = "memory_snapshot"
args = { top = 5 }
escalate = [{ after_minutes = 0.5, action = "emergency_checkpoint" }]

[policy.alerts.SlowStep]
action = "none"
"""


def test_a_users_table_changes_what_it_names_and_leaves_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "obsinfra.toml"
    file.write_text("epochs = 5\n" + WRITTEN)
    policy = resolve({}, file=file).settings.policy
    assert read_policy(file) == policy_with(policy)
    changed = policy_with(policy)
    assert (changed.dry_run, changed.emergency_checkpoints_per_hour) == (True, 3)
    assert (changed.cool_down("checkpoint"), changed.cool_down("profile")) == (5.0, 60.0)
    assert changed.cool_down("stop") == DEFAULT_POLICY.cool_down("stop") == 0.0
    assert changed.steps("HighGPUTemperature", "checkpoint") == (
        Step("checkpoint"),
        Step("pause", {"max_seconds": 600}, 2.0, True),
    )
    assert changed.steps("HighMemory", "checkpoint") == (
        Step("memory_snapshot", {"top": 5}),
        Step("emergency_checkpoint", after_minutes=0.5),
    )
    assert changed.steps("SlowStep", "checkpoint") == ()
    assert changed.responses["NoProgress"] == DEFAULT_POLICY.responses["NoProgress"]
    assert tomllib.loads(dump_toml(resolve({}, file=file).settings))["policy"] == policy


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"dryrun": True}, "unknown name 'dryrun' under [policy]; expected one of dry_run, "),
        ({"dry_run": 1}, "policy.dry_run = 1; expected true or false"),
        ({"cool_down_seconds": -1}, "policy.cool_down_seconds = -1; expected a number from 0 to 86400"),
        ({"cool_down_seconds": float("nan")}, "expected a number from 0"),
        ({"cool_down_seconds": True}, "expected a number from 0"),
        ({"emergency_checkpoints_per_hour": 0}, "expected a whole number from 1 to 3600"),
        ({"emergency_checkpoints_per_hour": 1.5}, "expected a whole number from 1 to 3600"),
        ({"cool_down": {"explode": 1}}, "policy.cool_down.explode = 'explode'; expected one of checkpoint,"),
        ({"cool_down": 5}, "policy.cool_down = 5; expected a table"),
        ({"alerts": {"A": "stop"}}, "policy.alerts.A = 'stop'; expected a table, as [policy.alerts.A]"),
        ({"alerts": {"A": {"actoin": "stop"}}}, "unknown name 'actoin' under [policy.alerts.A]"),
        ({"alerts": {"A": {"action": "explode"}}}, "policy.alerts.A.action = 'explode'; expected one of"),
        ({"alerts": {"A": {"args": {}}}}, "args or undo but no action"),
        ({"alerts": {"A": {"action": "stop", "args": {"x": 1}}}}, "unknown argument 'x' of stop"),
        ({"alerts": {"A": {"action": "stop", "args": {"grace_seconds": 0}}}}, "from 1 to 3600"),
        ({"alerts": {"A": {"action": "stop", "undo": True}}}, "an action that can be undone: pause"),
        ({"alerts": {"A": {"action": "none", "args": {}}}}, "policy.alerts.A.args with action none"),
        ({"alerts": {"step_time": {"action": "stop"}}}, "the alert's name, [policy.alerts.SlowStep]"),
        (
            {"alerts": {"GPUIdle": {"escalate": [{"action": "stop", "after_minutes": 1}]}}},
            "[policy.alerts.GPUIdle] without action, and the alert has none of its own",
        ),
        ({"cool_down_seconds": 10**400}, "a number from 0 to 86400"),
        ({"alerts": {"A": {"escalate": {}}}}, "a list of at most 10 tables"),
        ({"alerts": {"A": {"escalate": [{"action": "stop"}]}}}, "escalate[0] without after_minutes"),
        ({"alerts": {"A": {"escalate": [{"after_minutes": 1}]}}}, "escalate[0] without action"),
        ({"alerts": {"A": {"escalate": ["stop"]}}}, "policy.alerts.A.escalate[0] = 'stop'; expected a table"),
        ({"alerts": {"A": {"escalate": [{"action": "stop", "after_minutes": 1e9}]}}}, "from 0 to 10080"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_named_with_what_would_be_right(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        policy_with(table)
    assert says in str(raised.value)
    with pytest.raises(ConfigError):
        resolve({}, file=None, environ={"OBSINFRA_POLICY": "dryrun=true"})


def test_an_action_of_a_package_that_is_not_loaded_may_stand_in_the_settings() -> None:
    """A trainer's settings need not know what only the sidecar does."""
    table = {"alerts": {"A": {"action": "reboot_node", "args": {"now": True}}}}
    assert Settings(policy=table).policy == table
    assert policy_with(table, known_actions_only=False).steps("A", "") == (
        Step("reboot_node", {"now": True}),
    )
    with pytest.raises(ConfigError, match="reboot_node"):
        policy_with(table)
    with pytest.raises(ConfigError, match="two words"):
        Settings(policy={"alerts": {"A": {"action": "two words"}}})


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["action", "args", "undo", "escalate", "after_minutes", "alerts", "A", "cool_down"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["dry_run", "cool_down_seconds", "cool_down", "alerts", "x"]), values, max_size=4
    )
)
def test_any_table_is_a_policy_or_one_error_for_people(table: dict[str, Any]) -> None:
    try:
        policy = policy_with(table)
    except ConfigError:
        return
    assert isinstance(policy, Policy)


@pytest.mark.parametrize("content", [b"\xff", b"policy = 5", b"[policy", None])
def test_a_policy_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "policy.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_policy(file)
    assert str(file) in str(raised.value)
