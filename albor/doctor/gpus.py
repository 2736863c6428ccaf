"""The NVIDIA driver and cards of this machine, asked through NVML: no CUDA context, and nothing is changed.

Cards, drivers and containers differ in what they answer. A question without an answer is None here, and
"not reported by the driver" in the report.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from albor.doctor.checks import read
from albor.doctor.software import CudaVersion
from albor.memory.cards import Process, matching_gpus
from albor.memory.nvml import (
    CudaDevice,
    device_zero,
    installed_cards,
    mig_instances,
    read_holdings,
    read_memory,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Driver:
    """The driver, or why there is none."""

    version: str | None
    cuda: CudaVersion | None  # the newest that it was made for
    failure: str | None  # why NVML does not answer
    failure_code: int | None
    cards_on_bus: list[str]  # PCI addresses of NVIDIA's display and 3D controllers, driver or not


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a run can get: a card, or a slice of one. None: the driver does not say."""

    chosen: bool | None  # a run that starts now gets it; None: it may, as CUDA chooses
    name: str | None
    uuid: str | None
    memory_total_bytes: int | None
    memory_reserved_bytes: int | None  # by the driver
    memory_free_bytes: int | None
    processes: list[Process] | None
    hidden_bytes: int | None  # in use by none of `processes`

    @property
    def held_bytes(self) -> int:
        """What other programs hold, as far as it is known."""
        seen = sum(process.memory_bytes or 0 for process in self.processes or [])
        return seen + (self.hidden_bytes or 0)


@dataclass(frozen=True, kw_only=True)
class MigInstance(Part):
    """A slice of a card in MIG mode."""


@dataclass(frozen=True, kw_only=True)
class GpuFacts(Part):
    """One card."""

    index: int  # of NVML and nvidia-smi, in the order of the bus
    pci: str | None
    compute_capability: tuple[int, int] | None
    known_as: str | None  # its row in albor's table of cards
    bf16_peak_flops: float | None
    utilization_percent: int | None
    compute_mode: int | None
    power_watts: float | None
    power_limit_watts: float | None
    power_default_watts: float | None
    power_max_watts: float | None
    clock_mhz: int | None
    clock_max_mhz: int | None
    memory_clock_mhz: int | None
    memory_clock_max_mhz: int | None
    clock_reasons: int | None  # NVML's bits
    temperature_celsius: int | None
    slowdown_celsius: int | None
    pcie_generation: int | None
    pcie_generation_max: int | None  # of card and slot together
    pcie_width: int | None
    pcie_width_max: int | None  # of the card
    ecc: bool | None
    ecc_uncorrected: int | None  # errors since the driver was loaded
    mig: bool | None
    mig_instances: list[MigInstance]
    display_active: bool | None
    persistence: bool | None


