"""A sweep for people: GiB by cell, in 80 columns, marked where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from albor.errors import DoesNotFit
from albor.memory.plot import check_target, plot_sweep
from albor.memory.sweep import Cell, Sweep, sweep
from albor.units import GIB, format_bytes

_WIDTH = 80
_MOST_REASONS = 3
_STYLES = {True: "green", False: "red", None: ""}


def render_sweep(result: Sweep, console: Console) -> None:
    """Prints the grid and what its marks mean. Columns that 80 do not hold follow below the others."""
    base = result.base
    _print(console, f"{base.config.name} on {base.hardware.description}", "bold")
    capacity = base.hardware.capacity_bytes
    known = f"{format_bytes(capacity)} available" if capacity is not None else "no capacity known"
    if capacity is None and base.device == "cuda":
        known += "; give --gpu NAME or --vram 24GiB"
    _print(console, f"GiB needed, {known}")
    for block in _blocks(result):
        console.print()
        for row in block:
            console.print(row, soft_wrap=True)
    console.print()
    for line in _legend(result):
        _print(console, line)


def _blocks(result: Sweep) -> Iterator[list[Text]]:
    """The table, cut into blocks of as many columns as a line holds."""
    rows, columns = result.axes[0], result.columns
    heads = columns.values if columns else ("",)
    texts = [[_text(cell, result) for cell in row] for row in result.rows]
    width = max(len(text) for row in texts for text in row)
    width = 2 + max(width, *(len(head) + 1 for head in heads))
    margin = max(len(rows.key), *(len(value) for value in rows.values))
    held = max(1, (_WIDTH - margin) // width)
    for start in range(0, len(heads), held):
        block = [Text(" " * margin + "  " + columns.key)] if columns else []
        # A number ends one place before its cell does, where a bracket may close.
        names = "".join(f"{head + ' ':>{width}}" for head in heads[start : start + held])
        block.append(Text(f"{rows.key:>{margin}}{names}"))
        for value, row, cells in zip(rows.values, texts, result.rows, strict=True):
            line = Text(f"{value:>{margin}}")
            for text, cell in zip(row[start : start + held], cells[start : start + held], strict=True):
                style = "dim" if cell.estimate is None else _STYLES[cell.estimate.fits]
                line.append(f"{text:>{width}}", style=style)
            block.append(line)
        for line in block:
            line.rstrip()
        yield block


def _text(cell: Cell, result: Sweep) -> str:
    if cell.estimate is None:
        return "- "
    number = f"{cell.estimate.required_bytes / GIB:.2f}"
    number = f"[{number}]" if cell.estimate is result.base else f" {number} "
    return f"x{number}" if cell.estimate.fits is False else number


def _legend(result: Sweep) -> Iterator[str]:
    cells, base = result.cells, result.base
    marks = {
        "x  does not fit": any(e.fits is False for e in result.estimates),
        "[ ]  as configured": any(e is base for e in result.estimates),
        "-  refused": any(cell.estimate is None for cell in cells),
    }
    if any(marks.values()):
        yield "     ".join(mark for mark, occurs in marks.items() if occurs)
    capacity = base.hardware.capacity_bytes or 0
    short = [e for e in result.estimates if e.fits is False and e.required_bytes <= capacity]
    if short:
        yield f"{len(short)} of them would fit the device, but not this machine's host memory."
    reasons = list(dict.fromkeys(cell.problem for cell in cells if cell.problem))
    for reason in reasons[:_MOST_REASONS]:
        yield f"Refused: {reason}"
    if len(reasons) > _MOST_REASONS:
        yield f"and for {len(reasons) - _MOST_REASONS} more reasons (--json gives each cell's)"
    tokens = sorted({e.config.tokens_per_step for e in result.estimates})
    if len(tokens) == 1:
        yield f"Tokens per step: {tokens[0]:,} in every cell"
        return
    yield f"Tokens per step change with the cell, from {tokens[0]:,} to {tokens[-1]:,}:"
    yield "train.gradient_accumulation_steps can make up for it, and takes no memory."


def run_sweep(
    path: Path,
    overrides: list[str],
    gpu: str | None,
    vram: int | None,
    as_json: bool,
    plot: Path | None,
    console: Console,
) -> int:
    """The command with `--sweep`: prints the grid, and returns 4 where no cell fits."""
    if plot is not None:
        check_target(plot)
    result = sweep(path, overrides, gpu, vram)
    if plot is not None:
        plot_sweep(result, plot)
    if as_json:
        answer = {**result.base.as_json(), "sweep": result.as_json()}
        print(json.dumps(answer | ({"plot": str(plot)} if plot else {}), indent=2), file=console.file)
    else:
        render_sweep(result, console)
        if plot is not None:
            _print(console, f"Picture: {plot}")
    return DoesNotFit.exit_code if result.fits is False else 0


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(line, style=style), soft_wrap=True)
