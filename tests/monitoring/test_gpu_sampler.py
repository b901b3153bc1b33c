"""The GPU sampler over a real shared library that speaks NVML, and over real GPUs where there are any."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from gpu_machine import GpuMachine, build_nvml

GIB = 2**30
NOT_SUPPORTED, NO_PERMISSION, LOST, UNKNOWN = 3, 4, 15, 999

FOUR_GPUS: dict[str, Any] = {"count": 4}
for _n, _letter in enumerate("abcd"):
    FOUR_GPUS |= {
        f"{_n}.uuid": f"GPU-{_letter * 8}-0000",
        f"{_n}.name": f"NVIDIA Fake {_letter.upper()}",
        f"{_n}.utilization": 10 * (_n + 1),
        f"{_n}.memory.total": 80 * GIB,
        f"{_n}.memory.used": 20 * GIB,
        f"{_n}.temperature": 60 + _n,
        f"{_n}.power": 350_500,
        f"{_n}.clock.sm": 1980,
        f"{_n}.clock.memory": 2619,
        f"{_n}.reasons": hex(0x1),
    }


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed, so the NVML stand-in cannot be built (Debian: apt install gcc)")
    base = tmp_path_factory.mktemp("nvml")
    return {"new": build_nvml(base / "new"), "old": build_nvml(base / "old", "-DOLD_DRIVER")}


Make = Callable[..., GpuMachine]


@pytest.fixture
def machine(tmp_path: Path, libraries: dict[str, Path]) -> Iterator[Make]:
    made: list[GpuMachine] = []

    def make(state: Mapping[str, Any] | None = None, driver: str = "new", **environment: str) -> GpuMachine:
        found = GpuMachine(tmp_path, libraries[driver], environment, {**FOUR_GPUS, **(state or {})})
        made.append(found)
        return found

    yield make
    for one in made:
        one.end()


@pytest.mark.parametrize("driver", ["new", "old"])
def test_every_reading_in_base_units(machine: Make, driver: str) -> None:
    """Percent become ratios, milliwatts watts, megahertz hertz; with today's driver and an old one."""
    values = machine(
        {"0.memory.activity": 45, "0.ecc.corrected": 7, "0.ecc.uncorrected": 1, "0.reasons": hex(0x4 | 0x40)},
        driver,
    ).values()
    assert {key: value for key, value in values.items() if key[1:2] == ("0",)} == {
        ("gpu_utilization_ratio", "0"): 0.1,
        ("gpu_memory_activity_ratio", "0"): 0.45,
        ("gpu_memory_used_bytes", "0"): 20 * GIB,
        ("gpu_memory_total_bytes", "0"): 80 * GIB,
        ("gpu_memory_ratio", "0"): 0.25,
        ("gpu_temperature_celsius", "0"): 60,
        ("gpu_power_watts", "0"): 350.5,
        ("gpu_clock_hertz", "0", "sm"): 1.98e9,
        ("gpu_clock_hertz", "0", "memory"): 2.619e9,
        ("gpu_throttled", "0", "applications_clocks_setting"): 0,
        ("gpu_throttled", "0", "sw_power_cap"): 1,
        ("gpu_throttled", "0", "hw_slowdown"): 0,
        ("gpu_throttled", "0", "sync_boost"): 0,
        ("gpu_throttled", "0", "sw_thermal_slowdown"): 0,
        ("gpu_throttled", "0", "hw_thermal_slowdown"): 1,
        ("gpu_throttled", "0", "hw_power_brake_slowdown"): 0,
        ("gpu_throttled", "0", "display_clock_setting"): 0,
        ("gpu_ecc_errors", "0", "corrected"): 7,
        ("gpu_ecc_errors", "0", "uncorrected"): 1,
    }
    assert values["telemetry_errors", "gpu_sampler"] == 0
    assert [values["gpu_utilization_ratio", str(n)] for n in range(4)] == [0.1, 0.2, 0.3, 0.4]


def test_link_errors_are_read_where_the_device_counts_them(machine: Make) -> None:
    gpus = machine({"0.pcie.replays": 12, "0.nvlink.crc": 3, "0.nvlink.recovery": 2**33, "1.pcie.replays": 0})
    found = {key: value for key, value in gpus.values().items() if "pcie" in key[0] or "nvlink" in key[0]}
    assert found == {
        ("gpu_pcie_replays", "0"): 12,
        ("gpu_pcie_replays", "1"): 0,
        ("gpu_nvlink_errors", "0", "crc"): 3,
        ("gpu_nvlink_errors", "0", "recovery"): 2**33,
    }
    gpus.set({"0.nvlink.crc.error": UNKNOWN})
    values = gpus.values()
    assert ("gpu_nvlink_errors", "0", "crc") not in values and values["gpu_pcie_replays", "0"] == 12
    assert values["telemetry_errors", "gpu_sampler"] == 1


