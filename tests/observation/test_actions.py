"""Every action, carried out in a real loop: what it did, what it left, and what became of the loop."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from waiting import wait_for

from obsinfra.catalog import actions as table
from obsinfra.catalog import metrics
from obsinfra.catalog import metrics as catalog
from obsinfra.control.client import send_command
from obsinfra.control.command import Ack, new_command
from obsinfra.control.ledger import AckLedger
from obsinfra.errors import ConfigError
from obsinfra.monitoring.logging_config import configure_logging, shutdown_logging
from obsinfra.observation import observe
from obsinfra.observation.executors import EXECUTORS
from obsinfra.training.schedule import Schedule

SECONDS = 60.0


class Loop:
    """An endless loop on this thread, and somebody on another thread who talks to it through its socket."""

    def __init__(self, output_dir: Path, **settings: Any) -> None:
        torch.manual_seed(7)
        self.model = nn.Linear(3, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.hang = threading.Event()
        self.hanging = threading.Event()
        self.release = threading.Event()
        usual: dict[str, Any] = {"disable_monitoring": True, "checkpoint_epochs": 0, "grace_seconds": 600}
        self.run = observe(
            self.model, self.optimizer, output_dir=output_dir, run="r", **{**usual, **settings}
        )
        self.failure: BaseException | None = None

    def batches(self) -> Iterator[Tensor]:
        while True:
            yield torch.randn(4, 3)

    def tell(self, action: str, **args: Any) -> Ack:
        command = new_command("r", action, source="test", reason="why", args=args, lifetime_seconds=SECONDS)
        return send_command(self.run.folder, command, door="socket", timeout_seconds=SECONDS)

    def do(self, action: str, **args: Any) -> dict[str, Any]:
        """Tell it, and give what it did; it must have been done."""
        ack = self.tell(action, **args)
        assert ack.state == "done", ack.error
        return dict(ack.result or {})

    def converse(self, talk: Callable[[], object]) -> None:
        """Train while `talk` goes on; stop afterwards. What `talk` raises is raised here."""

        def talking() -> None:
            try:
                wait_for(lambda: self.run.step > 3, "some steps")
                talk()
            except BaseException as error:
                self.failure = error
            finally:
                self.release.set()
                if self.run.stop is None:
                    self.tell("stop")

        speaker = threading.Thread(target=talking)
        speaker.start()
        with self.run as run:
            for batch in run.steps(self.batches()):
                loss = self.model(batch).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                run.record(loss=loss, learning_rate=self.optimizer.param_groups[0]["lr"])
                if self.hang.is_set():
                    self.hanging.set()
                    self.release.wait(SECONDS)
        speaker.join(SECONDS)
        if self.failure is not None:
            raise self.failure

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = (self.run.folder.logs / "system.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    return Loop(tmp_path)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[None]:
    configure_logging(tmp_path / "r" / "logs", run="r", terminal=False)
    yield
    shutdown_logging()


def test_every_action_of_the_table_can_be_carried_out() -> None:
    assert set(EXECUTORS) == {action.name for action in table.BUILT_IN}
    for action in table.BUILT_IN:
        assert action.undo is None or action.undo in EXECUTORS
        if action.undo is not None:
            assert table.ACTIONS[action.undo].problem(
                {**{a.name: a.choices[0] for a in table.ACTIONS[action.undo].arguments if a.choices},
                 **({"key": "cpu"} if action.undo == "set_threshold" else {}), **action.undo_arguments}
            ) is None  # fmt: skip


# ---- pause and resume --------------------------------------------------------------------------------


def test_a_paused_loop_does_no_step_and_hears_everything(loop: Loop) -> None:
    def talk() -> None:
        run = loop.run
        assert loop.do("pause") | {"seconds": 0} == {
            "paused": True, "was_paused": False, "max_seconds": None, "seconds": 0,
        }  # fmt: skip
        step = run.step
        assert run.monitor.state == "paused" and run.folder.read_info().state == "paused"
        assert run.folder.present_state(run.folder.read_info()) == "paused"
        assert loop.do("checkpoint")["step"] == step
        assert loop.do("dump_stacks", native=False)["loop_in"] == "paused"
        assert loop.do("scale_lr", factor=0.5)["after"] == [0.005]
        assert loop.do("pause", max_seconds=600)["was_paused"] is True
        assert run.step == step
        # Neither a step that takes long nor one that does not come: nobody takes a pause for a hang.
        run.monitor.recorder.fold()
        before = run.monitor.recorder.seconds_since_step()
        wait_for(lambda: run.monitor.recorder.lost_seconds()["paused"] > 0.3, "time in the pause")
        run.monitor.recorder.fold()
        after = run.monitor.recorder.seconds_since_step()
        assert before is not None and after is not None and after < before + 0.2
        assert run.monitor.recorder.seconds_in_step() is None
        assert loop.do("resume")["was_paused"] is True
        wait_for(lambda: run.step > step + 2, "steps after the pause")
        assert run.monitor.state == "running" and run.folder.read_info().state == "running"
        assert loop.do("resume")["was_paused"] is False

    loop.converse(talk)
    assert loop.run.monitor.recorder.lost_seconds()["paused"] > 0.3
    assert loop.run.monitor.recorder.goodput() < 0.95


def test_a_pause_with_a_limit_ends_by_itself(loop: Loop) -> None:
    def talk() -> None:
        loop.do("pause", max_seconds=1)
        step = loop.run.step
        wait_for(lambda: loop.run.step > step, "the end of the pause")
        assert loop.run.monitor.state == "running"

    loop.converse(talk)


def test_a_pause_that_a_person_ordered_outlasts_that_of_an_alert(loop: Loop) -> None:
    def talk() -> None:
        run = loop.run
        loop.do("pause", alert="HighGPUTemperature")
        loop.do("pause", max_seconds=600)
        step = run.step
        told = loop.do("resume", alert="HighGPUTemperature")
        assert (told["paused"], told["was_paused"], told["paused_seconds"]) == (True, True, None)
        assert run.monitor.state == "paused" and run.step == step
        assert loop.do("resume")["paused"] is False
        wait_for(lambda: run.step > step + 2, "steps after the pause")

    loop.converse(talk)


def test_a_person_ends_every_pause_and_an_alert_its_own(loop: Loop) -> None:
    def talk() -> None:
        run = loop.run
        loop.do("pause")
        loop.do("pause", alert="HighGPUTemperature")
        assert loop.do("resume")["paused"] is False
        loop.do("pause", alert="HighGPUTemperature")
        step = run.step
        assert loop.do("resume", alert="HighGPUTemperature")["paused"] is False
        wait_for(lambda: run.step > step, "steps after the pause")

    loop.converse(talk)


def test_the_limit_of_a_persons_pause_ends_that_one_alone(loop: Loop) -> None:
    def talk() -> None:
        run = loop.run
        loop.do("pause", alert="HighGPUTemperature")
        loop.do("pause", max_seconds=1)
        step = run.step
        wait_for(lambda: run.actions.pause is not None and "person" not in run.actions.pause.holds, "its end")
        assert run.monitor.state == "paused" and run.step == step
        assert loop.do("resume", alert="HighGPUTemperature")["paused"] is False

    loop.converse(talk)


def test_a_stop_and_a_signal_end_a_paused_run_with_a_checkpoint(tmp_path: Path) -> None:
    for number, end in enumerate((lambda: os.kill(os.getpid(), signal.SIGTERM), None)):
        loop = Loop(tmp_path / str(number))

        def talk(loop: Loop = loop, end: Callable[[], None] | None = end) -> None:
            loop.do("pause")
            if end is not None:
                end()
                wait_for(lambda: loop.run.stop is not None, "the stop")
            else:
                assert loop.do("stop")["from"] == "live state"

        loop.converse(talk)
        assert loop.run.folder.read_info().state == "stopped"
        assert loop.run.stop is not None and loop.run.stop.exit_code == (143 if end is not None else 0)
        manifests = list((loop.run.folder.checkpoints / "manifests").glob("*-emergency-*.json"))
        assert [int(path.name[:12]) for path in manifests] == [loop.run.step]


# ---- while the loop hangs ----------------------------------------------------------------------------


def test_what_is_safe_at_any_time_is_done_while_the_main_thread_hangs(loop: Loop, logs: None) -> None:
    def talk() -> None:
        loop.hang.set()
        assert loop.hanging.wait(SECONDS)
        waiting = new_command("r", "pause", source="test")
        loop.run.channel.submit(waiting)
        stacks = Path(loop.do("dump_stacks", native=False)["stacks"])
        text = stacks.read_text()
        main = text[text.index("== Thread 'MainThread'") :].split("== Thread")[1]
        assert "self.release.wait(SECONDS)" in main and "test_actions.py" in main
        assert "'obsinfra-watchdog'" in text and "sleeping" in text
        report = json.loads(Path(loop.do("memory_snapshot")["report"]).read_text())
        assert (
            report["step"] == loop.run.step
            and not report["tensors"]["between_steps"]
            and report["process"]["resident_bytes"] > 50e6
        )
        assert loop.do("set_log_level", level="debug")["before"] == "info"
        assert loop.run.channel.waiting() == [waiting]  # for the loop, and nobody says done
        loop.hang.clear()
        loop.release.set()
        wait_for(lambda: loop.run.monitor.state == "paused", "the pause after the hang")

    loop.converse(talk)


def test_native_frames_are_there_with_py_spy_and_said_to_be_missing_without(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def talk() -> None:
        found = loop.do("dump_stacks")
        text = Path(found["stacks"]).read_text()
        if found["native"] == "included":
            native = text[text.index("== Native frames") :]
            assert "MainThread" in native and "libc.so" in native
        else:
            assert "py-spy" in found["native"] and found["native"] in text
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
        found = loop.do("dump_stacks")
        assert found["native"] == "py-spy is not installed; fix: pip install py-spy"
        assert "py-spy is not installed" in Path(found["stacks"]).read_text()
        failing = tmp_path / "py-spy"
        failing.write_text("#!/bin/sh\necho Permission Denied: try sudo >&2\nexit 1\n")
        failing.chmod(0o755)
        assert loop.do("dump_stacks")["native"] == "py-spy failed: Permission Denied: try sudo"

    loop.converse(talk)


def test_a_second_one_of_a_kind_is_refused_while_the_first_is_under_way(loop: Loop) -> None:
    first: list[Ack] = []

    def talk() -> None:
        other = threading.Thread(target=lambda: first.append(loop.tell("memory_snapshot", trace_seconds=600)))
        other.start()
        wait_for(lambda: "memory_snapshot" in loop.run.actions._threads, "the first")
        second = loop.tell("memory_snapshot")
        assert second.state == "failed" and "another memory_snapshot is under way" in (second.error or "")
        assert loop.do("dump_stacks", native=False)["threads"] > 3  # of another kind: not held up
        loop.tell("stop")  # and the end of the run ends the wait
        other.join(SECONDS)

    loop.converse(talk)
    assert first[0].state == "done", first[0].error
    assert not any(thread.name.startswith("obsinfra-memory") for thread in threading.enumerate())


def test_what_bounds_a_training_is_measured_while_it_goes_on(loop: Loop) -> None:
    found: dict[str, Any] = {}

    def talk() -> None:
        before = loop.run.step
        found.update(loop.do("measure_utilization", seconds=0.3))
        found["meanwhile"] = loop.run.step - before

    loop.converse(talk)
    assert 0 < found["steps"] <= found["meanwhile"] and found["seconds"] >= 0.3
    assert found["bottleneck"] in (None, "compute", "launch", "memory") and found["evidence"]
    named = loop.run.monitor.instruments.get(metrics.BOTTLENECK, kind=found["bottleneck"] or "input")
    assert named == (found["bottleneck"] is not None)


# ---- profile -----------------------------------------------------------------------------------------


def test_a_profile_leaves_a_trace_and_the_top_operators(loop: Loop) -> None:
    found: dict[str, Any] = {}
    loop.converse(lambda: found.update(loop.do("profile", steps=4, warmup=2, top=3)))
    events = json.loads(Path(found["trace"]).read_text())["traceEvents"]
    assert {"aten::addmm", "aten::mse_loss", "aten::linear"} & {event.get("name") for event in events}
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 4
    summary = json.loads(Path(found["summary_json"]).read_text())
    assert (summary["steps"], summary["warmup"], summary["sorted_by"]) == (4, 2, "self_cpu_seconds")
    own = [operator["self_cpu_seconds"] for operator in summary["operators"]]
    assert len(own) == 3 and own == sorted(own, reverse=True) and own[-1] > 0
    assert found["top"] == [operator["name"] for operator in summary["operators"]]
    assert summary["operators"][0]["name"] in Path(found["summary"]).read_text()


def test_profiles_do_not_meet_each_other_nor_the_loops_own(loop: Loop) -> None:
    def talk() -> None:
        loop.do("pause")
        first = new_command("r", "profile", source="test")
        loop.run.channel.submit(first)
        refused = loop.tell("profile")
        assert refused.state == "failed" and "recording already" in (refused.error or "")
        loop.do("resume")
        wait_for(lambda: (a := AckLedger(loop.run.folder.acks).last(first.id)) and a.final, "the first")
        assert loop.do("profile", steps=1)["steps"] == 1

    loop.converse(talk)


def test_a_profile_that_the_run_does_not_outlast_is_failed_and_over(loop: Loop) -> None:
    command = new_command("r", "profile", source="test", args={"steps": 1000, "warmup": 100})

    def talk() -> None:
        loop.do("pause")
        loop.run.channel.submit(command)

    loop.converse(talk)
    ack = AckLedger(loop.run.folder.acks).last(command.id)
    assert ack is not None and (ack.state, ack.error) == ("failed", "the run ended before it was done")
    assert not torch.autograd._profiler_enabled()  # type: ignore[attr-defined]


@pytest.fixture
def little_room(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of its own with 64 KiB."""
    folder = tmp_path / "little"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64k"]
    mounted = subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_profile_leaves_nothing_and_the_loop_goes_on(
    loop: Loop, little_room: Path
) -> None:
    loop.run.folder.profiles.symlink_to(little_room)

    def talk() -> None:
        ack = loop.tell("profile", steps=50)
        assert ack.state == "failed" and "expected" in (ack.error or "") and "space" in (ack.error or "")
        assert list(little_room.iterdir()) == []
        step = loop.run.step
        wait_for(lambda: loop.run.step > step + 3, "steps after it")

    loop.converse(talk)


