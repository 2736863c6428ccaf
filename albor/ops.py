"""The arithmetic of the model: one signature per operation, every output preallocated.

This is where the Triton kernels plug in on CUDA. What follows is the torch path, which runs on the CPU and is
the reference for the kernels. It is written for speed there: GEMMs write with `out=`, and everything between
two GEMMs goes chunk by chunk through a small workspace, so that its intermediate values stay in the L2 cache
and nothing of a tensor's size is ever allocated.

Shapes: N tokens (B sequences of T), C hidden, F feed-forward, V vocabulary, H query heads, K key/value heads,
D head width, G = H / K. `d_x` is the gradient of `x`. Arithmetic between GEMMs is in the workspace's wide
dtype (fp32, or float64 in tests) where sums are taken, and in the compute dtype elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from albor.architecture import IGNORED_TARGET
from albor.memory.arena import Arena
from albor.memory.plan import QUERY_BLOCK, ROW_CHUNK

NORM_ROW = 4096  # elements of a gradient that are squared and summed in its own precision

aten = torch.ops.aten


@dataclass(frozen=True)
class Workspace:
    """The torch path's small scratch; sizes do not depend on the micro-batch."""

    wide: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # 3 x (ROW_CHUNK, C), wide
    weight_gradient: torch.Tensor  # (C,), wide
    feed_forward: torch.Tensor  # (ROW_CHUNK, F)
    rotated: torch.Tensor  # (ROW_CHUNK, H + K, D/2)
    scores: torch.Tensor  # (K, G * QUERY_BLOCK, T)
    d_scores: torch.Tensor  # (K, G * QUERY_BLOCK, T)
    query: torch.Tensor  # (K, G, QUERY_BLOCK, D)
    key: torch.Tensor  # (K, T, D)
    value: torch.Tensor  # (K, T, D)
    d_query: torch.Tensor  # (K, G, QUERY_BLOCK, D)
    d_out: torch.Tensor  # (K, G, QUERY_BLOCK, D)
    causal_mask: torch.Tensor  # (QUERY_BLOCK, QUERY_BLOCK): 0 on and below the diagonal, -inf above
    d_key: torch.Tensor  # (K, T, D)
    d_key_sum: torch.Tensor | None  # (K, T, D), wide; None where one query block covers the sequence
    d_value_sum: torch.Tensor | None
    d_key_wide: torch.Tensor | None

    @classmethod
    def from_arena(cls, arena: Arena) -> Workspace:
        """The workspace buffers of a plan."""
        names = [f.name for f in fields(cls) if f.name != "wide"]
        views = {name: arena.get(f"workspace.{name}") for name in names}
        wide = tuple(arena[f"workspace.wide.{slot}"] for slot in range(3))
        mask = arena["workspace.causal_mask"]
        mask.fill_(-math.inf).triu_(1)  # triu_ keeps -inf above the diagonal and writes 0 elsewhere
        return cls(wide=wide, **views)  # type: ignore[arg-type]  # the optional ones are exactly those that may be None


def _chunks(rows: int, size: int = ROW_CHUNK) -> Iterator[slice]:
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _shaped(scratch: torch.Tensor, *shape: int) -> torch.Tensor:
    """The first elements of `scratch` as a contiguous tensor of `shape`."""
    return scratch.view(-1)[: math.prod(shape)].view(shape)


# Embedding


