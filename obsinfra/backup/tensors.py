"""Between tensors and the bytes the store keeps: the only part of the store that needs torch."""

from __future__ import annotations

import math
import platform
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from obsinfra.backup.manifest import Manifest, TensorEntry
from obsinfra.backup.state_tree import decode
from obsinfra.backup.store import CheckpointStore, RawTensor
from obsinfra.errors import CheckpointError


def raw_tensor(tensor: Tensor) -> RawTensor:
    """A tensor's stored form; without a copy where it is contiguous on the CPU."""
    return RawTensor(dtype_name(tensor.dtype), tuple(tensor.shape), tensor_bytes(tensor.to("cpu")))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a CPU tensor in row-major order, without a copy where it is contiguous."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))  # the stride of a single element may be anything
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def named_dtype(name: str) -> torch.dtype:
    """`torch.float32` for `float32`.

    Raises:
        ValueError: this torch has no such dtype.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"no dtype {name!r} in this torch")
    return dtype


def read_state(store: CheckpointStore, manifest: Manifest) -> Any:
    """The whole state of a checkpoint, with CPU tensors, every chunk verified.

    Raises:
        CheckpointError: a chunk is absent or damaged, named, or the manifest contradicts itself, or is that
            of a distributed checkpoint that no trainer made.
    """
    if manifest.in_parts:
        from obsinfra.backup.dcp_state import nested_state  # takes a second or two
        from obsinfra.backup.dcp_whole import read_whole

        return nested_state(read_whole(store, manifest))
    if manifest.distributed:
        raise CheckpointError(
            f"{manifest.path.name} is a distributed checkpoint",
            "one saved by a BackupSystem",
            "load it with dcp.load(state, storage_reader=obsinfra.backup.dcp.ObsinfraReader(...))",
        )
    return decode(manifest.state, [read_tensor(store, entry, manifest) for entry in manifest.tensors])


def code_versions() -> dict[str, str]:
    """What a manifest says of the code that wrote it."""
    return {
        "obsinfra": version("obsinfra"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_tensor(store: CheckpointStore, entry: TensorEntry, manifest: Manifest) -> Tensor:
    """One tensor of a checkpoint, on the CPU, every chunk verified.

    Raises:
        CheckpointError: a chunk is absent or damaged, or the manifest contradicts itself.
    """
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{manifest.path.name} has dtype {entry.dtype!r}", "a dtype of this torch")
    if math.prod(entry.shape) * dtype.itemsize != entry.nbytes:
        raise CheckpointError(
            f"a tensor of {manifest.path.name} has {entry.nbytes} bytes",
            f"what {dtype} of shape {entry.shape} takes",
        )
    data = store.read_tensor(entry, manifest)
    if not data:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(entry.shape)
