"""Whatever is given to the optimisers: an error that names the value, what was expected and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from obsinfra import create_gpu_optimizer, create_memory_optimizer
from obsinfra.errors import UserError
from obsinfra.optimization.activation_checkpointing import checkpoint_activations
from obsinfra.optimization.attention_kernels import measure_attention
from obsinfra.optimization.data_loading import create_memory_efficient_dataloader
from obsinfra.optimization.datasets import MappedArrays, MappedBytes, ParquetRows, csv_rows, hdf5_rows
from obsinfra.optimization.micro_batching import MicroBatching

CPU = create_gpu_optimizer(device="cpu", mixed_precision=False)
LINE = nn.Linear(2, 1)
HUGE = 10**400
"""A whole number that no float holds."""


def loader(**given: Any) -> Any:
    return create_memory_efficient_dataloader(
        given.pop("dataset", [1.0, 2.0, 3.0]), **{"batch_size": 1, **given}
    )


def sum_of(model: nn.Module, rows: int = 2) -> torch.Tensor:
    return model(torch.ones(rows, 2)).sum()  # type: ignore[no-any-return]


def enter(block: Any) -> None:
    with block:
        pass


GPU = [
    ("device_ids", [0.5]), ("device_ids", "0"), ("device_ids", 0), ("device_ids", [None]), ("device_ids", []),
    ("device_ids", {}), ("device_ids", object()), ("device_ids", [-1]), ("device_ids", [True]),
    ("device", None), ("device", 3), ("device", "gpu"), ("device", ""), ("device", "meta"),
    ("device", b"cpu"),
    ("mixed_precision", None), ("mixed_precision", "half"), ("mixed_precision", 16), ("mixed_precision", []),
    ("compile_model", None), ("compile_model", 1), ("compile_model", "yes"),
    ("compile_mode", "fast"), ("compile_mode", None), ("compile_mode", []),
    ("gradient_checkpointing", -1), ("gradient_checkpointing", 1.5), ("gradient_checkpointing", None),
    ("activation_budget_bytes", 0), ("activation_budget_bytes", 1.5), ("activation_budget_bytes", math.nan),
    ("channels_last", 2), ("channels_last", None), ("channels_last", "always"),
    ("tf32", "no"), ("disable_gpu", None), ("autocast_pays", 0),
    ("attention", None), ("attention", []), ("attention", "FLASH"),
    ("peak_flops", -1), ("peak_flops", math.nan), ("peak_flops", math.inf), ("peak_flops", "1e12"),
]  # fmt: skip

MEMORY = [
    ("max_memory_percent", "85"), ("max_memory_percent", math.nan), ("max_memory_percent", math.inf),
    ("max_memory_percent", None), ("max_memory_percent", HUGE), ("max_memory_percent", 1 + 2j),
    ("micro_batch", 0), ("micro_batch", 2.5), ("micro_batch", "4"), ("micro_batch", True),
    ("micro_batch", []),
    ("gc", None), ("gc", True), ("gc", ["python"]),
    ("leak_check_steps", -1), ("leak_check_steps", 1.5), ("leak_check_steps", None),
    ("leak_check_steps", "10"),
    ("oom_recovery", "on"), ("splittable", None), ("gradient_checkpointing", 2), ("profile", "yes"),
    ("device", "gpu0"), ("device", 0), ("agreement", object()),
]  # fmt: skip

LOADER = [
    ("batch_size", 2.5), ("batch_size", 0), ("batch_size", -1), ("batch_size", None), ("batch_size", "8"),
    ("batch_size", True), ("batch_size", math.nan), ("num_workers", 1.5), ("num_workers", -1),
    ("num_workers", "2"), ("prefetch", 0), ("prefetch", 0.5), ("prefetch", 10**9),
    ("pin_memory", "yes"), ("shuffle", "no"),
    ("drop_last", None), ("random_records", 1), ("seed", 1.5), ("seed", None), ("seed", "a"),
    ("step_seconds", -1), ("step_seconds", math.nan), ("step_seconds", "1"), ("measure_seconds", math.inf),
    ("measure_seconds", -1), ("measure_seconds", None), ("timeout_seconds", math.nan),
    ("timeout_seconds", None), ("timeout_seconds", 1e300), ("max_memory_percent", 0),
    ("max_memory_percent", math.nan), ("max_memory_percent", "85"), ("max_skipped", -1),
    ("max_skipped", 0.5), ("collate", 3),
    ("corrupt_errors", ValueError), ("corrupt_errors", (3,)), ("corrupt_errors", [ValueError]),
    ("device", "gpu"), ("device", None), ("device", "meta"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *((create_gpu_optimizer, *case) for case in GPU),
        *((create_memory_optimizer, *case) for case in MEMORY),
        *((loader, *case) for case in LOADER),
    ],
)
def test_a_setting_of_another_kind_or_out_of_range_is_named(make: Any, name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        make(**{name: value})
    known_as = {"mixed_precision": "precision", "device_ids": "device"}.get(name, name)
    assert known_as in str(caught.value).replace("_", " ") or known_as in str(caught.value)
    assert "expected" in str(caught.value) and len(str(caught.value)) < 300


def memory() -> Any:
    made = create_memory_optimizer()
    made.optimize_for_training(nn.Linear(2, 1))
    return made


CALLS: dict[str, tuple[Callable[[], Any], str]] = {
    "optimize nothing": (lambda: CPU.optimize_model(None), "a model None"),  # type: ignore[type-var]
    "optimize a class": (lambda: CPU.optimize_model(nn.Linear), "a model <class"),  # type: ignore[type-var]
    "optimize without values": (
        lambda: CPU.optimize_model(nn.Linear(2, 1, device="meta")), "Linear whose weight is on the meta",
    ),
    "loss that is none": (lambda: CPU.optimize_model(nn.Linear(2, 1), loss=3), "loss 3"),  # type: ignore[arg-type]
    "decisions about nothing": (lambda: CPU.decisions([]), "decisions about a model"),  # type: ignore[arg-type]
    "no parameters": (lambda: CPU.create_optimizer([]), "no parameters to optimize"),
    "a model's for parameters": (lambda: CPU.create_optimizer(LINE), "parameters of type Linear"),  # type: ignore[arg-type]
    "one parameter": (lambda: CPU.create_optimizer(LINE.weight), "parameters of type Parameter"),
    "names for parameters": (lambda: CPU.create_optimizer(["weight"]), "a parameter 'weight'"),
    "None among parameters": (lambda: CPU.create_optimizer([None]), "a parameter None"),
    "a group without any": (lambda: CPU.create_optimizer([{"lr": 1.0}]), "a parameter {'lr'"),
    "a number for parameters": (lambda: CPU.create_optimizer(3), "parameters 3"),  # type: ignore[arg-type]
    "an option that is none": (
        lambda: CPU.create_optimizer(LINE.parameters(), momentun=0.9), "AdamW with the options {'momentun'",
    ),
    "an option out of range": (
        lambda: CPU.create_optimizer(LINE.parameters(), lr=-1.0), "AdamW with the options {'lr': -1.0}",
    ),
    "a kind that is none": (lambda: CPU.create_optimizer(LINE.parameters(), "AdamW"), "kind 'AdamW'"),  # type: ignore[arg-type]
    "batch of no model": (lambda: CPU.find_batch_size(None, sum_of), "a model None"),  # type: ignore[arg-type]
    "batch without loss": (lambda: CPU.find_batch_size(LINE, None), "loss None"),  # type: ignore[arg-type]
    "batch from half a row": (lambda: CPU.find_batch_size(LINE, sum_of, first=0.5), "first 0.5"),
    "batch up to NaN": (lambda: CPU.find_batch_size(LINE, sum_of, last=math.nan), "last nan"),
    "batch up to text": (lambda: CPU.find_batch_size(LINE, sum_of, last="64"), "last '64'"),
    "no rounds": (lambda: CPU.find_batch_size(LINE, sum_of, rounds=0), "rounds 0"),
    "no memory": (lambda: CPU.find_batch_size(LINE, sum_of, limit_bytes=0), "limit_bytes 0"),
    "all memory and more": (lambda: CPU.find_batch_size(LINE, sum_of, memory_share=2), "memory_share 2"),
    "half a thread": (lambda: CPU.tune_threads(lambda: None, candidates=[1.5]), "candidates 1.5"),
    "no thread": (lambda: CPU.tune_threads(lambda: None, candidates=[0]), "candidates 0"),
    "threads that are no list": (lambda: CPU.tune_threads(lambda: None, candidates=2), "candidates 2"),
    "threads for no step": (lambda: CPU.tune_threads(None), "step None"),  # type: ignore[arg-type]
    "threads in no rounds": (lambda: CPU.tune_threads(lambda: None, rounds=0), "rounds 0"),
    "watch for ever": (lambda: CPU.monitor_gpu_utilization(math.inf), "duration inf"),
    "watch longer than clocks go": (
        lambda: CPU.monitor_gpu_utilization(1e300, interval=1e300), "duration 1e+300",
    ),
    "a name that is none": (lambda: CPU.optimize_model(nn.Linear(2, 1), []), "a model's name []"),  # type: ignore[arg-type]
    "watch for NaN": (lambda: CPU.monitor_gpu_utilization(math.nan), "duration nan"),
    "watch for text": (lambda: CPU.monitor_gpu_utilization("30"), "duration '30'"),  # type: ignore[arg-type]
    "watch all the time": (lambda: CPU.monitor_gpu_utilization(1, interval=0), "interval 0"),
    "export to nothing": (lambda: CPU.watch(None), "a monitor None"),  # type: ignore[arg-type]
    "serve nothing": (lambda: CPU.optimize_for_inference(None, torch.ones(1, 2)), "a model None"),  # type: ignore[arg-type]
    "serve for no call": (lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), calls=0), "calls 0"),
    "serve in no engine": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), engines=[]), "engines []",
    ),
    "serve in letters": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), engines="tensorrt"), "engines 'tensorrt'",
    ),
    "serve in another engine": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), engines=[None]), "inference engine None",
    ),
    "serve what does not fit": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 3), engines=["torchscript"]),
        "Linear does not run on the example",
    ),
    "serve in no time": (lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), seconds=0), "seconds 0"),
    "agree to NaN": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), tolerance=math.nan), "tolerance nan",
    ),
    "keep nowhere": (lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), folder=3), "folder 3"),
    "serve without values": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2, device="meta")), "an example on the meta",
    ),
    "serve what has no shapes yet": (
        lambda: CPU.optimize_for_inference(nn.LazyLinear(2), torch.ones(1, 2)), "with lazy parameters",
    ),
    "serve what cannot be copied": (
        lambda: CPU.optimize_for_inference(Keeps(), torch.ones(1, 2)), "a Keeps that cannot be copied",
    ),
    "keep in a file": (
        lambda: CPU.optimize_for_inference(LINE, torch.ones(1, 2), folder=Path(__file__)), "File exists",
    ),
    "batch of what cannot be copied": (lambda: CPU.find_batch_size(Keeps(), sum_of), "cannot be copied"),
    "batch of more rows than bytes": (
        lambda: CPU.find_batch_size(LINE, sum_of, last=10**30), "up to 1099511627776",
    ),
    "batch with a loss of its own": (
        lambda: CPU.find_batch_size(LINE, lambda model, rows: None), "a loss None",  # type: ignore[arg-type,return-value]
    ),
    "batch with a loss per row": (
        lambda: CPU.find_batch_size(LINE, lambda model, rows: model(torch.ones(3, 2)), first=3),
        "a loss of shape [3, 1], with a gradient",
    ),
    "batch that learns nothing": (
        lambda: CPU.find_batch_size(LINE, lambda model, rows: torch.ones(())), "a loss of shape [], without",
    ),
    "layout by no loss": (
        lambda: CPU.optimize_model(nn.Conv2d(1, 1, 1), loss=lambda model: None), "a loss None",  # type: ignore[arg-type,return-value]
    ),
    "recompute every none": (lambda: checkpoint_activations(nn.ModuleList([LINE]), every=0), "every 0"),
    "recompute nothing": (lambda: checkpoint_activations(None), "a model None"),  # type: ignore[arg-type]
    "attention of two": (lambda: attention((1, 2)), "shape (1, 2)"),
    "attention of no rows": (lambda: attention((1, 2, 0, 4)), "shape with 0"),
    "attention of whole numbers": (lambda: attention((1, 2, 3, 4), torch.int64), "dtype 'torch.int64'"),
    "attention in no rounds": (lambda: attention((1, 2, 3, 4), rounds=0), "rounds 0"),
    "attention in eight bits": (
        lambda: attention((1, 2, 3, 4), torch.float8_e4m3fn), "float8_e4m3fn'; expected one of torch.float16",
    ),
    "train nothing": (lambda: create_memory_optimizer().optimize_for_training(None), "a model None"),  # type: ignore[arg-type]
    "train what has no shapes yet": (
        lambda: create_memory_optimizer().optimize_for_training(nn.LazyBatchNorm1d()), "with lazy buffers",
    ),
    "optimizer of what has no shapes yet": (
        lambda: CPU.create_optimizer(nn.LazyLinear(2).parameters()), "parameters without a shape",
    ),
    "batch of what has no shapes yet": (
        lambda: CPU.find_batch_size(nn.LazyLinear(2), sum_of), "a LazyLinear with lazy parameters",
    ),
    "run no batch": (lambda: memory().run(0, [], len), "batches []"),
    "run a bare batch": (lambda: memory().run(0, torch.ones(8, 2), len), "batches of type Tensor"),
    "run a tuple": (lambda: memory().run(0, (torch.ones(8, 2), torch.ones(8)), len), "a list of one or more"),
    "run what is gone afterwards": (lambda: memory().run(0, iter([1]), len), "batches of type list_iterator"),
    "run nothing on it": (lambda: memory().run(0, [torch.ones(8, 2)], None), "attempt None"),
    "watch what is none": (lambda: enter(memory().watching(object())), "a monitor of type object"),
    "watch half a row": (lambda: enter(memory().watching(None, 0.5)), "batch_size 0.5"),
    "one look": (lambda: memory().leak_detector(looks=1), "looks 1"),
    "no look": (lambda: memory().leak_detector(looks=0), "looks 0"),
    "leaks of NaN": (lambda: memory().leak_detector(least_bytes=math.nan), "least_bytes nan"),
    "lines below none": (lambda: memory().memory_profiler("x", python_top=-1), "python_top -1"),
    "half a line": (lambda: memory().memory_profiler("x", python_top=0.5), "python_top 0.5"),
    "no entries": (lambda: enter(memory().cuda_memory_snapshot("x", entries=0)), "entries 0"),
    "a stream for a number": (lambda: loader(dataset=3), "a int without __len__"),
    "no data set": (lambda: loader(dataset=None), "a NoneType without __len__"),
    "records without an order": (lambda: loader(dataset={1, 2}), "a set without __len__ and __getitem__"),
    "no records": (lambda: loader(dataset=[]), "0 records"),
    "a position that is none": (lambda: loader(num_workers=0).load_state_dict(None), "data position None"),
    "a position without numbers": (
        lambda: with_position(loader(num_workers=0), delivered="two"), "delivered 'two'",
    ),
    "a position that lacks one": (lambda: with_position(loader(num_workers=0), epoch=None), "epoch None"),
    "a position before the first": (
        lambda: with_position(loader(num_workers=0), delivered=-1), "delivered -1",
    ),
    "a position past the last": (
        lambda: with_position(loader(num_workers=0), delivered=4), "delivered 4",
    ),
    "records by name": (lambda: loader(dataset={"a": 1.0}), "a dict with keys ['a']"),
    "a bomb of workers": (lambda: loader(num_workers=10**9), "num_workers 1000000000"),
    "records of no kind": (lambda: list(loader(dataset=[object()], num_workers=0)), "cannot make a batch of"),
    "records that are none": (lambda: list(loader(dataset=[None], num_workers=0)), "cannot make a batch of"),
    "records of two shapes": (
        lambda: list(loader(dataset=[torch.ones(2), torch.ones(3)], batch_size=2, num_workers=0)),
        "stack expects each tensor to be equal size",
    ),
    "a stream's records of no kind": (
        lambda: list(loader(dataset=Items([object()]), num_workers=0)), "cannot make a batch of",
    ),
    "a stream's position of another kind": (lambda: go_on(stream={"x": 1}), "that cannot be gone on from"),
    "a stream's position without workers": (lambda: go_on(workers=None, num_workers=None), "workers None"),
    "a size that is none": (lambda: MicroBatching().load_state_dict(None), "size None"),  # type: ignore[arg-type]
    "a size below one": (lambda: with_size(limit=-3), "limit -3"),
    "a size in words": (lambda: with_size(whole="x"), "whole 'x'"),
    "columns in letters": (lambda: csv_rows(__file__, "open"), "columns 'open'"),
    "columns by number": (lambda: csv_rows(__file__, [3]), "columns [3]"),  # type: ignore[list-item]
    "rows of nothing": (lambda: csv_rows(None), "path None"),  # type: ignore[arg-type]
    "chunks of nothing": (lambda: hdf5_rows(None), "path None"),  # type: ignore[arg-type]
    "arrays of nothing": (lambda: MappedArrays(None), "a file None"),  # type: ignore[arg-type]
    "bytes of nothing": (lambda: MappedBytes(None, 8), "path None"),  # type: ignore[arg-type]
    "groups of nothing": (lambda: ParquetRows(None), "a file None"),  # type: ignore[arg-type]
    "groups of a number": (lambda: ParquetRows([3]), "a file 3"),  # type: ignore[list-item]
    "windows of half a byte": (lambda: MappedBytes(__file__, 0.5), "window 0.5"),  # type: ignore[arg-type]
    "no stride": (lambda: MappedBytes(__file__, 8, 0), "stride 0"),
}  # fmt: skip


class Keeps(nn.Linear):
    """Has the result of a computation among its attributes."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.kept = self.weight * 2


