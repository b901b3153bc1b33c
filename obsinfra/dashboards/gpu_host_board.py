"""The board of the machines under the runs: each GPU, and the host's processors, memory, disks and network.

Called by `dashboards.write`.
"""

from __future__ import annotations

from collections.abc import Mapping

from grafana_foundation_sdk.models.dashboard import Panel

from obsinfra.catalog import metrics
from obsinfra.catalog.alerts import Alert
from obsinfra.catalog.metrics import Metric
from obsinfra.dashboards import variables
from obsinfra.dashboards.addresses import GPU_HOST, RANKS, RUN, board_url
from obsinfra.dashboards.annotations import marks
from obsinfra.dashboards.board import Board, Row
from obsinfra.dashboards.panels import (
    NO_GPU,
    lines,
    link,
    named,
    number,
    states_over_time,
    value_names,
)
from obsinfra.dashboards.queries import DEVICES as GPU
from obsinfra.dashboards.queries import HOSTS as HERE
from obsinfra.dashboards.queries import Query, of

DEVICE = "{{host}} GPU {{device}}"
WAITS = f'{HERE}, phase="data"'
RUNNING = "{{run}}, rank {{rank}}"
ON_RUN = link("The run", board_url(RUN, run="${__field.labels.run}"))
ON_RANKS = link("Its ranks", board_url(RANKS, run="${__field.labels.run}"))


def gpu_host_board(alerts: Mapping[str, Alert]) -> Board:
    """The board with the thresholds of this table."""
    return Board(
        uid=GPU_HOST,
        title="GPU & host",
        about="The machines under the runs: GPUs one by one, processors, memory, disks, network and loaders.",
        variables=[
            variables.datasource(),
            variables.model(),
            variables.runs(),
            variables.host(),
            variables.device(),
        ],
        marks=marks('run=~"$run"'),
        rows=[
            Row("GPUs now", _now(alerts)),
            Row("GPUs", _gpus(alerts)),
            Row("Host", _host(alerts)),
            Row("Data loading and memory to come", _loading(alerts)),
        ],
    )


def per_gpu(metric: Metric, function: str = "max", by: str = "") -> str:
    """Each device once, however many ranks of its host see it."""
    return f"{function} by (host, device{by}) ({of(metric, GPU)})"


def _now(alerts: Mapping[str, Alert]) -> list[Panel]:
    return [
        number(
            "GPUs",
            [Query(f"count({per_gpu(metrics.GPU_MEMORY_TOTAL_BYTES)})", "GPUs")],
            unit="none",
            width=4,
            graph=False,
            empty=NO_GPU,
            about="Different devices that the selected runs' trainers see.",
        ),
        number(
            "Busy",
            [Query(f"avg({per_gpu(metrics.GPU_UTILIZATION_RATIO)})", "busy")],
            unit="percentunit",
            width=4,
            empty=NO_GPU,
            about="Mean share of time in which a kernel was running. It says nothing of how well the kernel "
            "used the device.",
        ),
        number(
            "Fullest memory",
            [Query(f"max({of(metrics.GPU_MEMORY_RATIO, GPU)})", "fullest")],
            unit="percentunit",
            width=4,
            empty=NO_GPU,
            about="Memory in use ÷ installed, of the fullest device, all processes of the device together.",
            alerts=named(alerts, "HighGPUMemory"),
        ),
        number(
            "Hottest",
            [Query(f"max({of(metrics.GPU_TEMPERATURE_CELSIUS, GPU)})", "hottest")],
            unit="celsius",
            width=4,
            empty=NO_GPU,
            about="Core temperature of the hottest device.",
            alerts=named(alerts, "HighGPUTemperature"),
        ),
        number(
            "Power",
            [Query(f"sum({per_gpu(metrics.GPU_POWER_WATTS)})", "power")],
            unit="watt",
            width=4,
            empty=NO_GPU,
            about="Drawn now by all selected devices together.",
        ),
        number(
            "XID errors",
            [
                Query(
                    f"sum({of(metrics.GPU_XID_ERRORS, GPU)}) or sum(0 * {of(metrics.GPU_POWER_WATTS, GPU)})",
                    "XID",
                )
            ],
            unit="none",
            width=4,
            graph=False,
            empty=NO_GPU,
            about="Critical errors that the driver reported since these processes began.",
            mentions=named(alerts, "GPUXidError"),
        ),
    ]


