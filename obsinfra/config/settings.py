"""The settings table: name, type, bounds, default, environment variable and help of every setting.

CLI options, `obsinfra config show` and config.toml are made from it. A setting is validated once, here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from obsinfra.catalog.alert_changes import alert_table
from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.policy import policy_with
from obsinfra.config.notify import Notify


def _setting(default: Any, help: str, *, env: str | None = None, group: str, **bounds: Any) -> Any:
    """A field of the table. `env` names a variable honoured besides `OBSINFRA_<NAME>`."""
    return Field(default, description=help, json_schema_extra={"env": env, "group": group}, **bounds)


PositiveInt = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """All settings of a training run, validated. Field order is the order of `--help`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    # What to train
    model_name: str = _setting(
        "tactical_mappo",
        "Workload: tactical_mappo, byte_gpt, digits, or your own as package.module:factory.",
        env="MODEL_NAME",
        group="What to train",
        min_length=1,
    )
    data_path: str | None = _setting(
        None,
        "Your data: a file or folder the workload reads. Default: the workload's own.",
        env="DATA_PATH",
        group="What to train",
    )
    model_size: str | None = _setting(
        None, "Size preset of the workload, e.g. nano … 124m for byte_gpt.", group="What to train"
    )

    # How to train
    epochs: int | None = _setting(
        None, "Epochs to train; default: the workload's.", env="NUM_EPOCHS", group="How to train", ge=1
    )
    batch_size: int | None = _setting(
        None, "Samples per step; default: the workload's.", env="BATCH_SIZE", group="How to train", ge=1
    )
    learning_rate: float | None = _setting(
        None, "Peak learning rate; default: the workload's.", env="LEARNING_RATE", group="How to train", gt=0
    )
    weight_decay: float | None = _setting(
        None, "AdamW weight decay; default: the workload's.", group="How to train", ge=0
    )
    accumulate: int = _setting(1, "Micro-batches per optimizer step.", group="How to train", ge=1)
    clip_norm: float = _setting(1.0, "Clip the gradient norm to this; 0: never.", group="How to train", ge=0)
    schedule: Literal["constant", "cosine", "plateau"] | None = _setting(
        None,
        "Learning-rate schedule: constant, cosine or plateau; default: the workload's.",
        group="How to train",
    )
    warmup_steps: int | None = _setting(
        None, "Steps of linear warm-up; default: the workload's.", group="How to train", ge=0
    )
    patience: int = _setting(
        0, "Stop after this many validations without improvement; 0: never.", group="How to train", ge=0
    )
    validate_every: int | None = _setting(
        None,
        "Validate every N epochs; 0: never; default: the workload's.",
        group="How to train",
        ge=0,
    )
    seed: int = _setting(0, "Seed of every random generator.", group="How to train", ge=0, lt=2**63)
    deterministic: bool = _setting(
        False, "Refuse non-deterministic kernels (torch.use_deterministic_algorithms).", group="How to train"
    )
    num_workers: int = _setting(0, "Data-loader worker processes.", group="How to train", ge=0, le=256)
    max_steps: int = _setting(
        0, "End after this many steps; 0: after the epochs.", group="How to train", ge=0
    )

    # Hardware
    device: str = _setting("auto", "auto, cpu, cuda, cuda:N or mps.", group="Hardware")
    disable_gpu: bool = _setting(
        False, "Train on the CPU even where a GPU is.", env="DISABLE_GPU", group="Hardware"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _setting(
        "auto", "Autocast: auto, fp32, bf16 or fp16.", group="Hardware"
    )
    compile: Literal["auto", "on", "off"] = _setting(
        "auto",
        "torch.compile: auto (with CUDA; what cannot be compiled runs eagerly), on (must work), off.",
        group="Hardware",
    )
    activation_budget_mb: float = _setting(
        0.0,
        "Recompute the activations of as few blocks as needed to keep less than this for the backward pass; "
        "0: no budget.",
        group="Hardware",
        ge=0,
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        _setting("default", "Mode of torch.compile.", group="Hardware")
    )
    gradient_checkpointing: bool = _setting(
        False, "Recompute activations in the backward pass to save memory.", group="Hardware"
    )
    gradient_checkpointing_every: int = _setting(
        1, "With it: recompute every Nth block.", group="Hardware", ge=1
    )
    channels_last: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Images with channels last: on, off, or auto (for convolutions in 16 bits on CUDA).",
        group="Hardware",
    )
    tf32: bool = _setting(
        True,
        "fp32 products on CUDA use tensor cores (TF32, 10 bits of mantissa).",
        group="Hardware",
    )
    attention: Literal["auto", "flash", "efficient", "cudnn", "math"] = _setting(
        "auto", "Kernel of scaled_dot_product_attention; auto: torch chooses by shapes.", group="Hardware"
    )
    device_tflops: float = _setting(
        0.0,
        "What the device computes at most in the precision in use, in TFLOP/s, for the MFU; "
        "0: as its data sheet says, where it is known.",
        group="Hardware",
        ge=0,
    )
    micro_batch: int | None = _setting(
        None,
        "Rows of one forward pass at most; larger batches are accumulated. Default: whole batches.",
        group="Hardware",
        ge=1,
    )
    oom_recovery: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Out of memory: halve the micro-batch, accumulate, and do the step again; grow back later. auto: in "
        "one process; on: on several ranks too, which then exchange gradients after backward, not during it.",
        group="Hardware",
    )
    max_memory_percent: float = _setting(
        85.0,
        "Host memory in use, against the container's limit if that is nearer, beyond which garbage, free "
        "pages, batches loaded ahead and data-set caches are given back; 0: never.",
        group="Hardware",
        ge=0,
        le=100,
    )
    gc: Literal["python", "boundary"] = _setting(
        "python",
        "When Python collects garbage: python (anywhere) or boundary (between two steps).",
        group="Hardware",
    )
    keep_freed_pages: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Have the C library keep the pages of freed memory for the next step: auto keeps them on the CPU.",
        group="Hardware",
    )
    leak_check_steps: int = _setting(
        0,
        "Look for kinds of tensors that become more and more, every so many steps; 0: never. A look takes "
        "tenths of a second.",
        group="Hardware",
        ge=0,
    )
    threads: int = _setting(0, "CPU threads of torch; 0: torch's choice.", group="Hardware", ge=0, le=1024)

    # Several ranks
    parallel: Literal["auto", "ddp", "fsdp", "hsdp", "tp"] = _setting(
        "auto",
        "How several ranks train: auto and ddp have the whole model on each, fsdp a part of it (FSDP2), hsdp "
        "the whole divided among each --shard-size of them, tp a part of each layer (byte_gpt).",
        group="Several ranks",
    )
    shard_size: int | None = _setting(
        None,
        "With --parallel hsdp: the ranks that have the whole model together; default: those of a host. With "
        "--tensor-parallel-size: the groups that do.",
        group="Several ranks",
        ge=1,
    )
    tensor_parallel_size: int | None = _setting(
        None,
        "With --parallel tp: the ranks that compute a batch together; the data is divided among such groups. "
        "Default: the ranks of a host. With fsdp or hsdp: divide each layer among so many, and what each has "
        "among the groups.",
        group="Several ranks",
        ge=1,
    )
    fsdp_offload: Literal["on", "off"] = _setting(
        "off",
        "With --parallel fsdp or hsdp: keep parameters, gradients and optimizer state in host memory between "
        "their uses; the optimizer's step is then the CPU's.",
        group="Several ranks",
    )
    gradient_compression: Literal["off", "bf16", "fp16", "powersgd"] = _setting(
        "off",
        "How gradients travel between ranks: off, bf16 or fp16 (half the bytes), powersgd (low rank).",
        group="Several ranks",
    )
    collective_timeout_seconds: float = _setting(
        600.0,
        "A rank that waits so long for another in a collective gives up; the group can then form again.",
        group="Several ranks",
        ge=1,
        le=86_400,
    )

    # Where things go
    output_dir: Path = _setting(
        Path("runs"), "Folder of all runs.", env="OUTPUT_DIR", group="Where things go"
    )
    run: str | None = _setting(
        None, "Name of this run; default: model, time and four random digits.", group="Where things go"
    )
    resume: str | None = _setting(
        None,
        "auto (the newest resumable run of this model, else a new one), a run name, a checkpoint path, "
        "or the URL of a remote copy (s3://bucket/folder, …).",
        group="Where things go",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "debug, info, warning or error.", env="LOG_LEVEL", group="Where things go"
    )
    log_every_seconds: float = _setting(
        5.0, "Progress line interval off a terminal.", group="Where things go", gt=0
    )

    # Checkpoints
    disable_backups: bool = _setting(
        False, "Write no checkpoints at all.", env="DISABLE_BACKUPS", group="Checkpoints"
    )
    checkpoint_seconds: float = _setting(
        300.0, "Commit a regular checkpoint this often; 0: only at epoch ends.", group="Checkpoints", ge=0
    )
    checkpoint_epochs: int = _setting(
        1, "Commit a regular checkpoint every N epochs; 0: never by epoch.", group="Checkpoints", ge=0
    )
    checkpoint_min_seconds: float = _setting(
        10.0, "At least this long between regular checkpoints at epoch ends.", group="Checkpoints", ge=0
    )
    checkpoint_remote: str | None = _setting(
        None,
        "Copy every checkpoint in the background to <this URL>/<run>, e.g. s3://bucket/folder.",
        env="CHECKPOINT_REMOTE",
        group="Checkpoints",
    )
    checkpoint_form: Literal["whole", "sharded"] = _setting(
        "whole",
        "Of a model in parts: whole (put together on rank 0) or, with --parallel fsdp, hsdp or tp, sharded: "
        "each rank's writer commits its own part, all as one. What a crash or a hang leaves is whole.",
        group="Checkpoints",
    )
    checkpoint_compression: Literal["off", "auto"] = _setting(
        "off",
        "auto: compress, with zstd, the parts of checkpoints that a sample says shrink by a quarter or more.",
        group="Checkpoints",
    )
    keep_checkpoints: int = _setting(3, "Regular checkpoints kept.", group="Checkpoints", ge=1)
    snapshot_seconds: float = _setting(
        0.0,
        "Copy the state to host memory this often; 0: as often as stays under 1 % of the time.",
        group="Checkpoints",
        ge=0,
    )
    grace_seconds: float = _setting(
        30.0,
        "After SIGTERM or SIGINT the loop has this long to reach a step boundary; "
        "then the last snapshot is committed instead.",
        group="Checkpoints",
        ge=0.1,
    )
    stop_signals: tuple[str, ...] = _setting(
        ("SIGTERM", "SIGINT"),
        "Signals that checkpoint and stop; add SIGUSR1 or SIGUSR2 for Slurm.",
        group="Checkpoints",
    )
    on_nonfinite: Literal["stop", "continue"] = _setting(
        "stop", "After a NaN or infinite loss: stop (last good state saved) or continue.", group="Checkpoints"
    )

    # Observation
    disable_monitoring: bool = _setting(
        False, "No metrics server, samplers, traces or alerts.", env="DISABLE_MONITORING", group="Observation"
    )
    disable_testing: bool = _setting(
        False,
        "Skip the check of data, model and store before training.",
        env="DISABLE_TESTING",
        group="Observation",
    )
    metrics_host: str = _setting("127.0.0.1", "Address /metrics listens on.", group="Observation")
    metrics_port: int = _setting(
        9464,
        "Port of /metrics; when taken, the next free one. 0: any free port.",
        group="Observation",
        ge=0,
        le=65535,
    )
    sample_seconds: float = _setting(
        1.0, "Interval of the CPU, memory and GPU samplers.", group="Observation", ge=0.1
    )
    otlp_endpoint: str | None = _setting(
        None,
        "OTLP/HTTP collector, e.g. http://127.0.0.1:4318; default: used when one answers there.",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
        group="Observation",
    )
    trace_every: int = _setting(
        100, "Trace every Nth step, besides the slow ones; 0: none.", group="Observation", ge=0
    )
    thresholds: dict[str, float] = _setting(
        {}, "Alert thresholds by name, e.g. [thresholds] gpu_temperature = 80.", group="Observation"
    )
    alerts: dict[str, dict[str, Any]] = _setting(
        {},
        "More of an alert, e.g. [alerts.gpu_idle] enabled = false; every value of it can be set, what it "
        "looks at included: see docs/alerts.md.",
        group="Observation",
    )
    notify: Notify = _setting(
        Notify(),
        "Who hears of alerts: slack, email, webhook, pagerduty, watchdog, …; see docs/notifications.md.",
        group="Observation",
    )
    inject: str | None = _setting(
        None,
        "Fault injection for drills: FAULT@STEP[xCOUNT], FAULT one of explode, nan, slow, leak, hang, "
        "error, oom.",
        group="Observation",
    )

    # The stack
    stack: Literal["auto", "on", "off"] = _setting(
        "off",
        "Native Prometheus, Alertmanager and sidecar: auto (start them where installed), on (required), off.",
        group="The stack",
    )
    policy: dict[str, Any] = _setting(
        {},
        "What the sidecar does about alerts, e.g. [policy] dry_run = true; see docs/sidecar.md.",
        group="The stack",
    )

    @field_validator("alerts")
    @classmethod
    def _known_alerts(
        cls, value: dict[str, dict[str, Any]], info: ValidationInfo
    ) -> dict[str, dict[str, Any]]:
        alert_table(info.data.get("thresholds"), value)  # what fits depends on both
        return value

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, value: dict[str, Any]) -> dict[str, Any]:
        policy_with(value, known_actions_only=False)  # a package that adds some may not be loaded here
        return value

    @field_validator("stop_signals")
    @classmethod
    def _known_signals(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        import signal

        for name in value:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(f"{name!r} is no signal that can be caught")
        return value

    @field_validator("output_dir")
    @classmethod
    def _expand(cls, value: Path) -> Path:
        return Path(os.path.expanduser(value))

    def alert_table(self) -> tuple[Alert, ...]:
        """The alert table with `[thresholds]` and `[alerts]` applied."""
        return alert_table(self.thresholds, self.alerts)


def environment_names(field: str) -> tuple[str, ...]:
    """Environment variables of a setting, the most specific first."""
    extra = Settings.model_fields[field].json_schema_extra
    named = extra.get("env") if isinstance(extra, dict) else None
    own = f"OBSINFRA_{field.upper()}"
    return (own, str(named)) if named else (own,)


def group_of(field: str) -> str:
    """Heading a setting stands under in `--help` and `config show`."""
    extra = Settings.model_fields[field].json_schema_extra
    return str(extra["group"]) if isinstance(extra, dict) else "Settings"
