"""One token through the whole model, in as few calls as there can be: how a CPU writes.

A small model's matrices are read in a fraction of a millisecond, and a call of torch costs a microsecond
whatever it computes. So this is the arithmetic of `Decoder._read` for one row with the calls left out that a
row does not need: a norm's 1 / rms is a factor of the matrix product behind it, a projection back into the
residual stream adds to it in place, and views that depend on the position are made once for all layers.
"""

from __future__ import annotations

import torch

from albor.memory.arena import Arena
from albor.model.transformer import Transformer
from albor.ops.base import shaped
from albor.ops.torch_ops import TorchOps

aten = torch.ops.aten


class SingleToken:
    """Reads one token behind those that are in the cache, over the buffers of the plan's `sample` phase."""

    def __init__(self, model: Transformer, arena: Arena):
        architecture, ops = model.architecture, model.ops
        assert isinstance(ops, TorchOps), "a GPU has another way to read one token"
        heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
        head_dim = architecture.head_dim
        group, rotated_size = heads // kv_heads, (heads + kv_heads) * head_dim
        self.model, self._eps, self._scale = model, architecture.rms_norm_eps, head_dim**-0.5
        self._width, self._queries = architecture.hidden_size, (kv_heads, group)
        self._cos, self._sin = arena["rotary.cos"], arena["rotary.sin"]

        buffers = ("stream", "normed", "qkv", "attention_out", "gate_up", "hidden", "logits")
        self._stream, self._normed, self._qkv, mixed, self._gate_up, self._hidden, self._logits = (
            arena[f"sample.{name}"][0] for name in buffers
        )
        self._mixed = mixed, mixed.view(kv_heads, group, head_dim)
        self._gate, self._up = self._gate_up.chunk(2)
        # Queries and keys before and after the rotation: halves of a head are (..., 0, :) and (..., 1, :).
        before = self._qkv[:rotated_size].view(-1, 2, head_dim // 2)
        after = shaped(ops.rotated, *before.shape)
        self._before, self._after = (before, *before.unbind(1)), (after, *after.unbind(1))
        by_head = after.view(heads + kv_heads, head_dim)
        self._query, self._key = by_head[:heads].view(kv_heads, group, head_dim), by_head[heads:]
        self._value = self._qkv[rotated_size:].view(kv_heads, head_dim)

        cache = arena["sample.cache"]  # (L, 2, K, S, D)
        self._keys, self._values = cache.unbind(1)
        self._keys_across = self._keys.transpose(2, 3)
        self._scores = arena["sample.scores"].view(-1)

    @torch.inference_mode()  # a call is cheaper where nobody will ask for a gradient
    def read(self, token: int, position: int) -> torch.Tensor:
        """Appends `token` to the cache at `position`; returns the logits (V,) of what follows it."""
        stream, normed, qkv = self._stream, self._normed, self._qkv
        stop = position + 1
        cos, sin = self._cos[position], self._sin[position]
        before, first, second = self._before
        after, turned_first, turned_second = self._after
        mixed, mixed_heads = self._mixed
        weights = shaped(self._scores, *self._queries, stop)

        stream.copy_(self.model.embedding.weight[token])
        for block, new_key, new_value, keys, values in zip(
            self.model.blocks,
            self._keys[:, :, position].unbind(),
            self._values[:, :, position].unbind(),
            self._keys_across[..., :stop].unbind(),  # (K, D, stop)
            self._values[:, :, :stop].unbind(),  # (K, stop, D)
            strict=True,
        ):
            w = block.weights
            rstd = self._norm(w.attention_norm)
            torch.addmv(qkv, w.qkv, normed, beta=0, alpha=rstd, out=qkv)
            torch.mul(before, cos, out=after)
            turned_first.addcmul_(second, sin, value=-1)
            turned_second.addcmul_(first, sin)
            new_key.copy_(self._key)
            new_value.copy_(self._value)
            torch.baddbmm(weights, self._query, keys, beta=0, alpha=self._scale, out=weights)
            torch.softmax(weights, -1, out=weights)
            torch.bmm(weights, values, out=mixed_heads)
            stream.addmv_(w.attention_out, mixed)

            rstd = self._norm(w.mlp_norm)
            torch.addmv(self._gate_up, w.gate_up, normed, beta=0, alpha=rstd, out=self._gate_up)
            aten.silu.out(self._gate, out=self._hidden)
            self._hidden.mul_(self._up)
            stream.addmv_(w.down, self._hidden)
        head = self.model.head
        rstd = self._norm(head.norm)
        return torch.addmv(self._logits, head.tokens, normed, beta=0, alpha=rstd, out=self._logits)

    def _norm(self, weight: torch.Tensor) -> float:
        """normed = stream * weight; returns 1 / rms(stream), by which it is still to be multiplied."""
        torch.mul(self._stream, weight, out=self._normed)
        return (float(self._stream.dot(self._stream)) / self._width + self._eps) ** -0.5
