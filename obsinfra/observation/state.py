"""The training state of one loop: what a checkpoint contains, and putting it back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obsinfra.backup.backup_system import Stateful, load_model
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.recorder import Recorder
from obsinfra.observation.position import DataPosition


class LoopState:
    """Everything that makes a continued run equal to an uninterrupted one.

    Args:
        model: saved under the names it has without compile and DDP wrappers.
        parts: optimizer, scheduler, scaler: required in a checkpoint that is restored.
        extra: further state; restored where the checkpoint has it.
        position: where in the data the loop is.
        recorder: whose step counter is the global step.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        extra: Mapping[str, Stateful],
        position: DataPosition,
        recorder: Recorder,
    ) -> None:
        self._model = unwrapped(model)
        self._parts = dict(parts)
        self._extra = dict(extra)
        self._position = position
        self._recorder = recorder

    def capture(self) -> dict[str, Any]:
        """The present state; tensors are the live ones, not copies. On the loop's thread, between steps."""
        return {
            "model": self._model.state_dict(),
            **{name: part.state_dict() for name, part in self._parts.items()},
            "extra": {name: part.state_dict() for name, part in self._extra.items()},
            "rng": capture_rng_state(),
            "position": self._position.state_dict(),
            "step": self._recorder.step,
        }

    def finite(self) -> bool:
        """Whether the whole model is finite. Reads all of it, so for a snapshot, not for each step."""
        tensors = [
            tensor
            for tensor in self._model.state_dict().values()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel()
        ]
        if not tensors:
            return True
        # The largest magnitude is NaN or infinite as soon as one element is: one pass, one synchronisation.
        largest = torch._foreach_norm(tensors, float("inf"))
        return bool(torch.isfinite(torch.stack([norm.float() for norm in largest])).all())

    def restore(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Put a captured state back.

        Raises:
            CheckpointError: it lacks a part, or a part does not fit; the model is checked first and is
                untouched then.
        """
        name = checkpoint.name
        required = ("model", "rng", "position", "step", *self._parts)
        if missing := [part for part in required if part not in state]:
            raise CheckpointError(
                f"checkpoint {name} has no {', '.join(missing)}", "one written by a loop with the same parts"
            )
        load_model(self._model, state["model"], name)
        for part_name, part in self._parts.items():
            try:
                part.load_state_dict(state[part_name])
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"the {part_name} does not fit checkpoint {name}: {error}",
                    f"the {part_name} the checkpoint was made with",
                ) from error
        for part_name, part in self._extra.items():
            if part_name in state["extra"]:
                part.load_state_dict(state["extra"][part_name])
        self._position.load_state_dict(state["position"], state["rng"])
        restore_rng_state(state["rng"])
        self._recorder.step = int(state["step"])
        self._recorder.epoch = self._position.epoch


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under torch.compile and DDP wrappers, whose state_dict has the user's names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
