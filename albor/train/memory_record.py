"""What a run was planned to take, beside what it takes: `memory/*` in every row, and an event `memory`.

The event comes after the tenth step of a process, when every kernel has been used, evaluations and samples
of these steps included, and when the process ends. On a card the context, the kernels that have been loaded
and the captured graphs are told apart as `albor calibrate` does it, by what the process has beside
PyTorch's allocator at three times: with its context alone, before the first capture, and after the third
step. It names every component that the plan has, with `planned` and `measured` bytes and `how` the second
was read. What cannot be read is null, with the reason. `albor vram-estimate --audit` shows it.

Nothing here waits for the device, and for a row it and the system are asked once a second at most.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import get_args

import torch

from albor.memory.arena import Arena
from albor.memory.audit import ARENA, END, EVENT, PEAK, PROCESS, TENTH_STEP
from albor.memory.calibration import CUDA_CONTEXT, GRAPHS, LOADED_KERNELS
from albor.memory.estimate import Estimate
from albor.memory.outside import TRITON_MODULES
from albor.memory.plan import Place
from albor.memory.process import CardProcess, Reading, peak_resident, resident
from albor.train.metrics import MetricsLog

STEPS_UNTIL_STEADY = 10
_STEPS_UNTIL_CAPTURED = 3  # a piece of work is captured when it comes a second time
_SECONDS_BETWEEN_READINGS = 1.0  # for rows


@dataclass(frozen=True)
class _Component:
    planned: int
    measured: int | None
    how: str


class MemoryRecord:
    """Holds the plan of a process's training against what it has. `card` is None on a CPU; `context` is what
    the process had on it when it had used nothing of it but a context.
    """

    def __init__(
        self,
        target: Estimate,
        arena: Arena,
        log: MetricsLog,
        card: CardProcess | None,
        context: Reading | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._target, self._arena, self._log, self._card, self._clock = target, arena, log, card, clock
        self._row: dict[str, float | None] = {}
        self._row_from = -math.inf
        self._steps = 0
        self._context = None if context is None else context.bytes
        self._before_capture: int | None = None
        self._captured: int | None = None
        self._largest: int | None = None  # of the readings so far
        self._peak_before = peak_resident().bytes

    def row(self) -> dict[str, float | None]:
        """The metrics of a row, as they are or were less than a second ago."""
        now = self._clock()
        if now - self._row_from >= _SECONDS_BETWEEN_READINGS:
            reserved = None if self._card is None else torch.cuda.memory_reserved()
            process = self._process().bytes
            self._row_from = now
            self._row = {
                "memory/planned": float(self._target.required_bytes),
                "memory/arena": float(self._slab("device")),
                "memory/reserved": None if reserved is None else float(reserved),
                "memory/process": None if process is None else float(process),
            }
        return self._row

    def before_capture(self) -> None:
        """Comes once, before the first CUDA graph is captured."""
        self._before_capture = self._beside()

    def after_step(self, step: int) -> None:
        """Counts the process's steps, of which the last was the run's `step`."""
        self._steps += 1
        if self._steps == _STEPS_UNTIL_CAPTURED and self._before_capture is not None:
            self._captured = self._beside()
        if self._steps == STEPS_UNTIL_STEADY:
            self._write(step, TENTH_STEP)

    def at_end(self, step: int) -> None:
        """Comes once, when the process is done with the run, for whatever reason; without a step in it there
        is nothing to say.
        """
        if self._steps:
            self._write(step, END)
        if self._card is not None:
            self._card.close()

    def _write(self, step: int, moment: str) -> None:
        components = {name: asdict(component) for name, component in self._components().items()}
        target = self._target
        self._log.event(
            EVENT, step, moment=moment, device=target.device, calibrated=target.calibrated,
            components=components,
        )  # fmt: skip

    def _components(self) -> dict[str, _Component]:
        target, plan = self._target, self._target.plan
        found = {
            f"{ARENA}{place}": _Component(plan.size(place), self._slab(place), "size of the slab")
            for place in get_args(Place)
            if plan.size(place) or self._slab(place)
        }
        process = self._process()
        part = "not told apart from the rest of "
        for item in target.outside_items:
            within = "the allocator" if item.pooled else "what is beside it" if self._card else "the process"
            found[item.name] = _Component(item.bytes, None, part + within)
        if self._card is not None:
            found |= self._of_the_card(process) | self._of_stages()
        required = target.required_bytes
        found[PROCESS] = _Component(required, process.bytes, process.how)
        if self._card is None:
            found[PEAK] = _Component(required, *self._peak())
        else:
            how = f"the largest of the readings; {process.how}"
            found[PEAK] = _Component(required, self._largest, how)
            found["host memory, peak"] = _Component(target.required_host_bytes, *self._peak())
        return found

    def _of_the_card(self, process: Reading) -> dict[str, _Component]:
        """What PyTorch's allocator has of it, and what the driver has beside that."""
        pooled = sum(item.bytes for item in self._target.outside_items if item.pooled)
        beside = sum(item.bytes for item in self._target.outside_items if not item.pooled)
        reserved = torch.cuda.memory_reserved()
        allocator = self._target.device_bytes + pooled
        rest = None if process.bytes is None else process.bytes - reserved
        return {
            "allocator": _Component(
                allocator, torch.cuda.max_memory_reserved(), "torch.cuda.max_memory_reserved"
            ),
            "beside the allocator": _Component(
                beside, rest, "the process less torch.cuda.memory_reserved" if process.bytes else process.how
            ),
        }

    def _of_stages(self) -> dict[str, _Component]:
        """The driver's items, as far as the process has come."""
        planned = {item.name: item.bytes for item in self._target.outside_items}
        context, before, captured = self._context, self._before_capture, self._captured
        found = {}
        if context is not None:
            found[CUDA_CONTEXT] = (context, "NVML, when the context was all")
            if before is not None:
                how = "what was added before the first capture, beside the allocator"
                if TRITON_MODULES in planned:
                    how += "; the Triton modules are within it"
                found[LOADED_KERNELS] = (before - context, how)
        if before is not None and captured is not None:
            how = f"what was added from the first capture to step {_STEPS_UNTIL_CAPTURED}"
            found[GRAPHS] = (captured - before, how)
        return {name: _Component(planned[name], max(0, size), how) for name, (size, how) in found.items()}

    def _beside(self) -> int | None:
        """What the process has of the card beyond PyTorch's allocator."""
        size = self._process().bytes
        return None if size is None else size - torch.cuda.memory_reserved()

    def _slab(self, place: str) -> int:
        return self._arena.slabs[place].untyped_storage().nbytes()

    def _process(self) -> Reading:
        reading = resident() if self._card is None else self._card.read()
        if reading.bytes is not None:
            self._largest = max(self._largest or 0, reading.bytes)
        return reading

    def _peak(self) -> tuple[int | None, str]:
        """Of resident memory; the data may have been prepared in this process too."""
        peak = peak_resident()
        if peak.bytes is not None and peak.bytes == self._peak_before:
            return peak.bytes, f"{peak.how}; reached before the first step, when data were prepared or read"
        return peak.bytes, peak.how