def test_each_sample_asks_anew(machine: Make) -> None:
    gpus = machine()
    assert gpus.values()["gpu_temperature_celsius", "2"] == 62
    gpus.set({"2.temperature": 91})
    assert gpus.values()["gpu_temperature_celsius", "2"] == 91


def test_an_idle_gpu_is_not_throttled(machine: Make) -> None:
    values = machine({"0.reasons": hex(0x1)}).values()
    assert {value for key, value in values.items() if key[0] == "gpu_throttled"} == {0.0}


def test_devices_are_described(machine: Make) -> None:
    assert machine(CUDA_VISIBLE_DEVICES="2").ask("describe") == [
        {"device": "0", "name": "NVIDIA Fake C", "uuid": "GPU-cccccccc-0000"}
    ]


@pytest.mark.parametrize(
    "thing",
    ["utilization", "memory", "temperature", "power", "clock.sm", "clock.memory", "reasons", "ecc.corrected"],
)
@pytest.mark.parametrize("error", [NOT_SUPPORTED, NO_PERMISSION, UNKNOWN])
def test_a_reading_that_fails_is_absent_and_the_others_stay(machine: Make, thing: str, error: int) -> None:
    """Not supported is no error (GeForce has no ECC); anything else is counted."""
    gpus = machine()
    whole = gpus.values()
    gpus.set({f"1.{thing}.error": error})
    values = gpus.values()
    gone = {key for key in whole if key not in values}
    names = {
        "utilization": ("gpu_utilization_ratio", "gpu_memory_activity"),
        "memory": ("gpu_memory_used", "gpu_memory_total", "gpu_memory_ratio"),
        "temperature": "gpu_temperature",
        "power": "gpu_power",
        "clock.sm": "gpu_clock",
        "clock.memory": "gpu_clock",
        "reasons": "gpu_throttled",
        "ecc.corrected": "gpu_ecc",
    }
    assert gone and all(key[0].startswith(names[thing]) and key[1] == "1" for key in gone)
    if thing.startswith(("clock", "ecc")):
        assert gone == {(next(iter(gone))[0], "1", thing.split(".")[1])}
    assert values["telemetry_errors", "gpu_sampler"] == (error == UNKNOWN)
    assert gpus.ask("state")["errors"] == (error == UNKNOWN)


def test_a_device_lost_in_mid_run_is_counted_once_and_comes_back(machine: Make) -> None:
    gpus = machine()
    gpus.values()
    gpus.set({"1.error": LOST})
    values = gpus.values()
    assert not [key for key in values if key[1:2] == ("1",)]
    assert values["gpu_utilization_ratio", "2"] == 0.3
    errors = gpus.values()["telemetry_errors", "gpu_sampler"]
    assert errors >= 1
    assert gpus.values()["telemetry_errors", "gpu_sampler"] == errors, "counted when lost, not ever after"
    gpus.set({"1.error": None, "event.0": "1 79"})
    gpus.values()
    values = gpus.values()
    assert values["gpu_utilization_ratio", "1"] == 0.2
    assert values["gpu_xid_errors", "1", "79"] == 1, "its events are watched again"


def test_xid_errors_are_counted_by_device_and_code(machine: Make) -> None:
    """Polled without waiting; the stand-in aborts the process when it is asked to wait."""
    gpus = machine(CUDA_VISIBLE_DEVICES="3,1")
    assert not [key for key in gpus.values() if key[0] == "gpu_xid_errors"]
    gpus.set({"event.0": "1 48", "event.1": "3 79", "event.2": "0 31", "event.3": "1 48"})
    values = gpus.values()
    found = {key[1:]: value for key, value in values.items() if key[0] == "gpu_xid_errors"}
    assert found == {("1", "48"): 2, ("0", "79"): 1}, "GPU 0 is not ours"
    assert gpus.values()["gpu_xid_errors", "1", "48"] == 2


def test_the_xid_of_a_gpu_that_fell_off_the_bus_has_its_device(machine: Make) -> None:
    gpus = machine()
    gpus.values()
    gpus.set({"2.uuid.error": LOST, "event.0": "2 79"})
    assert gpus.values()["gpu_xid_errors", "2", "79"] == 1


