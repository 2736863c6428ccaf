"""What the facts about driver and cards mean: what keeps a run from the GPU, and what holds the GPU up."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from albor.doctor.checks import NOT_REPORTED, Check, Gain, Section, shown
from albor.doctor.gpus import Driver, GpuFacts, Part
from albor.doctor.software import PYPI, TorchBuild, install_torch
from albor.memory.nvml import UNEXPLAINED_BYTES
from albor.units import MIB, format_bytes

# What CUDA of a major version needs at least, of any minor version (NVIDIA, "Minor Version Compatibility").
MINIMUM_DRIVER = {12: 525, 13: 580}
# PyTorch publishes a build for CUDA 12.6 of every version that albor runs with; it knows no Blackwell.
_CUDA_12_WHEELS = "https://download.pytorch.org/whl/cu126"
_BLACKWELL, _BLACKWELL_CUDA = (10, 0), (12, 8)

_BUSY_PERCENT = 20  # a desktop redraws now and then, a run computes
_MENTIONED_BYTES = 512 * MIB

# NVML's codes
_NOT_LOADED, _NO_LIBRARY, _VERSION_MISMATCH = 9, 12, 18
_PROHIBITED, _EXCLUSIVE = 2, 3  # compute modes
_IDLE, _CLOCKS_SET, _HEAT, _POWER_BRAKE = 0x1, 0x2, 0x20 | 0x40, 0x80  # clocks event reasons
_REASONS = {
    _CLOCKS_SET: "application clocks are set",
    0x4: "at the power limit",
    0x8: "slowed by the hardware",
    0x10: "synchronised with another card",
    0x20: "slowed by heat",
    0x40: "slowed by heat, by the hardware",
    _POWER_BRAKE: "slowed by the power supply",
    0x100: "display clocks are set",
}
_SLOWED = 0x8 | _HEAT | _POWER_BRAKE  # the others are as somebody chose, or as a full load does


def wheels_for(driver: Driver, gpus: list[GpuFacts]) -> str:
    """The package index with a torch for this driver; PyPI's is built for CUDA 13."""
    newest = max((gpu.compute_capability or (0, 0) for gpu in gpus), default=(0, 0))
    old = driver.cuda is not None and driver.cuda < (13, 0)
    return _CUDA_12_WHEELS if old and newest < _BLACKWELL else PYPI


def examine_driver(
    driver: Driver, gpus: list[GpuFacts], build: TorchBuild | None, *, container: bool, wsl: bool
) -> Section:
    """The section on the driver."""
    facts = {**asdict(driver), "cuda": None if driver.cuda is None else "{}.{}".format(*driver.cuda)}
    if driver.failure is not None:
        return Section("NVIDIA driver", facts, [_no_driver(driver, container, wsl)])
    return Section("NVIDIA driver", facts, [_version_check(driver, build), _cards_check(gpus, container)])


def _no_driver(driver: Driver, container: bool, wsl: bool) -> Check:
    check = Check("driver", f"no answer: {driver.failure}")
    count = len(driver.cards_on_bus)
    if driver.failure_code is None:
        message = "NVIDIA cards cannot be seen without it"
        return check.found("problem", message, "install nvidia-ml-py", "pip install nvidia-ml-py")
    if driver.failure_code == _VERSION_MISMATCH:
        message = "the driver was updated, and the old one is still loaded"
        return check.found("problem", message, "restart the machine: then the GPU works", gain=Gain.LARGE)
    if not count and driver.failure_code in (_NOT_LOADED, _NO_LIBRARY):
        where = "; under WSL, Windows has the driver" if wsl else ""
        return Check("driver", f"none, and no NVIDIA card is seen{where}")
    message = f"{count} NVIDIA card{'s are' if count > 1 else ' is'} here and cannot be used"
    if container:
        remedy, command = "give the container its GPU: runs are on the CPU", "docker run --gpus all ..."
    else:
        remedy = f"install NVIDIA's driver, {MINIMUM_DRIVER[13]} or newer, or load it: runs are on the CPU"
        command = "sudo modprobe nvidia"
    return check.found("problem", message if count else "no GPU can be used", remedy, command, Gain.LARGE)


