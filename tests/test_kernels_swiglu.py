"""SwiGLU's kernels against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, Guarded, assert_close, empty, randn

from albor.kernels import swiglu

__all__ = ["empty"]

# One row; rows and columns that do not fill a tile; more of both than a tile has.
SHAPES = [(1, 24), (5, 36), (70, 36), (3, 257), (5, 1030)]


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_forward(empty: Guarded, rows: int, width: int, dtype: torch.dtype):
    gate_up, out = randn(rows, 2 * width, dtype=dtype), empty(rows, width, dtype=dtype)
    swiglu.forward(gate_up, out)
    assert_close(out, reference(gate_up.double()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_backward_leaves_the_gradient_in_place(empty: Guarded, rows: int, width: int, dtype: torch.dtype):
    gate_up, d_out = randn(rows, 2 * width, dtype=dtype), randn(rows, width, seed=1, dtype=dtype)
    exact = gate_up.double().requires_grad_()
    reference(exact).backward(d_out.double())
    assert exact.grad is not None
    gradient, upstream, out = empty.filled(gate_up), empty.filled(d_out), empty(rows, width, dtype=dtype)
    swiglu.backward(upstream, gradient, out)
    assert_close(gradient[:, :width], exact.grad[:, :width])
    assert_close(gradient[:, width:], exact.grad[:, width:])
    assert torch.equal(upstream, d_out)


@pytest.mark.parametrize("dtype", sorted({*DTYPES, torch.float16}, key=str))
def test_backward_gives_the_forward_s_bits_again(empty: Guarded, dtype: torch.dtype):
    gate_up, d_out = randn(20, 2 * 257, dtype=dtype), randn(20, 257, seed=1, dtype=dtype)
    out, again = empty(20, 257, dtype=dtype), empty(20, 257, dtype=dtype)
    swiglu.forward(gate_up, out)
    swiglu.backward(d_out, empty.filled(gate_up), again)
    assert torch.equal(again, out)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # what is tested, in the interpreter
def test_gates_far_from_zero(empty: Guarded):
    """exp(-gate) overflows from -89 on: silu and its slope are 0 there, not NaN; on the other side 1."""
    gate = torch.tensor([[-1e30, -1000.0, -90.0, 0.0, 90.0, 1000.0, 1e30]], device=DEVICE)
    gate_up = torch.cat([gate, torch.full_like(gate, 3.0)], 1)
    gradient, out = empty.filled(gate_up), empty(1, 7)
    swiglu.backward(torch.full_like(gate, 2.0), gradient, out)
    zero = pytest.approx(0.0, abs=1e-30)
    assert out[0].tolist() == [zero, zero, zero, 0.0, *(3 * gate[0, 4:]).tolist()]
    assert gradient[0, :7].tolist() == [zero, zero, zero, 3.0, 6.0, 6.0, 6.0]
    assert gradient[0, 7:].tolist() == [zero, zero, zero, 0.0, *(2 * gate[0, 4:]).tolist()]
