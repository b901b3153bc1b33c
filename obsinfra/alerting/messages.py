"""What people read when an alert reaches them: Alertmanager's templates for Slack, mail, PagerDuty.

Called by `obsinfra alerts` and the native stack. Every piece is cut to a length, so that a group of any size,
with labels and annotations of any length and content, makes a message that Slack and a mail client take. Uses
only template functions that Alertmanager 0.25 has too, and never a value of a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from obsinfra.alerting.wording import plain_number
from obsinfra.catalog.policy import DEFAULT_POLICY, NOTHING, Policy, Step
from obsinfra.config.notify import LINK_LABEL_CHARACTERS, Notify

HEADER = """\
{{/* Generated from the [notify] settings by 'obsinfra alerts write'; do not edit by hand. */}}
"""

SLACK_TEXT_CHARACTERS = 3_000
"""Slack's limit for the text of one section block; its attachments, which Alertmanager sends, take more.
https://docs.slack.dev/reference/block-kit/blocks/section-block"""

SLACK_IN_FULL, SLACK_IN_A_LINE = 1, 6
"""Alerts of a group that Slack shows with all there is to know, and those it names; the rest is counted."""

MAIL_IN_FULL = 50
ACTION_CHARACTERS, OUTCOME_CHARACTERS, FURTHER_CHARACTERS = 32, 128, 64
"""Of what the sidecar is asked to do about an alert, what came of it, and what follows if it goes on."""

NOT_KNOWN = ", outcome not known yet"

OUTCOME_WORDS = {
    "done": "Done",
    "failed": "Failed",
    "rejected": "Rejected by the trainer",
    "expired": "Not done in time",
    "undelivered": "Not delivered",
    "unacknowledged": "No word of its end",
    "under_way": "Under way",
    "cool_down": "Told a moment ago already",
    "hourly_limit": "Not done, limit of the hour reached",
    "dry_run": "Dry run, not done",
    "unknown_action": "Not done, unknown action",
}
"""Outcome of an action, as the annotation `outcome` has it → how people read it."""

ANNOTATED_LINK_CHARACTERS = 170
"""In Slack a longer link in an annotation is left out: cut, it would lead elsewhere."""

_FIELDS = {"run": ".Labels.run", "model": ".Labels.model", "rank": ".Labels.rank", "device": ".Labels.device"}
_FIELDS["alert"] = ".Labels.alertname"


@dataclass(frozen=True, slots=True)
class StackLinks:
    """Where the stack that is up shows a run: links as `[notify]` has them, which go before these.

    Attributes:
        grafana: the run's board.
        traces: the run's traces in a trace store.
        slow_steps: a page that lists the run's last slow steps by their traces, for where no store is.
    """

    grafana: str | None = None
    traces: str | None = None
    slow_steps: str | None = None


def jaeger_search(jaeger_url: str) -> str:
    """A link to the newest traces of `{run}` in the Jaeger at this address, by what its spans carry."""
    tags = "%7B%22obsinfra.run%22%3A%22{run}%22%7D"
    return f"{jaeger_url}/search?service=obsinfra&lookback=2d&limit=50&tags={tags}"


def render_templates(
    notify: Notify, links: StackLinks | None = None, policy: Policy = DEFAULT_POLICY
) -> dict[str, str]:
    """File name → content, to lie beside alertmanager.yml in `templates/`.

    Args:
        notify: the user's `[notify]`.
        links: where the stack shows a run.
        policy: what the sidecar does about alerts; messages say it.
    """
    known = _link_texts(notify, links or StackLinks())
    return {
        "obsinfra-mail.tmpl": HEADER + _mail(known, policy),
        "obsinfra-slack.tmpl": HEADER + _slack(known, policy),
        "obsinfra-titles.tmpl": HEADER + _titles(),
    }


def _one_line(value: str, characters: int) -> str:
    """A pipeline for `value` on one line, without control characters, of at most so many characters."""
    return rf"{value} | reReplaceAll `[\s\pC]+` ` ` | reReplaceAll `^(.{{{characters - 1}}})..+$` `${{1}}…`"


def _mrkdwn(value: str, characters: int) -> str:
    """As `_one_line`, with Slack's three special characters escaped before the cut, so that the limit holds.

    An entity that the cut split is dropped: https://docs.slack.dev/messaging/formatting-message-text#escaping
    """
    escaped = (
        rf"{value} | reReplaceAll `[\s\pC]+` ` ` | reReplaceAll `&` `&amp;` "
        "| reReplaceAll `<` `&lt;` | reReplaceAll `>` `&gt;`"
    )
    cut = f"reReplaceAll `^(.{{{characters - 1}}})..+$` `${{1}}…`"
    return f"{escaped} | {cut} | reReplaceAll `&[a-z]*…$` `…`"


