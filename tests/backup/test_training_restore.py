"""Training that continues from a checkpoint is training that was never interrupted, to the last bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_files import QuickFiles, tree
from same import same
from torch import nn
from torch.optim import lr_scheduler

from obsinfra import create_backup_system
from obsinfra.backup.backup_system import BackupSystem
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import CheckpointError

Scheduler = lr_scheduler.LRScheduler


class Training:
    """A small model whose every step draws from all three generators."""

    def __init__(self, seed: int, make_scheduler: Callable[[torch.optim.Optimizer], Scheduler]) -> None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1)
        )
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": others}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, amsgrad=True)
        self.scheduler = make_scheduler(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def steps(self, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            x = torch.from_numpy(np.random.randn(12, 8).astype(np.float32)) * (1 + random.gauss(0, 0.1))
            loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            else:
                self.scheduler.step()
            losses.append(loss.item())
        return losses

    def everything(self) -> dict[str, Any]:
        return {
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": capture_rng_state(),
        }


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Scheduler]] = {
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 20),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1),
    "steps": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 7]),
    "warm-up": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, total_iters=6),
            lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
        ],
        [6],
    ),
}


@pytest.fixture(autouse=True)
def _generators_as_found() -> Any:
    state = capture_rng_state()
    yield
    restore_rng_state(state)


@pytest.fixture
def backup(tmp_path: Path) -> BackupSystem:
    return create_backup_system(tmp_path / "checkpoints", files=QuickFiles())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_continued_training_is_bit_identical(backup: BackupSystem, name: str) -> None:
    whole = Training(1, SCHEDULERS[name])
    whole.steps(5)
    path = backup.create_checkpoint(
        whole.model,
        whole.optimizer,
        epoch=2,
        step=5,
        loss=0.5,
        scheduler=whole.scheduler,
        scaler=whole.scaler,
        sampler={"seed": 2**70},
        seen=(1, 2),
    )
    losses = whole.steps(6)
    expected = whole.everything()

    continued = Training(2, SCHEDULERS[name])
    continued.steps(1)
    found = backup.restore_from_checkpoint(
        continued.model, continued.optimizer, scheduler=continued.scheduler, scaler=continued.scaler
    )
    assert (found.epoch, found.step, found.loss) == (2, 5, 0.5)
    assert found.extra == {"sampler": {"seed": 2**70}, "seen": (1, 2)}
    assert (found.path, found.kind) == (path, "regular")
    assert continued.steps(6) == losses
    assert same(expected["model"], dict(continued.model.state_dict()))
    assert same(expected["optimizer"], continued.optimizer.state_dict())
    assert same(expected["scaler"], continued.scaler.state_dict())
    assert same(expected["rng"], capture_rng_state())
    assert continued.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def test_random_states_go_on_where_they_were() -> None:
    """Also between the two halves of a pair of normal deviates, which Python and NumPy keep."""

    def draw() -> tuple[Any, ...]:
        return (
            torch.rand(3).tolist(),
            random.gauss(0, 1),
            random.random(),
            np.random.randn(),
            np.random.rand(),
        )

    torch.manual_seed(3)
    random.gauss(0, 1)
    np.random.randn()
    state = capture_rng_state()
    kept = copy.deepcopy(state)
    first = [draw() for _ in range(3)]
    assert same(kept, state), "a captured state does not move on"
    restore_rng_state(state)
    assert [draw() for _ in range(3)] == first


def test_an_emergency_backup_is_one_by_kind_and_reason(backup: BackupSystem) -> None:
    training = Training(1, SCHEDULERS["cosine"])
    backup.create_checkpoint(training.model, step=1)
    training.steps(1)
    path = backup.emergency_backup(
        training.model, training.optimizer, 1, 2, float("nan"), reason="GPU too hot", note="x"
    )
    info = backup.store.read_manifest(path)
    assert (info.kind, info.reason, info.metrics) == ("emergency", "GPU too hot", {})
    fresh = Training(2, SCHEDULERS["cosine"])
    found = backup.restore_from_checkpoint(fresh.model, fresh.optimizer)
    assert (found.kind, found.step, found.extra) == ("emergency", 2, {"note": "x"})
    assert found.loss is not None and found.loss != found.loss
    assert same(dict(training.model.state_dict()), dict(fresh.model.state_dict()))


def test_a_named_checkpoint_is_restored_though_there_are_newer_ones(backup: BackupSystem) -> None:
    training = Training(1, SCHEDULERS["cosine"])
    expected = copy.deepcopy(dict(training.model.state_dict()))
    path = backup.create_checkpoint(training.model, step=1)
    training.steps(1)
    backup.create_checkpoint(training.model, step=2)
    assert backup.restore_from_checkpoint(training.model, checkpoint=path).step == 1
    assert same(expected, dict(training.model.state_dict()))


def test_a_damaged_newest_one_is_passed_over(backup: BackupSystem) -> None:
    training = Training(1, SCHEDULERS["cosine"])
    expected = copy.deepcopy(dict(training.model.state_dict()))
    backup.create_checkpoint(training.model, step=1)
    training.steps(1)
    backup.create_checkpoint(training.model, step=2).write_bytes(b"damaged")
    assert backup.restore_from_checkpoint(training.model).step == 1
    assert same(expected, dict(training.model.state_dict()))


def other_model(change: Callable[[nn.Sequential], None]) -> nn.Module:
    model = Training(5, SCHEDULERS["cosine"]).model
    change(model)
    return model


def widen(model: nn.Sequential) -> None:
    model[4] = nn.Linear(16, 2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (widen, ["4.bias is (1,), the model has (2,)", "4.weight is (1, 16), the model has (2, 16)"]),
        (lambda model: model.append(nn.Linear(1, 1)), ["5.bias is missing", "5.weight is missing"]),
        (lambda model: model.pop(4), ["4.bias is unknown", "4.weight is unknown"]),
    ],
    ids=["another shape", "one more layer", "one layer less"],
)
def test_a_model_that_does_not_fit_is_untouched_and_the_parameters_are_named(
    backup: BackupSystem, change: Callable[[nn.Sequential], None], named: list[str]
) -> None:
    training = Training(1, SCHEDULERS["cosine"])
    training.steps(1)
    path = backup.create_checkpoint(training.model, training.optimizer, step=1)
    model = other_model(change)
    optimizer = Training(6, SCHEDULERS["cosine"]).optimizer  # this one would fit
    before = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict(), capture_rng_state()))
    with pytest.raises(CheckpointError, match=f"checkpoint {path.name} does not fit the model") as caught:
        backup.restore_from_checkpoint(model, optimizer)
    assert all(name in str(caught.value) for name in named)
    assert same(before, (dict(model.state_dict()), optimizer.state_dict(), capture_rng_state()))


def test_of_very_many_parameters_that_do_not_fit_five_are_named(backup: BackupSystem) -> None:
    backup.create_checkpoint(nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)]), step=1)
    with pytest.raises(CheckpointError, match=r"; 1\.weight is unknown; 10\.bias is unknown and 35 more"):
        backup.restore_from_checkpoint(nn.Sequential())


def test_a_checkpoint_without_a_part_that_is_asked_for_is_refused_and_nothing_touched(
    backup: BackupSystem,
) -> None:
    backup.create_checkpoint(Training(1, SCHEDULERS["cosine"]).model, step=1)
    training = Training(2, SCHEDULERS["cosine"])
    before = copy.deepcopy(training.everything())
    with pytest.raises(CheckpointError, match="has no optimizer, scheduler; expected"):
        backup.restore_from_checkpoint(training.model, training.optimizer, scheduler=training.scheduler)
    assert same(before, training.everything())


def test_an_optimizer_that_does_not_fit_is_refused_and_nothing_touched(backup: BackupSystem) -> None:
    model = Training(1, SCHEDULERS["cosine"]).model
    backup.create_checkpoint(model, torch.optim.AdamW(model.parameters()), step=1)  # one group, not two
    training = Training(2, SCHEDULERS["cosine"])
    before = copy.deepcopy(training.everything())
    with pytest.raises(CheckpointError, match=r"optimizer does not fit checkpoint .*parameter groups"):
        backup.restore_from_checkpoint(training.model, training.optimizer)
    assert same(before, training.everything())


@pytest.mark.parametrize(
    "classes", [(torch.optim.AdamW, torch.optim.SGD), (torch.optim.SGD, torch.optim.Adam)]
)
def test_the_state_of_an_optimizer_of_another_class_is_refused_and_nothing_touched(
    backup: BackupSystem, classes: tuple[Any, Any]
) -> None:
    """torch takes it, and fails in the next step for want of a key."""
    model = torch.nn.Linear(2, 1)
    backup.create_checkpoint(model, classes[0](model.parameters(), lr=0.1), step=1)
    optimizer = classes[1](model.parameters(), lr=0.2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"the optimizer does not fit checkpoint .* groups have no"):
        backup.restore_from_checkpoint(model, optimizer)
    assert optimizer.state_dict() == before


def test_a_state_saved_in_another_way_is_refused_clearly(backup: BackupSystem) -> None:
    """`save` takes any state; `restore_from_checkpoint` needs what `create_checkpoint` made."""
    backup.save({"weights": torch.ones(2)}, step=1, epoch=0)
    with pytest.raises(CheckpointError, match="has no model, rng"):
        backup.restore_from_checkpoint(nn.Linear(1, 1))


def test_restoring_writes_nothing(backup: BackupSystem) -> None:
    training = Training(1, SCHEDULERS["cosine"])
    backup.create_checkpoint(training.model, step=1)
    before = tree(backup.store.root)
    backup.restore_from_checkpoint(training.model)
    assert tree(backup.store.root) == before
