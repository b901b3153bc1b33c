"""Finding each setting's value and remembering where it came from.

pydantic validates; the merge is our own because `obsinfra config show` must name the origin of each value.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from obsinfra.config.notify import Notify
from obsinfra.config.settings import Settings, environment_names
from obsinfra.errors import ConfigError

DEFAULT_FILE = Path("obsinfra.toml")
"""Read from the working folder when present and no other file is named."""


OF_THE_MACHINE = frozenset(["output_dir", "metrics_host"])
"""What a resumed run does not take over from before: it may go on elsewhere, in a container or out of one."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings and the origin of each value.

    Attributes:
        settings: the validated values.
        origins: field → `flag --batch-size`, `env BATCH_SIZE`, `file obsinfra.toml`, `run X` or `default`.
    """

    settings: Settings
    origins: dict[str, str]


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dict of settings.

    Raises:
        ConfigError: absent, unreadable or malformed.
    """
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"no configuration file {path}", "an existing TOML file", "correct --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}", "a readable TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}", "key = value lines", "correct that line") from error


def resolve(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    run_config: Path | None = None,
) -> Resolved:
    """Merge flag > environment > file > resumed run > default, then validate.

    Args:
        flags: field → value for options given on the command line; None means not given.
        file: a TOML file; default `obsinfra.toml` in the working folder if there is one.
        environ: environment; default `os.environ`.
        run_config: config.toml of the run being resumed, the layer just above the defaults.

    Raises:
        ConfigError: unknown name, wrong type, or a value out of bounds; names value, origin and bounds.
    """
    environ = os.environ if environ is None else environ
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def layer(found: Mapping[str, Any], origin: str) -> None:
        for key, value in found.items():
            values[key] = value
            origins[key] = origin

    if run_config is not None and run_config.exists():
        found = {key: value for key, value in read_toml(run_config).items() if key not in OF_THE_MACHINE}
        layer(_only_known(found), f"run {run_config.parent.name}")
    if file is not None:
        document = read_toml(file)
        unknown = sorted(set(document) - set(Settings.model_fields))
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r} in {file}",
                f"one of {', '.join(Settings.model_fields)}",
                "see 'obsinfra config show' for all settings",
            )
        layer(document, f"file {file}")
    for field in Settings.model_fields:
        for name in environment_names(field):
            if environ.get(name, "") != "":
                layer({field: _from_text(field, environ[name])}, f"env {name}")
                break
    for field, value in flags.items():
        if value is not None:
            raw = _from_text(field, value) if isinstance(value, str) else value
            layer({field: raw}, f"flag --{field.replace('_', '-')}")
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise _as_config_error(error, origins) from None
    return Resolved(settings, {field: origins.get(field, "default") for field in Settings.model_fields})


def changed(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """`settings` with other values, validated like all.

    Args:
        values: field → value; None means not given.

    Raises:
        ConfigError: unknown name, wrong type, or a value out of bounds.
    """
    given = {field: value for field, value in values.items() if value is not None}
    if not given:
        return settings
    try:
        return Settings(**{**{field: getattr(settings, field) for field in Settings.model_fields}, **given})
    except ValidationError as error:
        raise _as_config_error(error, dict.fromkeys(given, "the call")) from None


def dump_toml(settings: Settings) -> str:
    """The settings as TOML, as written to a run's config.toml. Unset (None) settings are left out."""
    lines, tables = [], []
    untouched = {"notify"} if settings.notify == Notify() else None
    for field, value in settings.model_dump(mode="json", by_alias=True, exclude=untouched).items():
        if value is None:
            continue
        if isinstance(value, dict):
            tables += _tables(field, value)
        else:
            lines.append(f"{field} = {_toml(value)}\n")
    return "".join(lines + tables)


def _tables(name: str, table: Mapping[str, Any]) -> list[str]:
    """A table of the settings and the tables within it; nothing for an empty one."""
    plain = {key: item for key, item in table.items() if not isinstance(item, dict) and item is not None}
    lines = "".join(f"{key} = {_toml(item)}\n" for key, item in plain.items())
    inner = [
        text
        for key, item in table.items()
        if isinstance(item, dict)
        for text in _tables(f"{name}.{key}", item)
    ]
    return ([f"\n[{name}]\n{lines}"] if lines else []) + inner


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            {"\\": "\\\\", '"': '\\"'}.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in value
        )
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + "}"
    return repr(value)


def _only_known(document: dict[str, Any]) -> dict[str, Any]:
    """What of a run's config.toml still means something, less what named only that one start."""
    return {
        k: v
        for k, v in document.items()
        if k in Settings.model_fields and k not in ("resume", "run", "inject")
    }


def _from_text(field: str, text: str) -> Any:
    """A variable's or flag's text as a raw value: lists by comma, tables as `key=value` by comma, tables
    of tables as `key.field=value`."""
    annotation = str(Settings.model_fields[field].annotation)
    if annotation.startswith("dict") or field == "notify":
        pairs = (item.partition("=") for item in text.split(",") if item.strip())
        found = {key.strip(): value.strip() for key, _, value in pairs}
        return _nested(found) if "Any" in annotation or field == "notify" else found
    if annotation.startswith("tuple"):
        return tuple(item.strip() for item in text.split(",") if item.strip())
    return text


def _nested(flat: Mapping[str, str]) -> dict[str, Any]:
    """`a.b = text` as the table that `b = text` under `[a]` would be; a TOML value becomes what it says."""
    out: dict[str, Any] = {}
    for key, text in flat.items():
        *path, last = key.split(".")
        table = out
        for name in path:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"both {name} and {key} are set", f"{name} as a value or as a table")
        try:
            table[last] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[last] = text
    return out


def _as_config_error(error: ValidationError, origins: Mapping[str, str]) -> ConfigError:
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "settings"
    message = str(first["msg"])
    if message.startswith("Value error, "):
        message = "another value: " + message.removeprefix("Value error, ")
    message = (
        message.replace("Input should be ", "")
        .replace("a valid integer", "a whole number")
        .replace("a valid ", "a ")
        .replace("a dictionary", "a table")
    )
    origin = origins.get(field, "default")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if field == "notify":
        # A secret may stand where a file's name should: no value is repeated but a misspelt word of a choice.
        place = ".".join(map(str, first["loc"]))
        word = f" = {first['input']!r}" if first["type"] == "literal_error" else ""
        message = message.removeprefix("another value: ")
        if first["type"] == "extra_forbidden":
            message = "a setting of docs/notifications.md; this one is unknown"
        elif first["type"] == "missing":
            message = "this setting, which has no default"
        return ConfigError(f"{place}{word} (from {origin}){more}", message, "change it there")
    place = ".".join(part for part in first["loc"] if isinstance(part, str)) or field
    return ConfigError(f"{place} = {first['input']!r} (from {origin}){more}", message, "change it there")
