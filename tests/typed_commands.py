"""Whether a command line that a page or a document gives to type is one of ours."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from obsinfra.catalog.actions import ACTIONS
from obsinfra.catalog.alerts import BY_NAME
from obsinfra.cli.main import app
from obsinfra.cli.runs import CHANNELS
from obsinfra.control.history import EVENT_KINDS


def check_command(line: str) -> None:
    """Parse a command line as the program would, without running it.

    Raises:
        Exception: what the parser has to say against it.
    """
    command: Any = typer.main.get_command(app)
    words = shlex.split(line)[1:]
    path = []
    while (below := getattr(command, "commands", None)) is not None:
        path.append(words.pop(0))
        assert path[-1] in below, f"no command {path[-1]!r}"
        command = below[path[-1]]
    given = command.make_context(path[-1], words).params
    if path == ["command"]:
        action = ACTIONS[given["action"]]
        known = {argument.name: argument for argument in action.arguments}
        pairs = [text.partition("=")[::2] for text in given["arguments"] or ()]
        values = {name: known[name].parse(value) if name in known else value for name, value in pairs}
        assert action.problem(values) is None, action.problem(values)
    elif path == ["logs"]:
        assert given["channel"] in CHANNELS
    elif path == ["history"]:
        assert set(given["kind"] or ()) <= set(EVENT_KINDS)
    elif path == ["alerts", "silence"]:
        assert given["alert"] in BY_NAME
