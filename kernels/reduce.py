"""Sums in a fixed order: the loss of a batch, and the squared L2 norms of the gradient's segments.

    add_sum:        total  += sum_i values_i
    squared_norms:  out[s]  = sum of flat_i^2 over the elements i of segment s

values and flat are only read; total, partials and out are float64, and out and partials are overwritten. The
order depends on the shapes and nothing else (no atomics), so equal inputs give equal bits. All segments, of
whatever sizes, are one launch: a table says which program works on which.

The accuracy of the norm does not depend on the length: an fp32 accumulator takes _TILES squares and is then
added to a float64 one. No term is negative, and each is rounded at most _TILES + 1 times in fp32, so the
relative error is at most (_TILES + 1) * 2^-24 < 6e-7; that of float64 is far below it. One fp32 sum over 30M
elements, by contrast, is 0.2 % off. With one float64 addition per _TILES elements, a card whose float64 has
1/64 of the speed of fp32 waits for memory all the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TILES = 8  # squares that one fp32 accumulator takes, and loads that a thread has under way
_WARPS = 8
_SUM_BLOCK = 2048


@triton.jit(do_not_specialize=["n"])
def _add_sum(values, total, n, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float64)
    lane = tl.arange(0, BLOCK)
    for begin in range(0, n, BLOCK):
        sums += tl.load(values + begin + lane, begin + lane < n, other=0.0).to(tl.float64)
    tl.store(total, tl.load(total) + tl.sum(sums, 0))


@triton.jit
def _squares(flat, programs, partials, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """partials[p] = the sum over chunks r, r + R, r + 2 R, ... of TILES * BLOCK elements each, of the segment
    whose r-th program of R is p.
    """
    row = programs + 4 * tl.program_id(0)
    # The segments begin and end at parameters, which begin at multiples of 128 elements.
    start, end = tl.multiple_of(tl.load(row), 16), tl.multiple_of(tl.load(row + 1), 16)
    rank, count = tl.load(row + 2), tl.load(row + 3)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(start + rank * (TILES * BLOCK), end, count * (TILES * BLOCK)):
        squares = tl.zeros((BLOCK,), tl.float32)
        for tile in tl.static_range(TILES):
            index = first + tile * BLOCK + lane
            x = tl.load(flat + index, index < end, other=0.0).to(tl.float32)
            squares += x * x
        sums += squares.to(tl.float64)
    tl.store(partials + tl.program_id(0), tl.sum(sums, 0))


@triton.jit
def _sums(partials, firsts, out, BLOCK: tl.constexpr):
    """out[s] = the sum of partials[firsts[s]] to partials[firsts[s + 1]], the last not included."""
    segment = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    last = tl.load(firsts + segment + 1)
    for begin in range(tl.load(firsts + segment), last, BLOCK):
        sums += tl.load(partials + begin + lane, begin + lane < last, other=0.0)
    tl.store(out + segment, tl.sum(sums, 0))


def add_sum(values: torch.Tensor, total: torch.Tensor) -> None:
    """total (1,) float64 += the sum of values (n,) fp32, accumulated in float64 by one program."""
    _add_sum[(1,)](values, total, values.numel(), BLOCK=_SUM_BLOCK, num_warps=_WARPS)


def squared_norms(
    flat: torch.Tensor,
    programs: torch.Tensor,
    firsts: torch.Tensor,
    partials: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """out (S,) float64 = the sums of the squares of S segments of flat (n,), fp32, bf16 or fp16, contiguous.

    programs (P, 4) int64: of each program, start and end of its segment, which must be multiples of 16, its
    rank among the segment's programs, and their number. firsts (S + 1,) int64: the segments' first programs,
    and P. partials (P,) float64 is scratch. P is to be several times the card's processors (a
    thousand is), shared out by the segments' sizes. The order of a sum, and so its last bits, depend on the
    number of its programs. Squares are taken in fp32: that of an element above 1.8e19 is infinite, and those
    of elements all below 1e-19 lose digits.
    """
    block = 32 * _WARPS * 16 // flat.element_size()  # 16 bytes per load
    _squares[(partials.numel(),)](flat, programs, partials, TILES=_TILES, BLOCK=block, num_warps=_WARPS)
    _sums[(out.numel(),)](partials, firsts, out, BLOCK=_SUM_BLOCK, num_warps=_WARPS)
