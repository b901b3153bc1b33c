"""Typing `obsinfra …` in a test: in this process, as its entry point does, with what it prints kept."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from obsinfra.cli import main as cli


@dataclass
class Result:
    """Exit code, and what came to stdout and stderr."""

    code: int
    out: str
    err: str


class Terminal:
    """Runs `obsinfra <group> …`.

    Args:
        group: the words that every command begins with.
    """

    def __init__(
        self, group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._group, self._capsys, self._monkeypatch = group, capsys, monkeypatch

    def __call__(self, *words: str | Path) -> Result:
        self._monkeypatch.setattr(sys, "argv", ["obsinfra", self._group, *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = self._capsys.readouterr()
        return Result(int(caught.value.code or 0), out, err)
