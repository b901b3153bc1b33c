"""The runbooks say what is true of this product: its alerts, metrics, commands, settings and policy.

What they advise is a person's judgement; every name in them is checked here.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from promtool import needs_promtool, promtool
from typed_commands import check_command

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.alerts import ALERTS, BY_NAME, Alert
from obsinfra.catalog.conditions import label_names
from obsinfra.catalog.metrics import METRICS, Metric
from obsinfra.catalog.policy import DEFAULT_POLICY, policy_with
from obsinfra.cli.main import app
from obsinfra.cli.runs import CHANNELS
from obsinfra.config.notify import Notify
from obsinfra.run.runbooks import INDEX, find_runbooks

RUNBOOKS = find_runbooks()
RULES = Path(__file__).parents[2] / "prometheus/rules/obsinfra.yml"
HEADINGS = ["What it means", "How to see it", "What was done automatically", "What to do"]
LOGS = {f"{channel}.jsonl" for channel in CHANNELS} | {"writer.jsonl", "mirror.jsonl"}
FOREIGN_OPTIONS = {"--shm-size"}
"""Options of other programs that are named alone."""

TOLD = {
    "checkpoint": "regular checkpoint",
    "emergency_checkpoint": "emergency checkpoint",
    "memory_snapshot": "`memory_snapshot`",
    "dump_stacks": "`dump_stacks`",
    "pause": "paused",
    "stop": "stopped",
}
"""How a runbook speaks of an action that was taken."""

every_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def text_of(alert: Alert) -> str:
    return (RUNBOOKS / f"{alert.name}.md").read_text()


def sections(text: str) -> dict[str, str]:
    """Heading of the second level → what stands under it."""
    parts = re.split(r"(?m)^## (.+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    """Contents of the fenced blocks of a language; a fence may be indented in a list."""
    return re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```$", text)


def queries(text: str) -> list[str]:
    """Each PromQL expression; an empty line lies between two of a block."""
    return [query.strip() for block in blocks(text, "promql") for query in re.split(r"\n\s*\n", block)]


def inline(text: str) -> list[str]:
    """Code spans of the prose, outside fenced blocks; a span may run over a line's end."""
    prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def our_commands(text: str) -> list[str]:
    """Command lines of this product, in blocks of commands and in prose."""
    lines = [line.strip() for block in blocks(text, "bash") for line in block.splitlines()]
    return [line for line in [*lines, *inline(text)] if line.startswith("obsinfra ")]


# ---- the set of them -----------------------------------------------------------------------------------


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert {path.stem for path in RUNBOOKS.iterdir()} == {alert.name for alert in ALERTS} | {INDEX}


def test_the_index_lists_every_alert_once_under_its_scope_with_its_severity() -> None:
    titles = {
        "run": "One run", "rank": "One rank of a run", "device": "One GPU", "host": "One host",
        "stack": "The stack itself",
    }  # fmt: skip
    found = sections((RUNBOOKS / f"{INDEX}.md").read_text())
    row = re.compile(r"(?m)^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \| ([^|\n]{10,}) \|$")
    listed = [
        (name, target, scope, severity)
        for scope, title in titles.items()
        for name, target, severity, _ in row.findall(found[title])
    ]
    assert sorted(listed) == sorted((alert.name, alert.name, alert.scope, alert.severity) for alert in ALERTS)


@every_alert
def test_it_has_its_title_its_settings_and_the_four_sections(alert: Alert) -> None:
    text = text_of(alert)
    found = sections(text)
    assert list(found) == HEADINGS
    assert text.startswith(f"# {alert.name}\n\nSettings: ")
    for heading, content in found.items():
        prose = re.sub(r"(?ms)^ *```.*?^ *```$", "", content)
        assert len(prose.split()) >= 3, f"nothing said under {heading!r}"
    assert re.search(r"(?m)^1\. ", found["What to do"]), "no first step"
    assert queries(found["How to see it"]), "no query"
    assert blocks(found["How to see it"], "bash"), "no command"


@every_alert
def test_links_lead_to_runbooks_that_are_there(alert: Alert) -> None:
    """Only to neighbours: they travel with it, in the wheel and on the sidecar's page."""
    targets = re.findall(r"\]\(([^)]+)\)", text_of(alert))
    assert "README.md" in targets
    for target in targets:
        assert re.fullmatch(r"\w+\.md", target) and (RUNBOOKS / target).is_file(), target


# ---- settings and policy -------------------------------------------------------------------------------


@every_alert
def test_the_settings_named_are_the_alerts_own_and_would_be_accepted(alert: Alert) -> None:
    text = text_of(alert)
    assert f"`[alerts.{alert.key}]`" in text
    assert set(re.findall(r"\[alerts\.(\w+)\]", text)) == {alert.key}
    assert set(re.findall(r"\[thresholds\] (\w+)", text)) <= {alert.key}
    examples = blocks(text, "toml")
    assert examples, "not said how to change it"
    for example in examples:
        document = tomllib.loads(example)
        given, changes = document.pop("thresholds", {}), document.pop("alerts", {})
        alert_table(given, changes)
        assert given.keys() | changes.keys() == {alert.key}
        if (policy := document.pop("policy", None)) is not None:
            policy_with(policy)
            assert policy["alerts"].keys() == {alert.name}
        Notify.model_validate(document.pop("notify", {}))
        assert not document
        for commented in re.findall(r"(?m)^# (\w+ = \S+)", example):
            alert_table({}, {alert.key: tomllib.loads(commented)})


