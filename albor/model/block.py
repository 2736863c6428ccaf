"""One transformer block: x + attention(norm(x)), and then + feed_forward(norm of that)."""

from __future__ import annotations

import torch

from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.activations import Activations, BlockGradients
from albor.model.attention import Attention
from albor.model.feed_forward import FeedForward
from albor.model.parameters import BlockTensors, block_tensors


class Block:
    """Forward and backward of block `layer` over the arena's buffers.

    The residual stream travels as a pair (residual, delta) that has yet to be added: the next norm adds the
    two in the same pass in which it normalises.
    """

    def __init__(
        self,
        layer: int,
        model: Architecture,
        arena: Arena,
        attention: Attention,
        feed_forward: FeedForward,
        recompute: str,
        *,
        trains: bool,
    ):
        self.attention, self.feed_forward, self.recompute = attention, feed_forward, recompute
        self.weights = block_tensors(arena["weights"], model, layer)
        self.saved = Activations.for_layer(arena, layer, "forward") if trains else None
        self.restored = Activations.for_layer(arena, layer, "backward") if trains else None

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, activations: Activations | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair (residual, delta) after the block, (N, C) each; fills `activations` (default: the kept
        ones).

        A first block takes its own input buffer as `residual`, and no delta.
        """
        a = activations or self.saved
        assert a is not None, "an inference plan keeps nothing: pass the activations to fill"
        self.attention.forward(residual, delta, self.weights, a)
        self.feed_forward.forward(self.weights, a)
        return a.middle, a.delta

    @property
    def output(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a training forward leaves the pair (residual, delta)."""
        assert self.saved is not None, "an inference plan keeps nothing"
        return self.saved.middle, self.saved.delta

    def backward(
        self, d_x: torch.Tensor, d: BlockGradients, d_weights: BlockTensors, *, add: bool = False
    ) -> None:
        """d_x (N, C): the gradient of the block's output on entry, of its input on return; fills d_weights,
        or with `add` adds to them.
        """
        a, w, ops = self.restored, self.weights, self.feed_forward.ops
        assert a is not None, "an inference plan has no backward"
        if self.recompute == "block":
            self.attention.forward(a.input, None, w, a)
            self.feed_forward.forward_to_gate_up(w, a)
        elif self.recompute == "cheap":
            ops.rmsnorm_recompute(a.middle, a.mlp_rstd, w.mlp_norm, a.mlp_normed)
            ops.rmsnorm_recompute(a.input, a.attention_rstd, w.attention_norm, a.attention_normed)
        self.feed_forward.backward(d_x, w, a, d, d_weights, add=add)
        self.attention.backward(d_x, w, a, d, d_weights, add=add)
