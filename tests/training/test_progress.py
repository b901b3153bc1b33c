"""The live line of a training on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from obsinfra.training.progress import live_line

NUMBERS = (
    "loss 1.6409  lr 2.00e-03  grad 1.64  672 samples/s  val accuracy 0.6333  ETA 12:05  ALERT LossSpike"
)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_nothing_of_it_is_cut_however_narrow_the_terminal(width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    line = live_line(console)
    line.add_task("byte_gpt-20260101-120000-1234", total=13800, completed=1200, numbers=NUMBERS)
    with console.capture() as shown:
        console.print(line.get_renderable())
    text = shown.get()
    words = text.split()
    assert " ".join(words).count("1200/13800") == 1
    assert " ".join(words).endswith(" ".join(NUMBERS.split()))
    assert ("byte_gpt-20260101-120000-1234" in words) == (width == 200)
    assert text.count("\n") <= 1 + len(NUMBERS) // (width - 20)
