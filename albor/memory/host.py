"""What this host has: memory for a new process, and bf16 instructions. Linux says it in /proc."""

from __future__ import annotations

import re
from pathlib import Path

from albor.units import KIB


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


def cpu_has_bf16() -> bool:
    return has_bf16_instructions(Path("/proc/cpuinfo"))


def has_bf16_instructions(cpuinfo: Path) -> bool:
    """Whether the processor that the file `cpuinfo` describes computes in bf16; not known means no."""
    flags = re.search(r"^flags\s*:(.*)$", _read(cpuinfo), re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags[1].split())
