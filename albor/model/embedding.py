"""Token embedding: a row of the table per token."""

from __future__ import annotations

import torch

from albor import ops
from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.parameters import view


class Embedding:
    """The embedding table (V, C), which a tied head reads too."""

    def __init__(self, model: Architecture, arena: Arena, work: ops.Workspace):
        self.work = work
        self.weight = view(arena["weights"], model.parameters[0])

    def forward(self, tokens: torch.Tensor, out: torch.Tensor) -> None:
        """out (N, C) = the rows of `tokens` (N,)."""
        ops.embedding_forward(tokens, self.weight, out)

    def backward(
        self,
        d_x: torch.Tensor,
        unique_tokens: torch.Tensor,
        unique_index: torch.Tensor,
        d_weight: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        """Adds to d_weight (V, C), which holds the head's share where it is tied and zeros where it is not.

        d_x (N, C) is used up; see `ops.embedding_backward` for the rest.
        """
        ops.embedding_backward(d_x, unique_tokens, unique_index, d_weight, sums, self.work)