def test_a_full_disk_fails_what_would_be_written_and_says_so(loop: Loop, little_room: Path) -> None:
    (little_room / "fill").write_bytes(b"x" * 60 * 1024)
    loop.run.folder.reports.symlink_to(little_room)

    def talk() -> None:
        ack = loop.tell("memory_snapshot", top=1000)
        assert ack.state == "failed" and "No space left" in (ack.error or "")
        assert [path.name for path in little_room.iterdir()] == ["fill"]

    loop.converse(talk)


# ---- memory ------------------------------------------------------------------------------------------


def test_a_memory_report_names_what_holds_memory(loop: Loop) -> None:
    held = torch.zeros(1 << 20)  # 4 MiB
    views = [held[:10], held[10:]]
    leak: list[bytes] = []

    def talk() -> None:
        growing = threading.Timer(0.3, lambda: leak.extend(bytes(1000) for _ in range(3000)))
        growing.start()
        found = loop.do("memory_snapshot", trace_seconds=1.5, top=10)
        assert found["between_steps"]
        growing.join()
        report = json.loads(Path(found["report"]).read_text())
        assert found["tensor_bytes"] == report["tensors"]["total_bytes"] >= held.nbytes
        (mine,) = [t for t in report["tensors"]["largest"] if t["bytes"] == held.nbytes]
        assert mine["views"] >= 3 and (mine["dtype"], mine["device"]) == ("float32", "cpu")
        parts = report["process"]["smaps_rollup_bytes"]
        assert 0 < parts["Anonymous"] <= parts["Rss"] and parts["Rss"] % 4096 == 0
        assert report["python"]["traced"] and report["cuda"] == []
        assert report["python"]["grown"][0]["bytes"] >= 3_000_000
        assert "test_actions.py" in report["python"]["grown"][0]["at"]
        assert not json.loads(Path(loop.do("memory_snapshot")["report"]).read_text())["python"]["traced"]

    loop.converse(talk)
    assert len(views) == 2


