"""What the host sampler says agrees with the kernel and with what this process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_cgroup import GIB, V2_MOUNT, Tree

from obsinfra.catalog import metrics as catalog
from obsinfra.catalog.metrics import Metric
from obsinfra.monitoring.host_sampler import HostSampler
from obsinfra.monitoring.sample import Sample


def values(samples: list[Sample]) -> dict[Metric, float]:
    return {sample.metric: sample.value for sample in samples}


def burn(seconds: float) -> None:
    """Use one processor until the process has used `seconds` of it."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_every_host_metric_of_the_catalogue_is_there(tmp_path: Path) -> None:
    """Disk and network counters are absent only where the kernel has none, the cgroup's without a limit."""
    tree = Tree(tmp_path)
    tree.process("0::/\n", V2_MOUNT.format(root="/"))
    tree.v2("", GIB, 4 * GIB)
    sampler = HostSampler(tmp_path, cgroup_root=tmp_path)
    burn(0.1)
    found = values(sampler.sample())
    expected = {
        catalog.HOST_CPU_RATIO,
        catalog.PROCESS_CPU_RATIO,
        catalog.HOST_MEMORY_USED_BYTES,
        catalog.HOST_MEMORY_TOTAL_BYTES,
        catalog.HOST_SWAP_USED_BYTES,
        catalog.CGROUP_MEMORY_USED_BYTES,
        catalog.CGROUP_MEMORY_LIMIT_BYTES,
        catalog.MEMORY_PRESSURE_RATIO,
        catalog.PROCESS_RESIDENT_MEMORY_BYTES,
        catalog.DISK_FREE_BYTES,
        catalog.TELEMETRY_ERRORS,
    }
    if psutil.disk_io_counters() is not None:
        expected |= {catalog.DISK_READ_BYTES, catalog.DISK_WRITTEN_BYTES}
    if set(psutil.net_io_counters(pernic=True)) - {"lo"}:
        expected |= {catalog.NETWORK_RECEIVED_BYTES, catalog.NETWORK_SENT_BYTES}
    assert set(found) == expected
    assert found[catalog.TELEMETRY_ERRORS] == 0
    assert 0 <= found[catalog.HOST_CPU_RATIO] <= 1


def test_the_process_ratio_is_processor_time_over_wall_time(tmp_path: Path) -> None:
    """Bounds from the clocks around the sampler's own readings, so that a busy machine cannot break it."""
    wall, busy = time.monotonic(), time.process_time()
    sampler = HostSampler(tmp_path)
    inner_wall, inner_busy = time.monotonic(), time.process_time()
    burn(0.2)
    inner_wall, inner_busy = time.monotonic() - inner_wall, time.process_time() - inner_busy
    ratio = values(sampler.sample())[catalog.PROCESS_CPU_RATIO]
    wall, busy = time.monotonic() - wall, time.process_time() - busy
    assert inner_busy / wall <= ratio <= busy / inner_wall


def test_no_ratio_before_there_is_a_window_and_the_last_one_within_it(tmp_path: Path) -> None:
    """The first sample right after creation has no ratio to tell, instead of an invented 0."""
    sampler = HostSampler(tmp_path)
    sampler._cpu_at = time.monotonic() + 3600  # the window has not begun, however slow this machine is
    assert catalog.HOST_CPU_RATIO not in values(sampler.sample())
    sampler._cpu_at = time.monotonic() - 1
    burn(0.02)
    ratio = values(sampler.sample())[catalog.PROCESS_CPU_RATIO]
    sampler._cpu_at = time.monotonic() + 3600
    assert values(sampler.sample())[catalog.PROCESS_CPU_RATIO] == ratio


def test_memory_agrees_with_the_kernel(tmp_path: Path) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    sampler = HostSampler(tmp_path)
    before = values(sampler.sample())
    assert before[catalog.HOST_MEMORY_TOTAL_BYTES] == total
    assert 0 < before[catalog.HOST_MEMORY_USED_BYTES] < total
    ballast = bytearray(os.urandom(1)) * (200 * 2**20)
    after = values(sampler.sample())
    grown = after[catalog.PROCESS_RESIDENT_MEMORY_BYTES] - before[catalog.PROCESS_RESIDENT_MEMORY_BYTES]
    assert len(ballast) * 0.9 < grown < len(ballast) * 1.5