def _title(put: Callable[[str, int], str]) -> str:
    """`[CRITICAL] GradientExplosion · my-run`, at most 150 characters."""
    return (
        "{{ if .CommonLabels.obsinfra_test }}[TEST] {{ end }}"
        '[{{ if ne .Status "firing" }}RESOLVED'
        f"{{{{ else if .CommonLabels.severity }}}}{{{{ {put('.CommonLabels.severity', 16)} | toUpper }}}}"
        "{{ else }}FIRING{{ end }}] "
        f"{{{{ if .CommonLabels.alertname }}}}{{{{ {put('.CommonLabels.alertname', 40)} }}}}"
        "{{ if gt (len .Alerts) 1 }} ({{ len .Alerts }}){{ end }}"
        "{{ else }}{{ len .Alerts }} alerts{{ end }}"
        f"{{{{ if .CommonLabels.run }}}} · {{{{ {put('.CommonLabels.run', 60)} }}}}{{{{ end }}}}"
    )


def _titles() -> str:
    outcome = f"{_in_words('.Annotations.outcome')} | reReplaceAll `: ` ` – `"
    return (
        f'{{{{ define "obsinfra.title" }}}}{_title(_one_line)}{{{{ end }}}}\n'
        # https://developer.pagerduty.com/docs/send-alert-event: critical, error, warning or info
        '{{ define "obsinfra.pagerduty.severity" }}'
        "{{ if match `^(critical|warning|info)$` (or .CommonLabels.severity ``) }}"
        "{{ .CommonLabels.severity }}{{ else }}warning{{ end }}{{ end }}\n"
        # Newer Alertmanagers read a detail as YAML: with "name: text" it would become an object.
        '{{ define "obsinfra.pagerduty.alerts" }}{{ range $i, $alert := .Alerts.Firing }}'
        f"{{{{ if lt $i {SLACK_IN_FULL + SLACK_IN_A_LINE} }}}}"
        f"{{{{ {_one_line('.Labels.alertname', 40)} }}}} – {{{{ {_one_line('.Annotations.summary', 150)} }}}}"
        f"; {_facts(_one_line)}"
        f"{{{{ if .Annotations.outcome }}}}; {{{{ {_one_line(outcome, OUTCOME_CHARACTERS)} }}}}{{{{ end }}}}"
        "\n{{ end }}{{ end }}{{ end }}\n"
    )


def _facts(put: Callable[[str, int], str]) -> str:
    """Where, when and by how much, in one line: what is not known is left out."""
    parts = [
        ("", ".Labels.run", 48),
        ("model ", ".Labels.model", 28),
        ("rank ", ".Labels.rank", 6),
        ("device ", ".Labels.device", 12),
        ("step ", ".Annotations.step", 12),
        ("value ", ".Annotations.value", 24),
        ("threshold ", ".Annotations.threshold", 24),
    ]
    texts = [
        f"{{{{ if {field} }}}}{' · ' if i else ''}{label}{{{{ {put(field, characters)} }}}}{{{{ end }}}}"
        for i, (label, field, characters) in enumerate(parts)
    ]
    return "".join(texts)


def _action(put: Callable[[str, int], str], policy: Policy, end: str = "\n") -> str:
    """What the sidecar did about it, else what it is asked to, with `end` after it; nothing where it does
    nothing, or where it is over and no outcome was seen."""
    does, unknown = ("Dry run; would be asked for: ", "") if policy.dry_run else ("Asked for: ", NOT_KNOWN)
    label = f"{{{{ {put('.Labels.action', ACTION_CHARACTERS)} }}}}"
    seen = f"{{{{ {put(_in_words('.Annotations.outcome'), OUTCOME_CHARACTERS)} }}}}"
    cases = [
        f"{{{{ if .Annotations.outcome }}}}{seen}{_further_still(policy)}{end}",
        'ne .Status "firing" }}',
    ]
    for alert, response in policy.responses.items():
        is_it = _is(alert)
        first = response.first
        further = _further(response.escalate)
        if first is None:
            cases.append(f"and .Labels.action ({is_it}) }}}}{does}{label}{unknown}{further}{end}")
        elif first.action == NOTHING:
            cases.append(f"{is_it} }}}}")
        else:
            action = _cut(first.action, ACTION_CHARACTERS)
            cases.append(f"{is_it} }}}}{does}{action}{unknown}{further}{end}")
    cases.append(f".Labels.action }}}}{does}{label}{unknown}{end}")
    return "{{ else if ".join(cases) + "{{ end }}"


def _is(alert: str) -> str:
    return f"eq .Labels.alertname {json.dumps(alert, ensure_ascii=False)}"


