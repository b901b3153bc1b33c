"""Shared by all tests: a clean environment, and what `--quick` leaves out."""

from __future__ import annotations

import gc
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from _pytest.mark.expression import Expression

# A busy machine is no failure: no property test has a deadline for one example.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")

os.environ.setdefault("OMP_NUM_THREADS", "1")


FIRST = (
    "test_real_engine",
    "test_kills",
    "test_stack_chaos",
    "test_resume_is_exact",
    "test_main_job",
    "test_queries",
    "test_ranks_restart",
    "test_interrupts",
    "test_ranks_obey",
)
"""Test files that take minutes: begun first, so that no processor waits for one of them at the end."""

LONG = frozenset(
    [
        "test_actions",
        "test_alertmanager_watch",
        "test_background_mirror",
        "test_byte_gpt",
        "test_checkpoint_remote",
        "test_checkpointer",
        "test_compilation",
        "test_crashes_and_faults",
        "test_damage",
        "test_data_loading",
        "test_datasets",
        "test_dcp",
        "test_escalation",
        "test_flops",
        "test_gc_schedule",
        "test_gpu_sampler",
        "test_host_guard",
        "test_inference",
        "test_market_files",
        "test_memory_optimizer",
        "test_observed_run",
        "test_out_of_memory",
        "test_payloads",
        "test_prometheus_rules",
        "test_ranks",
        "test_recorder",
        "test_report",
        "test_resume_plan",
        "test_retention",
        "test_rollback",
        "test_routes",
        "test_rules_cli",
        "test_run_watch",
        "test_runbooks",
        "test_sidecar_api",
        "test_sidecar_decisions",
        "test_sidecar_kills",
        "test_sidecar_openapi",
        "test_sidecar_process",
        "test_speed_choices",
        "test_state_tree",
        "test_tracing",
        "test_trainer",
        "test_writer",
    ]
)
"""Files of unit tests that take 8 to 40 seconds each on two processors: two thirds of the whole time."""


OF_THE_FILE = re.compile(r"^pytestmark = (\[.*?^\]|.*?$)", re.MULTILINE | re.DOTALL)
MARKS = ("gpu", "stack", "browser", "slow", "long")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that `-m` leaves out whatever else its tests are marked with need not be imported."""
    if not config.option.markexpr or not re.fullmatch(r"test_\w+\.py", collection_path.name):
        return None
    written = OF_THE_FILE.search(collection_path.read_text())
    of_file = {mark for mark in MARKS if written is not None and f"pytest.mark.{mark}" in written[1]}
    if collection_path.stem in LONG:
        of_file.add("long")
    wanted = Expression.compile(config.option.markexpr)
    for size in range(len(MARKS) + 1):
        for more in itertools.combinations(MARKS, size):
            marks = of_file.union(more)
            if wanted.evaluate(lambda name, marks=marks, **_: name in marks):
                return None
    return True


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that is imported is garbage: a fifth of the time would go into looking for some."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the caller's environment nor an obsinfra.toml of the working folder may steer a test."""
    from obsinfra.config.settings import Settings, environment_names

    for field in Settings.model_fields:
        for name in environment_names(field):
            monkeypatch.delenv(name, raising=False)
    yield
