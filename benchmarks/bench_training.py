"""What the trainer costs: against a bare PyTorch loop, Lightning and Accelerate on the same model and data.

    python benchmarks/bench_training.py [--models mlp gpt] [--rounds 30] [--seconds 1.5] [--precision fp32]
    python benchmarks/bench_training.py --ranks 2 [--rounds 30]  # so many gloo ranks instead
    pip install 'obsinfra[integrations,examples]'                # for Lightning, Accelerate and the digits

Each contender is a process of its own that trains the same model from the same seed on the same batches, held
in memory: an MLP on scikit-learn's digits (a step of about 0.6 ms), and byte_gpt nano on Python's sources.
They take turns: in every round, in rotating order, each trains for as many steps while the others wait. A
contender's overhead is its time per step less the bare loop's of the same round.

    bare         zero_grad, forward, backward, clip_grad_norm_, fused AdamW
    kept         the same in a process that keeps freed pages, as the trainer has it (docs/memory.md)
    obsinfra     the trainer as `obsinfra train` runs it: metrics, traces, alerts, control, checkpoints
    lightning    Trainer without logger, checkpoints and progress bar
    accelerate   Accelerator.prepare, backward, clip_grad_norm_

While a contender waits its clock stands still, or snapshots and alerts, which go by the clock, would come
several times as often per step as in a run of its own. Such a clock costs some 0.1 µs more than the real one.

With --ranks there are two contenders of so many gloo ranks each: DistributedDataParallel in a bare loop, and
in the trainer under torchrun; the difference is what control, metrics and agreement of the ranks cost. Give
it a core more than ranks: a thread that takes a core from one rank for a moment makes all of them wait.

Beside the time is the processor time of a step, of all ranks and all their threads. It counts what threads do
whether or not anybody waits for it, but not the checkpoint writer, which is a process of its own. So are the
page faults of a step, each of which is a page the kernel had to map anew; and the largest resident size of a
rank, which for ours holds a snapshot of the training's state too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from machine import processor_name

SINGLE = ("bare", "kept", "obsinfra", "lightning", "accelerate")
RANKS = ("bare", "kept", "obsinfra")
MODELS = ("mlp", "gpt")
GOALS = {"mlp": "at most 15 µs per step over bare", "gpt": "at most 1.02 × bare"}
PACKAGES = ("obsinfra", "torch", "lightning", "accelerate")
ENOUGH = 10**9
"""Steps of the one epoch that a contender begins and does not end."""


# ---- a contender: everything below runs in its own process ---------------------------------------------


class Line:
    """The contender's end of the wire: waits for turns and tells how long they took.

    Args:
        address: of the benchmark's socket.
        name: of the contender.
        rank: of this process; every rank has a line and a turn begins for all.
    """

    def __init__(self, address: str, name: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        self._file = self._socket.makefile("rw")
        self.stood_still = 0.0
        self._real = time.perf_counter
        self.say({"contender": name, "rank": rank})

    def say(self, document: Mapping[str, Any]) -> None:
        print(json.dumps(document), file=self._file, flush=True)

    def wait(self) -> int:
        """Steps of the next turn; 0 when there is none."""
        began = self._real()
        text = self._file.readline()
        self.stood_still += self._real() - began
        return int(text or 0)

    def stop_clocks(self) -> None:
        """From here on time does not pass for this process while it waits; before anything reads a clock."""
        for name in ("perf_counter", "monotonic", "time"):
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() - self.stood_still)
        for name in ("perf_counter_ns", "monotonic_ns", "time_ns"):
            real = getattr(time, name)
            setattr(time, name, lambda real=real: real() - int(self.stood_still * 1e9))


def page_faults() -> int:
    """Of this process so far, without those that had to wait for a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Turns:
    """Batches in the order of the list, over and over, a turn at a time; ends when there is no further turn.

    Also what the trainer wants of a workload's batches.
    """

    phase = "data"

    def __init__(self, batches: list[Any], line: Line) -> None:
        self._batches, self._line = batches, line
        self._at = 0
        self._ranks = 1

    def __iter__(self) -> Iterator[Any]:
        from obsinfra.workloads.batches import Portion

        now, batches, count = self._line._real, self._batches, len(self._batches)
        at = self._at
        while steps := self._line.wait():
            began, spent, faults = now(), time.process_time(), page_faults()
            for _ in range(steps):
                batch = batches[at % count]
                at += 1
                yield batch if self._ranks == 1 else Portion(batch, 1, self._ranks)
            self._line.say(
                {
                    "seconds": now() - began,
                    "processor": time.process_time() - spent,
                    "faults": page_faults() - faults,
                }
            )

    def __len__(self) -> int:
        return ENOUGH

    def divide(self, rank: int, size: int) -> None:
        self._ranks = size

    def state_dict(self) -> dict[str, Any]:
        return {"at": self._at}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._at = int(state["at"])


