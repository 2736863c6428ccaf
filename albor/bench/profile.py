"""Where the time of one step went, kernel by kernel, as torch.profiler saw it.

On CUDA only the device's activity is recorded, which costs the host next to nothing and the kernels nothing.
A CPU has no kernels; there the operations of torch take their place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from albor.bench.protocol import KINDS

# By what kernels and operations are called; the first that fits. Inductor names a kernel after all that it
# was fused from, so the name's beginning comes first there.
_PATTERNS = (
    (r"triton_tem", "GEMM"),
    (r"triton_(poi|red|per|for)", "memory and arithmetic"),
    (r"memcpy|memset|aten::copy_", "copies"),
    (r"flash|fmha|sdpa|attention", "attention"),
    (r"gemm|cutlass|nvjet|xmma|splitk|aten::(mm|addmm|bmm|baddbmm|matmul|linear)\b|mkldnn", "GEMM"),
)


class StepProfile:
    """Records from `start` to `stop`."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self._profiler = profile(activities=[ProfilerActivity.CUDA if self._cuda else ProfilerActivity.CPU])

    def start(self) -> None:
        """Begins; nothing may be under way on the device."""
        self._profiler.start()

    def stop(self) -> dict[str, Any]:
        """What ran, with its seconds. Raises RuntimeError where the profiler saw nothing."""
        if self._cuda:
            torch.cuda.synchronize()
        self._profiler.stop()
        events = self._profiler.events() or ()
        wanted = DeviceType.CUDA if self._cuda else DeviceType.CPU
        seen = [event for event in events if event.device_type == wanted and not event.is_user_annotation]
        if not seen:
            raise RuntimeError("torch.profiler saw no kernel; the driver may not let it look")
        if self._cuda:
            busy = covered((event.time_range.start, event.time_range.end) for event in seen) / 1e6
            return summarise(((event.name, event.time_range.elapsed_us() / 1e6) for event in seen), busy)
        # An operation calls others: only what it did itself counts.
        times = [(event.name, event.self_cpu_time_total / 1e6) for event in seen]
        return summarise(times, sum(seconds for _, seconds in times))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of the spans lasted: copies run beside kernels."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def summarise(times: Iterable[tuple[str, float]], busy: float) -> dict[str, Any]:
    """(name, seconds) of each call as sums by name and by kind; `busy` is the time in which anything ran."""
    by_name: dict[str, list[float]] = {}
    for name, seconds in times:
        by_name.setdefault(name, []).append(seconds)
    kinds = dict.fromkeys(KINDS, 0.0)
    rows = []
    for name, calls in sorted(by_name.items(), key=lambda pair: (-sum(pair[1]), pair[0])):
        kind = kind_of(name)
        kinds[kind] += sum(calls)
        rows.append({"name": name, "kind": kind, "calls": len(calls), "seconds": sum(calls)})
    return {"busy_seconds": busy, "kinds": kinds, "kernels": rows}


def kind_of(name: str) -> str:
    """One of KINDS, judged by the name alone."""
    for pattern, kind in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "memory and arithmetic"
