"""SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from albor.errors import Interrupted
from albor.train.time_limit import TimeLimit

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and some schedulers signal a process and then its whole group: one request, which comes twice.
_ONE_REQUEST_SECONDS = 0.5


class Stopped(BaseException):
    """A signal or the time limit asked for the end; whoever has a state to save catches it.

    Like KeyboardInterrupt no Exception, so that nobody who handles failures takes it for one.
    """


class StopRequest:
    """While entered, a signal ends the run in order instead of ending the process.

    Until `defer` is called there is nothing to save, so the first signal raises Stopped where it arrives, in
    the main thread, and leaving the block makes Interrupted of it. After `defer` it is noted in `reason`, and
    `check` raises; it is called between pieces of work that are short against the grace that a scheduler
    gives: micro-batches, validation batches, the tokens of samples. A second signal ends the process from a
    thread of its own, for the main thread may sit in a long call. A signal that the process was started to
    ignore (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.limit = TimeLimit()
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._arrivals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        arguments = (self._arrivals, heeded, self._answer)
        threading.Thread(target=_end_at_the_second, args=arguments, daemon=True).start()
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._wakeup)  # which ends the thread, and that closes the other end
        # Libraries that call back make errors of their own of Stopped: SentencePiece a RuntimeError.
        if error is not None and self.reason is not None and not self._deferred:
            raise Interrupted(
                f"stopped by {self.reason} before the first step; no training is lost, and the same command "
                "begins again"
            ) from None

    def defer(self) -> None:
        """From here on there is a state to save: signals wait for `check`."""
        self._deferred = True

    def check(self) -> None:
        """Raises Stopped if a signal has come, or the time is up."""
        if self.reason is None and self.limit.is_near():
            self.reason = "train.max_hours"
        if self.reason is not None:
            raise Stopped

    def _answer(self, number: int) -> None:
        """Says at once that a first signal was heard: what it asks for may take a while. From a thread that
        must not wait for the console's lock, and not to standard output, which may be JSON.
        """
        doing = "saving" if self._deferred else "stopping"
        line = f"albor: {signal.Signals(number).name}: {doing}; once more ends at once\n"
        with suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason is None:
            self.reason = signal.Signals(number).name
            if not self._deferred:
                raise Stopped


def _end_at_the_second(arrivals: int, heeded: list[signal.Signals], answer: Callable[[int], None]) -> None:
    """Reads the numbers of the signals that arrive, until the pipe is closed; the first is answered."""
    first: float | None = None
    while numbers := os.read(arrivals, 1):
        if numbers[0] not in heeded:
            continue
        if first is None:
            first = time.monotonic()
            answer(numbers[0])
        elif time.monotonic() - first > _ONE_REQUEST_SECONDS:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\r\n")  # the live display hides the cursor
            os._exit(128 + numbers[0])  # not even a save in progress: it leaves no half-written checkpoint
    os.close(arrivals)