@pytest.mark.parametrize(("used", "limit"), [(99, 100), (1, 10**9)])
def test_pressure_is_against_the_nearer_limit(tmp_path: Path, used: int, limit: int) -> None:
    tree = Tree(tmp_path)
    tree.process("0::/\n", V2_MOUNT.format(root="/"))
    tree.v2("", used, limit)
    found = values(HostSampler(tmp_path, cgroup_root=tmp_path).sample())
    host = found[catalog.HOST_MEMORY_USED_BYTES] / found[catalog.HOST_MEMORY_TOTAL_BYTES]
    assert found[catalog.MEMORY_PRESSURE_RATIO] == max(host, used / limit)
    assert found[catalog.CGROUP_MEMORY_USED_BYTES] == used
    assert found[catalog.CGROUP_MEMORY_LIMIT_BYTES] == limit


def test_without_a_limit_the_cgroup_is_absent(tmp_path: Path) -> None:
    found = values(HostSampler(tmp_path, cgroup_root=tmp_path).sample())
    assert catalog.CGROUP_MEMORY_LIMIT_BYTES not in found
    host = found[catalog.HOST_MEMORY_USED_BYTES] / found[catalog.HOST_MEMORY_TOTAL_BYTES]
    assert found[catalog.MEMORY_PRESSURE_RATIO] == host


def test_a_shared_outer_limit_can_be_the_nearer_one(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.process("0::/slice/job\n", V2_MOUNT.format(root="/"))
    tree.v2("slice", 3199, 3200)
    tree.v2("slice/job", 1, 800)
    found = values(HostSampler(tmp_path, cgroup_root=tmp_path).sample())
    assert found[catalog.CGROUP_MEMORY_LIMIT_BYTES] == 800
    assert found[catalog.MEMORY_PRESSURE_RATIO] == 3199 / 3200


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = values(HostSampler(tmp_path / "runs" / "r1").sample())[catalog.DISK_FREE_BYTES]
    stat = os.statvfs(tmp_path)
    assert abs(free - stat.f_bavail * stat.f_frsize) < 2 * GIB


def test_counters_begin_at_zero_and_never_fall(tmp_path: Path) -> None:
    """Since the sampler's creation, not since the machine's boot; loopback traffic is not the host's."""
    sampler = HostSampler(tmp_path)
    counters = [
        catalog.DISK_READ_BYTES,
        catalog.DISK_WRITTEN_BYTES,
        catalog.NETWORK_RECEIVED_BYTES,
        catalog.NETWORK_SENT_BYTES,
    ]
    first = values(sampler.sample())
    sent = 64 * 2**20
    with socket.create_server(("127.0.0.1", 0)) as listener:
        code = (
            "import socket, sys; connection = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
            f"connection.sendall(bytes({sent}))"
        )
        child = subprocess.Popen([sys.executable, "-c", code, str(listener.getsockname()[1])])
        connection, _ = listener.accept()
        with connection:
            while connection.recv(2**20):
                pass
        assert child.wait(60) == 0
    second = values(sampler.sample())
    for metric in counters:
        assert (metric in first) == (metric in second)
        if metric in first:
            assert 0 <= first[metric] <= second[metric]
    if catalog.NETWORK_SENT_BYTES in second:
        assert second[catalog.NETWORK_SENT_BYTES] - first[catalog.NETWORK_SENT_BYTES] < sent


def test_a_failing_reading_is_absent_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise OSError("no /proc/meminfo")

    sampler = HostSampler(tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", broken)
    for count in (1, 2):
        found = values(sampler.sample())
        assert found[catalog.TELEMETRY_ERRORS] == sampler.errors == count
        assert catalog.HOST_MEMORY_TOTAL_BYTES not in found
        assert catalog.PROCESS_RESIDENT_MEMORY_BYTES in found
    said = [record.getMessage() for record in caplog.records if "host_reading_failed" in record.getMessage()]
    assert len(said) == 1 and "reading=memory" in said[0]
