"""The output head: final norm, projection to the vocabulary and cross-entropy, a chunk of tokens at a time.

Logits exist for one chunk only: with a vocabulary of 32,768 and 2,048 x 8 tokens they would be 2.1 GB in
fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.parameters import view
from albor.ops import Ops


class HeadTensors(NamedTuple):
    """The head's weights, or their gradients."""

    norm: torch.Tensor  # (C,)
    tokens: torch.Tensor  # (V, C); the embedding's where it is tied


class Head:
    """Final norm and (tied or own) projection, over the arena's buffers."""

    def __init__(self, model: Architecture, arena: Arena, ops: Ops, loss_terms: dict[str, float]):
        self.arena, self.ops, self.eps, self.loss_terms = arena, ops, model.rms_norm_eps, loss_terms
        table = {p.name: p for p in model.parameters}
        self.norm = view(arena["weights"], table["head.norm"])
        self.tied = model.tie_word_embeddings
        self.tokens = view(
            arena["weights"], table["embedding.tokens" if self.tied else "head.tokens"]
        )  # (V, C)
        self.output_multiplier = model.width_scale
        self._table, self._start = table, min(p.offset for p in model.parameters if p.block == "head")

    def gradient_views(self, head: torch.Tensor, embedding: torch.Tensor) -> HeadTensors:
        """The gradients of what the head reads, in the flat gradient buffers of these two blocks."""
        norm = view(head, self._table["head.norm"], self._start)
        if self.tied:
            return HeadTensors(norm, view(embedding, self._table["embedding.tokens"]))
        return HeadTensors(norm, view(head, self._table["head.tokens"], self._start))

    def project(self, normed: torch.Tensor, logits: torch.Tensor) -> None:
        """logits (n, V) of normed (n, C), the output of the final norm."""
        self.ops.linear_forward(normed, self.tokens, logits, scale=self.output_multiplier)

    def forward_backward(
        self,
        residual: torch.Tensor,
        delta: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        d_x: torch.Tensor,
        d_weights: HeadTensors,
        scale: torch.Tensor,
        *,
        add: bool,
    ) -> None:
        """losses (N,), and scale (1,) * the gradient of their sum: d_x (N, C) and the head's weights', which
        replace what d_weights holds, or with `add` are added to it.

        residual, delta (N, C) as a block returns them; targets (N,).
        """
        arena = self.arena
        x, normed, rstd = arena["head.input"], arena["head.normed"], arena["head.rstd"]
        d_normed, multiplier = arena["head.d_normed"], self.output_multiplier
        self.ops.rmsnorm_forward(residual, delta, self.norm, self.eps, x, normed, rstd)
        for rows, logits in self._losses(normed, targets, losses, "head", scale):
            self.ops.linear_backward_input(logits, self.tokens, d_normed[rows], scale=multiplier)
            self.ops.linear_backward_weight(
                logits, normed[rows], d_weights.tokens, add=add or rows.start > 0, scale=multiplier
            )
        self.ops.rmsnorm_backward(d_normed, x, rstd, self.norm, d_x, d_weights.norm, residual=False, add=add)

    def losses(
        self, residual: torch.Tensor, delta: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor
    ) -> None:
        """losses (N,) alone, in the evaluation's buffers."""
        x, normed, rstd = (self.arena[f"evaluate.{name}"] for name in ("input", "mlp_normed", "mlp_rstd"))
        self.ops.rmsnorm_forward(residual, delta, self.norm, self.eps, x, normed, rstd)
        for _ in self._losses(normed, targets, losses, "evaluate", None):
            pass

    def _losses(
        self,
        normed: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        phase: str,
        scale: torch.Tensor | None,
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
            self.project(normed[rows], logits)
            wide = None if wide_buffer is None else wide_buffer[:count]
            terms = {} if scale is None else self.loss_terms  # evaluation measures plain cross-entropy
            self.ops.cross_entropy(logits, targets[rows], losses[rows], wide, scale, **terms)
            yield rows, logits
