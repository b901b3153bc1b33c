"""The byte transformer sees only the past, counts its bits right, resumes anywhere, and learns."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from obsinfra.errors import DataError, UserError
from obsinfra.workloads.byte_gpt import SIZES, ByteGPT, ByteGPTWorkload, Shape, create_workload
from obsinfra.workloads.protocol import Batches, Workload

CPU = torch.device("cpu")
TINY = Shape(
    layers=2, width=32, heads=2, context=24, batch_size=4, learning_rate=1e-3, epochs=1, epoch_windows=8
)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory) -> ByteGPTWorkload:
    """Nano on the standard library's sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return create_workload(data_path=None, model_size=None, seed=0)


def trained_looking(shape: Shape = TINY, seed: int = 0) -> ByteGPT:
    """No layer left at zero, as it begins."""
    torch.manual_seed(seed)
    model = ByteGPT(shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@given(seed=st.integers(0, 2**32 - 1), length=st.integers(2, 24), data=st.data())
@settings(max_examples=60, deadline=None)
def test_changing_later_bytes_never_changes_earlier_logits(
    seed: int, length: int, data: st.DataObject
) -> None:
    """Bit for bit, at any length up to the context; and the changed bytes do reach later logits."""
    first = data.draw(st.integers(1, length - 1))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(256, (2, length), generator=generator)
    changed = tokens.clone()
    changed[:, first:] = (
        tokens[:, first:] + torch.randint(1, 256, (2, length - first), generator=generator)
    ) % 256
    model = trained_looking()
    with torch.inference_mode():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first:] != after[:, first:]).any(-1).all()


