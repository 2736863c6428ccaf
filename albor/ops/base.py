"""What each operation is: shapes, what is overwritten, and the few that torch does alike everywhere.

Shapes: N tokens (B sequences of T), C hidden, F feed-forward, V vocabulary, H query heads, K key/value heads,
D head width, G = H / K. `d_x` is the gradient of `x`. Sums are taken in the wide dtype (fp32, or float64 in
tests) and rounded to the compute dtype once.

A weight's gradient replaces what its buffer holds, or with `add` is added to it. The buffer is in the compute
dtype, or in fp32 where it is the accumulator itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

aten = torch.ops.aten


class Documents(NamedTuple):
    """Where each token's document begins and ends within its sequence: a token attends only to its own."""

    start: torch.Tensor  # (N,) int32, position of the document's first token
    end: torch.Tensor  # (N,) int32, one past the position of its last


class UpdateScalars(NamedTuple):
    """What differs between two optimizer updates."""

    lr: float
    gradient_scale: float  # the summed gradient is multiplied by it
    update: int  # counted from 1: the exponent of the bias correction
    seed: int  # of stochastic rounding, another one for each update


@dataclass
class Ops(ABC):
    """The operations over one arena. What they need beside their arguments is scratch of the plan."""

    # Scratch of attention_cached; `scores` also serves the torch path's attention.
    scores: torch.Tensor | None  # (K, G * QUERY_BLOCK, T)
    query: torch.Tensor | None  # (K, G, QUERY_BLOCK, D)
    d_query: torch.Tensor | None  # as query
    causal_mask: torch.Tensor | None  # (QUERY_BLOCK, QUERY_BLOCK): 0 on and below the diagonal, -inf above

    # Embedding

    @abstractmethod
    def embedding_forward(self, tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        """out[n] = weight[tokens[n]]. tokens (N,) int64, weight (V, C), out (N, C)."""

    @staticmethod
    @abstractmethod
    def token_index(tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What embedding_backward must know of a batch's tokens (N,), by name: arrays of int64.

        Which tokens are the same one is known on the host, so no atomic addition is needed on the device, and
        the order of every sum is the order of the batch.
        """

    @abstractmethod
    def embedding_backward(
        self, d_out: torch.Tensor, index: Mapping[str, torch.Tensor], d_weight: torch.Tensor
    ) -> None:
        """Adds d_out's rows (N, C) to the rows of d_weight (V, C) that they came from; d_out is used up.

        `index` holds the tensors that token_index describes. A token occurs many times in a batch: its rows
        are summed wide first, and rounded once.
        """

    # RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467)

    @abstractmethod
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
        """Adds the residual and normalises: out_sum = x + delta, out = norm(out_sum) * weight.

        x, delta, out_sum, out (N, C); weight (C,); rstd (N,) wide receives the reciprocal root mean square.
        The norm is that of the sum as it is stored, rounding included, so that it can be computed again from
        out_sum alone. Without delta, x is normalised and out_sum is not written.
        """

    @abstractmethod
    def rmsnorm_recompute(
        self, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor
    ) -> None:
        """`rmsnorm_forward`'s out from its out_sum (here x) and rstd, bit for bit."""

    @abstractmethod
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
        """With x^ = x * rstd and g = d_out * weight: d_x = rstd * (g - x^ * mean(g * x^)) and
        d_weight = sum(d_out * x^).

        x is the forward's out_sum. With `residual`, d_x holds the gradient that came past the norm, and the
        norm's is added to it.
        """

    # Linear layers, without biases

    def linear_forward(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, scale: float = 1.0
    ) -> None:
        """out = scale * x @ weight^T. x (N, in), weight (out, in), out (N, out).

        Here and in its gradients the GEMM multiplies by `scale` before it rounds, at no cost.
        """
        _multiply(x, weight.t(), out, scale)

    def linear_backward_input(
        self, d_out: torch.Tensor, weight: torch.Tensor, d_x: torch.Tensor, *, scale: float = 1.0
    ) -> None:
        """d_x = scale * d_out @ weight. d_out (N, out), weight (out, in), d_x (N, in)."""
        _multiply(d_out, weight, d_x, scale)

    def linear_backward_weight(
        self,
        d_out: torch.Tensor,
        x: torch.Tensor,
        d_weight: torch.Tensor,
        *,
        add: bool = False,
        scale: float = 1.0,
    ) -> None:
        """d_weight = scale * d_out^T @ x; with `add`, += that.

        d_out (N, out), x (N, in), d_weight (out, in).
        """
        left, wide = d_out.t(), d_weight.dtype
        if wide == x.dtype:
            if add:
                torch.addmm(d_weight, left, x, alpha=scale, out=d_weight)
            else:
                _multiply(left, x, d_weight, scale)
        elif add or scale != 1.0:
            # Half-precision operands, an fp32 sum: the GEMM adds to it before anything is rounded.
            aten.addmm.dtype_out(d_weight, left, x, wide, beta=int(add), alpha=scale, out=d_weight)
        else:
            aten.mm.dtype_out(left, x, wide, out=d_weight)

    # Rotary positions (Su et al. 2021, arXiv:2104.09864), in Hugging Face's layout: a head's halves pair up

    @abstractmethod
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
        """Rotates the first `heads` heads (queries and keys) of packed qkv (N, (H + 2K) D) in place.

        cos, sin (positions, D/2). Rows are sequences of `length` tokens at positions start, start + 1, ...
        The inverse is the gradient's rotation, for a rotation's transpose is its inverse.
        """

    # Causal attention with grouped queries: the G query heads of a group share one key and one value head

    @abstractmethod
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
        """out = softmax(q k^T / sqrt(D), causal) v, per sequence or per document of one.

        qkv (N, (H + 2K) D), rotated; out (N, H D). lse (B, H, T) fp32 receives the logarithm of each
        softmax's denominator, where the backward wants it; the torch path has none.
        """

    @abstractmethod
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
        """With P the attention weights: d_v = P^T d_out, d_P = d_out v^T, d_S = P * (d_P - rowsum(P * d_P)),
        d_q = d_S k / sqrt(D), d_k = d_S^T q / sqrt(D). d_qkv (N, (H + 2K) D) is written whole.
        """

    def attention_cached(self, qkv: torch.Tensor, cache: torch.Tensor, out: torch.Tensor, start: int) -> None:
        """`attention_forward` of n tokens at positions start, start + 1, ... of one sequence whose earlier
        keys and values are in the cache; theirs are appended to it.

        qkv (n, (H + 2K) D), rotated, with n at most QUERY_BLOCK; cache (2, K, S, D), keys and values; out
        (n, H D). `scores` has room for H * n * (start + n).
        """
        assert self.scores is not None, "the plan has no phase for sampling"
        _, kv_heads, _, head_dim = cache.shape
        rows = qkv.shape[0]
        stop = start + rows
        packed = qkv.view(rows, -1, head_dim)
        heads = packed.shape[1] - 2 * kv_heads
        cache[:, :, start:stop].copy_(packed[:, heads:].view(rows, 2, kv_heads, head_dim).permute(1, 2, 0, 3))
        keys, values = cache[:, :, :stop].unbind()
        if rows == 1:  # its heads lie as the GEMMs want them, and no key is in its future
            query, mixed = packed[0, :heads].view(kv_heads, -1, head_dim), out.view(kv_heads, -1, head_dim)
            weights = shaped(self.scores, kv_heads, query.shape[1], stop)
            torch.baddbmm(weights, query, keys.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=weights)
            torch.softmax(weights, -1, out=weights)
            torch.bmm(weights, values, out=mixed)
        else:
            assert self.d_query is not None
            query = grouped(packed[None, :, :heads], kv_heads)[0]
            weights, _ = self._attention_weights(query, keys, start)
            mixed = shaped(self.d_query, *query.shape)
            torch.bmm(weights, values, out=mixed.view(kv_heads, -1, head_dim))
            grouped(out.view(1, rows, heads, head_dim), kv_heads)[0].copy_(mixed)

    def _attention_weights(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        start: int,
        document_start: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax(query @ key^T / sqrt(D)) of one sequence's query block that begins at `start`, over the
        keys up to its end.

        query (K, G, rows, D), key (K, start + rows, D); document_start (rows,) with `hidden` (rows,
        start + rows) bool scratch; returns the weights (K, G * rows, start + rows) and the query, contiguous
        (K, G * rows, D), both in scratch buffers.
        """
        assert self.query is not None
        assert self.scores is not None
        assert self.causal_mask is not None
        kv_heads, group, rows, head_dim = query.shape
        packed = shaped(self.query, kv_heads, group, rows, head_dim)
        packed.copy_(query)
        flat = packed.view(kv_heads, group * rows, head_dim)
        scores = shaped(self.scores, kv_heads, group * rows, start + rows)
        torch.baddbmm(scores, flat, key.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=scores)
        by_head = scores.view(kv_heads, group, rows, start + rows)
        by_head[..., start:].add_(self.causal_mask[:rows, :rows])
        if document_start is not None and hidden is not None:
            keys = torch.arange(start + rows, dtype=torch.int32, device=key.device)
            torch.lt(keys.unsqueeze(0), document_start.unsqueeze(1), out=hidden)
            by_head.masked_fill_(hidden, -math.inf)
        torch.softmax(scores, -1, out=scores)
        return scores, flat

    # SwiGLU: out = silu(gate) * up (Shazeer 2020, arXiv:2002.05202)

    @abstractmethod
    def swiglu_forward(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """gate_up (N, 2F) holds gate and up side by side; out (N, F)."""

    @abstractmethod
    def swiglu_backward(self, d_out: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """gate_up is overwritten by its gradient, d_out may be used up, and out (N, F) receives the forward's
        product again, which the weight gradient after it needs: so no one has to keep it.
        """

    # Cross-entropy over a chunk of logits

    @abstractmethod
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
        """losses[n] = logsumexp(logits[n]) - logits[n, targets[n]], 0 where the target is IGNORED_TARGET.

        With label smoothing s, the target is 1 - s of that token and s spread evenly over all (as
        torch.nn.functional.cross_entropy has it); z_loss * logsumexp^2 keeps the logits from drifting (PaLM,
        arXiv:2204.02311). With a `scale` (1,), logits (n, V) are overwritten by scale * d(sum of losses);
        without, their content is lost. targets (n,) int64, losses (n,) wide, probabilities (n, V) wide
        scratch, or None where there is no use for it.
        """

    @abstractmethod
    def add_sum(self, values: torch.Tensor, total: torch.Tensor) -> None:
        """total (1,) float64 += the sum of values (n,), wide; always in one order."""

    # Optimizer arithmetic over flat buffers

    @abstractmethod
    def begin_update(self, scalars: UpdateScalars, betas: tuple[float, float]) -> None:
        """Says what the following calls of `adamw` go by."""

    @abstractmethod
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
        """One AdamW step (Loshchilov & Hutter 2017, arXiv:1711.05101) on flat slices of n elements.

        master, first, second and gradient are wide, and weights are master in the compute dtype; or master
        is None, and the weights are updated themselves: wide with wide moments, or all three in bf16, stored
        with stochastic rounding. The first `decayed` elements are decayed, by lr * weight_decay, and the
        rest of their step is `lr_scale` times what lr makes it. `start` is the place of the slice in the
        whole, by which the random numbers of the rounding go. The gradient may be overwritten.
        """

    @abstractmethod
    def squared_norms(
        self,
        flat: torch.Tensor,
        programs: torch.Tensor,
        firsts: torch.Tensor,
        partials: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """out (S,) float64 = the sums of the squares of S segments of a flat buffer; always in one order.

        `programs` (P, 4) int64 says of each of P programs where its segment starts and ends, which of the
        segment's programs it is, and how many they are; the programs of segment s are firsts[s] to
        firsts[s + 1], firsts (S + 1,) int64. partials (P,) float64 is scratch.
        """


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, scale: float) -> None:
    """out = scale * a @ b; what `out` holds is not read."""
    if scale == 1.0:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, beta=0, alpha=scale, out=out)


def shaped(scratch: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of `scratch` as a contiguous tensor of `shape`."""
    return scratch.view(-1)[: math.prod(shape)].view(shape)


def grouped(heads: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, T, H, D) as (B, K, G, T, D)."""
    batch, length, count, head_dim = heads.shape
    return heads.view(batch, length, kv_heads, count // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
