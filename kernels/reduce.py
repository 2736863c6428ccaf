"""Sums in a fixed order: the loss of a batch, and the squared L2 norm of the gradient.

    add_sum:       total += sum_i values_i
    squared_norm:  out    = sum_i flat_i^2

values and flat are only read; total, partials and out are float64, and out and partials are overwritten. The
order depends on the shapes and nothing else (no atomics), so equal inputs give equal bits.

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
def _squares(flat, partials, n, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """partials[p] = the sum over chunks p, p + P, p + 2 P, ... of TILES * BLOCK elements each."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for first in range(program * (TILES * BLOCK), n, programs * (TILES * BLOCK)):
        squares = tl.zeros((BLOCK,), tl.float32)
        for tile in tl.static_range(TILES):
            index = first + tile * BLOCK + lane
            x = tl.load(flat + index, index < n, other=0.0).to(tl.float32)
            squares += x * x
        sums += squares.to(tl.float64)
    tl.store(partials + program, tl.sum(sums, 0))


@triton.jit(do_not_specialize=["n"])
def _sum(partials, out, n, BLOCK: tl.constexpr):
    sums = tl.zeros((BLOCK,), tl.float64)
    lane = tl.arange(0, BLOCK)
    for begin in range(0, n, BLOCK):
        sums += tl.load(partials + begin + lane, begin + lane < n, other=0.0)
    tl.store(out, tl.sum(sums, 0))


def add_sum(values: torch.Tensor, total: torch.Tensor) -> None:
    """total (1,) float64 += the sum of values (n,) fp32, accumulated in float64 by one program."""
    _add_sum[(1,)](values, total, values.numel(), BLOCK=_SUM_BLOCK, num_warps=_WARPS)


def squared_norm(flat: torch.Tensor, partials: torch.Tensor, out: torch.Tensor) -> None:
    """out (1,) float64 = the sum of the squares of flat (n,), fp32, bf16 or fp16, contiguous.

    partials (P,) float64: one program each, so P is to be several times the card's processors (1024 is). The
    order of the sum, and so its last bits, depend on P. Squares are taken in fp32: that of an element above
    1.8e19 is infinite, and those of elements all below 1e-19 lose digits.
    """
    block = 32 * _WARPS * 16 // flat.element_size()  # 16 bytes per load
    _squares[(partials.numel(),)](flat, partials, flat.numel(), TILES=_TILES, BLOCK=block, num_warps=_WARPS)
    _sum[(1,)](partials, out, partials.numel(), BLOCK=_SUM_BLOCK, num_warps=_WARPS)
