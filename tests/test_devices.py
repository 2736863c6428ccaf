"""Cards and hosts: names, capacities through NVML and /proc, dtypes, and what lies outside the arena."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_config

from albor.errors import ConfigError
from albor.memory import devices, nvml
from albor.memory.cards import GPUS, Hardware, find_gpu
from albor.memory.devices import compute_dtype, resolve_accumulator
from albor.memory.host import has_bf16_instructions, host_capacity
from albor.memory.nvml import installed_gpu
from albor.memory.outside import outside
from albor.memory.plan import plan_training
from albor.units import GIB, MIB


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
    known = has_bf16_instructions(cpuinfo)
    monkeypatch.setattr(devices, "cpu_has_bf16", lambda: known)
    assert compute_dtype("bf16", "cpu") == dtype
    assert devices.falls_back("bf16", dtype) == (dtype == "float32")


def test_dtypes() -> None:
    assert [compute_dtype(p, "cuda") for p in ("bf16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert compute_dtype("fp32", "cpu") == "float32"
    assert not devices.falls_back("fp32", "float32")
    with pytest.raises(ConfigError, match="use bf16 or fp32"):
        compute_dtype("fp16", "cpu")


class _NVMLError(Exception):
    def __init__(self, value: int):
        super().__init__(value)
        self.value = value


_NO_PERMISSION, _NOT_SUPPORTED, _NOT_FOUND, _LOST = 4, 3, 6, 15


@dataclass(frozen=True)
class _Card:
    """A card, or an instance of one; its own handle."""

    uuid: str
    name: str = "NVIDIA GeForce RTX 4090"
    capability: tuple[int, int] = (8, 9)
    free: int | None = 20000  # MiB; None: shares the host's memory
    total: int = 24564
    slots: tuple[_Card | None, ...] | None = None  # None: cannot be sliced
    ids: tuple[int, int] = (0, 0)  # of the GPU instance and the compute instance
    failure: int | None = None


class _Nvml:
    """Cards as pynvml shows them."""

    NVMLError = _NVMLError
    NVML_ERROR_NO_PERMISSION = _NO_PERMISSION
    nvmlMemory_v2 = 2

    def __init__(self, cards: Sequence[_Card], *, driver: int = 580):
        self.cards, self.driver, self.closed = cards, driver, False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise _NVMLError(12)

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> _Card:
        if failure := self.cards[index].failure:
            raise _NVMLError(failure)
        return self.cards[index]

    def nvmlDeviceGetMigMode(self, card: _Card) -> list[int]:
        if card.slots is None:
            raise _NVMLError(_NOT_SUPPORTED)
        return [int(card.slots != ()), 1]  # and is on after the next reset

    def nvmlDeviceGetMaxMigDeviceCount(self, card: _Card) -> int:
        return len(card.slots or ())

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: _Card, slot: int) -> _Card:
        instance = (card.slots or ())[slot]
        if instance is None:
            raise _NVMLError(_NOT_FOUND)
        return instance

    def nvmlDeviceGetGpuInstanceId(self, instance: _Card) -> int:
        return instance.ids[0]

    def nvmlDeviceGetComputeInstanceId(self, instance: _Card) -> int:
        return instance.ids[1]

    def nvmlDeviceGetUUID(self, handle: _Card) -> str:
        return handle.uuid

    def nvmlDeviceGetName(self, handle: _Card) -> str:
        return handle.name

    def nvmlDeviceGetCudaComputeCapability(self, card: _Card) -> list[int]:
        assert card in self.cards, "an instance is not asked: not every driver answers"
        return list(card.capability)

    def nvmlDeviceGetMemoryInfo(self, handle: _Card, version: int | None = None) -> Any:
        if handle.free is None or (version is not None and self.driver < 510):
            raise _NVMLError(_NOT_SUPPORTED)
        known = {"total": handle.total * MIB, "free": handle.free * MIB}
        return SimpleNamespace(**known, **({} if version is None else {"reserved": 484 * MIB}))


def _install(
    monkeypatch: pytest.MonkeyPatch,
    *cards: _Card,
    visible: str | None = None,
    order: str | None = None,
    driver: int = 580,
) -> _Nvml:
    nvml = _Nvml(cards, driver=driver)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "CUDA_DEVICE_ORDER": order}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    return nvml


def _seen(monkeypatch: pytest.MonkeyPatch, *cards: _Card, **environment: str | None) -> list[str]:
    """The UUIDs of what CUDA's first device may be."""
    library = _install(monkeypatch, *cards, **environment)  # type: ignore[arg-type]
    return [device.handle.uuid for device in nvml.device_zero(library)]


