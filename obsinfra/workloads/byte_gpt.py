"""A decoder-only transformer over bytes, trained on any text folder; reports bits per byte of held-out files.

Called by the registry and the trainer. The text itself is text_corpus's business.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from obsinfra.errors import ConfigError, UserError
from obsinfra.workloads.batches import MapBatches
from obsinfra.workloads.protocol import Batches, Defaults, StepOutput
from obsinfra.workloads.text_corpus import Corpus, open_corpus

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle

BYTES = 256
VALIDATION_WINDOWS = 512
"""Held-out windows, evenly spread, at most; the same ones every time."""
VALIDATION_BATCH = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A size preset: blocks, width, heads, bytes of context, and how it is trained by default."""

    layers: int
    width: int
    heads: int
    context: int
    batch_size: int
    learning_rate: float
    epochs: int
    epoch_windows: int


SIZES = {
    "nano": Shape(4, 128, 4, 128, 16, 3e-3, 8, 1200),
    "micro": Shape(6, 256, 8, 256, 32, 1.5e-3, 20, 8192),
    "small": Shape(8, 384, 6, 512, 32, 1e-3, 40, 16384),
    "medium": Shape(12, 512, 8, 1024, 32, 8e-4, 60, 16384),
    # As many parameters as GPT-2's smallest; with 256 bytes for 50,257 tokens that takes a larger body.
    "124m": Shape(13, 896, 14, 1024, 32, 6e-4, 100, 16384),
}


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        batch, length, _ = x.shape
        packed = self.qkv(x)
        heads = packed.shape[-1] // (3 * self.head_width)  # of this rank, under tensor parallelism
        qkv = packed.view(batch, length, 3, heads, self.head_width)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(
            _rotated(q, rotation), _rotated(k, rotation), v, is_causal=True
        )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, heads * self.head_width))
        return result


class Block(nn.Module):
    """Attention and a squared-ReLU MLP, each behind an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, C] → [B, T, C]."""
        x = x + self.attention(self.attention_norm(x), rotation)
        result: Tensor = x + self.down(functional.relu(self.up(self.mlp_norm(x))).square())
        return result


