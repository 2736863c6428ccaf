"""Token embedding: a row of the table per token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.parameters import view
from albor.ops import Ops


class Embedding:
    """The embedding table (V, C), which a tied head reads too."""

    def __init__(self, model: Architecture, arena: Arena, ops: Ops):
        self.ops = ops
        self.weight = view(arena["weights"], model.parameters[0])

    def forward(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """out (N, C) = the rows of `tokens` (N,)."""
        self.ops.embedding_forward(tokens, self.weight, out)

    def backward(
        self,
        d_x: torch.Tensor,
        index: Mapping[str, torch.Tensor],
        d_weight: torch.Tensor,
    ) -> None:
        """Adds to d_weight (V, C), which holds the head's share where it is tied and zeros where it is not.

        d_x (N, C) is used up; `index` is what `Ops.token_index` says of the batch.
        """
        self.ops.embedding_backward(d_x, index, d_weight)
