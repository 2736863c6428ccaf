"""Streams as a GPU has them, for tests on a CPU: what nobody waits for comes late, and that shows."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch

from albor.train.streams import Event, Streams


class LateStreams(Streams):
    """Streams as a GPU has them: copies happen later, each on a thread of its own stream, in order.

    Compute is the calling thread's. What it must wait for it waits for here, which is all that the order of
    the trainer's calls can be held against: a missing wait lets a slow copy see, or destroy, other data.
    """

    def __init__(self, delay: float):
        self.delay, self.copies = delay, 0
        self._out, self._in = ThreadPoolExecutor(1), ThreadPoolExecutor(1)

    def computing(self) -> Any:
        return nullcontext()

    def mark(self) -> Event:
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        return self._out.submit(self._copy, target, source)

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        return self._in.submit(self._copy, target, source, after)

    def compute_waits(self, events: Iterable[Event]) -> None:
        for event in events:
            event.result()

    def host_waits(self, event: Event) -> None:
        event.result()

    def _copy(self, target: torch.Tensor, source: torch.Tensor, after: Event | None = None) -> None:
        if after is not None:
            after.result()
        time.sleep(self.delay)
        self.copies += 1
        target.copy_(source)