def _gpus(alerts: Mapping[str, Alert]) -> list[Panel]:
    allocator = of(metrics.CUDA_ALLOCATOR_BYTES, GPU)
    return [
        lines(
            "GPU utilisation",
            [Query(per_gpu(metrics.GPU_UTILIZATION_RATIO), DEVICE)],
            unit="percentunit",
            width=8,
            floor=0,
            ceiling=1,
            empty=NO_GPU,
            about="Share of time in which a kernel was running. Dips in step with validation or checkpoints "
            "are normal; a saw over every step is a starving device.",
            alerts=named(alerts, "GPUIdle", "HighGPUUtilization"),
        ),
        lines(
            "GPU memory",
            [
                Query(per_gpu(metrics.GPU_MEMORY_USED_BYTES), f"{DEVICE} used"),
                Query(f"max({of(metrics.GPU_MEMORY_TOTAL_BYTES, GPU)})", "installed"),
            ],
            unit="bytes",
            width=8,
            floor=0,
            empty=NO_GPU,
            about="In use by all processes of the device, against what is installed.",
            mentions=named(alerts, "HighGPUMemory"),
        ),
        lines(
            "PyTorch's allocator",
            [Query(f"max by (host, device, state) ({allocator})", f"{DEVICE} {{{{state}}}}")],
            unit="bytes",
            width=8,
            floor=0,
            empty="no CUDA in these runs",
            about="What PyTorch allocated and what it keeps reserved, with their peaks. A wide gap between "
            "the two is fragmentation.",
        ),
        lines(
            "GPU temperature",
            [Query(per_gpu(metrics.GPU_TEMPERATURE_CELSIUS), DEVICE)],
            unit="celsius",
            width=8,
            empty=NO_GPU,
            about="Core temperature. Beyond the line the device will throttle, and an emergency checkpoint "
            "is taken.",
            alerts=named(alerts, "HighGPUTemperature"),
        ),
        lines(
            "GPU power",
            [Query(per_gpu(metrics.GPU_POWER_WATTS), DEVICE)],
            unit="watt",
            width=8,
            floor=0,
            empty=NO_GPU,
            about="A device that is busy and draws little waits for memory or runs many small kernels.",
        ),
        lines(
            "GPU clocks",
            [Query(per_gpu(metrics.GPU_CLOCK_HERTZ, by=", clock"), f"{DEVICE} {{{{clock}}}}")],
            unit="hertz",
            width=8,
            floor=0,
            empty=NO_GPU,
            about="Clock rates of the multiprocessors and the memory. Falling under load is throttling: see "
            "the reasons beside.",
        ),
        states_over_time(
            "Held down by",
            [
                Query(
                    per_gpu(metrics.GPU_THROTTLED, by=", reason"),
                    f"{DEVICE} {{{{reason}}}}",
                )
            ],
            mappings=[value_names({"0": ("free", "green"), "1": ("held down", "orange")})],
            width=8,
            empty=NO_GPU,
            about="Why a device's clock is held down, by reason. `sw_power_cap` is a limit set on purpose; "
            "the thermal and hardware ones are not.",
            mentions=named(alerts, "GPUThrottling"),
        ),
        lines(
            "Memory errors",
            [
                Query(per_gpu(metrics.GPU_ECC_ERRORS, by=", type"), f"{DEVICE} {{{{type}}}}"),
                Query(
                    f"sum by (host, device, xid) ({of(metrics.GPU_XID_ERRORS, GPU)})",
                    f"{DEVICE} XID {{{{xid}}}}",
                ),
            ],
            unit="none",
            width=8,
            floor=0,
            empty=NO_GPU,
            about="ECC errors since the driver was loaded, and XID errors since the process began. Corrected "
            "ones may come now and then; an uncorrected one means that data was lost.",
            mentions=named(alerts, "GPUMemoryFault", "GPUXidError"),
        ),
        lines(
            "Link errors",
            [
                Query(per_gpu(metrics.GPU_PCIE_REPLAYS), f"{DEVICE} PCIe replays"),
                Query(per_gpu(metrics.GPU_NVLINK_ERRORS, by=", type"), f"{DEVICE} NVLink {{{{type}}}}"),
            ],
            unit="none",
            width=8,
            floor=0,
            empty="no GPU, or no such link",
            about="Packets sent again over PCIe, and NVLink errors, since the driver was loaded. A steady "
            "climb is a bad slot, riser or bridge.",
            mentions=named(alerts, "PCIeReplays", "NVLinkErrors"),
        ),
    ]


