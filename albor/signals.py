"""SIGINT, SIGTERM and SIGHUP: the first asks for the end in order, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# `timeout` and some schedulers signal a process and then its whole group: one request, which comes twice.
ONE_REQUEST_SECONDS = 0.5


class TwoSignals:
    """Between `begin` and `end`, which the main thread calls, the first signal is handed over instead of
    ending the process, and the second ends it.

    `heard` gets its name, in the main thread, and may raise. `doing` says what is done about it, and is
    called in another thread, which tells the terminal at once: what was asked for may take a while. That
    thread also sees the second signal, for the main thread may sit in a long call. A signal that the process
    was started to ignore (nohup) stays ignored.
    """

    def __init__(self, heard: Callable[[str], None], doing: Callable[[], str]):
        self._heard, self._doing = heard, doing
        self._has_heard = False
        self._previous: dict[int, Any] = {}

    def begin(self) -> None:
        """Take the signals over."""
        heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        arrivals, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        arguments = (arrivals, heeded, self._answer)
        threading.Thread(target=_end_at_the_second, args=arguments, daemon=True).start()
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}

    def end(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._wakeup)  # which ends the thread, and that closes the other end

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._has_heard:
            self._has_heard = True
            self._heard(signal.Signals(number).name)

    def _answer(self, number: int) -> None:
        """From a thread that must not wait for the console's lock, and not to standard output, which may be
        JSON.
        """
        line = f"albor: {signal.Signals(number).name}: {self._doing()}; once more ends at once\n"
        with suppress(OSError):
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())


def _end_at_the_second(arrivals: int, heeded: list[signal.Signals], answer: Callable[[int], None]) -> None:
    """Reads the numbers of the signals that arrive, until the pipe is closed; the first is answered."""
    first: float | None = None
    while numbers := os.read(arrivals, 1):
        if numbers[0] not in heeded:
            continue
        if first is None:
            first = time.monotonic()
            answer(numbers[0])
        elif time.monotonic() - first > ONE_REQUEST_SECONDS:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), b"\x1b[?25h\r\n")  # the live display hides the cursor
            os._exit(128 + numbers[0])  # not even a save in progress: it leaves no half-written checkpoint
    os.close(arrivals)
