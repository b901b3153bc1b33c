"""The Lightning example as a program: stopped or killed at any moment, started again, the same end."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from programs import ended, newest, start, stopped_by

from obsinfra.backup.compare import differences

EXAMPLE = "lightning_callback.py"
EPOCHS = "40"
"""So many that it has not ended by itself before a signal that follows the first checkpoint reaches it."""

STEPS = 40 * 45
LAST = f"finished at epoch {EPOCHS}, step {STEPS}\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    code, out, error = ended(start(folder, EXAMPLE, EPOCHS))
    assert (code, out) == (0, LAST), error
    return folder / "runs" / "lightning" / "checkpoints"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code"),
    [(signal.SIGTERM, 143), (signal.SIGINT, 1), (signal.SIGKILL, -signal.SIGKILL)],
    ids=["SIGTERM", "SIGINT", "SIGKILL"],
)
def test_interrupted_it_goes_on_to_the_same_end(
    whole: Path, tmp_path: Path, stop: signal.Signals, code: int
) -> None:
    store = tmp_path / "runs" / "lightning" / "checkpoints"
    ended_with, out, error = stopped_by(
        stop, start(tmp_path, EXAMPLE, EPOCHS), lambda: any(store.glob("manifests/*.json"))
    )
    assert ended_with == code, error
    step = newest(store).info.step
    assert 100 <= step < STEPS and step % 10 == 0, "its last snapshot"

    ended_with, out, error = ended(start(tmp_path, EXAMPLE, EPOCHS))
    assert (ended_with, out) == (0, LAST), error
    assert differences(newest(store).state, newest(whole).state) == []

    # A finished run is not trained again.
    ended_with, out, error = ended(start(tmp_path, EXAMPLE, EPOCHS))
    assert (ended_with, out) == (0, LAST), error