A, B = _Card("GPU-aaaa-1"), _Card("GPU-bbbb-2", free=10000)
SLOW = _Card("GPU-cccc-3", "NVIDIA GeForce RTX 3060", (8, 6), 11000, 12288)


def test_installed_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = _install(monkeypatch, A, B)
    monkeypatch.setattr(devices, "host_capacity", lambda: 7 * GIB)
    hardware = installed_gpu()
    assert hardware is not None
    assert hardware.gpu is not None
    assert (hardware.gpu.name, hardware.gpu.compute_capability) == ("NVIDIA GeForce RTX 4090", (8, 9))
    assert (hardware.gpu.usable_bytes, hardware.capacity_bytes) == (24080 * MIB, 20000 * MIB)
    assert hardware.gpu.bf16_peak_flops == 165.2e12
    assert nvml.closed
    hardware = devices.this_machine("auto")
    assert (hardware.device, hardware.capacity_bytes) == ("cuda", 20000 * MIB)
    assert hardware.host_capacity_bytes == 7 * GIB
    assert "19.53 GiB free of 23.52 GiB" in hardware.description


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        (None, ["GPU-aaaa-1"]),
        ("1,0", ["GPU-bbbb-2"]),
        (" 1", ["GPU-bbbb-2"]),
        ("GPU-bbbb", ["GPU-bbbb-2"]),
        ("GPU-aaaa-1", ["GPU-aaaa-1"]),
        ("GPU-aaaa-1,GPU-bbbb-2", ["GPU-aaaa-1"]),
        ("0,7", ["GPU-aaaa-1"]),  # what comes before an index that is not there
        ("", []),
        ("-1", []),
        ("-1,0", []),
        ("7", []),
        ("0,0", []),
        ("GPU-", []),  # begins two cards
        ("GPU-zzzz", []),
        ("MIG-aaaa", []),
        ("all", []),
        ("none", []),
    ],
)
def test_visible_devices(monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[str]) -> None:
    assert _seen(monkeypatch, A, B, visible=visible) == seen
    assert (devices.this_machine("auto").device == "cuda") == bool(seen)


@pytest.mark.parametrize(
    ("visible", "order", "seen"),
    [
        (None, None, ["GPU-cccc-3", "GPU-aaaa-1"]),
        ("1", None, ["GPU-cccc-3", "GPU-aaaa-1"]),
        ("1", "FASTEST_FIRST", ["GPU-cccc-3", "GPU-aaaa-1"]),
        (None, "PCI_BUS_ID", ["GPU-cccc-3"]),
        ("1", "PCI_BUS_ID", ["GPU-aaaa-1"]),
        ("GPU-aaaa", None, ["GPU-aaaa-1"]),  # a UUID says which
    ],
)
def test_an_index_of_different_cards_is_sure_in_the_order_of_the_bus_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, order: str | None, seen: list[str]
) -> None:
    assert _seen(monkeypatch, SLOW, A, visible=visible, order=order) == seen
    hardware = devices.this_machine("cuda")
    if len(seen) == 2:
        assert hardware.capacity_bytes is hardware.gpu is None
        assert "RTX 3060 or NVIDIA GeForce RTX 4090, memory unknown: CUDA chooses" in hardware.description
    else:
        assert hardware.capacity_bytes == (20000 if seen == ["GPU-aaaa-1"] else 11000) * MIB


def _instance(uuid: str, size: int, free: int, ids: tuple[int, int] = (0, 0)) -> _Card:
    return _Card(uuid, "NVIDIA H100 80GB HBM3", (9, 0), free, size, ids=ids)


def _h100(*slots: _Card | None, uuid: str = "GPU-h100") -> _Card:
    return _Card(uuid, "NVIDIA H100 80GB HBM3", (9, 0), 80000, 81559, slots)


SMALL, LARGE = _instance("MIG-1111", 9984, 9000, (9, 0)), _instance("MIG-2222", 40448, 40000, (2, 0))
SMALL_TOO = _instance("MIG-3333", 9984, 9000, (9, 1))


