"""Lines and columns for a terminal or a pipe. What a run holds may be anybody's: it is made printable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from rich.console import Console
from rich.text import Text

from albor.runs.state import State

STATE_STYLES = {
    State.RUNNING: "green",
    State.STOPPED: "yellow",
    State.LOST: "yellow",
    State.DIVERGED: "red",
    State.FAILED: "red",
}


def printable(text: object) -> str:
    """`text` in one line, without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in str(text))


def table(rows: Sequence[Sequence[str | Text]], right: Sequence[int] = ()) -> list[Text]:
    """`rows` with their cells below each other; those of the columns `right` end at the same place."""
    cells = [[cell if isinstance(cell, Text) else Text(printable(cell)) for cell in row] for row in rows]
    widths = [
        max((row[place].cell_len for row in cells if place < len(row)), default=0)
        for place in range(max(map(len, cells), default=0))
    ]
    lines = []
    for row in cells:
        line = Text()
        for place, cell in enumerate(row):
            gap = " " * (widths[place] - cell.cell_len)
            line.append("  " if place else "")
            if place in right:
                line.append(gap)
            line.append_text(cell)
            if place not in right and place < len(row) - 1:
                line.append(gap)
        line.rstrip()
        lines.append(line)
    return lines


def show(console: Console, lines: Sequence[Text | str]) -> None:
    """Prints lines as they are: the reader's terminal may wrap them, a pipe gets them whole."""
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def local_time(seconds: float | None) -> str:
    """`2026-11-21 09:52`, in the reader's time zone; `-` where it is not known."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else "-"


def iso_time(seconds: float | None) -> str | None:
    """The same for a program, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat("T", "seconds") if seconds else None


def seconds_of(time: object) -> float | None:
    """A time in ISO 8601, as logs hold it, in seconds since the epoch; None for anything else."""
    try:
        moment = datetime.fromisoformat(time) if isinstance(time, str) else None
        return moment.timestamp() if moment is not None and moment.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def number(value: float | None, digits: int = 4) -> str:
    """A loss or a rate with so many places; `-` where it is not known."""
    return "-" if value is None else f"{value:.{digits}f}"
