"""How much of what a device can compute a training uses: counted operations against the data sheet.

The trainer exports it; in a loop of one's own see docs/gpu.md. MFU counts the operations the model needs,
HFU those the device does, recomputed activations included (Chowdhery et al. 2022, arXiv 2204.02311,
appendix B; Korthikanti et al. 2022, arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from obsinfra.catalog import metrics as catalog
from obsinfra.errors import ConfigError
from obsinfra.monitoring.recorder import Recorder
from obsinfra.monitoring.sample import Sample
from obsinfra.optimization.activation_checkpointing import undo_checkpointing
from obsinfra.optimization.weightless import weightless


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating-point operations of one forward and backward pass.

    Attributes:
        model: what the mathematics of the model needs.
        hardware: what is executed, recomputed activations and attention scores included.
        source: how they are known.
    """

    model: float
    hardware: float
    source: str

    def per(self, samples: int) -> Flops:
        """Of one sample, where a pass takes `samples`."""
        return Flops(self.model / samples, self.hardware / samples, self.source)


def count_flops(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Flops:
    """Count matrix products, convolutions and attention of one forward and backward pass.

    `torch.utils.flop_counter` counts. Nothing is computed: a copy of the model without values runs, in a
    second or two for a hundred million parameters. Random states stay as they are.

    Args:
        model: untouched.
        loss: the forward pass of one batch.

    Raises:
        ConfigError: the loss does not depend on the model it is given.
        RuntimeError or what else comes of it: the model or the loss looks at values.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for whole in (True, False):
        with weightless(model) as twin:
            if whole:
                undo_checkpointing(twin)
            with FlopCounterMode(display=False, custom_mapping=_formulas(executed=not whole)) as counter:
                wanted = [p for p in twin.parameters() if p.requires_grad]
                found = torch.autograd.grad(loss(twin), wanted, allow_unused=True)
            if all(gradient is None for gradient in found):
                raise ConfigError(
                    "a loss that does not depend on the model it is given",
                    "a function that calls its argument, not a model from elsewhere",
                    "write count_flops(model, lambda model: loss_of(model(inputs)))",
                )
        counts.append(float(counter.get_total_flops()))
    return Flops(counts[0], counts[1], "torch.utils.flop_counter")


@dataclass(slots=True)
class Utilization:
    """Turns throughput into MFU and HFU.

    Args:
        peak: FLOP/s of the device in the precision in use; None where it is not known.
        peak_reason: where that is from, or why it is not known; for the log.

    Attributes:
        per_sample: operations of a sample; None until they are known.
        asked: somebody has tried to know them.
    """

    peak: float | None
    peak_reason: str
    per_sample: Flops | None = None
    asked: bool = False

    @property
    def missing(self) -> bool:
        """Whether only the operations of a sample are missing for the MFU."""
        return not self.asked and self.peak is not None

    def samples(self, recorder: Recorder) -> list[Sample]:
        """The metrics as of now: those that are known."""
        rate = recorder.samples_per_second()
        if self.per_sample is None or rate <= 0:
            return []
        done = self.per_sample.model * rate
        out = [Sample(catalog.MODEL_FLOPS_PER_SECOND, {}, done)]
        if self.peak:
            executed = self.per_sample.hardware * rate
            out.append(Sample(catalog.MFU_RATIO, {}, done / self.peak))
            out.append(Sample(catalog.HFU_RATIO, {}, executed / self.peak))
        return out


def _formulas(*, executed: bool) -> dict[Any, Any]:
    """Of attention kernels: torch's counter does not know the CPU's, and counts what the fused ones compute
    again in their backward pass, which the mathematics does not need."""
    aten = torch.ops.aten
    forward = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    known = ("efficient", "flash", "cudnn")
    names = [f"_scaled_dot_product_{name}_attention_backward" for name in known if not executed]
    backward = {getattr(aten, name): _gradient_of_attention for name in names if hasattr(aten, name)}
    on_cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return {**forward, **backward, on_cpu: _executed_gradient if executed else _gradient_of_attention}


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _gradient_of_attention(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * _attention(query, key, value)


def _executed_gradient(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return int(sdpa_backward_flop_count(grad, query, key, value))  # type: ignore[no-untyped-call]
