"""A plain PyTorch training loop, as good as one can write it without kernels of one's own.

One GEMM for query, key and value, one for gate and up; scaled_dot_product_attention with grouped queries;
bf16 weights over fp32 masters; gradients summed in fp32; fused AdamW; torch.compile over the model and its
loss. Nothing is read back to the host in a step.

The same model, eager and in fp32, is the reference that losses are compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from albor.architecture import Architecture
from albor.bench.recorder import Recorder
from albor.bench.workload import Spec, Tokens, packed_weights

_REFERENCE_BATCH = 4  # sequences that the reference takes at a time


class PlainBlock(nn.Module):
    """One transformer block."""

    def __init__(self, model: Architecture, *, expand: bool):
        super().__init__()
        self.expand = expand
        width, ffn = model.hidden_size, model.intermediate_size
        self.heads, self.kv_heads = model.num_attention_heads, model.num_key_value_heads
        self.head_dim, self.eps = model.head_dim, model.rms_norm_eps
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, model.qkv_size, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = nn.Linear(width, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x (B, T, C); cos, sin (T, D/2) fp32."""
        batch, length, width = x.shape
        normed = F.rms_norm(x, (width,), self.attention_norm, self.eps)
        packed = self.qkv(normed).view(batch, length, -1, self.head_dim).transpose(1, 2)
        rotated, value = packed.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        first, second = rotated.chunk(2, dim=-1)
        # Wide cos and sin promote the product; the compiler fuses the casts into the one kernel.
        rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
        query, key = rotated.split([self.heads, self.kv_heads], dim=1)
        if self.expand:
            group = self.heads // self.kv_heads
            key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = F.rms_norm(x, (width,), self.mlp_norm, self.eps)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class PlainModel(nn.Module):
    """The model with its loss. With `head_chunk`, logits exist for that many tokens at a time. With `expand`,
    keys and values are repeated for each query head, without which no fused attention computes in fp32.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(
        self, model: Architecture, length: int, head_chunk: int | None = None, *, expand: bool = False
    ):
        super().__init__()
        self.eps, self.head_chunk = model.rms_norm_eps, head_chunk
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(model, expand=expand) for _ in range(model.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(model.hidden_size))
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        pair = torch.arange(0, model.head_dim, 2, dtype=torch.float64)
        frequency = model.rope_theta ** (-pair / model.head_dim)
        angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float())
        self.register_buffer("sin", angle.sin().float())

    def load(self, path: str, model: Architecture) -> None:
        """Takes the values of a workload's weights."""
        outer = {"embedding.tokens": "embedding.weight", "head.norm": "norm", "head.tokens": "head.weight"}
        inner = {
            "attention.norm": "attention_norm", "attention.qkv": "qkv.weight",
            "attention.out": "attention_out.weight", "mlp.norm": "mlp_norm", "mlp.gate_up": "gate_up.weight",
            "mlp.down": "down.weight",
        }  # fmt: skip
        with torch.no_grad():
            for parameter, values in packed_weights(path, model):
                name = outer.get(parameter.name)
                if name is None:
                    _, layer, rest = parameter.name.split(".", 2)
                    name = f"blocks.{int(layer)}.{inner[rest]}"
                self.get_parameter(name).copy_(values)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean loss in nats. tokens, targets (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.eps).flatten(0, 1)
        if self.head_chunk is not None:
            loss: torch.Tensor = ChunkedLoss.apply(x, self.head.weight, targets.flatten(), self.head_chunk)
            return loss
        return F.cross_entropy(self.head(x).float(), targets.flatten())


