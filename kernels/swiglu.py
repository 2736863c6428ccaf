"""SwiGLU (Shazeer 2020, arXiv:2002.05202): out = silu(gate) * up, with silu(z) = z * sigmoid(z).

    d_up = d_out * silu(gate)      d_gate = d_out * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate)))

gate_up (N, 2F) holds gate and up side by side, as one GEMM made them; out and d_out are (N, F); all are bf16,
fp16 or fp32. Arithmetic is in fp32, and each output is rounded once. Only gate_up is saved. The backward
overwrites it by its gradient, and writes the forward's out again in the same pass, which the weight gradient
after it needs: so no one has to keep it.
"""

import torch
import triton
import triton.language as tl

from albor.kernels.tile import NUM_WARPS, tile_of


@triton.jit
def _silu(gate):
    """sigmoid(gate) and silu(gate). exp(-gate) overflows to infinity where the sigmoid is 0."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    return sigmoid, gate * sigmoid


@triton.jit
def swiglu_forward_kernel(
    gate_up, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program per tile of out; the tiles of the same rows follow each other."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((program % tiles) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < WIDTH)
    gate_place = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    _, silu = _silu(gate)
    tl.store(out + row * WIDTH + column, (silu * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    d_out, gate_up, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program per tile, as the forward's: it has read both halves of its gate_up before it writes them."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = ((program % tiles) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < rows) & (column < WIDTH)
    gate_place = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(gate_place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_place + WIDTH, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(d_out + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid, silu = _silu(gate)
    d_gate = upstream * up * (sigmoid * (1.0 + gate * (1.0 - sigmoid)))
    tl.store(gate_place, d_gate.to(gate_up.dtype.element_ty), mask=inside)
    tl.store(gate_place + WIDTH, (upstream * silu).to(gate_up.dtype.element_ty), mask=inside)
    tl.store(out + row * WIDTH + column, (silu * up).to(out.dtype.element_ty), mask=inside)


def forward(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out (N, F) = silu(gate) * up of gate_up (N, 2F); both are contiguous."""
    rows, width = out.shape
    assert gate_up.is_contiguous()
    assert out.is_contiguous()
    tile_rows, columns = tile_of(width)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns),)
    swiglu_forward_kernel[grid](
        gate_up, out, rows, WIDTH=width, ROWS=tile_rows, COLUMNS=columns, num_warps=NUM_WARPS
    )


def backward(d_out: torch.Tensor, gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """gate_up (N, 2F) becomes its gradient, out (N, F) the forward's product again, bit for bit.

    d_out (N, F) is read only. All are contiguous.
    """
    rows, width = out.shape
    assert all(t.is_contiguous() for t in (d_out, gate_up, out))
    tile_rows, columns = tile_of(width)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns),)
    swiglu_backward_kernel[grid](
        d_out, gate_up, out, rows, WIDTH=width, ROWS=tile_rows, COLUMNS=columns, num_warps=NUM_WARPS
    )
