"""The trainer: data, forward, backward, update, observe, obey. Read `Trainer.fit` first.

Uses nothing of the observation floor that a plain loop could not use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from obsinfra.backup.rng import seed_all
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import DataError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.observation.observed_run import ObservedRun, observe
from obsinfra.observation.resume import ResumePlan
from obsinfra.optimization.compilation import checkpoint_activations, compile_model
from obsinfra.optimization.precision import choose_device, choose_precision
from obsinfra.training.accumulation import MicroBatches
from obsinfra.training.best import BestTracker
from obsinfra.training.faults import Faults
from obsinfra.training.progress import Progress
from obsinfra.training.schedule import Schedule
from obsinfra.workloads.protocol import Workload


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Attributes:
        run_id, folder: which run.
        epoch, step: where it ended.
        validation: last validation metrics.
        best: best value of the workload's metric.
        stopped: why it ended early, if it did.
        exit_code: what the process should exit with.
    """

    run_id: str
    folder: Path
    epoch: int
    step: int
    validation: dict[str, float]
    best: float | None
    stopped: str | None
    exit_code: int


class Trainer:
    """Trains a workload under settings.

    Args:
        workload: what to train.
        settings: how; what is None there comes from `workload.defaults`.
        plan: where the run lives and what it resumes from; decided from the settings when None.

    Raises:
        ConfigError, DataError: settings or data that cannot work, before anything is written.
    """

    def __init__(self, workload: Workload, settings: Settings, plan: ResumePlan | None = None) -> None:
        defaults = workload.defaults
        self.workload, self.settings, self.plan = workload, settings, plan
        self.epochs = settings.epochs or defaults.epochs
        self.faults = Faults.parse(settings.inject)
        self.device = choose_device(settings.device, disable_gpu=settings.disable_gpu)
        self.precision = choose_precision(settings.precision, self.device, autocast_pays=defaults.autocast)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        seed_all(settings.seed)
        self.model = workload.build_model().to(self.device)
        if settings.gradient_checkpointing:
            checkpoint_activations(self.model)
        compile_model(self.model, settings.compile, self.device)
        self.batches = self.fresh_batches(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate or defaults.learning_rate,
            weight_decay=defaults.weight_decay if settings.weight_decay is None else settings.weight_decay,
            betas=defaults.betas,
            eps=defaults.eps,
            fused=True if self.device.type in ("cuda", "cpu") else None,
        )
        self.scaler = self.precision.scaler()
        self.schedule = Schedule(
            self.optimizer,
            settings.schedule or defaults.schedule,
            warmup_steps=defaults.warmup_steps if settings.warmup_steps is None else settings.warmup_steps,
            total_steps=self.epochs * len(self.batches),
            mode=defaults.mode,
        )
        self.best = BestTracker(defaults.mode, settings.patience)
        self.validate_every = (
            defaults.validate_every if settings.validate_every is None else settings.validate_every
        )
        self.log = get_logger("training")

    def fit(self, on_start: Callable[[ObservedRun], None] = lambda run: None) -> Outcome:
        """Train until the epochs are done, patience runs out, or somebody asks to stop.

        Args:
            on_start: called once with the run, restored and observed, before the first step.
        """
        with self.observe() as run:
            on_start(run)
            self.train(run)
        return Outcome(
            run_id=run.folder.id,
            folder=run.folder.root,
            epoch=run.position.epoch,
            step=run.step,
            validation=dict(run.monitor.validation),
            best=self.best.best,
            stopped=run.stop.reason if run.stop else None,
            exit_code=run.stop.exit_code if run.stop else 0,
        )

    def train(self, run: ObservedRun) -> None:
        """The loop."""
        self.stop_if_done(run, run.step)
        with Progress(run, self) as progress:
            for epoch in run.epochs(self.epochs):
                self.model.train()
                for micro_batches in run.steps(self.batches):
                    self.step(run, micro_batches)
                    progress.step()
                    self.stop_if_done(run, run.step + 1)
                if run.stop is None and self.validate_every and (epoch + 1) % self.validate_every == 0:
                    self.validate(run)
                progress.epoch()
                self.stop_if_done(run, run.step)
            if run.stop is None:
                run.checkpoint("final", reason="training finished")

    def stop_if_done(self, run: ObservedRun, steps: int) -> None:
        """Ask for a stop when `steps` are all that were wanted, or patience has run out."""
        if 0 < self.settings.max_steps <= steps:
            run.request_stop(f"--max-steps {self.settings.max_steps} reached")
        elif self.best.exhausted:
            run.request_stop(f"no better {self.workload.defaults.metric} in {self.best.bad} validations")

    def observe(self) -> ObservedRun:
        """The run around this trainer's model, restored from its checkpoint if it resumes."""
        run = observe(
            self.model,
            self.optimizer,
            model_name=self.workload.name,
            scheduler=self.schedule,
            scaler=self.scaler if self.scaler.is_enabled() else None,
            extra={"best": self.best},
            settings=self.settings,
            plan=self.plan,
            device=str(self.device),
            precision=self.precision.name,
        )
        self.log.info(
            "training",
            model=self.workload.name,
            parameters=sum(p.numel() for p in self.parameters),
            device=str(self.device),
            precision=self.precision.name,
            precision_reason=self.precision.reason,
            epochs=self.epochs,
            steps_per_epoch=len(self.batches),
            resumed_from_step=run.monitor.resumed_from_step,
            data=self.workload.describe_data(),
        )
        return run

    def step(self, run: ObservedRun, micro_batches: list[Any]) -> None:
        """One optimizer step over its micro-batches."""
        step, share = run.step, 1.0 / len(micro_batches)
        total: Tensor | None = None
        samples = 0
        metrics: dict[str, Any] = {}
        self.faults.before_forward(step)
        for batch in micro_batches:
            with run.phase("forward"):
                batch = to_device(batch, self.device)
                with self.precision.autocast():
                    output = self.workload.training_step(self.model, batch)
                loss = self.faults.on_loss(step, output.loss) * share
            with run.phase("backward"):
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total = loss.detach() if total is None else total + loss.detach()
            samples += output.samples
            metrics.update(output.metrics)
        with run.phase("optimizer"):
            self.faults.on_gradients(step, self.parameters)
            norm = self.update()
        run.record(
            loss=total,
            grad_norm=norm,
            samples=samples,
            learning_rate=self.schedule.learning_rate,
            **metrics,
        )
        run.monitor.recorder.loss_scale = self.scaler.get_scale()

    def update(self) -> Tensor | None:
        """Clip, step, schedule. Returns the gradient norm before clipping, None when the scaler skipped."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(self.parameters, self.settings.clip_norm or float("inf"))
        if self.scaler.is_enabled():
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.scaler.get_scale() < before
        else:
            # Only a run told to go on through non-finite steps pays for a look at the norm.
            skipped = self.settings.on_nonfinite == "continue" and not bool(torch.isfinite(norm))
            if not skipped:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if skipped and self.scaler.is_enabled():
            return None
        self.schedule.step()
        return norm

    def validate(self, run: ObservedRun) -> None:
        """Validate, remember the best, keep its model."""
        metric = self.workload.defaults.metric
        values: dict[str, float] = {}
        self.model.eval()
        with run.validation(), torch.inference_mode():
            values = self.workload.validate(self.model, self.device)
        self.model.train()
        if not values:
            return  # a stop interrupted it; the resumed run validates anew
        run.log_validation(values)
        self.schedule.validated(values[metric])
        if self.best.update(values[metric]):
            run.monitor.instruments.set(catalog.BEST_METRIC, values[metric])
            run.checkpoint("best", reason=f"best {metric}: {values[metric]:.6g}", wait=False)

    def fresh_batches(self, model: nn.Module) -> MicroBatches:
        """The training data from its beginning, for `model`."""
        settings = self.settings
        size = settings.batch_size or self.workload.defaults.batch_size
        batches = self.workload.train_batches(
            model,
            batch_size=size,
            seed=settings.seed,
            num_workers=settings.num_workers,
            device=self.device,
        )
        # A data set may also give what it has as one smaller batch; who asks for more does not mean that.
        if len(batches) == 0 or size > getattr(batches, "epoch_samples", size):
            raise DataError(
                f"the training data of {self.workload.name} gives no full batch of {size}",
                "at least one batch",
                "give more data or a smaller --batch-size",
            )
        return MicroBatches(batches, settings.accumulate)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch (tuples, lists, dicts) to `device`, without waiting."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
