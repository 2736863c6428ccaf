"""One token through the whole model, in as few and as cheap calls as there can be: how a CPU writes.

A small model's matrices are read in a fraction of a millisecond, and then calls count: one of torch takes a
microsecond whatever it computes, one of NumPy a third of that. So this is the arithmetic of `Decoder._read`
for one row, by NumPy over the same memory; views that depend on the position are made once for all layers.

It computes in one thread, which NumPy's BLAS has to be told before it is loaded (`albor.cli.main`). A large
model's products are worth several threads, and torch's calls are lost in them: it goes the usual way.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from albor.memory.arena import Arena
from albor.model.parameters import BlockTensors
from albor.model.transformer import Transformer
from albor.ops.base import shaped
from albor.ops.torch_ops import TorchOps

SMALL = 32 * 2**20  # bytes of weights, up to which this is the faster way


class _Weights(NamedTuple):
    """One block's weights, as `BlockTensors` has them."""

    attention_norm: np.ndarray
    qkv: np.ndarray
    attention_out: np.ndarray
    mlp_norm: np.ndarray
    gate_up: np.ndarray
    down: np.ndarray

    @classmethod
    def of(cls, block: BlockTensors) -> _Weights:
        return cls(*(getattr(block, name).numpy() for name in cls._fields))


def suits(arena: Arena) -> bool:
    """Whether the model in `arena` is one for this way: small, on the CPU, in a dtype that NumPy has."""
    weights = arena["weights"]
    wide = weights.dtype in (torch.float32, torch.float64)
    return arena.device.type == "cpu" and wide and weights.nbytes <= SMALL


class SingleToken:
    """Reads one token behind those that are in the cache, over the buffers of the plan's `sample` phase."""

    def __init__(self, model: Transformer, arena: Arena):
        architecture, ops = model.architecture, model.ops
        assert isinstance(ops, TorchOps), "a GPU has another way to read one token"
        heads, kv_heads = architecture.num_attention_heads, architecture.num_key_value_heads
        head_dim, rotated = architecture.head_dim, heads + kv_heads
        self._eps, self._width, self._scale = (
            architecture.rms_norm_eps,
            architecture.hidden_size,
            head_dim**-0.5,
        )
        self._grouped = kv_heads, heads // kv_heads
        self._blocks = [_Weights.of(block.weights) for block in model.blocks]
        self._embedding = model.embedding.weight.numpy()
        self._head_norm, self._head = model.head.norm.numpy(), model.head.tokens.numpy()
        self._output_multiplier = model.head.output_multiplier

        buffers = ("stream", "normed", "delta", "qkv", "attention_out", "gate_up", "hidden")
        self._stream, self._normed, self._delta, self._qkv, self._mixed, self._gate_up, self._hidden = (
            arena[f"sample.{name}"][0].numpy() for name in buffers
        )
        self._logits = arena["sample.logits"][0]
        self._logits_array = self._logits.numpy()
        self._gate, self._up = np.split(self._gate_up, 2)
        self._mixed_heads = self._mixed.reshape(*self._grouped, head_dim)
        self._scores = arena["sample.scores"].view(-1).numpy()

        # Queries and keys before and after the rotation; halves of a head are [:, 0] and [:, 1].
        self._before = self._qkv[: rotated * head_dim].reshape(rotated, 2, head_dim // 2)
        self._crossed = self._before[:, ::-1]
        self._after, self._turned = shaped(ops.rotated, 2, *self._before.shape).numpy()
        by_head = self._after.reshape(rotated, head_dim)
        self._query, self._key = by_head[:heads].reshape(*self._grouped, head_dim), by_head[heads:]
        self._value = self._qkv[rotated * head_dim :].reshape(kv_heads, head_dim)
        self._cos, self._sin = arena["rotary.cos"].numpy(), arena["rotary.sin"].numpy()
        self._signed_sin = np.empty((2, head_dim // 2), self._sin.dtype)

        cache = arena["sample.cache"].numpy()  # (L, 2, K, S, D)
        self._keys, self._values = cache[:, 0], cache[:, 1]
        self._keys_across = self._keys.swapaxes(2, 3)

    def read(self, token: int, position: int) -> torch.Tensor:
        """Appends `token` to the cache at `position`; returns the logits (V,) of what follows it."""
        with np.errstate(all="ignore"):  # as torch has it; who draws a token looks at the logits
            self._read(token, position)
        return self._logits

    def _read(self, token: int, position: int) -> None:
        stream, normed, delta, scores, hidden = (
            self._stream, self._normed, self._delta, self._scores, self._hidden
        )  # fmt: skip
        stop, cos = position + 1, self._cos[position]
        np.negative(self._sin[position], out=self._signed_sin[0])
        self._signed_sin[1] = self._sin[position]
        kv_heads, group = self._grouped
        weights = scores[: kv_heads * group * stop].reshape(kv_heads, group, stop)

        stream[:] = self._embedding[token]
        for w, new_key, new_value, keys, values in zip(
            self._blocks,
            self._keys[:, :, position],
            self._values[:, :, position],
            self._keys_across[..., :stop],  # (K, D, stop)
            self._values[:, :, :stop],  # (K, stop, D)
            strict=True,
        ):
            self._norm(w.attention_norm)
            np.dot(w.qkv, normed, out=self._qkv)
            np.multiply(self._before, cos, out=self._after)
            np.multiply(self._crossed, self._signed_sin, out=self._turned)
            np.add(self._after, self._turned, out=self._after)
            new_key[:] = self._key
            new_value[:] = self._value
            np.multiply(self._query, self._scale, out=self._query)
            np.matmul(self._query, keys, out=weights)
            np.subtract(weights, np.maximum.reduce(weights, -1, keepdims=True), out=weights)
            np.exp(weights, out=weights)
            np.divide(weights, np.add.reduce(weights, -1, keepdims=True), out=weights)
            np.matmul(weights, values, out=self._mixed_heads)
            np.dot(w.attention_out, self._mixed, out=delta)
            np.add(stream, delta, out=stream)

            self._norm(w.mlp_norm)
            np.dot(w.gate_up, normed, out=self._gate_up)
            np.negative(self._gate, out=hidden)  # silu(gate) = gate / (1 + exp(-gate))
            np.exp(hidden, out=hidden)
            np.add(hidden, 1, out=hidden)
            np.divide(self._gate, hidden, out=hidden)
            np.multiply(hidden, self._up, out=hidden)
            np.dot(w.down, hidden, out=delta)
            np.add(stream, delta, out=stream)
        self._norm(self._head_norm, self._output_multiplier)
        np.dot(self._head, normed, out=self._logits_array)

    def _norm(self, weight: np.ndarray, multiplier: float = 1.0) -> None:
        """normed = multiplier * stream / rms(stream) * weight."""
        rstd = (float(self._stream.dot(self._stream)) / self._width + self._eps) ** -0.5
        np.multiply(self._stream, weight, out=self._normed)
        np.multiply(self._normed, multiplier * rstd, out=self._normed)
