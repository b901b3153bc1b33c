"""The Accelerate example as a program: stopped or killed at any moment, started again, the same end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from programs import ended, newest, start, stopped_by

from obsinfra.backup.compare import differences
from obsinfra.run.folder import RunFolder

EXAMPLE = "accelerate_loop.py"
EPOCHS = "60"
STEPS = 60 * 57
LAST = f"finished at epoch {EPOCHS}, step {STEPS}\n"


def progress(folder: RunFolder) -> int:
    """The step it noted last, which it does every two seconds; 0 before."""
    try:
        return int(json.loads((folder.root / "progress.json").read_text())["step"])
    except FileNotFoundError:
        return 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, error = ended(start(folder, EXAMPLE, EPOCHS))
    assert (code, out) == (0, LAST), error
    return folder / "runs" / "accelerate-loop"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_interrupted_it_goes_on_to_the_same_end(
    whole: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    folder = RunFolder(tmp_path / "runs" / "accelerate-loop")
    ended_with, out, error = stopped_by(stop, start(tmp_path, EXAMPLE, EPOCHS), lambda: progress(folder) > 0)
    assert ended_with == code, error
    stopped_at = newest(folder.checkpoints).info
    assert 0 < stopped_at.step < STEPS

    ended_with, out, error = ended(start(tmp_path, EXAMPLE, EPOCHS))
    assert (ended_with, out) == (0, LAST), error
    found = differences(newest(folder.checkpoints).state, newest(whole / "checkpoints").state)
    unused = (".python", ".numpy")  # generators that this program neither seeds nor uses
    assert [line for line in found if not any(part in line for part in unused)] == []