@pytest.mark.parametrize(
    ("cards", "visible", "seen", "free"),
    [
        # One instance is there, and CUDA takes that.
        ([_h100(None, SMALL)], None, ["MIG-1111"], 9000),
        ([_h100(SMALL)], "0", ["MIG-1111"], 9000),
        ([_h100(SMALL)], "GPU-h100", ["MIG-1111"], 9000),
        ([_h100(SMALL)], "1", [], None),
        # Of several it takes one: their number stands where it is the same.
        ([_h100(SMALL, LARGE)], None, ["MIG-1111", "MIG-2222"], None),
        ([_h100(SMALL, LARGE)], "0", ["MIG-1111", "MIG-2222"], None),
        ([_h100(SMALL, SMALL_TOO)], "0", ["MIG-1111", "MIG-3333"], 9000),
        # Named.
        ([_h100(SMALL, LARGE)], "MIG-2222", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-2", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-2222,MIG-1111", ["MIG-2222"], 40000),
        ([_h100(SMALL, LARGE)], "MIG-GPU-h100/2/0", ["MIG-2222"], 40000),
        ([_h100(SMALL, SMALL_TOO)], "MIG-GPU-h100/9/1", ["MIG-3333"], 9000),
        ([_h100(SMALL, LARGE)], "MIG-GPU-h100/3/0", [], None),
        ([_h100(SMALL, LARGE)], "MIG-9", [], None),
        ([_h100(SMALL, LARGE)], "MIG-", [], None),  # begins two
        # Beside a whole card an instance comes first, unless the whole card is named.
        ([A, _h100(SMALL)], None, ["MIG-1111"], 9000),
        ([A, _h100(SMALL)], "0", ["GPU-aaaa-1", "MIG-1111"], None),
        ([_h100(SMALL), _h100(uuid="GPU-whole")], "1", ["MIG-1111", "GPU-whole"], None),
        ([A, _h100(SMALL)], "GPU-aaaa", ["GPU-aaaa-1"], 20000),
        ([A, _h100(SMALL)], "GPU-aaaa,MIG-1111", ["MIG-1111"], 9000),
        ([_h100(SMALL), _h100(LARGE, uuid="GPU-other")], "GPU-other", ["MIG-2222"], 40000),
        # In MIG mode without an instance CUDA sees nothing; not in MIG mode (yet), the card.
        ([_h100(None)], None, [], None),
        ([_h100(None)], "0", [], None),
        ([_h100()], None, ["GPU-h100"], 80000),
    ],
)
def test_mig_instances(
    monkeypatch: pytest.MonkeyPatch,
    cards: list[_Card],
    visible: str | None,
    seen: list[str],
    free: int | None,
) -> None:
    assert _seen(monkeypatch, *cards, visible=visible) == seen
    hardware = devices.this_machine("cuda")
    assert hardware.capacity_bytes == (None if free is None else free * MIB)
    if hardware.gpu is not None and seen[0].startswith("MIG"):
        assert hardware.gpu.bf16_peak_flops is None, "an instance does not reach the card's peak"


def test_cards_of_others_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job that was given one card of several: NVML may list those that it keeps from us."""
    other, lost = _Card("GPU-other", failure=_NO_PERMISSION), _Card("GPU-lost", failure=_LOST)
    assert _seen(monkeypatch, other, A, visible="0") == ["GPU-aaaa-1"]
    assert _seen(monkeypatch, other, A, visible="1") == []
    assert _seen(monkeypatch, A, lost, B, visible="GPU-bbbb") == ["GPU-bbbb-2"]
    assert list(nvml.installed_cards(_Nvml([other, lost, A]))) == [1, 2]


def test_drivers_that_know_little_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, _Card("GPU-gb10", "NVIDIA GB10", (12, 1), None))
    hardware = devices.this_machine("cuda")
    assert hardware.capacity_bytes is None
    assert "memory unknown to the driver" in hardware.description
    _install(monkeypatch, A, driver=470)
    hardware = devices.this_machine("cuda")
    assert hardware.gpu is not None
    assert (hardware.gpu.usable_bytes, hardware.capacity_bytes) == (24564 * MIB, 20000 * MIB)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, A, driver=0)
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
