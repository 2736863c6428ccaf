"""Sums gradients over micro-batches in fp32, block by block, in host memory or on the device.

Backward writes each block's gradient into the buffer that `buffer` names. Between `reserve` and `add` the
buffer is backward's; after `add` it belongs to the accumulator. There are three kinds:

- on the CPU, and wherever else gradients need not travel: `HostSums` adds each buffer to the sums at once;
- on a GPU with `accumulator: gpu`: in `DeviceSums` the buffer is the sum itself, and backward adds to it;
- on a GPU with `accumulator: cpu`: in `TravellingSums` a gradient leaves for host memory while the next
  block's backward runs, or the next micro-batch's forward, and comes back, summed, for the update. On the
  device there are two block buffers, whatever the depth of the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate

import torch

from albor import ops
from albor.architecture import Architecture, BlockSlice, block_name
from albor.memory.arena import Arena
from albor.memory.plan import norm_programs
from albor.ops import Ops
from albor.train.streams import Event, Streams


class PerBlockGradientAccumulator(ABC):
    """The sum of the gradients of a step's micro-batches, one slice per block."""

    def __init__(self, model: Architecture, arena: Arena):
        self.blocks = {block.name: block for block in model.blocks}
        self.sums = arena["gradients.accumulator"]  # flat, wide
        self.segments = model.segments
        # Between parameters lies alignment padding, which nobody writes: it comes along with whatever it
        # held.
        ends = (*(p.offset for p in model.parameters[1:]), model.flat_size)
        gaps = ((p.block, p.offset + p.size, end) for p, end in zip(model.parameters, ends, strict=True))
        self._padding: dict[str, list[torch.Tensor]] = {name: [] for name in self.blocks}
        for block, start, end in gaps:
            if start < end:
                self._padding[block].append(self.sums[start:end])
        self.first = True  # in the step's first micro-batch, whose gradients replace what was there

    def begin(self, micro_batches: int) -> None:
        """Starts a step of so many micro-batches."""
        self.first = True

    def end_micro_batch(self) -> None:
        """From here on, gradients are added."""
        self.first = False

    @property
    def adds_itself(self) -> bool:
        """Whether backward is to add to its buffers, which hold the sum of earlier micro-batches."""
        return False

    @abstractmethod
    def buffer(self, name: str) -> torch.Tensor:
        """Where backward writes block `name`'s gradient: flat, of the block's size."""

    def reserve(self, name: str) -> None:  # noqa: B027 nothing to do where gradients stay
        """Backward is about to write into block `name`'s buffer."""

    def add(self, name: str) -> None:  # noqa: B027
        """Backward has written block `name`'s gradient of this micro-batch."""

    @abstractmethod
    def squared_norms(self) -> list[float] | None:
        """Of the summed gradient, one for each of the model's segments; None where they are on the device, in
        io.results[1:]. Comes before anything else reads the sums.
        """

    @abstractmethod
    def gradient(self, block: BlockSlice) -> torch.Tensor:
        """Block's summed gradient, flat and wide, where the optimizer works; valid until the next call."""

    @property
    def resident(self) -> bool:
        """Whether all gradients are where the optimizer works, so that its update is one piece of work."""
        return True

    def fetch(self) -> None:  # noqa: B027
        """What is resident is there for all that the device does after this."""

    def sum_of(self, name: str) -> torch.Tensor:
        """Block `name`'s slice of the sums."""
        block = self.blocks[name]
        return self.sums[block.start : block.end]

    def _clear_padding(self, name: str) -> None:
        for padding in self._padding[name]:
            padding.zero_()


