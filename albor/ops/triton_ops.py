"""The operations through the project's Triton kernels: what runs on CUDA, with nothing in between.

No call waits for the device or reads a value back, and none allocates but for a library's attention, where
the plan has one: so all of them can be captured in a CUDA graph. What changes between two replays comes from
device buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from albor.kernels import adamw, attention, cross_entropy, embedding, reduce, rmsnorm, rotary, swiglu
from albor.memory.arena import Arena
from albor.ops.base import Documents, Ops, UpdateScalars
from albor.ops.library_attention import LibraryAttention, make_library_attention


@dataclass
class TritonOps(Ops):
    """The kernels and their scratch."""

    norm_partials: torch.Tensor | None  # (NORM_PARTIALS, C) fp32: one row per program of RMSNorm's backward
    attention_delta: torch.Tensor | None  # (B, H, T) fp32: rowsum(out * d_out)
    library_attention: LibraryAttention | None  # None: the project's kernels do it
    update: torch.Tensor | None  # (4,) fp32: what adamw goes by
    update_seed: torch.Tensor | None  # (1,) int64

    @classmethod
    def from_arena(cls, arena: Arena) -> TritonOps:
        """The scratch buffers of a plan."""
        mask = arena.get("workspace.causal_mask")
        if mask is not None:
            mask.fill_(-math.inf).triu_(1)
        return cls(
            scores=None,  # of sampling, whose decoder sets them
            query=arena.get("workspace.query"),
            d_query=arena.get("workspace.d_query"),
            causal_mask=mask,
            norm_partials=arena.get("workspace.norm_partials"),
            attention_delta=arena.get("backward.attention_delta"),
            library_attention=make_library_attention(arena.plan.attention),
            update=arena.get("io.update"),
            update_seed=arena.get("io.update_seed"),
        )

    def embedding_forward(self, tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        embedding.forward(tokens, weight, out)

    @staticmethod
    def token_index(tokens: np.ndarray) -> dict[str, np.ndarray]:
        # NumPy sorts 16-bit integers digit by digit, twenty times as fast as wider ones.
        narrow = tokens.astype(np.uint16) if tokens.max() < 2**16 else tokens
        order = np.argsort(narrow, kind="stable")
        ordered = tokens[order]
        first = np.flatnonzero(np.diff(ordered, prepend=-1))  # of each token's segment
        padded = np.zeros_like(tokens)  # shapes are static: what is left over is empty
        padded[: first.size] = ordered[first]
        starts = np.full(tokens.size + 1, tokens.size, dtype=np.int64)
        starts[: first.size] = first
        return {"unique_tokens": padded, "segment_starts": starts, "token_order": order}

    def embedding_backward(
        self, d_out: torch.Tensor, index: Mapping[str, torch.Tensor], d_weight: torch.Tensor
    ) -> None:
        embedding.backward(
            d_out, index["unique_tokens"], index["segment_starts"], index["token_order"], d_weight
        )

    def rmsnorm_forward(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        out_sum: torch.Tensor,
        out: torch.Tensor,
        rstd: torch.Tensor,
    ) -> None:
        rmsnorm.forward(x, delta, weight, eps, out_sum, out, rstd)

    def rmsnorm_recompute(
        self, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        rmsnorm.recompute(x, rstd, weight, out)

    def rmsnorm_backward(
        self,
        d_out: torch.Tensor,
        x: torch.Tensor,
        rstd: torch.Tensor,
        weight: torch.Tensor,
        d_x: torch.Tensor,
        d_weight: torch.Tensor,
        *,
        residual: bool,
        add: bool = False,
    ) -> None:
        assert self.norm_partials is not None, "an inference plan has no backward"
        rmsnorm.backward(
            d_out, x, rstd, weight, d_x, d_weight, self.norm_partials, add=residual, accumulate=add
        )

    def rotary(
        self,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: int,
        length: int,
        *,
        inverse: bool = False,
        start: int = 0,
    ) -> None:
        rotary.rotate(qkv, cos, sin, heads, length, inverse=inverse, start=start)

    def attention_forward(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        length: int,
        kv_heads: int,
        head_dim: int,
        documents: Documents | None = None,
    ) -> None:
        assert lse is not None
        if self.library_attention is not None:
            assert documents is None, "no library keeps documents apart"
            self.library_attention.forward(qkv, out, lse, length, kv_heads, head_dim)
            return
        start = None if documents is None else documents.start
        attention.forward(qkv, out, lse, length, kv_heads, head_dim, start)

    def attention_backward(
        self,
        d_out: torch.Tensor,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        d_qkv: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
        documents: Documents | None = None,
    ) -> None:
        assert lse is not None
        if self.library_attention is not None:
            assert documents is None, "no library keeps documents apart"
            self.library_attention.backward(d_out, qkv, out, lse, d_qkv, length, kv_heads, head_dim)
            return
        assert self.attention_delta is not None, "an inference plan has no backward"
        start, end = (None, None) if documents is None else documents
        attention.backward(
            d_out, qkv, out, lse, d_qkv, self.attention_delta, length, kv_heads, head_dim, start, end
        )

    def swiglu_forward(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        swiglu.forward(gate_up, out)

    def swiglu_backward(self, d_out: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        swiglu.backward(d_out, gate_up, out)

    def cross_entropy(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        losses: torch.Tensor,
        probabilities: torch.Tensor | None,
        scale: torch.Tensor | None,
        *,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        if scale is None:
            cross_entropy.forward(logits, targets, losses, label_smoothing=label_smoothing, z_loss=z_loss)
        else:
            cross_entropy.forward_backward(
                logits, targets, losses, scale, label_smoothing=label_smoothing, z_loss=z_loss
            )

    def add_sum(self, values: torch.Tensor, total: torch.Tensor) -> None:
        reduce.add_sum(values, total)

    def begin_update(self, scalars: UpdateScalars, betas: tuple[float, float]) -> None:
        assert self.update is not None
        assert self.update_seed is not None
        values = (scalars.lr, scalars.gradient_scale, *(1 - beta**scalars.update for beta in betas))
        for slot, value in zip(self.update.unbind(), values, strict=True):
            slot.fill_(value)
        self.update_seed.fill_(scalars.seed)

    def adamw(
        self,
        weights: torch.Tensor,
        master: torch.Tensor | None,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        *,
        decayed: int,
        start: int,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        lr_scale: float = 1.0,
    ) -> None:
        assert self.update is not None
        rounds = master is None and weights.dtype == torch.bfloat16
        adamw.update(
            weights, master, gradient, first, second, self.update, decayed,
            betas=betas, eps=eps, weight_decay=weight_decay, lr_scale=lr_scale,
            seed=self.update_seed if rounds else None, start=start,
        )  # fmt: skip

    def squared_norms(
        self,
        flat: torch.Tensor,
        programs: torch.Tensor,
        firsts: torch.Tensor,
        partials: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        reduce.squared_norms(flat, programs, firsts, partials, out)