def test_a_memory_report_names_parameters(loop: Loop) -> None:
    def talk() -> None:
        report = json.loads(Path(loop.do("memory_snapshot", top=1000)["report"]).read_text())
        named = {tensor["parameter"] for tensor in report["tensors"]["largest"]}
        assert {"weight", "bias"} <= named

    loop.converse(talk)


class Knot:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.me = self
        self.load = torch.zeros(1 << 18)


def test_free_memory_collects_what_only_the_collector_can(loop: Loop) -> None:
    import gc
    import weakref

    gc.disable()
    try:
        for _ in range(20):
            knot = Knot()
        gone = weakref.ref(knot)
        del knot
        found: dict[str, Any] = {}
        loop.converse(lambda: found.update(loop.do("free_memory")))
    finally:
        gc.enable()
    assert gone() is None and found["objects_collected"] >= 20
    for name, before in found["before_bytes"].items():
        assert found["freed_bytes"][name] == before - found["after_bytes"][name]
    assert found["freed_bytes"]["resident"] > 10 << 20


# ---- learning rate -----------------------------------------------------------------------------------


def test_scale_lr_multiplies_is_bounded_and_can_be_taken_back(loop: Loop) -> None:
    def talk() -> None:
        assert loop.do("scale_lr", factor=0.1)["after"] == pytest.approx([0.001])
        second = loop.do("scale_lr", factor=0.1)
        assert second["scale"] == pytest.approx(0.01) and second["scale_before"] == pytest.approx(0.1)
        wait_for(
            lambda: loop.run.monitor.recorder.learning_rate == pytest.approx(0.0001), "the metric to follow"
        )
        too_far = loop.tell("scale_lr", factor=0.001)
        assert too_far.state == "failed" and "undo=true" in (too_far.error or "")
        assert loop.optimizer.param_groups[0]["lr"] == pytest.approx(0.0001)
        for wrong in ({}, {"factor": 0.5, "undo": True}):
            ack = loop.tell("scale_lr", **wrong)
            assert ack.state == "failed" and "either factor=… or undo=true" in (ack.error or "")
        assert loop.tell("scale_lr", factor=11).state == "rejected"
        assert loop.do("scale_lr", undo=True)["after"] == pytest.approx([0.01])

    loop.converse(talk)


