"""The host: system, processors, memory and disks, from /proc and /sys."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from albor.doctor.checks import Check, Gain, Section, read
from albor.memory.host import has_bf16_instructions, host_capacity
from albor.units import GIB, KIB, format_bytes

_FEW_CORES = 4  # to sum gradients with, beside the thread that feeds the GPU
# The pstate drivers of Intel and AMD scale by themselves; there "powersave" is the default, and not slow.
_SELF_SCALING = ("intel_pstate", "amd-pstate", "amd-pstate-epp")


@dataclass(frozen=True)
class System:
    """What kind of machine this is."""

    name: str
    kernel: str
    wsl: bool
    container: str | None  # such as docker


@dataclass(frozen=True)
class Cores:
    """Processors, and what of them this process may use."""

    logical: int
    allowed: int  # by affinity
    quota: float | None  # of the control group, in processors

    @property
    def usable(self) -> int:
        """How many threads can run at once."""
        return max(1, self.allowed if self.quota is None else min(self.allowed, int(self.quota)))


def read_system(root: Path = Path("/")) -> System:
    """The system, from its files below `root`."""
    release = dict(re.findall(r'^(\w+)="?(.*?)"?$', read(root / "etc/os-release"), re.MULTILINE))
    kernel = read(root / "proc/sys/kernel/osrelease").strip() or platform.release()
    container = None
    if (root / ".dockerenv").exists():
        container = "docker"
    elif (root / "run/.containerenv").exists():
        container = "podman"
    elif found := re.search(r"docker|kubepods|containerd|lxc", read(root / "proc/1/cgroup")):
        container = found[0]
    return System(
        release.get("PRETTY_NAME", platform.system()), kernel, "microsoft" in kernel.lower(), container
    )


def read_cores(root: Path = Path("/")) -> Cores:
    """Processors of this machine, of this process, and of its control group."""
    logical = (
        len(re.findall(r"^processor\s*:", read(root / "proc/cpuinfo"), re.MULTILINE)) or os.cpu_count() or 1
    )
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    return Cores(logical, allowed, _quota(root))


def _quota(root: Path) -> float | None:
    """Processors that the tightest control group around this process allows."""
    found = []
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = top / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            if controllers:  # version 1
                parts = [read(folder / f"cpu.cfs_{which}_us").strip() for which in ("quota", "period")]
            else:
                parts = read(folder / "cpu.max").split()
            if len(parts) == 2 and all(part.isdigit() for part in parts) and int(parts[1]):
                found.append(int(parts[0]) / int(parts[1]))  # "max" and -1 are no digits: no limit
    return min(found, default=None)


def examine(system: System, cores: Cores, has_gpu: bool, root: Path = Path("/")) -> Section:
    """The section on the host. With a GPU the processors sum gradients and feed it; without, they train."""
    cpuinfo = read(root / "proc/cpuinfo")
    model = _field(cpuinfo, "model name") or platform.processor() or platform.machine()
    flags = (_field(cpuinfo, "flags") or "").split()
    vectors = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    bf16 = has_bf16_instructions(root / "proc/cpuinfo")
    sizes = re.findall(r"^(\w+):\s+(\d+) kB", read(root / "proc/meminfo"), re.MULTILINE)
    memory = {name: int(size) * KIB for name, size in sizes}
    available = host_capacity(root / "proc", root / "sys/fs/cgroup")
    scaling = read_scaling(root)
    locked = re.search(r"^Max locked memory\s+(\S+)", read(root / "proc/self/limits"), re.MULTILINE)
    facts = {
        **asdict(system),
        "cpu": model,
        "cpu_flags": vectors,
        "cpu_bf16": bf16,
        "cores_logical": cores.logical,
        "cores_allowed": cores.allowed,
        "cores_quota": cores.quota,
        "cores_usable": cores.usable,
        **asdict(scaling),
        "memory_total_bytes": memory.get("MemTotal"),
        "memory_available_bytes": available,
        "swap_total_bytes": memory.get("SwapTotal"),
        "swap_free_bytes": memory.get("SwapFree"),
        "locked_memory_limit_bytes": int(locked[1]) if locked and locked[1].isdigit() else None,
    }
    checks = [
        _system_check(system),
        _cpu_check(f"{model}; {', '.join(vectors) or 'no AVX2'}", bf16, has_gpu),
        _cores_check(cores, has_gpu),
        _scaling_check(scaling),
        _memory_check(memory, available),
        _swap_check(memory),
        _locked_check(locked[1] if locked else None),
    ]
    return Section("Machine", facts, checks)


def _field(text: str, name: str) -> str | None:
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _system_check(system: System) -> Check:
    where = f", in a container ({system.container})" if system.container else ""
    check = Check("system", f"{system.name}, kernel {system.kernel}{where}{', WSL' if system.wsl else ''}")
    if not system.wsl:
        return check
    message = "WSL limits how much memory can be pinned, which accumulator: cpu needs"
    return check.found("note", message, "if memory cannot be pinned, train with train.accumulator=gpu")


def _cpu_check(value: str, bf16: bool, has_gpu: bool) -> Check:
    check = Check("CPU", value)
    if bf16 or has_gpu:
        return check
    return check.found("note", "it has no bf16 instructions, so bf16 runs compute in fp32")


def _cores_check(cores: Cores, has_gpu: bool) -> Check:
    limits = "" if cores.quota is None else f"control group: {cores.quota:g}"
    if cores.allowed < cores.logical:
        limits += f"{', ' if limits else ''}affinity: {cores.allowed}"
    check = Check("cores", f"{cores.usable} of {cores.logical} usable{f' ({limits})' if limits else ''}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    started = int(threads) if threads.isdigit() else cores.allowed
    if started > cores.usable:
        message = f"torch starts {started} threads on them"
        remedy = f"start {cores.usable} threads: more of them wait for each other"
        return check.found("warning", message, remedy, f"export OMP_NUM_THREADS={cores.usable}", Gain.CLEAR)
    if has_gpu and cores.usable < _FEW_CORES:
        message = "few for accumulator: cpu"
        remedy = "train with train.accumulator=gpu if it fits: few cores are slow to sum gradients"
        return check.found("note", message, remedy, gain=Gain.SLIGHT)
    return check


@dataclass(frozen=True)
class Scaling:
    """How the processors' clocks are chosen."""

    governors: list[str]
    scaling_driver: str | None
    energy_preference: str | None


