"""What a forward pass changes besides gradients, noted before a step so that the step can be done again.

That is random states and the model's buffers, such as batch norm's running statistics. `oom_recovery` calls
it once a step, so the usual case must cost microseconds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LOOKS = 4
"""The first steps are looked at whole: does the loop draw from Python's or NumPy's generators, does it write
to buffers past autograd's count?"""

LOOK_EVERY = 128
"""Later ones are looked at this often. Noting those two states takes 50 µs, torch's takes one."""


@dataclass(slots=True)
class _Buffer:
    """One buffer of one module, and its value at the last mark.

    `always`: it is written to without autograd's counting it, as batch norm's kernels do.
    """

    owner: dict[str, Tensor | None]
    name: str
    always: bool
    tensor: Tensor | None = None
    version: int = -1
    value: Tensor | None = None


class Rewind:
    """Random states and buffers as they were when `mark` was last called.

    Args:
        model: whose buffers are meant; modules added to it later are not seen.
        device: whose generator the model draws from besides the CPU's.

    Attributes:
        host_randomness: whether steps were seen to draw from Python's or NumPy's generators. Those are noted
            with every mark from then on.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.host_randomness = False
        self._buffers = [
            _Buffer(module._buffers, name, isinstance(module, nn.modules.batchnorm._NormBase))
            for module in model.modules()
            for name in module._buffers
        ]
        self._cuda = device if device.type == "cuda" else None
        self._steps = 0
        self._looking = False
        self._torch: Tensor | None = None
        self._device: Tensor | None = None
        self._host: tuple[Any, Any] | None = None

    def mark(self) -> None:
        """A step begins: this is what `back` goes back to. Called on the loop's thread."""
        self._torch = torch.get_rng_state()
        if self._cuda is not None:
            self._device = torch.cuda.get_rng_state(self._cuda)
        steps = self._steps
        self._steps = steps + 1
        self._looking = steps < LOOKS or steps % LOOK_EVERY == 0
        for buffer in self._buffers:
            tensor = buffer.owner.get(buffer.name)
            # Autograd counts writes to a tensor, but for those through `.data`: one that was not written to
            # needs no new copy, once it was seen that nobody writes to it uncounted.
            if (
                self._looking
                or buffer.always
                or tensor is not buffer.tensor
                or (tensor is not None and tensor._version != buffer.version)
            ):
                _note(buffer, tensor)
        self._host = _host_state() if self._looking or self.host_randomness else None

    def passed(self) -> None:
        """The step is done, without having to go back."""
        if not self._looking:
            return
        if self._host is not None and not self.host_randomness:
            self.host_randomness = not _same(self._host, _host_state())
        for buffer in self._buffers:
            if not buffer.always and buffer.tensor is not None and buffer.value is not None:
                uncounted = buffer.tensor._version == buffer.version
                buffer.always = uncounted and not _equal(buffer.tensor, buffer.value)

    def back(self) -> None:
        """Put everything back to the last mark."""
        assert self._torch is not None, "mark comes first"
        torch.set_rng_state(self._torch)
        if self._cuda is not None and self._device is not None:
            torch.cuda.set_rng_state(self._device, self._cuda)
        if self._host is not None:
            random.setstate(self._host[0])
            np.random.set_state(self._host[1])
        for buffer in self._buffers:
            buffer.owner[buffer.name] = buffer.tensor
            if buffer.tensor is None:
                continue
            if self._looking or buffer.always or buffer.tensor._version != buffer.version:
                with torch.no_grad():
                    buffer.tensor.copy_(buffer.value)  # type: ignore[arg-type]
                buffer.version = buffer.tensor._version


def _note(buffer: _Buffer, tensor: Tensor | None) -> None:
    fits = (
        tensor is not None
        and buffer.value is not None
        and buffer.value.shape == tensor.shape
        and buffer.value.dtype == tensor.dtype
        and buffer.value.device == tensor.device
    )
    if tensor is None:
        buffer.value, buffer.version = None, -1
    else:
        if fits:
            buffer.value.copy_(tensor)  # type: ignore[union-attr]
        else:
            buffer.value = tensor.detach().clone()
        buffer.version = tensor._version
    buffer.tensor = tensor


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.equal(one, other)) or bool(((one == other) | ((one != one) & (other != other))).all())


def _host_state() -> tuple[Any, Any]:
    return random.getstate(), np.random.get_state(legacy=True)


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    mine, theirs = one[1], other[1]
    return (
        one[0] == other[0]
        and np.array_equal(mine[1], theirs[1])
        and (mine[2], mine[3], mine[4]) == (theirs[2], theirs[3], theirs[4])
    )