class Nvml:
    """pynvml, of which every question may be refused."""

    def __init__(self, pynvml: Any):
        self.pynvml = pynvml

    def ask(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        """NVML's answer; None where the card, the driver or the binding has none."""
        return self.ask_about(lambda pynvml: getattr(pynvml, function)(*arguments, **keywords))

    def ask_about(self, question: Callable[[Any], T]) -> T | None:
        """The answer to what takes several questions to NVML; None where one of them is refused."""
        try:
            return question(self.pynvml)
        # Older bindings lack functions, and some names that drivers give are not UTF-8.
        except (self.pynvml.NVMLError, AttributeError, UnicodeDecodeError):
            return None

    def number(self, function: str, *arguments: Any, divisor: int = 1000) -> float | None:
        """An answer in thousandths as a whole: milliwatts as watts."""
        answer = self.ask(function, *arguments)
        return None if answer is None else answer / divisor

    def flag(self, function: str, *arguments: Any) -> bool | None:
        """An answer that is on or off; of (now, after the next reset), what is now."""
        answer = self.ask(function, *arguments)
        if isinstance(answer, list | tuple):
            answer = answer[0]
        return None if answer is None else bool(answer)


def read_machine(root: Path = Path("/")) -> tuple[Driver, list[GpuFacts]]:
    """The driver and the cards that it answers for; `root` holds /sys."""
    on_bus = _cards_on_bus(root)
    try:
        import pynvml
    except ImportError:
        return Driver(None, None, "the package nvidia-ml-py is not installed", None, on_bus), []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Driver(None, None, str(error), getattr(error, "value", None), on_bus), []
    try:
        nvml = Nvml(pynvml)
        number = nvml.ask("nvmlSystemGetCudaDriverVersion_v2")
        cuda = None if number is None else (number // 1000, number % 1000 // 10)
        driver = Driver(nvml.ask("nvmlSystemGetDriverVersion"), cuda, None, None, on_bus)
        cards = nvml.ask_about(installed_cards) or {}
        first = nvml.ask_about(device_zero)
        return driver, [_read_gpu(nvml, index, card, first, root) for index, card in cards.items()]
    finally:
        pynvml.nvmlShutdown()


def _is_first(first: list[CudaDevice] | None, index: int, slot: int | None = None) -> bool | None:
    """Whether a card, or what is in a slot of it, is CUDA's first device: no, yes or perhaps (None)."""
    if first is None:
        return None
    fitting = [device for device in first if device.index == index and slot in (None, device.slot)]
    return None if 0 < len(fitting) < len(first) else bool(fitting)


def _read_gpu(nvml: Nvml, index: int, handle: Any, first: list[CudaDevice] | None, root: Path) -> GpuFacts:
    """`handle` is None for a card that fell off the bus: every question to it is refused."""
    part = _read_part(nvml, handle, _is_first(first, index))
    name = part["name"]
    capability = nvml.ask("nvmlDeviceGetCudaComputeCapability", handle)
    total, reserved = part["memory_total_bytes"], part["memory_reserved_bytes"]
    rows = matching_gpus(name, None if total is None else total - (reserved or 0)) if name else []
    known = rows[0] if len(rows) == 1 else None
    pci = getattr(nvml.ask("nvmlDeviceGetPciInfo", handle), "busId", None)
    pci = pci.decode() if isinstance(pci, bytes) else pci
    limits = nvml.ask("nvmlDeviceGetPowerManagementLimitConstraints", handle)
    reasons = nvml.ask("nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:  # its name before driver 535
        reasons = nvml.ask("nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    mig = nvml.flag("nvmlDeviceGetMigMode", handle)
    slices = nvml.ask_about(lambda pynvml: mig_instances(pynvml, handle)) or {}
    instances = [
        MigInstance(**_read_part(nvml, instance, _is_first(first, index, slot)))
        for slot, instance in slices.items()
    ]
    return GpuFacts(
        **part,
        index=index,
        pci=pci,
        compute_capability=None if capability is None else (capability[0], capability[1]),
        known_as=None if known is None else known.name,
        bf16_peak_flops=None if known is None else known.bf16_peak_flops,
        utilization_percent=getattr(nvml.ask("nvmlDeviceGetUtilizationRates", handle), "gpu", None),
        compute_mode=nvml.ask("nvmlDeviceGetComputeMode", handle),
        power_watts=nvml.number("nvmlDeviceGetPowerUsage", handle),
        power_limit_watts=nvml.number("nvmlDeviceGetEnforcedPowerLimit", handle),
        power_default_watts=nvml.number("nvmlDeviceGetPowerManagementDefaultLimit", handle),
        power_max_watts=None if limits is None else limits[1] / 1000,
        clock_mhz=nvml.ask("nvmlDeviceGetClockInfo", handle, 1),  # NVML_CLOCK_SM
        clock_max_mhz=nvml.ask("nvmlDeviceGetMaxClockInfo", handle, 1),
        memory_clock_mhz=nvml.ask("nvmlDeviceGetClockInfo", handle, 2),  # NVML_CLOCK_MEM
        memory_clock_max_mhz=nvml.ask("nvmlDeviceGetMaxClockInfo", handle, 2),
        clock_reasons=reasons,
        temperature_celsius=nvml.ask("nvmlDeviceGetTemperature", handle, 0),  # NVML_TEMPERATURE_GPU
        slowdown_celsius=nvml.ask("nvmlDeviceGetTemperatureThreshold", handle, 1),  # ..._THRESHOLD_SLOWDOWN
        pcie_generation=nvml.ask("nvmlDeviceGetCurrPcieLinkGeneration", handle),
        pcie_generation_max=nvml.ask("nvmlDeviceGetMaxPcieLinkGeneration", handle),
        pcie_width=nvml.ask("nvmlDeviceGetCurrPcieLinkWidth", handle),
        pcie_width_max=_card_width(nvml, handle, pci, root),
        ecc=nvml.flag("nvmlDeviceGetEccMode", handle),
        ecc_uncorrected=nvml.ask("nvmlDeviceGetTotalEccErrors", handle, 1, 0),  # uncorrected, volatile
        mig=mig,
        mig_instances=instances,
        display_active=nvml.flag("nvmlDeviceGetDisplayActive", handle),
        persistence=nvml.flag("nvmlDeviceGetPersistenceMode", handle),
    )


def _read_part(nvml: Nvml, handle: Any, chosen: bool | None) -> dict[str, Any]:
    """The fields of a Part."""
    memory = nvml.ask_about(lambda pynvml: read_memory(pynvml, handle))
    holdings = read_holdings(nvml.pynvml, handle, memory)
    return {
        "chosen": chosen,
        "name": nvml.ask("nvmlDeviceGetName", handle),
        "uuid": nvml.ask("nvmlDeviceGetUUID", handle),
        "memory_total_bytes": None if memory is None else memory.total,
        "memory_reserved_bytes": None if memory is None else memory.reserved,
        "memory_free_bytes": None if memory is None else memory.free,
        "processes": holdings.processes,
        "hidden_bytes": holdings.hidden_bytes,
    }


def _sysfs(pci: str, root: Path) -> Path:
    domain, rest = pci.lower().split(":", 1)  # NVML writes the domain with eight digits, the kernel with four
    return root / "sys/bus/pci/devices" / f"{domain[-4:]}:{rest}"


def _card_width(nvml: Nvml, handle: Any, pci: str | None, root: Path) -> int | None:
    """Lanes of the card. NVML's maximum is of card and slot together; the kernel knows the card's own."""
    widths = [nvml.ask("nvmlDeviceGetMaxPcieLinkWidth", handle)]
    kernel = read(_sysfs(pci, root) / "max_link_width").strip() if pci else ""
    widths.append(int(kernel) if kernel.isdigit() and int(kernel) <= 32 else None)  # 255: not known
    return max((width for width in widths if width is not None), default=None)


def _cards_on_bus(root: Path) -> list[str]:
    folder = root / "sys/bus/pci/devices"
    if not folder.is_dir():
        return []
    return sorted(
        device.name
        for device in folder.iterdir()
        # 0x0300: VGA, 0x0302: 3D controller
        if read(device / "vendor").strip() == "0x10de" and read(device / "class").startswith("0x03")
    )