def mlp() -> Any:
    """A workload: three linear layers on digits, so large that a bare step takes about 0.6 ms on a core."""
    import torch
    from torch import nn
    from torch.nn import functional

    from obsinfra.workloads.digits import Digits
    from obsinfra.workloads.protocol import StepOutput

    class Mlp(Digits):
        def build_model(self) -> nn.Module:
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 256),
                nn.ReLU(),
                nn.Linear(256, 128),
                nn.ReLU(),
                nn.Linear(128, 10),
            )

        def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
            images, labels = batch
            return StepOutput(functional.cross_entropy(model(images).float(), labels), len(labels))

    torch.manual_seed(0)
    return Mlp()


def gpt() -> Any:
    """byte_gpt nano on the standard library's sources."""
    from obsinfra.workloads.byte_gpt import ByteGPTWorkload

    return ByteGPTWorkload(None, "nano")


def prepared(model: str, line: Line, device: Any) -> tuple[Any, Turns]:
    """The workload and its first 64 batches, on the device."""
    from itertools import islice

    from obsinfra.training.trainer import to_device

    workload = {"mlp": mlp, "gpt": gpt}[model]()
    batches = workload.train_batches(
        None, batch_size=workload.defaults.batch_size, seed=0, num_workers=0, device=device
    )
    turns = Turns([to_device(batch, device) for batch in islice(batches, 64)], line)
    workload.train_batches = lambda *arguments, **options: turns
    return workload, turns


def fresh(workload: Any, device: Any) -> tuple[Any, Any]:
    """Model and optimizer as the trainer makes them."""
    import torch

    torch.manual_seed(0)
    model = workload.build_model().to(device)
    defaults = workload.defaults
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=defaults.learning_rate,
        weight_decay=defaults.weight_decay,
        betas=defaults.betas,
        eps=defaults.eps,
        fused=True,
    )
    return model, optimizer


def bare(workload: Any, turns: Turns, precision: str, device: Any, folder: Path, ranks: int) -> Any:
    import torch
    from torch.nn.utils import clip_grad_norm_

    from obsinfra.optimization.precision import choose_precision

    chosen = choose_precision(precision, device)
    model, optimizer = fresh(workload, device)
    called = model
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
        called = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    for batch in turns:
        with chosen.autocast():
            loss = workload.training_step(called, batch).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def kept(workload: Any, turns: Turns, precision: str, device: Any, folder: Path, ranks: int) -> Any:
    from obsinfra.optimization.kept_pages import keep_freed_pages

    keep_freed_pages("auto", device)
    return bare(workload, turns, precision, device, folder, ranks)


def obsinfra(workload: Any, turns: Turns, precision: str, device: Any, folder: Path, ranks: int) -> Any:
    from obsinfra.config.settings import Settings
    from obsinfra.monitoring.logging_config import configure_logging
    from obsinfra.observation.ranks import join
    from obsinfra.observation.resume import plan_for_all, plan_run
    from obsinfra.training.trainer import Trainer

    settings = Settings(
        model_name=workload.name,
        epochs=1,
        schedule="constant",
        warmup_steps=0,
        validate_every=0,
        precision=precision,
        device=str(device),
        compile="off",
        metrics_port=0,
        output_dir=folder,
    )
    members = join(settings.collective_timeout_seconds)
    plan = plan_for_all(members, lambda: plan_run(settings, workload.name))
    trainer = Trainer(workload, settings, plan, members)

    def begun(run: Any) -> None:
        configure_logging(run.folder.logs, run=run.folder.id, terminal=False)

    trainer.fit(begun)
    members.leave("finished")
    return trainer.model


