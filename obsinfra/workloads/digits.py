"""A small convolutional network on scikit-learn's 1,797 handwritten digits: the quickest real training.

Called by the registry and the trainer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from obsinfra.errors import UserError
from obsinfra.workloads.batches import MapBatches
from obsinfra.workloads.bundled_files import bundled_file
from obsinfra.workloads.protocol import Batches, Defaults, StepOutput

SIZES = {"small": 32, "medium": 64}
"""Channels of the first layer by size preset."""
HELD_OUT = 360
"""Held-out images, a fifth; the same ones for every seed."""


class DigitNet(nn.Module):
    """Two 3×3 convolutions with pooling, dropout, two linear layers: [B, 1, 8, 8] → logits [B, 10]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.hidden = nn.Linear(2 * channels * 4, 128)
        self.out = nn.Linear(128, 10)
        self.dropout = nn.Dropout(0.25)

    def forward(self, images: Tensor) -> Tensor:
        """Images scaled to 0 … 1."""
        hidden = functional.max_pool2d(functional.relu(self.first(images)), 2)
        hidden = functional.max_pool2d(functional.relu(self.second(hidden)), 2)
        hidden = functional.relu(self.hidden(self.dropout(hidden.flatten(1))))
        logits: Tensor = self.out(self.dropout(hidden))
        return logits


class DigitImages(Dataset[Any]):
    """Images float32 [N, 1, 8, 8] and labels int64 [N], fetched by whole batches."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def _read_digits() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pixels of 0 to 16 [N, 64] and each image's digit [N], as `sklearn.datasets.load_digits` gives them."""
    rows = np.loadtxt(
        bundled_file("sklearn", "datasets/data/digits.csv.gz", what="the digits are"), delimiter=","
    )
    return rows[:, :-1], rows[:, -1]


def _as_is(batch: Any) -> Any:
    return batch


class Digits:
    """Handwritten digits, 80 % to learn from and 20 % held out.

    Raises:
        UserError: unknown size, or a data path, which this workload does not read.
        DataError: scikit-learn is not installed.
    """

    name = "digits"
    defaults = Defaults(
        epochs=15,
        batch_size=64,
        learning_rate=2e-3,
        schedule="cosine",
        metric="accuracy",
        mode="max",
    )

    def __init__(self, data_path: str | None = None, model_size: str | None = None) -> None:
        if data_path is not None:
            raise UserError(
                f"digits brings its own data and does not read {data_path!r}",
                "no --data-path",
                "leave it out",
            )
        size = model_size or "small"
        if size not in SIZES:
            raise UserError(f"digits has no size {size!r}", f"one of {', '.join(SIZES)}")
        self.channels = SIZES[size]
        pixels, numbers = _read_digits()
        images = torch.from_numpy(pixels.astype(np.float32)).view(-1, 1, 8, 8) / 16
        labels = torch.from_numpy(numbers.astype(np.int64))
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held, kept = order[:HELD_OUT], order[HELD_OUT:]
        self.training = DigitImages(images[kept], labels[kept])
        self.held_out = DigitImages(images[held], labels[held])

    def build_model(self) -> nn.Module:
        """A fresh network."""
        return DigitNet(self.channels)

    def train_batches(
        self, model: nn.Module, *, batch_size: int, seed: int, num_workers: int, device: torch.device
    ) -> Batches:
        """Every training image once an epoch; the last batch may be smaller."""
        return MapBatches(
            self.training,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            kind="sklearn digits",
            collate=_as_is,
        )

    def training_step(self, model: nn.Module, batch: Any) -> StepOutput:
        """Cross-entropy."""
        images, labels = batch
        logits = model(images).float()
        correct = (logits.detach().argmax(-1) == labels).float().mean()
        return StepOutput(functional.cross_entropy(logits, labels), len(labels), {"accuracy": correct})

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Loss and accuracy on the held-out images."""
        logits = model(self.held_out.images.to(device)).float()
        labels = self.held_out.labels.to(device)
        return {
            "loss": float(functional.cross_entropy(logits, labels)),
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
        }

    def flops_per_sample(self, model: nn.Module) -> float | None:
        """Two per weight and place it is applied at, three times: forward and twice that backward."""
        c = self.channels
        forward = 2 * (9 * c * 64 + 9 * c * 2 * c * 16 + 2 * c * 4 * 128 + 128 * 10)
        return 3.0 * forward

    def describe_data(self) -> dict[str, Any]:
        """Source and sizes."""
        return {
            "source": "sklearn.datasets.load_digits",
            "training_images": len(self.training),
            "held_out_images": len(self.held_out),
        }


def create_workload(*, data_path: str | None, model_size: str | None, seed: int) -> Digits:
    """Convolutional network on scikit-learn's handwritten digits.

    Raises:
        UserError, DataError: see `Digits`.
    """
    return Digits(data_path, model_size)
