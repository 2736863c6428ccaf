"""`albor doctor` on machines that are not here: an NVML, a /proc and a /sys of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from albor import cli
from albor.doctor import environment, gpus, kernels, machine, report, software, storage, trial
from albor.doctor.checks import NOT_REPORTED, Check, Section
from albor.doctor.report import Diagnosis, diagnose, render
from albor.doctor.software import Package, TorchBuild
from albor.doctor.trial import Trial
from albor.units import GIB, MIB

CUDA_13 = TorchBuild("2.13.0+cu130", (13, 0), None)


# The machine that is faked


class NVMLError(Exception):
    def __init__(self, value: int, text: str):
        super().__init__(text)
        self.value = value


class FakeNvml:
    """A pynvml. Cards are what functions answer; what is not there a card does not support, and says so."""

    NVMLError = NVMLError
    NVML_ERROR_NO_PERMISSION = 4
    nvmlMemory_v2 = 2

    def __init__(
        self,
        *cards: dict[str, Any],
        version: str = "580.95.05",
        cuda: int = 13000,
        names: dict[int, str] | None = None,
        failure: NVMLError | None = None,
    ):
        self.cards, self.version, self.cuda = cards, version, cuda
        self.names, self.failure, self.open = names or {}, failure, False

    def nvmlInit(self) -> None:
        if self.failure:
            raise self.failure
        self.open = True

    def nvmlShutdown(self) -> None:
        self.open = False

    def nvmlSystemGetDriverVersion(self) -> str:
        return self.version

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return self.cuda

    def nvmlSystemGetProcessName(self, pid: int) -> str:
        if pid not in self.names:
            raise NVMLError(6, "Not Found")
        return self.names[pid]

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        if "lost" in self.cards[index]:
            raise NVMLError(15, "GPU is lost")
        if "forbidden" in self.cards[index]:
            raise NVMLError(4, "Insufficient Permissions")
        return self.cards[index]

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: dict[str, Any], index: int) -> Any:
        try:
            return handle["instances"][index]
        except IndexError:
            raise NVMLError(6, "Not Found") from None

    def __getattr__(self, function: str) -> Any:
        if not function.startswith("nvmlDeviceGet"):
            raise AttributeError(function)

        def ask(handle: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
            assert self.open, f"{function} outside of nvmlInit and nvmlShutdown"
            key = (function.removeprefix("nvmlDeviceGet"), *arguments)
            if handle is None or key not in handle:
                raise NVMLError(3, "Not Supported")
            return handle[key]

        return ask


def process(pid: int, size: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=size)


def card(**changes: Any) -> dict[tuple[Any, ...], Any]:
    """An RTX 4090 at rest, with nothing on it."""
    answers: dict[str, Any] = {
        "Name": "NVIDIA GeForce RTX 4090",
        "UUID": "GPU-4090",
        "CudaComputeCapability": [8, 9],
        "PciInfo": SimpleNamespace(busId="00000000:01:00.0"),
        "MemoryInfo": memory(24564, 484, 0),
        "ComputeRunningProcesses": [],
        "GraphicsRunningProcesses": [],
        "UtilizationRates": SimpleNamespace(gpu=0, memory=0),
        "ComputeMode": 0,
        "PowerUsage": 21_900,
        "EnforcedPowerLimit": 450_000,
        "PowerManagementDefaultLimit": 450_000,
        "PowerManagementLimitConstraints": [150_000, 600_000],
        "CurrentClocksEventReasons": 0x1,
        "CurrPcieLinkGeneration": 1,
        "MaxPcieLinkGeneration": 4,
        "CurrPcieLinkWidth": 16,
        "MaxPcieLinkWidth": 16,
        "DisplayActive": 0,
        "PersistenceMode": 1,
    }
    answers |= changes
    keyed: dict[tuple[Any, ...], Any] = {
        ("ClockInfo", 1): 210,
        ("MaxClockInfo", 1): 3120,
        ("ClockInfo", 2): 405,
        ("MaxClockInfo", 2): 10501,
        ("Temperature", 0): 38,
        ("TemperatureThreshold", 1): 90,
    }
    return keyed | {(name,): answer for name, answer in answers.items()}


def memory(total: int, reserved: int, used: int) -> SimpleNamespace:
    """Of MiB, as the second version of the structure shows it."""
    free = (total - reserved - used) * MIB
    return SimpleNamespace(total=total * MIB, reserved=reserved * MIB, free=free, used=used * MIB)


HOST = {
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
    "proc/sys/kernel/osrelease": "6.8.0-79-generic\n",
    "proc/meminfo": (
        "MemTotal: 65536000 kB\nMemAvailable: 52428800 kB\nSwapTotal: 8388608 kB\nSwapFree: 8388608 kB\n"
    ),
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nmodel name\t: AMD Ryzen 9 7950X\nflags\t\t: avx2 avx512f avx512_bf16\n\n"
        for n in range(8)
    ),
    "proc/self/cgroup": "0::/user.slice\n",
    "proc/self/mounts": "/dev/nvme0n1p2 / ext4 rw 0 0\n",
    "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax locked memory  8388608  8388608  bytes\n",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A healthy desktop's /proc and /sys, and an environment and a kernel cache without anything in them."""
    for name in list(os.environ):
        if environment._SHOWN.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=500 * GIB))
    monkeypatch.setattr(software, "torch_build", lambda: CUDA_13)
    monkeypatch.setattr(trial, "attempt", lambda with_triton: Trial(None, 1.9, True, None))
    monkeypatch.setattr(kernels, "find_compiler", lambda: "/usr/bin/gcc")
    monkeypatch.setattr(kernels, "python_header", lambda: "/usr/include/python3.12/Python.h")
    monkeypatch.setattr(kernels, "ptxas", lambda: "/opt/ptxas")
    write(tmp_path / "root", HOST)
    return tmp_path / "root"


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def look(root: Path, monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml) -> Diagnosis:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    diagnosis = diagnose(root, root.parent)
    assert not nvml.open, "NVML is left open"
    assert json.loads(json.dumps(diagnosis.as_json())) == diagnosis.as_json()
    return diagnosis


