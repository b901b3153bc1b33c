"""A run goes on under every other way of sharing its model, from the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_processes import in_group, trained
from test_sharded_ranks import GPT, _handed_over, far

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import count_tensors, differences
from obsinfra.observation.ranks import Alone

pytestmark = pytest.mark.slow

HSDP = {"parallel": "hsdp", "shard_size": 2}
TP = {"parallel": "tp", "tensor_parallel_size": 2}
BOTH = {"parallel": "fsdp", "tensor_parallel_size": 2}
PARTS = {"checkpoint_form": "sharded"}
DDP: dict[str, Any] = {"parallel": "ddp"}
ALONE: dict[str, Any] = {}

CHAINS: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "alone, hsdp, ddp, hsdp": [(1, ALONE), (4, HSDP), (2, DDP), (4, HSDP), (1, ALONE)],
    "ddp, tp, ddp, tp": [(2, DDP), (2, TP), (2, DDP), (4, TP), (1, ALONE)],
    "alone, tp in fsdp, ddp, tp in fsdp": [(1, ALONE), (4, BOTH), (2, DDP), (4, BOTH)],
    "parts of hsdp, tp, parts of fsdp, ddp": [
        (4, {**HSDP, **PARTS}),
        (2, TP),
        (2, {"parallel": "fsdp", **PARTS}),
        (2, DDP),
    ],
    "parts of tp, ddp, parts of tp in fsdp, parts of tp, alone": [
        (4, {**TP, **PARTS}),
        (2, DDP),
        (4, {**BOTH, **PARTS}),
        (2, {**TP, **PARTS}),
        (1, ALONE),
    ],
}


def _link(size: int, output: Path, settings: dict[str, Any], *, resumes: bool) -> dict[str, Any]:
    """One part of the run; what its first rank tells."""
    function = _handed_over if resumes else _begun
    if size == 1:
        return function(Alone(), output, settings)
    found = in_group(size, function, output, settings)
    assert all(isinstance(rank, dict) for rank in found), found
    assert all(far(found[0]["parameters"], rank["parameters"]) == 0.0 for rank in found)
    return found[0]


def _begun(ranks: Any, output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return trained(ranks, output, **settings)


@pytest.mark.parametrize("name", CHAINS)
def test_a_run_goes_on_as_another_kind_and_back(tmp_path: Path, name: str) -> None:
    """Two steps as each; parameters, moments and all are put back bit for bit, and the course is that of one
    process but for the order of sums."""
    settings = {**GPT, "warmup_steps": 0, "schedule": "constant"}
    store = create_backup_system(tmp_path / "r" / "checkpoints")
    for place, (size, kind) in enumerate(CHAINS[name]):
        more = {"run": None, "resume": "r"} if place else {}
        chosen = {**settings, **kind, **more, "max_steps": 2 * (place + 1)}
        last = _link(size, tmp_path, chosen, resumes=place > 0)
        assert last["step"] == 2 * (place + 1)
        if place:
            before, after = (store.load(last[which]) for which in ("from", "saved"))
            assert before.info.step == after.info.step == 2 * place
            kinds = [kind for _, kind in CHAINS[name][place - 1 : place + 1]]
            in_parts = [PARTS.items() <= kind.items() for kind in kinds]
            assert [found.info.in_parts for found in (before, after)] == in_parts
            assert count_tensors(before.state["optimizer"]) == 3 * count_tensors(before.state["model"])
            assert differences(before.state["model"], after.state["model"]) == []
            assert differences(before.state["optimizer"], after.state["optimizer"]) == []
    steps = 2 * len(CHAINS[name])
    uncut = trained(Alone(), tmp_path / "uncut", **{**settings, "max_steps": steps})
    start = trained(Alone(), tmp_path / "start", **{**settings, "max_steps": 1})
    moved = far(uncut["parameters"], start["parameters"])
    assert far(uncut["parameters"], last["parameters"]) < 2e-4 < moved / 5