def _version_check(driver: Driver, build: TorchBuild | None) -> Check:
    made_for = shown(driver.cuda, lambda version: "CUDA {}.{}".format(*version))
    check = Check("driver", f"{shown(driver.version)}, made for {made_for}")
    if build is None or build.cuda is None or driver.cuda is None or driver.cuda[0] >= build.cuda[0]:
        return check  # CUDA runs on an older driver of its own major version
    needed = MINIMUM_DRIVER.get(build.cuda[0], "the newest version")
    return check.found(
        "problem",
        "too old for torch, which is built for CUDA {}.{}".format(*build.cuda),
        f"update the driver (to {needed} at least), or install a torch for CUDA {driver.cuda[0]}: "
        "runs cannot use the GPU",
        gain=Gain.LARGE,
    )


def _cards_check(gpus: list[GpuFacts], container: bool) -> Check:
    if not gpus:
        remedy = "give the container its GPU" if container else "see what `sudo dmesg` says of the card"
        check, message = Check("cards", "none"), "the driver answers, and has no card"
        return check.found("problem", message, f"{remedy}: runs are on the CPU", gain=Gain.LARGE)
    check = Check("cards", f"{len(gpus)}")
    if any(gpu.chosen is None for gpu in gpus):
        message = "which of them a run gets cannot be told, nor what memory is free there"
        if any(gpu.mig for gpu in gpus):
            instances = [instance for gpu in gpus for instance in gpu.mig_instances]
            return _name_one(check, message, [*instances, *(gpu for gpu in gpus if not gpu.mig)])
        remedy = "let CUDA count the cards in the order of the bus: by default the fastest is first"
        return check.found("warning", message, remedy, "export CUDA_DEVICE_ORDER=PCI_BUS_ID")
    chosen = next((gpu for gpu in gpus if gpu.chosen), None)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None and visible is None:
        return check  # the cards say why: lost, or in MIG mode without an instance
    if chosen is None:
        message = f"CUDA_VISIBLE_DEVICES={visible!r} begins with none of them"
        remedy = "let CUDA see a card: runs are on the CPU"
        return check.found("problem", message, remedy, "unset CUDA_VISIBLE_DEVICES", Gain.LARGE)
    if chosen.mig:  # its free memory is not that of the instance
        return check
    alike = [gpu for gpu in gpus if gpu.name == chosen.name and not gpu.mig]
    freest = max(alike, key=lambda gpu: gpu.memory_free_bytes or 0, default=chosen)
    gained = (freest.memory_free_bytes or 0) - (chosen.memory_free_bytes or 0)
    if chosen.memory_free_bytes is None or gained < _MENTIONED_BYTES:
        return check
    message = f"runs use GPU {chosen.index}, and GPU {freest.index} has {format_bytes(gained)} more free"
    remedy = f"use GPU {freest.index}: {format_bytes(gained)} more are free there"
    # By UUID, because CUDA and NVML may count cards in different orders.
    return check.found("note", message, remedy, f"export CUDA_VISIBLE_DEVICES={freest.uuid}", Gain.CLEAR)


def _name_one(check: Check, message: str, parts: Sequence[Part]) -> Check:
    """`check` with the advice to say which of `parts`, which a run may all get, it should get."""
    freest = max(parts, key=lambda part: part.memory_free_bytes or 0)
    remedy = "name the one that a run should get by its UUID: here, the one with the most memory free"
    return check.found("warning", message, remedy, f"export CUDA_VISIBLE_DEVICES={freest.uuid}")


def examine_gpu(gpu: GpuFacts, build: TorchBuild | None, *, several: bool) -> Section:
    """The section on one card; where there are several, the one that a run gets is named in its title."""
    mark = {True: " (runs use this one)", None: " (runs may use this one)", False: ""}[gpu.chosen]
    title = f"GPU {gpu.index}: {shown(gpu.name)}{mark if several else ''}"
    capability = None if gpu.compute_capability is None else "{}.{}".format(*gpu.compute_capability)
    facts = {**asdict(gpu), "compute_capability": capability, "held_bytes": gpu.held_bytes}
    if gpu.uuid is None and gpu.name is None:
        message = "the card is lost, or another driver has it"
        remedy = "look for Xid in `sudo dmesg`, and restart the machine: the card cannot be used"
        checks = [Check("state", "no answer").found("problem", message, remedy, gain=Gain.LARGE)]
    else:
        checks = list(_gpu_checks(gpu, build, idle=several and gpu.chosen is False))
    if several:
        checks = [
            replace(check, remedy=f"GPU {gpu.index}: {check.remedy}") if check.remedy else check
            for check in checks
        ]
    return Section(title, facts, checks)


