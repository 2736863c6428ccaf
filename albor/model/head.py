"""The output head: final norm, projection to the vocabulary and cross-entropy, a chunk of tokens at a time.

Logits exist for one chunk only: with a vocabulary of 32,768 and 2,048 x 8 tokens they would be 2.1 GB in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from albor import ops
from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.parameters import view


class Head:
    """Final norm and (tied or own) projection, over the arena's buffers."""

    def __init__(self, model: Architecture, arena: Arena, work: ops.Workspace):
        self.arena, self.work, self.eps = arena, work, model.rms_norm_eps
        table = {p.name: p for p in model.parameters}
        self.norm = view(arena["weights"], table["head.norm"])
        self.tied = model.tie_word_embeddings
        self.tokens = view(
            arena["weights"], table["embedding.tokens" if self.tied else "head.tokens"]
        )  # (V, C)
        if "gradients.head" in arena:
            start = min(p.offset for p in model.parameters if p.block == "head")
            self.d_norm = view(arena["gradients.head"], table["head.norm"], start)
            if self.tied:
                self.d_tokens = view(arena["gradients.embedding"], table["embedding.tokens"])
            else:
                self.d_tokens = view(arena["gradients.head"], table["head.tokens"], start)

    def forward_backward(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        d_x: torch.Tensor,
        scale: float,
    ) -> None:
        """losses (N,), and scale * the gradient of their sum: d_x (N, C) and the head's weights'.

        residual, delta (N, C) as a block returns them; targets (N,).
        """
        arena = self.arena
        x, normed, rstd = arena["head.input"], arena["head.normed"], arena["head.rstd"]
        d_normed = arena["head.d_normed"]
        ops.rmsnorm_forward(residual, delta, self.norm, self.eps, x, normed, rstd, self.work)
        for rows, logits in self._losses(normed, targets, losses, "head", scale):
            ops.linear_backward_input(logits, self.tokens, d_normed[rows])
            ops.linear_backward_weight(logits, normed[rows], self.d_tokens, add=rows.start > 0)
        ops.rmsnorm_backward(d_normed, x, rstd, self.norm, d_x, self.d_norm, self.work, add=False)

    def losses(
        self, residual: torch.Tensor, delta: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """losses (N,) alone, in the evaluation's buffers."""
        x, normed, rstd = (self.arena[f"evaluate.{name}"] for name in ("input", "mlp_normed", "mlp_rstd"))
        ops.rmsnorm_forward(residual, delta, self.norm, self.eps, x, normed, rstd, self.work)
        for _ in self._losses(normed, targets, losses, "evaluate", None):
            pass

    def _losses(
        self,
        normed: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        phase: str,
        scale: float | None,
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Fills losses chunk by chunk, yielding each chunk's rows and its logits, which then hold their
        gradient.
        """
        logits_buffer = self.arena[f"{phase}.logits"]
        wide_name = f"{phase}.probabilities"
        wide_buffer = self.arena.get(wide_name)
        for start in range(0, normed.shape[0], logits_buffer.shape[0]):
            rows = slice(start, min(start + logits_buffer.shape[0], normed.shape[0]))
            count = rows.stop - start
            logits = logits_buffer[:count]
            ops.linear_forward(normed[rows], self.tokens, logits)
            wide = None if wide_buffer is None else wide_buffer[:count]
            ops.cross_entropy(logits, targets[rows], losses[rows], wide, scale)
            yield rows, logits
