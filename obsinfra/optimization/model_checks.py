"""What a model and its loss must be before they are worked on: otherwise torch fails far from the cause.

The optimisers of this folder ask here.
"""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from obsinfra.errors import ConfigError, first_line
from obsinfra.optimization.arguments import shown

Module = TypeVar("Module", bound=nn.Module)


def check_module(model: object) -> None:
    """Refuse what is no module.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a model {shown(model)}", "an nn.Module", "give the model itself")


def check_has_values(model: nn.Module) -> None:
    """Refuse a model on the meta device, which cannot be put onto another.

    Raises:
        ConfigError: it is no module, or has a tensor there.
    """
    check_module(model)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    if name := next((name for name, tensor in tensors if tensor.is_meta), None):
        raise ConfigError(
            f"a {type(model).__name__} whose {name} is on the meta device, without values",
            "a model with values",
            "model.to_empty(device='cpu') and initialise or load it before",
        )


def copied(model: Module) -> Module:
    """A copy of a model that can be run.

    Raises:
        ConfigError: it is no module, is lazy and has no shapes yet, or torch cannot copy it.
    """
    check_module(model)
    name = type(model).__name__
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            f"a {name} with lazy parameters or buffers",
            "a model that knows its shapes",
            "call it once on a batch before",
        )
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"a {name} that cannot be copied: {first_line(error, 200)}",
            "a model without results of computations or open handles among its attributes",
            "detach such tensors, and make handles when they are needed",
        ) from error


def check_loss(result: object) -> Tensor:
    """The result of a loss, if gradients can be had of it.

    Raises:
        ConfigError: it is no tensor of one number that depends on a parameter to be trained.
    """
    if isinstance(result, Tensor) and result.numel() == 1 and result.requires_grad:
        return result
    found = shown(result)
    if isinstance(result, Tensor):
        found = f"of shape {list(result.shape)}, {'with' if result.requires_grad else 'without'} a gradient"
    raise ConfigError(
        f"a loss {found}",
        "a tensor of one number that depends on the parameters",
        "return the loss, e.g. lambda model: cross_entropy(model(inputs), labels)",
    )