Optimizer = torch.optim.Optimizer
schedulers = torch.optim.lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "step": lambda o: schedulers.StepLR(o, 4, gamma=0.5),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=15, eta_min=0.02),
    "restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=7, eta_min=0.01),
    "one cycle": lambda o: schedulers.OneCycleLR(o, max_lr=1.0, total_steps=40),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.05, 0.5, step_size_up=5, cycle_momentum=False),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=30, power=2.0),
    "warm-up, then cosine": lambda o: schedulers.SequentialLR(
        o,
        [schedulers.LinearLR(o, 0.1, total_iters=8), schedulers.CosineAnnealingLR(o, T_max=20, eta_min=0.01)],
        milestones=[8],
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, total_iters=6), schedulers.ExponentialLR(o, 0.95)]
    ),
    "ours": lambda o: Schedule(o, "cosine", warmup_steps=5, total_steps=30),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
@pytest.mark.parametrize("at", [3, 10])
def test_the_rest_of_a_schedule_is_the_old_one_times_the_factor(kind: str, at: int) -> None:
    """Scaled in the middle of the warm-up and after it; and again the old one once it is taken back."""
    from obsinfra.observation.learning_rate import LearningRateScale

    def curve(scaled_at: int | None, undone_at: int | None) -> list[list[float]]:
        layer = nn.Linear(1, 1)
        groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias], "lr": 0.4}]
        optimizer = torch.optim.SGD(groups)
        scheduler = SCHEDULERS[kind](optimizer)
        scale = LearningRateScale({"optimizer": optimizer, "scheduler": scheduler})
        assert scale.lasts
        rates = []
        for step in range(28):
            if step == scaled_at:
                scale.set(scale.total * 0.5)
            if step == undone_at:
                scale.set(1.0)
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return rates

    plain, scaled = curve(None, None), curve(at, 20)
    expected = [
        [rate * (0.5 if at <= step < 20 else 1) for rate in rates] for step, rates in enumerate(plain)
    ]
    assert scaled == [pytest.approx(rates, rel=1e-9) for rates in expected]


