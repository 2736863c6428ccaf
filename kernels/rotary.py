"""Rotary positions, in place (Su et al. 2021, arXiv:2104.09864), in Hugging Face's layout.

Element i of a head's first half pairs up with element i of its second half, and the pair turns by the angle
of frequency i at the row's position:

    (a, b) -> (a cos - b sin, b cos + a sin)      inverse: (a cos + b sin, b cos - a sin)

qkv (N, (H + 2K) D), bf16, fp16 or fp32, holds queries, keys and values side by side; queries and keys are at
its front, so they are the first H + K heads and turn in one launch. cos and sin (positions, D/2) are of any
floating dtype. Arithmetic is in fp32, rounded once. Nothing is saved: the gradient's rotation is the inverse.
"""

import torch
import triton
import triton.language as tl

from albor.kernels.tile import NUM_WARPS, TILE


@triton.jit(do_not_specialize=["count", "length", "start"])  # they change while text is generated
def rotary_kernel(
    qkv, cos, sin, count, length, start,
    STRIDE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """A program per BLOCK heads, counted through all `count` heads that turn, row after row.

    So no lane is idle, whatever the number of heads is. The heads of a row lie in the same warp or in its
    neighbours, which read the same row of the tables: one access serves them.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, head = index // HEADS, index % HEADS
    pair = tl.arange(0, HALF_BLOCK)
    inside = (index < count)[:, None] & (pair < HALF)[None, :]
    first = qkv + row.to(tl.int64)[:, None] * STRIDE + head[:, None] * (2 * HALF) + pair[None, :]
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (row % length + start)[:, None] * HALF + pair[None, :]
    c = tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        s = -s
    tl.store(first, (a * c - b * s).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first + HALF, (b * c + a * s).to(qkv.dtype.element_ty), mask=inside)


def rotate(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    length: int,
    *,
    inverse: bool = False,
    start: int = 0,
) -> None:
    """Rotates the first `heads` heads of every row of qkv (N, (H + 2K) D); the rest is not touched.

    Rows are sequences of `length` tokens at positions start, start + 1, ..., start + length - 1, for which
    cos and sin (positions, D/2) must have rows. All are contiguous.
    """
    rows, stride = qkv.shape
    half = cos.shape[1]
    assert all(t.is_contiguous() for t in (qkv, cos, sin))
    half_block = triton.next_power_of_2(half)
    block = max(1, TILE // half_block)  # pairs in a program: TILE
    count = rows * heads
    rotary_kernel[(triton.cdiv(count, block),)](
        qkv, cos, sin, count, length, start,
        STRIDE=stride, HEADS=heads, HALF=half, BLOCK=block, HALF_BLOCK=half_block, INVERSE=inverse,
        num_warps=NUM_WARPS,
    )  # fmt: skip
