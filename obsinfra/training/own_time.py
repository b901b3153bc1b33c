"""How long a rank's passes take without what they wait for other ranks, by the clock of this process.

Called by `parallelism`. DDP exchanges gradients in the background while backward runs, and waits for the
exchange in a callback of the autograd engine at its end; and it waits for rank 0's buffers in front of the
model's forward. Both are timed without touching either.
"""

from __future__ import annotations

from time import perf_counter

from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel


def timed_backward(loss: Tensor) -> float:
    """Backward without an exchange in it: all of its seconds."""
    started = perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    return perf_counter() - started


class OwnTime:
    """What of the passes of a DDP model is this rank's own.

    Args:
        wrapped: the model as it is called.
    """

    def __init__(self, wrapped: DistributedDataParallel) -> None:
        self._computed: float | None = None
        self._waited = 0.0
        # Not by hooks on the model: those would be compiled with it.
        self._exchange_buffers = wrapped._sync_buffers
        wrapped._sync_buffers = self._on_buffers  # type: ignore[method-assign]

    def backward(self, loss: Tensor) -> float:
        """Run backward; its own seconds, less those that forward passes before it waited.

        Engine callbacks run in the order in which they were queued: one that is queued with the first
        gradient runs before DDP's, which waits for the exchange.
        """
        self._computed = None
        loss.register_hook(self._on_first_gradient)  # type: ignore[no-untyped-call]
        started = perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        computed = self._computed if self._computed is not None else perf_counter()
        waited, self._waited = self._waited, 0.0
        return computed - started - waited

    def _on_first_gradient(self, gradient: Tensor) -> None:
        Variable._execution_engine.queue_callback(self._on_computed)

    def _on_computed(self) -> None:
        self._computed = perf_counter()

    def _on_buffers(self) -> None:
        started = perf_counter()
        self._exchange_buffers()  # type: ignore[no-untyped-call]
        self._waited += perf_counter() - started