def test_a_scaled_learning_rate_outlasts_a_restart_and_can_still_be_taken_back(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Optimizer, Any]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, schedulers.ExponentialLR(optimizer, 0.5)

    for resume in (None, "r"):
        model, optimizer, scheduler = made()
        run = observe(
            model, optimizer, scheduler=scheduler, output_dir=tmp_path, disable_monitoring=True,
            **({"run": "r"} if resume is None else {"resume": resume}),
        )  # fmt: skip
        for _ in run.steps([torch.zeros(1)] * 2):
            optimizer.step()
            scheduler.step()
            if resume is None:
                run.channel.submit(new_command("r", "scale_lr", source="test", args={"factor": 0.5}))
                run.request_stop("enough")
        if resume is None:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5)  # stopped: not scaled any more
        run.finish()


# ---- levels and thresholds ---------------------------------------------------------------------------


def test_a_log_level_holds_at_once_and_can_be_set_back(loop: Loop, logs: None) -> None:
    from obsinfra.monitoring.logging_config import get_logger

    def talk() -> None:
        get_logger("system").debug("unheard")
        assert loop.do("set_log_level", level="debug") | {"seconds": 0} == {
            "level": "debug", "before": "info", "seconds": 0,
        }  # fmt: skip
        get_logger("system").debug("heard")
        assert loop.do("set_log_level", level="info")["before"] == "debug"
        get_logger("system").debug("unheard")

    loop.converse(talk)
    assert len(loop.events("heard")) == 1 and loop.events("unheard") == []