def embedding_forward(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out[n] = weight[tokens[n]]. tokens (N,) int64, weight (V, C), out (N, C)."""
    torch.index_select(weight, 0, tokens, out=out)


def embedding_backward(
    d_out: torch.Tensor,
    unique_tokens: torch.Tensor,
    unique_index: torch.Tensor,
    d_weight: torch.Tensor,
    sums: torch.Tensor,
    work: Workspace,
) -> None:
    """Adds d_out's rows to the rows of d_weight that they came from.

    A token occurs many times in a batch, so its rows are summed wide in `sums` (N, C) first and rounded once.
    unique_index (N,) is the place of each token in unique_tokens (N,), the distinct ids, which is padded with
    id 0: the padding's sums are zero. Shapes are static, and the order of the sum is the order of the batch.
    """
    sums.zero_()
    for rows in _chunks(d_out.shape[0]):
        wide = work.wide[0][: rows.stop - rows.start]
        wide.copy_(d_out[rows])
        sums.index_add_(0, unique_index[rows], wide)
    d_out.copy_(sums)  # d_out is done with: it takes the rounded sums
    d_weight.index_add_(0, unique_tokens, d_out)


# RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, arXiv:1910.07467)


def rmsnorm_forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out_sum: torch.Tensor,
    out: torch.Tensor,
    rstd: torch.Tensor,
    work: Workspace,
) -> None:
    """Adds the residual and normalises: out_sum = x + delta, out = norm(out_sum) * weight.

    x, delta, out_sum, out (N, C); weight (C,); rstd (N,) wide receives the reciprocal root mean square. The
    norm is that of the sum as it is stored, rounding included, so that it can be computed again from out_sum
    alone. Without delta, x is normalised and out_sum is not written.
    """
    for rows in _chunks(x.shape[0]):
        wide = work.wide[0][: rows.stop - rows.start]
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
    x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, work: Workspace
) -> None:
    """`rmsnorm_forward`'s out from its out_sum (here x) and rstd, bit for bit."""
    for rows in _chunks(x.shape[0]):
        wide = work.wide[0][: rows.stop - rows.start]
        wide.copy_(x[rows])
        _scale_rows(wide, rstd[rows], weight, out[rows])


def _scale_rows(wide: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    wide.mul_(rstd.unsqueeze(1)).mul_(weight)
    out.copy_(wide)


def rmsnorm_backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    d_x: torch.Tensor,
    d_weight: torch.Tensor,
    work: Workspace,
    *,
    add: bool,
) -> None:
    """With x^ = x * rstd and g = d_out * weight: d_x = rstd * (g - x^ * mean(g * x^)) and
    d_weight = sum(d_out * x^).

    x is the forward's out_sum. With `add`, d_x holds the residual branch's gradient and the norm's is added
    to it.
    """
    width = x.shape[1]
    weight_wide = weight.to(rstd.dtype)
    work.weight_gradient.zero_()
    for rows in _chunks(x.shape[0]):
        g, x_hat, product = (buffer[: rows.stop - rows.start] for buffer in work.wide)
        inverse = rstd[rows].unsqueeze(1)
        g.copy_(d_out[rows])
        x_hat.copy_(x[rows])
        x_hat.mul_(inverse)
        torch.mul(g, x_hat, out=product)
        work.weight_gradient.add_(product.sum(0))
        mean = torch.mv(product, weight_wide).div_(width).unsqueeze(1)  # of g * x^ with the weight in it
        g.mul_(weight).addcmul_(x_hat, mean, value=-1)
        if add:
            product.copy_(d_x[rows])
            product.addcmul_(g, inverse)
            d_x[rows].copy_(product)
        else:
            d_x[rows].copy_(g.mul_(inverse))
    d_weight.copy_(work.weight_gradient)


# Linear layers, without biases


def linear_forward(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out = x @ weight^T. x (N, in), weight (out, in), out (N, out)."""
    torch.mm(x, weight.t(), out=out)


def linear_backward_input(d_out: torch.Tensor, weight: torch.Tensor, d_x: torch.Tensor) -> None:
    """d_x = d_out @ weight. d_out (N, out), weight (out, in), d_x (N, in)."""
    torch.mm(d_out, weight, out=d_x)


def linear_backward_weight(
    d_out: torch.Tensor, x: torch.Tensor, d_weight: torch.Tensor, *, add: bool = False
) -> None:
    """d_weight = d_out^T @ x; with `add`, += that. d_out (N, out), x (N, in), d_weight (out, in)."""
    if add:
        torch.addmm(d_weight, d_out.t(), x, out=d_weight)
    else:
        torch.mm(d_out.t(), x, out=d_weight)


# Rotary positions (Su et al. 2021, arXiv:2104.09864), in Hugging Face's layout: a head's halves pair up


def rotary_tables(theta: float, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Fills cos and sin (positions, D/2): the angle of pair i at position t is t * theta^(-2i / D)."""
    positions, half = cos.shape
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    cos.copy_(angle.cos())
    sin.copy_(angle.sin())


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    length: int,
    work: Workspace,
    *,
    inverse: bool = False,
    start: int = 0,
) -> None:
    """Rotates the first `heads` heads (queries and keys) of packed qkv (N, (H + 2K) D) in place.

    Rows are sequences of `length` tokens at positions start, start + 1, ... The inverse is the gradient's
    rotation, for a rotation's transpose is its inverse.
    """
    half = cos.shape[1]
    packed = qkv.view(qkv.shape[0], -1, 2 * half)
    sign = -1 if inverse else 1
    for sequence in range(qkv.shape[0] // length):
        for rows in _chunks(length):
            tokens = packed[sequence * length + rows.start : sequence * length + rows.stop, :heads]
            c = cos[start + rows.start : start + rows.stop].unsqueeze(1)
            s = sin[start + rows.start : start + rows.stop].unsqueeze(1)
            first, second = tokens[..., :half], tokens[..., half:]
            turned = _shaped(work.rotated, *first.shape)
            torch.mul(first, s, out=turned)
            first.mul_(c).addcmul_(second, s, value=-sign)
            second.mul_(c).add_(turned, alpha=sign)


# Causal attention with grouped queries: the G query heads of a group share one key and one value head


def _heads(packed: torch.Tensor, length: int, kv_heads: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Views of packed qkv (N, (H + 2K) D): query (B, K, G, T, D), key (B, K, T, D), value (B, K, T, D)."""
    split = packed.view(packed.shape[0] // length, length, -1, head_dim)
    heads = split.shape[2] - 2 * kv_heads
    query = _grouped(split[:, :, :heads], kv_heads)
    return (
        query,
        split[:, :, heads : heads + kv_heads].transpose(1, 2),
        split[:, :, heads + kv_heads :].transpose(1, 2),
    )


def _grouped(heads: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """(B, T, H, D) as (B, K, G, T, D)."""
    batch, length, count, head_dim = heads.shape
    return heads.view(batch, length, kv_heads, count // kv_heads, head_dim).permute(0, 2, 3, 1, 4)


def _packed(part: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in `scratch`: oneDNN's bf16 GEMM would make one of its own."""
    return _shaped(scratch, *part.shape).copy_(part)


def _attention_weights(
    query: torch.Tensor, key: torch.Tensor, start: int, work: Workspace
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(query @ key^T / sqrt(D)) of one sequence's query block that begins at `start`, over the keys up
    to its end.

    query (K, G, rows, D), key (K, start + rows, D); returns the weights (K, G * rows, start + rows) and the
    query, contiguous (K, G * rows, D), both in the workspace.
    """
    kv_heads, group, rows, head_dim = query.shape
    packed = _shaped(work.query, kv_heads, group, rows, head_dim)
    packed.copy_(query)
    flat = packed.view(kv_heads, group * rows, head_dim)
    scores = _shaped(work.scores, kv_heads, group * rows, start + rows)
    torch.baddbmm(scores, flat, key.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=scores)
    scores.view(kv_heads, group, rows, start + rows)[..., start:].add_(work.causal_mask[:rows, :rows])
    torch.softmax(scores, -1, out=scores)
    return scores, flat


def attention_forward(
    qkv: torch.Tensor, out: torch.Tensor, length: int, kv_heads: int, head_dim: int, work: Workspace
) -> None:
    """out = softmax(q k^T / sqrt(D), causal) v, per sequence. qkv (N, (H + 2K) D), rotated; out (N, H D).

    One sequence and QUERY_BLOCK queries at a time: their scores fit the L2 cache, nothing above the block
    diagonal is computed, and the weights are computed again in the backward instead of kept.
    """
    query, key, value = _heads(qkv, length, kv_heads, head_dim)
    out_heads = _grouped(out.view(*query.shape[:1], length, -1, head_dim), kv_heads)
    group = query.shape[2]
    for b in range(query.shape[0]):
        for block in _chunks(length, QUERY_BLOCK):
            rows, stop = block.stop - block.start, block.stop
            keys, values = _packed(key[b, :, :stop], work.key), _packed(value[b, :, :stop], work.value)
            weights, _ = _attention_weights(query[b, :, :, block], keys, block.start, work)
            mixed = _shaped(work.d_query, kv_heads, group * rows, head_dim)
            torch.bmm(weights, values, out=mixed)
            out_heads[b, :, :, block].copy_(mixed.view(kv_heads, group, rows, head_dim))


def attention_cached(
    qkv: torch.Tensor, cache: torch.Tensor, out: torch.Tensor, start: int, work: Workspace
) -> None:
    """`attention_forward` of n tokens at positions start, start + 1, ... of one sequence whose earlier keys
    and values are in the cache; theirs are appended to it.

    qkv (n, (H + 2K) D), rotated, with n at most QUERY_BLOCK; cache (2, K, S, D), keys and values; out
    (n, H D). The workspace's scores have room for H * n * (start + n).
    """
    _, kv_heads, _, head_dim = cache.shape
    rows = qkv.shape[0]
    stop = start + rows
    packed = qkv.view(rows, -1, head_dim)
    heads = packed.shape[1] - 2 * kv_heads
    cache[:, :, start:stop].copy_(packed[:, heads:].view(rows, 2, kv_heads, head_dim).permute(1, 2, 0, 3))
    keys, values = cache[:, :, :stop].unbind()
    if rows == 1:  # its heads lie as the GEMMs want them, and no key is in its future
        query, mixed = packed[0, :heads].view(kv_heads, -1, head_dim), out.view(kv_heads, -1, head_dim)
        weights = _shaped(work.scores, kv_heads, query.shape[1], stop)
        torch.baddbmm(weights, query, keys.transpose(1, 2), beta=0, alpha=head_dim**-0.5, out=weights)
        torch.softmax(weights, -1, out=weights)
        torch.bmm(weights, values, out=mixed)
    else:
        query = _grouped(packed[None, :, :heads], kv_heads)[0]
        weights, _ = _attention_weights(query, keys, start, work)
        mixed = _shaped(work.d_query, *query.shape)
        torch.bmm(weights, values, out=mixed.view(kv_heads, -1, head_dim))
        _grouped(out.view(1, rows, heads, head_dim), kv_heads)[0].copy_(mixed)


def attention_backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    d_qkv: torch.Tensor,
    length: int,
    kv_heads: int,
    head_dim: int,
    work: Workspace,
) -> None:
    """With P the attention weights: d_v = P^T d_out, d_P = d_out v^T, d_S = P * (d_P - rowsum(P * d_P)),
    d_q = d_S k / sqrt(D), d_k = d_S^T q / sqrt(D). d_qkv (N, (H + 2K) D) is written whole.
    """
    scale = head_dim**-0.5
    query, key, value = _heads(qkv, length, kv_heads, head_dim)
    d_query, d_key, d_value = _heads(d_qkv, length, kv_heads, head_dim)
    d_out_heads = _grouped(d_out.view(query.shape[0], length, -1, head_dim), kv_heads)
    group = query.shape[2]
    for b in range(query.shape[0]):
        for block in _chunks(length, QUERY_BLOCK):
            rows, stop = block.stop - block.start, block.stop
            keys, values = _packed(key[b, :, :stop], work.key), _packed(value[b, :, :stop], work.value)
            weights, flat_query = _attention_weights(query[b, :, :, block], keys, block.start, work)
            upstream = _shaped(work.d_out, kv_heads, group, rows, head_dim)
            upstream.copy_(d_out_heads[b, :, :, block])
            upstream = upstream.view(kv_heads, group * rows, head_dim)
            d_scores = _shaped(work.d_scores, kv_heads, group * rows, stop)
            part = _shaped(work.d_key, kv_heads, stop, head_dim)

            torch.bmm(weights.transpose(1, 2), upstream, out=part)
            _add_key_gradient(part, d_value[b], work.d_value_sum, block, length, work)
            torch.bmm(upstream, values.transpose(1, 2), out=d_scores)
            aten._softmax_backward_data.out(d_scores, weights, -1, weights.dtype, grad_input=d_scores)
            torch.baddbmm(part, d_scores.transpose(1, 2), flat_query, beta=0, alpha=scale, out=part)
            _add_key_gradient(part, d_key[b], work.d_key_sum, block, length, work)
            d_rows = _shaped(work.d_query, kv_heads, group * rows, head_dim)
            torch.baddbmm(d_rows, d_scores, keys, beta=0, alpha=scale, out=d_rows)
            d_query[b, :, :, block].copy_(d_rows.view(kv_heads, group, rows, head_dim))


def _add_key_gradient(
    part: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor | None,
    block: slice,
    length: int,
    work: Workspace,
) -> None:
    """Adds one query block's share of d_k or d_v; after the last block, writes the sum to `out` (K, T, D)."""
    if sums is None:  # one block is the whole sequence
        out.copy_(part)
        return
    assert work.d_key_wide is not None
    if block.start == 0:
        sums.zero_()
    wide = _shaped(work.d_key_wide, *part.shape)
    wide.copy_(part)
    sums[:, : block.stop].add_(wide)
    if block.stop == length:
        out.copy_(sums)


# SwiGLU: out = silu(gate) * up (Shazeer 2020, arXiv:2002.05202)


def swiglu_forward(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up (N, 2F) holds gate and up side by side; out (N, F)."""
    width = out.shape[1]
    for rows in _chunks(out.shape[0]):
        aten.silu.out(gate_up[rows, :width], out=out[rows])
        out[rows].mul_(gate_up[rows, width:])


def swiglu_backward(d_out: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor, work: Workspace) -> None:
    """gate_up is overwritten by its gradient, d_out is used up, and out (N, F) receives the forward's product
    again, which the weight gradient after it needs: so no one has to keep it.
    """
    width = out.shape[1]
    for rows in _chunks(out.shape[0]):
        gate, up = gate_up[rows, :width], gate_up[rows, width:]
        product, upstream = out[rows], d_out[rows]
        d_silu = work.feed_forward[: rows.stop - rows.start]
        torch.mul(upstream, up, out=d_silu)
        aten.silu.out(gate, out=product)
        upstream.mul_(product)
        product.mul_(up)
        up.copy_(upstream)
        aten.silu_backward.grad_input(d_silu, gate, grad_input=gate)


# Cross-entropy over a chunk of logits


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    probabilities: torch.Tensor | None,
    scale: float | None,
) -> None:
    """losses[n] = logsumexp(logits[n]) - logits[n, targets[n]], 0 where the target is IGNORED_TARGET.

    With a `scale`, logits (n, V) are overwritten by scale * d(sum of losses); without, their content is lost.
    targets (n,) int64, losses (n,) wide, probabilities (n, V) wide scratch, or None where logits are wide
    already.
    """
    wide = logits if probabilities is None else probabilities
    counted = targets != IGNORED_TARGET
    index = targets.clamp(min=0).unsqueeze(1)
    # logsumexp(z) = max(z) - log(max(softmax(z))): exact where the target's own probability would underflow.
    above = logits.amax(-1).to(wide.dtype) - logits.gather(1, index).squeeze(1)
    if probabilities is not None:
        probabilities.copy_(logits)
    torch.softmax(wide, -1, out=wide)
    torch.sub(above, wide.amax(-1).log_(), out=losses)
    losses.mul_(counted)
    if scale is None:
        return
    row_scale = counted.to(wide.dtype).mul_(scale).unsqueeze(1)
    wide.mul_(row_scale)
    wide.scatter_add_(1, index, -row_scale)
    if probabilities is not None:
        logits.copy_(probabilities)


# Gradient and optimizer arithmetic over flat buffers


def accumulate(gradient: torch.Tensor, sums: torch.Tensor, scratch: torch.Tensor) -> None:
    """sums += gradient; both flat, sums wide. It is widened chunk by chunk in `scratch`, where PyTorch would
    copy it whole. All three are on one device.
    """
    if gradient.dtype == sums.dtype:
        sums.add_(gradient)
        return
    for part in _chunks(gradient.numel(), scratch.numel()):
        chunk = scratch[: part.stop - part.start]
        chunk.copy_(gradient[part])
        sums[part].add_(chunk)


def adamw(
    weights: torch.Tensor,
    master: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
) -> None:
    """One AdamW step (Loshchilov & Hutter 2017, arXiv:1711.05101) on flat slices; the gradient times
    `gradient_scale`.

    master, first, second and gradient are wide; weights are master in the compute dtype (or are master
    itself). `step` counts from 1 and is the bias correction's exponent. The gradient may be overwritten.
    """
    torch._fused_adamw_(
        [master], [gradient], [first], [second], [],
        [torch.tensor(float(step), device=master.device)],
        lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps,
        amsgrad=False, maximize=False,
        grad_scale=torch.tensor(1.0 / gradient_scale, device=master.device),  # in the same pass: it divides
    )  # fmt: skip
    if weights.data_ptr() != master.data_ptr():
        weights.copy_(master)


def norm(flat: torch.Tensor) -> float:
    """The L2 norm of a flat buffer; the order of summation depends on its size only.

    Row by row and then over the rows in float64: one fp32 sum over 30M elements is 0.2 % off.
    """
    whole = flat.shape[0] // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return math.hypot(float(torch.linalg.vector_norm(rows, dtype=torch.float64)), float(rest))
