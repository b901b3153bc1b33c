"""Each rank's own time per step: under DDP all steps take equally long, and it still tells who is slow."""

from __future__ import annotations

import signal
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from rank_faults import SLOW_SECONDS
from rank_processes import in_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrun_runs import RankedRun
from waiting import wait_for

from obsinfra.catalog import metrics
from obsinfra.observation.ranks import Ranks
from obsinfra.training.own_time import OwnTime

pytestmark = pytest.mark.slow


def shown(url: str) -> dict[str, float]:
    """A rank's gauges that have no labels but the run's."""
    text = urllib.request.urlopen(url, timeout=20).read().decode()
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.keys() == {"run", "model", "rank"}
    }


def _passes_beside_a_slow_rank_0(ranks: Ranks) -> dict[str, tuple[float, float]]:
    """Where rank 0 sleeps → its least seconds by the clock, and by what `OwnTime` says."""
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    own_time = OwnTime(model)

    def sleep(*_: object) -> None:
        if ranks.rank == 0:
            time.sleep(SLOW_SECONDS)

    least = {}
    for where in ("before", "backward"):
        found = []
        for _ in range(6):
            if where == "before":
                sleep()
            started = time.perf_counter()
            loss = model(torch.randn(8, 4)).mean()
            if where == "backward":
                loss.register_hook(sleep)
            forward = time.perf_counter() - started
            own = forward + own_time.backward(loss)
            found.append((time.perf_counter() - started, own))
        least[where] = (min(wall for wall, _ in found), min(own for _, own in found))
    return least


def test_neither_the_wait_for_buffers_nor_that_for_the_exchange_is_own_time() -> None:
    slow, fast = in_group(2, _passes_beside_a_slow_rank_0)
    assert slow["backward"][1] >= SLOW_SECONDS, slow
    assert fast["before"][1] < SLOW_SECONDS / 2 < fast["before"][0], fast
    assert fast["backward"][1] < SLOW_SECONDS / 2 < fast["backward"][0], fast


def test_the_slow_rank_is_told_though_all_steps_take_as_long(tmp_path: Path) -> None:
    """Rank 1 sleeps in the forward and in the backward pass; rank 0 waits for it in the exchange."""
    run = RankedRun(tmp_path, "slow", "--model-name", "rank_faults:create_workload", "--epochs", 10_000)
    with run.launched("--nproc-per-node", 2, env={"RANK_FAULT": "slow"}) as launcher:
        info = run.running(2, step=20)

        def told_apart() -> bool:
            fast, slow = (shown(info.metrics_urls[rank]) for rank in ("0", "1"))
            step, own = metrics.STEP_MEDIAN_SECONDS.sample_name, metrics.STEP_OWN_MEDIAN_SECONDS.sample_name
            assert slow[own] >= 2 * SLOW_SECONDS
            assert all(rank[own] <= rank[step] for rank in (fast, slow))
            return slow[own] > 3 * fast[own] and slow[step] == pytest.approx(fast[step], rel=0.1)

        wait_for(told_apart, "rank 1's own time is well above rank 0's, their steps are alike", seconds=60)
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=100)