def _in_words(value: str) -> str:
    """A pipeline for outcomes as the rules write them, `done: …`, in words: `Done: …`."""
    words = "".join(
        f" | reReplaceAll `(^| · ){outcome}: ` `${{1}}{text}: `" for outcome, text in OUTCOME_WORDS.items()
    )
    return f"{value}{words}"


def _further(steps: Sequence[Step]) -> str:
    """The steps that follow while an alert goes on firing; empty without any."""
    texts = [f"{step.action} after {plain_number(step.after_minutes)} min" for step in steps]
    return _cut(f"; if it goes on, {', then '.join(texts)}", FURTHER_CHARACTERS) if texts else ""


def _further_still(policy: Policy) -> str:
    """Of an alert with outcomes: the steps after the last of which there is one."""
    cases = ['ne .Status "firing" }}']
    for alert, response in policy.responses.items():
        steps = response.escalate
        for number in range(len(steps), 0, -1):
            action = steps[number - 1].action
            first = response.first
            if action in {step.action for step in (first, *steps[: number - 1]) if step is not None}:
                continue  # which of the two it was cannot be told
            taken = f"(match `: {action}(,| ·|$)` .Annotations.outcome)"
            if first is None:
                taken += f" (ne (or .Labels.action ``) {json.dumps(action)})"
            cases.append(f"and ({_is(alert)}) {taken} }}}}{_further(steps[number:])}")
        if steps:
            cases.append(f"{_is(alert)} }}}}{_further(steps)}")
    return "{{ if " + "{{ else if ".join(cases) + "{{ end }}" if cases[1:] else ""


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


Links = list[tuple[str, str, str]]
"""(what it is called, condition, URL as a template), of an alert."""


def _link_texts(notify: Notify, stack: StackLinks) -> Links:
    links: Links = []
    traces = notify.trace_url or stack.traces
    for name, url in (
        ("Grafana", notify.grafana_url or stack.grafana),
        ("Run page", notify.run_url),
        ("Trace", traces),
        ("Slow steps", None if traces else stack.slow_steps),
    ):
        if url is not None:
            # A label that is absent, long, or of characters that no run's or model's name has makes no link.
            plain = f"^[A-Za-z0-9._:-]{{1,{LINK_LABEL_CHARACTERS}}}$"
            needed = [
                f" (match `{plain}` (or {_FIELDS[field]} ``))" for field in re.findall(r"\{(\w+)\}", url)
            ]
            filled = re.sub(r"\{(\w+)\}", lambda found: f"{{{{ {_FIELDS[found[1]]} | urlquery }}}}", url)
            links.append((name, f"and true{''.join(needed)}", filled))
        elif name == "Run page":
            # The trainer's own live page is served where Prometheus scrapes it.
            seen = "and .Labels.run .Labels.instance (match `^[][A-Za-z0-9.:-]{1,80}$` .Labels.instance)"
            links.append((name, f'{seen} (eq .Labels.job "trainers")', "http://{{ .Labels.instance }}/"))
    return links


def _slack(known: Links, policy: Policy) -> str:
    links = "".join(
        f"{{{{ if {condition} }}}}{_slack_link(url, name)}{{{{ end }}}}" for name, condition, url in known
    )
    fit = f"^https?://[^\\s<>|&]{{1,{ANNOTATED_LINK_CHARACTERS}}}$"
    annotated = "".join(
        f"{{{{ if match `{fit}` (or .Annotations.{key} ``) }}}}"
        f"{_slack_link(f'{{{{ .Annotations.{key} }}}}', name)}{{{{ end }}}}"
        for key, name in (("runbook_url", "Runbook"), ("trace_url", "Trace"))
    )
    return f"""\
{{{{ define "obsinfra.slack.title" }}}}{_title(_mrkdwn)}{{{{ end }}}}
{{{{ define "obsinfra.slack.color" -}}}}
{{{{ if ne .Status "firing" }}}}good\
{{{{ else if eq .CommonLabels.severity "critical" }}}}danger\
{{{{ else if eq .CommonLabels.severity "info" }}}}#439FE0{{{{ else }}}}warning{{{{ end }}}}
{{{{- end }}}}
{{{{ define "obsinfra.slack.text" -}}}}
{{{{ template "obsinfra.slack.alerts" .Alerts.Firing }}}}
{{{{- if .Alerts.Resolved }}}}{{{{ if .Alerts.Firing }}}}{{{{ len .Alerts.Resolved }}}} resolved.
{{{{ else }}}}{{{{ template "obsinfra.slack.alerts" .Alerts.Resolved }}}}{{{{ end }}}}{{{{ end }}}}
{{{{- with index .Alerts 0 }}}}{links}{{{{ end }}}}
{{{{- end }}}}
{{{{ define "obsinfra.slack.alerts" -}}}}
{{{{ range $i, $alert := . }}}}{{{{ if lt $i {SLACK_IN_FULL} -}}}}
*{{{{ {_mrkdwn(".Labels.alertname", 40)} }}}}* {{{{ {_mrkdwn(".Annotations.summary", 120)} }}}}
{_facts(_mrkdwn)}
{_action(_mrkdwn, policy)}{{{{ if .Annotations.description }}}}\
{{{{ {_mrkdwn(".Annotations.description", 160)} }}}}
{{{{ end }}}}{annotated}
{{{{ else if lt $i {SLACK_IN_FULL + SLACK_IN_A_LINE} -}}}}
• {{{{ {_mrkdwn(".Labels.alertname", 40)} }}}} {{{{ {_mrkdwn(".Annotations.summary", 60)} }}}}\
{{{{ if .Labels.rank }}}} rank {{{{ {_mrkdwn(".Labels.rank", 6)} }}}}{{{{ end }}}}\
{{{{ if .Annotations.value }}}} value {{{{ {_mrkdwn(".Annotations.value", 24)} }}}}{{{{ end }}}}
{{{{ else if eq $i {SLACK_IN_FULL + SLACK_IN_A_LINE} -}}}}
… and more: {{{{ len $ }}}} in all
{{{{ end }}}}{{{{ end }}}}
{{{{- end }}}}
"""


