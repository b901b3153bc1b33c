"""create_gpu_optimizer: the hardware choices of a training in one object.

The trainer is built on it; so may any loop be (docs/gpu.md). Each choice is made in a module of its own; here
they are put together, logged and exported. For several ranks the trainer wraps by itself, afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError, first_line
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.monitoring.sample import Sample
from obsinfra.monitoring.training_monitor import TrainingMonitor
from obsinfra.optimization.activation_checkpointing import Checkpointing, checkpoint_activations
from obsinfra.optimization.arguments import flag, function, number, one_of, shown, whole_number
from obsinfra.optimization.attention_kernels import Kernel, use_attention
from obsinfra.optimization.batch_size import BatchSizes, find_batch_size
from obsinfra.optimization.bottleneck import UtilizationReport, monitor_gpu_utilization
from obsinfra.optimization.compilation import Compilation, Mode, Wanted, compile_model
from obsinfra.optimization.cpu_threads import ThreadTuning, tune_threads
from obsinfra.optimization.device_peaks import peak_of
from obsinfra.optimization.float32_matmul import allow_tf32, tf32_allowed
from obsinfra.optimization.flops import Flops, Utilization, count_flops
from obsinfra.optimization.fused_optimizers import create_optimizer, sparse_weights
from obsinfra.optimization.inference import InferenceModel, optimize_for_inference
from obsinfra.optimization.memory_layout import Layout, WantedLayout, choose_layout
from obsinfra.optimization.model_checks import check_has_values, check_loss, copied
from obsinfra.optimization.precision import CountingScaler, Precision, choose_devices, choose_precision
from obsinfra.optimization.wrapping import Compression, Parallel, Wrapping, device_of_rank, local_rank

Module = TypeVar("Module", bound=nn.Module)
Loss = Callable[[nn.Module], Tensor]

COMPILE_SECONDS = 300.0
"""What a first step with a compiler in it may take before it counts as slow."""


class GpuOptimizer:
    """Hardware choices, made. `create_gpu_optimizer` makes it.

    Attributes:
        device: where to train.
        devices: all that were named; they are of one architecture.
        precision: of autocast, and why.
        compilations: by model name, what became of compiling it.
        checkpointing, layouts: by model name, which blocks are recomputed; channels first or last.
        process_wide: what was chosen for the whole process, in words.
        utilization: MFU and HFU, once the operations of a sample are known.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        precision: Precision,
        *,
        compile_model: Wanted | bool,
        compile_mode: Mode,
        gradient_checkpointing: int,
        activation_budget_bytes: int | None,
        channels_last: WantedLayout,
        tf32: bool,
        attention: Kernel,
        peak_flops: float | None,
        wrapping: Wrapping,
    ) -> None:
        self.devices, self.device = tuple(devices), devices[0]
        self.precision = precision
        self.compilations: dict[str, Compilation] = {}
        self.checkpointing: dict[str, Checkpointing] = {}
        self.layouts: dict[str, Layout] = {}
        self._scalers: list[CountingScaler] = []
        self.process_wide = {"tf32": allow_tf32(tf32, self.device), "attention": use_attention(attention)}
        self.utilization = self._utilization(peak_flops)
        self._compile: tuple[Wanted | bool, Mode] = (compile_model, compile_mode)
        self._channels_last = channels_last
        self._wrapping = wrapping
        self._recompute_every, self._activation_budget = gradient_checkpointing, activation_budget_bytes
        self._sparse: Any = WeakIdKeyDictionary()
        self._monitor: TrainingMonitor | None = None
        self._log = get_logger("training")

    def optimize_model(self, model: Module, name: str = "model", *, loss: Loss | None = None) -> Module:
        """Put a model onto the device and make it fast: layout, activation checkpointing, compilation; with
        `parallel`, wrap it for the ranks, which is a collective of all of them.

        Args:
            model: changed in place; names of parameters and state_dict stay.
            name: for logs and `compilations`.
            loss: its forward pass of one batch, for what is chosen by trying: the layout, and blocks to
                recompute by a budget.

        Returns:
            `model`, with parallel="ddp" in torch's DistributedDataParallel. Make the optimizer from what is
            returned: of a model in parts, from the parts.

        Raises:
            ConfigError: what was asked for does not work with this model; it says which.
            RanksDifferError: another rank has another model, or cannot wrap its own.
        """
        self._wrapping.check_group()
        check_has_values(model)
        if not isinstance(name, str):
            raise ConfigError(f"a model's name {shown(name)}", "text", "correct it")
        if loss is not None:
            function("loss", loss, "lambda model: loss_of(model(inputs))")
        model = model.to(self.device)
        in_precision = None if loss is None else self._autocasting(loss)
        layout = choose_layout(
            model,
            # The clocks of ranks could choose differently.
            "rule" if self._channels_last == "auto" and self._wrapping.on else self._channels_last,
            self.device,
            half=self.precision.name != "fp32",
            loss=in_precision,
        )
        if self._recompute_every or self._activation_budget is not None:
            self.checkpointing[name] = checkpoint_activations(
                model,
                every=self._recompute_every or 1,
                budget_bytes=self._activation_budget,
                loss=in_precision,
            )
        wanted, mode = self._compile
        if self._wrapping.in_parts:
            compilation = Compilation("off: ranks have parts of the model")
        else:
            compilation = compile_model(model, wanted, self.device, mode=mode)
        wrapped = self._wrapping.wrap(model)
        self.compilations[name], self.layouts[name] = compilation, layout
        self._note_sparse(model)
        if self._monitor is not None:
            self._tell(name)
        return cast(Module, wrapped)  # who calls it need not know of DDP's wrapper

    @property
    def data_part(self) -> tuple[int, int]:
        """Which part of the data is this rank's, from 0, and of how many: ranks that divide the layers of a
        model have the same.

        Raises:
            ConfigError: there is no process group, or `tensor_parallel_size` does not divide the ranks.
        """
        return self._wrapping.data_part()

    def decisions(self, name: str = "model") -> dict[str, Any]:
        """What was chosen for a model and the process, in words.

        Raises:
            ConfigError: no model of that name was optimized.
        """
        if not isinstance(name, str) or name not in self.layouts:
            known = ", ".join(self.layouts) or "none yet"
            raise ConfigError(
                f"decisions about a model {name!r}", f"one optimized before: {known}", "correct it"
            )
        layout, mode = self.layouts[name], self._compile[1]
        return {
            "device": str(self.device),
            "precision": f"{self.precision.name}: {self.precision.reason}",
            "compiled": self.compilations[name].reason or f"at the first call, mode {mode}",
            "channels_last": f"{'yes' if layout.channels_last else 'no'}: {layout.reason}",
            "parallel": self._wrapping.told,
            "recomputed_blocks": self.checkpointing[name].recomputed if name in self.checkpointing else (),
            **self.process_wide,
        }

    def _tell(self, name: str) -> None:
        self._log.info("model_optimized", name=name, **self.decisions(name))

    def create_optimizer(
        self,
        parameters: Iterable[Any],
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer, in one kernel for all parameters where torch has that for this device.

        Not in one where a model given to `optimize_model` has an embedding with sparse gradients among them.

        Args:
            parameters: tensors or parameter groups.
            kind: class of the optimizer.
            options: its own.

        Raises:
            ConfigError: no parameters, an option the class does not have or take, or a sparse gradient it
                does not take; of a model not seen by `optimize_model` at the first step.
        """
        optimizer, how = create_optimizer(kind, parameters, self.device, self._sparse, **options)
        log = self._log.info if self._sparse and how != "fused" else self._log.debug
        log("optimizer_made", kind=type(optimizer).__name__, how=how)
        return optimizer

    def _note_sparse(self, model: nn.Module) -> None:
        for name, weight in sparse_weights(model):
            self._sparse[weight] = name

    def create_scaler(self) -> CountingScaler:
        """A gradient scaler for fp16; under other precisions one that passes everything through."""
        self._scalers.append(scaler := self.precision.scaler())
        return scaler

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that the scalers made here left out."""
        return sum(scaler.skipped_steps for scaler in self._scalers)

    def autocast(self) -> AbstractContextManager[object]:
        """Context of a forward pass in the chosen precision."""
        return self.precision.autocast()

    def count_flops(
        self,
        model: nn.Module | None,
        loss: Loss,
        *,
        samples: Callable[[], int],
        otherwise: float | None = None,
    ) -> None:
        """Learn how many operations a sample takes, for MFU and HFU; logs it, or why it is not known.

        Args:
            model: as `optimize_model` left it; None: one that cannot be copied, as ranks have parts of it.
            loss: the forward pass of one batch; called with a copy of the model that has no values.
            samples: how many were in that batch, asked once `loss` was called.
            otherwise: operations of a sample by a formula, where they cannot be counted.
        """
        problem = None
        self.utilization.asked = True
        if isinstance(model, DistributedDataParallel):
            model = model.module
        try:
            if model is None or self._wrapping.in_parts:
                raise ValueError("ranks have parts of the model")
            found: Flops | None = count_flops(model, loss).per(samples())
        except Exception as error:  # a figure is missing then; no training may end for it
            problem = f"{type(error).__name__}: {first_line(error, 200)}"
            found = None if otherwise is None else Flops(otherwise, otherwise, "the workload's formula")
        if found is None:
            self._log.info("flops_unknown", problem=problem, then="no MFU")
            return
        self.utilization.per_sample = found
        self._log.info(
            "flops_counted",
            model_gflops_per_sample=round(found.model / 1e9, 6),
            hardware_gflops_per_sample=round(found.hardware / 1e9, 6),
            source=found.source,
            peak_tflops=self.utilization.peak and self.utilization.peak / 1e12,
            peak_source=self.utilization.peak_reason,
            not_counted_because=problem,
        )

    def find_batch_size(
        self,
        model: nn.Module,
        loss: Callable[[nn.Module, int], Tensor],
        kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        **bounds: Any,
    ) -> BatchSizes:
        """The largest batch that fits and the fastest, by whole training steps of a copy of the model.

        Args:
            model: untouched; a copy is trained, uncompiled.
            loss: the forward pass with so many rows; it must have them: `last` is the most it is asked for.
            kind: class of the optimizer.
            bounds: those of `batch_size.find_batch_size`.

        Raises:
            ConfigError: not even the smallest batch fits, a bound that is none, or ranks share the model.
        """
        function("loss", loss, "lambda model, rows: loss_of(model(inputs[:rows]))")
        if self._wrapping.on:
            raise ConfigError(
                f"find_batch_size with parallel {self._wrapping.parallel!r}",
                "a model that this process can copy and train alone",
                "find it with an optimizer of its own, made without parallel",
            )
        twin = copied(model)
        self._note_sparse(twin)
        optimizer = self.create_optimizer(twin.parameters(), kind)
        scaler = self.precision.scaler()

        def step(rows: int) -> None:
            optimizer.zero_grad(set_to_none=True)  # first: a step that ran out of memory left some behind
            with self.autocast():
                result = check_loss(loss(twin, rows))
            scaler.scale(result).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()

        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return find_batch_size(step, self.device, **bounds)

    def tune_threads(self, step: Callable[[], object], **options: Any) -> ThreadTuning | None:
        """Find the number of threads a step on the CPU is fastest with; see `cpu_threads.tune_threads`.

        Returns:
            What was found; None on another device, where it does not apply: a log line says so.
        """
        if self.device.type != "cpu":
            self._log.info("threads_not_tuned", reason=f"steps run on {self.device}, not on the CPU")
            return None
        return tune_threads(step, **options)

    def monitor_gpu_utilization(self, duration: float, *, interval: float = 0.1) -> UtilizationReport:
        """Watch utilisation, memory, power and temperature of each GPU, and say what bounds the training.

        Waits for `duration` seconds: call it on a thread beside the loop. Exported once `watch` was called.

        Raises:
            ConfigError: a duration that is none.
        """
        monitor = self._monitor
        report = monitor_gpu_utilization(
            duration,
            monitor.recorder if monitor else None,
            mfu=lambda: monitor.present_value(catalog.MFU_RATIO) if monitor else None,
            interval=interval,
        )
        if monitor is not None:
            report.export(monitor.instruments)
        return report

    def optimize_for_inference(
        self, model: nn.Module, example: Tensor | tuple[Any, ...], **options: Any
    ) -> InferenceModel:
        """Give a trained model to every inference engine and keep the fastest that agrees with it.

        Args:
            model: moved to the device; otherwise it stays as it is.
            example: its inputs, of the shapes that will come.
            options: those of `inference.optimize_for_inference`.

        Raises:
            ConfigError: an unknown engine, none of those named takes the model, or ranks have parts of it.
        """
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif self._wrapping.in_parts:
            raise ConfigError(
                "optimize_for_inference of a model of which ranks have parts",
                "a whole one",
                "load its checkpoint into a model of one process",
            )
        check_has_values(model)
        if any(leaf.is_meta for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)):
            raise ConfigError(
                "an example on the meta device, without values", "inputs with values", "torch.ones(…)"
            )
        example = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), example)
        made = optimize_for_inference(model.to(self.device), example, **options)
        if self._monitor is not None:
            made.watch(self._monitor)
        return made

    def watch(self, monitor: TrainingMonitor) -> None:
        """Export through `monitor` what is known here, at each of its scrapes. A first step that
        compiles a model is not called slow before `COMPILE_SECONDS`."""
        if not isinstance(monitor, TrainingMonitor):
            raise ConfigError(f"a monitor {shown(monitor)}", "a TrainingMonitor", "give run.monitor")
        self._monitor = monitor
        if any(compilation.reason is None for compilation in self.compilations.values()):
            monitor.recorder.first_step_allowance = COMPILE_SECONDS
        for name in self.compilations:
            self._tell(name)
        monitor.add_source(self.samples)

    def samples(self) -> list[Sample]:
        """Metrics of compilation, scaler and utilisation as of now."""
        counted: dict[tuple[str, tuple[str, ...]], Sample] = {}
        for compilation in [*self.compilations.values()] or [Compilation("nothing compiled")]:
            for sample in compilation.samples():
                key = (sample.metric.name, tuple(sample.labels.values()))
                before = counted[key].value if key in counted else 0.0
                # Graph breaks are the process's: several models have seen the same ones.
                of_process = sample.metric is catalog.COMPILE_GRAPH_BREAKS
                total = max(before, sample.value) if of_process else before + sample.value
                counted[key] = sample._replace(value=total)
        return [
            *counted.values(),
            Sample(catalog.SCALER_SKIPPED_STEPS, {}, float(self.skipped_steps)),
            *(self.utilization.samples(self._monitor.recorder) if self._monitor else ()),
        ]

    def _autocasting(self, loss: Loss) -> Loss:
        def run(model: nn.Module) -> Tensor:
            with self.autocast():
                return check_loss(loss(model))

        return run

    def _utilization(self, peak_flops: float | None) -> Utilization:
        if peak_flops:
            return Utilization(peak_flops, "as given")
        peak, reason = peak_of(self.device)
        if peak is None:
            return Utilization(None, reason)
        flops = peak.flops(self.precision.name, tf32=tf32_allowed())
        if flops is None:
            return Utilization(None, f"{reason}, which has no native {self.precision.name}")
        return Utilization(flops, reason)


