"""`obsinfra train`: settings, workload, stack, check, trainer, with plain words on the way."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from obsinfra.cli.options import program
from obsinfra.config.resolve import resolve
from obsinfra.config.settings import Settings
from obsinfra.errors import ObsinfraError, UserError, first_line

if TYPE_CHECKING:
    from obsinfra.observation.observed_run import ObservedRun
    from obsinfra.observation.ranks import Ranks
    from obsinfra.training.trainer import Outcome, Trainer

stderr = Console(stderr=True, highlight=False)


def run_training(flags: dict[str, Any], config: Path | None) -> int:
    """Train to the end and return the exit code. One of torchrun's processes joins the others first.

    Raises:
        UserError: anything that cannot work, before training starts.
    """
    from obsinfra.observation.ranks import join

    settings = resolve(flags, file=config).settings
    ranks = join(settings.collective_timeout_seconds)
    try:
        exit_code = _train(flags, config, settings, ranks)
    except BaseException as error:
        ranks.leave(f"{type(error).__name__}: {error}")
        raise
    ranks.leave("finished")
    # To torchrun another exit code than 0 is a failure after which it starts the ranks again.
    return exit_code if ranks.alone else 0


def _train(flags: dict[str, Any], config: Path | None, settings: Settings, ranks: Ranks) -> int:
    import torch

    from obsinfra.monitoring.logging_config import configure_logging, get_logger, shutdown_logging
    from obsinfra.observation.resume import plan_for_all, plan_run
    from obsinfra.training.preflight import check
    from obsinfra.training.trainer import Trainer
    from obsinfra.workloads.registry import create_workload

    begun = ranks.share("begun run", lambda: ranks.recall("run"))
    if begun is not None:  # the group has formed again: the run goes on
        flags = {**flags, "run": begun, "resume": "auto"}
        settings = resolve(flags, file=config).settings
    plan = None
    if settings.resume not in (None, "auto"):
        plan = plan_for_all(ranks, lambda: plan_run(settings, settings.model_name))
    elif settings.resume == "auto":
        plan = plan_for_all(ranks, lambda: plan_run(settings, _model_label(settings)))
    if plan is not None and plan.continues:
        settings = resolve(flags, file=config, run_config=plan.folder.config_toml).settings
    settings = _within_reach(settings)
    workload = create_workload(
        settings.model_name, data_path=settings.data_path, model_size=settings.model_size, seed=settings.seed
    )
    plan = plan or plan_for_all(ranks, lambda: plan_run(settings, workload.name))
    if ranks.first:
        ranks.remember("run", plan.folder.id)
    trainer = Trainer(workload, settings, plan, ranks)
    if not settings.disable_testing:
        check(trainer)
    folder = ranks.folder(plan.folder.root)
    made = ranks.first and not folder.root.exists()
    ranks.share("run folder", folder.create)
    folder.create()
    try:
        if ranks.first:
            if not settings.disable_testing:
                look_at_machine(settings)
            start_stack(settings)
        configure_logging(
            folder.logs,
            level=settings.log_level,
            run=folder.id,
            model=workload.name,
            rank=ranks.rank,
            terminal=True,
            terminal_level="warning" if ranks.first else "error",
        )
        if not settings.disable_testing:
            get_logger("system").info("preflight_passed")
        outcome = trainer.fit(on_start=lambda run: introduce(run, trainer))
    except torch.OutOfMemoryError as error:
        raise ObsinfraError(
            f"out of memory: {first_line(error)}; the last good state was saved unless backups are "
            "disabled; fix: a smaller --micro-batch, or --gradient-checkpointing"
        ) from error
    finally:
        shutdown_logging()
        for worker in multiprocessing.active_children():
            worker.kill()  # one that hangs in a data set would keep this process from ending
        if made and not folder.run_json.exists():  # it never started
            shutil.rmtree(folder.root, ignore_errors=True)
    if ranks.first:
        tell_how_it_ended(outcome, settings)
    return outcome.exit_code


def tell_how_it_ended(outcome: Outcome, settings: Settings) -> None:
    """What a person wants to know once the training is over."""
    numbers = "  ".join(f"{name} {value:.4f}" for name, value in outcome.validation.items())
    ended = f"stopped: {outcome.stopped}" if outcome.stopped else "finished"
    say("ended", f"{ended} at epoch {outcome.epoch}, step {outcome.step}")
    if numbers:
        say("validation", numbers)
    if outcome.stopped and not settings.disable_backups:
        further = " --max-steps 0" if settings.max_steps else ""
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
        several = f" --nproc-per-node {ranks}" if ranks != "1" else ""
        again = f"train{several} --output-dir {settings.output_dir} --resume {outcome.run_id}{further}"
        say("go on", f"{program()} {again}")


def look_at_machine(settings: Settings) -> None:
    """Say what is wrong with this machine, if anything is; `obsinfra doctor` tells the rest."""
    from obsinfra.deployment.doctor import examine

    for finding in examine(settings.output_dir):
        if finding.status == "problem":
            say("machine", f"{finding.name}: {finding.detail}; {finding.fix or 'see obsinfra doctor'}")


def start_stack(settings: Settings) -> None:
    """Start the native stack if the settings want it, or say in one line why it does not run."""
    from obsinfra.deployment.compose_stack import ComposeStack
    from obsinfra.deployment.native_stack import NativeStack
    from obsinfra.deployment.stack_state import StackUnavailable

    if settings.stack == "off" or settings.disable_monitoring:
        return
    compose = ComposeStack(settings.output_dir / ".stack")
    if compose.recorded() and (running := compose.status()) is not None:
        say("stack", f"in containers, as it was started: Prometheus {running.prometheus_url}")
        return
    try:
        info = NativeStack(settings.output_dir / ".stack").up(
            settings.output_dir,
            alerts=settings.alert_table(),
            notify=settings.notify,
            policy=settings.policy,
        )
    except StackUnavailable as error:
        if settings.stack == "on":
            raise
        say("stack", f"{error}; going on with in-process alerting")
        return
    say(
        "stack",
        f"Prometheus {info.prometheus_url}  Alertmanager {info.alertmanager_url}  sidecar {info.sidecar_url}",
    )
    say("", f"stop it with: {program()} down --output-dir {settings.output_dir}")


def _within_reach(settings: Settings) -> Settings:
    """The settings, listening where the stack in containers that was started for these runs reaches it."""
    from obsinfra.deployment.which_stack import reachable_settings

    if settings.disable_monitoring:
        return settings
    found = reachable_settings(settings)
    if found is not settings:
        say("stack", f"in containers: listening on {found.metrics_host}, where they reach this trainer")
    return found


def say(what: str, text: str) -> None:
    """One aligned line for people."""
    stderr.print(f"[bold]{what:<11}[/]{escape(text)}", soft_wrap=True)


def introduce(run: ObservedRun, trainer: Trainer) -> None:
    """What a person wants to know once the training has begun."""
    if not run.ranks.first:
        return
    if trainer.plan is not None and trainer.plan.note:
        say("note", trainer.plan.note)
    say("run", run.folder.id)
    say("device", f"{trainer.device}, {trainer.precision.name} ({trainer.precision.reason})")
    say("folder", f"{run.folder.root}  (logs/, checkpoints/, traces/)")
    if run.monitor.url:
        say("page", f"{run.monitor.url}/   metrics: {run.monitor.url}/metrics")
    else:
        say("page", "none (monitoring is disabled)")
    if run.resumed is not None:
        say("resumed", f"{run.resumed.info.path.name} (step {run.step})")
        for skipped in run.resumed.skipped:
            say("skipped", f"{skipped.path.name}: {skipped.problem}")
    if run.ranks.size > 1:
        say("ranks", f"{run.ranks.size}, each with metrics of its own; see obsinfra status {run.folder.id}")
    if run.keeper.backup is None:
        say("checkpoints", "none (backups are disabled)")


def _model_label(settings: Settings) -> str:
    """The `model` label under which runs of this model are kept; a factory is asked for its name."""
    if ":" not in settings.model_name:
        return settings.model_name
    from obsinfra.workloads.registry import create_workload

    try:
        return create_workload(
            settings.model_name,
            data_path=settings.data_path,
            model_size=settings.model_size,
            seed=settings.seed,
        ).name
    except UserError:
        return settings.model_name