def lightning(workload: Any, turns: Turns, precision: str, device: Any, folder: Path, ranks: int) -> Any:
    import lightning as trainer_of_others

    class Module(trainer_of_others.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.made = fresh(workload, device)

        def training_step(self, batch: Any, number: int) -> Any:
            return workload.training_step(self.model, batch).loss

        def configure_optimizers(self) -> Any:
            return self.made

    module = Module()
    trainer_of_others.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision={"fp32": "32-true", "bf16": "bf16-mixed"}[precision],
        max_epochs=1,
        # A fused optimizer refuses Lightning's clipping only together with its own scaling, in fp16.
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(module, turns)
    return module.model


def accelerate(workload: Any, turns: Turns, precision: str, device: Any, folder: Path, ranks: int) -> Any:
    from accelerate import Accelerator
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(turns)

    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "bf16": "bf16"}[precision], cpu=device.type == "cpu"
    )
    model, optimizer = fresh(workload, device)
    # One batch is one item: nothing is stacked, as in the other loops.
    loader = DataLoader(Stream(), batch_size=None, collate_fn=_as_is)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = workload.training_step(model, batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


def _as_is(batch: Any) -> Any:
    return batch


CONTENDERS: dict[str, Callable[..., Any]] = {
    "bare": bare,
    "kept": kept,
    "obsinfra": obsinfra,
    "lightning": lightning,
    "accelerate": accelerate,
}


def contend(arguments: argparse.Namespace) -> None:
    """Train until the benchmark has no further turn."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    line = Line(arguments.address, arguments.contender, rank)
    line.stop_clocks()
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    workload, turns = prepared(arguments.model, line, device)
    model = CONTENDERS[arguments.contender](
        workload, turns, arguments.precision, device, arguments.folder / arguments.contender, ranks
    )
    size = sum(float(parameter.detach().double().abs().sum()) for parameter in model.parameters())
    line.say({"parameters": size, "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss})


# ---- the benchmark ------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of a step: microseconds, of several ranks the slowest one's; those of the processor and page faults, of
    all ranks together."""

    time: float
    processor: float
    faults: float


class End(NamedTuple):
    """Of a contender: the sum of the absolute parameters it has trained, NaN when it failed; the largest
    resident size of a rank."""

    parameters: float
    mebibytes: float


class Contender:
    """A contender's processes, seen from the benchmark."""

    def __init__(
        self, name: str, model: str, arguments: argparse.Namespace, folder: Path, server: socket.socket
    ) -> None:
        self.name = name
        ranks = arguments.ranks
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [
            *launcher,
            __file__,
            *("--contender", name, "--model", model, "--address", str(server.getsockname())),
            *("--folder", str(folder), "--precision", arguments.precision),
            *("--threads", str(arguments.threads), *(["--cpu"] if arguments.cpu or ranks > 1 else [])),
        ]
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self.lines: list[Any] = []
        server.settimeout(1.0)
        while len(self.lines) < ranks:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                self._must_live()
                continue
            connection.settimeout(None)
            file = connection.makefile("rw")
            file.readline()
            self.lines.append(file)

    def _must_live(self) -> None:
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended with {self.process.returncode}:\n{tail}")

    def turn(self, steps: int) -> Cost:
        """What a step of so many cost."""
        for line in self.lines:
            print(steps, file=line, flush=True)
        taken, spent, faults = [], 0.0, 0
        for line in self.lines:
            try:
                answer = line.readline()
            except ConnectionError:
                answer = ""
            if not answer:
                self.process.wait()
                self._must_live()
            told = json.loads(answer)
            taken.append(float(told["seconds"]))
            spent += float(told["processor"])
            faults += int(told["faults"])
        return Cost(max(taken) / steps * 1e6, spent / steps * 1e6, faults / steps)

    def end(self) -> End:
        """No further turn; how it ended."""
        ended = End(float("nan"), 0.0)
        for line in self.lines:
            with contextlib.suppress(OSError):
                print(0, file=line, flush=True)
        for line in self.lines:
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(line.readline())
                ended = End(float(told["parameters"]), max(ended.mebibytes, told["kilobytes"] / 1024))
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        return ended


def measure(model: str, arguments: argparse.Namespace) -> tuple[dict[str, list[Cost]], dict[str, End]]:
    """What a step cost every contender in every round, and how they ended."""
    names = [name for name in (RANKS if arguments.ranks > 1 else SINGLE) if name in arguments.only]
    contenders: list[Contender] = []
    with tempfile.TemporaryDirectory() as scratch, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(Path(scratch) / "turns.sock"))
        server.listen(16)
        try:
            for name in names:
                contenders.append(Contender(name, model, arguments, Path(scratch), server))
            for contender in contenders:
                contender.turn(10)  # warm up
            usual = [contender.turn(10).time for contender in contenders]
            steps = max(10, int(arguments.seconds * 1e6 / usual[0]))
            taken: dict[str, list[Cost]] = {name: [] for name in names}
            for number in range(arguments.rounds):
                shift = number % len(contenders)
                for contender in contenders[shift:] + contenders[:shift]:
                    taken[contender.name].append(contender.turn(steps))
                if sys.stderr.isatty():
                    print(f"\r{model}: round {number + 1} of {arguments.rounds}", end="", file=sys.stderr)
        finally:
            ends = {contender.name: contender.end() for contender in contenders}
    print(f"\n{model}, {arguments.precision}: {arguments.rounds} rounds of {steps} steps, order rotated")
    base = ends["bare"].parameters
    apart = {name: end.parameters / base - 1 for name, end in ends.items() if name != "bare"}
    told = ", ".join(f"{name} {share:+.1e}" for name, share in apart.items())
    print(f"trained to the same: sum of |parameters| relative to bare: {told}")
    return taken, ends


