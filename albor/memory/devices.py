"""What the memory plan is compared with: GPUs and hosts, their capacity, and what lies outside the arena.

No torch, and no CUDA context: a card in this machine is asked through NVML, any other is looked up in `GPUS`.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.memory.plan import MemoryPlan, plan_training

Device = Literal["cpu", "cuda"]
T = TypeVar("T")

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(size: int) -> str:
    """`size` for people: in GiB, or in MiB where that would show nothing."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


@dataclass(frozen=True)
class Gpu:
    """One model of card. `usable_bytes` is what CUDA programs can have, which is less than what is sold."""

    name: str
    usable_bytes: int | None  # None: the driver does not say
    compute_capability: tuple[int, int]
    bf16_peak_flops: float | None  # per second, dense, summed in fp32; None: unknown, or the card has no bf16
    source: str  # of usable_bytes


def _seen(name: str, gib: float, capability: tuple[int, int], peak: float | None, where: str) -> Gpu:
    """A row from PyTorch's "total capacity of ... GiB", which is rounded to two decimals, up perhaps."""
    return Gpu(name, int((gib - 0.005) * GIB), capability, peak, f"{gib} GiB in {where}")


def _derived(name: str, total_mib: int, capability: tuple[int, int], peak: float | None) -> Gpu:
    """A row from nvidia-smi's total. From that the driver keeps 250 to 630 MiB on the cards below for which
    both numbers are known; from a card of 80 GB or more, 1 GiB is taken off.
    """
    reserve = 640 if total_mib < 64 * KIB else 1024
    source = f"derived: nvidia-smi {total_mib} MiB less {reserve}"
    return Gpu(name, (total_mib - reserve) * MIB, capability, peak, source)


# Usable bytes are the least that was found reported (GitHub issues): the same card moves by 170 MiB with its
# driver, and by 3 GiB with ECC. Peaks are from NVIDIA's architecture whitepapers and data sheets, without
# sparsity; GeForce cards sum in fp32 at half the rate at which they sum in fp16.
GPUS = (
    _seen("RTX 3060", 11.75, (8, 6), 25.5e12, "Kunhao-Liu/StyleGaussian#12"),
    _seen("RTX 3080", 9.78, (8, 6), 59.5e12, "zai-org/CogVideo#34"),
    _seen("RTX 3090", 23.56, (8, 6), 71e12, "noonghunna/club-3090#58"),
    _derived("RTX 4060 Ti 8GB", 8188, (8, 9), 44.1e12),
    _seen("RTX 4060 Ti 16GB", 15.55, (8, 9), 44.1e12, "boson-ai/higgs-audio#48"),
    _seen("RTX 4070 Ti", 11.73, (8, 9), 80.2e12, "OpenLMLab/LOMO#17"),
    _derived("RTX 4070 Ti Super", 16376, (8, 9), 88.2e12),
    _derived("RTX 4080", 16376, (8, 9), 97.5e12),
    _seen("RTX 4090", 23.52, (8, 9), 165.2e12, "Soul-AILab/SoulX-FlashTalk#5"),
    _derived("RTX 5070 Ti", 16303, (12, 0), 87.9e12),
    _derived("RTX 5080", 16303, (12, 0), 112.6e12),
    _seen("RTX 5090", 31.36, (12, 0), 209.5e12, "TrajectoryCrafter/TrajectoryCrafter#20"),
    _derived("RTX A6000", 49140, (8, 6), 154.8e12),
    _seen("RTX 6000 Ada", 44.43, (8, 9), 364.2e12, "DINGYANB/MTVCrafter#21, with ECC"),
    _seen("T4", 14.56, (7, 5), None, "Zheng-Chong/CatVTON#133"),
    _seen("L4", 22.03, (8, 9), 121e12, "ArcInstitute/evo2#190"),
    _seen("A10", 21.99, (8, 6), 125e12, "zai-org/CogVLM#236"),
    _seen("L40", 44.40, (8, 9), 181e12, "QwenLM/Qwen3-VL#2097"),
    _derived("L40S", 46068, (8, 9), 362e12),
    _seen("A100 40GB", 39.39, (8, 0), 312e12, "PyTorch out-of-memory messages, 39.39 to 39.50 by host"),
    _derived("A100 80GB", 81920, (8, 0), 312e12),
    _derived("H100 PCIe", 81559, (9, 0), 756e12),
    _seen("H100", 79.11, (9, 0), 989.4e12, "vllm-project/vllm#27508"),
    _derived("H200", 143771, (9, 0), 989.4e12),
    _derived("B200", 183359, (10, 0), 2250e12),
)

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|rtx|generation|sxm\d?|hbm\d?e?|[^a-z0-9]")
_MEMORY = re.compile(r"(?<!\d)(\d{1,3})\s*gi?b\b|(?<=[\s-])(\d{1,3})$")