def _gpu_checks(gpu: GpuFacts, build: TorchBuild | None, *, idle: bool) -> Iterator[Check]:
    """`idle`: no run would use this card, so whoever uses it takes nothing from one.

    Of a card in MIG mode a run gets an instance, and loses what others hold of that alone.
    """
    yield Check("UUID", shown(gpu.uuid))
    yield _capability_check(gpu, build)
    yield _table_check(gpu)
    yield _memory_check(gpu)
    for check in (_held_check(gpu), _busy_check(gpu), _compute_mode_check(gpu)):
        yield Check(check.name, check.value) if idle or gpu.mig else check
    yield _mig_check(gpu)
    for instance in gpu.mig_instances:
        if instance.chosen:
            yield replace(_held_check(instance), name="MIG held by")
    yield _power_check(gpu)
    yield _clock_check(gpu)
    yield _temperature_check(gpu)
    yield _pcie_check(gpu)
    yield _ecc_check(gpu)
    yield _display_check(gpu)
    yield _persistence_check(gpu)


def _capability_check(gpu: GpuFacts, build: TorchBuild | None) -> Check:
    if gpu.compute_capability is None:
        return Check("capability", NOT_REPORTED)
    capability = gpu.compute_capability
    check = Check(
        "capability", f"{capability[0]}.{capability[1]}, {'bf16' if capability >= (8, 0) else 'no bf16'}"
    )
    if build is not None and build.cuda is not None:
        message = "torch is built for CUDA {}.{}, which does not know this card".format(*build.cuda)
        remedy = "install the torch for this card: runs cannot use it"
        if capability >= _BLACKWELL and build.cuda < _BLACKWELL_CUDA:
            return check.found("problem", message, remedy, install_torch(build, PYPI), Gain.LARGE)
        if capability < (7, 5) and build.cuda[0] >= 13:
            return check.found("problem", message, remedy, install_torch(build, _CUDA_12_WHEELS), Gain.LARGE)
    if capability < (8, 0):
        message = "older than what the kernels are made for, and without bf16 in hardware"
        return check.found("warning", message, "train with train.precision=fp16 on this card")
    return check


def _table_check(gpu: GpuFacts) -> Check:
    if gpu.known_as is None:
        message = "not in albor's table of cards: its peak is not known, so MFU is not shown"
        return Check("peak", "unknown").found("note", message)
    if gpu.compute_capability is not None and gpu.compute_capability < (8, 0):
        return Check("peak", "no bf16")
    if gpu.bf16_peak_flops is None:
        message = "albor's table of cards has no peak for this one, so MFU is not shown"
        return Check("peak", "unknown").found("note", message)
    whole = " of the whole card" if gpu.mig else ""
    return Check("peak", f"{gpu.bf16_peak_flops / 1e12:g} TFLOP/s in bf16, by the data sheet{whole}")


def _free(gpu: Part) -> str:
    if gpu.memory_total_bytes is None or gpu.memory_free_bytes is None:
        return NOT_REPORTED
    usable = gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0)
    return f"{format_bytes(gpu.memory_free_bytes)} free of {format_bytes(usable)}"


def _memory_check(gpu: GpuFacts) -> Check:
    reserved = shown(gpu.memory_reserved_bytes, format_bytes)
    value = _free(gpu)
    return Check("memory", value if value == NOT_REPORTED else f"{value}; reserved: {reserved}")


