"""Pages name commands to type: each must be there, with those words."""

from __future__ import annotations

import re
from html import unescape
from importlib.resources import files
from types import ModuleType

import pytest
from typed_commands import check_command

from obsinfra.control import index_page
from obsinfra.monitoring import page


@pytest.mark.parametrize(("pages", "least"), [(index_page, 8), (page, 0)], ids=["all runs", "one run"])
def test_commands_on_a_page_can_be_typed(pages: ModuleType, least: int) -> None:
    text = files(pages).joinpath("index.html").read_text(encoding="utf-8")
    lines = [unescape(line) for line in re.findall(r"<code>(obsinfra [^<]+)</code>", text)]
    assert len(lines) >= least
    for line in lines:
        try:
            check_command(line)
        except BaseException as error:  # typer's parser exits
            pytest.fail(f"{line}: {error!r}")
