"""The cards of this machine, asked through NVML: no CUDA context, and nothing is changed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, TypeVar

from albor.memory.cards import Gpu, Hardware, Process, matching_gpus
from albor.memory.host import host_capacity
from albor.units import MIB, format_bytes

T = TypeVar("T")
MEASURED = "NVML"  # the source of what a card of this machine says of itself


def installed_gpu() -> Hardware | None:
    """What a CUDA program that starts now would get, by NVML; None without a card or its driver.

    The capacity is what is free. Where it cannot be told which of several devices CUDA would take, a number
    is given only if it is the same for all of them.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found = [_ask(pynvml, device) for device in device_zero(pynvml)]
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    if not found:
        return None
    return found[0] if len(found) == 1 else _any_of(found)


def _any_of(found: list[Hardware]) -> Hardware:
    """What is known where CUDA takes one of `found`."""
    cards = [one.gpu for one in found if one.gpu]
    name = " or ".join(dict.fromkeys(card.name for card in cards))
    free, total = _common(one.capacity_bytes for one in found), _common(card.usable_bytes for card in cards)
    if free is None:
        memory = "memory unknown: CUDA chooses; set CUDA_VISIBLE_DEVICES to a UUID from `nvidia-smi -L`"
    else:
        memory = f"{format_bytes(free)} free"
    gpu = _common(replace(card, usable_bytes=total) for card in cards)
    capability = _common(card.compute_capability for card in cards)
    if gpu is None and capability is not None:
        gpu = Gpu(name, total, capability, None, MEASURED)
    unified = all(one.unified for one in found)
    return Hardware("cuda", f"{name}, {memory}", gpu, free, unified=unified)


def no_gpu() -> str:
    """Why `installed_gpu` finds none, and what would change that."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "no GPU found"
    try:
        cards = [card for card in installed_cards(pynvml).values() if card is not None]
        sliced = [card for card in cards if mig_instances(pynvml, card) == {}]
    except pynvml.NVMLError as error:
        return f"no GPU found: NVML says {error}"
    finally:
        pynvml.nvmlShutdown()
    if not cards:
        return "no GPU found"
    if len(sliced) == len(cards):
        return "no GPU: in MIG mode without an instance; `nvidia-smi mig -lgip` lists what can be made"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return "no GPU found: the driver lists one and does not answer for it; `albor doctor` says more"
    return f"no GPU: CUDA_VISIBLE_DEVICES={visible!r} leaves none of {len(cards)}; `nvidia-smi -L` lists them"


def _common(values: Iterable[T]) -> T | None:
    """What all `values` are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _ask(pynvml: Any, device: CudaDevice) -> Hardware:
    """What NVML says of `device`: its capacity is what is free."""
    name = pynvml.nvmlDeviceGetName(device.handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device.card)
    memory = read_memory(pynvml, device.handle)
    usable = None if memory is None else memory.total - (memory.reserved or 0)
    gpu = Gpu(name, usable, (major, minor), None, MEASURED)
    known = [row for row in matching_gpus(name, usable) if bool(row.slice) == (device.slot is not None)]
    if len(known) == 1:
        row = known[0]
        gpu = replace(row, name=name, usable_bytes=usable, compute_capability=(major, minor), source=MEASURED)
    if gpu.unified:
        # NVML refuses, or gives a number that leaves out what the host's programs and caches hold.
        gpu, free = replace(gpu, usable_bytes=None), host_capacity()
        memory_now = "unknown" if free is None else f"{format_bytes(free)} free"
        return Hardware("cuda", f"{name}, with the host's memory: {memory_now}", gpu, free, unified=True)
    if memory is None:
        return Hardware("cuda", f"{name}, memory unknown to the driver", gpu)
    holders = tuple(read_holdings(pynvml, device.handle, memory).holders)
    whole = "" if usable is None else f" of {format_bytes(usable)}"
    return Hardware(
        "cuda", f"{name}, {format_bytes(memory.free)} free{whole}", gpu, memory.free, holders=holders
    )


@dataclass(frozen=True)
class CudaDevice:
    """What CUDA can enumerate: a card, or an instance of a card in MIG mode, as handles of NVML."""

    index: int  # NVML's, of the card
    card: Any
    slot: int | None = None  # NVML's, of the instance; None: it is the whole card
    instance: Any = None

    @property
    def handle(self) -> Any:
        """What to ask for name, UUID and memory."""
        return self.card if self.slot is None else self.instance