def _held_check(gpu: Part) -> Check:
    """Who holds memory. Its own check has no context, so all of them are other programs."""
    if gpu.processes is None:
        return Check("held by", NOT_REPORTED)
    hidden = gpu.hidden_bytes if gpu.hidden_bytes and gpu.hidden_bytes > UNEXPLAINED_BYTES else 0
    held = sum(process.memory_bytes or 0 for process in gpu.processes) + hidden
    lines = [f"{shown(process.memory_bytes, format_bytes)}  {process}" for process in gpu.processes[:5]]
    if rest := gpu.processes[5:]:
        lines.append(f"{format_bytes(sum(p.memory_bytes or 0 for p in rest))}  {len(rest)} more")
    if hidden:
        lines.append(f"{format_bytes(hidden)}  programs that the driver does not show here")
    check = Check("held by", "\n".join(lines) or "no program")
    if held < _MENTIONED_BYTES:
        return check
    large = [process for process in gpu.processes if (process.memory_bytes or 0) >= held / 10][:3]
    names = [str(process) for process in large]
    freed = sum(process.memory_bytes or 0 for process in large)
    if hidden >= held / 10:
        names.append("what other users or containers run")
        freed += hidden
    if not names:  # a crowd of small ones
        names, freed = ["programs"], held
    much = gpu.memory_total_bytes is not None and held >= gpu.memory_total_bytes / 4
    return check.found(
        "warning" if much else "note",
        f"{format_bytes(held)} of it are taken",
        f"close {', '.join(names)}: with {format_bytes(freed)} more, a larger micro-batch fits",
        gain=Gain.CLEAR if much else Gain.SLIGHT,
    )


def _busy_check(gpu: GpuFacts) -> Check:
    check = Check("in use", shown(gpu.utilization_percent, lambda percent: f"{percent} %"))
    if (gpu.utilization_percent or 0) < _BUSY_PERCENT:
        return check
    names = ", ".join(str(process) for process in gpu.processes or [] if process.computes)
    remedy = f"end {names or 'the other program'}, or wait for it: two that compute slow each other down"
    return check.found("warning", "another program uses the card now", remedy, gain=Gain.LARGE)


def _compute_mode_check(gpu: GpuFacts) -> Check:
    modes = {0: "default", _PROHIBITED: "prohibited", _EXCLUSIVE: "one program at a time"}
    check = Check("compute mode", shown(gpu.compute_mode, lambda mode: modes.get(mode, str(mode))))
    if gpu.compute_mode == _PROHIBITED:
        command = f"sudo nvidia-smi -i {gpu.index} -c DEFAULT"
        remedy = "allow it to compute: runs cannot use the card"
        return check.found("problem", "no program may compute on the card", remedy, command, Gain.LARGE)
    if gpu.compute_mode == _EXCLUSIVE and any(process.computes for process in gpu.processes or []):
        return check.found("problem", "and one computes", "wait until the other program has ended")
    return check


def _mig_check(gpu: GpuFacts) -> Check:
    if not gpu.mig:
        return Check("MIG", shown(gpu.mig, lambda _: "off"))
    turn_off = f"sudo nvidia-smi -i {gpu.index} -mig 0"
    if not gpu.mig_instances:
        message = "without an instance CUDA has no device"
        remedy = "turn MIG off, or create an instance: runs cannot use the card"
        return Check("MIG", "on, no instance").found("problem", message, remedy, turn_off, Gain.LARGE)
    marks = {True: "; a run gets this one", None: "; a run may get this one", False: ""}
    slices = "\n".join(
        f"{shown(slice.name)}: {_free(slice)}{marks[slice.chosen]}\n  {shown(slice.uuid)}"
        for slice in gpu.mig_instances
    )
    check = Check("MIG", f"on\n{slices}")
    if gpu.chosen is False:
        return check
    if gpu.chosen and not any(slice.chosen for slice in gpu.mig_instances):
        return _name_one(check, "CUDA takes one of them, and which one is not documented", gpu.mig_instances)
    message = "a run gets one instance: a part of the memory, and of the processors"
    remedy = "turn MIG off, if the card is yours: a run gets one instance of it"
    return check.found("note", message, remedy, turn_off, Gain.CLEAR)


def _power_check(gpu: GpuFacts) -> Check:
    now, limit, default, most = (
        shown(watts, lambda number: f"{number:.0f} W")
        for watts in (gpu.power_watts, gpu.power_limit_watts, gpu.power_default_watts, gpu.power_max_watts)
    )
    if gpu.power_limit_watts is None:
        return Check("power", NOT_REPORTED if gpu.power_watts is None else f"{now} now; limit {NOT_REPORTED}")
    check = Check("power", f"{now} now; limit {limit}, by default {default}, at most {most}")
    if gpu.power_default_watts is None or gpu.power_limit_watts > gpu.power_default_watts - 1:
        return check
    message = f"{gpu.power_limit_watts / gpu.power_default_watts:.0%} of the default"
    remedy = f"raise the power limit from {limit} to {default}: at the limit, clocks go down"
    command = f"sudo nvidia-smi -i {gpu.index} -pl {gpu.power_default_watts:.0f}"
    return check.found("note", message, remedy, command, Gain.CLEAR)


