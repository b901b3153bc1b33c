"""What a state of very many small tensors costs: the store keeps each in a file of its own, and syncs each.

    python benchmarks/bench_small_tensors.py [--tensors 20000] [--bytes 1024] [--rounds 3]

Saved by the store and by torch.save with an fsync, in turns; the median of each, and their ratio.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from obsinfra.backup.backup_system import create_backup_system
from obsinfra.backup.checkpointer import create_checkpointer
from obsinfra.backup.file_layer import OperatingSystemFiles


class CountingFiles(OperatingSystemFiles):
    """Counts what is made durable: files written, and folders."""

    def __init__(self) -> None:
        self.syncs: Counter[str] = Counter()

    def write(self, path: Path, data: memoryview) -> None:
        self.syncs["files"] += 1
        super().write(path, data)

    def sync_folder(self, folder: Path) -> None:
        self.syncs["folders"] += 1
        super().sync_folder(folder)


def state(tensors: int, size: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"parameter{i}": torch.randn(size // 4, generator=generator) for i in range(tensors)}


def seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def torch_save(contents: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(contents, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=20_000)
    parser.add_argument("--bytes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to use; a temporary one")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="small-tensors-", dir=arguments.folder))
    found: dict[str, list[float]] = {}
    files = CountingFiles()
    backup = create_backup_system(folder / "store", files=files)
    checkpointer = create_checkpointer(folder / "other")
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{arguments.tensors} tensors of {arguments.bytes} bytes; {load}", flush=True)
    for step in range(1, arguments.rounds + 1):
        contents = state(arguments.tensors, arguments.bytes, step)
        files.syncs.clear()

        def note(what: str, action: Callable[[], object]) -> None:
            found.setdefault(what, []).append(seconds(action))

        note("torch.save + fsync", lambda: torch_save(contents, folder / "state.pt"))  # noqa: B023
        note("save()", lambda: backup.save(contents, step=step, epoch=0))  # noqa: B023
        syncs = dict(files.syncs)
        note("save() of the same", lambda: backup.save(contents, step=step, epoch=1))  # noqa: B023
        note("snapshot() (the loop waits)", lambda: checkpointer.snapshot(contents, step=step, epoch=0))  # noqa: B023
        note("its commit by the writer", lambda: checkpointer.commit("regular", "benchmark").wait())
        note("torch.load", lambda: torch.load(folder / "state.pt"))
        note("load(), verified", backup.load)
    checkpointer.close()
    shutil.rmtree(folder)
    print(f"synced by one save(): {syncs}")
    base = statistics.median(found["torch.save + fsync"])
    for what, times in found.items():
        middle = statistics.median(times)
        each = middle / arguments.tensors * 1e6
        print(f"{what:<28} {middle:8.2f} s   {middle / base:6.1f} ×   {each:6.0f} µs each")


if __name__ == "__main__":
    main()