class Items(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def attention(shape: Any, dtype: torch.dtype = torch.float32, rounds: int = 1) -> Any:
    return measure_attention(shape, torch.device("cpu"), dtype, rounds=rounds)


def go_on(num_workers: int | None = 0, **changed: Any) -> None:
    """A stream from a position that was changed."""
    first = loader(dataset=Items([1.0, 2.0, 3.0]), num_workers=0)
    next(iter(first))
    second = loader(dataset=Items([1.0, 2.0, 3.0]), num_workers=num_workers)
    second.load_state_dict({**first.state_dict(), **changed})
    list(second)


def with_size(**changed: Any) -> None:
    MicroBatching().load_state_dict({**MicroBatching().state_dict(), **changed})


def with_position(made: Any, **changed: Any) -> None:
    made.load_state_dict({**made.state_dict(), **changed})


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_makes_no_sense_says_so(case: str) -> None:
    call, named = CALLS[case]
    with pytest.raises(UserError) as caught:
        call()
    assert named in str(caught.value) and "expected" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_loader_for_a_device_that_is_not_there_says_so() -> None:
    with pytest.raises(UserError, match=r"device 'cuda'; expected a CUDA device of this machine \(none\)"):
        loader(device="cuda")


@pytest.mark.parametrize("delimiter", ["", ";;", '"', "\n", None, 3])
def test_a_delimiter_that_is_none_is_named(tmp_path: Path, delimiter: Any) -> None:
    (tmp_path / "rows.csv").write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match=r"delimiter .*expected one character"):
        csv_rows(tmp_path / "rows.csv", delimiter=delimiter)