class ByteGPT(nn.Module):
    """Next-byte prediction.

    Args:
        shape: size preset.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, head = shape.width, shape.width // shape.heads
        self.embedding = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        angles = torch.outer(
            torch.arange(shape.context).float(), 10000.0 ** (-torch.arange(0, head, 2).float() / head)
        )
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=width**-0.5)
        nn.init.normal_(self.embedding.weight, std=1.0)
        # Blocks begin as the identity and the head as a uniform guess: the first loss is exactly 8 bits.
        nn.init.zeros_(self.head.weight)
        for block in self.blocks:
            assert isinstance(block, Block)
            nn.init.zeros_(block.attention.out.weight)
            nn.init.zeros_(block.down.weight)

    def tensor_parallel_plan(self, size: int) -> dict[str, ParallelStyle]:
        """Layers that `size` ranks divide: heads of attention, and the inner width of the MLP. What is not
        named here each rank has whole: embedding, norms and head are small.

        Raises:
            ConfigError: the heads cannot be divided so.
        """
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

        from obsinfra.optimization.tensor_styles import PackedColwise

        if self.shape.heads % size:
            raise ConfigError(
                f"{self.shape.heads} heads of byte_gpt cannot be divided among {size} ranks",
                "a number of ranks that divides the heads",
                "choose another --tensor-parallel-size or --model-size",
            )
        styles: dict[str, ParallelStyle] = {}
        for number in range(len(self.blocks)):
            block = f"blocks.{number}"
            styles[f"{block}.attention.qkv"] = PackedColwise(3)
            styles[f"{block}.attention.out"] = RowwiseParallel()
            styles[f"{block}.up"] = ColwiseParallel()
            styles[f"{block}.down"] = RowwiseParallel()
        return styles

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes int64 [B, T], T up to the context → logits of each next byte [B, T, 256]."""
        length = tokens.shape[1]
        rotation = (self.cosine[:length], self.sine[:length])
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate pairs of channels by their position's angle; x [B, H, T, D]."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Windows(Dataset[Tensor]):
    """Non-overlapping windows of a byte string, each with the byte that follows: int64 [context + 1]."""

    def __init__(self, text: Tensor, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        first = index * self.context
        return self.text[first : first + self.context + 1].long()


class ByteGPTWorkload:
    """A byte-level GPT on a text corpus.

    Args:
        data_path: text file or folder; None: the standard library's sources.
        model_size: a name of `SIZES`; None: nano.

    Raises:
        UserError: unknown size.
        DataError: no, or not enough, text.
    """

    name = "byte_gpt"

    def __init__(self, data_path: str | None = None, model_size: str | None = None) -> None:
        size = model_size or "nano"
        if size not in SIZES:
            raise UserError(f"byte_gpt has no size {size!r}", f"one of {', '.join(SIZES)}")
        self.shape = SIZES[size]
        self.corpus: Corpus = open_corpus(data_path, needed=self.shape.context + 1)
        self.training = Windows(self.corpus.training(), self.shape.context)
        self.held_out = Windows(self.corpus.held_out(), self.shape.context)
        self.epoch_windows = min(self.shape.epoch_windows, len(self.training))
        steps = self.shape.epochs * self.epoch_windows // self.shape.batch_size
        self.defaults = Defaults(
            epochs=self.shape.epochs,
            batch_size=self.shape.batch_size,
            learning_rate=self.shape.learning_rate,
            weight_decay=0.1,
            warmup_steps=min(100, steps // 10),
            schedule="cosine",
            metric="bits_per_byte",
            betas=(0.9, 0.95),
        )

    def build_model(self) -> nn.Module:
        """A freshly initialised transformer."""
        return ByteGPT(self.shape)

    def train_batches(
        self, model: nn.Module, *, batch_size: int, seed: int, num_workers: int, device: torch.device
    ) -> Batches:
        """Shuffled windows, int64 [B, context + 1]. An epoch is so many windows of a longer pass."""
        return MapBatches(
            self.training,
            batch_size=batch_size,
            seed=seed,
            num_workers=num_workers,
            kind=f"bytes {self.corpus.digest} by {self.shape.context}",
            epoch_samples=self.epoch_windows,
            drop_last=True,
        )

    def training_step(self, model: nn.Module, batch: Tensor) -> StepOutput:
        """Cross-entropy of each next byte, in nats."""
        loss = _loss(model, batch)
        return StepOutput(loss, len(batch), {"bits_per_byte": loss.detach() / math.log(2)})

    def validate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Loss and bits per byte over evenly spread held-out windows."""
        count = min(VALIDATION_WINDOWS, len(self.held_out))
        chosen = [index * len(self.held_out) // count for index in range(count)]
        total = torch.zeros((), dtype=torch.float64, device=device)
        for first in range(0, count, VALIDATION_BATCH):
            windows = [self.held_out[index] for index in chosen[first : first + VALIDATION_BATCH]]
            total += _loss(model, torch.stack(windows).to(device)).double() * len(windows)
        loss = float(total / count)
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def flops_per_sample(self, model: nn.Module) -> float | None:
        """6 per weight and byte, and 12 · layers · context · width per byte for attention (Chowdhery et al.
        2022, arXiv 2204.02311, appendix B); the embedding is a look-up."""
        shape = self.shape
        weights = sum(p.numel() for p in model.parameters()) - BYTES * shape.width
        per_byte = 6 * weights + 12 * shape.layers * shape.context * shape.width
        return float(per_byte * shape.context)

    def describe_data(self) -> dict[str, Any]:
        """Source and sizes."""
        corpus = self.corpus
        return {
            "source": corpus.source,
            "training_bytes": corpus.training_bytes,
            "training_files": corpus.training_files,
            "held_out_bytes": corpus.held_out_bytes,
            "held_out_files": corpus.held_out_files,
            "context": self.shape.context,
            "digest": corpus.digest,
        }


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1]).float()
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def create_workload(*, data_path: str | None, model_size: str | None, seed: int) -> ByteGPTWorkload:
    """Decoder-only transformer over the bytes of any text folder.

    Raises:
        UserError, DataError: see `ByteGPTWorkload`.
    """
    return ByteGPTWorkload(data_path, model_size)
