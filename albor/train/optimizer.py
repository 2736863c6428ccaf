"""AdamW over the flat buffers, decay on matrices only.

fp32 master weights and moments, or with `state_dtype: bf16` bf16 weights and moments alone, which are stored
with stochastic rounding: an update that is too small for bf16 then happens now and then, instead of never.
"""

from __future__ import annotations

from albor.architecture import Architecture
from albor.config import OptimizerConfig
from albor.memory.arena import Arena
from albor.ops import Ops
from albor.train.accumulator import PerBlockGradientAccumulator


class AdamW:
    """Updates every block's slice of the weights from its slice of the accumulated gradient."""

    def __init__(self, config: OptimizerConfig, model: Architecture, arena: Arena, operations: Ops):
        self.config, self.blocks, self.ops = config, model.blocks, operations
        self.weights, self.master = arena["weights"], arena.get("master")
        self.first, self.second = arena["moments.first"], arena["moments.second"]

    def update(self, accumulator: PerBlockGradientAccumulator) -> None:
        """One update by the summed gradient; `Ops.begin_update` has said which."""
        for block in self.blocks:
            part = slice(block.start, block.end)
            self.ops.adamw(
                self.weights[part],
                None if self.master is None else self.master[part],
                accumulator.gradient(block),
                self.first[part],
                self.second[part],
                decayed=block.matrices_end - block.start,
                start=block.start,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=self.config.weight_decay,
                lr_scale=block.lr_scale,
            )