def test_a_file_with_another_delimiter_is_told_from_one_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a;b\n1;2\n")
    with pytest.raises(UserError, match=r"no column b .*fix: delimiter=';'"):
        csv_rows(tmp_path / "rows.csv", ["b"])
    assert csv_rows(tmp_path / "rows.csv", ["b"], delimiter=";")[0]["b"] == 2


def test_numbers_of_numpy_are_numbers() -> None:
    made = loader(batch_size=np.int64(2), num_workers=np.int32(0), max_memory_percent=np.float32(50))
    assert [len(batch) for batch in made] == [2, 1]
    assert create_memory_optimizer(np.float64(50), micro_batch=np.int64(4)).micro_batching.limit == 4


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows * self.weight).abs()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(rows))  # type: ignore[no-any-return]


ODD = {
    "no parameters": nn.ReLU,
    "shared parameters": Shared,
    "lazy": lambda: nn.LazyLinear(3),
    "complex": Complex,
    "frozen": lambda: nn.Linear(2, 1).requires_grad_(False),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_models_are_prepared_told_of_and_recovered(kind: str) -> None:
    model = ODD[kind]()  # type: ignore[operator]
    CPU.optimize_model(model, kind)
    made = create_memory_optimizer()
    made.optimize_for_training(model)
    assert made.get_memory_info()["model"]["parameters"] >= 0
    made.get_memory_recommendations()
    sizes: list[int] = []

    def passes(shares: Any) -> None:
        for rows, weight, _ in shares:
            loss = model(rows).sum() * weight
            if loss.requires_grad:
                loss.backward()
            sizes.append(len(rows))
            if len(sizes) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    made.run(0, [torch.ones(8, 2)], passes)
    assert sizes == [8, 4, 4]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        before = [parameter.detach().clone() for parameter in trained]
        CPU.create_optimizer(trained, torch.optim.SGD, lr=0.1).step()
        assert any(not torch.equal(*pair) for pair in zip(before, trained, strict=True))
    assert made.get_memory_info()["model"]["gradient_bytes"] == sum(
        p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None
    )
