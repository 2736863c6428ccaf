"""Attention through the libraries that PyTorch brings: FlashAttention-2, and cuDNN's.

They read queries, keys and values where they lie, as views of the packed projection. Their results come in
tensors of their own (`albor.memory.attention_bytes` says how large), which are copied to where the plan wants
them. Nothing waits for the device or reads a value back, so that all of it can be captured in a CUDA graph.

Shapes as in `albor.ops.base`. The operators are called below autograd and below the choice that
scaled_dot_product_attention makes between them, with signatures that PyTorch 2.11 to 2.13 share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from albor.memory.attention import AttentionChoice

aten = torch.ops.aten


class LibraryAttention(ABC):
    """A backend for `Ops.attention_forward` and `Ops.attention_backward`, without documents."""

    @abstractmethod
    def forward(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        """As `Ops.attention_forward`; lse (B, H, T) fp32."""

    @abstractmethod
    def backward(
        self,
        d_out: torch.Tensor,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_qkv: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        """As `Ops.attention_backward`, after a forward."""


def make_library_attention(choice: AttentionChoice) -> LibraryAttention | None:
    """None where attention is no library's."""
    if choice.backend == "flash":
        return FlashAttention(choice.deterministic)
    return CudnnAttention() if choice.backend == "cudnn" else None


class FlashAttention(LibraryAttention):
    """FlashAttention-2 (Dao 2023, arXiv:2307.08691)."""

    def __init__(self, deterministic: bool):
        self._deterministic = deterministic

    def forward(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        query, key, value = _views(qkv, length, kv_heads, head_dim)
        result, logarithms, *_ = aten._flash_attention_forward.default(
            query, key, value, None, None, length, length, 0.0, True, False, scale=head_dim**-0.5
        )
        out.view(query.shape).copy_(result)
        lse.copy_(logarithms)

    def backward(
        self,
        d_out: torch.Tensor,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_qkv: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        query, key, value = _views(qkv, length, kv_heads, head_dim)
        # The state of dropout's random generator, which nothing reads where nothing is dropped.
        state = torch.empty(2, dtype=torch.uint64, device=qkv.device)
        unused = torch.empty((), dtype=torch.uint64, device=qkv.device)
        with deterministic_algorithms(self._deterministic):
            gradients = aten._flash_attention_backward.default(
                d_out.view(query.shape), query, key, value, out.view(query.shape), lse,
                None, None, length, length, 0.0, True, state, unused, scale=head_dim**-0.5,
            )  # fmt: skip
        torch.cat(gradients, 2, out=_heads(d_qkv, length, head_dim))


class CudnnAttention(LibraryAttention):
    """cuDNN's fused attention. PyTorch has no way to ask for its deterministic backward (pytorch #182551)."""

    def __init__(self) -> None:
        # (B, H, T, 1), or without the 1: the backward wants it as this PyTorch's forward gave it.
        self._lse_shape: torch.Size | None = None

    def forward(
        self,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        query, key, value = (part.transpose(1, 2) for part in _views(qkv, length, kv_heads, head_dim))
        result, logarithms, *_ = aten._scaled_dot_product_cudnn_attention.default(
            query, key, value, None, True, 0.0, True, False, scale=head_dim**-0.5
        )
        _heads(out, length, head_dim).copy_(result.transpose(1, 2))
        lse.copy_(logarithms.view(lse.shape))
        self._lse_shape = logarithms.shape

    def backward(
        self,
        d_out: torch.Tensor,
        qkv: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_qkv: torch.Tensor,
        length: int,
        kv_heads: int,
        head_dim: int,
    ) -> None:
        assert self._lse_shape is not None, "a backward follows a forward"
        query, key, value = (part.transpose(1, 2) for part in _views(qkv, length, kv_heads, head_dim))
        d_result, result = (_heads(part, length, head_dim).transpose(1, 2) for part in (d_out, out))
        # Seed and offset of dropout, which nothing reads where nothing is dropped.
        seed = torch.empty((), dtype=torch.int64, device=qkv.device)
        gradients = aten._scaled_dot_product_cudnn_attention_backward.default(
            d_result, query, key, value, result, lse.view(self._lse_shape), seed, seed,
            None, None, None, length, length, 0.0, True, scale=head_dim**-0.5,
        )  # fmt: skip
        torch.cat([part.transpose(1, 2) for part in gradients], 2, out=_heads(d_qkv, length, head_dim))


def _heads(packed: torch.Tensor, length: int, head_dim: int) -> torch.Tensor:
    """(N, heads * D) as (B, T, heads, D)."""
    return packed.view(packed.shape[0] // length, length, -1, head_dim)


def _views(qkv: torch.Tensor, length: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Queries (B, T, H, D), keys and values (B, T, K, D), where they lie."""
    heads = _heads(qkv, length, head_dim)
    return heads.split((heads.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """With `enabled`, torch.use_deterministic_algorithms for what is called inside: flash's backward has no
    other switch.

    set_deterministic_debug_mode sets the same flag, and does not import torch.compile's configuration, as the
    other does for its own sake. Uninitialised memory is not filled, which would be one more pass over each
    result.
    """
    if not enabled:
        yield
        return
    filling: Any = torch.utils.deterministic
    before = torch.get_deterministic_debug_mode(), filling.fill_uninitialized_memory
    try:
        torch.set_deterministic_debug_mode("error")
        filling.fill_uninitialized_memory = False
        yield
    finally:
        torch.set_deterministic_debug_mode(before[0])
        filling.fill_uninitialized_memory = before[1]
