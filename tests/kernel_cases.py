"""What every kernel test needs: outputs that start as NaN between canaries, and the device to run on.

Without a GPU the kernels run in Triton's interpreter (conftest says so before Triton is imported), in fp32:
on bf16 operands the interpreter computes wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float32]
# Of a kernel against the torch twin in float64, relative in the L2 norm.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_CANARY_BYTES = 4096
_CANARY = 0xA5


class Guarded:
    """Hands out poisoned tensors, each between two canaries, and checks the canaries at the end."""

    def __init__(self) -> None:
        self._slabs: list[tuple[torch.Tensor, int]] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor of `shape` full of NaN (integers: of their smallest value)."""
        size = math.prod(shape) * dtype.itemsize
        slab = torch.full((size + 2 * _CANARY_BYTES,), _CANARY, dtype=torch.uint8, device=DEVICE)
        inner = slab[_CANARY_BYTES : _CANARY_BYTES + size].view(dtype).view(shape)
        inner.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min)
        self._slabs.append((slab, size))
        return inner

    def filled(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of `values` between canaries: for what a kernel changes in place."""
        out = self(*values.shape, dtype=values.dtype)
        out.copy_(values)
        return out

    def check(self) -> None:
        """Raises where a kernel wrote beside its output."""
        for slab, size in self._slabs:
            before, after = slab[:_CANARY_BYTES], slab[_CANARY_BYTES + size :]
            assert bool((before == _CANARY).all()), "a kernel wrote in front of its output"
            assert bool((after == _CANARY).all()), "a kernel wrote behind its output"


@pytest.fixture
def empty() -> Iterator[Guarded]:
    """Import it into a test module to use it."""
    guarded = Guarded()
    yield guarded
    guarded.check()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers on DEVICE, the same ones everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float | None = None) -> None:
    """`exact` is float64; the error is relative, in the L2 norm, and every element is finite."""
    assert ours.shape == exact.shape
    assert bool(torch.isfinite(ours).all()), "an output was not written, or is not finite"
    limit = TOLERANCE[ours.dtype] if tolerance is None else tolerance
    exact = exact.to(ours.device, torch.float64)
    error = float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    assert error <= limit, f"relative error {error:.3g}, at most {limit:.3g} is allowed"
