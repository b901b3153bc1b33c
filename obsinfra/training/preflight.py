"""The check before training: data, model and store, tried for real in a second, before hours go by.

Leaves no trace: random state, model and data position are as before. `--disable-testing` skips it.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING

import torch

from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import ConfigError, DataError

if TYPE_CHECKING:
    from obsinfra.training.trainer import Trainer

MARGIN = 2.0
"""Free space asked for at the start, in copies of the training state (a new checkpoint beside an old one)."""


def check(trainer: Trainer) -> None:
    """Try one forward and backward pass and look at the space for checkpoints.

    Raises:
        DataError: the first batch cannot be read or the model cannot take it.
        ConfigError: too little space where the run folder is.
    """
    rng = capture_rng_state()
    try:
        _one_step(trainer)
    finally:
        restore_rng_state(rng)
    if not trainer.settings.disable_backups:
        _space(trainer)


def _one_step(trainer: Trainer) -> None:
    from obsinfra.training.trainer import to_device

    model = copy.deepcopy(trainer.model)
    batches = trainer.fresh_batches(model)
    try:
        batch = next(iter(batches))
        with trainer.precision.autocast():
            output = trainer.workload.training_step(model, to_device(batch[0], trainer.device))
        output.loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise ConfigError(
                f"one batch does not fit into memory: {error}",
                "a batch that fits",
                "choose a smaller --batch-size, or --gradient-checkpointing",
            ) from error
        raise DataError(
            f"{trainer.workload.name} cannot take its first batch: {type(error).__name__}: {error}",
            "data and model that fit each other",
            "check --data-path and the workload; --disable-testing skips this check",
        ) from error


def _space(trainer: Trainer) -> None:
    state = (
        sum(p.numel() * p.element_size() for p in trainer.model.parameters()) * 3
    )  # parameters, two moments
    root = trainer.settings.output_dir
    while not root.exists():
        root = root.parent
    found = os.statvfs(root)
    free = found.f_bavail * found.f_frsize
    if free < MARGIN * state:
        raise ConfigError(
            f"{free / 1e6:.0f} MB free at {root}",
            f"at least {MARGIN * state / 1e6:.0f} MB for two checkpoints of this model",
            "free space, choose another --output-dir, or --disable-backups",
        )
