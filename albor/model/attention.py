"""The attention half of a block: delta = out(attention(rotary(qkv(norm(x)))))."""

from __future__ import annotations

import torch

from albor import ops
from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.activations import Activations, BlockGradients
from albor.model.parameters import BlockTensors


class Attention:
    """Grouped-query causal attention with rotary positions. It has no state of its own between calls."""

    def __init__(self, model: Architecture, length: int, arena: Arena, work: ops.Workspace):
        self.eps = model.rms_norm_eps
        self.rotated_heads = model.num_attention_heads + model.num_key_value_heads
        self.kv_heads, self.head_dim, self.length = model.num_key_value_heads, model.head_dim, length
        self.cos, self.sin, self.work = arena["rotary.cos"], arena["rotary.sin"], work

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, w: BlockTensors, a: Activations
    ) -> None:
        """a.input = residual + delta, and a.delta = what attention adds to it. residual, delta (N, C)."""
        ops.rmsnorm_forward(
            residual,
            delta,
            w.attention_norm,
            self.eps,
            a.input,
            a.attention_normed,
            a.attention_rstd,
            self.work,
        )
        ops.linear_forward(a.attention_normed, w.qkv, a.qkv)
        ops.rotary(a.qkv, self.cos, self.sin, self.rotated_heads, self.length, self.work)
        ops.attention_forward(a.qkv, a.attention_out, self.length, self.kv_heads, self.head_dim, self.work)
        ops.linear_forward(a.attention_out, w.attention_out, a.delta)

    def backward(
        self, d_x: torch.Tensor, w: BlockTensors, a: Activations, d: BlockGradients, d_w: BlockTensors
    ) -> None:
        """d_x (N, C): the gradient after the attention's addition on entry, before it on return."""
        ops.linear_backward_input(d_x, w.attention_out, d.attention)
        ops.linear_backward_weight(d_x, a.attention_out, d_w.attention_out)
        ops.attention_backward(
            d.attention, a.qkv, d.qkv, self.length, self.kv_heads, self.head_dim, self.work
        )
        ops.rotary(d.qkv, self.cos, self.sin, self.rotated_heads, self.length, self.work, inverse=True)
        ops.linear_backward_input(d.qkv, w.qkv, d.normed)
        ops.linear_backward_weight(d.qkv, a.attention_normed, d_w.qkv)
        ops.rmsnorm_backward(
            d.normed,
            a.input,
            a.attention_rstd,
            w.attention_norm,
            d_x,
            d_w.attention_norm,
            self.work,
            add=True,
        )
