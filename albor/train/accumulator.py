"""Sums gradients over micro-batches in fp32, block by block, in host memory or on the device.

A block's gradient leaves the device's block buffer as soon as its backward is done, so that only two such
buffers exist there, whatever the depth of the model.
"""

from __future__ import annotations

import math

import torch

from albor import ops
from albor.architecture import Architecture, BlockSlice
from albor.memory.arena import Arena


class PerBlockGradientAccumulator:
    """The sum of the gradients of a step's micro-batches, one slice per block."""

    def __init__(self, model: Architecture, arena: Arena):
        self.blocks = {block.name: block for block in model.blocks}
        self.sums = arena["gradients.accumulator"]  # flat, wide
        self.scratch = arena["gradients.widened"]  # where the sums are
        # On CUDA with host sums, a gradient crosses the bus through pinned memory; elsewhere it is added in
        # place.
        self.transfer = arena.get("gradients.transfer")
        self.returned = arena.get("gradients.returned")
        self.staging = arena.get("gradients.return_staging")
        # Between parameters lies alignment padding, which nobody writes: it comes along with whatever it
        # held.
        ends = (*(p.offset for p in model.parameters[1:]), model.flat_size)
        gaps = ((p.offset + p.size, end) for p, end in zip(model.parameters, ends, strict=True))
        self._padding = [self.sums[start:end] for start, end in gaps if start < end]
        self._first = True

    def begin(self) -> None:
        """Starts a step: the first gradient of each block replaces what was there."""
        self._first = True

    def end_micro_batch(self) -> None:
        """From here on, gradients are added."""
        self._first = False

    def add(self, name: str, gradient: torch.Tensor) -> None:
        """Adds block `name`'s gradient, flat, of this micro-batch; its buffer may be reused on return."""
        block = self.blocks[name]
        sums = self.sums[block.start : block.end]
        if self.transfer is not None:
            staged = self.transfer[: block.size]
            staged.copy_(gradient)  # blocks until it has arrived
            gradient = staged
        if self._first:
            sums.copy_(gradient)
        else:
            ops.accumulate(gradient, sums, self.scratch)

    def norm(self) -> float:
        """The L2 norm of the summed gradient over all parameters; comes before anything else reads the
        sums.
        """
        for padding in self._padding:
            padding.zero_()
        # Per block, then over the blocks in float64: the order of summation is fixed.
        return math.sqrt(sum(ops.norm(self.sums[b.start : b.end]) ** 2 for b in self.blocks.values()))

    def gradient(self, block: BlockSlice) -> torch.Tensor:
        """Block's summed gradient, flat and wide, where the optimizer works; valid until the next call."""
        sums = self.sums[block.start : block.end]
        if self.returned is None or self.staging is None:
            return sums
        staged, returned = self.staging[: block.size], self.returned[: block.size]
        staged.copy_(sums)
        returned.copy_(staged)
        return returned
