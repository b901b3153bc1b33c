"""obsinfra inside a Lightning Trainer, on scikit-learn's digits: metrics, alerts, and exact checkpoints.

pip install 'obsinfra[integrations,examples]'
python examples/lightning_callback.py            # stop it with Ctrl-C or kill, even kill -9, at any moment
python examples/lightning_callback.py            # goes on exactly where its last snapshot was

The first three classes are for your own code as they are. What Lightning has a state dict for goes through it
into obsinfra's store: weights, optimizers, schedules, callbacks, loops, the place in the data.
"""

import sys
import time
from pathlib import Path

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer
from obsinfra.backup.heir import wait_for_heir
from obsinfra.backup.retention import Retention
from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.monitoring.training_monitor import TrainingMonitor


class ObsinfraCheckpointIO(CheckpointIO):
    """Lightning's checkpoints in obsinfra's store: `trainer.save_checkpoint` only waits for a copy in memory.

    A process of its own writes what was copied, and commits the last snapshot should this process die.
    """

    def __init__(self, folder, keep_last=3, on_commit=lambda saved, requested_at: None):
        self.folder = Path(folder)
        self.checkpointer = create_checkpointer(folder, retention=Retention(keep_last=keep_last))
        self.on_commit = on_commit

    def newest(self):
        """What to give to `trainer.fit(ckpt_path=...)`: the newest sound checkpoint, or None."""
        wait_for_heir(self.folder, timeout=60)  # the writer of a run that was killed may still be at it
        backup = create_backup_system(self.folder)
        return str(backup.load().info.path) if backup.list() else None

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        taken = self.checkpointer.snapshot(
            checkpoint, step=checkpoint["global_step"], epoch=checkpoint["epoch"], wait=60
        )
        if taken and not (storage_options or {}).get("snapshot_only"):
            self.commit("regular", Path(path).name)

    def commit(self, kind, reason):
        asked_at = time.time()
        pending = self.checkpointer.commit(kind, reason)
        pending.add_done_callback(lambda done: self.on_commit(done.wait(), asked_at))

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return (
            create_backup_system(self.folder).load(Path(path)).state
        )  # every byte verified, nothing unpickled

    def remove_checkpoint(self, path):
        pass  # the writer prunes

    def teardown(self):
        self.checkpointer.close()


class ObsinfraCallback(L.Callback):
    """Snapshots and commits while Lightning trains, and its metrics and alerts on http://127.0.0.1:9464/.

    Give its `io` to `Trainer(plugins=[...])`, too.
    """

    def __init__(self, folder, model_name, snapshot_steps=10, commit_steps=100):
        self.snapshot_steps, self.commit_steps = snapshot_steps, commit_steps
        self.monitor = TrainingMonitor(model_name, run=Path(folder).name, disk_path=Path.cwd())
        self.io = ObsinfraCheckpointIO(folder, on_commit=self._committed)
        self._norm, self._global_step = None, 0

    def _committed(self, saved, requested_at):
        self.monitor.checkpoint_committed(
            kind=saved.kind,
            step=saved.step,
            requested_at=requested_at,
            bytes_total=saved.bytes_total,
            bytes_written=saved.bytes_written,
            path=str(saved.path),
        )

    def on_train_start(self, trainer, module):
        self.monitor.epochs, self.monitor.recorder.step = trainer.max_epochs, trainer.global_step
        self._global_step = trainer.global_step
        self.monitor.start_monitoring()
        self.monitor.set_state("running")

    def on_train_epoch_start(self, trainer, module):
        self.monitor.begin_epoch(trainer.current_epoch)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.monitor.recorder.begin_step()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        self._norm = nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.monitor.record(loss=outputs["loss"].detach(), grad_norm=self._norm, samples=len(batch[0]))
        self.monitor.recorder.end_step()
        if trainer.global_step == self._global_step:
            return  # gradients are still being accumulated; what is saved now would be half a step's
        self._global_step = trainer.global_step
        if trainer.global_step % self.commit_steps == 0:
            trainer.save_checkpoint(f"step {trainer.global_step}", weights_only=False)
        elif trainer.global_step % self.snapshot_steps == 0:
            trainer.save_checkpoint("", weights_only=False, storage_options={"snapshot_only": True})

    def on_train_epoch_end(self, trainer, module):
        self.monitor.end_epoch()

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint("end of training", weights_only=False)

    def on_exception(self, trainer, module, exception):
        if self.io.checkpointer.newest_step is not None:  # not the present state, which may be half a step's
            self.io.commit("emergency", type(exception).__name__)

    def teardown(self, trainer, module, stage):
        self.monitor.stop_monitoring()


class ResumableLoader:
    """Says where in the epoch it is, and goes on from there: Lightning asks any loader that has a state dict.

    It draws again the batches that were used and drops them, from the random state at the epoch's start.
    """

    def __init__(self, loader):
        self.loader = loader
        self.used, self.begun, self.resume = 0, None, None

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        state, self.resume = self.resume, None
        again = 0 if state is None or state["used"] == len(self) else state["used"]
        if state is not None:
            restore_rng_state(state["begun"] if again else state["now"])
        self.used, self.begun = again, capture_rng_state()
        iterator = iter(self.loader)
        for _ in range(again):
            next(iterator)
        if again:
            restore_rng_state(state["now"])
        for batch in iterator:
            self.used += 1
            yield batch

    def state_dict(self):
        return self.resume or {"used": self.used, "begun": self.begun, "now": capture_rng_state()}

    def load_state_dict(self, state):
        self.resume = state


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10)
        )

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.95)]


def main():
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target))
    training, held_out = (
        torch.utils.data.Subset(data, range(1437)),
        torch.utils.data.Subset(data, range(1437, 1797)),
    )
    L.seed_everything(0, verbose=False)
    obsinfra = ObsinfraCallback("runs/lightning/checkpoints", "digits")
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[obsinfra],
        plugins=[obsinfra.io],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = ResumableLoader(DataLoader(training, batch_size=32, shuffle=True))
    try:
        trainer.fit(Digits(), loader, DataLoader(held_out, batch_size=360), ckpt_path=obsinfra.io.newest())
    except SIGTERMException:
        print(f"stopped at step {trainer.global_step}")
        sys.exit(143)
    print(f"finished at epoch {trainer.current_epoch}, step {trainer.global_step}")


if __name__ == "__main__":
    main()
