"""RMSNorm with the residual addition in the same pass (Zhang & Sennrich 2019, arXiv:1910.07467).

    s = x + delta, rounded as it is stored        rstd = 1 / sqrt(mean(s^2) + eps)
    out = s * rstd * weight

and with s^ = s * rstd, g = d_out * weight, means along a row:

    d_s = rstd * (g - s^ * mean(g * s^))          d_weight = sum over rows of d_out * s^

Matrices are (N, C), bf16, fp16 or fp32; weight is (C,); rstd (N,) is fp32 and is, with s, what the backward
needs. Arithmetic is in fp32, and each output is rounded once. A program holds a row, or a tile of rows, in
registers, so that every element is read once. A row wider than REGISTER_WIDTH goes chunk by chunk, twice; the
second reading finds it in a cache.

The weight gradient is a sum over all rows. Each program of the backward sums the rows that it handles, always
the same ones, into its row of `partials`; a second kernel sums those in their order. So the sum has the same
bits every time, which a sum by atomic additions has not.
"""

import torch
import triton
import triton.language as tl

from albor.kernels.tile import NUM_WARPS, tile_of

REGISTER_WIDTH = 8192  # elements: 16 warps hold a row of each of the backward's operands without spilling
_CHUNK = 2048  # elements of a wider row at a time
_WARP_BYTES = 1024  # of each operand: two 16-byte loads in flight per thread
_BACKWARD_BYTES = 8192  # of each operand in a tile: two programs on an SM then keep its memory pipe full
_REDUCE_ROWS, _REDUCE_TILE, _REDUCE_WARPS = 256, 4096, 8  # all partials of a column in one load


@triton.jit
def _normalized(x, rstd, weight):
    """The forward's and the recomputation's product: one order of multiplication, so the same bits."""
    return x * rstd * weight.to(tl.float32)


@triton.jit
def rmsnorm_forward_kernel(
    x, delta, weight, out_sum, out, rstd, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A program per row. `delta` may be None; `out_sum` may be x or delta."""
    row = tl.program_id(0).to(tl.int64)
    start = row * WIDTH
    if WIDTH <= BLOCK:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        total = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(weight + column, mask=inside, other=0.0)
        if delta is not None:
            total += tl.load(delta + start + column, mask=inside, other=0.0).to(tl.float32)
            stored = total.to(out_sum.dtype.element_ty)
            tl.store(out_sum + start + column, stored, mask=inside)
            total = stored.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
        tl.store(
            out + start + column, _normalized(total, inverse, scale).to(out.dtype.element_ty), mask=inside
        )
    else:
        squares = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(0, WIDTH, BLOCK):
            column = chunk + tl.arange(0, BLOCK)
            inside = column < WIDTH
            total = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
            if delta is not None:
                total += tl.load(delta + start + column, mask=inside, other=0.0).to(tl.float32)
                stored = total.to(out_sum.dtype.element_ty)
                tl.store(out_sum + start + column, stored, mask=inside)
                total = stored.to(tl.float32)
            squares += total * total
        inverse = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
        tl.debug_barrier()  # what other threads stored above is read below
        summed = x if delta is None else out_sum
        for chunk in range(0, WIDTH, BLOCK):
            column = chunk + tl.arange(0, BLOCK)
            inside = column < WIDTH
            total = tl.load(summed + start + column, mask=inside, other=0.0).to(tl.float32)
            scale = tl.load(weight + column, mask=inside, other=0.0)
            product = _normalized(total, inverse, scale)
            tl.store(out + start + column, product.to(out.dtype.element_ty), mask=inside)
    tl.store(rstd + row, inverse)


@triton.jit
def rmsnorm_recompute_kernel(
    x, rstd, weight, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program per tile; the tiles of the same rows follow each other."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = (program // tiles) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inverse = tl.load(rstd + row, mask=row < rows, other=0.0)
    scale = tl.load(weight + column, mask=column < WIDTH, other=0.0)
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    product = _normalized(total, inverse[:, None], scale[None, :])
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rmsnorm_backward_kernel(
    d_out, x, rstd, weight, d_x, partials, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Program p handles the p-th tile of ROWS rows of every P, and fills row p of partials (P, WIDTH)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        here = (row < rows)[:, None] & inside[None, :]
        upstream = tl.load(d_out + place, mask=here, other=0.0).to(tl.float32)
        x_hat = tl.load(x + place, mask=here, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if ADD:
            past = tl.load(d_x + place, mask=here, other=0.0).to(tl.float32)
        x_hat *= inverse
        d_weight += upstream * x_hat
        g = upstream * scale
        mean = tl.sum(g * x_hat, 1)[:, None] / WIDTH
        gradient = inverse * (g - x_hat * mean)
        if ADD:
            gradient += past
        tl.store(d_x + place, gradient.to(d_x.dtype.element_ty), mask=here)
    tl.store(partials + program * WIDTH + column, tl.sum(d_weight, 0), mask=inside)


@triton.jit
def rmsnorm_backward_wide_kernel(
    d_out, x, rstd, weight, d_x, partials, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """As rmsnorm_backward_kernel, row by row and chunk by chunk; the sums grow in `partials` itself."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    sums = partials + program * WIDTH
    for chunk in range(0, WIDTH, BLOCK):
        column = chunk + tl.arange(0, BLOCK)
        tl.store(sums + column, tl.zeros((BLOCK,), tl.float32), mask=column < WIDTH)
    for row in range(program, rows, programs):
        start = tl.cast(row, tl.int64) * WIDTH
        inverse = tl.load(rstd + row)
        products = tl.zeros((BLOCK,), tl.float32)
        for chunk in range(0, WIDTH, BLOCK):
            column = chunk + tl.arange(0, BLOCK)
            inside = column < WIDTH
            scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(d_out + start + column, mask=inside, other=0.0).to(tl.float32) * scale
            products += g * (tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32) * inverse)
        mean = tl.sum(products, 0) / WIDTH
        tl.debug_barrier()  # the row before has stored its sums
        for chunk in range(0, WIDTH, BLOCK):
            column = chunk + tl.arange(0, BLOCK)
            inside = column < WIDTH
            scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            upstream = tl.load(d_out + start + column, mask=inside, other=0.0).to(tl.float32)
            x_hat = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32) * inverse
            d_weight = tl.load(sums + column, mask=inside, other=0.0) + upstream * x_hat
            gradient = inverse * (upstream * scale - x_hat * mean)
            if ADD:
                gradient += tl.load(d_x + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(sums + column, d_weight, mask=inside)
            tl.store(d_x + start + column, gradient.to(d_x.dtype.element_ty), mask=inside)


@triton.jit
def rmsnorm_reduce_kernel(
    partials, d_weight, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """d_weight (WIDTH,) = or += the sum of the rows of partials (count, WIDTH); a program per COLUMNS."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        here = (row < count)[:, None] & inside[None, :]
        sums += tl.load(partials + row[:, None] * WIDTH + column[None, :], mask=here, other=0.0)
    total = tl.sum(sums, 0)
    if ACCUMULATE:
        total += tl.load(d_weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_weight + column, total.to(d_weight.dtype.element_ty), mask=inside)


def _block(width: int) -> int:
    """Elements of a row that a program holds at a time."""
    return triton.next_power_of_2(width) if width <= REGISTER_WIDTH else _CHUNK


def _warps(elements: int, element_bytes: int) -> int:
    """For a program that holds so many elements, a power of two, of each operand."""
    return max(1, min(16, elements * element_bytes // _WARP_BYTES))


def forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out_sum: torch.Tensor,
    out: torch.Tensor,
    rstd: torch.Tensor,
) -> None:
    """out_sum = x + delta, out = norm(out_sum) * weight, rstd for the backward; all are contiguous.

    x, delta, out_sum, out (N, C); weight (C,); rstd (N,) fp32. Without delta, x is normalised and out_sum is
    not written. out_sum may be x or delta.
    """
    rows, width = x.shape
    assert all(t is None or t.is_contiguous() for t in (x, delta, out_sum, out))
    block = _block(width)
    rmsnorm_forward_kernel[(rows,)](
        x, delta, weight, out_sum, out, rstd, eps,
        WIDTH=width, BLOCK=block, num_warps=_warps(block, x.element_size()),
    )  # fmt: skip


def recompute(x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """`forward`'s out (N, C) from its out_sum (here x) and rstd, bit for bit."""
    rows, width = x.shape
    assert x.is_contiguous()
    assert out.is_contiguous()
    tile_rows, columns = tile_of(width)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns),)
    rmsnorm_recompute_kernel[grid](
        x, rstd, weight, out, rows, WIDTH=width, ROWS=tile_rows, COLUMNS=columns, num_warps=NUM_WARPS
    )


