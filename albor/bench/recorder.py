"""What a peer's process says about its steps: one JSON object a line."""

from __future__ import annotations

import json
import resource
import time
from typing import Any, TextIO

import torch

LOG_EVERY = 10  # steps between two looks at the loss, in every system


class Recorder:
    """Times whole optimizer steps and keeps their losses, without waiting for the device at each.

    On CUDA an event marks the end of each step in the stream's own time, so that what a system leaves idle on
    the device counts, and what it hides does not. Losses stay on the device until they are looked at, every
    LOG_EVERY steps, as a training script would.
    """

    def __init__(self, device: str, out: TextIO):
        self._cuda = device == "cuda"
        self._out = out
        self._losses: list[torch.Tensor | float] = []  # of the current step's micro-batches
        self._pending: list[tuple[list[torch.Tensor | float], Any]] = []
        self._steps = 0
        self._last: Any = None

    def note(self, **facts: Any) -> None:
        """Something that a reader of the results should know about how this system ran."""
        self.emit("note", facts=facts)

    def begin(self) -> None:
        """Call this right before the first step."""
        self._last = self._mark()

    def add_loss(self, loss: torch.Tensor | float) -> None:
        """A micro-batch's share of the current step's mean loss."""
        self._losses.append(loss.detach() if isinstance(loss, torch.Tensor) else loss)

    def end_step(self) -> None:
        """Call this when a step has been issued, optimizer included."""
        self._pending.append((self._losses, self._mark()))
        self._losses = []
        self._steps += 1
        if self._steps == 1 or self._steps % LOG_EVERY == 0:
            self._flush()
        if self._steps == 1:
            self.emit("first_step", at=time.time())

    def finish(self) -> None:
        """Call this after the last step."""
        self._flush()
        memory = {"max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
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
        for losses, mark in self._pending:
            seconds = self._last.elapsed_time(mark) / 1e3 if self._cuda else mark - self._last
            self._last = mark
            self.emit("step", loss=sum(float(loss) for loss in losses), seconds=seconds)
        self._pending.clear()
