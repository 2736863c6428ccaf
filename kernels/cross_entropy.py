"""Cross-entropy of a chunk of logits, and its gradient in their place.

For a row z (V,) with target t, s = label_smoothing, c = z_loss:

    lse    = log sum_j exp(z_j)
    loss   = (1 - s) (lse - z_t) + s (lse - mean(z)) + c lse^2
    d_z_j  = scale (softmax(z)_j (1 + 2 c lse) - (1 - s) [j = t] - s / V)

Label smoothing is that of Szegedy et al. 2015 (arXiv:1512.00567) as torch.nn.functional.cross_entropy defines
it, the z-loss that of PaLM (Chowdhery et al. 2022, arXiv:2204.02311); where they are 0 they are not compiled.

logits (n, V) bf16, fp16 or fp32, rows contiguous; targets (n,) int64, where IGNORED means no loss and no
gradient; losses (n,) fp32, overwritten; logits overwritten by their gradient in forward_backward. Arithmetic
is fp32, rounded once at the store. Where rows are no multiple of 16 bytes, accesses are narrower.

One program per row, and two sweeps over it. The first keeps, for each place in the block whose 16 bytes a
thread loads at once, a maximum and a sum relative to it (Milakov & Gimelshein 2018, arXiv:1805.02867), with
no thread waiting for another before the end of the row. lse - z_t is taken as (max - z_t) + log(sum), so
nothing is lost where the target's probability underflows. The second sweep reads the row again, from cache,
and writes.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from albor.kernels.target import target_of

IGNORED = -1
_LOWEST = tl.constexpr(-3.4e38)  # a maximum of nothing: finite, since -inf - -inf is NaN


@triton.jit
def _row(
    logits, targets, losses, scale, row_stride,
    V: tl.constexpr, LABEL_SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    VECTORS: tl.constexpr, VECTOR: tl.constexpr, IGNORED_TARGET: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    z = logits + row * row_stride
    lane = tl.arange(0, VECTORS)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    BLOCK: tl.constexpr = VECTORS * VECTOR

    if target == IGNORED_TARGET:
        tl.store(losses + row, 0.0)
        if scale is not None:
            zero = tl.zeros((VECTORS, VECTOR), logits.dtype.element_ty)
            for begin in range(0, V, BLOCK):
                tl.store(z + begin + lane, zero, begin + lane < V)
    else:
        # No such column: NaN, which stops the run, and not a number from somewhere else in memory.
        exists = (target >= 0) & (target < V)
        z_target = tl.load(z + target, exists, other=float("nan")).to(tl.float32)

        maxima = tl.full((VECTORS,), _LOWEST, tl.float32)
        sums = tl.zeros((VECTORS,), tl.float32)
        totals = tl.zeros((VECTORS,), tl.float32)
        for begin in range(0, V, BLOCK):
            column = begin + lane
            x = tl.load(z + column, column < V, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(maxima, tl.max(x, 1))
            sums = sums * tl.exp(maxima - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
            maxima = higher
            if LABEL_SMOOTHING != 0.0:
                totals += tl.sum(tl.where(column < V, x, 0.0), 1)
        highest = tl.max(maxima, 0)
        sum_exp = tl.sum(sums * tl.exp(maxima - highest), 0)
        log_sum = tl.log(sum_exp)

        loss = (highest - z_target) + log_sum
        if LABEL_SMOOTHING != 0.0:
            above_mean = (highest - tl.sum(totals, 0) / V) + log_sum
            loss = (1.0 - LABEL_SMOOTHING) * loss + LABEL_SMOOTHING * above_mean
        lse = highest + log_sum
        if Z_LOSS != 0.0:
            loss += Z_LOSS * lse * lse
        tl.store(losses + row, loss)

        if scale is not None:
            upstream = tl.load(scale)
            factor = upstream / sum_exp
            if Z_LOSS != 0.0:
                factor *= 1.0 + 2.0 * Z_LOSS * lse
            at_target = (1.0 - LABEL_SMOOTHING) * upstream
            everywhere = LABEL_SMOOTHING / V * upstream
            for begin in range(0, V, BLOCK):
                column = begin + lane
                x = tl.load(z + column, column < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - highest) * factor
                if LABEL_SMOOTHING != 0.0:
                    gradient -= everywhere
                gradient = tl.where(column == target, gradient - at_target, gradient)
                tl.store(z + column, gradient.to(logits.dtype.element_ty), column < V)


def forward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """losses only; logits stay as they are."""
    _launch(logits, targets, losses, None, label_smoothing, z_loss)


def forward_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    scale: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> None:
    """losses, and logits become scale * d(sum of losses) / d(logits); scale (1,) fp32, on the device."""
    _launch(logits, targets, losses, scale, label_smoothing, z_loss)


def _launch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    scale: torch.Tensor | None,
    label_smoothing: float,
    z_loss: float,
) -> None:
    rows, vocab = logits.shape
    # A thread's access: 16 bytes, or what divides the rows, so that one access of a warp stays contiguous.
    vector = math.gcd(16 // logits.element_size(), vocab, logits.stride(0))
    warps = _warps(vocab * logits.element_size(), target_of(logits).capability)
    _row[(rows,)](
        logits, targets, losses, scale, logits.stride(0),
        V=vocab, LABEL_SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        VECTORS=32 * warps * max(2, 4 // vector), VECTOR=vector, IGNORED_TARGET=IGNORED, num_warps=warps,
    )  # fmt: skip


def _warps(row_bytes: int, capability: int) -> int:
    """A thread sweeps a row in about 8 accesses of 16 bytes, two of them under way; 16 warps at most.

    Rows of up to 128 KiB are then 3 or 4 to a processor, few enough that the second sweep finds them in the
    L2 cache. A larger row gets 32 warps, so that fewer are under way; so does one above 32 KiB on sm_86,
    whose L2 cache is 6 MiB or less.
    """
    if row_bytes > (32 if capability == 86 else 128) * 1024:
        return 32
    return min(max(triton.next_power_of_2(row_bytes) // (8 * 16 * 32), 1), 16)
