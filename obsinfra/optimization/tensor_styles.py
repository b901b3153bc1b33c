"""How a module's parameters lie on the ranks of a tensor-parallel group, beyond torch's own styles.

A model's `tensor_parallel_plan` names them (see workloads.byte_gpt); the trainer uses `Whole` for what a plan
does not name. Imported for tensor parallelism alone: it takes a second or two.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["PackedColwise", "Whole"]


class Whole(ParallelStyle):
    """Every rank has all of it and computes the same; its parameters are DTensors as all others are, so that
    optimizer and gradient norm take them together."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, input_fn=_inputs, output_fn=_whole)


class PackedColwise(ParallelStyle):
    """A Linear without bias whose outputs are several of the same width side by side, as query, key and
    value: each rank has its columns of every one. Inputs and outputs are plain tensors.

    Args:
        pieces: how many lie side by side.
    """

    def __init__(self, pieces: int) -> None:
        super().__init__()
        self.pieces = pieces

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(module, device_mesh, self._divide, _inputs, _own)

    def _divide(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        assert isinstance(module, nn.Linear) and module.bias is None
        # Torch's name for it is private: rows in pieces, of each of which a rank has its part.
        places = [_StridedShard(0, split_factor=self.pieces)]
        module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, places))


def _inputs(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    return tuple(
        DTensor.from_local(one, mesh, [Replicate()], run_check=False)
        if isinstance(one, Tensor) and not isinstance(one, DTensor)
        else one
        for one in inputs
    )


# Typed as torch types such functions, although it uses what they return.
def _whole(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.redistribute(placements=[Replicate()]).to_local()


def _own(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    return output.to_local()
