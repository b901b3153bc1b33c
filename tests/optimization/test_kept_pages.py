"""Pages of freed memory stay in the process, and go when they are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from obsinfra.errors import ConfigError
from obsinfra.optimization.kept_pages import _USERS_OWN, keep_freed_pages
from obsinfra.optimization.memory_optimizer import create_memory_optimizer
from obsinfra.optimization.reclaim import trim_allocator

CPU = torch.device("cpu")

STEPS = """
import json, resource, sys, torch
from obsinfra.optimization.memory_optimizer import create_memory_optimizer
from obsinfra.optimization.reclaim import resident_bytes, trim_allocator

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():  # 160 MiB in blocks that glibc maps one by one
    kept = [torch.ones(2**22) for _ in range(10)]

create_memory_optimizer(0, keep_freed_pages=sys.argv[1]).optimize_for_training(torch.nn.Linear(2, 2))
for _ in range(3):
    step()
before = faults()
for _ in range(10):
    step()
after, held = faults(), resident_bytes()
trim_allocator()
print(json.dumps({"faults": after - before, "held": held, "trimmed": resident_bytes()}))
"""


def steps(wanted: str, **environment: str) -> dict[str, Any]:
    clean = {name: value for name, value in os.environ.items() if name not in _USERS_OWN}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, wanted],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.skipif(not trim_allocator(), reason="this C library is not glibc")
def test_a_step_finds_the_pages_of_the_one_before() -> None:
    given_back, kept, own = (
        steps("off"),
        steps("auto"),
        steps("auto", MALLOC_TRIM_THRESHOLD_="131072"),
    )
    # With huge pages a fault is 2 MiB; without, 4 KiB.
    assert kept["faults"] < 10 <= given_back["faults"] / 10
    assert own["faults"] > 100, "glibc's own variable was not heeded"
    assert kept["held"] > given_back["held"] + 100 * 2**20
    assert kept["trimmed"] < kept["held"] - 100 * 2**20, "the guard could not have given them back"


def test_it_is_for_the_cpu_and_says_why_not() -> None:
    assert keep_freed_pages("auto", torch.device("cuda", 0), {}) == (False, "the model is on cuda:0")
    assert keep_freed_pages("off", CPU, {}) == (False, "as asked for")
    for name in _USERS_OWN:
        assert keep_freed_pages("auto", CPU, {name: "1"}) == (False, f"{name} is set")


@pytest.mark.parametrize("value", ["yes", True, None, 1])
def test_another_value_is_named(value: Any) -> None:
    with pytest.raises(ConfigError, match="keep_freed_pages"):
        create_memory_optimizer(keep_freed_pages=value)
