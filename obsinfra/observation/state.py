"""The training state of one loop: what a checkpoint contains, and putting it back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from obsinfra.backup.backup_system import Stateful, load_model, load_part
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import CheckpointError
from obsinfra.monitoring.recorder import Recorder
from obsinfra.observation.learning_rate import LearningRateScale
from obsinfra.observation.position import DataPosition


class LoopState:
    """Everything that makes a continued run equal to an uninterrupted one.

    Args:
        model: saved under the names it has without compile and DDP wrappers.
        parts: optimizer, scheduler, scaler: required in a checkpoint that is restored.
        extra: further state; restored where the checkpoint has it.
        position: where in the data the loop is.
        recorder: whose step counter is the global step.
        in_shards: ranks have parts of model and optimizer: `capture` is then a collective, and gives whole
            tensors where `keeps` is true.
        keeps: False on ranks that keep no checkpoints.

    Attributes:
        learning_rate: what the learning rates were scaled by from outside.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Mapping[str, Stateful],
        extra: Mapping[str, Stateful],
        position: DataPosition,
        recorder: Recorder,
        *,
        in_shards: bool = False,
        keeps: bool = True,
    ) -> None:
        self._model = unwrapped(model)
        self.in_shards, self._keeps = in_shards, keeps
        self._parts = dict(parts)
        self._extra = dict(extra)
        self._position = position
        self._recorder = recorder
        self.learning_rate = LearningRateScale(self._parts)

    @property
    def model(self) -> nn.Module:
        """The module whose state it is, without wrappers."""
        return self._model

    @property
    def parts(self) -> Mapping[str, Stateful]:
        """Optimizer, scheduler and scaler, as far as there are any."""
        return self._parts

    def capture(self, *, in_parts: bool = False) -> dict[str, Any]:
        """The present state; tensors are the live ones, not copies, but for those that were gathered from
        several ranks. On the loop's thread, between steps.

        Args:
            in_parts: do not gather: this rank's parts, as DTensors.
        """
        parts: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        if self.in_shards and not in_parts:
            from obsinfra.observation import shards

            model = shards.gathered_model(self._model, keep=self._keeps)
            parts = {name: shards.gathered(part, keep=self._keeps) for name, part in parts.items()}
        else:
            model = self._model.state_dict()
        return {
            "model": model,
            **parts,
            "extra": {name: part.state_dict() for name, part in self._extra.items()},
            "rng": capture_rng_state(),
            "position": self._position.state_dict(),
            "step": self._recorder.step,
            "learning_rate_scale": self.learning_rate.total,
        }

    def finite(self, captured: Mapping[str, Any] | None = None) -> bool:
        """Whether the whole model is finite. Reads all of it, so for a snapshot, not for each step.

        Args:
            captured: what `capture` has given just now; needed of a model in shards.
        """
        model = self._model.state_dict() if captured is None else captured["model"]
        tensors = [
            tensor
            for tensor in model.values()
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel()
        ]
        if not tensors:
            return True
        # The largest magnitude is NaN or infinite as soon as one element is: one pass, one synchronisation.
        # By device: of a model in shards the parameters were gathered in host memory, its buffers were not.
        for device in {tensor.device for tensor in tensors}:
            largest = torch._foreach_norm([one for one in tensors if one.device == device], float("inf"))
            if not torch.isfinite(torch.stack([norm.float() for norm in largest])).all():
                return False
        return True

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
        model = state["model"]
        if self.in_shards:
            from obsinfra.observation import shards

            model = shards.scattered_model(self._model, model)
        load_model(self._model, model, name)
        for part_name, part in self._parts.items():
            try:
                found = state[part_name]
                if self.in_shards and isinstance(part, torch.optim.Optimizer):
                    found = shards.scattered_optimizer(part, found)
                load_part(part, found)
            except (ValueError, KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"the {part_name} does not fit checkpoint {name}: {error}",
                    f"the {part_name} the checkpoint was made with",
                ) from error
        for part_name, part in self._extra.items():
            if part_name in state["extra"]:
                part.load_state_dict(state["extra"][part_name])
        self.learning_rate.total = float(state.get("learning_rate_scale", 1.0))
        self._position.load_state_dict(state["position"], state["rng"])
        restore_rng_state(state["rng"])
        self._recorder.step = int(state["step"])
        self._recorder.epoch = self._position.epoch


def is_in_shards(model: nn.Module) -> bool:
    """Whether ranks have parts of its parameters."""
    tensors = sys.modules.get("torch.distributed.tensor")  # who has not imported it has none of its tensors
    return tensors is not None and any(isinstance(one, tensors.DTensor) for one in model.parameters())


def unwrapped(model: nn.Module) -> nn.Module:
    """The module under torch.compile and DDP wrappers, whose state_dict has the user's names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
