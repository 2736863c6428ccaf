"""Arithmetic that no arena's scratch is needed for: rotary tables, sums and norms in host memory, and whether
a buffer is finite.
"""

from __future__ import annotations

import math

import torch

_POSITIONS = 256  # of the rotary tables that are computed in float64 at a time
NORM_ROW = 4096  # elements of a gradient that are squared and summed in its own precision


def rotary_tables(theta: float, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Fills cos and sin (positions, D/2): the angle of pair i at position t is t * theta^(-2i / D)."""
    positions, half = cos.shape
    frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
    for part in torch.arange(positions).split(_POSITIONS):
        angle = torch.outer(part.double(), frequency)
        cos[part[0] : part[-1] + 1].copy_(angle.cos())
        sin[part[0] : part[-1] + 1].copy_(angle.sin())


def accumulate(gradient: torch.Tensor, sums: torch.Tensor, scratch: torch.Tensor) -> None:
    """sums += gradient; both flat, sums wide. It is widened chunk by chunk in `scratch`, where PyTorch would
    copy it whole. All three are on one device.
    """
    if gradient.dtype == sums.dtype:
        sums.add_(gradient)
        return
    size = scratch.numel()
    for start in range(0, gradient.numel(), size):
        part = slice(start, min(start + size, gradient.numel()))
        chunk = scratch[: part.stop - part.start]
        chunk.copy_(gradient[part])
        sums[part].add_(chunk)


def norm(flat: torch.Tensor) -> float:
    """The L2 norm of a flat buffer; the order of summation depends on its size only.

    Row by row and then over the rows in float64: one fp32 sum over 30M elements is 0.2 % off.
    """
    whole = flat.shape[0] // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1)
    rest = torch.linalg.vector_norm(flat[whole:])
    return math.hypot(float(torch.linalg.vector_norm(rows, dtype=torch.float64)), float(rest))


def is_finite(flat: torch.Tensor) -> bool:
    """Whether a flat buffer holds neither NaN nor infinity. Nothing is squared, which may overflow, and all
    that is written is its smallest and its largest element. Both are NaN where one is.
    """
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(flat)).tolist())
