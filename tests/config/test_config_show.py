"""`obsinfra config show`: each setting, its value and where it came from, as a person sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def shown(folder: Path, *flags: str, **environ: str) -> dict[str, tuple[str, str]]:
    """Setting → (value, origin)."""
    done = subprocess.run(
        [sys.executable, "-m", "obsinfra.cli.main", "config", "show", *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **environ},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = (line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("  "))
    return {name: (value, origin.strip()) for name, value, origin in rows}


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    (tmp_path / "obsinfra.toml").write_text('batch_size = 2\nnum_workers = 2\nmodel_name = "byte_gpt"\n')
    found = shown(tmp_path, "--batch-size=4", "--deterministic", BATCH_SIZE="3", OBSINFRA_NUM_WORKERS="3")
    assert found["batch_size"] == ("4", "flag --batch-size")
    assert found["num_workers"] == ("3", "env OBSINFRA_NUM_WORKERS")
    assert found["model_name"] == ("byte_gpt", "file obsinfra.toml")
    assert found["deterministic"] == ("True", "flag --deterministic")
    assert found["accumulate"] == ("1", "default")


def test_the_documented_variables_are_honoured_and_others_do_no_harm(tmp_path: Path) -> None:
    variables = {
        "MODEL_NAME": "digits",
        "BATCH_SIZE": "32",
        "LEARNING_RATE": "0.01",
        "NUM_EPOCHS": "7",
        "DISABLE_GPU": "1",
        "DISABLE_MONITORING": "true",
        "DISABLE_BACKUPS": "yes",
        "DISABLE_TESTING": "on",
        "LOG_LEVEL": "debug",
        "OUTPUT_DIR": "elsewhere",
    }
    found = shown(tmp_path, **variables, CUDA_VISIBLE_DEVICES="7,9", BATCH="8")
    fields = {"NUM_EPOCHS": "epochs"}
    for name, value in variables.items():
        field = fields.get(name, name.lower())
        expected = "True" if field.startswith("disable") else value
        assert found[field] == (expected, f"env {name}")
    assert sum(origin != "default" for _, origin in found.values()) == len(variables)


def test_a_named_file_is_read_instead_of_the_one_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "obsinfra.toml").write_text("seed = 1\nepochs = 1\n")
    (tmp_path / "other.toml").write_text("seed = 2\n[thresholds]\ngpu_temperature = 80\n")
    found = shown(tmp_path, "--config=other.toml")
    assert found["seed"] == ("2", "file other.toml")
    assert found["epochs"] == ("–", "default")
    assert "80" in " ".join(found["thresholds"]) and found["thresholds"][1].endswith("file other.toml")
