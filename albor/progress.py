"""Progress of long work that counts bytes: a bar on a terminal, a line per stage in a pipe."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Report = Callable[[str, int, int | None], None]  # what is going on, bytes done, bytes in all where known

_SILENT_SECONDS = 10.0  # in a pipe, a stage that lasts longer than this says how far it is


@contextmanager
def show_progress(console: Console) -> Iterator[Report]:
    """Yields a function to call with (stage, bytes done, bytes in all or None), as often as one likes.

    Meanwhile SIGTERM and SIGHUP end the process as Ctrl-C does.
    """
    with signals_unwind(), _reporter(console) as report:
        yield report


@contextmanager
def signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP end the process as Ctrl-C does: what is under way cleans up, and the cursor comes
    back.

    One that the process was started to ignore stays ignored, and one that somebody handles stays handled.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    taken = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _reporter(console: Console) -> Iterator[Report]:
    if console.is_terminal and not console.is_dumb_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            tasks: dict[str, int] = {}

            def draw(stage: str, done: int, total: int | None) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)  # type: ignore[arg-type]  # a TaskID is an int

            yield draw
        return

    seen: set[str] = set()
    last = time.monotonic()

    def write(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        if stage in seen and time.monotonic() - last < _SILENT_SECONDS:
            return
        share = f" {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total and stage in seen else ""
        seen.add(stage)
        last = time.monotonic()
        console.out(f"{stage}{share}", highlight=False)

    yield write