def test_a_flood_of_events_is_read_over_several_samples(machine: Make) -> None:
    gpus = machine({f"event.{n}": "0 13" for n in range(300)})
    counts = [gpus.values()["gpu_xid_errors", "0", "13"] for _ in range(4)]
    assert counts == [128, 256, 300, 300]


def test_a_lost_device_does_not_silence_the_events_of_others(machine: Make) -> None:
    gpus = machine()
    gpus.values()
    gpus.set({"1.error": LOST})
    gpus.values()
    gpus.set({"event.0": "2 31"})
    assert gpus.values()["gpu_xid_errors", "2", "31"] == 1


@pytest.mark.parametrize("error", [NOT_SUPPORTED, UNKNOWN])
def test_without_events_everything_else_works(machine: Make, error: int) -> None:
    values = machine({"events.error": error}).values()
    assert values["gpu_utilization_ratio", "0"] == 0.1
    assert values["telemetry_errors", "gpu_sampler"] == (error == UNKNOWN)


@pytest.mark.parametrize(
    ("setting", "letters"),
    [
        ("0", "a"),
        ("2,0", "ca"),
        (" 3 , 1", "db"),
        ("GPU-bbbbbbbb-0000,GPU-a", "ba"),
        ("1,9,2", "b"),
        ("1,-1,2", "b"),
        ("1,x", "b"),
        ("3,GPU-bb", "db"),
    ],
)
def test_devices_are_numbered_as_cuda_numbers_them(machine: Make, setting: str, letters: str) -> None:
    """CUDA's rules: indices or beginnings of UUIDs, in that order, up to the first invalid one."""
    described = machine(CUDA_VISIBLE_DEVICES=setting).ask("describe")
    assert [(one["device"], one["uuid"][4]) for one in described] == [
        (str(number), letter) for number, letter in enumerate(letters)
    ]


@pytest.mark.parametrize("setting", ["", "-1", "none", "GPU-", "GPU-zz", "0,0", "GPU-a,0", "MIG-nothing"])
def test_a_setting_that_hides_every_gpu(machine: Make, setting: str) -> None:
    """`GPU-` begins four UUIDs and so names none; naming one twice empties the list."""
    gpus = machine(CUDA_VISIBLE_DEVICES=setting)
    assert gpus.ask("sample") == [] and gpus.ask("describe") == []
    assert "CUDA_VISIBLE_DEVICES" in gpus.ask("state")["reason"]


def test_a_gpu_this_user_may_not_open_is_not_counted(machine: Make) -> None:
    """As in a Slurm job with a part of the node's GPUs: CUDA numbers only those it can open."""
    described = machine({"1.handle.error": NO_PERMISSION}).ask("describe")
    assert [(one["device"], one["uuid"][4]) for one in described] == [("0", "a"), ("1", "c"), ("2", "d")]


def test_a_mig_slice_has_its_own_memory_and_its_boards_temperature(machine: Make) -> None:
    slice_of_c = {
        "8.uuid": "MIG-1111",
        "8.name": "NVIDIA Fake C MIG 1g.10gb",
        "8.board": 2,
        "8.memory.total": 10 * GIB,
        "8.memory.used": 5 * GIB,
        "8.utilization.error": NOT_SUPPORTED,
    }
    gpus = machine(slice_of_c, CUDA_VISIBLE_DEVICES="MIG-1111")
    assert [one["uuid"] for one in gpus.ask("describe")] == ["MIG-1111"]
    values = gpus.values()
    assert values["gpu_memory_ratio", "0"] == 0.5
    assert values["gpu_temperature_celsius", "0"] == 62
    assert ("gpu_utilization_ratio", "0") not in values


TORCH_WITH_CUDA = """
import sys, types
class Properties:
    def __init__(self, uuid): self.uuid = uuid
torch = types.ModuleType("torch")
torch.cuda = types.SimpleNamespace(
    is_initialized=lambda: True,
    device_count=lambda: 2,
    get_device_properties=lambda i: Properties(["dddddddd-0000", "aaaaaaaa-0000"][i]),
    memory_stats=lambda i: [
        {"allocated_bytes.all.current": 100, "allocated_bytes.all.peak": 300,
         "reserved_bytes.all.current": 400, "reserved_bytes.all.peak": 500, "num_alloc_retries": 2},
        {"reserved_bytes.all.peak": 0},
    ][i],
)
sys.modules["torch"] = torch
"""