def _slack_link(url: str, name: str) -> str:
    return f"<{url.replace('&', '&amp;')}|{name}>  "


def _mail(known: Links, policy: Policy) -> str:
    text_links, html_links = "", ""
    for name, condition, url in known:
        text_links += f"{{{{ if {condition} }}}}{name}: {url}\n{{{{ end }}}}"
        html_links += f'{{{{ if {condition} }}}}<a href="{url}">{name}</a> {{{{ end }}}}'
    for key, name in (("runbook_url", "Runbook"), ("trace_url", "Trace")):
        condition = f"match `^https?://\\S{{1,900}}$` (or .Annotations.{key} ``)"
        text_links += f"{{{{ if {condition} }}}}{name}: {{{{ .Annotations.{key} }}}}\n{{{{ end }}}}"
        html_links += (
            f'{{{{ if {condition} }}}}<a href="{{{{ .Annotations.{key} }}}}">{name}</a> {{{{ end }}}}'
        )
    summary, description = _one_line(".Annotations.summary", 300), _one_line(".Annotations.description", 900)
    state = '{{ if eq .Status "firing" }}firing since{{ else }}resolved, began{{ end }}'
    since = f'{state} {{{{ .StartsAt.UTC.Format "2006-01-02 15:04:05" }}}} UTC'
    colour = (
        '{{ if ne .Status "firing" }}#2e7d32{{ else if eq .Labels.severity "critical" }}#c62828'
        '{{ else if eq .Labels.severity "info" }}#1565c0{{ else }}#ef6c00{{ end }}'
    )
    more = (
        f"{{{{ if gt (len .Alerts) {MAIL_IN_FULL} }}}}"
        f"The first {MAIL_IN_FULL} of {{{{ len .Alerts }}}} alerts.{{{{ end }}}}"
    )
    return f"""\
{{{{ define "obsinfra.mail.text" }}}}{{{{ template "obsinfra.title" . }}}}
{more}
{{{{ range $i, $alert := .Alerts }}}}{{{{ if lt $i {MAIL_IN_FULL} }}}}
{{{{ {_one_line(".Labels.alertname", 60)} }}}}: {{{{ {summary} }}}}
{since}
{_facts(_one_line)}
{_action(_one_line, policy)}{{{{ if .Annotations.description }}}}{{{{ {description} }}}}
{{{{ end }}}}{text_links}{{{{ end }}}}{{{{ end }}}}
{{{{- end }}}}
{{{{ define "obsinfra.mail.html" -}}}}
<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>{{{{ template "obsinfra.title" . }}}}</title></head>
<body style="font-family: sans-serif; font-size: 14px; color: #222">
<h2 style="font-size: 18px">{{{{ template "obsinfra.title" . }}}}</h2>
<p>{more}</p>
{{{{ range $i, $alert := .Alerts }}}}{{{{ if lt $i {MAIL_IN_FULL} }}}}
<div style="margin: 0 0 16px 0; padding-left: 10px; border-left: 5px solid {colour}">
<b>{{{{ {_one_line(".Labels.alertname", 60)} }}}}</b> {{{{ {summary} }}}}<br>
{since}<br>
{_facts(_one_line)}<br>
{_action(_one_line, policy, "<br>")}
<p>{{{{ {description} }}}}</p>
{html_links}
</div>
{{{{ end }}}}{{{{ end }}}}
</body></html>
{{{{- end }}}}
"""
