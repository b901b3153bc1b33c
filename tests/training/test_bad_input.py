"""What cannot work is one line that says what to change, exit code 2, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import Training, cli

from obsinfra.cli.main import main

Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run `obsinfra train` with flags that must be refused; returns the line, after looking for traces."""
    output = tmp_path / "runs"

    def run(*flags: str, small: bool = True) -> str:
        usual = ["--model-name=digits", "--max-steps=1", "--metrics-port=0"] if small else []
        monkeypatch.setattr(sys, "argv", ["obsinfra", "train", f"--output-dir={output}", *usual, *flags])
        monkeypatch.chdir(tmp_path)
        before = set(tmp_path.rglob("*")) | {output}
        with pytest.raises(SystemExit) as left:
            main()
        captured = capsys.readouterr()
        assert left.value.code == 2, captured.err
        assert captured.out == ""
        # What this machine itself lacks may be said before.
        (line,) = [line for line in captured.err.splitlines() if not line.startswith("machine ")]
        assert line.startswith("error: ")
        assert set(tmp_path.rglob("*")) | {output} == before
        return line.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model-name=tetris"], ["unknown model 'tetris'", "tactical_mappo", "correct --model-name"]),
        (["--model-name=no_such:thing"], ["'no_such'", "cannot be imported", "PYTHONPATH"]),
        (["--model-name=byte_gpt", "--data-path=/no/text"], ["/no/text", "check --data-path"]),
        (["--model-name=tactical_mappo", "--data-path=/no/bars.csv"], ["/no/bars.csv"]),
        (["--data-path=/some/thing"], ["digits brings its own data"]),
        (["--model-size=huge"], ["no size 'huge'", "small, medium"]),
        (["--batch-size=0"], ["batch_size = '0' (from flag --batch-size)", "greater than or equal to 1"]),
        (["--learning-rate=-1"], ["learning_rate = '-1'", "greater than 0"]),
        (["--learning-rate=nan"], ["learning_rate = 'nan'", "finite"]),
        (["--epochs=0"], ["epochs = '0'", "greater than or equal to 1"]),
        (["--epochs=ten"], ["epochs = 'ten'", "integer"]),
        (["--inject=melt@3"], ["melt@3", "explode, nan, slow, leak, hang, error"]),
        (["--device=cuda:99"], ["cuda:99", "--device auto"]),
        (["--device=cpu:3"], ["'cpu:3'", "auto, cpu, cuda"]),
        (["--nproc-per-node=0"], ["--nproc-per-node 0", "at least 1"]),
        (["--nnodes=2:1", "--rdzv-endpoint=127.0.0.1:1"], ["--nnodes 2:1", "MIN:MAX"]),
        (["--device=toaster"], ["toaster", "auto, cpu, cuda"]),
        (["--gradient-checkpointing"], ["DigitNet", "drop --gradient-checkpointing"]),
        (["--metrics-host=203.0.113.7"], ["203.0.113.7", "--metrics-host"]),
        (["--otlp-endpoint=nowhere"], ["nowhere"]),
        (["--run=../up"], ["'../up'", "choose another --run"]),
        (["--resume=nobody"], ["no run 'nobody'", "obsinfra runs"]),
        (["--resume=/no/checkpoint.json"], ["nothing at /no/checkpoint.json", "a checkpoint manifest"]),
        (["--no-such-flag"], ["No such option: --no-such-flag", "obsinfra train --help"]),
        (["--batch-size"], ["requires an argument"]),
        (["--config=none.toml"], ["no configuration file none.toml", "--config"]),
    ],
)
def test_impossible_flags(refused: Refused, flags: list[str], said: list[str]) -> None:
    line = refused(*flags)
    assert [part for part in said if part not in line] == [], line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("batchsize = 3\n", ["unknown setting 'batchsize'", "my.toml", "batch_size"]),
        ('batch_size = "many"\n', ["batch_size = 'many'", "file my.toml", "integer"]),
        ("accumulate = [1]\n", ["accumulate = [1]", "file my.toml"]),
        ("batch_size = \n", ["my.toml is not TOML"]),
        ("[thresholds]\ngpu_heat = 3\n", ["unknown threshold 'gpu_heat'", "gpu_temperature"]),
        ("[thresholds]\ncpu = nan\n", ["thresholds", "finite"]),
    ],
)
def test_impossible_files(refused: Refused, tmp_path: Path, content: str, said: list[str]) -> None:
    (tmp_path / "my.toml").write_text(content)
    line = refused("--config=my.toml")
    assert [part for part in said if part not in line] == [], line


def test_a_batch_larger_than_the_data(refused: Refused, tmp_path: Path) -> None:
    line = refused("--batch-size=1438")
    assert "no full batch of 1438" in line and "smaller --batch-size" in line
    (tmp_path / "text.txt").write_text("all work and no play " * 200)
    line = refused("--model-name=byte_gpt", f"--data-path={tmp_path}/text.txt", "--batch-size=4096")
    assert "no full batch of 4096" in line and "smaller --batch-size" in line