def _host(alerts: Mapping[str, Alert]) -> list[Panel]:
    def host(metric: Metric) -> str:
        return f"max by (host) ({of(metric, HERE)})"

    def rate(metric: Metric) -> str:
        # The host's own counters, which each of its trainers counts from its start: the largest is enough.
        return f"max by (host) (rate({of(metric, HERE)}[$__rate_interval]))"

    return [
        lines(
            "Processors",
            [Query(host(metrics.HOST_CPU_RATIO), "{{host}}")],
            unit="percentunit",
            width=8,
            floor=0,
            ceiling=1,
            about="Share of all processors of the host in use, by whatever runs there.",
            alerts=named(alerts, "HighCPU"),
        ),
        lines(
            "Processors of each trainer",
            [Query(f"max by (run, rank) ({of(metrics.PROCESS_CPU_RATIO, HERE)})", RUNNING)],
            unit="suffix: cores",
            width=8,
            floor=0,
            about="Cores that the trainer process keeps busy, its loader workers left out. One core at 1 on "
            "a GPU run is a loop that the interpreter holds back.",
            links=[ON_RUN, ON_RANKS],
        ),
        lines(
            "Memory against its limit",
            [Query(host(metrics.MEMORY_PRESSURE_RATIO), "{{host}}")],
            unit="percentunit",
            width=8,
            floor=0,
            ceiling=1,
            about="Memory in use against the nearer limit: the container's or the host's. Beyond the line an "
            "emergency checkpoint is taken, before the kernel ends the trainer.",
            alerts=named(alerts, "HighMemory"),
        ),
        lines(
            "Memory",
            [
                Query(host(metrics.HOST_MEMORY_USED_BYTES), "{{host}} used"),
                Query(host(metrics.HOST_MEMORY_TOTAL_BYTES), "{{host}} installed"),
                Query(host(metrics.CGROUP_MEMORY_USED_BYTES), "{{host}} container uses"),
                Query(host(metrics.CGROUP_MEMORY_LIMIT_BYTES), "{{host}} container's limit"),
                Query(host(metrics.HOST_SWAP_USED_BYTES), "{{host}} swap"),
            ],
            unit="bytes",
            width=8,
            floor=0,
            about="The host's memory and swap; inside a container with a limit also its working set and the "
            "limit.",
            mentions=named(alerts, "CgroupLimitNear", "SwapInUse"),
        ),
        lines(
            "Memory of each trainer",
            [Query(f"max by (run, rank) ({of(metrics.PROCESS_RESIDENT_MEMORY_BYTES, HERE)})", RUNNING)],
            unit="bytes",
            width=8,
            floor=0,
            about="Resident memory of the trainer process. A steady climb is a leak: tensors kept with "
            "their graph, or lists that collect results.",
            mentions=named(alerts, "MemoryCreep"),
            links=[ON_RUN],
        ),
        lines(
            "Free where the runs lie",
            [Query(f"min by (host) ({of(metrics.DISK_FREE_BYTES, HERE)})", "{{host}}")],
            unit="bytes",
            width=8,
            floor=0,
            about="Free space of the file system with the run folder. Below the line checkpoints fail soon.",
            alerts=named(alerts, "DiskLow"),
            mentions=named(alerts, "DiskFilling"),
        ),
        lines(
            "Disks",
            [
                Query(rate(metrics.DISK_READ_BYTES), "{{host}} read"),
                Query(rate(metrics.DISK_WRITTEN_BYTES), "{{host}} written"),
            ],
            unit="Bps",
            width=12,
            floor=0,
            about="Bytes per second over all disks of the host. Written in bursts are checkpoints; read all "
            "the time is a data set that does not fit the page cache.",
        ),
        lines(
            "Network",
            [
                Query(rate(metrics.NETWORK_RECEIVED_BYTES), "{{host}} received"),
                Query(rate(metrics.NETWORK_SENT_BYTES), "{{host}} sent"),
            ],
            unit="Bps",
            width=12,
            floor=0,
            about="Bytes per second over all interfaces of the host: data, gradients and remote copies.",
        ),
    ]


def _loading(alerts: Mapping[str, Alert]) -> list[Panel]:
    waiting = f"rate({of(metrics.PHASE_SECONDS, WAITS)}[$__rate_interval])"
    steps = f"rate({of(metrics.STEPS, HERE)}[$__rate_interval])"
    return [
        lines(
            "Share of time waiting for data",
            [
                Query(
                    'max by (run, rank) (obsinfra:data_share:ratio{run=~"$run"})',
                    RUNNING,
                )
            ],
            unit="percentunit",
            floor=0,
            about="Over five minutes. Beyond the line the data pipeline is the bottleneck: more workers, "
            "prefetching, faster storage or cheaper preprocessing.",
            alerts=named(alerts, "DataStarvation"),
            links=[ON_RUN],
        ),
        lines(
            "Wait for data in each step",
            [
                Query(
                    f"sum by (run, rank) ({waiting}) / (sum by (run, rank) ({steps}) > 0)",
                    RUNNING,
                )
            ],
            unit="s",
            floor=0,
            about="Seconds per step spent waiting for the next batch. Compare it with the step's median on "
            "the run's board: what a perfect loader would save.",
            mentions=named(alerts, "DataStarvation"),
            links=[ON_RUN, ON_RANKS],
        ),
        lines(
            "Memory lasts for",
            [
                Query(
                    f"min by (run, device) ({of(metrics.MEMORY_EXHAUSTION_SECONDS, HERE)})",
                    "{{run}} {{device}}",
                )
            ],
            unit="s",
            floor=0,
            empty="not watched in these runs",
            about="Until memory is exhausted if it grows on as in the last minutes; a day where it does not "
            "grow. `host` is the host's memory, the others are devices.",
            mentions=named(alerts, "MemoryExhaustionForeseen"),
            links=[ON_RUN],
        ),
        lines(
            "Records skipped",
            [Query(f"sum by (run) ({of(metrics.DATA_RECORDS_SKIPPED, HERE)})", "{{run}}")],
            unit="none",
            floor=0,
            empty="not counted in these runs",
            about="Corrupt records that the data loader left out since the process began.",
            links=[ON_RUN],
        ),
    ]