class ChunkedLoss(torch.autograd.Function):
    """The mean cross-entropy of a linear head, whose gradients are computed chunk by chunk in the forward, so
    that no chunk's logits outlive it and none are computed twice.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, size: int) -> Any:
        """x (N, C), weight (V, C), targets (N,)."""
        d_x, d_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        for start in range(0, x.shape[0], size):
            rows, wanted = x[start : start + size], targets[start : start + size, None]
            logits = (rows @ weight.t()).float()
            lse = logits.logsumexp(-1, keepdim=True)
            loss = loss + (lse - logits.gather(1, wanted)).sum()
            hit = torch.arange(weight.shape[0], device=x.device) == wanted
            d_logits = (((logits - lse).exp() - hit.float()) / x.shape[0]).to(x.dtype)
            d_x[start : start + size] = d_logits @ weight
            d_weight = d_weight + d_logits.t() @ rows
        ctx.save_for_backward(d_x, d_weight.to(weight.dtype))
        return loss / x.shape[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The saved gradients, scaled."""
        d_x, d_weight = ctx.saved_tensors
        return d_x * gradients[0].to(d_x.dtype), d_weight * gradients[0].to(d_weight.dtype), None, None


def make_optimizer(parameters: list[torch.Tensor], spec: Spec) -> torch.optim.AdamW:
    """Fused AdamW; matrices decay, norms do not."""
    o = spec.config.optimizer
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def clip(parameters: list[torch.Tensor], largest: float) -> torch.Tensor | None:
    """Scales the gradients down to a global norm of `largest`, and returns what it was; 0: does nothing."""
    return torch.nn.utils.clip_grad_norm_(parameters, largest, foreach=True) if largest > 0 else None


def train(
    spec: Spec,
    recorder: Recorder,
    *,
    mode: str | None = None,
    head_chunk: int | None = None,
    autocast: bool = False,
    reference: bool = False,
) -> None:
    """`mode` is torch.compile's; `autocast` keeps fp32 weights and casts them in each forward, instead of
    bf16 weights over fp32 masters; `reference` is fp32 and eager.
    """
    architecture, device = Architecture.from_config(spec.config.model), torch.device(spec.device)
    dtype = torch.float32 if reference else getattr(torch, spec.dtype)
    torch.set_float32_matmul_precision("highest")  # the reference is fp32, not TF32
    model = PlainModel(architecture, spec.config.data.sequence_length, head_chunk, expand=reference)
    model.load(spec.weights, architecture)
    model.to(device)
    masters: list[torch.Tensor] = []
    if dtype != torch.float32 and not autocast:
        masters = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():  # the angles stay wide, so not model.to(dtype)
            parameter.data = parameter.data.to(dtype)
    parameters: list[torch.Tensor] = list(model.parameters())
    updated = masters or parameters
    optimizer = make_optimizer(updated, spec)
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = model
    if not reference:
        forward = torch.compile(model, backend=spec.compile_backend, mode=mode)
    tokens = Tokens(spec)

    def load(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    recorder.begin()
    for step in range(spec.steps):
        for micro_step in range(tokens.micro_steps):
            batch = [load(side) for side in tokens.batch(step, micro_step)]
            # In fp32 a micro-batch may not fit where it does in bf16; the mean is the same in parts.
            parts = zip(
                *(side.split(_REFERENCE_BATCH if reference else len(side)) for side in batch), strict=True
            )
            for part in parts:
                share = len(part[0]) / len(batch[0]) / tokens.micro_steps
                with torch.autocast(device.type, dtype) if autocast else nullcontext():
                    loss = forward(*part) * share
                loss.backward()
                recorder.add_loss(loss)
            if masters:
                _collect(masters, parameters, first=micro_step == 0)
        norm = clip(updated, spec.config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        if masters:
            with torch.no_grad():
                torch._foreach_copy_(parameters, masters)
        recorder.end_step(norm)


def _collect(masters: list[torch.Tensor], parameters: list[torch.Tensor], *, first: bool) -> None:
    """Adds bf16 gradients to the masters' fp32 ones, as all systems do: no micro-step rounds the sum."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if first:
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient.float()
    else:
        sums = [master.grad for master in masters if master.grad is not None]
        torch._foreach_add_(sums, gradients)
    for parameter in parameters:
        parameter.grad = None
