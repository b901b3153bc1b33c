"""What the GPU optimiser is worth: precision, compilation, checkpointing, MFU, and what observing costs.

    python benchmarks/bench_gpu.py [--device auto] [--size 124m] [--rounds 7] [--steps 10] [--parts a,b,…]

Every part is byte_gpt on random bytes of its own shape, AdamW and clipping included; whatever is compared is
timed in turns in one process. Parts:

    precision        fp32, mixed, mixed and compiled; MFU and HFU
    checkpointing    memory and time
    attention        its kernels
    layout           channels last, for convolutions
    threads          on a CPU
    syncs            waits for the device in steady-state steps of an observed loop
    instrumentation  the observed loop against the bare one
    snapshots        what a checkpoint costs the loop, and steps while it is written
    inference        engines

A line beginning with "goal" says what was aimed at. On a CPU the same code runs, smaller by default, and says
what does not apply.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from machine import processor_name
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

import obsinfra
from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import configure_logging
from obsinfra.optimization.attention_kernels import measure_attention
from obsinfra.optimization.compilation import Wanted
from obsinfra.optimization.gpu_optimizer import GpuOptimizer, create_gpu_optimizer
from obsinfra.optimization.memory_profiler import MemoryProfiler
from obsinfra.optimization.timing import time_in_turns, wait_for_device
from obsinfra.workloads.byte_gpt import BYTES, SIZES, ByteGPT, Shape

Step = Callable[[], Tensor]


class Bench:
    """One shape on one device."""

    def __init__(
        self, device: torch.device, shape: Shape, rounds: int, steps: int, *, compile_model: bool
    ) -> None:
        self.device, self.shape, self.rounds, self.steps = device, shape, rounds, steps
        self.compile: Wanted = "auto" if compile_model else "off"
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(BYTES, (shape.batch_size, shape.context + 1), generator=generator)
        self.windows = windows.to(device)
        self.gpu = self.optimizer()

    def optimizer(self, **choices: object) -> GpuOptimizer:
        usual: dict[str, object] = {"device": str(self.device), "compile_model": "off"}
        return create_gpu_optimizer(**{**usual, **choices})  # type: ignore[arg-type]

    def loss(self, model: nn.Module) -> Tensor:
        logits = model(self.windows[:, :-1]).float()
        return functional.cross_entropy(logits.flatten(0, 1), self.windows[:, 1:].flatten())

    def step(self, gpu: GpuOptimizer) -> tuple[nn.Module, Step, torch.optim.Optimizer]:
        """A model as `gpu` makes it, and one whole training step of it."""
        torch.manual_seed(0)
        model = gpu.optimize_model(ByteGPT(self.shape), loss=self.loss)
        optimizer = gpu.create_optimizer(model.parameters(), lr=1e-4)
        parameters = list(model.parameters())

        def step() -> Tensor:
            with gpu.autocast():
                loss = self.loss(model)
            loss.backward()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return model, step, optimizer

    # ---- parts -----------------------------------------------------------------------------------

    def precision(self) -> None:
        """fp32, mixed, compiled: step time, speed-up, MFU."""
        variants = {
            "fp32": self.optimizer(mixed_precision=False, tf32=False),
            "mixed": self.gpu,
        }
        if self.device.type == "cuda":
            variants["fp32, TF32"] = self.optimizer(mixed_precision=False, tf32=True)
        if self.compile != "off":
            variants["mixed, compiled"] = self.optimizer(compile_model="on")
        # TF32 belongs to the process: each variant sets its own before its turn.
        calls, models = {}, {}
        for name, gpu in variants.items():
            models[name], step, _ = self.step(gpu)
            calls[name] = self.with_tf32(step, on=name != "fp32")
        times = time_in_turns(calls, self.device, rounds=self.rounds, warm_up=3)
        flops = self.flops(models["mixed"])
        print(f"precision of mixed: {self.gpu.precision.name} ({self.gpu.precision.reason})")
        for name, timing in times.items():
            rate = self.shape.batch_size / timing.median
            line = (
                f"{name:16} {timing.median * 1e3:9.2f} ms/step  "
                f"×{times['fp32'].median / timing.median:5.2f} as fast as fp32  "
                f"{rate * self.shape.context:12,.0f} bytes/s  {flops[0] * rate / 1e12:8.3f} model TFLOP/s"
            )
            peak = variants[name].utilization.peak
            if peak:
                line += f"  MFU {flops[0] * rate / peak:6.1%}  HFU {flops[1] * rate / peak:6.1%}"
            print(line)
        if "mixed, compiled" in variants:
            found = variants["mixed, compiled"].compilations["model"]
            print(
                f"compiled: {found.graphs} graphs in {found.seconds:.1f} s, {found.graph_breaks} graph "
                f"breaks, {found.recompiles} recompiles, fallbacks {found.fallbacks}"
            )
        print(f"peak: {self.gpu.utilization.peak_reason}")
        print("goal: MFU of 124m ≥ 45 % on an H100 in bf16 with compile")

    def with_tf32(self, step: Step, *, on: bool) -> Step:
        if self.device.type != "cuda":
            return step

        def run() -> Tensor:
            torch.set_float32_matmul_precision("high" if on else "highest")
            return step()

        return run

    def flops(self, model: nn.Module) -> tuple[float, float]:
        """Of a sample: needed, executed."""
        self.gpu.count_flops(model, self.loss, samples=lambda: self.shape.batch_size)
        found = self.gpu.utilization.per_sample
        assert found is not None, "byte_gpt can be counted"
        return found.model, found.hardware

    def checkpointing(self) -> None:
        """Peak memory and step time with no, every second, every block recomputed, and by a budget."""
        kept = self.kept_bytes(ByteGPT(self.shape).to(self.device))
        variants = {
            "none": self.gpu,
            "every 2nd block": self.optimizer(gradient_checkpointing=2),
            "every block": self.optimizer(gradient_checkpointing=True),
            "half the budget": self.optimizer(activation_budget_bytes=kept // 2),
        }
        made = {name: self.step(gpu) for name, gpu in variants.items()}
        times = time_in_turns(
            {name: step for name, (_, step, _) in made.items()}, self.device, rounds=self.rounds, warm_up=2
        )
        on_cuda = self.device.type == "cuda"
        print("memory:", "allocated at most, beyond what stays" if on_cuda else "kept for the backward pass")
        peaks = {}
        for name, (model, step, _) in made.items():
            peaks[name] = self.peak_bytes(step) if on_cuda else self.kept_bytes(model)
        for name, peak in peaks.items():
            blocks = variants[name].checkpointing.get("model")
            print(
                f"{name:16} {peak / 1e6:10.1f} MB  {1 - peak / peaks['none']:6.1%} saved  "
                f"{times[name].median * 1e3:9.2f} ms/step  "
                f"×{times[name].median / times['none'].median:5.2f} the time of none"
                + (f"  blocks {list(blocks.recomputed)} of {blocks.blocks}" if blocks else "")
            )

    def peak_bytes(self, step: Step) -> int:
        """Allocated at most in a step, less what is allocated before it."""
        wait_for_device(self.device)
        with MemoryProfiler().block("step") as profile:
            step()
            wait_for_device(self.device)
        found = next(d for d in profile.devices if d.device == (self.device.index or 0))
        return found.allocated_peak - found.allocated_before

    def kept_bytes(self, model: nn.Module) -> int:
        """Bytes that autograd keeps between forward and backward pass, parameters left out."""
        mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in mine:
                kept[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), self.gpu.autocast():
            self.loss(model)
        return sum(storage.nbytes() for storage in kept.values())

    def attention(self) -> None:
        """Forward and backward pass of each kernel on the model's own shape."""
        shape = self.shape
        dims = (shape.batch_size, shape.heads, shape.context, shape.width // shape.heads)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.gpu.precision.name, torch.float32)
        found = measure_attention(dims, self.device, dtype, rounds=self.rounds)
        for name, seconds in sorted(found.seconds.items(), key=lambda item: item[1]):
            print(f"{name:16} {seconds * 1e3:9.3f} ms")
        for name, problem in found.refused.items():
            print(f"{name:16} does not apply: {problem}")

    def layout(self) -> None:
        """Channels last against channels first, on a small residual network over 64 × 64 images."""
        torch.manual_seed(0)
        images = torch.randn(16, 3, 64, 64, device=self.device)
        gpu = self.optimizer(channels_last="auto")
        gpu.optimize_model(convolutions(), "convolutions", loss=lambda model: model(images).square().mean())
        found = gpu.layouts["convolutions"]
        print(f"channels last {'chosen' if found.channels_last else 'not chosen'}: {found.reason}")

    def threads(self) -> None:
        """A training step by number of threads."""
        _, step, _ = self.step(self.gpu)
        before = torch.get_num_threads()
        found = self.gpu.tune_threads(step, rounds=self.rounds)
        if found is None:
            print(f"does not apply: steps run on {self.device}")
            return
        for count, seconds in found.seconds.items():
            print(f"{count:3} threads      {seconds * 1e3:9.2f} ms/step")
        print(f"chosen: {found.threads}, ×{found.speedup:.2f} as fast as the {before} of before")
        torch.set_num_threads(before)

    def syncs(self) -> None:
        """Calls that wait for the device in steady-state steps of an observed loop, by name."""
        if self.device.type != "cuda":
            print("does not apply: nothing waits for a cpu")
            return
        from torch.profiler import ProfilerActivity, profile

        with Taking(self) as take:
            for _ in range(20):
                take()
            wait_for_device(self.device)
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
                for _ in range(self.steps):
                    take()
        waits = Counter(event.name for event in profiled.events() if is_wait(event.name))
        # The profiler itself waits once, when it ends.
        waits["cudaDeviceSynchronize"] -= 1
        for name, count in (+waits).items():
            print(f"{name:28} {count / self.steps:6.2f} a step")
        print(f"waits in {self.steps} steps: {sum((+waits).values())}")
        print("goal: none")

    def instrumentation(self) -> None:
        """The observed loop – metrics, page, control, watchdog, no checkpoints – against the bare one."""
        _, bare, _ = self.step(self.optimizer(compile_model=self.compile))
        with Taking(self) as take:

            def several(call: Callable[[], object]) -> Callable[[], None]:
                def run() -> None:
                    for _ in range(self.steps):
                        call()

                return run

            times = time_in_turns(
                {"bare": several(bare), "observed": several(take)}, self.device, rounds=self.rounds, warm_up=2
            )
        pairs = zip(times["bare"].seconds, times["observed"].seconds, strict=True)
        shares = sorted(observed / plain - 1 for plain, observed in pairs)
        for name, timing in times.items():
            print(f"{name:16} {timing.median / self.steps * 1e3:9.3f} ms/step")
        extra = (times["observed"].median - times["bare"].median) / self.steps
        print(
            f"instrumentation: {extra * 1e6:.1f} µs a step, {statistics.median(shares):.2%} of a step "
            f"(pairs from {shares[0]:.2%} to {shares[-1]:.2%})"
        )
        print("goal: ≤ 0.5 %")

    def snapshots(self) -> None:
        """What the loop waits for when a checkpoint is taken, and how steps go while it is written."""
        with Taking(self, backups=True) as take:
            for _ in range(5):
                take()
            wait_for_device(self.device)
            alone, beside, waits = [], [], []
            for _ in range(self.rounds):
                alone.append(self.several_seconds(take))
                before = committed(take.run)
                started = time.perf_counter()
                take.run.checkpoint("regular", reason="benchmark", wait=False)
                waits.append(time.perf_counter() - started)
                while committed(take.run) == before:
                    beside.append(self.several_seconds(take))
            histogram = [
                value
                for metric, _, value in take.run.monitor.instruments.histograms()
                if metric is catalog.SNAPSHOT_SECONDS
            ]
            state = take.run.monitor.instruments.get(catalog.CHECKPOINT_BYTES)
        usual, during = statistics.median(alone), statistics.median(beside or alone)
        copies = sum(sum(value.counts) for value in histogram)
        print(f"state: {state / 1e6:.1f} MB; checkpoints: {self.rounds}")
        print(f"loop waits for the copy: {statistics.median(waits) * 1e3:.2f} ms (call), ", end="")
        if copies:
            print(f"{sum(v.total for v in histogram) / copies * 1e3:.2f} ms mean of {copies} snapshots")
        else:
            print("no snapshot counted")
        print(
            f"step alone {usual * 1e3:.3f} ms, while one is written {during * 1e3:.3f} ms: "
            f"×{during / usual:.3f}"
        )
        print("goal: steps go on while it is written, at × 1.00")

    def several_seconds(self, take: Taking) -> float:
        """Mean seconds of a step over a few."""
        wait_for_device(self.device)
        started = time.perf_counter()
        for _ in range(self.steps):
            take()
        wait_for_device(self.device)
        return (time.perf_counter() - started) / self.steps

    def inference(self) -> None:
        """Engines on one window, one at a time."""
        torch.manual_seed(0)
        model = ByteGPT(self.shape)
        nn.init.normal_(model.head.weight, std=0.02)
        try:
            made = self.gpu.optimize_for_inference(
                model, self.windows[:1, :-1], calls=50 * self.rounds, seconds=4.0 * self.rounds
            )
        except ConfigError as error:
            print(f"does not apply: {error}")
            return
        for result in made.results:
            if result.latency is None:
                print(f"{result.engine:16} does not apply: {result.problem}")
            else:
                p50, p95, p99 = (result.latency[q] * 1e3 for q in (0.5, 0.95, 0.99))
                print(
                    f"{result.engine:16} p50 {p50:8.3f} ms  p95 {p95:8.3f} ms  p99 {p99:8.3f} ms  "
                    f"differs from eager by {result.difference:.1e}"
                )
        print(f"in use: {made.engine}")


class Taking:
    """An observed loop of which a caller takes one step at a time."""

    def __init__(self, bench: Bench, *, backups: bool = False) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="obsinfra-bench-")
        gpu = bench.optimizer(compile_model=bench.compile)
        model, self._step, optimizer = bench.step(gpu)
        self._rows = bench.shape.batch_size
        self.run = obsinfra.observe(
            model,
            optimizer,
            run="bench",
            output_dir=Path(self._folder.name),
            metrics_port=0,
            disable_backups=not backups,
            checkpoint_epochs=0,
            checkpoint_seconds=0.0,
            snapshot_seconds=1e9,
        )
        gpu.watch(self.run.monitor)

    def __enter__(self) -> Taking:
        self.run.__enter__()
        self._steps = self.run.steps(endless())
        return self

    def __call__(self) -> None:
        next(self._steps)
        self.run.record(loss=self._step(), samples=self._rows)

    def __exit__(self, *exc: object) -> None:
        self._steps.close()
        self.run.__exit__(None, None, None)
        self._folder.cleanup()