def device_zero(pynvml: Any) -> list[CudaDevice]:
    """What CUDA's first device is in a program that starts now: none, one, or several that it may be.

    NVML heeds neither CUDA_VISIBLE_DEVICES nor CUDA_DEVICE_ORDER. What CUDA documents of them (programming
    guide, "CUDA Environment Variables"; MIG user guide, "CUDA Device Enumeration"):

    - An index counts in the order of the bus, which is NVML's, with CUDA_DEVICE_ORDER=PCI_BUS_ID. Else the
      fastest card is first, by a measure that is not documented: where names differ, it may be any card.
    - A UUID may be cut short as long as one card has it. Entries after one that names nothing are ignored.
    - Where CUDA sees an instance it sees that one alone, and no whole card. Which instance, and what an index
      counts where a card is in MIG mode, is not documented: it may be any.

    Raises pynvml.NVMLError where a card does not say its name or UUID.
    """
    by_card = [_enumerated(pynvml, index, card) for index, card in installed_cards(pynvml).items()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return _instances(by_card) or _at(pynvml, 0, by_card)
    entries = [entry.strip() for entry in visible.split(",")]
    if len(set(entries)) < len(entries):  # CUDA refuses a list that names a card twice
        return []
    meant = list(takewhile(bool, (_named(pynvml, entry, by_card) for entry in entries)))
    sliced = [devices for devices in meant if _instances([devices])]
    return next(iter(sliced or meant), [])


def installed_cards(pynvml: Any) -> dict[int, Any | None]:
    """The handles of the cards by NVML's index; None: the card does not answer.

    Cards that a control group keeps from this process are left out: CUDA does not see them either.
    """
    found: dict[int, Any | None] = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            found[index] = pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            if error.value != pynvml.NVML_ERROR_NO_PERMISSION:
                found[index] = None
    return found


def mig_instances(pynvml: Any, card: Any) -> dict[int, Any] | None:
    """The handles of the instances of a card in MIG mode, by NVML's slot; None for a card in another mode."""
    try:
        now, _after_reset = pynvml.nvmlDeviceGetMigMode(card)
        slots = pynvml.nvmlDeviceGetMaxMigDeviceCount(card) if now else 0
    except pynvml.NVMLError:  # a card that cannot be sliced
        return None
    found = {}
    for slot in range(slots):
        with suppress(pynvml.NVMLError):  # nothing is in this slot
            found[slot] = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(card, slot)
    return found if now else None


def _enumerated(pynvml: Any, index: int, card: Any | None) -> list[CudaDevice]:
    """What CUDA can see of a card."""
    if card is None:
        return []
    instances = mig_instances(pynvml, card)
    if instances is None:
        return [CudaDevice(index, card)]
    return [CudaDevice(index, card, slot, instance) for slot, instance in instances.items()]


def _instances(by_card: list[list[CudaDevice]]) -> list[CudaDevice]:
    return [device for devices in by_card for device in devices if device.slot is not None]


def _at(pynvml: Any, index: int, by_card: list[list[CudaDevice]]) -> list[CudaDevice]:
    """What an index may mean."""
    everything = [device for devices in by_card for device in devices]
    if index >= len(by_card):
        return []
    alike = len({pynvml.nvmlDeviceGetName(device.card) for device in everything}) == 1
    in_order = alike or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    all_whole = len(everything) == len(by_card) and not _instances(by_card)
    return by_card[index] if in_order and all_whole else everything


def _named(pynvml: Any, entry: str, by_card: list[list[CudaDevice]]) -> list[CudaDevice]:
    """What an entry of CUDA_VISIBLE_DEVICES may mean: an index, GPU-UUID, MIG-UUID or MIG-GPU-UUID/1/0."""
    if index := re.match(r"\d+", entry):
        return _at(pynvml, int(index[0]), by_card)

    def matches(handle: Any, uuid: str) -> bool:
        return str(pynvml.nvmlDeviceGetUUID(handle)).startswith(uuid)

    if entry.startswith("GPU-"):
        found = [devices for devices in by_card if devices and matches(devices[0].card, entry)]
        return found[0] if len(found) == 1 else []
    if not entry.startswith("MIG-"):
        return []
    instances = _instances(by_card)
    if ids := re.fullmatch(r"MIG-(GPU-[^/]+)/(\d+)/(\d+)", entry):  # of the GPU and the compute instance
        instances = [
            device
            for device in instances
            if matches(device.card, ids[1])
            and pynvml.nvmlDeviceGetGpuInstanceId(device.instance) == int(ids[2])
            and pynvml.nvmlDeviceGetComputeInstanceId(device.instance) == int(ids[3])
        ]
    else:
        instances = [device for device in instances if matches(device.instance, entry)]
    return instances if len(instances) == 1 else []


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a card, or of an instance of one."""

    total: int
    reserved: int | None  # by the driver, which says so since version 510
    free: int

    @property
    def used(self) -> int:
        """By programs, and by the driver where it does not say what it reserves."""
        return self.total - (self.reserved or 0) - self.free


def read_memory(pynvml: Any, handle: Any) -> DeviceMemory | None:
    """The memory of a card or an instance by its handle; None for a GPU that shares the host's."""
    for version in (pynvml.nvmlMemory_v2, None):  # the first version does not know what is reserved
        with suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            if memory.total:
                return DeviceMemory(memory.total, getattr(memory, "reserved", None), memory.free)
    return None


UNEXPLAINED_BYTES = 256 * MIB  # less is the driver's own


@dataclass(frozen=True)
class Holdings:
    """Who holds memory of a card, this process aside."""

    processes: list[Process] | None  # the largest first; None: the driver does not list them
    rest_bytes: int | None  # in use beyond what is known of each of them; None: the driver does not say

    @property
    def hidden_bytes(self) -> int | None:
        """In use by none of `processes`; None where that cannot be told."""
        if self.processes is None or any(process.memory_bytes is None for process in self.processes):
            return None
        return self.rest_bytes

    @property
    def holders(self) -> list[Process]:
        """`processes`, and as one the rest, where that is more than the driver's own; the largest first."""
        rest = self.rest_bytes or 0
        unknown = [Process(None, None, rest)] if rest > UNEXPLAINED_BYTES else []
        return _largest_first([*(self.processes or []), *unknown])


def read_holdings(pynvml: Any, handle: Any, memory: DeviceMemory | None) -> Holdings:
    """Who holds memory of the card or instance `handle`, of which `memory` was read.

    Programs of other users and outside of a container are not listed, or without a name; under WSL, without a
    size. What they hold together is known all the same.
    """

    def listed(kind: str) -> list[Any] | None:
        # Older bindings lack functions.
        with suppress(pynvml.NVMLError, AttributeError):
            return list(getattr(pynvml, f"nvmlDeviceGet{kind}RunningProcesses")(handle))
        return None

    computing, drawing = listed("Compute"), listed("Graphics")
    found: dict[int, Process] = {}
    for entry, computes in [(e, False) for e in drawing or []] + [(e, True) for e in computing or []]:
        # A program may do both, and then is listed twice with all that it holds.
        twin = found.get(entry.pid)
        sizes = [entry.usedGpuMemory, twin.memory_bytes if twin else None]
        size = max((size for size in sizes if size is not None), default=None)
        found[entry.pid] = Process(entry.pid, _process_name(pynvml, entry.pid), size, computes)
    rest = None
    if memory is not None:
        rest = max(0, memory.used - sum(process.memory_bytes or 0 for process in found.values()))
    found.pop(os.getpid(), None)
    silent = computing is None and drawing is None
    return Holdings(None if silent else _largest_first(found.values()), rest)


def _largest_first(processes: Iterable[Process]) -> list[Process]:
    return sorted(processes, key=lambda process: -(process.memory_bytes or 0))


def _process_name(pynvml: Any, pid: int) -> str | None:
    """The program's file name: what else is on its command line is nobody's business in a bug report.

    Not from /proc: in a container the same number is another process.
    """
    # Some names that drivers give are not UTF-8.
    with suppress(pynvml.NVMLError, AttributeError, UnicodeDecodeError):
        name = pynvml.nvmlSystemGetProcessName(pid)
        name = name.decode(errors="replace") if isinstance(name, bytes) else name
        return name.split(" -")[0].rsplit("/", 1)[-1].strip() or None if name else None
    return None
