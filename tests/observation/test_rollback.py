"""A rollback is exact: what follows is what a run resumed from there does, or the same behind that data."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.compare import differences
from obsinfra.control.command import Ack, new_command
from obsinfra.control.ledger import AckLedger
from obsinfra.errors import CheckpointError
from obsinfra.observation import ObservedRun, observe
from obsinfra.observation.rollback import read_rollbacks

EPOCHS, PER_EPOCH = 3, 4
ROWS = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
Plan = dict[int, tuple[str, dict[str, Any]]]
"""After how many steps of the loop, counted over all its courses, which command comes."""


class Loop:
    """A plain loop with dropout, momentum, a schedule and Python's own randomness, told what to do."""

    def __init__(self, loader: Iterable[Any], plan: Plan | None = None) -> None:
        torch.manual_seed(7)
        random.seed(7)
        self.loader, self.plan = loader, plan or {}
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=20)
        self.losses: list[float] = []
        self.inputs: list[Tensor] = []
        self.epochs: list[int] = []
        self.acks: list[Ack] = []

    def observe(self, output_dir: Path, run: str, **more: Any) -> ObservedRun:
        settings = {"disable_monitoring": True, "checkpoint_epochs": 0, **more}
        return observe(
            self.model, self.optimizer, scheduler=self.scheduler, output_dir=output_dir, run=run, **settings
        )

    def train(self, run: ObservedRun, *, in_epochs: bool = True) -> Loop:
        told: list[str] = []
        for epoch in run.epochs(EPOCHS) if in_epochs else range(EPOCHS):
            self.epochs.append(epoch)
            for batch in run.steps(self.loader):
                self.step(run, batch[0] if isinstance(batch, (list, tuple)) else batch)
                if (order := self.plan.get(len(self.losses))) is not None:
                    command = new_command(run.folder.id, order[0], source="test", reason="why", args=order[1])
                    run.channel.submit(command)
                    told.append(command.id)
        run.finish()
        acks = [AckLedger(run.folder.acks).last(id) for id in told]
        self.acks = [ack for ack in acks if ack is not None]
        return self

    def step(self, run: ObservedRun, inputs: Tensor) -> None:
        loss = (self.model(inputs) * random.uniform(0.5, 1.5) - 1).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        self.losses.append(loss.item())
        self.inputs.append(inputs)
        run.record(loss=loss, samples=len(inputs))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "python": str(random.getstate()),
            "torch": torch.get_rng_state(),
        }


def batches() -> list[Tensor]:
    return list(ROWS.split(3))