@every_alert
def test_what_was_done_automatically_is_what_table_and_policy_say(alert: Alert) -> None:
    told = " ".join(sections(text_of(alert))["What was done automatically"].split())
    steps = DEFAULT_POLICY.steps(alert.name, alert.action.name if alert.action else "")
    if not steps:
        assert re.search(r"\b[Nn]othing\b|\b[Nn]o (command|action)\b|never told", told), told
    for step in steps:
        assert TOLD[step.action] in told, f"{step.action} is not mentioned"
    if steps:
        others = {TOLD[name] for name in ("pause", "dump_stacks", "memory_snapshot")} - {
            TOLD[step.action] for step in steps
        }
        assert not [phrase for phrase in others if phrase in told]


# ---- queries -------------------------------------------------------------------------------------------


def series_names() -> dict[str, set[str]]:
    """Each name that a query may use → its labels; recording rules carry those of their run."""
    known: dict[str, set[str]] = {}

    def add(name: str, labels: tuple[str, ...]) -> None:
        known.setdefault(name, {"job", "instance"}).update(labels)

    looked_at = [alert.metric for alert in ALERTS if alert.metric is not None]
    metrics: list[Metric] = [*METRICS, *(metric for metric in looked_at if metric.source == "stack")]
    for metric in metrics:
        if metric.kind == "histogram":
            for suffix in ("_bucket", "_sum", "_count"):
                add(metric.name + suffix, (*metric.label_names, "le"))
        else:
            add(metric.sample_name, metric.label_names)
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                add(rule["record"], label_names(BY_NAME["DataStarvation"].condition))
    return known


SERIES = series_names()
GROUPING = r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"
WORDS = {"and", "or", "unless", "offset", "bool", "group_left", "group_right", "inf", "nan"}


def selectors(query: str) -> Iterator[tuple[str, str]]:
    """Every series name in a query with the matchers in its braces."""
    bare = re.sub(GROUPING, " ", query)
    for name, call, matchers in re.findall(
        r"(?<![\w:])([a-zA-Z_:][\w:]*)(\s*\()?(\{[^}]*\})?", _no_ranges(bare)
    ):
        if not call and name.lower() not in WORDS:
            yield name, matchers


def _no_ranges(query: str) -> str:
    """`query` without ranges, and with matchers moved out of the way of the names around them."""
    return re.sub(r"\[[^\]]*\]", "", query)


@every_alert
def test_queries_use_series_that_exist_with_labels_they_have(alert: Alert) -> None:
    for query in queries(text_of(alert)):
        found = list(selectors(query))
        assert found or query == "vector(1)", query
        for name, matchers in found:
            assert name in SERIES, f"unknown series {name!r} in {query}"
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert labels <= SERIES[name], f"{name} has no {labels - SERIES[name]}"
        used = {label for names in re.findall(GROUPING, query) for label in re.findall(r"\w+", names)[1:]}
        assert used <= set().union(*(SERIES[name] for name, _ in found), {"rule_group"}), query


@every_alert
def test_one_query_looks_at_what_the_alert_looks_at(alert: Alert) -> None:
    if alert.metric is not None:
        assert any(name == alert.metric.sample_name or name.startswith("obsinfra:")
                   for query in queries(text_of(alert)) for name, _ in selectors(query))  # fmt: skip


@needs_promtool
def test_promtool_parses_every_query(tmp_path: Path) -> None:
    rules = [
        {"record": f"runbook:{alert.name}:{number}", "expr": query}
        for alert in ALERTS
        for number, query in enumerate(queries(text_of(alert)))
    ]
    place = tmp_path / "queries.yml"
    place.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    checked = promtool("check", "rules", place)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules)} rules found" in checked.stdout


# ---- commands and files --------------------------------------------------------------------------------


def options_of(command: Any) -> set[str]:
    """Every option of a command and of those below it."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(below) for below in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("name", sorted([INDEX, *BY_NAME]))
def test_commands_and_options_exist(name: str) -> None:
    text = (RUNBOOKS / f"{name}.md").read_text()
    for line in our_commands(text):
        try:
            check_command(line)
        except Exception as error:
            pytest.fail(f"{line}: {error!r}")
    known = options_of(typer.main.get_command(app)) | FOREIGN_OPTIONS
    for span in inline(text):
        if span.startswith("--"):
            assert span.split()[0] in known, f"no option {span}"


def test_a_command_that_does_not_exist_would_be_found() -> None:
    """The check itself: a wrong command, option, action and argument, and a missing word."""
    for line in (
        "obsinfra chekpoints list RUN", "obsinfra status RUN --verbose", "obsinfra command RUN explode",
        "obsinfra command RUN scale_lr factor=100", "obsinfra command RUN", "obsinfra logs RUN --channel gpu",
    ):  # fmt: skip
        with pytest.raises(BaseException):  # noqa: B017 - whatever the parser raises
            check_command(line)


@every_alert
def test_log_files_named_are_those_a_run_has(alert: Alert) -> None:
    text = text_of(alert)
    assert set(re.findall(r"logs/(\w+\.jsonl)", text)) <= LOGS
    assert len(text.splitlines()) <= 75, "too long for 3 a.m."
