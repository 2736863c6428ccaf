"""Token embedding: out[n] = weight[tokens[n]], and d_weight[t] += the sum of d_out[n] over all n of token t.

weight (V, C), out and d_out (N, C) are bf16, fp16 or fp32; d_weight (V, C) is of the same dtype or fp32. The
forward copies. The backward sums in fp32 and rounds once.

Which positions hold the same token is known on the host, before the batch is sent: `token_order` has the
positions of a token side by side, in the order of the batch, and a segment of it is summed by one program per
block of columns. So each sum has its order, and no atomic addition is needed.
"""

import torch
import triton
import triton.language as tl

from albor.kernels.tile import NUM_WARPS, tile_of

# A frequent token may own an eighth of the batch, and its segment is a chain of row loads, COLUMNS wide. The
# chain is as fast as it has bytes on their way: ROWS rows in all but one of STAGES steps (24 KiB in bf16).
_COLUMNS = 256  # a warp reads a bf16 row's block with one 16-byte load per lane
_ROWS = 16
_STAGES = 4
# Shapes are static, so most of the N segments are empty. A program takes a few: fewer programs start for
# nothing, and one load tells that all of its segments are empty.
_SEGMENTS = 4


@triton.jit
def embedding_forward_kernel(
    tokens, weight, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program per tile of out; the tiles of the same rows follow each other."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = ((program // tiles) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    token = tl.load(tokens + row, mask=row < rows, other=0)
    values = tl.load(weight + token[:, None] * WIDTH + column[None, :], mask=inside)
    tl.store(out + row[:, None] * WIDTH + column[None, :], values, mask=inside)


@triton.jit
def embedding_backward_kernel(
    d_out, unique_tokens, segment_starts, token_order, d_weight, segments,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENTS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program per SEGMENTS segments and block of columns; the blocks of a segment follow each other."""
    tiles: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    first = (program // tiles) * SEGMENTS
    end = tl.load(segment_starts + first).to(tl.int32)
    if end == segments:  # as many positions as segments: this one and all after it are empty
        return
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < WIDTH
    for segment in range(first, tl.minimum(first + SEGMENTS, segments)):
        start = end
        end = tl.load(segment_starts + segment + 1).to(tl.int32)
        if start < end:
            place = d_weight + tl.load(unique_tokens + segment) * WIDTH + column
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for step in tl.range(start, end, ROWS, num_stages=STAGES):
                index = step + tl.arange(0, ROWS)
                position = tl.load(token_order + index, mask=index < end, other=0)
                here = (index < end)[:, None] & inside[None, :]
                source = d_out + position[:, None] * WIDTH + column[None, :]
                sums += tl.load(source, mask=here, other=0.0).to(tl.float32)
            total = tl.sum(sums, 0) + tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, total.to(d_weight.dtype.element_ty), mask=inside)


def forward(tokens: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """out (N, C) = weight[tokens]: tokens (N,) int64 below V, weight (V, C), out of weight's dtype."""
    rows, width = out.shape
    assert weight.is_contiguous()
    assert out.is_contiguous()
    tile_rows, columns = tile_of(width)
    grid = (triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns),)
    embedding_forward_kernel[grid](
        tokens, weight, out, rows, WIDTH=width, ROWS=tile_rows, COLUMNS=columns, num_warps=NUM_WARPS
    )


def backward(
    d_out: torch.Tensor,
    unique_tokens: torch.Tensor,
    segment_starts: torch.Tensor,
    token_order: torch.Tensor,
    d_weight: torch.Tensor,
) -> None:
    """Adds d_out's rows (N, C) to the rows of d_weight (V, C) that they came from.

    token_order (N,) lists the positions of the batch sorted by token, stably. Its segment i, from
    segment_starts[i] to segment_starts[i + 1], has the positions of unique_tokens[i]. segment_starts is
    (N + 1,) and unique_tokens (N,): the batch's distinct tokens come first, and the segments behind them are
    empty, which is segment_starts at N and any id. All are int64.
    """
    segments, width = d_out.shape
    assert d_out.is_contiguous()
    assert d_weight.is_contiguous()
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    grid = (triton.cdiv(segments, _SEGMENTS) * triton.cdiv(width, columns),)
    embedding_backward_kernel[grid](
        d_out, unique_tokens, segment_starts, token_order, d_weight, segments,
        WIDTH=width, ROWS=_ROWS, COLUMNS=columns, SEGMENTS=_SEGMENTS, STAGES=_STAGES, num_warps=NUM_WARPS,
    )  # fmt: skip