class HostSums(PerBlockGradientAccumulator):
    """Sums beside the gradients: each buffer is added as soon as it is written."""

    def __init__(self, model: Architecture, arena: Arena):
        super().__init__(model, arena)
        self._buffers = _block_buffers(model, arena)
        self._scratch = arena["gradients.widened"].view(-1)

    def buffer(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def add(self, name: str) -> None:
        if self.first:
            self.sum_of(name).copy_(self._buffers[name])
        else:
            ops.accumulate(self._buffers[name], self.sum_of(name), self._scratch)

    def squared_norms(self) -> list[float]:
        for name in self.blocks:
            self._clear_padding(name)
        return [ops.norm(self.sums[part.start : part.end]) ** 2 for part in self.segments]

    def gradient(self, block: BlockSlice) -> torch.Tensor:
        return self.sum_of(block.name)


class DeviceSums(PerBlockGradientAccumulator):
    """Sums on the device, which backward's own kernels add to, in fp32 and before anything is rounded."""

    def __init__(self, model: Architecture, arena: Arena, operations: Ops):
        super().__init__(model, arena)
        self._ops, self._squares = operations, arena["io.results"][1:]
        self._programs, self._firsts = arena["gradients.norm_programs"], arena["gradients.norm_firsts"]
        self._partials = arena["gradients.norm_partials"]
        counts = norm_programs(model)
        self._programs.copy_(
            torch.tensor([
                (part.start, part.end, rank, count)
                for part, count in zip(self.segments, counts, strict=True)
                for rank in range(count)
            ])
        )  # fmt: skip
        self._firsts.copy_(torch.tensor([0, *accumulate(counts)]))

    @property
    def adds_itself(self) -> bool:
        return not self.first

    def buffer(self, name: str) -> torch.Tensor:
        return self.sum_of(name)

    def squared_norms(self) -> None:
        # The padding is zero since the run's beginning, for no kernel writes there.
        self._ops.squared_norms(self.sums, self._programs, self._firsts, self._partials, self._squares)

    def gradient(self, block: BlockSlice) -> torch.Tensor:
        return self.sum_of(block.name)


class TravellingSums(PerBlockGradientAccumulator):
    """Sums in host memory for a device that computes meanwhile.

    Gradients leave on a stream of their own through page-locked buffers, one event each. A thread waits for
    each event in turn, has the gradient added up by several others, and in the last micro-batch sends the sum
    back as soon as it is whole, where the plan has a place for every block.
    """

    def __init__(self, model: Architecture, arena: Arena, streams: Streams):
        super().__init__(model, arena)
        self._streams = streams
        self._buffers = _block_buffers(model, arena)
        layers = model.num_hidden_layers
        self._staging = {name: arena[f"gradients.transfer.{name}"] for name in self.blocks}
        # Blocks that use one buffer on the device are known by its name.
        self._place = {block_name(layer): f"block.{layer % 2}" for layer in range(layers)}
        self._place |= {"head": "head", "embedding": "embedding"}
        self._left: dict[str, Event] = {}  # by place: when its gradient has left the device
        self._summed: dict[str, Future[None]] = {}  # by block: when it has left the staging buffer too
        self._returned: dict[str, Event] = {}  # by block: when the sum is back on the device
        self._last_block = block_name(layers - 1)
        self._early = f"gradients.returned.{block_name(0)}" in arena
        slots = self.blocks if self._early else ("0", "1")
        self._back = {name: arena[f"gradients.returned.{name}"] for name in slots}
        self._freed: list[Event] = [None, None]  # when the update from each of two slots was done
        self._turn = 0
        self._scratch = arena["gradients.widened"].unbind()
        self._squares: dict[str, list[float]] = {}  # by block: of its segments
        self._remaining = 0
        # One that waits, and those that add; the sums' order is that of the calls of `add`.
        self._waiter = ThreadPoolExecutor(1, "gradients")
        # PyTorch would give each of them a team of threads. The setting is the thread's own, and that of
        # threads that start later.
        self._adders = ThreadPoolExecutor(
            len(self._scratch), "gradient-sums", initializer=torch.set_num_threads, initargs=(1,)
        )

    def begin(self, micro_batches: int) -> None:
        super().begin(micro_batches)
        self._remaining = micro_batches
        self._squares.clear()
        self._returned.clear()
        self._freed = [None, None]

    def end_micro_batch(self) -> None:
        super().end_micro_batch()
        self._remaining -= 1

    def buffer(self, name: str) -> torch.Tensor:
        return self._buffers[name]

    def reserve(self, name: str) -> None:
        place = self._place[name]
        if place in self._left:
            self._streams.compute_waits([self._left.pop(place)])

    def add(self, name: str) -> None:
        if name in self._summed:
            self._summed.pop(name).result()  # the host may be a micro-batch ahead of the sums, and no more
        arrived = self._streams.copy_out(self._staging[name], self._buffers[name])
        self._left[self._place[name]] = arrived
        last = self._remaining == 1
        self._summed[name] = self._waiter.submit(self._sum, name, arrived, first=self.first, last=last)

    def _sum(self, name: str, arrived: Event, *, first: bool, last: bool) -> None:
        self._streams.host_waits(arrived)
        gradient, sums = self._staging[name], self.sum_of(name)
        size = -(-sums.numel() // len(self._scratch))
        parts = [slice(start, min(start + size, sums.numel())) for start in range(0, sums.numel(), size)]

        def add_part(part: slice, scratch: torch.Tensor) -> None:
            if first:
                sums[part].copy_(gradient[part])
            else:
                ops.accumulate(gradient[part], sums[part], scratch)

        list(self._adders.map(add_part, parts, self._scratch))
        if not last:
            return
        self._clear_padding(name)
        if self._early and name != "head":
            # Until the block's backward its place was an activation's: `arrived` comes after that. The head's
            # place is free only after the last block's.
            for back in ("head", name) if name == self._last_block else (name,):
                self._returned[back] = self._streams.copy_in(self._back[back], self.sum_of(back), arrived)
        block = self.blocks[name]
        pieces = [
            (number, slice(max(part.start, own.start - block.start), min(part.stop, own.end - block.start)))
            for number, own in enumerate(s for s in self.segments if block.start <= s.start < block.end)
            for part in parts
        ]
        pieces = [(number, piece) for number, piece in pieces if piece.start < piece.stop]
        norms = self._adders.map(lambda piece: ops.norm(sums[piece[1]]), pieces)
        squares = [0.0] * (1 + pieces[-1][0])
        for (number, _), norm in zip(pieces, norms, strict=True):
            squares[number] += norm**2
        self._squares[name] = squares

    def squared_norms(self) -> list[float]:
        for future in self._summed.values():
            future.result()
        self._summed.clear()
        return [square for name in self.blocks for square in self._squares[name]]

    @property
    def resident(self) -> bool:
        return self._early

    def fetch(self) -> None:
        self._streams.compute_waits(self._returned.values())

    def gradient(self, block: BlockSlice) -> torch.Tensor:
        if self._early:
            return self._back[block.name]
        # Two slots in turn: while the optimizer reads one, the other is filled.
        slot = self._turn
        self._freed[1 - slot] = self._streams.mark()
        self._turn = 1 - slot
        after = self._freed[slot] or self._streams.mark()
        back = self._back[str(slot)][: block.size]
        self._streams.compute_waits([self._streams.copy_in(back, self.sum_of(block.name), after)])
        return back


def _block_buffers(model: Architecture, arena: Arena) -> dict[str, torch.Tensor]:
    """The flat gradient buffer of each block: two for all transformer blocks, used in turn."""
    buffers = {name: arena[f"gradients.{name}"] for name in ("head", "embedding")}
    for layer in range(model.num_hidden_layers):
        buffers[block_name(layer)] = arena[f"gradients.block.{layer % 2}"]
    return buffers


def make_accumulator(
    model: Architecture, arena: Arena, operations: Ops, streams: Streams
) -> PerBlockGradientAccumulator:
    """The accumulator that the arena's plan was made for."""
    if arena.plan.device == "cpu":
        return HostSums(model, arena)
    if arena.plan.accumulator == "gpu":
        return DeviceSums(model, arena, operations)
    return TravellingSums(model, arena, streams)
