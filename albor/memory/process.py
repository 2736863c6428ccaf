"""What a process really has: of host memory by /proc, of a card by NVML. No torch, and no CUDA context.

Nothing here raises: a reading that cannot be taken is None, and says why.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.memory.nvml import device_zero, read_memory
from albor.units import KIB


@dataclass(frozen=True)
class Reading:
    """Bytes, and how they were read; None bytes: why they could not be."""

    bytes: int | None
    how: str


def resident(pid: int | str = "self", proc: Path = Path("/proc")) -> Reading:
    """Of the process's memory, what is in RAM now."""
    return _of_status(proc / str(pid) / "status", "VmRSS")


def peak_resident(pid: int | str = "self", proc: Path = Path("/proc")) -> Reading:
    """The most that was in RAM at any time since the process started."""
    return _of_status(proc / str(pid) / "status", "VmHWM")


def _of_status(path: Path, key: str) -> Reading:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB$", path.read_text(), re.MULTILINE)
    except OSError as error:
        return Reading(None, f"{path}: {error.strerror or error}")
    if found is None:
        return Reading(None, f"{path} has no {key}")
    return Reading(int(found[1]) * KIB, f"{key} in {path}")


class CardProcess:
    """What a process has of the card that CUDA programs here get, by NVML: context, modules and all.

    To be made before the process's first use of CUDA: a driver that does not list it, as within a container,
    leaves only the difference between the card's used bytes then and now. NVML is opened once.
    """

    def __init__(self, pid: int | None = None):
        self.pid = os.getpid() if pid is None else pid
        self._failure = "NVML knows no device that CUDA would take"
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # no such module, no driver, no permission
            self._failure = f"NVML cannot be used: {error}"
            return
        self._nvml = pynvml
        with self._noting_failure():
            self._handles = [device.handle for device in device_zero(pynvml)]
        self._before = [self._used(handle) for handle in self._handles]

    def read(self) -> Reading:
        """Its bytes now; asking takes the driver a moment."""
        for handle in self._handles:
            listed = self._listed(handle)
            if listed is not None:
                return Reading(listed, "NVML, of this process")
        if not self._handles:
            return Reading(None, self._failure)
        if len(self._handles) > 1:
            return Reading(
                None, "CUDA may have taken any of several devices (CUDA_VISIBLE_DEVICES says which)"
            )
        before, now = self._before[0], self._used(self._handles[0])
        if before is None or now is None:
            return Reading(None, "NVML lists neither this process's memory nor the card's")
        how = "NVML, of the card less what was in use before; it does not list this process"
        return Reading(max(0, now - before), how)

    def close(self) -> None:
        """Lets go of NVML. May be called twice."""
        if self._nvml is not None:
            with self._noting_failure():
                self._nvml.nvmlShutdown()
        self._nvml, self._handles = None, []

    def _listed(self, handle: Any) -> int | None:
        """The process's bytes in NVML's list; None where it is not there, or without a number."""
        with self._noting_failure():
            for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == self.pid:
                    return None if process.usedGpuMemory is None else int(process.usedGpuMemory)
        return None

    def _used(self, handle: Any) -> int | None:
        with self._noting_failure():
            memory = read_memory(self._nvml, handle)
            if memory is not None:
                return memory.total - (memory.reserved or 0) - memory.free
        return None

    @contextmanager
    def _noting_failure(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError as error:
            self._failure = f"NVML: {error}"