def test_every_earlier_byte_of_the_context_counts() -> None:
    """The last logits depend on each byte of the window, so attention does reach back to its beginning."""
    model = trained_looking()
    tokens = torch.randint(256, (1, TINY.context), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        last = model(tokens)[0, -1]
        for place in range(TINY.context):
            changed = tokens.clone()
            changed[0, place] = (changed[0, place] + 1) % 256
            assert not torch.equal(model(changed)[0, -1], last), place


def test_the_order_of_earlier_bytes_counts() -> None:
    """Positions are rotated in: a bag of the same bytes is another context."""
    model = trained_looking()
    tokens = torch.arange(TINY.context).unsqueeze(0)
    swapped = tokens.clone()
    swapped[0, [3, 7]] = swapped[0, [7, 3]]
    with torch.inference_mode():
        assert not torch.allclose(model(tokens)[0, -1], model(swapped)[0, -1])


def reference_logits(model: ByteGPT, tokens: list[int]) -> Tensor:
    """Logits of the last position, one position and head at a time, in float64."""
    shape = TINY
    half = shape.width // shape.heads // 2

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + torch.finfo(torch.float32).eps) * weight.double()

    def rotated(x: Tensor, position: int) -> Tensor:
        turned = torch.empty_like(x)
        for i in range(half):
            angle = position * 10000.0 ** (-2 * i / (2 * half))
            turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
            turned[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
        return turned

    rows = [model.embedding.weight[token].double() for token in tokens]
    for block in model.blocks:
        attention = block.attention
        qkv = [
            (attention.qkv.weight.double() @ norm(row, block.attention_norm.weight)).view(3, shape.heads, -1)
            for row in rows
        ]
        mixed = []
        for t in range(len(rows)):
            heads = []
            for head in range(shape.heads):
                query = rotated(qkv[t][0, head], t)
                scores = torch.stack(
                    [query @ rotated(qkv[s][1, head], s) / math.sqrt(2 * half) for s in range(t + 1)]
                )
                shares = torch.softmax(scores, 0)
                heads.append(sum(share * qkv[s][2, head] for s, share in enumerate(shares)))
            mixed.append(attention.out.weight.double() @ torch.cat(heads))
        rows = [row + part for row, part in zip(rows, mixed, strict=True)]
        rows = [
            row
            + block.down.weight.double()
            @ torch.relu(block.up.weight.double() @ norm(row, block.mlp_norm.weight)).square()
            for row in rows
        ]
    return model.head.weight.double() @ norm(rows[-1], model.norm.weight)


def test_logits_are_those_of_a_position_by_position_transformer() -> None:
    model = trained_looking()
    tokens = torch.randint(256, (11,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(
            model(tokens.unsqueeze(0))[0, -1].double(),
            reference_logits(model, tokens.tolist()),
            rtol=1e-3,
            atol=1e-3,
        )


def test_it_is_a_workload_over_disjoint_files(workload: ByteGPTWorkload) -> None:
    assert isinstance(workload, Workload)
    described = workload.describe_data()
    assert described["training_bytes"] > 10 * described["held_out_bytes"] > 10**6
    assert "folder" not in described


def test_windows_tile_the_text_and_carry_the_byte_that_follows(workload: ByteGPTWorkload) -> None:
    text, windows = workload.corpus.training(), workload.training
    context = workload.shape.context
    assert len(windows) == (len(text) - 1) // context
    for index in (0, 1, len(windows) - 1):
        window = windows[index]
        assert window.dtype == torch.int64 and len(window) == context + 1
        assert torch.equal(window, text[index * context : (index + 1) * context + 1].long())


def test_the_first_guess_is_exactly_eight_bits(workload: ByteGPTWorkload) -> None:
    torch.manual_seed(0)
    model = workload.build_model().eval()
    with torch.inference_mode():
        assert workload.validate(model, CPU)["bits_per_byte"] == pytest.approx(8, abs=1e-5)


class Unigram(nn.Module):
    """Predicts every byte with one fixed distribution."""

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.logits = frequencies.log()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits.expand(*tokens.shape, 256)


def test_bits_per_byte_are_the_cross_entropy_of_held_out_bytes(workload: ByteGPTWorkload) -> None:
    """Counted by hand for a model of byte frequencies; and the step's metric says the same of its batch."""
    counts = torch.bincount(workload.corpus.training().long(), minlength=256).double() + 1
    model = Unigram((counts / counts.sum()).float())
    windows, context = workload.held_out, workload.shape.context
    chosen = [index * len(windows) // 512 for index in range(512)]
    follows = torch.cat([windows[index][1:] for index in chosen])
    bits = -(counts / counts.sum()).log2()
    found = workload.validate(model, CPU)
    assert found["bits_per_byte"] == pytest.approx(float(bits[follows].mean()), rel=1e-5)
    assert found["loss"] == pytest.approx(found["bits_per_byte"] * math.log(2))
    batch = torch.stack([windows[0], windows[7]])
    output = workload.training_step(model, batch)
    expected = float(bits[batch[:, 1:].flatten()].mean())
    assert float(output.metrics["bits_per_byte"]) == pytest.approx(expected, rel=1e-5)
    assert output.samples == 2 and len(batch[0]) == context + 1


def test_validation_is_deterministic_and_draws_nothing(workload: ByteGPTWorkload) -> None:
    model = trained_looking(SIZES["nano"])
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert workload.validate(model, CPU) == workload.validate(model, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def make(workload: ByteGPTWorkload, workers: int = 0, seed: int = 5) -> Batches:
    return workload.train_batches(nn.Identity(), batch_size=64, seed=seed, num_workers=workers, device=CPU)


def take(batches: Batches, count: int) -> list[Tensor]:
    taken: list[Tensor] = []
    while len(taken) < count:
        for batch in batches:
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


@pytest.mark.parametrize(("position", "workers"), [(0, 0), (1, 0), (11, 2), (18, 0), (19, 2), (30, 0)])
def test_interrupted_anywhere_the_rest_is_bit_identical(
    workload: ByteGPTWorkload, position: int, workers: int
) -> None:
    """Over the end of an epoch of 18 batches, with and without workers."""
    assert len(make(workload)) == 18
    whole = take(make(workload), 36)
    interrupted = make(workload, workers)
    taken = take(interrupted, position) if position else []
    resumed = make(workload)
    resumed.load_state_dict(interrupted.state_dict())
    taken += take(resumed, 36 - position)
    assert all(torch.equal(one, other) for one, other in zip(taken, whole, strict=True))
    assert not torch.equal(take(make(workload, seed=6), 1)[0], whole[0])


def test_a_state_over_another_text_is_refused(
    workload: ByteGPTWorkload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    email = ByteGPTWorkload(str(Path(sysconfig.get_path("stdlib"), "email")))
    with pytest.raises(DataError, match="has kind 'bytes"):
        make(email).load_state_dict(make(workload).state_dict())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_their_names_promise(size: str) -> None:
    """Shapes alone, without memory behind them."""
    with torch.device("meta"):
        model = ByteGPT(SIZES[size])
    count = sum(parameter.numel() for parameter in model.parameters())
    low, high = {
        "nano": (0.5e6, 1e6), "micro": (3e6, 6e6), "small": (10e6, 18e6),
        "medium": (35e6, 45e6), "124m": (120e6, 128e6),
    }[size]  # fmt: skip
    assert low < count < high
    assert model(torch.zeros(1, 2, dtype=torch.int64, device="meta")).shape == (1, 2, 256)


def test_an_unknown_size_names_the_known_ones() -> None:
    with pytest.raises(UserError) as caught:
        create_workload(data_path=None, model_size="xl", seed=0)
    assert (
        "'xl'" in caught.value.wrong and "nano" in caught.value.expected and "124m" in caught.value.expected
    )


def test_flops_agree_with_torchs_count(workload: ByteGPTWorkload) -> None:
    torch.manual_seed(0)
    model = workload.build_model()
    batch = torch.stack([workload.training[index] for index in range(4)])
    # The counter does not know the fused attention of the CPU; the plain one is two products it does know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        workload.training_step(model, batch).loss.backward()
    assert workload.flops_per_sample(model) == pytest.approx(counter.get_total_flops() / 4, rel=0.05)


@pytest.mark.slow
def test_it_learns_held_out_text_by_its_own_defaults(workload: ByteGPTWorkload) -> None:
    """Two of its eight epochs; the full figure is in benchmarks/results/byte_gpt.txt."""
    torch.manual_seed(0)
    model, defaults = workload.build_model(), workload.defaults
    batches = workload.train_batches(model, batch_size=defaults.batch_size, seed=0, num_workers=0, device=CPU)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=defaults.learning_rate,
        betas=defaults.betas,
        weight_decay=defaults.weight_decay,
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=defaults.warmup_steps)
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            workload.training_step(model, batch).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warmup.step()
    with torch.inference_mode():
        found = workload.validate(model.eval(), CPU)
    print(found)
    assert found["bits_per_byte"] < 3.4
