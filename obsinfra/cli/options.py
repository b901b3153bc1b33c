"""Command-line options made from the settings table, so that flags, help and settings cannot disagree."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from obsinfra.config.settings import Settings, environment_names, group_of
from obsinfra.errors import ConfigError

UNITS = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}


def program() -> str:
    """What to type for `obsinfra` here: the plain name where it is on PATH, else the path of what runs."""
    started = Path(sys.argv[0])
    if started.name != "obsinfra" or shutil.which("obsinfra") is not None:
        return "obsinfra"
    return os.path.relpath(started)


def duration_seconds(text: str, option: str) -> float:
    """`30m`, `1.5h` or `1h30m` as seconds.

    Args:
        text: what was typed for `option`.

    Raises:
        ConfigError: it is no duration.
    """
    if not re.fullmatch(r"([0-9]{1,8}(\.[0-9]{1,8})?[smhdw])+", text.strip()):
        raise ConfigError(f"{option} {text!r}", "a number with s, m, h or d, as 30m", f"correct {option}")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([0-9.]+)([smhdw])", text))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(flags: dict, **own)` one option per setting; unset options arrive as None in `flags`.

    Values stay text: `obsinfra.config` parses and checks them, so a wrong value is reported the same way
    wherever it came from.
    """
    own = [
        parameter
        for parameter in inspect.signature(command, eval_str=True).parameters.values()
        if parameter.name != "flags"
    ]

    def run(**given: Any) -> None:
        flags = {name: given.pop(name) for name in Settings.model_fields}
        command(flags=flags, **given)

    parameters = own + [_option(name) for name in Settings.model_fields]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__ = command.__name__
    run.__doc__ = command.__doc__
    return run


def _option(name: str) -> inspect.Parameter:
    field = Settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    text = field.description or ""
    short = [variable for variable in environment_names(name) if not variable.startswith("OBSINFRA_")]
    if short:
        text += f" [env {short[0]}]"
    if field.default not in (None, False, "", {}, ()):
        shown = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        text += f" [default: {shown}]"
    panel = group_of(name)
    if field.annotation is bool:
        option = typer.Option(f"{flag}/--no-{name.replace('_', '-')}", help=text, rich_help_panel=panel)
        annotation: Any = Annotated[Optional[bool], option]  # noqa: UP045 - typer reads it at run time
    else:
        annotation = Annotated[
            Optional[str],  # noqa: UP045
            typer.Option(flag, help=text, metavar=_metavar(name), rich_help_panel=panel),
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(name: str) -> str:
    annotation = str(Settings.model_fields[name].annotation)
    words = {"tuple": "A,B", "Path": "FOLDER", "Literal": "WORD"}
    for part, shown in ({"dict": "KEY=VALUE,…", "Notify": "KEY=VALUE,…"} | words).items():
        if part in annotation:
            return shown
    for part, shown in (("float", "NUMBER"), ("int", "N")):
        if part in annotation:
            return shown
    return "TEXT"
