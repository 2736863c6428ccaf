"""The attention half of a block: delta = out(attention(rotary(qkv(norm(x)))))."""

from __future__ import annotations

import torch

from albor.architecture import Architecture
from albor.memory.arena import Arena
from albor.model.activations import Activations, BlockGradients
from albor.model.parameters import BlockTensors
from albor.ops import Documents, Ops


class Attention:
    """Grouped-query causal attention with rotary positions. It has no state of its own between calls."""

    def __init__(self, model: Architecture, length: int, arena: Arena, ops: Ops):
        self.eps = model.rms_norm_eps
        self.rotated_heads = model.num_attention_heads + model.num_key_value_heads
        self.kv_heads, self.head_dim, self.length = model.num_key_value_heads, model.head_dim, length
        self.cos, self.sin, self.ops = arena["rotary.cos"], arena["rotary.sin"], ops
        start, end = arena.get("io.document_start"), arena.get("io.document_end")
        self._documents = None if start is None or end is None else Documents(start, end)

    def forward(
        self, residual: torch.Tensor, delta: torch.Tensor | None, w: BlockTensors, a: Activations
    ) -> None:
        """a.input = residual + delta, and a.delta = what attention adds to it. residual, delta (N, C)."""
        self.ops.rmsnorm_forward(
            residual, delta, w.attention_norm, self.eps, a.input, a.attention_normed, a.attention_rstd
        )
        self.ops.linear_forward(a.attention_normed, w.qkv, a.qkv)
        self.ops.rotary(a.qkv, self.cos, self.sin, self.rotated_heads, self.length)
        documents = self._documents_of(a.qkv)
        self.ops.attention_forward(
            a.qkv, a.attention_out, a.attention_lse, self.length, self.kv_heads, self.head_dim, documents
        )
        self.ops.linear_forward(a.attention_out, w.attention_out, a.delta)

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
        """d_x (N, C): the gradient after the attention's addition on entry, before it on return. With `add`,
        the weights' gradients are added to d_w.
        """
        self.ops.linear_backward_input(d_x, w.attention_out, d.attention)
        self.ops.linear_backward_weight(d_x, a.attention_out, d_w.attention_out, add=add)
        self.ops.attention_backward(
            d.attention, a.qkv, a.attention_out, a.attention_lse, d.qkv,
            self.length, self.kv_heads, self.head_dim, self._documents_of(d.qkv),
        )  # fmt: skip
        self.ops.rotary(d.qkv, self.cos, self.sin, self.rotated_heads, self.length, inverse=True)
        self.ops.linear_backward_input(d.qkv, w.qkv, d.normed)
        self.ops.linear_backward_weight(d.qkv, a.attention_normed, d_w.qkv, add=add)
        self.ops.rmsnorm_backward(
            d.normed, a.input, a.attention_rstd, w.attention_norm, d_x, d_w.attention_norm,
            residual=True, add=add,
        )  # fmt: skip

    def _documents_of(self, qkv: torch.Tensor) -> Documents | None:
        # An evaluation may have more rows than a step, or fewer.
        rows, both = qkv.shape[0], self._documents
        return None if both is None else Documents(both.start[:rows], both.end[:rows])
