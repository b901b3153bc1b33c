"""The trainer: data, forward, backward, update, observe, obey. Read `Trainer.fit` first.

Uses nothing of the observation floor that a plain loop could not use.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from obsinfra.backup.rng import capture_rng_state, restore_rng_state, seed_all
from obsinfra.catalog import metrics as catalog
from obsinfra.config.settings import Settings
from obsinfra.errors import DataError
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.observation.observed_run import ObservedRun, observe
from obsinfra.observation.ranks import Alone, Ranks
from obsinfra.observation.resume import ResumePlan
from obsinfra.optimization.gpu_optimizer import create_gpu_optimizer
from obsinfra.optimization.memory_layout import WantedLayout
from obsinfra.optimization.memory_optimizer import create_memory_optimizer
from obsinfra.optimization.micro_batching import Share, pieces, rows_of
from obsinfra.optimization.precision import kind_of
from obsinfra.training.accumulation import MicroBatches
from obsinfra.training.best import BestTracker
from obsinfra.training.faults import Faults
from obsinfra.training.late_exchange import LateDataParallel
from obsinfra.training.parallelism import check_alike, choose_parallelism
from obsinfra.training.progress import progress_of
from obsinfra.training.schedule import Schedule
from obsinfra.workloads.protocol import StepOutput, Workload

CHANNELS_LAST: dict[str, WantedLayout] = {"auto": "rule", "on": True, "off": False}


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


class Passes(NamedTuple):
    """What the forward passes of one step told: mean loss, samples and mean metrics."""

    loss: Tensor
    samples: int
    metrics: dict[str, Any]


class Trainer:
    """Trains a workload under settings.

    Args:
        workload: what to train.
        settings: how; what is None there comes from `workload.defaults`.
        plan: where the run lives and what it resumes from; decided from the settings when None.
        ranks: the processes that train together; None: this one alone.

    Raises:
        ConfigError, DataError: settings or data that cannot work, before anything is written.
    """

    def __init__(
        self,
        workload: Workload,
        settings: Settings,
        plan: ResumePlan | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        defaults = workload.defaults
        self.workload, self.settings, self.plan = workload, settings, plan
        self.epochs = settings.epochs or defaults.epochs
        self.faults = Faults.parse(settings.inject)
        recover = settings.oom_recovery == "on"
        self.parallel = choose_parallelism(ranks or Alone(), settings)
        self.gpu = create_gpu_optimizer(
            device=self.parallel.device_name(settings),
            disable_gpu=settings.disable_gpu,
            mixed_precision=settings.precision,
            autocast_pays=defaults.autocast,
            compile_model="off" if self.parallel.in_shards else settings.compile,
            compile_mode=settings.compile_mode,
            gradient_checkpointing=settings.gradient_checkpointing and settings.gradient_checkpointing_every,
            activation_budget_bytes=int(settings.activation_budget_mb * 1e6) or None,
            channels_last=CHANNELS_LAST[settings.channels_last],
            tf32=settings.tf32,
            attention=settings.attention,
            peak_flops=settings.device_tflops * 1e12,
        )
        self.device, self.precision = self.gpu.device, self.gpu.precision
        if settings.threads:
            torch.set_num_threads(settings.threads)
        if settings.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        seed_all(settings.seed)
        model = workload.build_model()
        self.model = self.gpu.optimize_model(model, workload.name, loss=self.loss_to_weigh(model))
        self.batches = self.fresh_batches(self.model)
        self.memory = create_memory_optimizer(
            settings.max_memory_percent,
            oom_recovery=recover or (settings.oom_recovery == "auto" and self.parallel.ranks.alone),
            micro_batch=settings.micro_batch,
            splittable=defaults.splittable,
            gc=settings.gc,
            leak_check_steps=settings.leak_check_steps,
            keep_freed_pages=settings.keep_freed_pages,
            device=self.device,
            agreement=self.parallel if isinstance(self.parallel, LateDataParallel) else None,
        )
        self.memory.optimize_for_training(self.model)
        hardware = {"device": kind_of(self.device), "precision": self.precision.name}
        check_alike(self.parallel.ranks, settings, workload, self.model, hardware)
        self.wrapped = self.parallel.wrap(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.gpu.create_optimizer(
            self.parameters,
            lr=settings.learning_rate or defaults.learning_rate,
            weight_decay=defaults.weight_decay if settings.weight_decay is None else settings.weight_decay,
            betas=defaults.betas,
            eps=defaults.eps,
        )
        self.scaler = self.gpu.create_scaler()
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
            with self.memory.watching(run.monitor, self.batch_size):
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
        with progress_of(run, self) as progress:
            for epoch in run.epochs(self.epochs):
                self.model.train()
                for micro_batches in run.steps(self.batches):
                    self.step(run, micro_batches)
                    progress.step()
                    self.stop_if_done(run, run.step + 1)
                whole = run.stop is None and not run.cut_short
                if whole and self.validate_every and (epoch + 1) % self.validate_every == 0:
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
            extra={"best": self.best, "micro_batching": self.memory.micro_batching},
            settings=self.settings,
            plan=self.plan,
            device=str(self.device),
            precision=self.precision.name,
            ranks=self.parallel.ranks,
        )
        run.after_step = self.memory.step_done
        self.gpu.watch(run.monitor)
        self.log.info(
            "training",
            model=self.workload.name,
            parameters=sum(p.numel() for p in self.parameters),
            device=str(self.device),
            precision=self.precision.name,
            precision_reason=self.precision.reason,
            ranks=self.parallel.ranks.size,
            epochs=self.epochs,
            steps_per_epoch=len(self.batches),
            resumed_from_step=run.monitor.resumed_from_step,
            data=self.workload.describe_data(),
        )
        return run

    def step(self, run: ObservedRun, batches: list[Any]) -> None:
        """One optimizer step over its batches."""
        step = run.step
        self.faults.before_forward(step)
        batches, part = self.parallel.opened(batches)
        passes = self.memory.run(step, batches, lambda shares: self.forward_backward(run, shares, part))
        with run.phase("optimizer"):
            self.faults.on_gradients(step, self.parameters)
            norm = self.update()
        if self.gpu.utilization.missing:
            self.count_flops(batches[0])
        run.record(
            loss=passes.loss,
            grad_norm=norm,
            samples=self.parallel.counted(passes.samples),
            learning_rate=self.schedule.learning_rate,
            **passes.metrics,
        )
        run.monitor.recorder.loss_scale = self.scaler.get_scale()

    def forward_backward(self, run: ObservedRun, shares: Sequence[Share], part: float = 1.0) -> Passes:
        """Forward and backward of every share of a step; gradients add up to those of the mean over its rows,
        times `part`: what this rank's rows count for in the mean over the ranks.

        Done again from the start when memory runs out, so it changes nothing but gradients, random states and
        buffers.
        """
        step, last = run.step, len(shares) - 1
        total: Tensor | None = None
        samples = 0
        metrics: dict[str, Any] = {}
        for number, (batch, weight, _) in enumerate(shares):
            with self.parallel.exchanging(self.wrapped, now=number == last):
                with run.phase("forward"):
                    batch = to_device(batch, self.device)
                    with self.gpu.autocast():
                        output = self.workload.training_step(self.wrapped, batch)
                    loss = self.faults.on_loss(step, output.loss)
                    if weight != 1.0:  # times one would be a node of the graph for nothing
                        loss = loss * weight
                with run.phase("backward"):
                    self.faults.before_backward(step, last=number == last)
                    scaled = loss if part == 1.0 else loss * part
                    if self.scaler.is_enabled():
                        scaled = self.scaler.scale(scaled)
                    run.monitor.recorder.add_own(self.parallel.backward(scaled))
            total = loss.detach() if total is None else total + loss.detach()
            samples += output.samples
            if last == 0:
                metrics = dict(output.metrics)
            else:
                for name, value in output.metrics.items():
                    metrics[name] = metrics.get(name, 0.0) + value * weight
        assert total is not None
        return Passes(total, samples, metrics)

    def count_flops(self, batch: Any) -> None:
        """Learn from a batch how many operations a sample takes: once, after the first step."""
        output: StepOutput | None = None

        def loss(model: nn.Module) -> Tensor:
            nonlocal output
            with self.gpu.autocast():
                output = self.workload.training_step(model, to_device(batch, self.device))
            return output.loss

        self.gpu.count_flops(
            None if self.parallel.in_shards else self.model,
            loss,
            samples=lambda: output.samples if output else 1,
            otherwise=self.workload.flops_per_sample(self.model),
        )

    def update(self) -> Tensor | None:
        """Clip, step, schedule. Returns the gradient norm before clipping, None when the scaler skipped."""
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        norm = self.parallel.clip(self.parameters, self.settings.clip_norm or float("inf"))
        if self.scaler.is_enabled():
            before = self.scaler.skipped_steps
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped = self.scaler.skipped_steps > before
        else:
            # Only a run told to go on through non-finite steps pays for a look at the norm.
            skipped = self.settings.on_nonfinite == "continue" and not bool(torch.isfinite(norm))
            if not skipped:
                self.optimizer.step()
        for parameter in self.parameters:  # as zero_grad does, without its mark for torch's profiler
            parameter.grad = None
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
            values = self.parallel.agreed(self.workload.validate(self.model, self.device))
        self.model.train()
        if not values:
            return  # a stop interrupted it; the resumed run validates anew
        run.log_validation(values)
        self.schedule.validated(values[metric])
        if self.best.update(values[metric]):
            run.monitor.instruments.set(catalog.BEST_METRIC, values[metric])
            run.checkpoint("best", reason=f"best {metric}: {values[metric]:.6g}", wait=False)

    def loss_to_weigh(self, model: nn.Module) -> Callable[[nn.Module], Tensor] | None:
        """The forward pass of the first micro-batch, for a budget of activations; None without one."""
        if not self.settings.activation_budget_mb:
            return None
        rng = capture_rng_state()
        try:
            batch = next(iter(self.fresh_batches(copy.deepcopy(model).to(self.device))))[0]
        finally:
            restore_rng_state(rng)
        rows, limit = rows_of(batch), self.settings.micro_batch
        if rows is not None and limit is not None and self.workload.defaults.splittable:
            batch, _ = next(pieces(batch, rows, min(rows, limit)))
        return lambda twin: self.workload.training_step(twin, to_device(batch, self.device)).loss

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return self.settings.batch_size or self.workload.defaults.batch_size

    def fresh_batches(self, model: nn.Module) -> MicroBatches:
        """The training data from its beginning, for `model`."""
        settings = self.settings
        size = self.batch_size
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
        return MicroBatches(self.parallel.divide(batches, self.workload.name), settings.accumulate)


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a nested batch (tuples, lists, dicts) to `device`, without waiting."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*[to_device(value, device) for value in batch])
    if isinstance(batch, (list, tuple)):
        return type(batch)([to_device(value, device) for value in batch])
    return batch
