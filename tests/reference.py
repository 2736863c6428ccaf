"""The oracle: the same model in plain modules and autograd, written independently of albor's own code.

Nothing is packed, fused, chunked or in place here. Weights come in by the names of the Hugging Face layout.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x (B, heads, T, D): pairs (x[i], x[i + D/2]) turned by t * theta^(-2i/D), as complex numbers."""
    length, width = x.shape[-2:]
    frequency = torch.tensor([theta ** (-2.0 * i / width) for i in range(width // 2)], dtype=torch.float64)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, theta: float):
        super().__init__()
        self.heads, self.kv_heads, self.theta = heads, kv_heads, theta
        head_dim = width // heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2), self.theta)
        k = rotate(self.k_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2), self.theta)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.rope_theta)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Reference(nn.Module):
    """`c` is anything with the attributes of an Architecture."""

    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) -> logits (B, T, V)."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the targets that are not -1."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), ignore_index=-1)


def unpacked(named: dict[str, torch.Tensor], c) -> dict[str, torch.Tensor]:
    """albor's parameters (or gradients) by name -> this module's names, with packed tensors split."""
    head_dim = c.hidden_size // c.num_attention_heads
    rows = [
        c.num_attention_heads * head_dim,
        c.num_key_value_heads * head_dim,
        c.num_key_value_heads * head_dim,
    ]
    out = {"embed_tokens.weight": named["embedding.tokens"], "norm.weight": named["head.norm"]}
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = named["head.tokens"]
    for layer in range(c.num_hidden_layers):
        ours, theirs = f"blocks.{layer:02d}.", f"layers.{layer}."
        q, k, v = named[ours + "attention.qkv"].split(rows)
        gate, up = named[ours + "mlp.gate_up"].chunk(2)
        out |= {
            theirs + "self_attn.q_proj.weight": q,
            theirs + "self_attn.k_proj.weight": k,
            theirs + "self_attn.v_proj.weight": v,
            theirs + "self_attn.o_proj.weight": named[ours + "attention.out"],
            theirs + "mlp.gate_proj.weight": gate,
            theirs + "mlp.up_proj.weight": up,
            theirs + "mlp.down_proj.weight": named[ours + "mlp.down"],
            theirs + "input_layernorm.weight": named[ours + "attention.norm"],
            theirs + "post_attention_layernorm.weight": named[ours + "mlp.norm"],
        }
    return out
