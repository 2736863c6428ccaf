"""Signals during an evaluation: the first ends it after the batch in progress, the second at once."""

from __future__ import annotations

import threading
from types import TracebackType

from albor.errors import Interrupted
from albor.signals import TwoSignals


class Stop:
    """While entered, signals wait for `check`, which is called between batches. In any other than the main
    thread, which alone gets signals, they are left as they are.

    `next_time` says what the same command will do.
    """

    def __init__(self, next_time: str) -> None:
        self._next_time = next_time
        self._reason: str | None = None
        self._signals: TwoSignals | None = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._signals = TwoSignals(self._hear, lambda: "stopping after this batch")
            self._signals.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._signals is not None:
            self._signals.end()

    def check(self) -> None:
        """Raises Interrupted if a signal has come; what was computed before is stored."""
        if self._reason is not None:
            raise Interrupted(f"stopped by {self._reason}; {self._next_time}")

    def _hear(self, name: str) -> None:
        self._reason = name
