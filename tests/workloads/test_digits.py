"""The digits: fixed held-out images, exact resume, and 97 % of them read right after training."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.utils import clip_grad_norm_
from torch.utils.flop_counter import FlopCounterMode

from obsinfra.errors import UserError
from obsinfra.workloads.digits import SIZES, Digits, create_workload
from obsinfra.workloads.protocol import Batches, Workload

CPU = torch.device("cpu")


@cache
def workload() -> Digits:
    return create_workload(data_path=None, model_size=None, seed=0)


def test_every_image_is_on_exactly_one_side() -> None:
    """Scaled to 0 … 1, each with its own label, and the same sides for every seed."""
    assert isinstance(workload(), Workload)
    bunch = load_digits()
    expected = sorted((*image, label) for image, label in zip(bunch.data.tolist(), bunch.target, strict=True))
    found = []
    for part in (workload().training, workload().held_out):
        flat = (part.images * 16).flatten(1).tolist()
        found += [(*image, label) for image, label in zip(flat, part.labels.tolist(), strict=True)]
    assert sorted(found) == expected
    assert (len(workload().training), len(workload().held_out)) == (1437, 360)
    assert workload().describe_data()["held_out_images"] == 360
    other = create_workload(data_path=None, model_size=None, seed=12345)
    assert torch.equal(other.held_out.images, workload().held_out.images)
    assert np.bincount(workload().held_out.labels.numpy(), minlength=10).min() >= 20


def test_an_epoch_shows_every_training_image_once() -> None:
    batches = workload().train_batches(
        workload().build_model(), batch_size=100, seed=3, num_workers=0, device=CPU
    )
    epoch = list(batches)
    assert [len(labels) for _, labels in epoch] == [100] * 14 + [37]
    shown = torch.cat([images for images, _ in epoch]).flatten(1)
    assert sorted(shown.tolist()) == sorted(workload().training.images.flatten(1).tolist())


def test_workers_load_the_same_batches_from_any_position() -> None:
    def make(workers: int) -> Batches:
        model = workload().build_model()
        return workload().train_batches(model, batch_size=300, seed=3, num_workers=workers, device=CPU)

    whole = list(make(0))
    interrupted = make(2)
    iterator = iter(interrupted)
    taken = [next(iterator), next(iterator)]
    resumed = make(2)
    resumed.load_state_dict(interrupted.state_dict())
    taken += resumed
    for one, other in zip(taken, whole, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_the_step_is_cross_entropy_and_validation_counts_hits() -> None:
    torch.manual_seed(0)
    model = workload().build_model().eval()
    images, labels = workload().held_out.images[:50], workload().held_out.labels[:50]
    with torch.inference_mode():
        output = workload().training_step(model, (images, labels))
        probability = model(images).softmax(-1)
        expected = (
            -sum(math.log(p[label]) for p, label in zip(probability.tolist(), labels, strict=True)) / 50
        )
        assert float(output.loss) == pytest.approx(expected, rel=1e-5) and output.samples == 50
        before = torch.get_rng_state()
        found = workload().validate(model, CPU)
        assert torch.equal(torch.get_rng_state(), before) and found == workload().validate(model, CPU)
        hits = model(workload().held_out.images).argmax(-1) == workload().held_out.labels
    assert found["accuracy"] == pytest.approx(int(hits.sum()) / 360)


@pytest.mark.parametrize("size", SIZES)
def test_flops_agree_with_torchs_count(size: str) -> None:
    """All but the first convolution's gradient of its input, which nobody needs."""
    here = create_workload(data_path=None, model_size=size, seed=0)
    model = here.build_model()
    batch = (here.training.images[:8], here.training.labels[:8])
    with FlopCounterMode(display=False) as counter:
        here.training_step(model, batch).loss.backward()
    assert here.flops_per_sample(model) == pytest.approx(counter.get_total_flops() / 8, rel=0.05)


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="has no size 'tiny'; expected one of small, medium"):
        create_workload(data_path=None, model_size="tiny", seed=0)
    with pytest.raises(UserError, match="does not read 'images/'"):
        create_workload(data_path="images/", model_size=None, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_it_reads_97_percent_of_unseen_digits(seed: int) -> None:
    """By the workload's own defaults, at a constant rate."""
    torch.manual_seed(seed)
    model, defaults = workload().build_model(), workload().defaults
    batches = workload().train_batches(
        model, batch_size=defaults.batch_size, seed=seed, num_workers=0, device=CPU
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=defaults.learning_rate, weight_decay=defaults.weight_decay
    )
    for _ in range(defaults.epochs):
        for batch in batches:
            optimizer.zero_grad(set_to_none=True)
            workload().training_step(model, batch).loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    with torch.inference_mode():
        found = workload().validate(model.eval(), CPU)
    print(found)
    assert found["accuracy"] >= 0.97