def create_gpu_optimizer(
    device_ids: Sequence[int] | None = None,
    mixed_precision: bool | str = True,
    compile_model: Wanted | bool = "auto",
    *,
    device: str = "auto",
    disable_gpu: bool = False,
    compile_mode: Mode = "default",
    gradient_checkpointing: bool | int = False,
    activation_budget_bytes: int | None = None,
    channels_last: WantedLayout = "auto",
    tf32: bool = True,
    attention: Kernel = "auto",
    peak_flops: float | None = None,
    autocast_pays: bool = True,
    parallel: Parallel = "off",
    shard_size: int | None = None,
    tensor_parallel_size: int | None = None,
    fsdp_offload: bool = False,
    gradient_compression: Compression = "off",
) -> GpuOptimizer:
    """Choose how to use the hardware. Works without a GPU: what does not apply is said, not an error.

    Args:
        device_ids: CUDA devices to use, the first for this process, with `parallel` that of its number on the
            host; None: `device`.
        mixed_precision: True: what the hardware computes natively; False: fp32; or `bf16`, `fp16`, `fp32`.
        compile_model: `auto` compiles on CUDA, and goes on eagerly where that fails; True or `on`: it must
            work; False or `off`.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; not together with `device_ids`.
        disable_gpu: `auto` means the CPU.
        compile_mode: of torch.compile.
        gradient_checkpointing: recompute the activations of every block (True, 1), or every Nth (N).
        activation_budget_bytes: or of as few as are needed to stay below this.
        channels_last: layout of images: True, False, `auto` (where it pays) or `rule` (likewise, unmeasured).
        tf32: let fp32 products on CUDA use tensor cores. For the whole process, as is the next.
        attention: kernel of scaled_dot_product_attention: `auto`, `flash`, `efficient`, `cudnn`, `math`.
        peak_flops: FLOP/s of the device in the precision in use, for the MFU, where its data sheet is not
            known here.
        autocast_pays: False keeps fp32 where the precision is not named.
        parallel: how the ranks of torch's process group share a model: `ddp`: whole on each; `fsdp`: a part
            on each (FSDP2); `hsdp`: whole once per `shard_size` neighbouring ranks; `tp`: a part on each
            of the layers that its `tensor_parallel_plan` names; `off`: each has its own.
        shard_size: of hsdp; None: the ranks of a host.
        tensor_parallel_size: neighbouring ranks that divide layers and compute the same batch: of tp, None:
            the ranks of a host; of fsdp and hsdp, None: none do. `shard_size` counts such groups then.
        fsdp_offload: of fsdp and hsdp: keep the parts in host memory between their uses.
        gradient_compression: of ddp: gradients travel as `bf16`, `fp16`, or by `powersgd`.

    Raises:
        ConfigError: a device that is not there or is named twice, devices of several architectures, an
            unknown precision, a value out of its range, or choices that do not go together.
    """
    one_of("compile_model", compile_model, (True, False, "auto", "on", "off"))
    one_of("compile_mode", compile_mode, get_args(Mode))
    one_of("channels_last", channels_last, (True, False, "auto", "rule"))
    for name, value in (("disable_gpu", disable_gpu), ("tf32", tf32), ("autocast_pays", autocast_pays)):
        flag(name, value)
    if not isinstance(gradient_checkpointing, bool):
        whole_number("gradient_checkpointing", gradient_checkpointing, least=0)
    if activation_budget_bytes is not None:
        whole_number("activation_budget_bytes", activation_budget_bytes, least=1)
    if peak_flops is not None:
        number("peak_flops", peak_flops, least=0)
    one_of("parallel", parallel, get_args(Parallel))
    one_of("gradient_compression", gradient_compression, get_args(Compression))
    flag("fsdp_offload", fsdp_offload)
    if shard_size is not None:
        whole_number("shard_size", shard_size, least=1)
    if tensor_parallel_size is not None:
        whole_number("tensor_parallel_size", tensor_parallel_size, least=1)
    wrapping = Wrapping(parallel, shard_size, tensor_parallel_size, fsdp_offload, gradient_compression)
    if wrapping.in_parts and (compile_model is True or compile_model == "on"):
        raise ConfigError(
            f"compile_model {compile_model!r} with parallel {parallel!r}",
            "one or the other: the whole model is compiled as one graph before it is divided",
            "drop one of them",
        )
    if wrapping.on and device_ids is None:
        device = device_of_rank(device, disable_gpu=disable_gpu)
    devices = choose_devices(device_ids, device, disable_gpu=disable_gpu)
    if wrapping.on and len(devices) > 1:
        devices = _own_first(devices)
    if isinstance(mixed_precision, bool):
        mixed_precision = "auto" if mixed_precision else "fp32"
    return GpuOptimizer(
        devices,
        choose_precision(mixed_precision, devices[0], autocast_pays=autocast_pays),
        compile_model=compile_model,
        compile_mode=compile_mode,
        gradient_checkpointing=int(gradient_checkpointing),
        activation_budget_bytes=activation_budget_bytes,
        channels_last=channels_last,
        tf32=tf32,
        attention=attention,
        peak_flops=peak_flops,
        wrapping=wrapping,
    )


def _own_first(devices: tuple[torch.device, ...]) -> tuple[torch.device, ...]:
    """That of this rank's number on its host, then the others."""
    number = local_rank() or 0
    if number >= len(devices):
        raise ConfigError(
            f"device ids {[device.index for device in devices]} on rank {number} of its host",
            "a device for each rank of a host",
            "name more devices, or start fewer ranks",
        )
    return (devices[number], *devices[:number], *devices[number + 1 :])
