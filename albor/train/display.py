"""What one sees during training: a live block on a terminal, plain lines in a pipe, or only messages.

The trainer hands over numbers by their metric names and keeps no time for the display: the speed over the
last rows, and with it the time that is left, is worked out here.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from albor.units import format_count, format_duration

Metrics = Mapping[str, float | None]

_SPEED_ROWS = 20  # the time left follows the speed over this many rows


class TrainingConsole(Console):
    """A console whose reader may go away: the training does not end with the pager that it was piped to."""

    def on_broken_pipe(self) -> None:
        """Writes into the void from here on; metrics.jsonl and events.jsonl have everything."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """Shows messages and nothing else (`--json`); the two below also show the training.

    A context manager: the terminal is as it was when the block is left, by whatever way.
    """

    def __init__(self, console: Console):
        self.console = console

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin; the clock for the time that is left runs from here."""

    def stop(self) -> None:
        """End, leaving the terminal as it was. May be called twice."""

    def row(self, step: int, metrics: Metrics) -> None:
        """Show `train/loss`, `train/lr`, `train/grad_norm`, `train/tokens_per_second`, `train/mfu` (a
        fraction) and `memory/process` after `step`; what is None or absent is not known."""

    def validation(self, step: int, metrics: Metrics) -> None:
        """Show `val/loss` and `val/bits_per_byte`, measured after `step`."""

    def checkpoint(self, path: Path) -> None:
        """Show where the latest checkpoint lies."""

    def message(self, text: str) -> None:
        """Show `text` as it is, in any mode."""
        self.console.out(text, highlight=False)


class PlainDisplay(Display):
    """One line for each thing that happens; columns line up, and `grep '^step'` finds the rows."""

    def __init__(self, console: Console, remaining: RemainingTime):
        super().__init__(console)
        self._remaining = remaining

    def start(self) -> None:
        self._remaining.start()

    def row(self, step: int, metrics: Metrics) -> None:
        # Memory hardly moves and would make the line too long for 80 columns; metrics.jsonl has it.
        known = {label: text for label, text in _numbers(metrics).items() if text != "-" and label != "mem"}
        parts = [_LINE_FORMS[label].format(text) for label, text in known.items()]
        parts.append(f"eta {format_duration(self._remaining.after(step))}")
        self.message("  ".join([self._place(step), *parts]))

    def validation(self, step: int, metrics: Metrics) -> None:
        self.message(f"{self._place(step)}  {_describe_validation(metrics)}")

    def checkpoint(self, path: Path) -> None:
        self.message(f"checkpoint {path}")

    def _place(self, step: int) -> str:
        total = self._remaining.total_steps
        return f"step {step:>{len(str(total))}}/{total}"


class LiveDisplay(Display):
    """One block that is drawn over itself, with messages scrolling above it."""

    def __init__(self, console: Console, remaining: RemainingTime, title: str):
        super().__init__(console)
        self._remaining = remaining
        self._title = title
        self._step = remaining.first_step
        self._seconds_left: float | None = None
        self._metrics: Metrics = {}
        self._validation = "-"
        self._checkpoint = "-"
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=2)

    def start(self) -> None:
        self._remaining.start()
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def row(self, step: int, metrics: Metrics) -> None:
        self._step, self._metrics = step, metrics
        self._seconds_left = self._remaining.after(step)

    def validation(self, step: int, metrics: Metrics) -> None:
        self._validation = f"{_describe_validation(metrics).removeprefix('validation ')}  (step {step})"

    def checkpoint(self, path: Path) -> None:
        self._checkpoint = path.name

    def _draw(self) -> Panel:
        total = self._remaining.total_steps
        progress = Table.grid(padding=(0, 2), expand=True)
        progress.add_column(ratio=1)
        for _ in range(3):
            progress.add_column(justify="right", no_wrap=True)
        progress.add_row(
            ProgressBar(total=total, completed=self._step),
            f"{self._step}/{total}",
            f"{self._step / total:.0%}",
            f"eta {format_duration(self._seconds_left)}",
        )
        numbers = Table.grid(padding=(0, 2), expand=True)
        cells = _numbers(self._metrics)
        for _ in cells:
            numbers.add_column(ratio=1, no_wrap=True)
        numbers.add_row(*(Text(label, style="dim") for label in cells))
        numbers.add_row(*(Text(text, style="bold") for text in cells.values()))
        last = Table.grid(padding=(0, 2))
        last.add_row(Text("validation", style="dim"), self._validation)
        last.add_row(Text("checkpoint", style="dim"), self._checkpoint)
        return Panel(
            Group(progress, numbers, last), title=self._title, title_align="left", border_style="dim"
        )


class RemainingTime:
    """How long the run still takes, from the steps and the time of the last rows.

    A resumed run starts at `first_step`. `clock` gives seconds.
    """

    def __init__(self, total_steps: int, first_step: int = 0, clock: Callable[[], float] = time.monotonic):
        self.total_steps = total_steps
        self.first_step = first_step
        self._clock = clock
        self._rows: deque[tuple[float, int]] = deque(maxlen=_SPEED_ROWS)

    def start(self) -> None:
        self._rows.append((self._clock(), self.first_step))

    def after(self, step: int) -> float | None:
        """Seconds from the end of `step` to the end of the run; None while that cannot be known."""
        self._rows.append((self._clock(), step))
        (then, first), (now, last) = self._rows[0], self._rows[-1]
        return (self.total_steps - last) * (now - then) / (last - first) if last > first else None


def make_display(
    console: Console, total_steps: int, *, first_step: int = 0, title: str = "training", json: bool = False
) -> Display:
    """The display that suits `console`: live on a terminal that can move its cursor, plain lines elsewhere.

    With `json`, standard output belongs to the one JSON object, and messages go to standard error.
    """
    if json:
        return Display(Console(stderr=True))
    remaining = RemainingTime(total_steps, first_step)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(console, remaining, title)
    return PlainDisplay(console, remaining)


_LINE_FORMS = {
    "loss": "loss {:>6}",
    "lr": "lr {:>7}",
    "norm": "norm {:>5}",
    "tok/s": "{:>5} tok/s",
    "mfu": "mfu {:>5}",
}


def _numbers(metrics: Metrics) -> dict[str, str]:
    """The text of each number in a row, by its short label."""
    memory = metrics.get("memory/process")
    return {
        "loss": _number(metrics.get("train/loss"), ".3f"),
        "lr": _number(metrics.get("train/lr"), ".1e"),
        "norm": _number(metrics.get("train/grad_norm"), ".2f"),
        "tok/s": format_count(metrics.get("train/tokens_per_second")),
        "mfu": _number(metrics.get("train/mfu"), ".1%"),
        "mem": "-" if memory is None else f"{memory / 2**30:.1f} GiB",
    }


def _describe_validation(metrics: Metrics) -> str:
    loss, bits = metrics.get("val/loss"), metrics.get("val/bits_per_byte")
    return f"validation loss {_number(loss, '.3f')}  bits/byte {_number(bits, '.3f')}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