def _key(name: str) -> tuple[str, int | None]:
    """What names a card, without decoration, and the gigabytes if the name holds them: "a100", 40."""
    lowered = name.lower().strip()
    memory = _MEMORY.search(lowered)
    return _NOISE.sub("", _MEMORY.sub("", lowered)), int(memory[1] or memory[2]) if memory else None


def _matches(name: str) -> list[Gpu]:
    model, memory = _key(name)
    models = {_key(gpu.name)[0] for gpu in GPUS}
    if model not in models:
        model = model.removesuffix("pcie")  # another speed for an H100, the same card for the others

    def has(gpu: Gpu) -> bool:  # cards are sold with up to a tenth more than CUDA can use
        return memory is None or abs(memory - (gpu.usable_bytes or 0) / GIB) <= memory / 10

    return [gpu for gpu in GPUS if _key(gpu.name)[0] == model and has(gpu)]


def find_gpu(name: str) -> Gpu:
    """The card that `name` means: "RTX 4090", "4090", "nvidia geforce rtx 4090 24GB", "A100-SXM4-40GB".

    Raises ConfigError, with the cards that exist, where there is none or more than one.
    """
    found = _matches(name)
    if len(found) == 1:
        return found[0]
    known = ", ".join(gpu.name for gpu in GPUS)
    close = [gpu.name for gpu in found]
    if not close:
        names = {_key(gpu.name)[0]: gpu.name for gpu in GPUS}
        whole = _NOISE.sub("", name.lower())  # in "RTX 409", 409 is no memory
        close = [names[key] for key in difflib.get_close_matches(whole, names, n=2, cutoff=0.5)]
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    what = "is more than one card" if found else "is not a card that albor knows"
    remedy = f"{meant}known are {known}. For any other card, give its memory: --vram 24GiB"
    raise ConfigError([Problem("--gpu", f"{name!r} {what}", remedy, "command line")])


@dataclass(frozen=True)
class Hardware:
    """Where a run is to go. A capacity that is not known is None."""

    device: Device
    description: str
    gpu: Gpu | None = None
    capacity_bytes: int | None = None  # for the device arena and what lies around it
    host_capacity_bytes: int | None = None  # for the host's part of a run on a GPU of this machine


def this_machine(device: Literal["auto", "cuda", "cpu"]) -> Hardware:
    """The hardware that `device` means here: its memory is what is free now."""
    host = host_capacity()
    installed = None if device == "cpu" else installed_gpu()
    if installed is not None:
        return replace(installed, host_capacity_bytes=host)
    if device == "cuda":
        return Hardware("cuda", "CUDA, no GPU found", host_capacity_bytes=host)
    return Hardware("cpu", "CPU, free host memory", capacity_bytes=host)


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
    name = " or ".join(dict.fromkeys(gpu.name for gpu, _ in found))
    free = _common(free for _, free in found)
    total = _common(gpu.usable_bytes for gpu, _ in found)
    capability = _common(gpu.compute_capability for gpu, _ in found)
    peak = _common(gpu.bf16_peak_flops for gpu, _ in found)
    if free is not None:
        memory = f"{format_bytes(free)} free" + ("" if total is None else f" of {format_bytes(total)}")
    elif len(found) > 1:
        memory = "memory unknown: CUDA chooses; set CUDA_VISIBLE_DEVICES to a UUID from `nvidia-smi -L`"
    else:
        memory = "memory unknown to the driver"
    gpu = None if capability is None else Gpu(name, total, capability, peak, "NVML")
    return Hardware("cuda", f"{name}, {memory}", gpu, free)


def _common(values: Iterable[T]) -> T | None:
    """What all `values` are; None where they differ."""
    different = set(values)
    return different.pop() if len(different) == 1 else None


def _ask(pynvml: Any, device: CudaDevice) -> tuple[Gpu, int | None]:
    """What NVML says of `device`, and its free bytes."""
    name = pynvml.nvmlDeviceGetName(device.handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device.card)
    known = _matches(name) if device.slot is None else []  # an instance has a part of the card's peak
    memory = read_memory(pynvml, device.handle)
    usable = None if memory is None else memory.total - (memory.reserved or 0)
    peak = known[0].bf16_peak_flops if known else None
    return Gpu(name, usable, (major, minor), peak, "NVML"), None if memory is None else memory.free


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


def read_memory(pynvml: Any, handle: Any) -> DeviceMemory | None:
    """The memory of a card or an instance by its handle; None for a GPU that shares the host's."""
    for version in (pynvml.nvmlMemory_v2, None):  # the first version does not know what is reserved
        with suppress(pynvml.NVMLError):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=version)
            return DeviceMemory(memory.total, getattr(memory, "reserved", None), memory.free)
    return None


