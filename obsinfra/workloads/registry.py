"""Finds a workload by name: a built-in, an installed entry point, or `package.module:factory`.

Called by the CLI; imports torch only once a workload is really created.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from obsinfra.errors import UserError

if TYPE_CHECKING:
    from obsinfra.workloads.protocol import Workload

GROUP = "obsinfra.workloads"
"""Entry-point group in which packages announce their workloads."""

_WANTED = "package.module:factory with factory(*, data_path, model_size, seed) -> Workload"
REQUIRED = (
    "name",
    "defaults",
    "build_model",
    "train_batches",
    "training_step",
    "validate",
    "flops_per_sample",
    "describe_data",
)


@dataclass(frozen=True, slots=True)
class _BuiltIn:
    target: str
    description: str


# Also listed in pyproject.toml; kept here so that a checkout without installed metadata works too.
BUILT_IN = {
    "tactical_mappo": _BuiltIn(
        "obsinfra.workloads.tactical_mappo:create_workload",
        "Multi-agent PPO with a centralised critic, trading replayed market bars",
    ),
    "byte_gpt": _BuiltIn(
        "obsinfra.workloads.byte_gpt:create_workload",
        "Decoder-only transformer over the bytes of any text folder",
    ),
    "digits": _BuiltIn(
        "obsinfra.workloads.digits:create_workload",
        "Convolutional network on scikit-learn's handwritten digits",
    ),
}


def available_workloads() -> dict[str, str]:
    """Names that `create_workload` knows, each with one line that says what it is.

    An installed entry point that cannot be loaded stays in the list, with the reason as its description.
    """
    found = {name: built_in.description for name, built_in in BUILT_IN.items()}
    for name, point in sorted(_foreign_entry_points().items()):
        try:
            factory = point.load()
        except Exception as error:  # somebody else's package; it must not take the list down
            found[name] = f"cannot be loaded from {point.value}: {type(error).__name__}: {error}"
            continue
        documentation = inspect.getdoc(factory) or ""
        found[name] = documentation.partition("\n")[0] or point.value
    return found


def create_workload(model_name: str, *, data_path: str | None, model_size: str | None, seed: int) -> Workload:
    """The workload of that name.

    Args:
        model_name: a name of `available_workloads()`, or `package.module:factory`.
        data_path: file or folder the workload reads; None: its own data.
        model_size: size preset of the workload; None: its default.
        seed: for whatever the workload draws while it prepares its data.

    Raises:
        UserError: nothing has that name, the factory cannot be imported, or what it returns is no workload.
        DataError: the data is missing or malformed.
    """
    factory = _factory(model_name)
    try:
        inspect.signature(factory).bind(data_path=data_path, model_size=model_size, seed=seed)
    except (TypeError, ValueError) as error:  # ValueError: it has no signature
        raise UserError(f"the factory of model {model_name!r} cannot be called: {error}", _WANTED) from error
    workload = factory(data_path=data_path, model_size=model_size, seed=seed)
    missing = [part for part in REQUIRED if not hasattr(workload, part)]
    if missing:
        raise UserError(
            f"{model_name} made a {type(workload).__name__} without {', '.join(missing)}",
            "an object with all parts of obsinfra.workloads.protocol.Workload",
        )
    result: Workload = workload
    return result


def _factory(model_name: str) -> Callable[..., Any]:
    if ":" in model_name:
        return _import(model_name, model_name)
    point = _foreign_entry_points().get(model_name)
    if point is not None:
        return _import(model_name, point.value)
    if model_name in BUILT_IN:
        return _import(model_name, BUILT_IN[model_name].target)
    raise UserError(
        f"unknown model {model_name!r}",
        f"one of {', '.join(available_workloads())}, or your own as package.module:factory",
        "correct --model-name",
    )


def _import(model_name: str, target: str) -> Callable[..., Any]:
    module_name, _, attribute = target.partition(":")
    attribute = attribute.partition(" ")[0]
    if not module_name or not attribute:
        raise UserError(f"model {model_name!r}", _WANTED, "correct --model-name")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # somebody else's module; it may fail in any way
        raise UserError(
            f"module {module_name!r} of model {model_name!r} cannot be imported: "
            f"{type(error).__name__}: {error}",
            _WANTED,
            "correct it, install the package, or add its folder to PYTHONPATH",
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UserError(f"module {module_name!r} has no {attribute!r}", _WANTED, "correct --model-name")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"{target!r} is a {type(found).__name__}", _WANTED)
    factory: Callable[..., Any] = found
    return factory


def _foreign_entry_points() -> dict[str, EntryPoint]:
    """Installed workloads of other packages; the built-in names cannot be taken over."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}
