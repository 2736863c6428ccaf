"""The oracle: the same model in plain modules and autograd, written independently of albor's own operations.

Nothing is packed, fused, chunked or in place here. Weights come in by the names of the Hugging Face layout.

Letters in shapes: B sequences, T tokens of each, C hidden, V vocabulary, D head width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from albor.architecture import IGNORED_TARGET, Architecture


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), times a weight per channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C)."""
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x (B, heads, T, D): pairs (x[i], x[i + D/2]) turned by t * theta^(-2i/D), as complex numbers."""
    length, width = x.shape[-2:]
    exponents = [theta ** (-2.0 * i / width) for i in range(width // 2)]
    frequency = torch.tensor(exponents, dtype=torch.float64, device=x.device)
    angle = torch.outer(torch.arange(length, dtype=torch.float64, device=x.device), frequency)
    turned = torch.complex(*x.double().chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal attention in which several query heads share a key/value head."""

    def __init__(self, width: int, heads: int, kv_heads: int, theta: float):
        super().__init__()
        self.heads, self.kv_heads, self.theta = heads, kv_heads, theta
        head_dim = width // heads
        self.q_proj = nn.Linear(width, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """(B, T, C) and which keys each query sees, (T, T) or (B, 1, T, T) bool -> (B, T, C)."""
        batch, length, width = x.shape
        q = rotate(self.q_proj(x).view(batch, length, self.heads, -1).transpose(1, 2), self.theta)
        k = rotate(self.k_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2), self.theta)
        v = self.v_proj(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """SwiGLU: silu(gate(x)) * up(x), projected down."""

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, ffn, bias=False)
        self.up_proj = nn.Linear(width, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One block: attention and feed-forward, each on the normed residual stream and added to it."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.rope_theta)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size)

    def forward(self, x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """(B, T, C) and what `Attention` asks for -> (B, T, C)."""
        x = x + self.self_attn(self.input_layernorm(x), visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class Reference(nn.Module):
    """A LLaMA of the given architecture, with torch's default initial weights."""

    def __init__(self, c: Architecture):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.logit_multiplier = c.mup_base_width / c.hidden_size if c.mup_base_width else 1

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """tokens (B, T) -> logits (B, T, V); where no `visible` is given, a token sees all up to itself."""
        x = self.embed_tokens(tokens)
        if visible is None:
            length = tokens.shape[1]
            visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        for layer in self.layers:
            x = layer(x, visible)
        return self.lm_head(self.norm(x)).mul_(self.logit_multiplier)

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the targets that are not ignored."""
        logits = self(tokens).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET)


def own_document(tokens: torch.Tensor, end_of_document: int) -> torch.Tensor:
    """Which keys each query sees when documents are kept apart: tokens (B, T) -> (B, 1, T, T) bool.

    A document ends with its end token: two tokens share one if as many end tokens lie before each of them.
    """
    ends = (tokens == end_of_document).long()
    number = ends.cumsum(-1) - ends
    return (number[:, None, :, None] == number[:, None, None, :]).tril()


def unpacked(named: dict[str, torch.Tensor], c: Architecture) -> dict[str, torch.Tensor]:
    """albor's parameters (or gradients) by name -> this module's names, packed tensors split into views."""
    rows = [heads * c.head_dim for heads in (c.num_attention_heads, *2 * (c.num_key_value_heads,))]
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