def backward(
    d_out: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    d_x: torch.Tensor,
    d_weight: torch.Tensor,
    partials: torch.Tensor,
    *,
    add: bool,
    accumulate: bool,
) -> None:
    """d_x (N, C) and d_weight (C,) from d_out (N, C); x (N, C) is the forward's out_sum.

    With `add`, d_x holds the gradient that came past the norm, and the norm's is added to it; with
    `accumulate`, d_weight (compute dtype or fp32) is added to. partials (P, C) fp32 is scratch, and P is the
    number of programs: at least twice the number of SMs fills a device.
    """
    rows, width = x.shape
    programs = partials.shape[0]
    assert all(t.is_contiguous() for t in (d_out, x, d_x, partials))
    block = _block(width)
    if width <= block:
        tile_rows = max(1, _BACKWARD_BYTES // (block * x.element_size()))
        rmsnorm_backward_kernel[(programs,)](
            d_out, x, rstd, weight, d_x, partials, rows,
            WIDTH=width, BLOCK=block, ROWS=tile_rows, ADD=add,
            num_warps=_warps(tile_rows * block, x.element_size()),
        )  # fmt: skip
    else:
        rmsnorm_backward_wide_kernel[(programs,)](
            d_out, x, rstd, weight, d_x, partials, rows,
            WIDTH=width, BLOCK=block, ADD=add, num_warps=_warps(block, x.element_size()),
        )  # fmt: skip
    reduced = min(triton.next_power_of_2(programs), _REDUCE_ROWS)
    columns = min(triton.next_power_of_2(width), _REDUCE_TILE // reduced)
    rmsnorm_reduce_kernel[(triton.cdiv(width, columns),)](
        partials, d_weight, programs,
        WIDTH=width, ROWS=reduced, COLUMNS=columns, ACCUMULATE=accumulate, num_warps=_REDUCE_WARPS,
    )  # fmt: skip
