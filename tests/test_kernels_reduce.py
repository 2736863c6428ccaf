"""albor.kernels.reduce: sums against float64, at lengths where fp32 alone would show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from kernel_cases import DEVICE, Guarded, empty, randn

from albor.kernels import reduce

__all__ = ["empty"]


def squared_norms(
    flat: torch.Tensor, bounds: Sequence[int], programs: Sequence[int], empty: Guarded
) -> list[float]:
    """Of the segments between `bounds`, each by so many programs."""
    table = [
        (start, end, rank, count)
        for (start, end), count in zip(pairwise(bounds), programs, strict=True)
        for rank in range(count)
    ]
    out = empty(len(programs), dtype=torch.float64)
    rows, firsts = (torch.tensor(values, device=DEVICE) for values in (table, [0, *accumulate(programs)]))
    reduce.squared_norms(flat, rows, firsts, empty(len(table), dtype=torch.float64), out)
    return out.tolist()


def squared_norm(flat: torch.Tensor, programs: int, empty: Guarded) -> float:
    (square,) = squared_norms(flat, [0, flat.numel()], [programs], empty)
    return square


@pytest.mark.parametrize("n", [1, 37, 2048, 5001])
def test_add_sum(n: int, empty: Guarded):
    values = randn(n, seed=n)
    total = empty.filled(torch.tensor([2.5], dtype=torch.float64, device=DEVICE))
    reduce.add_sum(values, total)
    reduce.add_sum(values, total)
    assert math.isclose(total.item(), 2.5 + 2 * math.fsum(values.tolist()), rel_tol=1e-13)


def test_add_sum_keeps_what_fp32_would_lose(empty: Guarded):
    values = torch.full((3000,), 2.0**-20, device=DEVICE)
    values[1234] = 2.0**24
    total = empty.filled(torch.zeros(1, dtype=torch.float64, device=DEVICE))
    reduce.add_sum(values, total)
    assert total.item() == 2.0**24 + 2999 * 2.0**-20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [16, 48, 16384, 100_000])
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_squared_norm(n: int, programs: int, dtype: torch.dtype, empty: Guarded):
    flat = randn(n, seed=n, dtype=dtype)
    exact = flat.double().square().sum().item()
    assert math.isclose(squared_norm(flat, programs, empty), exact, rel_tol=5e-7)


def test_segments_of_all_sizes_in_one_launch(empty: Guarded):
    """Each by its own programs, and none sees its neighbours."""
    bounds, programs = [0, 16, 8192, 8320, 60_000, 60_016], [1, 2, 3, 4, 1]
    flat = randn(60_016, seed=3)
    flat[8192:8320] *= 1e6
    found = squared_norms(flat, bounds, programs, empty)
    exact = [flat[start:end].double().square().sum().item() for start, end in pairwise(bounds)]
    assert found == pytest.approx(exact, rel=5e-7)


def test_the_error_of_the_norm_does_not_grow_with_the_length(empty: Guarded):
    """Equal terms round the same way each time; one program, so that each accumulator takes hundreds."""
    flat = torch.full((1_000_000,), 0.1, device=DEVICE)
    exact = flat.double().square().sum().item()
    assert math.isclose(squared_norm(flat, 1, empty), exact, rel_tol=5e-7)


def test_large_and_small_gradients(empty: Guarded):
    """1e15 squared is within fp32; one 1e-3 among them is not lost where its neighbours are small."""
    flat = torch.zeros(50_000, device=DEVICE)
    flat[3], flat[20_000] = 1e15, 1e-18
    exact = flat.double().square().sum().item()
    assert math.isclose(squared_norm(flat, 2, empty), exact, rel_tol=5e-7)
    flat[3] = 0
    exact = flat.double().square().sum().item()
    assert math.isclose(squared_norm(flat, 2, empty), exact, rel_tol=5e-7)


def test_partial_sums_are_added_in_float64(monkeypatch: pytest.MonkeyPatch, empty: Guarded):
    """One term per program, 2^48 apart, and more programs than the last sum takes at a time."""
    monkeypatch.setattr(reduce, "_SUM_BLOCK", 2)
    chunk = reduce._TILES * 32 * reduce._WARPS * 4
    flat = torch.zeros(5 * chunk, device=DEVICE)
    flat[::chunk] = torch.tensor([2.0**12, 2.0**-12, 2.0**-11, 2.0**-12, 2.0**12], device=DEVICE)
    assert squared_norm(flat, 5, empty) == 2.0**25 + 6 * 2.0**-24


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows_in_the_norm(bad: float, empty: Guarded):
    flat = randn(20_000)
    flat[19_999] = bad
    assert not math.isfinite(squared_norm(flat, 4, empty))


def test_equal_inputs_give_equal_bits(empty: Guarded):
    flat = randn(60_000)
    assert squared_norm(flat, 3, empty) == squared_norm(flat.clone(), 3, empty)
