"""A model without values: shapes, types and devices of a real pass, at no cost in memory or arithmetic.

`flops` counts on it, `activation_checkpointing` weighs activations.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def weightless(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of `model` whose tensors have no values, in a context in which nothing is computed.

    Real tensors may go in; what comes out are PyTorch's fake tensors, on the same device as real ones would
    be, so that kernels are chosen as in earnest. Random states are as before afterwards.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twins: dict[int, Any] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(
            mode.from_tensor(parameter.detach()), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        twins[id(buffer)] = mode.from_tensor(buffer)
    host, arrays = random.getstate(), np.random.get_state()
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(devices)), mode:
            yield copy.deepcopy(model, twins)
    finally:
        random.setstate(host)
        np.random.set_state(arrays)
