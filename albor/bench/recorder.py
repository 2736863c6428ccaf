"""What a peer's process says about its steps: one JSON object a line."""

from __future__ import annotations

import json
import resource
import time
from typing import Any, TextIO

import torch

from albor.bench.profile import StepProfile
from albor.memory.process import peak_resident

LOG_EVERY = 10  # steps between two looks at the loss, in every system

Value = torch.Tensor | float


class Recorder:
    """Times whole optimizer steps and keeps their losses, without waiting for the device at each.

    On CUDA an event marks the end of each step in the stream's own time, so that what a system leaves idle on
    the device counts, and what it hides does not. Losses stay on the device until they are looked at, every
    LOG_EVERY steps, as a training script would.
    """

    def __init__(self, device: str, out: TextIO, profiled_step: int | None = None):
        """`profiled_step` counts from 1; of that step the profiler says where its time went."""
        self._cuda = device == "cuda"
        self._out = out
        self._losses: list[Value] = []  # of the current step's micro-batches
        self._pending: list[tuple[list[Value], Value | None, Any]] = []
        self._steps = 0
        self._last: Any = None
        self._profiled_step = profiled_step
        self._profile = StepProfile(device) if profiled_step is not None else None

    def note(self, **facts: Any) -> None:
        """Something that a reader of the results should know about how this system ran."""
        self.emit("note", facts=facts)

    def begin(self) -> None:
        """Call this right before the first step."""
        self._last = self._mark()

    def add_loss(self, loss: Value) -> None:
        """A micro-batch's share of the current step's mean loss."""
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def end_step(self, norm: Value | None = None) -> None:
        """Call this when a step has been issued, optimizer included. `norm` is the gradient's, unclipped."""
        if isinstance(norm, torch.Tensor):
            norm = norm.detach()
        self._pending.append((self._losses, norm, self._mark()))
        self._losses = []
        self._steps += 1
        if self._steps == 1 or self._steps % LOG_EVERY == 0:
            self._flush()
        if self._steps == 1:
            self.emit("first_step", at=time.time())
        if self._profile is not None and self._profiled_step is not None:
            if self._steps == self._profiled_step - 1:
                self._flush()
                self._profile.start()
            elif self._steps == self._profiled_step:
                self.emit("profile", found=self._profile.stop())

    def finish(self) -> None:
        """Call this after the last step."""
        self._flush()
        memory: dict[str, int | None] = {"max_rss": _peak_resident()}
        if self._cuda:
            memory |= {
                "max_allocated": torch.cuda.max_memory_allocated(),
                "max_reserved": torch.cuda.max_memory_reserved(),
            }
        self.emit("done", memory=memory)

    def emit(self, event: str, **values: Any) -> None:
        """Writes one line."""
        print(json.dumps({"event": event, **values}), file=self._out, flush=True)

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _flush(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        for losses, norm, mark in self._pending:
            seconds = self._last.elapsed_time(mark) / 1e3 if self._cuda else mark - self._last
            self._last = mark
            total = sum(float(loss) for loss in losses)
            self.emit("step", loss=total, norm=None if norm is None else float(norm), seconds=seconds)
        self._pending.clear()


def _peak_resident() -> int:
    """Bytes. Without /proc by getrusage, which charges a program with what the one that started it had until
    exec: a small peer that a large process starts would be as large.
    """
    known = peak_resident().bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if known is None else known
