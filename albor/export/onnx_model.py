"""The model that is exported to ONNX: one nn.Module, with the cache of keys and values as inputs and outputs.

It is written for the graph that comes of it. Matrices lie as (in, out), so that each projection is one MatMul
over an initializer, which is what quantisers look for; keys and values are not repeated for the queries that
share them; norms, rotary positions and the softmax are computed in fp32 whatever the weights are in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from albor.architecture import Architecture

Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, (B, K, S, D) each


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) of x, in its dtype."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Matrix(nn.Module):
    """x @ weight, which is (in, out)."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, out) of (B, T, in)."""
        return x @ self.weight


class Table(nn.Module):
    """The rows of `weight` that ids ask for; an id that it has no row for is an error in every runtime."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(B, T, columns) of ids (B, T)."""
        return functional.embedding(ids, self.weight)


class Attention(nn.Module):
    """Grouped-query attention over the cache and the new tokens."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        width, self.head_dim = model.hidden_size, model.head_dim
        self.key_heads = model.num_key_value_heads
        self.group = model.num_attention_heads // self.key_heads
        self.q_proj = Matrix(width, model.num_attention_heads * self.head_dim, dtype)
        self.k_proj = Matrix(width, self.key_heads * self.head_dim, dtype)
        self.v_proj = Matrix(width, self.key_heads * self.head_dim, dtype)
        self.o_proj = Matrix(model.num_attention_heads * self.head_dim, width, dtype)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """The output (B, T, C), and the cache (B, K, S, D) with the new tokens behind the past ones.

        cos and sin are (B, 1, 1, T, D/2); seen (B, 1, 1, T, S) says which keys a query sees.
        """
        queries = (self.key_heads, self.group, self.head_dim)
        # (B, K, G, T, D): the G queries that share a key stand together.
        q = rotate(self.q_proj(x).unflatten(-1, queries).permute(0, 2, 3, 1, 4), cos, sin)
        keys = (self.key_heads, 1, self.head_dim)
        k = rotate(self.k_proj(x).unflatten(-1, keys).permute(0, 2, 3, 1, 4), cos, sin).squeeze(2)
        v = self.v_proj(x).unflatten(-1, (self.key_heads, self.head_dim)).transpose(1, 2)
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        scores = (q * self.head_dim**-0.5) @ k.unsqueeze(2).transpose(3, 4)  # (B, K, G, T, S)
        # The lowest number instead of -inf: a padding token sees nothing, and its softmax must not be NaN.
        scores = torch.where(seen, scores.float(), torch.finfo(torch.float32).min)
        mixed = scores.softmax(-1).to(v.dtype) @ v.unsqueeze(2)
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).flatten(2)), (k, v)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        self.gate_proj = Matrix(model.hidden_size, model.intermediate_size, dtype)
        self.up_proj = Matrix(model.hidden_size, model.intermediate_size, dtype)
        self.down_proj = Matrix(model.intermediate_size, model.hidden_size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) of x."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block: x + attention(norm(x)), and x + feed_forward(norm(x)) of that."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        self.input_layernorm = Norm(model.hidden_size, model.rms_norm_eps, dtype)
        self.self_attn = Attention(model, dtype)
        self.post_attention_layernorm = Norm(model.hidden_size, model.rms_norm_eps, dtype)
        self.mlp = FeedForward(model, dtype)

    def forward(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, seen: torch.Tensor, past: Cache
    ) -> tuple[torch.Tensor, Cache]:
        """See `Attention`."""
        mixed, present = self.self_attn(self.input_layernorm(x), cos, sin, seen, past)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Body(nn.Module):
    """What the Hugging Face layout calls `model`: its parameters have the names of that layout."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        self.embed_tokens = Table(model.vocab_size, model.hidden_size, dtype)
        self.layers = nn.ModuleList(Layer(model, dtype) for _ in range(model.num_hidden_layers))
        self.norm = Norm(model.hidden_size, model.rms_norm_eps, dtype)


class ExportedModel(nn.Module):
    """Tokens and cache in, logits and cache out. Parameters are not initialised: only the graph is used."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        self.model = Body(model, dtype)
        self.lm_head = (
            None if model.tie_word_embeddings else Matrix(model.hidden_size, model.vocab_size, dtype)
        )
        positions, half = model.max_position_embeddings, model.head_dim // 2
        self.rotary_cos = Table(positions, half, torch.float32)
        self.rotary_sin = Table(positions, half, torch.float32)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: Sequence[Cache],
    ) -> tuple[torch.Tensor, ...]:
        """Logits (B, T, V) in fp32, then keys and values of each layer, (B, K, S, D).

        input_ids and position_ids are (B, T); attention_mask (B, S) is 0 where there is padding, over past
        and new tokens; the past has S - T of them.
        """
        cos, sin = (
            table(position_ids).unsqueeze(1).unsqueeze(1) for table in (self.rotary_cos, self.rotary_sin)
        )
        seen = visible(input_ids.shape[1], attention_mask).unsqueeze(1).unsqueeze(1)
        x, present = self.model.embed_tokens(input_ids), list[torch.Tensor]()
        for layer, past in zip(self.model.layers, past_key_values, strict=True):
            x, cache = layer(x, cos, sin, seen, past)
            present += cache
        x = self.model.norm(x)
        logits = x @ self.model.embed_tokens.weight.T if self.lm_head is None else self.lm_head(x)
        return logits.float(), *present


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the pairs (x[i], x[i + D/2]) of x (..., T, D)."""
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half:].float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def visible(new: int, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, T, S): which of the S keys each of the `new` queries, which are the last, sees."""
    total = attention_mask.shape[1]
    causal = torch.arange(total) <= torch.arange(total - new, total).unsqueeze(1)
    return causal & attention_mask.bool().unsqueeze(1)
