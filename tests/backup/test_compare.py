"""Two training states are the same when every bit is, and every difference is named with its place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from obsinfra.backup.compare import count_tensors, differences


def state() -> dict[str, Any]:
    return {
        "model": {"weight": torch.arange(6.0).reshape(2, 3), "empty": torch.empty(0)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.1, "loss": math.nan},
        "order": (np.arange(4), [1, "a", None, True]),
    }


def test_a_state_equals_its_copy_nan_included() -> None:
    assert differences(state(), state()) == []
    assert count_tensors(state()) == 3


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("state.model.weight", lambda s: s["model"]["weight"].view(torch.int32)[1, 2].bitwise_xor_(1)),
        ("state.model.weight", lambda s: s["model"].update(weight=s["model"]["weight"].double())),
        ("state.model.weight", lambda s: s["model"].update(weight=s["model"]["weight"].reshape(3, 2))),
        ("state.model.extra", lambda s: s["model"].update(extra=1)),
        ("state.model.empty", lambda s: s["model"].pop("empty")),
        ("state.optimizer.state.0.step", lambda s: s["optimizer"]["state"][0]["step"].neg_()),
        ("state.optimizer.lr", lambda s: s["optimizer"].update(lr=0.1 + 2**-55)),
        ("state.optimizer.loss", lambda s: s["optimizer"].update(loss=None)),
        ("state.order[0]", lambda s: s["order"][0].__setitem__(0, 9)),
        ("state.order[1]", lambda s: s["order"][1].append(2)),
        ("state.order[1][3]", lambda s: s["order"][1].__setitem__(3, 1)),
    ],
)
def test_each_difference_is_named_with_its_place(place: str, change: Any) -> None:
    changed = state()
    change(changed)
    found = differences(state(), changed)
    assert [line.partition(":")[0] for line in found] == [place]


def test_zero_and_minus_zero_are_not_the_same_bits() -> None:
    assert differences(torch.tensor(0.0), torch.tensor(-0.0)) != []
