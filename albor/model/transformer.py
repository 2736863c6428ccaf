"""The parts of the model, built over one arena. The order in which they run is in `albor.train.step`."""

from __future__ import annotations

import torch

from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.activations import Activations, BlockGradients
from albor.model.attention import Attention
from albor.model.block import Block
from albor.model.embedding import Embedding
from albor.model.feed_forward import FeedForward
from albor.model.head import Head
from albor.ops import make_ops, rotary_tables


class Transformer:
    """Embedding, blocks and head as views over `arena`; weights live nowhere else."""

    def __init__(
        self,
        model: Architecture,
        arena: Arena,
        sequence_length: int,
        recompute: str = "none",
        loss_terms: dict[str, float] | None = None,
    ):
        """`loss_terms` are the keyword arguments of `Ops.cross_entropy` that training adds."""
        self.architecture, self.arena = model, arena
        self.ops = make_ops(arena)
        rotary_tables(model.rope_theta, arena["rotary.cos"], arena["rotary.sin"])
        self.trains = "backward.d_x" in arena
        self.embedding = Embedding(model, arena, self.ops)
        self.head = Head(model, arena, self.ops, loss_terms or {})
        attention = Attention(model, sequence_length, arena, self.ops)
        feed_forward = FeedForward(model, self.ops)
        self.blocks = [
            Block(layer, model, arena, attention, feed_forward, recompute, trains=self.trains)
            for layer in range(model.num_hidden_layers)
        ]
        self.evaluation = Activations.shared(arena, "evaluate") if "evaluate.input" in arena else None
        self.gradients = BlockGradients.from_arena(arena) if self.trains else None

    def losses(self, tokens: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor) -> None:
        """Per-token losses (N,) without a backward: every block runs through one set of activations.

        tokens, targets (N,) int64, with N as planned for evaluation; a target of IGNORED_TARGET has loss 0.
        """
        a = self.evaluation
        assert a is not None, "the plan has no phase for evaluation"
        self.arena.enter("evaluate")
        self.embedding.forward(tokens, a.input)
        residual, delta = a.input, None
        for block in self.blocks:
            residual, delta = block.forward(residual, delta, a)
        assert delta is not None
        self.head.losses(residual, delta, targets, losses)
