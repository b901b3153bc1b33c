"""The engines a trained model can be given to: AOTInductor, ONNX Runtime, TensorRT, TorchScript.

`inference` tries them. Each function returns something that is called like the model, or raises
`EngineRefused`, which says what is missing or what the engine does not take.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = tuple[Any, ...]
Callee = Callable[..., Any]
Shapes = tuple[Any, ...] | None


class EngineRefused(Exception):
    """An engine is not there, or does not take the model; the message says which."""


def aot_inductor(model: nn.Module, example: Inputs, shapes: Shapes, folder: Path) -> Callee:
    """Compile with `torch.export` and AOTInductor into `folder/model.pt2`, which C++ loads, too."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    path = str(folder / "model.pt2")
    with _quiet("torch._inductor"):
        aoti_compile_and_package(exported(model, example, shapes), package_path=path)
    loaded: Callee = aoti_load_package(path)
    return loaded


def onnx_runtime(model: nn.Module, example: Inputs, shapes: Shapes, folder: Path) -> Callee:
    """Export to `folder/model.onnx` and run it with ONNX Runtime, on CUDA where its package has that."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise EngineRefused(f"{package} is not installed: pip install 'obsinfra[inference]'")
    import onnxruntime

    device = _device_of(model, example)
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise EngineRefused("the installed onnxruntime has no CUDA: pip install onnxruntime-gpu")
        providers.insert(0, "CUDAExecutionProvider")
    path = folder / "model.onnx"
    with _quiet("torch.onnx"):
        torch.onnx.export(
            exported(model, example, shapes), (), str(path), dynamo=True, verbose=False, external_data=False
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    names = [row.name for row in session.get_inputs()]
    with torch.no_grad():
        form = pytree.tree_structure(model(*example))

    def run(*args: Any) -> Any:
        tensors = _tensors(args)
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
        out = [torch.from_numpy(array).to(device) for array in session.run(None, feed)]
        return pytree.tree_unflatten(out, form)

    return run


def tensorrt(model: nn.Module, example: Inputs, shapes: Shapes, folder: Path) -> Callee:
    """Compile with Torch-TensorRT, where it is installed and the model is on CUDA."""
    device = _device_of(model, example)
    if device.type != "cuda":
        raise EngineRefused(f"TensorRT does not apply to a {device.type}")
    if importlib.util.find_spec("torch_tensorrt") is None:
        raise EngineRefused("torch_tensorrt is not installed: pip install torch-tensorrt")
    import torch_tensorrt

    built: Callee = torch_tensorrt.dynamo.compile(exported(model, example, shapes), list(example))
    return built


def torchscript(model: nn.Module, example: Inputs, shapes: Shapes, folder: Path) -> Callee:
    """Trace into `folder/model.ts`. Deprecated by PyTorch: for what cannot load anything else."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        traced = torch.jit.freeze(torch.jit.trace(model, example, check_trace=False, strict=False))  # type: ignore[no-untyped-call]
        traced.save(str(folder / "model.ts"))
    run: Callee = traced
    return run


ENGINES: dict[str, Callable[[nn.Module, Inputs, Shapes, Path], Callee]] = {
    "aot_inductor": aot_inductor,
    "onnx_runtime": onnx_runtime,
    "tensorrt": tensorrt,
    "torchscript": torchscript,
}


def exported(model: nn.Module, example: Inputs, shapes: Shapes) -> torch.export.ExportedProgram:
    """The model as a graph without Python."""
    with torch.no_grad():
        return torch.export.export(model, example, dynamic_shapes=shapes)


def _device_of(model: nn.Module, example: Inputs) -> torch.device:
    tensors = [
        *model.parameters(),
        *(leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)),
    ]
    return tensors[0].device if tensors else torch.device("cpu")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without a library's progress reports."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        found.setLevel(before)
