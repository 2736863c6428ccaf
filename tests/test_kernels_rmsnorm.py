"""RMSNorm's kernels against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, Guarded, assert_close, empty, randn

from albor.kernels import rmsnorm

__all__ = ["empty"]

EPS = 1e-5
WIDE = rmsnorm.REGISTER_WIDTH + 8
SHAPES = [(1, 24), (5, 40), (3, 257), (9, 768), (2, WIDE)]


def reference(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, rstd) of x, in x's precision."""
    rstd = (x.square().mean(-1) + EPS).rsqrt()
    return x * rstd[:, None] * weight, rstd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward_adds_and_normalises(empty: Guarded, rows: int, width: int, dtype: torch.dtype):
    x, delta = randn(rows, width, seed=1, dtype=dtype), randn(rows, width, seed=2, dtype=dtype)
    weight = randn(width, seed=3, dtype=dtype)
    out_sum, out = empty(rows, width, dtype=dtype), empty(rows, width, dtype=dtype)
    rstd = empty(rows)
    rmsnorm.forward(x, delta, weight, EPS, out_sum, out, rstd)
    assert torch.equal(out_sum, x + delta)
    exact, exact_rstd = reference(out_sum.double(), weight.double())
    assert_close(out, exact)
    assert_close(rstd, exact_rstd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward_without_a_delta_leaves_the_sum_alone(
    empty: Guarded, rows: int, width: int, dtype: torch.dtype
):
    x, weight = randn(rows, width, seed=1, dtype=dtype), randn(width, seed=3, dtype=dtype)
    out_sum, out = empty(rows, width, dtype=dtype), empty(rows, width, dtype=dtype)
    rstd = empty(rows)
    rmsnorm.forward(x, None, weight, EPS, out_sum, out, rstd)
    assert bool(out_sum.isnan().all())
    exact, exact_rstd = reference(x.double(), weight.double())
    assert_close(out, exact)
    assert_close(rstd, exact_rstd)


@pytest.mark.parametrize("width", [40, WIDE])
def test_the_sum_may_take_the_place_of_x(empty: Guarded, width: int):
    x, delta, weight = randn(3, width, seed=1), randn(3, width, seed=2), randn(width, seed=3)
    exact, _ = reference((x + delta).double(), weight.double())
    stream, out = empty.filled(x), empty(3, width)
    rmsnorm.forward(stream, delta, weight, EPS, stream, out, empty(3))
    assert torch.equal(stream, x + delta)
    assert_close(out, exact)


@pytest.mark.parametrize("width", [40, WIDE])
def test_the_norm_is_that_of_the_rounded_sum(empty: Guarded, width: int):
    """2048 + 0.9 is 2048 in fp16: the two sums' norms differ in the fourth digit."""
    x = torch.full((2, width), 2048.0, dtype=torch.float16, device=DEVICE)
    delta = torch.full_like(x, 0.9)
    out_sum, out = empty(2, width, dtype=torch.float16), empty(2, width, dtype=torch.float16)
    rstd = empty(2)
    rmsnorm.forward(x, delta, torch.ones_like(x[0]), EPS, out_sum, out, rstd)
    assert torch.equal(out_sum, x)
    assert_close(rstd, torch.full((2,), 1 / 2048, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("dtype", sorted({*DTYPES, torch.float16}, key=str))
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_recompute_has_the_forward_s_bits(empty: Guarded, rows: int, width: int, dtype: torch.dtype):
    x, delta = randn(rows, width, seed=1, dtype=dtype), randn(rows, width, seed=2, dtype=dtype)
    weight = randn(width, seed=3, dtype=dtype)
    out_sum, out, again = (empty(rows, width, dtype=dtype) for _ in range(3))
    rstd = empty(rows)
    rmsnorm.forward(x, delta, weight, EPS, out_sum, out, rstd)
    rmsnorm.recompute(out_sum, rstd, weight, again)
    assert torch.equal(again, out)


def test_recompute_covers_more_rows_than_a_tile_has(empty: Guarded):
    x, rstd, weight = randn(70, 24, seed=1), randn(70, seed=2), randn(24, seed=3)
    out = empty(70, 24)
    rmsnorm.recompute(x, rstd, weight, out)
    assert_close(out, x.double() * rstd.double()[:, None] * weight.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_weight_gradient", [False, True])
@pytest.mark.parametrize(("add", "accumulate"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    ("rows", "width", "programs"), [(1, 24, 3), (150, 24, 2), (19, 257, 4), (5, WIDE, 2)]
)
def test_backward_is_the_gradient(
    empty: Guarded, rows: int, width: int, programs: int, add: bool, accumulate: bool,
    wide_weight_gradient: bool, dtype: torch.dtype,
):  # fmt: skip
    x, d_out = randn(rows, width, seed=1, dtype=dtype), randn(rows, width, seed=2, dtype=dtype)
    weight = randn(width, seed=3, dtype=dtype)
    weight_dtype = torch.float32 if wide_weight_gradient else dtype
    past, sums = randn(rows, width, seed=4, dtype=dtype), randn(width, seed=5, dtype=weight_dtype)

    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out, rstd = reference(exact_x, exact_weight)
    out.backward(d_out.double())
    assert exact_x.grad is not None
    assert exact_weight.grad is not None

    d_x = empty.filled(past) if add else empty(rows, width, dtype=dtype)
    d_weight = empty.filled(sums) if accumulate else empty(width, dtype=weight_dtype)
    partials = empty(programs, width)
    rmsnorm.backward(
        d_out, x, rstd.detach().float(), weight, d_x, d_weight, partials, add=add, accumulate=accumulate
    )
    assert_close(d_x, exact_x.grad + past.double() * add)
    assert_close(d_weight, exact_weight.grad + sums.double() * accumulate)


@pytest.mark.parametrize(("rows", "width"), [(150, 24), (5, WIDE)])
def test_every_program_sums_its_own_rows(empty: Guarded, rows: int, width: int):
    """Which program sums which rows, and in which order, is fixed; one without rows writes zeros."""
    x, d_out, rstd = randn(rows, width, seed=1), randn(rows, width, seed=2), randn(rows, seed=3)
    partials = empty(7, width)
    rmsnorm.backward(
        d_out, x, rstd, randn(width), empty(rows, width), empty(width), partials, add=False, accumulate=False
    )
    tile = max(1, 8192 // (4 * 32)) if width == 24 else 1  # rows of 24, padded to 32, in 8 KiB
    owner = torch.arange(rows, device=DEVICE) // tile % 7
    exact = torch.zeros(7, width, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, owner, d_out.double() * x.double() * rstd.double()[:, None])
    assert_close(partials, exact)
    idle = sorted(set(range(7)) - set(owner.tolist()))
    assert idle
    assert not bool(partials[idle].any())


def test_more_partials_than_one_load_holds_are_all_summed(empty: Guarded):
    rows, width, programs = 1100, 257, 300
    x, d_out = randn(rows, width, seed=1), randn(rows, width, seed=2)
    rstd, d_weight, partials = randn(rows, seed=3), empty(width), empty(programs, width)
    arguments = (d_out, x, rstd, randn(width), empty(rows, width), d_weight, partials)
    rmsnorm.backward(*arguments, add=False, accumulate=False)
    assert bool(partials[-44:].any())  # those beyond the first load of 256 have something to add
    assert_close(d_weight, (d_out.double() * x.double() * rstd.double()[:, None]).sum(0))


def test_the_weight_gradient_is_rounded_once(empty: Guarded):
    """1 + (2048 + 0.75 + 0.75) is 2050 in fp16, 2052 if the sum is rounded too, 2048 if each step is."""
    x = torch.full((3, 8), 0.75, dtype=torch.float16, device=DEVICE)
    x[0] = 2048.0
    ones = torch.ones(3, 8, dtype=torch.float16, device=DEVICE)
    d_weight = empty.filled(torch.ones(8, dtype=torch.float16, device=DEVICE))
    rstd = torch.ones(3, device=DEVICE)
    d_x = empty(3, 8, dtype=torch.float16)
    rmsnorm.backward(
        ones, x, rstd, torch.zeros_like(ones[0]), d_x, d_weight, empty(3, 8), add=False, accumulate=True
    )
    assert d_weight.tolist() == [2050.0] * 8
