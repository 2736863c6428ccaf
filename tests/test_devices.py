"""Cards and hosts: names, capacities through NVML and /proc, dtypes, and what lies outside the arena."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_config

from albor.errors import ConfigError
from albor.memory import devices
from albor.memory.devices import (
    GIB,
    GPUS,
    MIB,
    Hardware,
    compute_dtype,
    find_gpu,
    host_capacity,
    installed_gpu,
    outside,
    resolve_accumulator,
)
from albor.memory.plan import plan_training


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 24GB", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("RTX 4060 Ti 8 GB", "RTX 4060 Ti 8GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("A100-80", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("Tesla T4", "T4"),
    ],
)
def test_find_gpu(name: str, meant: str) -> None:
    assert find_gpu(name).name == meant


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("RTX 4900", "did you mean RTX 4090"),
        ("RTX 409", "did you mean RTX 4090"),  # and not a card of 409 GB
        ("A100", "more than one card; did you mean A100 40GB or A100 80GB"),
        ("RTX 4090 Laptop GPU", "not a card that albor knows"),  # another card, with 16 GB
        ("RTX 3060 8GB", "not a card that albor knows"),
        ("", "--vram 24GiB"),
    ],
)
def test_unknown_cards_are_not_guessed(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as error:
        find_gpu(name)
    assert "H100" in str(error.value), "the cards that exist are listed"


def test_every_row_is_found_by_its_own_name_and_is_plausible() -> None:
    for gpu in GPUS:
        assert find_gpu(gpu.name) is gpu
        assert gpu.usable_bytes is not None
        assert 7 * GIB < gpu.usable_bytes < 192 * GIB
        assert (gpu.bf16_peak_flops is None) == (gpu.compute_capability < (8, 0))


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx2 avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx512f", "float32")]
)
def test_cpu_computes_bf16_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, dtype: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\nbugs\t\t:\n")
    known = devices._cpu_has_bf16(cpuinfo)
    monkeypatch.setattr(devices, "_cpu_has_bf16", lambda: known)
    assert compute_dtype("bf16", "cpu") == dtype
    assert devices.falls_back("bf16", dtype) == (dtype == "float32")


def test_dtypes() -> None:
    assert [compute_dtype(p, "cuda") for p in ("bf16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert compute_dtype("fp32", "cpu") == "float32"
    assert not devices.falls_back("fp32", "float32")
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        compute_dtype("fp16", "cpu")


class _Nvml:
    """Two cards, as pynvml shows them."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2
    closed = False

    def __init__(self, *, driver: bool = True, reports_memory: bool = True):
        self.driver, self.reports_memory = driver, reports_memory

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("library not found")

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return ("GPU-aaaa-1", "GPU-bbbb-2")[handle]

    def nvmlDeviceGetName(self, handle: int) -> str:
        return ("NVIDIA GeForce RTX 4090", "NVIDIA Thing 1")[handle]

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> list[int]:
        return [8, 9]

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> Any:
        if not self.reports_memory:
            raise self.NVMLError("not supported")
        return SimpleNamespace(total=24564 * MIB, reserved=484 * MIB, free=20000 * MIB, used=4080 * MIB)


def _install(monkeypatch: pytest.MonkeyPatch, visible: str | None = None, **keys: bool) -> _Nvml:
    nvml = _Nvml(**keys)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return nvml


def test_installed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _install(monkeypatch)
    installed = installed_gpu()
    assert installed is not None
    gpu, free = installed
    assert (gpu.name, gpu.compute_capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert (gpu.usable_bytes, free) == (24080 * MIB, 20000 * MIB)
    assert gpu.bf16_peak_flops == 165.2e12
    assert nvml.closed
    hardware = devices.this_machine("auto")
    assert (hardware.device, hardware.capacity_bytes) == ("cuda", 20000 * MIB)
    assert "19.53 GiB free of 23.52 GiB" in hardware.description


@pytest.mark.parametrize(
    ("visible", "name"),
    [("1,0", "Thing"), ("GPU-bbbb", "Thing"), ("GPU-aaaa-1", "4090"), ("", None), ("-1", None), ("7", None)],
)
def test_visible_devices_are_honoured(
    monkeypatch: pytest.MonkeyPatch, visible: str, name: str | None
) -> None:
    _install(monkeypatch, visible)
    installed = installed_gpu()
    assert (installed is None) == (name is None)
    assert installed is None or (name or "") in installed[0].name


def test_a_driver_that_knows_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, reports_memory=False)
    hardware = devices.this_machine("cuda")
    assert hardware.capacity_bytes is None
    assert "memory unknown" in hardware.description


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, driver=False)
    assert installed_gpu() is None
    assert devices.this_machine("auto").device == "cpu"
    assert devices.this_machine("cuda").capacity_bytes is None


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        (
            {  # version 2: the limit of a parent holds, and cached files can go
                "proc/self/cgroup": "0::/user/job\n",
                "cg/user/job/memory.max": "max\n",
                "cg/user/memory.max": f"{4 * GIB}\n",
                "cg/user/memory.current": f"{3 * GIB}\n",
                "cg/user/memory.stat": f"anon 5\ninactive_file {1 * GIB}\n",
            },
            2 * GIB,
        ),
        (
            {  # version 1, in a container whose path is the host's
                "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu:/\n",
                "cg/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "cg/memory/memory.usage_in_bytes": f"{1 * GIB}\n",
            },
            1 * GIB,
        ),
        (
            {  # no limit, as version 1 writes it
                "proc/self/cgroup": "4:memory:/\n",
                "cg/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "cg/memory/memory.usage_in_bytes": "5\n",
            },
            8 * GIB,
        ),
    ],
)
def test_host_capacity(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    _write(tmp_path, MEMINFO | files)
    assert host_capacity(tmp_path / "proc", tmp_path / "cg") == expected


def test_host_capacity_unknown(tmp_path: Path) -> None:
    assert host_capacity(tmp_path / "proc", tmp_path / "cg") is None


def test_outside_on_cuda_ends_in_whole_segments() -> None:
    plan = plan_training(make_config(micro_batch_size=64, sequence_length=512), "cuda", "bfloat16")
    ada, hopper = (outside(plan, find_gpu(name)) for name in ("RTX 4090", "H100"))
    assert ada["cuBLAS workspace"] == 8_519_680
    assert hopper["cuBLAS workspace"] == 33_554_432
    assert outside(plan, None) == hopper, "an unknown card is the most demanding"
    # The arena in 2 MiB steps, 8,519,680 bytes in a segment of 20 MiB, and one segment for small tensors.
    arena = plan.size("device")
    assert arena > 10 * MIB
    segments = -(-arena // (2 * MIB)) * 2 * MIB + 20 * MIB + 2 * MIB
    assert arena + ada["cuBLAS workspace"] + ada["allocator rounding"] == segments



def test_accumulator_goes_to_the_device_where_it_fits() -> None:
    config = make_config(accumulator="auto")
    plan = plan_training(config, "cuda", "bfloat16", "gpu")
    gpu = find_gpu("L4")
    enough = plan.size("device") + sum(outside(plan, gpu).values())

    def resolved(device: Any, capacity: int | None) -> str:
        return resolve_accumulator(config, Hardware(device, "", gpu, capacity), "bfloat16")

    assert resolved("cuda", enough) == "gpu"
    assert resolved("cuda", enough - 1) == "cpu"
    assert resolved("cuda", None) == "cpu"
    assert resolved("cpu", enough) == "cpu"
    asked = make_config(accumulator="gpu")
    assert resolve_accumulator(asked, Hardware("cuda", ""), "bfloat16") == "gpu"
