"""What a benchmark ran on, for its record, and what the card did meanwhile."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import statistics
import threading
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import albor
from albor.doctor.gpus import GpuFacts, read_machine
from albor.doctor.software import commit, installed
from albor.errors import ConfigError, Problem

_PACKAGES = (
    "torch", "triton", "numpy", "transformers", "accelerate", "liger-kernel", "litgpt", "lightning",
)  # fmt: skip
_INTERVAL = 0.5  # seconds between two looks at the card
# What a system other than albor consists of, as far as it is ours: what it runs, and what it starts from.
_PEER_SOURCES = (
    "bench/peer.py", "bench/peers/", "bench/recorder.py", "bench/workload.py", "architecture.py",
    "model/parameters.py", "seeds.py",
)  # fmt: skip


def chosen_gpu() -> GpuFacts | None:
    """The card that a run would get; None without one.

    Raises ConfigError where it may be one of several: what was measured would not be known.
    """
    gpus = read_machine()[1]
    if any(gpu.chosen is None for gpu in gpus):
        problem = "CUDA may choose one of several devices"
        remedy = "set CUDA_VISIBLE_DEVICES to a UUID from `nvidia-smi -L`"
        raise ConfigError([Problem("CUDA_VISIBLE_DEVICES", problem, remedy, "environment")])
    return next((gpu for gpu in gpus if gpu.chosen), None)


def facts(device: str) -> dict[str, Any]:
    """Date, software and hardware."""
    driver, _ = read_machine()
    gpu = chosen_gpu() if device == "cuda" else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "code": code_digest(),
        "peer_code": code_digest(_PEER_SOURCES),
        "device": gpu.name if gpu is not None else _processor(),
        "is_gpu": gpu is not None,
        "driver": driver.version if gpu is not None else None,
        "power_limit_watts": gpu.power_limit_watts if gpu is not None else None,
        "clock_max_mhz": gpu.clock_max_mhz if gpu is not None else None,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {"albor": albor.__version__, **{name: installed(name) for name in _PACKAGES}},
    }


def code_digest(among: tuple[str, ...] = ("",)) -> str:
    """A hash of the package's source files whose path begins with one of `among`: results of different code
    are never mixed.
    """
    digest = hashlib.sha256()
    root = Path(albor.__file__).parent
    for folder, _, names in sorted(os.walk(root, followlinks=True)):  # kernels is a link in a checkout
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder) / name
                inside = path.relative_to(root).as_posix()
                if inside.startswith(among):
                    digest.update(inside.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


class Watch:
    """Looks at the card while a process runs: `with Watch() as watch: ...; watch.summary()`."""

    def __init__(self, device: str):
        self._samples: list[GpuFacts] = []
        self._end = threading.Event()
        self._before = chosen_gpu() if device == "cuda" else None
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(_INTERVAL):
            gpu = chosen_gpu()
            if gpu is not None:
                self._samples.append(gpu)

    def summary(self) -> dict[str, Any]:
        """The most memory in use beyond what was in use before, and what clock, power and temperature were in
        the second half of the time, when steps run. Empty without a card.
        """
        if self._before is None or not self._samples:
            return {}
        late = self._samples[len(self._samples) // 2 :]
        before = _used(self._before)
        peaks = [used for gpu in self._samples if (used := _used(gpu)) is not None]
        return {
            "device_peak_bytes": max(peaks) - before if peaks and before is not None else None,
            "clock_mhz": _middle(gpu.clock_mhz for gpu in late),
            "power_watts": _middle(gpu.power_watts for gpu in late),
            "temperature_celsius": _middle(gpu.temperature_celsius for gpu in late),
            "clock_reasons": sorted({gpu.clock_reasons for gpu in late if gpu.clock_reasons is not None}),
        }


def _used(gpu: GpuFacts) -> int | None:
    if gpu.memory_total_bytes is None or gpu.memory_free_bytes is None:
        return None
    return gpu.memory_total_bytes - (gpu.memory_reserved_bytes or 0) - gpu.memory_free_bytes


def _middle(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
