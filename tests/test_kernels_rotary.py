"""The rotary kernel against a multiplication of complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, Guarded, assert_close, empty, randn

from albor.kernels import rotary

__all__ = ["empty"]

# (query heads, key heads, head_dim, length, sequences): 1:1 to 8:1, one head, odd sizes
CASES = [(1, 1, 6, 5, 1), (4, 2, 8, 7, 3), (8, 1, 16, 20, 2), (3, 3, 64, 9, 2), (6, 3, 24, 11, 5)]


def tables(
    positions: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (positions, D/2)."""
    half = head_dim // 2
    angle = torch.outer(torch.arange(positions).double(), 10000.0 ** -(torch.arange(half).double() / half))
    return angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)


def reference(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, length: int, start: int = 0
) -> torch.Tensor:
    """A new qkv in float64: a head's halves as real and imaginary parts, times cos + i sin."""
    half = cos.shape[1]
    packed = qkv.double().view(qkv.shape[0], -1, 2, half)
    position = torch.arange(qkv.shape[0], device=qkv.device) % length + start
    turn = torch.complex(cos.double(), sin.double())[position][:, None]
    turned = torch.complex(packed[:, :heads, 0], packed[:, :heads, 1]) * turn
    front = torch.stack([turned.real, turned.imag], 2)
    return torch.cat([front, packed[:, heads:]], 1).view(qkv.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "head_dim", "length", "sequences"), CASES)
def test_queries_and_keys_turn_and_values_do_not(
    empty: Guarded, queries: int, keys: int, head_dim: int, length: int, sequences: int, dtype: torch.dtype
):
    before = randn(length * sequences, (queries + 2 * keys) * head_dim, dtype=dtype)
    cos, sin = tables(length + 3, head_dim)
    qkv = empty.filled(before)
    rotary.rotate(qkv, cos, sin, queries + keys, length)
    assert_close(qkv, reference(before, cos, sin, queries + keys, length))
    front = (queries + keys) * head_dim
    assert torch.equal(qkv[:, front:], before[:, front:])
    assert torch.equal(qkv[::length, :front], before[::length, :front])  # position 0 turns by nothing


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "head_dim", "length", "sequences"), CASES)
def test_the_inverse_is_the_gradient(
    empty: Guarded, queries: int, keys: int, head_dim: int, length: int, sequences: int, dtype: torch.dtype
):
    d_out = randn(length * sequences, (queries + 2 * keys) * head_dim, dtype=dtype)
    cos, sin = tables(length, head_dim)
    inputs = torch.zeros_like(d_out, dtype=torch.float64, requires_grad=True)
    reference(inputs, cos, sin, queries + keys, length).backward(d_out.double())
    assert inputs.grad is not None
    gradient = empty.filled(d_out)
    rotary.rotate(gradient, cos, sin, queries + keys, length, inverse=True)
    assert_close(gradient, inputs.grad)


def test_more_heads_than_a_program_takes(empty: Guarded):
    """The heads of the rows are counted through, and programs begin in the middle of a row."""
    heads, head_dim, rows = 5, 64, 40
    per_program = 2048 // 32
    assert rows * heads > 2 * per_program
    assert per_program % heads
    before = randn(rows, (heads + 1) * head_dim)
    cos, sin = tables(20, head_dim)
    qkv = empty.filled(before)
    rotary.rotate(qkv, cos, sin, heads, 20)
    assert_close(qkv, reference(before, cos, sin, heads, 20))


@pytest.mark.parametrize(("start", "rows"), [(1, 1), (4, 3), (16, 1)])
def test_positions_begin_at_start(empty: Guarded, start: int, rows: int):
    before = randn(rows, 4 * 8)
    cos, sin = tables(start + rows, 8)
    qkv = empty.filled(before)
    rotary.rotate(qkv, cos, sin, 3, rows, start=start)
    assert_close(qkv, reference(before, cos, sin, 3, rows, start))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_tables_of_any_floating_dtype(empty: Guarded, dtype: torch.dtype):
    before = randn(6, 4 * 8)
    cos, sin = tables(6, 8, dtype)
    qkv = empty.filled(before)
    rotary.rotate(qkv, cos, sin, 3, 6)
    assert_close(qkv, reference(before, cos, sin, 3, 6))
