"""What one sees when a run has ended: the loss curve, what the model is worth, and where everything lies."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # Unicode braille: bit of each column's four dots
_BRAILLE = 0x2800
_POINT = "●"
_CURVE_COLOUR, _POINT_COLOUR, _NO_COLOUR = "\x1b[36m", "\x1b[33m", "\x1b[0m"
_MODEL = "this model"
_MAX_EXPONENT = 700.0  # beyond it a float overflows, and no perplexity means anything


def draw_loss_curve(
    steps: Sequence[int],
    losses: Sequence[float | None],
    validation: Sequence[tuple[int, float]],
    width: int,
    colour: bool,
    height: int = 12,
) -> str:
    """Training loss as a line of braille dots and validation losses as points, over the steps.

    `width` and `height` are in characters, the axes' labels not counted in `height`. Losses that are None or
    not finite leave no dot. Returns an empty string when there is nothing to draw.
    """
    curve = [(s, x) for s, x in zip(steps, losses, strict=True) if x is not None and math.isfinite(x)]
    points = [(s, x) for s, x in validation if math.isfinite(x)]
    if not curve and not points:
        return ""
    all_steps, all_losses = zip(*curve, *points, strict=True)
    first, last = min(all_steps), max(max(all_steps), min(all_steps) + 1)
    low, high = min(all_losses), max(all_losses)
    high = high if high > low else low + 1.0
    labels = {_to_cell(tick, high, low, height): f"{tick:g}" for tick in _ticks(low, high, height // 3)}
    margin = max(map(len, labels.values()), default=0)
    columns = max(10, width - margin - 2)

    cells = [[0] * columns for _ in range(height)]
    for x, rows in _strokes(_mean_by_column(curve, first, last, 2 * columns), high, low, 4 * height):
        for row in rows:
            cells[row // 4][x // 2] |= _DOTS[x % 2][row % 4]
    marked = {(_to_cell(y, high, low, height), _to_cell(x, first, last, columns)) for x, y in points}

    lines = []
    for row in range(height):
        text = "".join(
            _paint(_POINT, _POINT_COLOUR, colour)
            if (row, column) in marked
            else _paint(chr(_BRAILLE + cells[row][column]), _CURVE_COLOUR, colour)
            if cells[row][column]
            else " "
            for column in range(columns)
        )
        lines.append(f"{labels.get(row, ''):>{margin}} {'┤' if row in labels else '│'}{text}".rstrip())
    lines.append(" " * (margin + 1) + "└" + "─" * columns)
    ends = f"{first}{f'step {last}':>{columns - len(str(first))}}"
    lines.append(" " * (margin + 2) + ends)
    key = f"{_paint('⠤⠤', _CURVE_COLOUR, colour)} training loss"
    if points:
        key += f"   {_paint(_POINT, _POINT_COLOUR, colour)} validation loss"
    return "\n".join([" " * (margin + 2) + key, *lines])


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round values from `low` to `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _strokes(
    dots: Sequence[tuple[int, float]], high: float, low: float, rows: int
) -> Iterator[tuple[int, range]]:
    """The rows to fill in each column so that straight lines join the `dots` (column, loss) without a gap."""
    for (x, y), (next_x, next_y) in pairwise([*dots[:1], *dots]):
        above = _to_cell(y, high, low, rows)
        for column in range(x + 1 if next_x > x else x, next_x + 1):
            share = (column - x) / (next_x - x) if next_x > x else 0.0
            row = _to_cell(y + share * (next_y - y), high, low, rows)
            yield column, range(min(row, above), max(row, above) + 1)
            above = row


def _to_cell(value: float, start: float, end: float, cells: int) -> int:
    """The cell of `cells` between `start` and `end` in which `value` lies."""
    return round((value - start) / (end - start) * (cells - 1))


def _mean_by_column(
    curve: Sequence[tuple[int, float]], first: int, last: int, columns: int
) -> list[tuple[int, float]]:
    by_column: dict[int, list[float]] = {}
    for step, loss in curve:
        by_column.setdefault(_to_cell(step, first, last, columns), []).append(loss)
    return [(column, sum(losses) / len(losses)) for column, losses in sorted(by_column.items())]


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_NO_COLOUR}" if colour else text


def compression_bits_per_byte(text: bytes) -> dict[str, float]:
    """Bits per byte that gzip and xz, each at its strongest, need for `text`: what a model has to beat."""
    if not text:
        raise ValueError("there is no text to compress")
    compressed = {
        "gzip": gzip.compress(text, compresslevel=9, mtime=0),
        "xz": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8 * len(data) / len(text) for name, data in compressed.items()}


@dataclass(frozen=True)
class Summary:
    """What is told at the end of a run.

    `compression` is bits per byte by compressor's name, on the text of the validation; `samples` are prompts
    with what the model wrote after them; `places` are paths by what lies there; `smoke` is the smoke test's
    result, where there was one.
    """

    validation_loss: float | None
    bits_per_byte: float | None
    compression: Mapping[str, float]
    samples: Sequence[tuple[str, str]]
    places: Mapping[str, str]
    smoke: str | None = None


def print_summary(console: Console, summary: Summary) -> None:
    """Print `summary`; in a pipe no line is cut or wrapped."""
    _heading(console, "Held-out text")
    loss = summary.validation_loss
    if loss is not None:
        _line(console, f"  {'validation loss':<26} {loss:6.3f}")
        _line(console, f"  {'perplexity':<26} {math.exp(min(loss, _MAX_EXPONENT)):6.2f}")
    rivals = {_MODEL: summary.bits_per_byte, **summary.compression}
    for name, bits in sorted(rivals.items(), key=lambda rival: math.inf if rival[1] is None else rival[1]):
        text = f"{'-':>6}" if bits is None else f"{bits:6.3f}"
        _line(console, f"  {f'bits per byte, {name}':<26} {text}", "bold green" if name == _MODEL else "")
    for number, (prompt, continuation) in enumerate(summary.samples, 1):
        _heading(console, f"Sample {number}")
        sample = Text(prompt, style="bold") + Text(continuation.rstrip("\n"), style="not bold")
        if console.is_terminal:
            console.print(Padding(sample, (0, 2)))
        else:
            console.print(sample, soft_wrap=True)
    if summary.smoke:
        _heading(console, "Smoke test")
        _line(console, f"  {summary.smoke}")
    if summary.places:
        _heading(console, "Where everything lies")
        longest = max(map(len, summary.places))
        for what, where in summary.places.items():
            _line(console, f"  {what:<{longest}}   {where}")


def _heading(console: Console, title: str) -> None:
    console.print()
    _line(console, title, "bold")


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style), soft_wrap=True)