def report(model: str, taken: dict[str, list[Cost]], ends: dict[str, End], ranks: int) -> None:
    """Per contender: time per step, and over the bare loop of the same round; the same of processor time;
    page faults and memory."""
    base = taken["bare"]
    titles = f"{'µs per step':<12} {'median':>10} {'over bare':>10} {'quartiles':>21} {'× bare':>8}"
    print(f"{titles} {'processor':>11} {'× bare':>8} {'faults':>8} {'MiB':>6}")
    for name, values in taken.items():
        middle, processor, faults = (statistics.median(part) for part in zip(*values, strict=True))
        memory = f"{faults:>8.1f} {ends[name].mebibytes:>6.0f}"
        if name == "bare":
            print(f"{name:<12} {middle:>10.1f} {'':>41} {processor:>11.1f} {'':>8} {memory}")
            continue
        pairs = list(zip(values, base, strict=True))
        low, over, high = quartiles([mine.time - bare.time for mine, bare in pairs])
        times, busy = (statistics.median([mine[at] / bare[at] for mine, bare in pairs]) for at in (0, 1))
        spread = f"{low:.1f} … {high:.1f}"
        line = f"{name:<12} {middle:>10.1f} {over:>10.1f} {spread:>21} {times:>8.4f}"
        print(f"{line} {processor:>11.1f} {busy:>8.4f} {memory}")
        if name == "obsinfra":
            met = times <= 1.01 if ranks > 1 else (over <= 15 if model == "mlp" else times <= 1.02)
            goal = "at most 1.01 × bare" if ranks > 1 else GOALS[model]
            verdict = f"{'within' if met else 'OVER'} the goal: {goal}"
    if "obsinfra" in taken:
        print(f"obsinfra is {verdict}")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def environment(arguments: argparse.Namespace) -> str:
    installed = []
    for package in PACKAGES:
        try:
            installed.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            installed.append(f"{package} not installed")
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    ranks = f"{arguments.ranks} gloo ranks; " if arguments.ranks > 1 else ""
    return (
        f"{ranks}{processor_name()}, {os.cpu_count()} cores{load}, {arguments.threads} threads each; "
        f"Python {platform.python_version()}\n{', '.join(installed)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--only", nargs="+", choices=SINGLE, default=list(SINGLE), help="these (and bare) only"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="?",
        default=1,
        const=2,
        help="gloo ranks, 2 if no number: bare DDP and ours",
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn, by the bare loop")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="also where there is a GPU")
    parser.add_argument("--contender", choices=SINGLE, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: expected a number of ranks from 1 on")
    if arguments.contender:
        contend(arguments)
        return
    arguments.only = ["bare", *(name for name in arguments.only if name != "bare")]
    print(environment(arguments), flush=True)
    for model in arguments.models:
        report(model, *measure(model, arguments), arguments.ranks)


if __name__ == "__main__":
    main()
