"""SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked for the end; whoever has a state to save catches it."""


class StopRequest:
    """While entered, a signal is noted in `name` instead of ending the process.

    `check` is called between pieces of work that are short against the grace that a scheduler gives:
    micro-batches, validation batches, samples. A signal that the process was started to ignore (nohup) stays
    ignored.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        heeded = (number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN)
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.name is not None:
            raise Stopped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\r\n")  # the live display hides the cursor
            os._exit(128 + number)  # not even a save in progress: it leaves no half-written checkpoint behind
        self.name = signal.Signals(number).name