def read_scaling(root: Path = Path("/")) -> Scaling:
    """Governors of all processors; driver and preference of the first."""
    folder = root / "sys/devices/system/cpu"
    governors = {read(path).strip() for path in folder.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""}
    driver, preference = (
        read(folder / "cpu0/cpufreq" / name).strip() or None
        for name in ("scaling_driver", "energy_performance_preference")
    )
    return Scaling(sorted(governors), driver, preference)


def _scaling_check(scaling: Scaling) -> Check:
    if not scaling.governors:
        return Check("governor", "not shown by this system")
    more = ", ".join(filter(None, (scaling.scaling_driver, scaling.energy_preference)))
    check = Check("governor", f"{', '.join(scaling.governors)}{f' ({more})' if more else ''}")
    if scaling.scaling_driver in _SELF_SCALING:
        slow = scaling.energy_preference == "power"
    else:
        slow = "powersave" in scaling.governors
    if not slow:
        return check
    remedy = "let the processors clock up: they feed the GPU, and sum gradients with accumulator: cpu"
    command = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return check.found("note", "the processors stay at low clocks", remedy, command, Gain.SLIGHT)


def _memory_check(memory: dict[str, int], available: int | None) -> Check:
    if available is None or "MemTotal" not in memory:
        return Check("memory", "not shown by this system")
    limited = ", in its control group" if available < memory.get("MemAvailable", 0) else ""
    check = Check("memory", f"{format_bytes(available)} free of {format_bytes(memory['MemTotal'])}{limited}")
    if available >= 2 * GIB:
        return check
    message = "hardly enough for torch and a small model"
    return check.found("warning", message, "close programs, or raise the container's limit, for host memory")


def _swap_check(memory: dict[str, int]) -> Check:
    total = memory.get("SwapTotal", 0)
    used = total - memory.get("SwapFree", 0)
    check = Check("swap", f"{format_bytes(used)} used of {format_bytes(total)}" if total else "none")
    if used < GIB:
        return check
    remedy = "close programs that hold host memory: what is swapped out is slow to come back"
    return check.found("note", "host memory was short", remedy, gain=Gain.SLIGHT)


def _locked_check(limit: str | None) -> Check:
    if limit is None:
        return Check("ulimit -l", "not shown by this system")
    size = format_bytes(int(limit)) if limit.isdigit() else limit
    return Check("ulimit -l", f"{size}; what CUDA pins does not count")  # NVIDIA's driver pins without mlock