def test_in_a_program_with_logging_of_its_own_the_level_is_that_of_the_runs_files(loop: Loop) -> None:
    import logging

    before = logging.getLogger().level

    def talk() -> None:
        assert loop.do("set_log_level", level="debug")["before"] == "info"
        assert logging.getLogger().level == before

    loop.converse(talk)


def test_a_threshold_that_is_lowered_fires_and_one_put_back_resolves(tmp_path: Path) -> None:
    loop = Loop(tmp_path, disable_monitoring=False, metrics_port=0, sample_seconds=0.1)

    def firing() -> set[str]:
        return {status.alert.key for status in loop.run.monitor.alerts if status.state == "firing"}

    def talk() -> None:
        assert "disk_free" not in firing()
        found = loop.do("set_threshold", key="step_time", value=0.0)
        assert (found["before"], found["after"], found["note"]) == (10.0, 0.0, None)
        wait_for(lambda: "step_time" in firing(), "the alert")
        found = loop.do("set_threshold", key="step_time")
        assert (found["before"], found["after"]) == (0.0, 10.0)
        wait_for(lambda: "step_time" not in firing(), "its end")
        unknown = loop.tell("set_threshold", key="nonsense", value=1)
        assert unknown.state == "failed" and "step_time" in (unknown.error or "")
        remote = loop.tell("set_threshold", key="trainer_gone", value=0.5)
        assert remote.state == "failed" and "judged in this process" in (remote.error or "")
        loop.run.folder.beat(time.time())
        assert "sidecar" in loop.do("set_threshold", key="cpu", value=95)["note"]

    loop.converse(talk)


# ---- what holds for all ------------------------------------------------------------------------------


def test_every_outcome_is_measured_and_logged_with_what_was_done(loop: Loop, logs: None) -> None:
    def talk() -> None:
        loop.do("free_memory")
        loop.tell("rollback", checkpoint="nonsense")
        assert loop.tell("profile", steps=0).state == "rejected"

    loop.converse(talk)
    instruments = loop.run.monitor.instruments
    measured = {
        labels["action"]: sum(value.counts)
        for metric, labels, value in instruments.histograms()
        if metric is catalog.CONTROL_ACTION_SECONDS
    }
    assert measured == {"free_memory": 1, "rollback": 1, "stop": 1}
    events = {event["action"]: event for event in loop.events("command")}
    assert events["free_memory"]["outcome"] == "done" and events["free_memory"]["seconds"] > 0
    assert "objects_collected" in events["free_memory"]["result"]
    assert events["rollback"]["outcome"] == "failed" and "nonsense" in events["rollback"]["error"]
    assert events["profile"]["outcome"] == "rejected" and "from 1 to 1000" in events["profile"]["error"]
    assert instruments.get(catalog.CONTROL_COMMANDS, action="profile", outcome="rejected") == 1


