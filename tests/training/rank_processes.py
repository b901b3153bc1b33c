"""Ranks of a gloo group on the loopback, a process each, as torchrun would start them; and what they do."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel  # with those above: seconds that the ranks need not spend each
from small_workload import Regression
from torch._C._distributed_c10d import TCPStore

from obsinfra.config.settings import Settings
from obsinfra.observation.observed_run import ObservedRun
from obsinfra.observation.ranks import Ranks, join
from obsinfra.observation.resume import plan_for_all, plan_run
from obsinfra.training.trainer import Trainer
from obsinfra.workloads.registry import create_workload

SECONDS = 120.0


def in_group(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(ranks, *arguments)` on so many ranks; what each returned, or the text of its error."""
    context = multiprocessing.get_context("forkserver")  # torch is imported once
    context.set_forkserver_preload(["rank_processes"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_as_rank, args=(rank, size, store.port, theirs, function, arguments), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    results: list[Any] = [None] * size
    readers = [
        threading.Thread(target=lambda rank=rank: results.__setitem__(rank, _received(pipes[rank])))
        for rank in range(size)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    for process in processes:
        process.join(timeout=10)
        if process.is_alive():
            process.kill()
    return results


def _received(pipe: Any) -> Any:
    try:
        return pipe.recv() if pipe.poll(SECONDS) else "nothing in time"
    except EOFError:
        return "died"


def _as_rank(
    rank: int, size: int, port: int, pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RUN_ID="test",
    )
    torch.set_num_threads(1)
    ranks: Ranks | None = None
    try:
        ranks = join(60.0)
        result = function(ranks, *arguments)
        ranks.leave("finished")
    except BaseException as error:
        if ranks is not None:
            ranks.leave(str(error))
        result = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    pipe.send(result)
    pipe.close()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A parameter, put together where ranks have parts of it."""
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


# ---- what ranks do ---------------------------------------------------------------------------------------


def trained(
    ranks: Ranks,
    output: Path,
    on_start: Callable[[ObservedRun], None] = lambda run: None,
    **settings: Any,
) -> dict[str, Any]:
    """Train to the end; the parameters and how it ended. `regression` is the small workload of the tests."""
    usual: dict[str, Any] = {
        "output_dir": output,
        "precision": "fp32",
        "metrics_port": 0,
        "disable_monitoring": True,
    }
    chosen = Settings(**{**usual, **settings})
    name = chosen.model_name
    workload: Any = (
        Regression()
        if name == "regression"
        else create_workload(name, data_path=None, model_size=chosen.model_size, seed=chosen.seed)
    )
    plan = plan_for_all(ranks, lambda: plan_run(chosen, name))
    trainer = Trainer(workload, chosen, plan, ranks)
    outcome = trainer.fit(on_start)
    return {
        "parameters": {name: whole(value).numpy().copy() for name, value in trainer.model.named_parameters()},
        "step": outcome.step,
        "validation": outcome.validation,
        "folder": str(outcome.folder),
        "seen": [batch.numpy().copy() for batch in workload.seen] if name == "regression" else [],
    }
