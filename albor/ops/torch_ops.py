"""The operations in plain torch: what runs on the CPU, and what the kernels are tested against.

Written for speed on a CPU: GEMMs write with `out=`, and everything between two GEMMs goes chunk by chunk
through small scratch buffers, so that its intermediate values stay in the L2 cache and nothing of a tensor's
size is ever allocated. Arithmetic between GEMMs is in the wide dtype where sums are taken, and in the compute
dtype elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from albor.architecture import IGNORED_TARGET
from albor.kernels.philox_reference import reference, stochastic_round
from albor.memory.arena import Arena
from albor.memory.plan import QUERY_BLOCK, ROW_CHUNK
from albor.ops.base import Documents, Ops, UpdateScalars, grouped, shaped
from albor.ops.flat import norm

_ROUNDED = 16384  # elements that are rounded stochastically at a time

aten = torch.ops.aten


@dataclass
class TorchOps(Ops):
    """The torch path. Its scratch does not depend on the micro-batch, but for the embedding's sums."""

    wide: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # 3 x (ROW_CHUNK, C), wide
    weight_gradient: torch.Tensor  # (C,), wide
    feed_forward: torch.Tensor  # (ROW_CHUNK, F)
    rotated: torch.Tensor  # (ROW_CHUNK, H + K, D/2)
    d_scores: torch.Tensor  # (K, G * QUERY_BLOCK, T)
    key: torch.Tensor  # (K, T, D)
    value: torch.Tensor  # (K, T, D)
    d_out: torch.Tensor  # (K, G, QUERY_BLOCK, D)
    d_key: torch.Tensor  # (K, T, D)
    d_key_sum: torch.Tensor | None  # (K, T, D), wide; None where one query block covers the sequence
    d_value_sum: torch.Tensor | None
    d_key_wide: torch.Tensor | None
    hidden_keys: torch.Tensor | None  # (QUERY_BLOCK, T) bool; None where documents are not kept apart
    embedding_sums: torch.Tensor | None  # (N, C), wide; None where nothing is trained
    _scalars: UpdateScalars | None = field(default=None, init=False)

    @classmethod
    def from_arena(cls, arena: Arena) -> TorchOps:
        """The scratch buffers of a plan."""
        apart = ("wide", "embedding_sums")
        names = [f.name for f in fields(cls) if f.init and f.name not in apart]
        views = {name: arena.get(f"workspace.{name}") for name in names}
        wide = tuple(arena[f"workspace.wide.{slot}"] for slot in range(3))
        mask = arena["workspace.causal_mask"]
        mask.fill_(-math.inf).triu_(1)  # triu_ keeps -inf above the diagonal and writes 0 elsewhere
        sums = arena.get("backward.d_embedded")
        return cls(wide=wide, embedding_sums=sums, **views)  # type: ignore[arg-type]

    # Embedding

    def embedding_forward(self, tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.index_select(weight, 0, tokens, out=out)

    @staticmethod
    def token_index(tokens: np.ndarray) -> dict[str, np.ndarray]:
        unique, index = np.unique(tokens, return_inverse=True)
        padded = np.zeros_like(tokens)  # shapes are static; the padding's sums are zero
        padded[: unique.size] = unique
        return {"unique_tokens": padded, "unique_index": index.reshape(-1)}

    def embedding_backward(
        self, d_out: torch.Tensor, index: Mapping[str, torch.Tensor], d_weight: torch.Tensor
    ) -> None:
        sums = self.embedding_sums
        assert sums is not None, "an inference plan has no backward"
        sums.zero_()
        for rows in _chunks(d_out.shape[0]):
            wide = self.wide[0][: rows.stop - rows.start]
            wide.copy_(d_out[rows])
            sums.index_add_(0, index["unique_index"][rows], wide)
        d_out.copy_(sums)  # d_out is done with: it takes the rounded sums
        d_weight.index_add_(0, index["unique_tokens"], d_out)

    # RMSNorm

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
        for rows in _chunks(x.shape[0]):
            wide = self.wide[0][: rows.stop - rows.start]
            if delta is None:
                wide.copy_(x[rows])
            else:
                torch.add(x[rows], delta[rows], out=out_sum[rows])
                wide.copy_(out_sum[rows])
            inverse = rstd[rows]
            torch.linalg.vector_norm(wide, dim=-1, out=inverse)
            inverse.square_().div_(x.shape[1]).add_(eps).rsqrt_()
            _scale_rows(wide, inverse, weight, out[rows])

    def rmsnorm_recompute(
        self, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        for rows in _chunks(x.shape[0]):
            wide = self.wide[0][: rows.stop - rows.start]
            wide.copy_(x[rows])
            _scale_rows(wide, rstd[rows], weight, out[rows])

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
        width = x.shape[1]
        weight_wide = weight.to(rstd.dtype)
        self.weight_gradient.zero_()
        for rows in _chunks(x.shape[0]):
            g, x_hat, product = (buffer[: rows.stop - rows.start] for buffer in self.wide)
            inverse = rstd[rows].unsqueeze(1)
            g.copy_(d_out[rows])
            x_hat.copy_(x[rows])
            x_hat.mul_(inverse)
            torch.mul(g, x_hat, out=product)
            self.weight_gradient.add_(product.sum(0))
            mean = torch.mv(product, weight_wide).div_(width).unsqueeze(1)  # of g * x^ with the weight in it
            g.mul_(weight).addcmul_(x_hat, mean, value=-1)
            if residual:
                product.copy_(d_x[rows])
                product.addcmul_(g, inverse)
                d_x[rows].copy_(product)
            else:
                d_x[rows].copy_(g.mul_(inverse))
        if add:
            self.weight_gradient.add_(d_weight)
        d_weight.copy_(self.weight_gradient)

    # Rotary positions

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
        half = cos.shape[1]
        packed = qkv.view(qkv.shape[0], -1, 2 * half)
        sign = -1 if inverse else 1
        for sequence in range(qkv.shape[0] // length):
            for rows in _chunks(length):
                tokens = packed[sequence * length + rows.start : sequence * length + rows.stop, :heads]
                c = cos[start + rows.start : start + rows.stop].unsqueeze(1)
                s = sin[start + rows.start : start + rows.stop].unsqueeze(1)
                first, second = tokens[..., :half], tokens[..., half:]
                turned = shaped(self.rotated, *first.shape)
                torch.mul(first, s, out=turned)
                first.mul_(c).addcmul_(second, s, value=-sign)
                second.mul_(c).add_(turned, alpha=sign)

    # Causal attention. One sequence and QUERY_BLOCK queries at a time: their scores fit the L2 cache, nothing
    # above the block diagonal is computed, and the weights are computed again in the backward, not kept.

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
        query, key, value = _heads(qkv, length, kv_heads, head_dim)
        out_heads = grouped(out.view(*query.shape[:1], length, -1, head_dim), kv_heads)
        group = query.shape[2]
        assert self.d_query is not None
        for b in range(query.shape[0]):
            for block in _chunks(length, QUERY_BLOCK):
                rows, stop = block.stop - block.start, block.stop
                keys, values = _packed(key[b, :, :stop], self.key), _packed(value[b, :, :stop], self.value)
                weights, _ = self._block_weights(query, keys, b, block, documents)
                mixed = shaped(self.d_query, kv_heads, group * rows, head_dim)
                torch.bmm(weights, values, out=mixed)
                out_heads[b, :, :, block].copy_(mixed.view(kv_heads, group, rows, head_dim))

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
        scale = head_dim**-0.5
        query, key, value = _heads(qkv, length, kv_heads, head_dim)
        d_query, d_key, d_value = _heads(d_qkv, length, kv_heads, head_dim)
        d_out_heads = grouped(d_out.view(query.shape[0], length, -1, head_dim), kv_heads)
        group = query.shape[2]
        assert self.d_query is not None
        for b in range(query.shape[0]):
            for block in _chunks(length, QUERY_BLOCK):
                rows, stop = block.stop - block.start, block.stop
                keys, values = _packed(key[b, :, :stop], self.key), _packed(value[b, :, :stop], self.value)
                weights, flat_query = self._block_weights(query, keys, b, block, documents)
                upstream = shaped(self.d_out, kv_heads, group, rows, head_dim)
                upstream.copy_(d_out_heads[b, :, :, block])
                upstream = upstream.view(kv_heads, group * rows, head_dim)
                d_scores = shaped(self.d_scores, kv_heads, group * rows, stop)
                part = shaped(self.d_key, kv_heads, stop, head_dim)

                torch.bmm(weights.transpose(1, 2), upstream, out=part)
                self._add_key_gradient(part, d_value[b], self.d_value_sum, block, length)
                torch.bmm(upstream, values.transpose(1, 2), out=d_scores)
                aten._softmax_backward_data.out(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
                torch.baddbmm(part, d_scores.transpose(1, 2), flat_query, beta=0, alpha=scale, out=part)
                self._add_key_gradient(part, d_key[b], self.d_key_sum, block, length)
                d_rows = shaped(self.d_query, kv_heads, group * rows, head_dim)
                torch.baddbmm(d_rows, d_scores, keys, beta=0, alpha=scale, out=d_rows)
                d_query[b, :, :, block].copy_(d_rows.view(kv_heads, group, rows, head_dim))

    def _block_weights(
        self, query: torch.Tensor, keys: torch.Tensor, b: int, block: slice, documents: Documents | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What _attention_weights says of sequence b's query block."""
        part = query[b, :, :, block]
        if documents is None:
            return self._attention_weights(part, keys, block.start)
        assert self.hidden_keys is not None, "the plan keeps no documents apart"
        hidden = shaped(self.hidden_keys, part.shape[2], block.stop)
        first = documents.start.view(query.shape[0], -1)[b, block]
        return self._attention_weights(part, keys, block.start, first, hidden)

    def _add_key_gradient(
        self, part: torch.Tensor, out: torch.Tensor, sums: torch.Tensor | None, block: slice, length: int
    ) -> None:
        """Adds one query block's share of d_k or d_v; after the last, writes the sum to out (K, T, D)."""
        if sums is None:  # one block is the whole sequence
            out.copy_(part)
            return
        assert self.d_key_wide is not None
        if block.start == 0:
            sums.zero_()
        wide = shaped(self.d_key_wide, *part.shape)
        wide.copy_(part)
        sums[:, : block.stop].add_(wide)
        if block.stop == length:
            out.copy_(sums)

    # SwiGLU

    def swiglu_forward(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        width = out.shape[1]
        for rows in _chunks(out.shape[0]):
            aten.silu.out(gate_up[rows, :width], out=out[rows])
            out[rows].mul_(gate_up[rows, width:])

    def swiglu_backward(self, d_out: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        width = out.shape[1]
        for rows in _chunks(out.shape[0]):
            gate, up = gate_up[rows, :width], gate_up[rows, width:]
            product, upstream = out[rows], d_out[rows]
            d_silu = self.feed_forward[: rows.stop - rows.start]
            torch.mul(upstream, up, out=d_silu)
            aten.silu.out(gate, out=product)
            upstream.mul_(product)
            product.mul_(up)
            up.copy_(upstream)
            aten.silu_backward.grad_input(d_silu, gate, grad_input=gate)

    # Cross-entropy

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
        wide = logits if probabilities is None else probabilities
        counted = targets != IGNORED_TARGET
        index = targets.clamp(min=0).unsqueeze(1)
        largest = logits.amax(-1).to(wide.dtype)
        above = largest - logits.gather(1, index).squeeze(1)
        if label_smoothing:
            mean = logits.mean(-1, dtype=wide.dtype)
            above.mul_(1 - label_smoothing).add_((largest - mean).mul_(label_smoothing))
        if probabilities is not None:
            probabilities.copy_(logits)
        torch.softmax(wide, -1, out=wide)
        # logsumexp(z) = max(z) - log(max(softmax(z))): exact where the target's own probability would
        # underflow.
        log_largest = wide.amax(-1).log_()
        torch.sub(above, log_largest, out=losses)
        row_scale = counted.to(wide.dtype)
        if z_loss:
            lse = largest.sub_(log_largest)
            losses.add_(lse.square().mul_(z_loss))
        losses.mul_(counted)
        if scale is None:
            return
        row_scale.mul_(scale)
        wide.mul_((row_scale * (1 + 2 * z_loss * lse) if z_loss else row_scale).unsqueeze(1))
        if label_smoothing:
            wide.sub_((row_scale * (label_smoothing / logits.shape[1])).unsqueeze(1))
        wide.scatter_add_(1, index, (-(1 - label_smoothing) * row_scale).unsqueeze(1))
        if probabilities is not None:
            logits.copy_(probabilities)

    def add_sum(self, values: torch.Tensor, total: torch.Tensor) -> None:
        total.add_(values.sum(dtype=torch.float64))

    # Optimizer arithmetic over flat buffers

    def begin_update(self, scalars: UpdateScalars, betas: tuple[float, float]) -> None:
        self._scalars = scalars

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
        scalars = self._scalars
        assert scalars is not None, "begin_update comes first"
        if first.dtype == torch.bfloat16:
            for part in _chunks(weights.numel(), _ROUNDED):
                _adamw_rounded(
                    weights[part], gradient[part], first[part], second[part], scalars,
                    start + part.start, decayed - part.start, betas, eps, weight_decay, lr_scale,
                )  # fmt: skip
            return
        updated = weights if master is None else master
        # Of the scaled rate the decay is a larger share.
        halves = (
            (slice(0, decayed), scalars.lr * lr_scale, weight_decay / lr_scale),
            (slice(decayed, weights.numel()), scalars.lr, 0.0),
        )
        for part, lr, decay in halves:
            if part.start == part.stop:
                continue
            torch._fused_adamw_(
                [updated[part]], [gradient[part]], [first[part]], [second[part]], [],
                [torch.tensor(float(scalars.update))],
                lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=decay, eps=eps,
                amsgrad=False, maximize=False,
                grad_scale=torch.tensor(1.0 / scalars.gradient_scale),  # in the same pass: it divides
            )  # fmt: skip
        if master is not None:
            weights.copy_(master)

    def squared_norms(
        self,
        flat: torch.Tensor,
        programs: torch.Tensor,
        firsts: torch.Tensor,
        partials: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        for segment, first in enumerate(firsts[:-1].tolist()):
            start, end = programs[first, :2].tolist()
            out[segment] = norm(flat[start:end]) ** 2


def _adamw_rounded(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    scalars: UpdateScalars,
    start: int,
    decayed: int,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    lr_scale: float,
) -> None:
    """`Ops.adamw` on bf16 state, with the kernel's order of operations and its random bits."""
    lr, correction1, correction2 = torch.tensor(
        [scalars.lr, *(1 - beta**scalars.update for beta in betas)], dtype=torch.float32
    )
    g = gradient.float() * torch.tensor(scalars.gradient_scale, dtype=torch.float32)
    p, m, v = weights.float(), first.float(), second.float()
    p[: max(0, decayed)] *= 1.0 - lr * weight_decay
    m = m * betas[0] + g * (1 - betas[0])
    v = v * betas[1] + g * g * (1 - betas[1])
    # torch.sqrt of fp32 is not rounded correctly on every CPU; from float64 it is.
    roots, correction = v.double().sqrt().float(), correction2.double().sqrt().float()
    steps = torch.full_like(p, lr / correction1)
    steps[: max(0, decayed)] *= torch.tensor(lr_scale, dtype=torch.float32)
    p = p - steps * m / (roots / correction + eps)
    bits, more_bits = (reference(scalars.seed, start, g.numel(), stream) for stream in range(2))
    weights.copy_(stochastic_round(p, bits))
    first.copy_(stochastic_round(m, bits >> 16))
    second.copy_(stochastic_round(v, more_bits))


def _chunks(rows: int, size: int = ROW_CHUNK) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _scale_rows(wide: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    wide.mul_(rstd.unsqueeze(1)).mul_(weight)
    out.copy_(wide)


def _heads(packed: torch.Tensor, length: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Views of packed qkv (N, (H + 2K) D): query (B, K, G, T, D), key (B, K, T, D), value (B, K, T, D)."""
    split = packed.view(packed.shape[0] // length, length, -1, head_dim)
    heads = split.shape[2] - 2 * kv_heads
    query = grouped(split[:, :, :heads], kv_heads)
    return (
        query,
        split[:, :, heads : heads + kv_heads].transpose(1, 2),
        split[:, :, heads + kv_heads :].transpose(1, 2),
    )


def _packed(part: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in `scratch`: oneDNN's bf16 GEMM would make one of its own."""
    return shaped(scratch, *part.shape).copy_(part)
