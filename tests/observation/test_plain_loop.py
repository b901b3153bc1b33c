"""The example, and a plain loop with loader workers, as programs: killed, started again, the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_for

from obsinfra.backup.backup_system import LoadedCheckpoint, create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.run.folder import RunFolder

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plain_loop.py"


def start(folder: Path, *command: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OBSINFRA_METRICS_PORT": "0"}
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=100)
    return process.returncode, out, error


def same(left: LoadedCheckpoint, right: LoadedCheckpoint) -> list[str]:
    """Differences but for the generators that these programs neither seed nor use."""
    unused = (".python", ".numpy")
    found = differences(left.state, right.state)
    return [line for line in found if not any(part in line for part in unused)]


def only_said_why(error: str) -> bool:
    return [line.split()[0] for line in error.splitlines()] == ["stopped_by_signal"]


def newest(folder: Path, run: str) -> LoadedCheckpoint:
    return create_backup_system(folder / "runs" / run / "checkpoints").load()


@pytest.mark.slow
def test_the_example_interrupted_at_any_moment_goes_on_to_the_same_end(tmp_path: Path) -> None:
    epochs = "40"
    code, out, error = ended(start(tmp_path / "whole", str(EXAMPLE), epochs))
    assert code == 0 and out.startswith("finished at epoch 40"), error

    cut = tmp_path / "cut"
    process = start(cut, str(EXAMPLE), epochs)
    folder = RunFolder(cut / "runs" / "plain-loop")
    wait_for(lambda: folder.run_json.exists() and folder.read_info().state == "running", "its first step")
    process.send_signal(signal.SIGTERM)
    code, out, error = ended(process)
    assert code == 143 and only_said_why(error) and out.startswith("signal SIGTERM at epoch")
    assert newest(cut, "plain-loop").info.kind == "emergency"

    code, out, error = ended(start(cut, str(EXAMPLE), epochs))
    assert (code, error) == (0, "") and out.startswith("finished at epoch 40")
    assert same(newest(cut, "plain-loop"), newest(tmp_path / "whole", "plain-loop")) == []
    # A finished run is not trained again.
    code, out, error = ended(start(cut, str(EXAMPLE), epochs))
    assert (code, error) == (0, "") and out.startswith("finished at epoch 40")


WITH_WORKERS = """
import os, signal, sys, torch
from torch.utils.data import DataLoader, TensorDataset
import obsinfra

class Slow(TensorDataset):
    def __getitem__(self, index):
        return super().__getitem__(index)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters())
loader = DataLoader(Slow(torch.randn(64, 4)), batch_size=2, shuffle=True, num_workers=2)
at = int(sys.argv[1])
run = obsinfra.observe(model, optimizer, run="workers", resume="auto")
for _ in run.epochs(2):
    for (batch,) in run.steps(loader):
        if run.step == at:
            os.killpg(0, signal.SIGTERM)
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.record(loss=loss)
run.checkpoint("final")
sys.exit(run.stop.exit_code if run.stop else 0)
"""


@pytest.mark.slow
def test_a_signal_to_the_group_with_plain_loader_workers_is_no_error(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WITH_WORKERS)
    assert ended(start(tmp_path / "whole", str(program), "-1"))[0] == 0
    cut = tmp_path / "cut"
    for at in (5, 40):
        code, _, error = ended(start(cut, str(program), str(at)))
        assert code == 143 and only_said_why(error), error
        assert RunFolder(cut / "runs" / "workers").read_info().state == "stopped"
        assert newest(cut, "workers").info.step == at + 1
    assert ended(start(cut, str(program), "-1"))[0] == 0
    assert same(newest(cut, "workers"), newest(tmp_path / "whole", "workers")) == []


SPAWNED = """
import os, signal, sys, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import obsinfra

if __name__ == "__main__":
    model = nn.Linear(2, 1)
    loader = DataLoader(
        TensorDataset(torch.ones(64, 2)), batch_size=2, num_workers=1, multiprocessing_context="spawn",
        persistent_workers=True,
    )
    run = obsinfra.observe(model, run="spawned", disable_monitoring=True)
    for _ in run.epochs(2):
        for (inputs,) in run.steps(loader):
            run.record(loss=model(inputs).sum())
            if run.step == 40:
                os.killpg(0, signal.SIGTERM)
    sys.exit(run.stop.exit_code if run.stop else 0)
"""


@pytest.mark.slow
def test_spawned_workers_outlast_a_signal_to_the_group_and_end_with_the_program(tmp_path: Path) -> None:
    """They are alive when it ends, which Python tells them by the same signal."""
    program = tmp_path / "program.py"
    program.write_text(SPAWNED)
    code, _, error = ended(start(tmp_path / "run", str(program)))
    assert code == 143 and only_said_why(error), error
    assert newest(tmp_path / "run", "spawned").info.step == 41
