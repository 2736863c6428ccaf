"""What runs beside the compute stream: gradients on their way to host memory and back.

The trainer says what depends on what; here that becomes CUDA streams and events. On a device without streams
the same calls happen at once, in the order in which they are made.
"""

from __future__ import annotations

import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Event = Any  # what marks a point in a stream's work


class Streams(ABC):
    """One stream for compute, one for what leaves the device, one for what comes back."""

    @abstractmethod
    def computing(self) -> Any:
        """A context in which operations go to the compute stream."""

    @abstractmethod
    def mark(self) -> Event:
        """The point that the compute stream's work has reached when all that was asked so far is done."""

    @abstractmethod
    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        """Copies from the device to page-locked host memory after all compute so far; returns its end."""

    @abstractmethod
    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        """Copies from page-locked host memory to the device, not before `after`; returns its end."""

    @abstractmethod
    def compute_waits(self, events: Iterable[Event]) -> None:
        """Later compute starts after these; the host does not wait."""

    @abstractmethod
    def host_waits(self, event: Event) -> None:
        """Returns when it has happened. Other threads go on."""


class NoStreams(Streams):
    """Everything at once, in order: on the CPU, and where nothing is computed at all (device "meta")."""

    @contextmanager
    def computing(self) -> Iterator[None]:
        yield

    def mark(self) -> Event:
        return None

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        target.copy_(source)

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        target.copy_(source)

    def compute_waits(self, events: Iterable[Event]) -> None:
        pass

    def host_waits(self, event: Event) -> None:
        pass


class CudaStreams(Streams):
    """Streams and events of one CUDA device."""

    def __init__(self, device: torch.device):
        self.compute = torch.cuda.Stream(device)
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._device = device

    @contextmanager
    def computing(self) -> Iterator[None]:
        outer = torch.cuda.current_stream(self._device)
        self.compute.wait_stream(outer)
        try:
            with torch.cuda.stream(self.compute):
                yield
        finally:
            outer.wait_stream(self.compute)

    def mark(self) -> Event:
        return self.compute.record_event()

    def copy_out(self, target: torch.Tensor, source: torch.Tensor) -> Event:
        self._out.wait_event(self.mark())
        return self._copy(self._out, target, source)

    def copy_in(self, target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        self._in.wait_event(after)
        return self._copy(self._in, target, source)

    def compute_waits(self, events: Iterable[Event]) -> None:
        for event in events:
            self.compute.wait_event(event)

    def host_waits(self, event: Event) -> None:
        event.synchronize()

    def _copy(self, stream: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> Event:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        # A thread that waits for it sleeps: the cores are needed to add gradients up.
        return stream.record_event(torch.cuda.Event(blocking=True))


class Graphs:
    """Replays pieces of work as CUDA graphs: the arena's addresses and all shapes are the same each time.

    The first call of a piece runs it as it is, which compiles kernels and creates library handles; the second
    captures it. A piece inside a captured piece is part of it.
    """

    def __init__(self, stream: torch.cuda.Stream | None):
        self._stream = stream  # None: no graphs, every call runs its work
        self._seen: set[Any] = set()
        self._graphs: dict[Any, torch.cuda.CUDAGraph] = {}
        self._inside = False
        self.before_capture: Callable[[], None] | None = None  # called once, before the first capture
        # What a piece allocates for a moment it shares with the others: they never run at the same time.
        self._pool = None if stream is None else torch.cuda.graph_pool_handle()

    def run(self, key: Any, work: Callable[[], None]) -> None:
        """`work` reads and writes nothing but the arena, and calls nothing that waits for the device."""
        if self._stream is None or self._inside:
            work()
            return
        if key in self._graphs:
            self._graphs[key].replay()
            return
        self._inside = True
        try:
            if key not in self._seen:
                work()
                self._seen.add(key)
                return
            if self.before_capture is not None:
                call, self.before_capture = self.before_capture, None
                call()
            graph = torch.cuda.CUDAGraph()
            # Other threads may wait and copy meanwhile: that concerns no stream of ours.
            with (
                _without_garbage_collection(),
                torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ),
            ):
                work()
        finally:
            self._inside = False
        self._graphs[key] = graph
        graph.replay()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """An arena that is collected returns its page-locked memory, which no capture survives."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_streams(device: torch.device) -> tuple[Streams, Graphs]:
    """Streams and graphs for an arena's device."""
    if device.type != "cuda":
        return NoStreams(), Graphs(None)
    streams = CudaStreams(device)
    return streams, Graphs(streams.compute)
