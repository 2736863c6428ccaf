"""How elementwise passes are cut."""

import pytest

from albor.kernels.tile import TILE, tile_of


@pytest.mark.parametrize("width", [512, 768, 1024, 2048, 3072, 4096, 6144])
def test_no_lane_is_idle_at_the_shipped_widths(width: int):
    rows, columns = tile_of(width)
    assert width % columns == 0
    assert rows * columns == TILE


@pytest.mark.parametrize(
    ("width", "columns"), [(1, 1), (24, 32), (257, 512), (640, 1024), (1280, 256), (1500, 1024)]
)
def test_other_widths_take_the_next_power_of_two(width: int, columns: int):
    assert tile_of(width) == (TILE // columns, columns)
