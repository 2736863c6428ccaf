"""How a pass over a matrix is cut into tiles, one per program, where no sum runs along a row."""

import triton

TILE = 2048  # elements
NUM_WARPS = 4  # 16 elements a thread: two 16-byte accesses in flight per bf16 operand
_WIDEST, _NARROWEST = 1024, 256


def tile_of(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile of TILE elements over rows of `width` elements; both are powers of two.

    The columns divide the width where a power of two from 256 to 1024 does, so that no lane is idle: one does
    at every width that the shipped configurations have. The rows fill the tile.
    """
    columns = min(width & -width, _WIDEST)
    if columns < _NARROWEST:
        columns = min(triton.next_power_of_2(width), _WIDEST)
    return TILE // columns, columns
