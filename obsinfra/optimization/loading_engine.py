"""One pass of torchdata's loader, from its start to its workers' end, whatever became of them.

For the data loader. Which batches it loads, and what they hold, is not known here.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from typing import Any

import torch

from obsinfra.errors import DataError, DataWorkerError
from obsinfra.optimization.data_order import ignore_trainer_signals, trainer_signals_held


def start_engine(
    source: Any,
    asks: Any,
    *,
    workers: int,
    prefetch: int,
    pin_memory: bool,
    seed: int,
    timeout_seconds: float,
    snapshots: bool,
    state: dict[str, Any] | None,
    workers_ended: Callable[[], object] | None,
) -> LoadingEngine:
    """Begin to load what `asks` asks of `source`, or all of a stream where it is None.

    Args:
        seed: of the workers' own random generators.
        timeout_seconds: longest wait for a batch from workers; 0: as long as they live.
        snapshots: keep a stream's own position with each batch.
        state: a stream's position to go on from, of `LoadingEngine.state_dict`.
        workers_ended: called when the workers have ended.

    Raises:
        DataError: `state` cannot be gone on from.
    """
    from torchdata.stateful_dataloader import StatefulDataLoader

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_vital")  # torch's news for torchdata
        loader = StatefulDataLoader(
            source,
            batch_size=None,
            sampler=asks,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            worker_init_fn=ignore_trainer_signals if workers else None,
            generator=torch.Generator().manual_seed(seed),
            timeout=timeout_seconds if workers else 0,
            snapshot_every_n_steps=1 if snapshots else None,
        )
    if state is None:
        return LoadingEngine(loader, workers_ended)
    try:
        loader.load_state_dict(state)
        return LoadingEngine(loader, workers_ended)
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"a stream's position that cannot be gone on from: {error}"[:300],
            "what state_dict() returned",
            "start a new run, or resume from another checkpoint",
        ) from error


class LoadingEngine:
    """One pass of torchdata's loader, with its workers' death made plain."""

    def __init__(self, loader: Any, workers_ended: Callable[[], object] | None) -> None:
        self._workers_ended = workers_ended
        self._iterator: Any
        if loader.num_workers:
            with trainer_signals_held():
                self._iterator = iter(loader)
        else:
            self._iterator = iter(loader)

    def __next__(self) -> Any:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            self.explain(error)
            raise

    def explain(self, error: RuntimeError) -> None:
        """Raise what torch says about its workers with what became of them; nothing for other errors."""
        dead = self._dead()
        if dead:
            raise DataWorkerError(
                f"data loader worker {', '.join(dead)}",
                "workers that live until the epoch's end",
                "if memory ran out (see `dmesg`), use fewer workers, a smaller prefetch or batch; "
                "num_workers=0 shows what a worker runs into",
            ) from error
        if "timed out" in str(error):
            raise DataWorkerError(
                f"no batch from the data loader's workers: {error}",
                "one within timeout_seconds",
                "find out what the data set waits for with num_workers=0, or raise it",
            ) from error

    def _dead(self) -> list[str]:
        found = []
        for worker in getattr(self._iterator, "_workers", []):
            worker.join(timeout=0.1)
            if worker.exitcode:
                how = f"exited with {worker.exitcode}"
                if worker.exitcode < 0:
                    number = -worker.exitcode
                    known = number in signal.valid_signals()
                    how = f"was killed by {signal.Signals(number).name if known else f'signal {number}'}"
                found.append(f"{worker.pid} {how}")
        return found

    def worker_pids(self) -> list[int]:
        """Of those that were started."""
        return [worker.pid for worker in getattr(self._iterator, "_workers", [])]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as torchdata tells it."""
        state: dict[str, Any] = self._iterator.state_dict()
        return state

    def close(self) -> None:
        """End the workers; may be called twice."""
        iterator, self._iterator = self._iterator, None
        workers = getattr(iterator, "_workers", [])
        if workers:
            iterator._shutdown_workers()
            for worker in workers:
                if worker.is_alive():  # stuck in the data set, and deaf to SIGTERM
                    worker.kill()
                    worker.join()
            if self._workers_ended is not None:
                self._workers_ended()


class Trial:
    """An engine's batches alone, for the plan."""

    def __init__(self, engine: LoadingEngine) -> None:
        self._engine = engine
        self.worker_pids, self.close = engine.worker_pids, engine.close

    def __next__(self) -> Any:
        while True:
            delivery = next(self._engine)
            if delivery.error is not None:
                raise delivery.error
            if delivery.batch is not None:
                return delivery.batch


def _as_is(delivery: Any) -> Any:
    return delivery