def _clock_check(gpu: GpuFacts) -> Check:
    """Clocks, and what holds them down now."""
    bits = gpu.clock_reasons
    if gpu.clock_mhz is None and bits is None:
        return Check("clocks", NOT_REPORTED)
    reasons = ", ".join(text for bit, text in _REASONS.items() if bits is not None and bits & bit)
    state = reasons or shown(bits, lambda some: "idle" if some & _IDLE else "not held down")
    sm, memory = (
        f"{shown(now)} of {shown(most)} MHz"
        for now, most in (
            (gpu.clock_mhz, gpu.clock_max_mhz),
            (gpu.memory_clock_mhz, gpu.memory_clock_max_mhz),
        )
    )
    check = Check("clocks", f"{sm}, memory {memory}\n{state}")
    if bits is not None and bits & _SLOWED:
        if bits & _HEAT:
            remedy = "cool the card (air flow, dust, fans): it lowers its clocks because of heat"
        elif bits & _POWER_BRAKE:
            remedy = "check power supply and cables: the card lowers its clocks because of them"
        else:
            remedy = "check cooling and power: the card lowers its clocks because of one of them"
        return check.found("warning", "slower than it could be", remedy, gain=Gain.CLEAR)
    if bits is not None and bits & _CLOCKS_SET:
        remedy = "reset the application clocks: they are a limit that somebody set"
        return check.found(
            "note", "a limit is set", remedy, f"sudo nvidia-smi -i {gpu.index} -rac", Gain.SLIGHT
        )
    return check


def _temperature_check(gpu: GpuFacts) -> Check:
    now, most = (
        shown(degrees, lambda number: f"{number} °C")
        for degrees in (gpu.temperature_celsius, gpu.slowdown_celsius)
    )
    return Check("temperature", now if gpu.temperature_celsius is None else f"{now}; slows down at {most}")


def _pcie_check(gpu: GpuFacts) -> Check:
    width, most = gpu.pcie_width, gpu.pcie_width_max
    if width is None:
        return Check("PCIe", NOT_REPORTED)
    generation = f"{shown(gpu.pcie_generation)} of {shown(gpu.pcie_generation_max)}"
    rises = (
        None not in (gpu.pcie_generation, gpu.pcie_generation_max)
        and gpu.pcie_generation != gpu.pcie_generation_max
    )
    value = f"{width} of {shown(most)} lanes, generation {generation}{' (rises under load)' if rises else ''}"
    check = Check("PCIe", value)
    if most is None or width >= most:
        return check
    narrow = width <= 4
    return check.found(
        "warning" if narrow else "note",
        f"copies to and from the host take {most / width:g} times as long as they could",
        f"move the card to a slot with {most} lanes, or train with train.accumulator=gpu where "
        "`albor vram-estimate` says that it fits: with cpu, all gradients cross PCIe",
        gain=Gain.CLEAR if narrow else Gain.SLIGHT,
    )


def _ecc_check(gpu: GpuFacts) -> Check:
    check = Check("ECC", shown(gpu.ecc, lambda on: "on" if on else "off"))
    if not gpu.ecc_uncorrected:
        return check
    message = f"{gpu.ecc_uncorrected} uncorrected memory errors since the driver was loaded"
    return check.found(
        "warning", message, "restart the machine; if the errors come back, the card is failing"
    )


def _display_check(gpu: GpuFacts) -> Check:
    return Check("display", shown(gpu.display_active, lambda on: "drives one" if on else "drives none"))


def _persistence_check(gpu: GpuFacts) -> Check:
    check = Check("persistence", shown(gpu.persistence, lambda on: "on" if on else "off"))
    if gpu.persistence is not False or gpu.display_active:  # a display keeps the driver loaded
        return check
    remedy = "turn persistence mode on: else the driver is initialised at every start"
    command = f"sudo nvidia-smi -i {gpu.index} -pm 1"
    return check.found("note", "every start waits for the driver", remedy, command, Gain.SLIGHT)