def convolutions() -> nn.Module:
    """Three stages of two convolutions."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def endless() -> Iterator[int]:
    """Something to iterate over; the batch is always the same one."""
    while True:
        yield 0


def committed(run: obsinfra.ObservedRun) -> float:
    """Checkpoints committed so far."""
    return run.monitor.instruments.get(catalog.CHECKPOINTS, kind="regular")


def is_wait(name: str) -> bool:
    """Whether a runtime call makes the host wait for the device."""
    return "Synchronize" in name or name == "cudaMemcpy"


PARTS = (
    "precision", "checkpointing", "attention", "layout", "threads", "syncs", "instrumentation", "snapshots",
    "inference",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--size", choices=SIZES, default=None, help="default: 124m on CUDA, nano elsewhere")
    parser.add_argument("--batch-size", type=int, default=None)
    parser.add_argument("--context", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--parts", default=",".join(PARTS))
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"--parts {part}: expected some of {', '.join(PARTS)}")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = create_gpu_optimizer(device=arguments.device).device
    size = arguments.size or ("124m" if device.type == "cuda" else "nano")
    shape = SIZES[size]
    shape = replace(
        shape,
        batch_size=arguments.batch_size or shape.batch_size,
        context=arguments.context or shape.context,
    )
    with tempfile.TemporaryDirectory(prefix="obsinfra-bench-") as logs:
        configure_logging(Path(logs), run="bench", terminal=False)
        describe(device, size, shape, arguments)
        bench = Bench(
            device, shape, arguments.rounds, arguments.steps, compile_model=not arguments.no_compile
        )
        for part in parts:
            print(f"\n## {part}", flush=True)
            getattr(bench, part)()


def describe(device: torch.device, size: str, shape: Shape, arguments: argparse.Namespace) -> None:
    """Where and with what this was measured."""
    if device.type == "cuda":
        driver = torch.cuda.get_device_properties(device)
        where = f"{driver.name}, {driver.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        where = f"{processor_name()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, Python {platform.python_version()}")
    parameters = sum(p.numel() for p in ByteGPT(shape).parameters())
    print(
        f"byte_gpt {size}: {parameters:,} parameters, batch {shape.batch_size} × {shape.context} bytes; "
        f"{arguments.rounds} rounds in turns, medians"
    )


if __name__ == "__main__":
    main()
