"""How far an evaluation is: a bar on a terminal, now and then a line in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Report = Callable[[str, int, int], None]  # what is scored, how much of it is done, how much there is

_SILENT_SECONDS = 10.0


@contextmanager
def show_counts(console: Console) -> Iterator[Report]:
    """Yields a function to call with (what, done, in all), as often as one likes."""
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            tasks = {}

            def draw(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done)

            yield draw
        return

    seen: set[str] = set()
    last = time.monotonic()

    def write(what: str, done: int, total: int) -> None:
        nonlocal last
        if what in seen and done < total and time.monotonic() - last < _SILENT_SECONDS:
            return
        seen.add(what)
        last = time.monotonic()
        console.out(f"{what}: {done:,} of {total:,}", highlight=False)

    yield write