def test_after_a_stop_nothing_else_is_begun(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    late = new_command("r", "scale_lr", source="test", args={"factor": 0.5})

    def talk() -> None:
        loop.do("pause")
        loop.run._acting.acquire()  # so that both are there when the loop looks
        try:
            loop.run.channel.submit(new_command("r", "stop", source="test"))
            loop.run.channel.submit(late)
        finally:
            loop.run._acting.release()
        wait_for(lambda: loop.run.stop is not None, "the stop")

    loop.converse(talk)
    ack = AckLedger(loop.run.folder.acks).last(late.id)
    assert ack is not None and ack.state in ("failed", "rejected") and "end" in (ack.error or "")
    assert loop.optimizer.param_groups[0]["lr"] == 0.01


# ---- actions of other packages -----------------------------------------------------------------------

PLUGINS = """
from obsinfra.catalog.actions import Action, Argument
from obsinfra.control.action_plugins import ActionPlugin


def greet(run, order):
    return {"greeting": f"hello {order.arguments['name']}", "step": run.step}


def watch(run, order):
    seen = []
    for _ in range(order.arguments["steps"]):
        seen.append(run.step)
        yield
    return {"seen": seen}


def fail(run, order):
    raise RuntimeError("it does not work")


name = Argument("name", "str", "Whom.", default="world")
greeting = ActionPlugin(Action("greet", "Say hello.", (name,)), greet)
watching = ActionPlugin(
    Action("watch", "Look on.", (Argument("steps", "int", "How long.", default=2, minimum=1),)), watch
)
failing = ActionPlugin(Action("fail", "Fail.", at="any_time"), fail)
clash = ActionPlugin(Action("stop", "Steal a name.", ()), fail)
crooked = ActionPlugin(
    Action("crooked", "A default out of bounds.", (Argument("n", "int", "N.", default=0, minimum=1),)), fail
)
nothing = object()
"""

ENTRY_POINTS = """[obsinfra.actions]
broken = their_actions_absent:action
clash = their_actions:clash
crooked = their_actions:crooked
failing = their_actions:failing
greeting = their_actions:greeting
nothing = their_actions:nothing
watching = their_actions:watching
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with a real dist-info on the path."""
    site = tmp_path / "site"
    metadata = site / "their_actions-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "their_actions.py").write_text(PLUGINS)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-actions\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(site)
    yield site
    for name in set(table.ACTIONS) - {action.name for action in table.BUILT_IN}:
        del table.ACTIONS[name]
    sys.modules.pop("their_actions", None)


def test_actions_of_other_packages_are_obeyed_and_broken_ones_reported(
    installed: Path, tmp_path: Path, logs: None
) -> None:
    loop = Loop(tmp_path)

    def talk() -> None:
        assert loop.do("greet", name="you")["greeting"] == "hello you"
        assert loop.do("greet")["greeting"] == "hello world"
        seen = loop.do("watch", steps=3)["seen"]
        assert seen == list(range(seen[0], seen[0] + 3))
        failed = loop.tell("fail")
        assert (failed.state, failed.error) == ("failed", "RuntimeError: it does not work")
        assert loop.tell("greet", name=5).state == "rejected"
        assert loop.tell("crooked").state == "rejected"

    loop.converse(talk)
    assert loop.run.folder.read_info().reason == "command stop (test: why)"  # ours, not theirs
    problems = {event["name"]: event["problem"] for event in loop.events("action_plugin_failed")}
    assert set(problems) == {"broken", "clash", "crooked", "nothing"}
    assert "their_actions_absent" in problems["broken"] and "'stop' is taken" in problems["clash"]
    assert "whole number from 1 on" in problems["crooked"] and "without 'action'" in problems["nothing"]
    assert loop.run.monitor.instruments.get(catalog.TELEMETRY_ERRORS, component="actions") == 4


def test_the_command_line_knows_them_too(installed: Path, tmp_path: Path) -> None:
    def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed), *sys.path]), "COLUMNS": "200"}
        command = [sys.executable, "-m", "obsinfra.cli.main", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS, check=False)

    listed = cli("actions")
    assert (
        listed.returncode == 0 and "Say hello." in listed.stdout and "broken cannot be used" in listed.stdout
    )
    assert all(action.name in listed.stdout for action in table.BUILT_IN)
    wrong = cli("command", "r", "watch", "steps=0")
    assert wrong.returncode == 2 and "expected a whole number from 1 on" in wrong.stderr


def test_a_name_cannot_be_taken_twice(installed: Path) -> None:
    mine = table.Action("mine", "One.", ())
    table.register(mine)
    table.register(table.Action("mine", "One.", ()))  # the same again
    with pytest.raises(ConfigError, match="exists already"):
        table.register(table.Action("mine", "Another.", ()))
    with pytest.raises(ConfigError, match="exists already"):
        table.register(table.Action("checkpoint", "Another.", ()))
    for name in ("", "a b", "ä", "a/b", "x" * 65):
        with pytest.raises(ConfigError, match="letters"):
            table.register(table.Action(name, "Badly named.", ()))