def test_a_file_where_the_output_folder_should_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not a folder without permission: tests may run as root."""
    (tmp_path / "runs").write_text("in the way")
    monkeypatch.setattr(
        sys, "argv", ["obsinfra", "train", "--model-name=digits", f"--output-dir={tmp_path}/runs"]
    )
    with pytest.raises(SystemExit) as left:
        main()
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith(f"error: cannot create the run folder {tmp_path}/runs/") and "--output-dir" in line
    assert (tmp_path / "runs").read_text() == "in the way"


def test_a_full_disk_at_the_start(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def nearly_full(path: str) -> os.statvfs_result:
        found = list(real(path))
        found[4] = 1  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    line = refused()
    assert "MB free at" in line and "--disable-backups" in line


def test_a_workload_whose_data_does_not_fit_its_model(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check before training finds it before anything is written."""
    (tmp_path / "misfit_workload.py").write_text(
        "from obsinfra.workloads.digits import Digits\n"
        "class Misfit(Digits):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.training.images = self.training.images[..., :3]\n"
        "def create(*, data_path, model_size, seed):\n"
        "    return Misfit()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    line = refused("--model-name=misfit_workload:create")
    assert "digits cannot take its first batch: RuntimeError" in line and "--disable-testing" in line


TEXT_FOR_A_ROW = """
from obsinfra.optimization.datasets.csv_rows import csv_rows
from obsinfra.workloads.digits import Digits

class ByDate(Digits):
    def train_batches(self, model, **rest):
        csv_rows("prices.csv")["2020-01-02"]

def create(*, data_path, model_size, seed):
    return ByDate()
"""

ROWS_OF_NOBODY = """
from torch.utils.data import IterableDataset
from obsinfra.optimization.data_loading import create_memory_efficient_dataloader
from obsinfra.workloads.digits import Digits

class Stream(IterableDataset):
    def __iter__(self):
        yield from range(8)
    def shard_rows(self, workers):
        return "plenty"

class Streamed(Digits):
    def train_batches(self, model, **rest):
        return create_memory_efficient_dataloader(Stream(), 4)

def create(*, data_path, model_size, seed):
    return Streamed()
"""


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (TEXT_FOR_A_ROW, ["a row by index '2020-01-02'", "whole numbers from 0", "dataset[row][name]"]),
        (
            ROWS_OF_NOBODY,
            ["Stream.shard_rows(1) returned 'plenty'", "a list of 1 whole number", "leave it out"],
        ),
    ],
)
def test_a_workload_that_reads_its_data_wrongly(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, said: list[str]
) -> None:
    (tmp_path / "prices.csv").write_text("open,close\n1,2\n")
    (tmp_path / "reads_wrongly.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "reads_wrongly", raising=False)
    line = refused("--model-name=reads_wrongly:create")
    assert all(part in line for part in said), line


@pytest.mark.slow
def test_checkpoints_that_cannot_be_used(tmp_path: Path, refused: Refused) -> None:
    """A damaged newest one is passed over aloud; only damaged ones, and none at all, are refused."""
    run = Training(tmp_path / "runs", "run", ("--model-name=digits",))
    assert run.run("--max-steps=4").returncode == 0
    assert run.run("--max-steps=8", resume="run").returncode == 0
    older, newer = run.checkpoints()
    chunks = [
        {chunk for tensor in manifest.tensors for chunk in tensor.chunks} for manifest in (older, newer)
    ]
    damage(run, chunks[1] - chunks[0])

    resumed = run.run("--max-steps=10", resume="run")
    assert resumed.returncode == 0
    assert f"{older.path.name} (step 4)" in resumed.stderr
    (skipped,) = (line for line in resumed.stderr.splitlines() if line.startswith("skipped"))
    assert newer.path.name in skipped

    line = refused(f"--resume={newer.path}", small=False)
    assert newer.path.name in line and "damaged" in line

    damage(run, {path.name for path in (run.folder.checkpoints / "objects").rglob("*") if path.is_file()})
    before = run.folder.run_json.read_bytes()
    line = refused("--resume=run", small=False)
    assert "no sound checkpoint" in line
    assert run.folder.run_json.read_bytes() == before

    for manifest in (run.folder.checkpoints / "manifests").glob("*.json"):
        manifest.unlink()
    assert "run run has no checkpoint to resume from" in refused("--resume=run", small=False)
    assert cli("checkpoints", "list", "run", "--output-dir", run.output).returncode == 0


def damage(run: Training, chunks: set[str]) -> None:
    """Change one byte of each chunk."""
    for path in (run.folder.checkpoints / "objects").rglob("*"):
        if path.is_file() and path.name in chunks:
            content = bytearray(path.read_bytes())
            content[0] ^= 1
            path.chmod(0o600)
            path.write_bytes(content)


@pytest.mark.slow
def test_what_the_machine_lacks_is_said_before_training(tmp_path: Path) -> None:
    """Few open files: training may fail later, so it is no error yet, and the fix is named."""
    train = [sys.executable, "-m", "obsinfra.cli.main", "train", "--model-name=digits", "--max-steps=1"]
    done = subprocess.run(
        [
            "bash",
            "-c",
            'ulimit -n 256 && exec "$@"',
            "bash",
            *train,
            f"--output-dir={tmp_path}",
            "--metrics-port=0",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "machine    open files: 256 (at most 256); ulimit -n 4096" in done.stderr