def host_capacity(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of host memory that a new process can have: what is free, within its control group's limit.

    None where the system has no /proc/meminfo.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
    if found is None:
        return None
    room = [int(found[1]) * KIB]
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, usage, cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        # The path is as the host sees it, and need not exist inside a container; there the group is the root.
        group = root / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                # Cached files count as used, and go when memory is needed.
                freeable = re.search(rf"^{cache} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                room.append(max(0, int(most) - int(used) + (int(freeable[1]) if freeable else 0)))
    return min(room)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def compute_dtype(precision: str, device: str) -> str:
    """The dtype that `precision` computes in on `device`.

    A CPU without bf16 instructions computes in fp32 what is configured as bf16 (see `falls_back`): emulated
    bf16 is slower than that. Raises ConfigError for fp16 on the CPU.
    """
    if precision == "fp16" and device == "cpu":
        problem = "fp16 needs a GPU"
        raise ConfigError([Problem("train.precision", problem, "use bf16 or fp32 on the CPU")])
    if precision == "bf16" and device == "cpu" and not _cpu_has_bf16():
        return "float32"
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[precision]


def falls_back(precision: str, dtype: str) -> bool:
    """Whether `compute_dtype` chose another dtype than the configuration asks for, which a run should say."""
    return precision == "bf16" and dtype != "bfloat16"


def _cpu_has_bf16() -> bool:
    return has_bf16_instructions(Path("/proc/cpuinfo"))


def has_bf16_instructions(cpuinfo: Path) -> bool:
    """Whether the processor that the file `cpuinfo` describes computes in bf16; not known means no."""
    flags = re.search(r"^flags\s*:(.*)$", _read(cpuinfo), re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())


# What the arena does not hold. Items marked as estimates are read off other people's machines, rounded up.
CUDA_CONTEXT = "CUDA context"
LOADED_KERNELS = "loaded kernels"
PROCESS = "Python and torch"
ESTIMATED = frozenset({CUDA_CONTEXT, LOADED_KERNELS, PROCESS})
# 426 MiB on an RTX 6000 Ada with torch 2.10 (unsloth-zoo#1053); 300 to 400 MB (pytorch#107667, #109888).
_CUDA_CONTEXT_BYTES = 448 * MIB
# They grow when a library's kernel is first used. llmq's whole remainder on an RTX 4090, with context, cuDNN
# and NCCL, is 903 MiB; here are cuBLAS and Triton.
_LOADED_KERNELS_BYTES = 256 * MIB
# Beside a quickstart run's arena, torch 2.13 for the CPU on Linux x86-64: 300 MB resident, and 500 MB in a
# first run, which trains the tokenizer too.
_PROCESS_BYTES = 512 * MIB
# The same with torch for CUDA, whose libraries are ten times the size: host memory beside a run's pinned and
# host arenas. Not measured.
CUDA_PROCESS_BYTES = 2 * GIB
# PyTorch's CublasHandlePool: ":4096:2:16:8" by default, 32 MiB from compute capability 9; one per handle and
# stream.
_CUBLAS_BYTES, _CUBLAS_BYTES_90 = 8_519_680, 32 * MIB
_SMALL_POOL_BYTES = 2 * MIB  # one segment holds all tensors of up to 1 MiB: the loss, the norm


def outside(plan: MemoryPlan, gpu: Gpu | None = None) -> dict[str, int]:
    """Bytes that a device needs beside the arena, by item; for an unknown `gpu`, the most it can be."""
    if plan.device == "cpu":
        return {PROCESS: _PROCESS_BYTES, **plan.temporaries}
    cublas = _CUBLAS_BYTES_90 if gpu is None or gpu.compute_capability >= (9, 0) else _CUBLAS_BYTES
    pooled = (plan.size("device"), cublas, *plan.temporaries.values())
    return {
        CUDA_CONTEXT: _CUDA_CONTEXT_BYTES,
        LOADED_KERNELS: _LOADED_KERNELS_BYTES,
        "cuBLAS workspace": cublas,
        **plan.temporaries,
        "allocator rounding": sum(_segment(size) - size for size in pooled) + _SMALL_POOL_BYTES,
    }


def _segment(size: int) -> int:
    """What CUDACachingAllocator takes from the driver for a first request of `size` bytes."""
    if size <= MIB:
        return 2 * MIB if size else 0
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def resolve_accumulator(config: RunConfig, hardware: Hardware, dtype: str) -> Literal["cpu", "gpu"]:
    """Where gradients are summed; `auto` is the device where that is known to fit, else the host."""
    if config.train.accumulator != "auto":
        return config.train.accumulator
    if hardware.device == "cpu" or hardware.capacity_bytes is None:
        return "cpu"
    plan = plan_training(config, "cuda", dtype, "gpu")
    needed = plan.size("device") + sum(outside(plan, hardware.gpu).values())
    return "gpu" if needed <= hardware.capacity_bytes else "cpu"
