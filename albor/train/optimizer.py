"""AdamW over the flat buffers: fp32 master weights and moments, decay on matrices only."""

from __future__ import annotations

from albor import ops
from albor.architecture import Architecture
from albor.config import OptimizerConfig
from albor.memory.arena import Arena
from albor.model.parameters import master_weights
from albor.train.accumulator import PerBlockGradientAccumulator


class AdamW:
    """Updates every block's slice of the weights from its slice of the accumulated gradient."""

    def __init__(self, config: OptimizerConfig, model: Architecture, arena: Arena):
        self.config, self.blocks = config, model.blocks
        self.weights, self.master = arena["weights"], master_weights(arena)
        self.first, self.second = arena["moments.first"], arena["moments.second"]

    def update(
        self, accumulator: PerBlockGradientAccumulator, lr: float, update: int, gradient_scale: float
    ) -> None:
        """Update number `update`, counted from 1, by the summed gradient times `gradient_scale`."""
        for block in self.blocks:
            gradient = accumulator.gradient(block)
            for start, end, decay in (
                (block.start, block.matrices_end, self.config.weight_decay),
                (block.matrices_end, block.end, 0.0),
            ):
                if start == end:
                    continue
                ops.adamw(
                    self.weights[start:end],
                    self.master[start:end],
                    gradient[start - block.start : end - block.start],
                    self.first[start:end],
                    self.second[start:end],
                    lr=lr,
                    betas=self.config.betas,
                    eps=self.config.eps,
                    weight_decay=decay,
                    step=update,
                    gradient_scale=gradient_scale,
                )
