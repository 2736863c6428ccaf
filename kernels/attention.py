"""Causal attention (FlashAttention-2), with grouped queries and document boundaries, forward and backward.

    S = scale * Q K^T,  P = softmax(S over the allowed keys),  O = P V,  scale = head_dim ** -0.5

    delta = rowsum(dO * O),  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q

Query i attends to keys j with document_start[i] <= j <= i. Query head h reads kv head h // (heads /
kv_heads), and dK and dV are sums over the query heads of their group. Nothing of size length x length is
stored and no key or value is repeated: the forward saves O and the logsumexp of each row of S, from which the
backward recomputes P. Scores, softmax and accumulators are fp32; P and dS are rounded to the compute dtype
for the product that follows, and each output once, at its store.

**Determinism.** There are no atomics: each output element belongs to one program that adds in a fixed order.
Hence the backward takes two passes and 7 matrix products instead of 5, because S and dO V^T are computed for
dQ (by query block) and again for dK and dV (by key block). A single pass in a fixed order would need one
program to own all of a sequence's dQ for a head, and to read and write it in fp32 for every key block. At
head_dim 64 that is 64 KiB through L2 for the 10 MFLOP of two 128-blocks, about as long on an H100 as the
products themselves take at its peak; and only batch * kv_heads programs could run (dK and dV sum over the
group), 16 for a micro-batch of 4 on 132 multiprocessors. The two passes have neither limit. The pass for dQ
comes first because it needs O's rows beside dO's anyway, and writes `delta` for the other.

**Operands.** The passes over query blocks compute S, the pass over key blocks S^T. So P and dS are always the
left operand of the product that follows, which takes them from the registers that the last one left them in;
and no result of a product is ever transposed, which Triton has miscompiled on Hopper (flash-linear-attention
#640). Key blocks (or query blocks) that need no mask have a loop of their own, before the one for the
diagonal and for document boundaries; that order is also what lets ptxas keep Hopper's products asynchronous,
see `attention_backward_kv`.

**Order of programs.** They start by rising index of the first grid axis, then of the second: the heads of a
group are neighbours and share K and V in L2, and the second axis begins with the blocks that have most to do
(the last queries, the first keys), so that short programs fill the end.

Sources: Dao, "FlashAttention-2" (arXiv:2307.08691); Ainslie et al., "GQA" (arXiv:2305.13245); the two-pass
backward of Triton's tutorial 06. Block sizes were chosen from compiled code, see `blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from albor.kernels.target import Target, target_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite: a row whose keys so far are all masked must not compute inf - inf.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _load(
    base, start, limit,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """One head of the rows from `start` on; zeros beyond head_dim and, if BOUNDED, beyond row `limit`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * STRIDE + row[:, None] * STRIDE + column[None, :]
    if BOUNDED and HEAD_DIM < BLOCK_D:
        return tl.load(
            pointers, mask=(start + row < limit)[:, None] & (column < HEAD_DIM)[None, :], other=0.0
        )
    if BOUNDED:
        return tl.load(pointers, mask=(start + row < limit)[:, None], other=0.0)
    if HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store(
    base, start, limit, tile,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The inverse of a bounded `_load`, rounded to the dtype of `base`."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    pointers = base + tl.cast(start, tl.int64) * STRIDE + row[:, None] * STRIDE + column[None, :]
    inside = (start + row < limit)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _keys_of(document_start, row, first, length, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The key blocks of the queries from `first` on, whose sequence begins at `row`.

    All pairs are allowed in the blocks of [full_start, full_end); `masked` blocks more are in
    [begin, full_start) and from full_end on.
    """
    begin = 0
    full_start = 0
    full_end = first // KEYS * KEYS
    end = tl.minimum(first + QUERIES, length)
    if document_start is not None:
        begin = tl.load(document_start + row + first) // KEYS * KEYS
        full_start = tl.minimum(tl.cdiv(tl.load(document_start + row + end - 1), KEYS) * KEYS, full_end)
    masked = (full_start - begin) // KEYS + tl.cdiv(end - full_end, KEYS)
    return begin, full_start, full_end, masked


@triton.jit
def _queries_of(document_end, row, first, length, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """The query blocks of the keys from `first` on; as `_keys_of`, with queries and keys exchanged."""
    end = length
    full_end = length
    if document_end is not None:
        full_end = tl.load(document_end + row + first)
        end = tl.load(document_end + row + tl.minimum(first + KEYS, length) - 1)
    begin = first // QUERIES * QUERIES
    full_start = tl.minimum(tl.cdiv(first + KEYS, QUERIES), tl.cdiv(end, QUERIES)) * QUERIES
    full_end = tl.maximum(full_end // QUERIES * QUERIES, full_start)
    masked = (full_start - begin) // QUERIES + tl.cdiv(end - full_end, QUERIES)
    return begin, full_start, full_end, masked


@triton.jit
def _masked_block(index, begin, full_start, full_end, BLOCK: tl.constexpr):
    """Where masked block `index` starts: the blocks of [full_start, full_end) are not among them."""
    start = begin + index * BLOCK
    return tl.multiple_of(tl.where(start < full_start, start, start + full_end - full_start), BLOCK)


@triton.jit
def _forward_step(
    accumulator, row_max, row_sum, q, k_base, v_base, start, length, query, oldest,
    SCALE: tl.constexpr, ROW: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block of the online softmax; row_max is in units of log2."""
    k = _load(k_base, start, length, ROW, KEYS, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        # Counted from the block's start, columns are constants in the code, and registers are left for more.
        key = tl.arange(0, KEYS)
        allowed = key[None, :] <= (query - start)[:, None]
        if oldest is not None:
            allowed = allowed & (key[None, :] >= (oldest - start)[:, None])
        scores = tl.where(allowed, scores, -float("inf"))
    # The maximum of unscaled scores: the scale then costs nothing, as the factor of a fused multiply-add.
    new_max = tl.maximum(row_max, tl.max(scores, 1) * (SCALE * LOG2_E))
    p = tl.math.exp2(scores * (SCALE * LOG2_E) - new_max[:, None])
    decay = tl.math.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    accumulator = accumulator * decay[:, None]
    v = _load(v_base, start, length, ROW, KEYS, HEAD_DIM, BLOCK_D, MASKED)
    accumulator = tl.dot(p.to(v.dtype), v, accumulator, input_precision="ieee")
    return accumulator, new_max, row_sum


@triton.jit
def attention_forward(
    qkv, out, lse, document_start, length,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (sequence and query head, query block)."""
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    row = tl.cast(sequence, tl.int64) * length
    q_base = qkv + row * ROW + head * HEAD_DIM
    k_base = qkv + row * ROW + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
    v_base = k_base + KV_HEADS * HEAD_DIM

    query = first + tl.arange(0, QUERIES)
    oldest = None
    if document_start is not None:
        oldest = tl.load(document_start + row + query, mask=query < length, other=0)
    begin, full_start, full_end, masked = _keys_of(document_start, row, first, length, QUERIES, KEYS)

    q = _load(q_base, first, length, ROW, QUERIES, HEAD_DIM, BLOCK_D, True)
    accumulator = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    row_max = tl.full((QUERIES,), LOWEST, tl.float32)
    row_sum = tl.zeros((QUERIES,), tl.float32)
    for start in range(full_start, full_end, KEYS):
        accumulator, row_max, row_sum = _forward_step(
            accumulator, row_max, row_sum, q, k_base, v_base, start, length, query, oldest,
            SCALE, ROW, KEYS, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
    for index in range(masked):
        start = _masked_block(index, begin, full_start, full_end, KEYS)
        accumulator, row_max, row_sum = _forward_step(
            accumulator, row_max, row_sum, q, k_base, v_base, start, length, query, oldest,
            SCALE, ROW, KEYS, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip

    accumulator = accumulator * (1.0 / row_sum)[:, None]
    _store(
        out + row * (HEADS * HEAD_DIM) + head * HEAD_DIM, first, length, accumulator,
        HEADS * HEAD_DIM, QUERIES, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    lse_base = lse + tl.cast(tl.program_id(0), tl.int64) * length
    tl.store(lse_base + query, (row_max + tl.math.log2(row_sum)) * LN_2, mask=query < length)


@triton.jit
def _backward_q_step(
    dq, q, d_out, lse, delta, k_base, v_base, start, length, query, oldest,
    SCALE: tl.constexpr, ROW: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dQ / scale gains one key block; lse is in units of log2."""
    k = _load(k_base, start, length, ROW, KEYS, HEAD_DIM, BLOCK_D, MASKED)
    v = _load(v_base, start, length, ROW, KEYS, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        # Counted from the block's start, columns are constants in the code, and registers are left for more.
        key = tl.arange(0, KEYS)
        allowed = key[None, :] <= (query - start)[:, None]
        if oldest is not None:
            allowed = allowed & (key[None, :] >= (oldest - start)[:, None])
        scores = tl.where(allowed, scores, -float("inf"))
    p = tl.math.exp2(scores * (SCALE * LOG2_E) - lse[:, None])
    dp = tl.dot(d_out, tl.trans(v), input_precision="ieee")
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def attention_backward_q(
    d_out, qkv, out, lse, d_qkv, delta, document_start, length,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (sequence and query head, query block): dQ, and delta for the other pass."""
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_ROW: tl.constexpr = HEADS * HEAD_DIM
    sequence = tl.program_id(0) // HEADS
    head = tl.program_id(0) % HEADS
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * QUERIES
    row = tl.cast(sequence, tl.int64) * length
    k_base = qkv + row * ROW + (HEADS + head // (HEADS // KV_HEADS)) * HEAD_DIM
    v_base = k_base + KV_HEADS * HEAD_DIM
    out_offset = row * OUT_ROW + head * HEAD_DIM
    statistics = tl.cast(tl.program_id(0), tl.int64) * length

    query = first + tl.arange(0, QUERIES)
    oldest = None
    if document_start is not None:
        oldest = tl.load(document_start + row + query, mask=query < length, other=0)
    begin, full_start, full_end, masked = _keys_of(document_start, row, first, length, QUERIES, KEYS)

    d_out_tile = _load(d_out + out_offset, first, length, OUT_ROW, QUERIES, HEAD_DIM, BLOCK_D, True)
    out_tile = _load(out + out_offset, first, length, OUT_ROW, QUERIES, HEAD_DIM, BLOCK_D, True)
    row_delta = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + statistics + query, row_delta, mask=query < length)
    row_lse = tl.load(lse + statistics + query, mask=query < length, other=0.0) * LOG2_E

    q = _load(qkv + row * ROW + head * HEAD_DIM, first, length, ROW, QUERIES, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    for start in range(full_start, full_end, KEYS):
        dq = _backward_q_step(
            dq, q, d_out_tile, row_lse, row_delta, k_base, v_base, start, length, query, oldest,
            SCALE, ROW, KEYS, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
    for index in range(masked):
        start = _masked_block(index, begin, full_start, full_end, KEYS)
        dq = _backward_q_step(
            dq, q, d_out_tile, row_lse, row_delta, k_base, v_base, start, length, query, oldest,
            SCALE, ROW, KEYS, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
    _store(
        d_qkv + row * ROW + head * HEAD_DIM, first, length, dq * SCALE,
        ROW, QUERIES, HEAD_DIM, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _backward_kv_step(
    dk, dv, k, v, q_base, d_out_base, lse_base, delta_base, start, length, key, newest,
    SCALE: tl.constexpr, ROW: tl.constexpr, OUT_ROW: tl.constexpr, QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV gain one query block of one query head."""
    query = start + tl.arange(0, QUERIES)
    q = _load(q_base, start, length, ROW, QUERIES, HEAD_DIM, BLOCK_D, MASKED)
    d_out = _load(d_out_base, start, length, OUT_ROW, QUERIES, HEAD_DIM, BLOCK_D, MASKED)
    # Clamped rather than masked: a mask would take registers for as long as the loads are on their way.
    row = query
    if MASKED:
        row = tl.minimum(query, length - 1)
    lse = tl.load(lse_base + row) * LOG2_E
    delta = tl.load(delta_base + row)
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")
    if MASKED:
        column = tl.arange(0, QUERIES)
        limit = length if newest is None else newest[:, None]
        allowed = ((key - start)[:, None] <= column[None, :]) & (column[None, :] < limit - start)
        scores = tl.where(allowed, scores, -float("inf"))
    p = tl.math.exp2(scores * (SCALE * LOG2_E) - lse[None, :])
    dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision="ieee")
    dp = tl.dot(v, tl.trans(d_out), input_precision="ieee")
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def attention_backward_kv(
    d_out, qkv, lse, d_qkv, delta, document_end, length,
    SCALE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program per (sequence and kv head, key block): dK and dV, over the query heads of the group."""
    ROW: tl.constexpr = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    OUT_ROW: tl.constexpr = HEADS * HEAD_DIM
    GROUP: tl.constexpr = HEADS // KV_HEADS
    sequence = tl.program_id(0) // KV_HEADS
    kv_head = tl.program_id(0) % KV_HEADS
    first = tl.program_id(1) * KEYS
    row = tl.cast(sequence, tl.int64) * length
    q_base = qkv + row * ROW + kv_head * (GROUP * HEAD_DIM)
    d_out_base = d_out + row * OUT_ROW + kv_head * (GROUP * HEAD_DIM)
    k_offset = row * ROW + (HEADS + kv_head) * HEAD_DIM
    v_offset = k_offset + KV_HEADS * HEAD_DIM
    statistics = (tl.cast(sequence, tl.int64) * HEADS + kv_head * GROUP) * length
    lse_base = lse + statistics
    delta_base = delta + statistics

    key = first + tl.arange(0, KEYS)
    newest = None
    if document_end is not None:
        newest = tl.load(document_end + row + key, mask=key < length, other=0)
    begin, full_start, full_end, masked = _queries_of(document_end, row, first, length, QUERIES, KEYS)

    k = _load(qkv + k_offset, first, length, ROW, KEYS, HEAD_DIM, BLOCK_D, True)
    v = _load(qkv + v_offset, first, length, ROW, KEYS, HEAD_DIM, BLOCK_D, True)
    dk = tl.zeros((KEYS, BLOCK_D), tl.float32)
    dv = tl.zeros((KEYS, BLOCK_D), tl.float32)
    # Blocks and heads in one loop: the loads of the next head overlap the products of the last. The masked
    # loop comes second, and dV before dP in a step, because ptxas otherwise runs all products one by one
    # (sm_90, its warning C7515).
    for index in range((full_end - full_start) // QUERIES * GROUP):
        start = tl.multiple_of(full_start + index // GROUP * QUERIES, QUERIES)
        member = index % GROUP
        dk, dv = _backward_kv_step(
            dk, dv, k, v, q_base + member * HEAD_DIM, d_out_base + member * HEAD_DIM,
            lse_base + member * length, delta_base + member * length, start, length, key, newest,
            SCALE, ROW, OUT_ROW, QUERIES, HEAD_DIM, BLOCK_D, False,
        )  # fmt: skip
    for index in range(masked * GROUP):
        start = _masked_block(index // GROUP, begin, full_start, full_end, QUERIES)
        member = index % GROUP
        dk, dv = _backward_kv_step(
            dk, dv, k, v, q_base + member * HEAD_DIM, d_out_base + member * HEAD_DIM,
            lse_base + member * length, delta_base + member * length, start, length, key, newest,
            SCALE, ROW, OUT_ROW, QUERIES, HEAD_DIM, BLOCK_D, True,
        )  # fmt: skip
    _store(d_qkv + k_offset, first, length, dk * SCALE, ROW, KEYS, HEAD_DIM, BLOCK_D)
    _store(d_qkv + v_offset, first, length, dv, ROW, KEYS, HEAD_DIM, BLOCK_D)


@dataclass(frozen=True)
class Blocks:
    """How a kernel cuts its work: `queries` x `keys` scores at a time."""

    queries: int
    keys: int
    warps: int
    stages: int  # loads are `stages` - 1 blocks ahead
    registers: int | None = None  # of a thread at most, where this makes room for another program on an SM


# By the instructions that multiply: mma.sync takes operands from registers, wgmma also from shared memory,
# and tcgen05 keeps accumulators in tensor memory.
_BLOCKS = {
    "mma": {
        ("forward", 64): Blocks(128, 32, 8, 3),
        ("forward", 128): Blocks(128, 32, 8, 3),
        ("backward_q", 64): Blocks(64, 64, 4, 3),
        ("backward_q", 128): Blocks(128, 32, 8, 3),
        ("backward_kv", 64): Blocks(32, 64, 4, 3),
        ("backward_kv", 128): Blocks(32, 64, 8, 3),
    },
    "wgmma": {
        ("forward", 64): Blocks(128, 64, 8, 3),
        ("forward", 128): Blocks(128, 64, 8, 3),
        ("backward_q", 64): Blocks(128, 64, 8, 3, registers=128),
        ("backward_q", 128): Blocks(128, 64, 8, 3),
        ("backward_kv", 64): Blocks(64, 64, 4, 3),
        ("backward_kv", 128): Blocks(32, 64, 4, 3),
    },
    "tcgen05": {
        ("forward", 64): Blocks(128, 64, 4, 3),
        ("forward", 128): Blocks(128, 64, 8, 3),
        ("backward_q", 64): Blocks(128, 64, 8, 3),
        ("backward_q", 128): Blocks(128, 64, 8, 3),
        ("backward_kv", 64): Blocks(64, 128, 8, 3),
        ("backward_kv", 128): Blocks(64, 128, 8, 3),
    },
}


def blocks(kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> Blocks:
    """The blocks of "forward", "backward_q" or "backward_kv".

    Chosen from code compiled for every target, and never timed. In this order: nothing spills, with registers
    to spare where there is a choice (another ptxas takes a few more or less); shared memory fits; a
    multiprocessor holds 8 warps or more, rather in two programs than in one (while one waits at a barrier the
    other multiplies); each byte from L2 serves 128 queries or 64 keys, so that L2 keeps up with the tensor
    cores. Widths up to 64 take 64's. At 129 to 256 and in fp32, which tensor cores do not multiply exactly,
    they are meant to work everywhere and not to be fast.
    """
    if dtype == torch.float32:
        return Blocks(32, 32, 8, 1) if head_dim <= 64 else Blocks(16, 16, 8, 1)
    if head_dim > 128:
        return Blocks(64 if kernel == "forward" else 32, 32, 8, 2)
    family = {9: "wgmma", 10: "tcgen05"}.get(target.capability // 10, "mma")
    return _BLOCKS[family][kernel, 64 if head_dim <= 64 else 128]


def forward(
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    length: int,
    kv_heads: int,
    head_dim: int,
    document_start: torch.Tensor | None = None,
) -> None:
    """Writes `out` and `lse`.

    Args:
        qkv: (N, (heads + 2 * kv_heads) * head_dim), contiguous: in each row the query heads, the key heads,
            both rotated, and the value heads. N = batch * length.
        out: (N, heads * head_dim), in the dtype of `qkv`.
        lse: (batch, heads, length) fp32, the natural logarithm of the sum of exp(score) over a query's keys.
        length: tokens of a sequence.
        document_start: (N,) int32, the position within its sequence at which a token's document starts; None:
            a sequence is one document.
    """
    batch, heads, _ = lse.shape
    choice = blocks("forward", head_dim, qkv.dtype, target_of(qkv))
    grid = (batch * heads, triton.cdiv(length, choice.queries))
    attention_forward[grid](
        qkv, out, lse, document_start, length,
        SCALE=head_dim**-0.5, HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, BLOCK_D=_padded(head_dim),
        QUERIES=choice.queries, KEYS=choice.keys, num_warps=choice.warps, num_stages=choice.stages,
        maxnreg=choice.registers,
    )  # fmt: skip


def backward(
    d_out: torch.Tensor,
    qkv: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_qkv: torch.Tensor,
    delta: torch.Tensor,
    length: int,
    kv_heads: int,
    head_dim: int,
    document_start: torch.Tensor | None = None,
    document_end: torch.Tensor | None = None,
) -> None:
    """Writes all of `d_qkv`, and `delta`; reads what `forward` read and wrote.

    Args:
        d_out: (N, heads * head_dim), in the dtype of `qkv`.
        d_qkv: as `qkv`.
        delta: (batch, heads, length) fp32, working memory.
        document_end: (N,) int32, one past the last position of a token's document within its sequence; given
            exactly if `document_start` is.

    Raises:
        ValueError: if one of document_start and document_end is given without the other.
    """
    if (document_start is None) != (document_end is None):
        raise ValueError("document_start and document_end belong together; give both or neither")
    batch, heads, _ = lse.shape
    target = target_of(qkv)
    shape = {
        "SCALE": head_dim**-0.5, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim,
        "BLOCK_D": _padded(head_dim),
    }  # fmt: skip
    choice = blocks("backward_q", head_dim, qkv.dtype, target)
    attention_backward_q[(batch * heads, triton.cdiv(length, choice.queries))](
        d_out, qkv, out, lse, d_qkv, delta, document_start, length, **shape,
        QUERIES=choice.queries, KEYS=choice.keys, num_warps=choice.warps, num_stages=choice.stages,
        maxnreg=choice.registers,
    )  # fmt: skip
    choice = blocks("backward_kv", head_dim, qkv.dtype, target)
    attention_backward_kv[(batch * kv_heads, triton.cdiv(length, choice.keys))](
        d_out, qkv, lse, d_qkv, delta, document_end, length, **shape,
        QUERIES=choice.queries, KEYS=choice.keys, num_warps=choice.warps, num_stages=choice.stages,
        maxnreg=choice.registers,
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    """The width of a tile: tensor cores take powers of two from 16 on."""
    return max(16, triton.next_power_of_2(head_dim))
