"""The model that is exported to ONNX, in the three parts that it is traced in: what comes before the layers,
a layer with its cache as input and output, and what comes behind.

It is written for the graph that comes of it. Matrices lie as (in, out), so that each projection is one MatMul
over an initializer, which is what quantisers look for; keys and values are not repeated for the queries that
share them; norms, rotary positions and the softmax are computed in fp32 whatever the weights are in.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from albor.architecture import Architecture

Pair = tuple[torch.Tensor, torch.Tensor]


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
    """Grouped-query attention over the past tokens and the new ones."""

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
        self, x: torch.Tensor, turn: Pair, seen: torch.Tensor, past: Pair
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The output (B, T, C), and keys and values (B, K, S, D) of the past and then the new tokens.

        `turn` are cos and sin, each (B, 1, 1, T, D/2); seen (B, 1, 1, T, S) says which keys a query sees; the
        past are keys and values, each (B, K, S - T, D).
        """
        queries = (self.key_heads, self.group, self.head_dim)
        # (B, K, G, T, D): the G queries that share a key stand together.
        q = rotate(self.q_proj(x).unflatten(-1, queries).permute(0, 2, 3, 1, 4), *turn)
        keys = (self.key_heads, 1, self.head_dim)
        k = rotate(self.k_proj(x).unflatten(-1, keys).permute(0, 2, 3, 1, 4), *turn).squeeze(2)
        v = self.v_proj(x).unflatten(-1, (self.key_heads, self.head_dim)).transpose(1, 2)
        k, v = (torch.cat(both, 2) for both in zip(past, (k, v), strict=True))
        scores = (q * self.head_dim**-0.5) @ k.unsqueeze(2).transpose(3, 4)  # (B, K, G, T, S)
        # The lowest number instead of -inf: a padding token sees nothing, and its softmax must not be NaN.
        scores = torch.where(seen, scores.float(), torch.finfo(torch.float32).min)
        mixed = scores.softmax(-1).to(v.dtype) @ v.unsqueeze(2)
        return self.o_proj(mixed.permute(0, 3, 1, 2, 4).flatten(2)), k, v


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
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        seen: torch.Tensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Attention`; here each input has a name of its own, as the graph's inputs have."""
        mixed, k, v = self.self_attn(self.input_layernorm(x), (cos, sin), seen, (past_keys, past_values))
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Stem(nn.Module):
    """What all layers are given. Submodules have the names of the Hugging Face layout, here as below."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        positions, half = model.max_position_embeddings, model.head_dim // 2
        self.model = nn.ModuleDict({"embed_tokens": Table(model.vocab_size, model.hidden_size, dtype)})
        self.rotary_cos = Table(positions, half, torch.float32)
        self.rotary_sin = Table(positions, half, torch.float32)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """The stream (B, T, C), cos and sin (B, 1, 1, T, D/2), and seen (B, 1, 1, T, S).

        input_ids and position_ids are (B, T); attention_mask (B, S) is 0 where there is padding, over past
        and new tokens.
        """
        cos, sin = (
            table(position_ids).unsqueeze(1).unsqueeze(1) for table in (self.rotary_cos, self.rotary_sin)
        )
        seen = visible(input_ids.shape[1], attention_mask).unsqueeze(1).unsqueeze(1)
        return self.model["embed_tokens"](input_ids), cos, sin, seen


class Head(nn.Module):
    """The final norm, and the projection to the vocabulary."""

    def __init__(self, model: Architecture, dtype: torch.dtype):
        super().__init__()
        self.model = nn.ModuleDict({"norm": Norm(model.hidden_size, model.rms_norm_eps, dtype)})
        self.lm_head = None
        if model.tie_word_embeddings:
            self.model["embed_tokens"] = Table(model.vocab_size, model.hidden_size, dtype)
        else:
            self.lm_head = Matrix(model.hidden_size, model.vocab_size, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits (B, T, V), in fp32."""
        x = self.model["norm"](x)
        if self.lm_head is not None:
            return self.lm_head(x).float()
        return (x @ self.get_parameter("model.embed_tokens.weight").T).float()


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