class Generated:
    """A new generator for each epoch, which draws from the global generator as it goes."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in batches():
            yield batch + torch.randn(3)


class OwnState:
    """Tells its own position, and would not give the used batches a second time."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < PER_EPOCH:
            self.at += 1
            yield batches()[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def shuffled() -> Iterable[Any]:
    return DataLoader(TensorDataset(ROWS), batch_size=3, shuffle=True)


def with_a_generator() -> Iterable[Any]:
    generator = torch.Generator().manual_seed(11)
    return DataLoader(TensorDataset(ROWS), batch_size=3, shuffle=True, generator=generator)


LOADERS = [batches, Generated, shuffled, with_a_generator, OwnState]
CHECKPOINT = ("checkpoint", {})


def undisturbed(tmp_path: Path, loader: Any = batches, *, in_epochs: bool = True) -> Loop:
    loop = Loop(loader())
    return loop.train(loop.observe(tmp_path, "whole", disable_backups=True), in_epochs=in_epochs)


def done(ack: Ack) -> dict[str, Any]:
    assert ack.state == "done", ack.error
    return dict(ack.result or {})


STRETCHES = [(2, 3), (4, 8), (2, 11), (7, 12), (4, 4)]
CASES = [(loader, stretch, True) for loader in LOADERS for stretch in STRETCHES]
CASES += [(loader, stretch, False) for loader in (Generated, OwnState) for stretch in STRETCHES]


@pytest.mark.parametrize(
    ("loader", "stretch", "in_epochs"),
    CASES,
    ids=lambda value: ("range", "epochs")[value] if isinstance(value, bool) else None,
)
def test_what_follows_is_what_an_undisturbed_run_does_from_there(
    tmp_path: Path, loader: Any, stretch: tuple[int, int], in_epochs: bool
) -> None:
    """Within an epoch, at its beginning and end, back into earlier ones, and after the very last step."""
    checkpoint, at = stretch
    whole = undisturbed(tmp_path, loader, in_epochs=in_epochs)
    plan: Plan = {checkpoint: CHECKPOINT, at: ("rollback", {})}
    if checkpoint == at:  # the one of this very step
        plan = {checkpoint: CHECKPOINT, at + 1: ("rollback", {"before_step": at})}
        at += 1
    back = Loop(loader(), plan)
    run = back.observe(tmp_path, "back")
    back.train(run, in_epochs=in_epochs)
    assert back.losses == whole.losses[:at] + whole.losses[checkpoint:]
    assert differences(back.state(), whole.state()) == []
    result = done(back.acks[-1])
    assert (result["from_step"], result["to_step"]) == (at, checkpoint)
    assert run.monitor.recorder.rework_until_step == at


def test_an_epoch_that_is_left_for_an_earlier_one_is_cut_short_and_done_again(tmp_path: Path) -> None:
    loop = Loop(batches(), {2: CHECKPOINT, 10: ("rollback", {})})
    loop.train(loop.observe(tmp_path, "r"))
    assert loop.epochs == [0, 1, 2, 0, 1, 2]
    assert len(loop.losses) == 10 + 12 - 2


@pytest.mark.parametrize("loader", [batches, OwnState, with_a_generator])
@pytest.mark.parametrize(("checkpoint", "at"), [(1, 3), (2, 6), (3, 9)])
def test_with_skip_the_state_goes_back_and_the_data_goes_on(
    tmp_path: Path, loader: Any, checkpoint: int, at: int
) -> None:
    whole = undisturbed(tmp_path, loader)
    loop = Loop(loader(), {checkpoint: CHECKPOINT, at: ("rollback", {"skip": True}), at + 1: CHECKPOINT})
    loop.train(loop.observe(tmp_path, "r"))
    assert done(loop.acks[1])["skipped_steps"] == at - checkpoint
    # The data of an undisturbed run, every batch once: what came before the checkpoint is not needed again.
    assert [x.tolist() for x in loop.inputs] == [x.tolist() for x in whole.inputs]
    assert done(loop.acks[2])["step"] == checkpoint + 1


def test_skip_more_passes_over_further_batches_but_not_over_the_end_of_the_epoch(tmp_path: Path) -> None:
    for more, following in ((1, [3, 4]), (9, [4, 5])):
        loop = Loop(batches(), {1: CHECKPOINT, 2: ("rollback", {"skip": True, "skip_more": more})})
        loop.train(loop.observe(tmp_path, f"r{more}"))
        order = [batches()[number % PER_EPOCH].tolist() for number in (0, 1, *following)]
        assert [x.tolist() for x in loop.inputs[:4]] == order


def test_a_restart_after_a_rollback_with_skip_does_not_repeat_the_data(tmp_path: Path) -> None:
    """The new position is durable before the rollback is acknowledged."""
    loop = Loop(OwnState(), {1: CHECKPOINT, 2: ("rollback", {"skip": True}), 3: ("stop", {})})
    loop.train(loop.observe(tmp_path, "r"))
    create_backup_system(tmp_path / "r" / "checkpoints").store.remove(
        Path(done(loop.acks[2])["checkpoint"])  # as if the process had been lost right after the rollback
    )
    again = Loop(OwnState())
    run = again.observe(tmp_path, "r", resume="r")
    assert run.step == 1
    again.train(run)
    assert again.inputs[0].tolist() == batches()[2].tolist()


def test_a_restart_goes_on_from_the_course_that_was_taken(tmp_path: Path) -> None:
    """The checkpoints that were left have higher steps, and are not the newest any more."""
    whole = undisturbed(tmp_path)
    plan: Plan = {
        2: CHECKPOINT,
        5: CHECKPOINT,
        6: ("emergency_checkpoint", {}),
        7: ("rollback", {"before_step": 4}),
        8: ("stop", {}),
    }
    loop = Loop(batches(), plan)
    loop.train(loop.observe(tmp_path, "r"))
    result = done(loop.acks[3])
    assert result["removed"] == 1 and (result["from_step"], result["to_step"]) == (7, 2)
    kept = create_backup_system(tmp_path / "r" / "checkpoints").list()
    assert [(found.step, found.kind) for found in kept] == [
        (2, "regular"),
        (3, "emergency"),  # by the stop
        (6, "emergency"),
        (7, "emergency"),  # what the rollback can be undone with
    ]
    again = Loop(batches())
    run = again.observe(tmp_path, "r", resume="r")
    assert run.step == 3
    again.train(run)
    assert loop.losses[:7] + loop.losses[7:8] + again.losses == whole.losses[:7] + whole.losses[2:]


def test_a_rollback_can_be_undone_also_after_a_restart(tmp_path: Path) -> None:
    whole = undisturbed(tmp_path)
    loop = Loop(batches(), {2: CHECKPOINT, 6: ("rollback", {}), 8: ("stop", {})})
    loop.train(loop.observe(tmp_path, "r"))
    action, name = done(loop.acks[1])["undo"].split(" checkpoint=")
    again = Loop(batches(), {1: (action, {"checkpoint": name}), 2: ("stop", {})})
    again.train(again.observe(tmp_path, "r", resume="r"))
    assert done(again.acks[0])["to_step"] == 6
    assert again.losses[1] == whole.losses[6]
    third = Loop(batches())
    third.train(third.observe(tmp_path, "r", resume="r"))
    assert third.losses == whole.losses[7:]
    assert [entry.to_step for entry in read_rollbacks(tmp_path / "r")] == [2, 6]


def test_a_damaged_checkpoint_is_passed_over_for_the_sound_one_before_it(tmp_path: Path) -> None:
    class Damaging(Loop):
        def step(self, run: ObservedRun, inputs: Tensor) -> None:
            super().step(run, inputs)
            if len(self.losses) == 6:
                run.keeper.settle()
                assert run.keeper.backup is not None
                older, newer = run.keeper.backup.list()
                digest = sorted(newer.chunks() - older.chunks())[0]
                path = run.keeper.backup.store.objects.path(digest)
                path.chmod(0o600)
                raw = bytearray(path.read_bytes())
                raw[len(raw) // 2] ^= 1
                path.write_bytes(raw)

    loop = Damaging(batches(), {2: CHECKPOINT, 4: CHECKPOINT, 6: ("rollback", {})})
    loop.train(loop.observe(tmp_path, "r"))
    result = done(loop.acks[2])
    assert result["to_step"] == 2
    assert len(result["passed_over"]) == 1 and result["passed_over"][0].startswith("000000000004-regular-")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "no sound checkpoint to go back to"),
        ({"checkpoint": "nonsense"}, "no checkpoint 'nonsense'"),
        ({"checkpoint": "/etc/passwd"}, "is of another run"),
        ({"before_step": 0}, "no sound checkpoint to go back to"),
    ],
)
def test_where_there_is_nothing_to_go_back_to_the_run_goes_on_untouched(
    tmp_path: Path, arguments: dict[str, Any], told: str
) -> None:
    whole = undisturbed(tmp_path)
    loop = Loop(batches(), {2: ("emergency_checkpoint", {}), 5: ("rollback", arguments)})
    run = loop.observe(tmp_path, "r")
    loop.train(run)
    assert loop.acks[1].state == "failed" and told in (loop.acks[1].error or "")
    assert loop.losses == whole.losses and not (run.folder.root / "rollbacks.json").exists()