def test_once_torch_uses_cuda_its_order_counts(machine: Make) -> None:
    """CUDA may number faster GPUs first, NVML never does; torch tells the UUIDs, and labels follow it."""
    gpus = machine()
    assert gpus.values()["gpu_utilization_ratio", "0"] == 0.1
    gpus.run(TORCH_WITH_CUDA)
    gpus.set({"event.0": "3 48"})
    values = gpus.values()
    assert [one["uuid"][4] for one in gpus.ask("describe")] == ["d", "a"]
    assert (values["gpu_utilization_ratio", "0"], values["gpu_utilization_ratio", "1"]) == (0.4, 0.1)
    assert ("gpu_utilization_ratio", "2") not in values
    assert values["gpu_xid_errors", "0", "48"] == 1


def test_the_allocator_is_asked_for_the_devices_in_use(machine: Make) -> None:
    gpus = machine()
    gpus.run(TORCH_WITH_CUDA)
    found = {key[1:]: value for key, value in gpus.values().items() if key[0].startswith("cuda_")}
    assert found == {
        ("0", "allocated"): 100,
        ("0", "allocated_peak"): 300,
        ("0", "reserved"): 400,
        ("0", "reserved_peak"): 500,
        ("0",): 2,
    }


def test_torch_is_never_imported_and_may_be_half_imported(machine: Make) -> None:
    gpus = machine()
    gpus.values()
    assert gpus.ask("state")["torch"] is False
    gpus.run("import sys, types; sys.modules['torch'] = types.ModuleType('torch')")
    assert not [key for key in gpus.values() if key[0].startswith("cuda_")]


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"count": 0}, "NVML finds no GPU"),
        ({"init.error": 9}, "Driver Not Loaded"),
        ({"count.error": UNKNOWN}, "NVML cannot be used"),
        ({f"{n}.handle.error": NO_PERMISSION for n in range(4)}, "NVML finds no GPU"),
    ],
)
def test_without_a_usable_gpu_there_is_a_reason(machine: Make, state: Mapping[str, Any], reason: str) -> None:
    gpus = machine(state)
    assert gpus.ask("sample") == []
    said = gpus.ask("state")
    assert reason.lower() in said["reason"].lower() and said["errors"] == 0
    gpus.ask("close")


def test_without_the_library_there_is_a_reason(tmp_path: Path) -> None:
    """A library that cannot be loaded stands before any real one in the loader's path."""
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"not a library")
    gpus = GpuMachine(tmp_path, tmp_path, {}, {})
    assert gpus.ask("sample") == []
    assert "NVML" in gpus.ask("state")["reason"]
    gpus.end()


def test_closing_gives_nvml_back_and_twice_is_fine(machine: Make) -> None:
    gpus = machine()
    gpus.values()
    gpus.ask("close")
    gpus.ask("close")
    assert gpus.ask("sample") == []
    gpus.run(
        "import pynvml\ntry:\n    pynvml.nvmlShutdown()\n    raise SystemExit('still open')\n"
        "except pynvml.NVMLError_Uninitialized:\n    pass"
    )


@pytest.mark.gpu
def test_a_real_gpu_agrees_with_torch() -> None:
    """Memory and numbering as torch sees them, on whatever GPUs this machine has."""
    import torch

    from obsinfra.catalog import metrics as catalog
    from obsinfra.monitoring.gpu_sampler import create_gpu_sampler

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    sampler = create_gpu_sampler()
    try:
        assert sampler.reason is None
        ballast = torch.ones(256 * 2**20, dtype=torch.uint8, device="cuda:0")
        torch.cuda.synchronize()
        found = {(metric, *labels.values()): value for metric, labels, value in sampler.sample()}
        described = sampler.describe()
        assert len(described) == torch.cuda.device_count()
        for index, one in enumerate(described):
            assert one["uuid"].removeprefix("GPU-") == str(torch.cuda.get_device_properties(index).uuid)
        free, total = torch.cuda.mem_get_info(0)
        assert found[catalog.GPU_MEMORY_USED_BYTES, "0"] >= ballast.numel()
        assert abs(found[catalog.GPU_MEMORY_USED_BYTES, "0"] - (total - free)) < 2 * GIB
        assert found[catalog.CUDA_ALLOCATOR_BYTES, "0", "allocated"] >= ballast.numel()
        assert 0 <= found[catalog.GPU_UTILIZATION_RATIO, "0"] <= 1
        assert 10 < found[catalog.GPU_TEMPERATURE_CELSIUS, "0"] < 110
        assert found[catalog.GPU_CLOCK_HERTZ, "0", "sm"] > 1e8
        assert sampler.errors == 0
    finally:
        sampler.close()