def only(section: Section, name: str) -> Check:
    (check,) = [check for check in section.checks if check.name == name]
    return check


def troubles(diagnosis: Diagnosis) -> dict[str, str]:
    return {check.name: check.status for _, check in diagnosis.checks if check.status != "ok"}


def text_of(diagnosis: Diagnosis) -> str:
    out = StringIO()
    render(diagnosis, Console(file=out, width=200))
    return out.getvalue()


NO_LIBRARY = NVMLError(12, "NVML Shared Library Not Found")


# Machines


def test_a_healthy_machine_has_nothing_to_say(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    assert troubles(diagnosis) == {}
    assert (diagnosis.status, diagnosis.repairs, diagnosis.faster) == ("ok", [], [])
    facts = diagnosis.as_json()
    assert facts["driver"] | {"cuda": "13.0", "version": "580.95.05"} == facts["driver"]
    gpu = facts["gpus"][0]
    assert gpu["known_as"] == "RTX 4090"
    assert (gpu["memory_total_bytes"], gpu["memory_reserved_bytes"]) == (24564 * MIB, 484 * MIB)
    assert gpu["memory_free_bytes"] == 24080 * MIB
    assert (gpu["power_watts"], gpu["power_limit_watts"], gpu["power_max_watts"]) == (21.9, 450, 600)
    assert (gpu["clock_mhz"], gpu["memory_clock_max_mhz"], gpu["temperature_celsius"]) == (210, 10501, 38)
    assert (gpu["pcie_width"], gpu["pcie_width_max"], gpu["persistence"]) == (16, 16, True)
    assert (gpu["ecc"], gpu["mig"]) == (None, None), "a GeForce does not say"
    section = diagnosis.gpus[0]
    assert section.title == "GPU 0: NVIDIA GeForce RTX 4090"
    assert only(section, "memory").value == "23.52 GiB free of 23.52 GiB; reserved: 0.47 GiB"
    assert only(section, "held by").value == "no program"
    assert only(section, "PCIe").value == "16 of 16 lanes, generation 1 of 4 (rises under load)"
    assert only(section, "clocks").value == "210 of 3120 MHz, memory 405 of 10501 MHz\nidle"
    assert only(section, "ECC").value == only(section, "MIG").value == NOT_REPORTED
    assert "Nothing to mend" in text_of(diagnosis)


def test_no_gpu_is_no_problem(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    diagnosis = look(root, monkeypatch, FakeNvml(failure=NO_LIBRARY))
    assert troubles(diagnosis) == {}
    assert diagnosis.gpus == []
    assert "no NVIDIA card" in only(diagnosis.driver, "driver").value


BUS = {
    "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
    "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
    "sys/bus/pci/devices/0000:01:00.1/vendor": "0x10de\n",  # the card's audio
    "sys/bus/pci/devices/0000:01:00.1/class": "0x040300\n",
    "sys/bus/pci/devices/0000:02:00.0/vendor": "0x1002\n",
    "sys/bus/pci/devices/0000:02:00.0/class": "0x030000\n",
}


@pytest.mark.parametrize(
    ("failure", "files", "says"),
    [
        (NO_LIBRARY, BUS, "1 NVIDIA card is here.*install NVIDIA's driver"),
        (NO_LIBRARY, {**BUS, ".dockerenv": ""}, "docker run --gpus all"),
        (NVMLError(18, "RM has detected an NVML/RM version mismatch."), BUS, "restart the machine"),
        (NVMLError(999, "Unknown Error"), {}, "Unknown Error.*no GPU can be used"),
    ],
)
def test_a_card_without_a_driver_is_a_problem(
    root: Path, monkeypatch: pytest.MonkeyPatch, failure: NVMLError, files: dict[str, str], says: str
) -> None:
    write(root, files)
    diagnosis = look(root, monkeypatch, FakeNvml(failure=failure))
    assert diagnosis.status == "problem"
    check = only(diagnosis.driver, "driver")
    assert_says(f"{check.value} {check.message} {check.remedy} {check.command}", says)
    assert diagnosis.faster[0] == check


def assert_says(text: str, pattern: str) -> None:
    position = 0
    for part in pattern.split(".*"):
        assert part in text[position:], f"{part!r} is not in {text[position:]!r}"
        position = text.index(part, position) + len(part)


def test_a_binding_that_is_not_installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    check = only(diagnose(root, root.parent).driver, "driver")
    assert (check.status, check.command) == ("problem", "pip install nvidia-ml-py")


def test_a_cpu_build_of_torch_beside_a_card(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "torch_build", lambda: TorchBuild("2.13.0+cpu", None, None))
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    check = only(diagnosis.software, "torch")
    assert check.status == "problem"
    assert check.command.endswith("torch==2.13.0 --index-url https://pypi.org/simple")
    assert diagnosis.faster == [check]
    diagnosis = look(root, monkeypatch, FakeNvml(card(), version="550.90.07", cuda=12040))
    assert only(diagnosis.software, "torch").command.endswith("/whl/cu126"), "PyPI's needs a newer driver"


@pytest.mark.parametrize(
    ("cuda", "built_for", "status"),
    [
        (12040, (13, 0), "problem"),
        (12040, (12, 6), "ok"),  # the same major version
        (13000, (13, 2), "ok"),
        (13010, (12, 6), "ok"),
    ],
)
def test_an_old_driver(
    root: Path, monkeypatch: pytest.MonkeyPatch, cuda: int, built_for: tuple[int, int], status: str
) -> None:
    monkeypatch.setattr(software, "torch_build", lambda: TorchBuild("2.13.0", built_for, None))
    diagnosis = look(root, monkeypatch, FakeNvml(card(), version="550.90.07", cuda=cuda))
    check = only(diagnosis.driver, "driver")
    assert check.status == diagnosis.status == status
    assert check.value == f"550.90.07, made for CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    if status == "problem":
        assert "580" in check.remedy
        assert diagnosis.faster == [check]


@pytest.mark.parametrize(
    ("capability", "built_for", "says", "status"),
    [
        ([12, 0], (12, 6), "does not know this card", "problem"),
        ([12, 0], (12, 8), "", "ok"),
        ([7, 0], (13, 0), "does not know this card", "problem"),
        ([7, 5], (13, 0), "without bf16", "warning"),
        ([8, 0], (13, 0), "", "ok"),
    ],
)
def test_cards_that_torch_or_the_kernels_are_not_made_for(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: list[int],
    built_for: tuple[int, int],
    says: str,
    status: str,
) -> None:
    monkeypatch.setattr(software, "torch_build", lambda: TorchBuild("2.11.0", built_for, None))
    diagnosis = look(root, monkeypatch, FakeNvml(card(CudaComputeCapability=capability)))
    check = only(diagnosis.gpus[0], "capability")
    assert check.status == status
    assert says in check.message


def test_a_desktop_holds_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(
        card(
            MemoryInfo=memory(24564, 484, 1400),
            GraphicsRunningProcesses=[process(1200, 300 * MIB), process(3100, 900 * MIB)],
            ComputeRunningProcesses=[process(3100, 900 * MIB)],
            DisplayActive=1,
            PersistenceMode=0,
        ),
        names={1200: "/usr/lib/xorg/Xorg", 3100: "/opt/firefox/firefox --profile /home/me/secret"},
    )
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {"held by": "note"}, "a display keeps the driver loaded"
    check = only(diagnosis.gpus[0], "held by")
    assert check.value.splitlines() == [
        "0.88 GiB  firefox (pid 3100)",
        "0.29 GiB  Xorg (pid 1200)",
    ]
    assert "1.17 GiB" in check.message
    assert "secret" not in json.dumps(diagnosis.as_json())


def test_another_program_holds_and_uses_the_card(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(
        card(
            MemoryInfo=memory(24564, 484, 20480),
            ComputeRunningProcesses=[process(4711, 20480 * MIB)],
            UtilizationRates=SimpleNamespace(gpu=97, memory=40),
            ComputeMode=3,
        ),
        names={4711: "python"},
    )
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {"held by": "warning", "in use": "warning", "compute mode": "problem"}
    assert [check.name for check in diagnosis.faster] == ["in use", "held by"]
    assert diagnosis.faster[1].remedy.startswith("close python (pid 4711): with 20.00 GiB more")
    assert diagnosis.gpus[0].facts["held_bytes"] == 20480 * MIB


def test_a_crowd_of_small_programs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [process(pid, 50 * MIB) for pid in range(1, 21)]
    nvml = FakeNvml(card(MemoryInfo=memory(24564, 484, 1000), GraphicsRunningProcesses=crowd))
    check = only(look(root, monkeypatch, nvml).gpus[0], "held by")
    assert check.value.splitlines()[-1] == "0.73 GiB  15 more"
    assert check.remedy.startswith("close programs: with 0.98 GiB more")


@pytest.mark.parametrize("used", [80, 9000])
def test_programs_that_the_driver_hides(root: Path, monkeypatch: pytest.MonkeyPatch, used: int) -> None:
    """In a container NVML lists nothing, and the memory is gone all the same; a little of it is its own."""
    diagnosis = look(root, monkeypatch, FakeNvml(card(MemoryInfo=memory(24564, 484, used))))
    check = only(diagnosis.gpus[0], "held by")
    if used == 80:
        assert (check.status, check.value) == ("ok", "no program")
    else:
        assert (check.status, check.value) == (
            "warning",
            "8.79 GiB  programs that the driver does not show here",
        )
        assert "other users or containers" in check.remedy


def test_a_driver_that_does_not_say_how_much_each_holds(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under WSL."""
    write(root, {"proc/sys/kernel/osrelease": "6.6.87.2-microsoft-standard-WSL2\n"})
    nvml = FakeNvml(card(MemoryInfo=memory(24564, 484, 3000), ComputeRunningProcesses=[process(7, None)]))
    diagnosis = look(root, monkeypatch, nvml)
    assert only(diagnosis.gpus[0], "held by").value == f"{NOT_REPORTED}  name hidden (pid 7)"
    assert diagnosis.gpus[0].facts["hidden_bytes"] is None
    assert "pinned" in only(diagnosis.machine, "system").message


def h100(**changes: Any) -> dict[tuple[Any, ...], Any]:
    return card(
        Name="NVIDIA H100 80GB HBM3",
        UUID="GPU-h100",
        CudaComputeCapability=[9, 0],
        MemoryInfo=memory(81559, 551, 0),
        EnforcedPowerLimit=700_000,
        PowerManagementDefaultLimit=700_000,
        PowerManagementLimitConstraints=[200_000, 700_000],
        EccMode=[1, 1],
        MigMode=[0, 0],
        **changes,
    )


def slice_of_h100(uuid: str, used: int = 0, **changes: Any) -> dict[tuple[Any, ...], Any]:
    answers: dict[str, Any] = {
        "Name": "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "UUID": uuid,
        "MemoryInfo": memory(9728, 0, used),
    }
    return {(name,): answer for name, answer in (answers | changes).items()}


def sliced(*instances: dict[tuple[Any, ...], Any]) -> dict[Any, Any]:
    """An H100 in MIG mode; what is in use of it does not matter to a run on an instance."""
    busy = {("MemoryInfo",): memory(81559, 551, 40000), ("UtilizationRates",): SimpleNamespace(gpu=99)}
    mode = {("MigMode",): [1, 1], ("MaxMigDeviceCount",): 7, "instances": list(instances)}
    return {**h100(), **busy, **mode}


def test_an_h100_in_slices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = look(root, monkeypatch, FakeNvml(sliced(slice_of_h100("MIG-1"))))
    assert troubles(diagnosis) == {"MIG": "note"}
    check = only(diagnosis.gpus[0], "MIG")
    assert check.value.splitlines() == [
        "on",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb: 9.50 GiB free of 9.50 GiB; a run gets this one",
        "  MIG-1",
    ]
    assert only(diagnosis.gpus[0], "peak").value.endswith("of the whole card")
    (fact,) = diagnosis.as_json()["gpus"][0]["mig_instances"]
    assert (fact["uuid"], fact["chosen"], fact["memory_free_bytes"]) == ("MIG-1", True, 9728 * MIB)
    diagnosis = look(root, monkeypatch, FakeNvml(sliced()))
    assert troubles(diagnosis) == {"MIG": "problem"}
    diagnosis = look(root, monkeypatch, FakeNvml(h100()))
    assert troubles(diagnosis) == {}
    assert only(diagnosis.gpus[0], "MIG").value == "off"
    assert only(diagnosis.gpus[0], "ECC").value == "on"


def test_several_slices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = slice_of_h100("MIG-1", used=4096, ComputeRunningProcesses=[process(7, 4096 * MIB)])
    nvml = FakeNvml(sliced(taken, slice_of_h100("MIG-2")), names={7: "python"})
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {"MIG": "warning"}, "which one CUDA takes cannot be told"
    assert only(diagnosis.gpus[0], "MIG").command == "export CUDA_VISIBLE_DEVICES=MIG-2"
    assert diagnosis.gpus[0].facts["chosen"] is True
    assert [fact["chosen"] for fact in diagnosis.gpus[0].facts["mig_instances"]] == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {"MIG": "note", "MIG held by": "warning"}
    assert only(diagnosis.gpus[0], "MIG held by").value == "4.00 GiB  python (pid 7)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    assert troubles(look(root, monkeypatch, nvml)) == {"MIG": "note"}


@pytest.mark.parametrize(
    ("other", "command"),
    [
        (card(), "export CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (sliced(slice_of_h100("MIG-1")) | {("UUID",): "GPU-2"}, "export CUDA_VISIBLE_DEVICES=GPU-h100"),
    ],
)
def test_different_cards_of_which_cuda_takes_one(
    root: Path, monkeypatch: pytest.MonkeyPatch, other: dict[Any, Any], command: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    nvml = FakeNvml(h100(), other)
    diagnosis = look(root, monkeypatch, nvml)
    assert (only(diagnosis.driver, "cards").status, only(diagnosis.driver, "cards").command) == (
        "warning",
        command,
    )
    assert [section.facts["chosen"] for section in diagnosis.gpus] == [None, None]
    assert diagnosis.gpus[0].title == "GPU 0: NVIDIA H100 80GB HBM3 (runs may use this one)"
    assert diagnosis.kernels.facts["warm"] is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-h100")
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {}
    assert [section.facts["chosen"] for section in diagnosis.gpus] == [True, False]


def test_a_slice_beside_a_whole_card(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free of the sliced card says nothing of the slice, and is not compared with other cards."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    diagnosis = look(
        root, monkeypatch, FakeNvml(h100(), sliced(slice_of_h100("MIG-1")) | {("UUID",): "GPU-2"})
    )
    assert troubles(diagnosis) == {"MIG": "note"}
    assert [section.facts["chosen"] for section in diagnosis.gpus] == [False, True]


def test_cards_of_other_jobs_are_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = look(root, monkeypatch, FakeNvml({"forbidden": True}, card()))
    assert troubles(diagnosis) == {}
    assert [section.facts["index"] for section in diagnosis.gpus] == [1]


@pytest.mark.parametrize(
    ("bits", "says", "status"),
    [
        (0x0, "", "ok"),
        (0x4, "", "ok"),  # a full load is at the power limit
        (0x20 | 0x4, "cool the card", "warning"),
        (0x40 | 0x8, "cool the card", "warning"),
        (0x80 | 0x8, "power supply", "warning"),
        (0x8, "cooling and power", "warning"),
        (0x2, "reset the application clocks", "note"),
    ],
)
@pytest.mark.parametrize("function", ["CurrentClocksEventReasons", "CurrentClocksThrottleReasons"])
def test_a_card_that_is_held_down(
    root: Path, monkeypatch: pytest.MonkeyPatch, bits: int, says: str, status: str, function: str
) -> None:
    held = card()
    del held["CurrentClocksEventReasons",]
    diagnosis = look(root, monkeypatch, FakeNvml(held | {(function,): bits}))
    check = only(diagnosis.gpus[0], "clocks")
    assert check.status == diagnosis.status == status
    assert says in check.remedy
    assert diagnosis.gpus[0].facts["clock_reasons"] == bits


def test_a_low_power_limit(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = look(root, monkeypatch, FakeNvml(card(EnforcedPowerLimit=300_000)))
    (check,) = diagnosis.faster
    assert check.remedy.startswith("raise the power limit from 300 W to 450 W")
    assert check.command == "sudo nvidia-smi -i 0 -pl 450"
    assert check.message == "67% of the default"


@pytest.mark.parametrize(
    ("width", "nvml_most", "kernel", "status"),
    [
        (16, 16, "16", "ok"),
        (8, 16, None, "note"),
        (4, 16, None, "warning"),
        (4, 4, "16", "warning"),  # NVML's maximum is that of the slot
        (8, 8, "8", "ok"),  # a card of eight lanes
        (16, 16, "255", "ok"),  # the kernel does not know
    ],
)
def test_lanes(
    root: Path, monkeypatch: pytest.MonkeyPatch, width: int, nvml_most: int, kernel: str | None, status: str
) -> None:
    if kernel is not None:
        write(root, {"sys/bus/pci/devices/0000:01:00.0/max_link_width": f"{kernel}\n"})
    nvml = FakeNvml(card(CurrPcieLinkWidth=width, MaxPcieLinkWidth=nvml_most))
    diagnosis = look(root, monkeypatch, nvml)
    check = only(diagnosis.gpus[0], "PCIe")
    assert check.status == status
    assert ("accumulator=gpu" in check.remedy) == (status != "ok")
    if status == "warning":
        assert "4 times as long" in check.message


def test_no_persistence_prohibited_and_failing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = card(PersistenceMode=0, ComputeMode=2) | {("TotalEccErrors", 1, 0): 3}
    diagnosis = look(root, monkeypatch, FakeNvml(failing))
    assert troubles(diagnosis) == {"persistence": "note", "compute mode": "problem", "ECC": "warning"}
    assert [check.name for check in diagnosis.faster] == ["compute mode", "persistence"]
    assert [check.name for check in diagnosis.repairs] == ["ECC"]


def test_a_card_that_answers_nothing_but_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question may be refused, and none of them ends the report."""
    diagnosis = look(root, monkeypatch, FakeNvml({("Name",): "NVIDIA GB10"}))
    section = diagnosis.gpus[0]
    assert only(section, "peak").status == "note"
    silent = [check for check in section.checks if check.name != "peak"]
    assert len(silent) >= 12
    assert {check.value for check in silent} == {NOT_REPORTED}
    assert diagnosis.gpus[0].facts["chosen"], "it is the only one"


def test_a_lost_card_beside_a_good_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    diagnosis = look(root, monkeypatch, FakeNvml({"lost": True}, card()))
    assert [section.title for section in diagnosis.gpus] == [
        f"GPU 0: {NOT_REPORTED}",
        "GPU 1: NVIDIA GeForce RTX 4090 (runs use this one)",
    ]
    assert troubles(diagnosis) == {"state": "problem"}


def test_the_freer_of_two_cards(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others run matters on the card that a run gets, and there only."""
    used = card(
        MemoryInfo=memory(24564, 484, 8000),
        ComputeRunningProcesses=[process(5, 8000 * MIB)],
        UtilizationRates=SimpleNamespace(gpu=100, memory=0),
    )
    nvml = FakeNvml(used, card(UUID="GPU-free"), names={5: "python"})
    diagnosis = look(root, monkeypatch, nvml)
    assert troubles(diagnosis) == {"cards": "note", "held by": "warning", "in use": "warning"}
    assert [check.name for check in diagnosis.faster] == ["in use", "held by", "cards"]
    assert diagnosis.faster[0].remedy.startswith("GPU 0: end python (pid 5)")
    assert diagnosis.faster[2].command == "export CUDA_VISIBLE_DEVICES=GPU-free"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-free")
    assert troubles(look(root, monkeypatch, nvml)) == {}


def test_an_empty_list_of_visible_devices(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    assert troubles(diagnosis) == {"cards": "problem"}
    assert "CUDA_VISIBLE_DEVICES" in only(diagnosis.driver, "cards").message
    assert only(diagnosis.environment, "CUDA_VISIBLE_DEVICES").value == "(empty)"


def test_a_driver_before_510_knows_no_reserved_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(card(MemoryInfo=SimpleNamespace(total=24564 * MIB, free=24000 * MIB, used=564 * MIB)))
    plain = nvml.__getattr__("nvmlDeviceGetMemoryInfo")

    def first_version_only(handle: Any, version: int | None = None) -> Any:
        if version is not None:
            raise NVMLError(13, "Function Not Found")
        return plain(handle)

    monkeypatch.setattr(nvml, "nvmlDeviceGetMemoryInfo", first_version_only, raising=False)
    diagnosis = look(root, monkeypatch, nvml)
    facts = diagnosis.gpus[0].facts
    assert (facts["memory_free_bytes"], facts["memory_reserved_bytes"]) == (24000 * MIB, None)


# Host


IN_BOX, IN_BOX_1 = {"proc/self/cgroup": "0::/box\n"}, {"proc/self/cgroup": "4:cpu,cpuacct:/box\n"}


def quota(which: str, value: str) -> dict[str, str]:
    """Of the control group version 1."""
    return {f"sys/fs/cgroup/cpu/box/cpu.cfs_{which}_us": f"{value}\n"}


def scaling(**values: str) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu0/cpufreq/{name}": f"{value}\n" for name, value in values.items()}


@pytest.mark.parametrize(
    ("files", "name", "says", "status"),
    [
        ({**IN_BOX, "sys/fs/cgroup/box/cpu.max": "200000 100000\n"}, "cores", "start 2 threads", "warning"),
        ({**IN_BOX, "sys/fs/cgroup/cpu.max": "300000 100000\n"}, "cores", "start 3 threads", "warning"),
        ({**IN_BOX, "sys/fs/cgroup/box/cpu.max": "max 100000\n"}, "cores", "", "ok"),
        (
            {**IN_BOX_1, **quota("quota", "50000"), **quota("period", "100000")},
            "cores",
            "start 1 ",
            "warning",
        ),
        ({**IN_BOX_1, **quota("quota", "-1"), **quota("period", "100000")}, "cores", "", "ok"),
        (scaling(scaling_governor="powersave"), "governor", "clock up", "note"),
        (scaling(scaling_governor="schedutil"), "governor", "", "ok"),
        (scaling(scaling_governor="powersave", scaling_driver="intel_pstate"), "governor", "", "ok"),
        (
            scaling(
                scaling_governor="powersave",
                scaling_driver="amd-pstate-epp",
                energy_performance_preference="power",
            ),
            "governor",
            "clock up",
            "note",
        ),
        (
            {"proc/meminfo": "MemTotal: 65536000 kB\nMemAvailable: 1048576 kB\n"},
            "memory",
            "close programs",
            "warning",
        ),
        (
            {"proc/meminfo": HOST["proc/meminfo"].replace("SwapFree: 8388608", "SwapFree: 2388608")},
            "swap",
            "swapped out",
            "note",
        ),
    ],
)
def test_the_host(
    root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], name: str, says: str, status: str
) -> None:
    write(root, files)
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    check = only(diagnosis.machine, name)
    assert (check.status, diagnosis.status) == (status, status)
    assert says in check.remedy


def test_facts_of_the_host(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root, {"proc/1/cgroup": "0::/kubepods/burstable/pod1\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    facts = diagnosis.machine.facts
    assert (facts["name"], facts["kernel"], facts["wsl"]) == ("Ubuntu 24.04.3 LTS", "6.8.0-79-generic", False)
    assert facts["container"] == "kubepods"
    assert (facts["cpu"], facts["cpu_bf16"]) == ("AMD Ryzen 9 7950X", True)
    assert (facts["cores_logical"], facts["cores_allowed"], facts["cores_usable"]) == (8, 3, 3)
    assert (facts["memory_available_bytes"], facts["swap_total_bytes"]) == (50 * GIB, 8 * GIB)
    assert facts["locked_memory_limit_bytes"] == 8 * MIB
    assert only(diagnosis.machine, "cores").status == "note", "few for the host's accumulator"


def test_a_system_without_proc(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnosis = look(tmp_path / "nothing", monkeypatch, FakeNvml(failure=NO_LIBRARY))
    assert diagnosis.status in ("ok", "note")
    assert only(diagnosis.machine, "memory").value == "not shown by this system"


@pytest.mark.parametrize(
    ("kind", "free", "container", "says", "status"),
    [
        ("ext4", 500 * GIB, False, "", "ok"),
        ("nfs4", 500 * GIB, False, "local disk", "note"),
        ("9p", 500 * GIB, False, "local disk", "note"),
        ("tmpfs", 500 * GIB, False, "to a disk", "warning"),
        ("overlay", 500 * GIB, True, "mount a volume", "note"),
        ("overlay", 500 * GIB, False, "", "ok"),
        ("ext4", GIB, False, "free some space", "warning"),
        ("ext4", 10 * GIB, False, "", "note"),
    ],
)
def test_storage(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: str, free: int, container: bool, says: str, status: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    mount = str(root.parent).replace(" ", r"\040")
    write(
        root,
        {"proc/self/mounts": f"/dev/sda / xfs rw 0 0\nx {mount} {kind} rw 0 0\nx /else zfs rw 0 0\n"},
    )
    section = storage.examine(root.parent, container, root)
    (check,) = section.checks
    assert check.status == status
    assert says in check.remedy
    fact = section.facts["this folder"]
    assert (fact["file_system"], fact["free_bytes"], fact["writable"]) == (kind, free, True)


def test_a_folder_that_was_removed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def removed() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "cwd", removed)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(card()))
    diagnosis = diagnose(root)
    assert troubles(diagnosis) == {"this folder": "warning"}
    assert "was removed" in text_of(diagnosis)


def test_a_mount_point_with_a_space(tmp_path: Path) -> None:
    write(tmp_path, {"root/proc/self/mounts": rf"/dev/sda {tmp_path}/my\040disk btrfs rw 0 0" + "\n"})
    assert storage.file_system(tmp_path / "my disk" / "runs", tmp_path / "root") == "btrfs"
    assert storage.file_system(tmp_path / "other", tmp_path / "root") is None


# Kernels


def test_the_cache_of_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = kernels.kernel_names()
    assert names, "albor has kernels"
    mine = sorted(names)[0]
    cache = tmp_path / "cache"
    for entry, name, arch in [("A", mine, 89), ("B", mine, 89), ("C", mine, 90), ("D", "somebody_elses", 89)]:
        target = {"target": {"backend": "cuda", "arch": arch, "warp_size": 32}}
        write(cache / entry, {f"{name}.cubin": "x" * 100, f"{name}.json": json.dumps(target)})
    write(cache / "E", {f"{mine}.cubin": "x", f"{mine}.json": "{"})  # is being written
    entries, size, by_architecture = kernels.scan(cache, names)
    assert (entries, dict(by_architecture)) == (5, {89: 1, 90: 1})
    assert size == sum(path.stat().st_size for path in cache.rglob("*.*"))
    assert kernels.scan(tmp_path / "nothing", names) == (0, 0, {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    said = {
        (8, 9): "warm: 1 of albor's kernels for sm_89",
        (12, 0): "cold: none of albor's kernels for sm_120",
        None: "albor's kernels for sm_89 (1), sm_90 (1)",
    }
    for capability, state in said.items():
        section = kernels.examine(True, capability)
        assert only(section, "cache").value.startswith(state)
        assert "5 entries" in only(section, "cache").value
        assert section.facts["warm"] == (None if capability is None else capability == (8, 9))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert kernels.cache_folder() == Path("/home/me/.triton/cache")
    monkeypatch.setenv("TRITON_HOME", "/scratch")
    assert kernels.cache_folder() == Path("/scratch/.triton/cache")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/kernels")
    assert kernels.cache_folder() == Path("/tmp/kernels")


def test_what_triton_needs_at_its_first_launch(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("find_compiler", "python_header", "ptxas"):
        monkeypatch.setattr(kernels, tool, lambda: None)
    monkeypatch.setattr(os, "access", lambda path, mode: "cache" not in str(path) and path != root.parent)
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    assert troubles(diagnosis) == {
        "cache folder": "problem",
        "C compiler": "problem",
        "Python.h": "problem",
        "ptxas": "problem",
        "this folder": "warning",
    }
    assert [check.name for check in diagnosis.repairs][-1] == "this folder", "the worst come first"


def test_the_compiler_is_the_one_that_triton_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def add(name: str) -> str:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    assert kernels.find_compiler() is None
    add("cc")
    assert kernels.find_compiler() is None, "Triton does not look for cc"
    clang = add("clang")
    assert kernels.find_compiler() == clang
    gcc = add("gcc")
    assert kernels.find_compiler() == gcc
    monkeypatch.setenv("CC", "clang")
    assert kernels.find_compiler() == clang
    monkeypatch.setenv("CC", "icx")
    assert kernels.find_compiler() is None


# Environment


@pytest.mark.parametrize(
    ("name", "value", "gpu", "status"),
    [
        ("CUDA_LAUNCH_BLOCKING", "1", True, "problem"),
        ("CUDA_LAUNCH_BLOCKING", "0", True, "ok"),
        ("CUDA_LAUNCH_BLOCKING", "1", False, "ok"),
        ("TRITON_INTERPRET", "1", True, "problem"),
        ("TRITON_ALWAYS_COMPILE", "true", True, "warning"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", True, "ok"),
        ("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync", True, "note"),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8", True, "ok"),
        ("CUBLAS_WORKSPACE_CONFIG", ":16:8", True, "note"),
        ("NVIDIA_TF32_OVERRIDE", "0", True, "note"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "1", True, "warning"),
        ("CUDA_DEVICE_MAX_CONNECTIONS", "8", True, "ok"),
        ("OMP_NUM_THREADS", "2", True, "note"),
        ("OMP_NUM_THREADS", "8", True, "ok"),
        ("TORCH_LOGS", "dynamo", False, "note"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so", True, "ok"),
    ],
)
def test_variables(name: str, value: str, gpu: bool, status: str) -> None:
    (check,) = environment.examine({name: value, "HOME": "/home/me"}, 8, gpu).checks
    assert (check.name, check.value, check.status) == (name, value, status)


def test_every_rule_can_be_met_and_no_secret_is_shown() -> None:
    met = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_MODULE_LOADING": "EAGER"}
    met |= dict.fromkeys(("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "backend:cudaMallocAsync")
    for name in environment.RULES:
        (check,) = environment.examine({name: met.get(name, "1")}, 8, True).checks
        assert check.status != "ok", name
    secrets = {"HF_TOKEN": "hf_1", "WANDB_API_KEY": "k", "TORCH_SECRET": "s", "TRITON_REDIS_PASSWORD": "p"}
    section = environment.examine(secrets, 8, True)
    assert section.facts == {}
    assert [check.value for check in section.checks] == ["none that matter"]


# Software


def test_torch_is_read_and_not_imported() -> None:
    build = software.torch_build()
    assert build is not None
    assert (build.version, build.cuda) == (torch.__version__, software.parse_cuda(torch.version.cuda))
    program = (
        "import sys; from albor.doctor import trial\n"
        "trial.attempt = lambda with_triton: trial.Trial('', None, None, None)\n"
        "from albor.doctor.report import diagnose; diagnose()\n"
        "assert not {'torch', 'triton', 'numpy'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "__version__ = '2.12.1+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
            ((13, 0), None),
        ),
        ("__version__ = '2.12.1'\ncuda = '12.6'\nhip = None\n", ((12, 6), None)),
        (
            "__version__ = '2.12.1+rocm7.1'\ncuda: Optional[str] = None\nhip: Optional[str] = '7.1'\n",
            (None, "7.1"),
        ),
    ],
)
def test_builds_of_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: tuple[Any, Any]
) -> None:
    write(tmp_path, {"torch/version.py": text, "torch/__init__.py": "raise RuntimeError('imported')\n"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    build = software.torch_build()
    assert build is not None
    assert build.version.startswith("2.12.1")
    assert (build.cuda, build.hip) == expected


@pytest.mark.parametrize("files", [{"torch/version.py": "("}, {"torch/other.py": ""}])
def test_a_folder_that_hides_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> None:
    write(tmp_path, {**files, "torch/__init__.py": ""})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch")
    assert software.torch_build() is None
    check = only(software.examine(None, False, software.PYPI), "torch")
    assert check.status == "problem"
    assert str(tmp_path / "torch") in check.message
    monkeypatch.setattr(software, "torch_folder", lambda: None)
    check = only(software.examine(None, False, software.PYPI), "torch")
    assert (check.value, check.status) == ("not installed", "problem")


def distributions(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], **requires: list[str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: requires.get(name, []))
    monkeypatch.setattr(software, "_extra_names", lambda _: ["dev", "hf"])


NEEDS = [
    "torch<2.14,>=2.11",
    "numpy<3,>=2.1",
    'triton<3.8,>=3.6; platform_system == "Linux"',
    'winthing; platform_system == "Windows"',
    'transformers<6,>=5.0; extra == "hf"',
    'albor[hf]; extra == "dev"',
    'pytest>=8; extra == "dev"',
]
GOOD = {"torch": "2.13.0+cu130", "numpy": "2.4.6", "triton": "3.7.1", "albor": "0.1.0"}


def test_what_a_package_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    distributions(monkeypatch, GOOD | {"pytest": "9.0"}, albor=NEEDS)
    assert [(need.name, need.fits) for need in software.required("albor")] == [
        ("torch", True),
        ("numpy", True),
        ("triton", True),
    ]
    assert list(software.required("albor", "dev")) == [
        Package("transformers", None, "<6,>=5.0", False),
        Package("pytest", "9.0", ">=8", True),
    ]


@pytest.mark.parametrize(
    ("versions", "by_torch", "name", "says", "status"),
    [
        (GOOD, ["triton==3.7.1"], "triton", "", "ok"),
        (GOOD, ["triton==3.6.0"], "triton", "torch asks for ==3.6.0", "problem"),
        (GOOD | {"triton": "3.5.0"}, [], "triton", "albor asks for <3.8,>=3.6", "problem"),
        ({k: v for k, v in GOOD.items() if k != "triton"}, [], "triton", "albor asks for", "problem"),
        (GOOD | {"numpy": "1.26.4"}, [], "packages", "albor asks for numpy <3,>=2.1", "problem"),
        (GOOD | {"torch": "2.14.0"}, [], "packages", "albor asks for torch <2.14,>=2.11", "problem"),
        (GOOD, [], "extras", "", "ok"),
        (GOOD | {"transformers": "4.57.0"}, [], "extras", "transformers <6,>=5.0, not 4.57.0", "note"),
    ],
)
def test_versions(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    by_torch: list[str],
    name: str,
    says: str,
    status: str,
) -> None:
    distributions(monkeypatch, versions, albor=NEEDS, torch=by_torch)
    monkeypatch.setattr(sys, "platform", "linux")
    check = only(software.examine(CUDA_13, True, software.PYPI), name)
    assert check.status == status
    assert says in check.message


def test_versions_cannot_be_compared_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    check = only(software.examine(CUDA_13, True, software.PYPI), "packages")
    assert (check.status, check.command) == ("warning", "pip install packaging")


def test_the_commit_is_that_of_the_checkout_only(tmp_path: Path) -> None:
    """Not that of a checkout which a virtual environment happens to lie in."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    revision = software.commit(tmp_path)
    assert revision is not None
    assert len(revision) == 12
    (tmp_path / "site-packages").mkdir()
    assert software.commit(tmp_path / "site-packages") is None


# The start


FAKE_TORCH = """
import warnings
print("a library says hello")
class cuda:
    @staticmethod
    def is_available():
        warnings.warn("Error 802: system not yet initialized")
        return False
"""


@pytest.mark.parametrize(
    ("torch_file", "triton_file", "with_triton", "error"),
    [
        (FAKE_TORCH, "", True, None),
        (FAKE_TORCH, "raise ImportError('libcuda')", True, "ImportError: libcuda"),
        (FAKE_TORCH, "raise ImportError('libcuda')", False, None),  # not asked for on this system
        ("raise ImportError('libcudnn.so.9')", "", True, "ImportError: libcudnn.so.9"),
        ("import os; os.abort()", "", True, "Python was ended by signal 6"),
        ("import os; os._exit(3)", "", True, "exit code 3"),
        ("import time; time.sleep(60)", "", True, "not loaded within 0.5 s"),
    ],
)
def test_torch_is_tried_in_a_process_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_file: str,
    triton_file: str,
    with_triton: bool,
    error: str | None,
) -> None:
    write(tmp_path, {"torch/__init__.py": torch_file, "triton/__init__.py": triton_file})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tried = trial.attempt(with_triton, 0.5 if "sleep" in torch_file else 60)
    assert tried.error == error
    if error is None:
        assert (tried.cuda, tried.cuda_reason) == (False, "Error 802: system not yet initialized")
    section = trial.examine(tried, gpu_expected=False)
    assert [check.status for check in section.checks] == (["ok", "ok"] if error is None else ["problem"])


@pytest.mark.parametrize(
    ("changes", "variables", "build", "status"),
    [
        ({}, {}, CUDA_13, "problem"),  # nothing else says why
        ({"ComputeMode": 2}, {}, CUDA_13, "ok"),  # which is a problem itself
        ({}, {"CUDA_VISIBLE_DEVICES": ""}, CUDA_13, "ok"),
        ({}, {}, TorchBuild("2.13.0+cpu", None, None), "ok"),
    ],
)
def test_cuda_that_does_not_start(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    variables: dict[str, str],
    build: TorchBuild,
    status: str,
) -> None:
    monkeypatch.setattr(trial, "attempt", lambda with_triton: Trial(None, 2.0, False, "Error 802"))
    monkeypatch.setattr(software, "torch_build", lambda: build)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    diagnosis = look(root, monkeypatch, FakeNvml(card(**changes)))
    check = only(diagnosis.start, "CUDA")
    assert (check.value, check.status) == ("Error 802", status)
    assert (check in diagnosis.faster) == (status == "problem")


def test_without_torch_nothing_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "torch_build", lambda: None)
    monkeypatch.setattr(trial, "attempt", None)
    diagnosis = look(root, monkeypatch, FakeNvml(card()))
    assert only(diagnosis.start, "import").value == "not tried: there is no torch"
    assert diagnosis.start.facts == {}


# The report


def test_the_report_in_80_columns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml(
        card(
            MemoryInfo=memory(24564, 484, 20480),
            ComputeRunningProcesses=[process(4711, 20480 * MIB)],
            EnforcedPowerLimit=300_000,
        ),
        names={4711: "[bold]python"},  # names are not markup
    )
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    diagnosis = look(root, monkeypatch, nvml)
    text = text_of(diagnosis)
    long = [line for line in text.splitlines() if len(line) > 80 and "/" not in line]
    assert long == []
    assert "\x1b" not in text
    assert "20.00 GiB  [bold]python (pid 4711)" in text
    assert "problem: the host waits for every kernel" in text
    faster = text.partition("What would make this machine faster")[2]
    assert_says(
        faster, "1. Unset CUDA_LAUNCH_BLOCKING.*2. Close [bold]python.*3. Raise the power limit.*-pl 450"
    )
    values = {line[:2] for line in text.splitlines() if line.startswith("  ")}
    assert values == {"  "}, "sections are indented alike"


@pytest.mark.parametrize(("blocking", "code"), [("0", 0), ("1", 1)])
def test_the_command(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], blocking: str, code: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(card()))
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", blocking)
    monkeypatch.setattr(report, "diagnose", lambda: diagnose(root, root.parent))
    for arguments in (["doctor"], ["doctor", "--json"]):
        monkeypatch.setattr(sys, "argv", ["albor", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        out = capsys.readouterr().out
        if "--json" in arguments:
            value = json.loads(out)
            assert value["status"] == ("problem" if code else "ok")
            assert value["gpus"][0]["uuid"] == "GPU-4090"
            assert {check["section"] for check in value["checks"]} >= {"Software", "Machine", "Storage"}
            assert [entry["gain"] for entry in value["faster"]] == ["large"] * code
        else:
            assert "GPU 0: NVIDIA GeForce RTX 4090" in out


def test_the_page_explains_every_line_and_key(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/doctor.md has a row for each."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    diagnosis = look(root, monkeypatch, FakeNvml({"lost": True}, sliced(slice_of_h100("MIG-1"))))
    page = (Path(__file__).parents[1] / "docs/doctor.md").read_text(encoding="utf-8")
    names = {check.name for section, check in diagnosis.checks if section.title != "Environment"}
    assert len(names) > 35
    assert {name for name in names if f"`{name}`" not in page} == set()
    assert {key for key in diagnosis.as_json() if f"| `{key}` |" not in page} == set()
    headings = {section.title.partition(" 0")[0].partition(" 1")[0] for section, _ in diagnosis.checks}
    assert {title for title in headings if f"## {title}\n" not in page} == set()


def test_what_this_machine_says() -> None:
    """The real one, whatever it is: every section is there, and every fact can be written as JSON."""
    diagnosis = diagnose()
    json.dumps(diagnosis.as_json())
    assert machine.read_cores().usable >= 1
    assert diagnosis.start.facts["error"] is None
    assert diagnosis.start.facts["cuda"] == torch.cuda.is_available()
    assert only(diagnosis.software, "torch").value.startswith(metadata.version("torch").partition("+")[0])
    driver, cards = gpus.read_machine()
    assert len(diagnosis.gpus) == len(cards)
    assert (driver.failure is None) or not cards