def test_without_backups_a_rollback_says_so(tmp_path: Path) -> None:
    loop = Loop(batches(), {2: ("rollback", {})})
    loop.train(loop.observe(tmp_path, "r", disable_backups=True))
    assert "backups are disabled" in (loop.acks[0].error or "")


def test_a_run_that_went_through_nan_goes_back_and_on(tmp_path: Path) -> None:
    """With --on-nonfinite continue: the finite state of before is restored, and nothing remembers the NaN."""

    class Poisoned(Loop):
        def step(self, run: ObservedRun, inputs: Tensor) -> None:
            super().step(run, inputs)
            if len(self.losses) == 6:
                with torch.no_grad():
                    next(self.model.parameters()).fill_(float("nan"))
                run.record(loss=float("nan"))

    whole = undisturbed(tmp_path)
    loop = Poisoned(batches(), {4: CHECKPOINT, 7: ("rollback", {}), 8: CHECKPOINT})
    loop.train(loop.observe(tmp_path, "r", on_nonfinite="continue"))
    assert done(loop.acks[1])["to_step"] == 4
    assert loop.losses[7:] == whole.losses[4:]
    assert done(loop.acks[2])["from"] == "live state"


def test_an_unreadable_list_of_rollbacks_stops_a_resume_with_a_way_out(tmp_path: Path) -> None:
    loop = Loop(batches(), {2: CHECKPOINT, 4: ("stop", {})})
    loop.train(loop.observe(tmp_path, "r"))
    (tmp_path / "r" / "rollbacks.json").write_text('{"rollbacks": [{"from')
    with pytest.raises(CheckpointError, match=r"rollbacks\.json.*remove the file"):
        Loop(batches()).observe(tmp_path, "r", resume="r")
