"""Signals during an evaluation: the first ends it after the batch in progress, the second at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from albor.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """While entered, signals wait for `check`, which is called between batches. Ignored ones stay ignored.

    `next_time` says what the same command will do.
    """

    def __init__(self, next_time: str) -> None:
        self._next_time = next_time
        self._reason: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted if a signal has come; what was computed before is stored."""
        if self._reason is not None:
            raise Interrupted(f"stopped by {self._reason}; {self._next_time}")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason is not None:
            os._exit(128 + number)
        self._reason = signal.Signals(number).name
        line = f"albor: {self._reason}: stopping after this batch; once more ends at once\n"
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
