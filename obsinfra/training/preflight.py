"""The check before training: data, model and store, tried for real in a second, before hours go by.

Leaves no trace: random state, model and data position are as before. `--disable-testing` skips it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import ConfigError, DataError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.micro_batching import pieces, rows_of
from obsinfra.optimization.oom_recovery import is_out_of_memory, release_device_caches

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


@contextmanager
def _to_try(trainer: Trainer) -> Iterator[torch.nn.Module]:
    """A copy of the model; where ranks have parts of it, which cannot be copied, itself, left as it was."""
    if not trainer.parallel.in_shards:
        yield copy.deepcopy(trainer.model)
        return
    before = [buffer.clone() for buffer in trainer.model.buffers()]
    try:
        yield trainer.model
    finally:
        trainer.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(trainer.model.buffers(), before, strict=True):
                buffer.copy_(value)


def _one_step(trainer: Trainer) -> None:
    with _to_try(trainer) as model:
        _try(trainer, model)


def _try(trainer: Trainer, model: torch.nn.Module) -> None:
    batches = trainer.fresh_batches(model)
    try:
        batch, _ = trainer.parallel.opened(next(iter(batches)))
        (first, *_) = trainer.memory.micro_batching.split(batch[:1])
        if not _fits(trainer, model, first.batch):
            _one_row(trainer, model, batch[0])
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        raise DataError(
            f"{trainer.workload.name} cannot take its first batch: {type(error).__name__}: {error}",
            "data and model that fit each other",
            "check --data-path and the workload; --disable-testing skips this check",
        ) from error


def _fits(trainer: Trainer, model: torch.nn.Module, batch: Any) -> bool:
    """Whether one forward and backward pass of `batch` finds enough memory."""
    from obsinfra.training.trainer import to_device

    try:
        with trainer.precision.autocast():
            output = trainer.workload.training_step(model, to_device(batch, trainer.device))
        output.loss.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _one_row(trainer: Trainer, model: torch.nn.Module, batch: Any) -> None:
    """A batch did not fit. Where recovery will split it, it is enough that a row does.

    Raises:
        ConfigError: it does not, or nothing will split it.
    """
    rows = rows_of(batch) if trainer.memory.recovers and trainer.memory.micro_batching.splittable else None
    if rows is not None:
        model.zero_grad(set_to_none=True)
        release_device_caches(trainer.device)
        piece, _ = next(pieces(batch, rows, 1))
        if _fits(trainer, model, piece):
            get_logger("training").warning("batch_does_not_fit", rows=rows, then="micro-batches that do")
            return
    raise ConfigError(
        f"one {'row' if rows is not None else 'batch'} does not fit into memory",
        "one that fits",
        "choose a smaller --batch-size or --micro-batch, or --gradient-checkpointing",
    )


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
