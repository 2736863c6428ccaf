"""The feed-forward half of a block: delta = down(swiglu(gate_up(norm(x))))."""

from __future__ import annotations

import torch

from albor.architecture import Architecture
from albor.model.activations import Activations, BlockGradients
from albor.model.parameters import BlockTensors
from albor.ops import Ops


class FeedForward:
    """SwiGLU, gate and up packed into one GEMM. It has no state of its own between calls."""

    def __init__(self, model: Architecture, ops: Ops):
        self.eps, self.ops = model.rms_norm_eps, ops

    def forward_to_gate_up(self, w: BlockTensors, a: Activations) -> None:
        """a.middle = a.input + a.delta, and everything up to the gate_up GEMM: what the backward reads."""
        self.ops.rmsnorm_forward(a.input, a.delta, w.mlp_norm, self.eps, a.middle, a.mlp_normed, a.mlp_rstd)
        self.ops.linear_forward(a.mlp_normed, w.gate_up, a.gate_up)

    def forward(self, w: BlockTensors, a: Activations) -> None:
        """a.middle = a.input + a.delta, and then a.delta = what the feed-forward layer adds to it."""
        self.forward_to_gate_up(w, a)
        self.ops.swiglu_forward(a.gate_up, a.hidden)
        self.ops.linear_forward(a.hidden, w.down, a.delta)

    def backward(
        self,
        d_x: torch.Tensor,
        w: BlockTensors,
        a: Activations,
        d: BlockGradients,
        d_w: BlockTensors,
        *,
        add: bool,
    ) -> None:
        """d_x (N, C): the gradient after the layer's addition on entry, before it on return. With `add`, the
        weights' gradients are added to d_w.
        """
        self.ops.linear_backward_input(d_x, w.down, d.hidden)
        self.ops.swiglu_backward(d.hidden, a.gate_up, a.hidden)  # a.gate_up becomes its gradient
        self.ops.linear_backward_weight(d_x, a.hidden, d_w.down, add=add)
        self.ops.linear_backward_input(a.gate_up, w.gate_up, d.normed)
        self.ops.linear_backward_weight(a.gate_up, a.mlp_normed, d_w.gate_up, add=add)
        self.ops.rmsnorm_backward(
            d.normed, a.middle, a.mlp_rstd, w.mlp_norm, d_x, d_w.mlp_norm, residual=True, add=add
        )
