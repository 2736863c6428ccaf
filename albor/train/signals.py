"""How a training is asked to stop: by a signal or the time limit, and where it answers."""

from __future__ import annotations

from types import TracebackType

from albor.errors import Interrupted
from albor.signals import TwoSignals
from albor.train.time_limit import TimeLimit


class Stopped(BaseException):
    """A signal or the time limit asked for the end; whoever has a state to save catches it.

    Like KeyboardInterrupt no Exception, so that nobody who handles failures takes it for one.
    """


class StopRequest:
    """While entered, a signal ends the run in order instead of ending the process.

    Until `defer` is called there is nothing to save, so the first signal raises Stopped where it arrives, in
    the main thread, and leaving the block makes Interrupted of it. After `defer` it is noted in `reason`, and
    `check` raises; it is called between pieces of work that are short against the grace that a scheduler
    gives: micro-batches, validation batches, the tokens of samples. A second signal ends the process.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.limit = TimeLimit()
        self._deferred = False
        self._signals = TwoSignals(self._hear, lambda: "saving" if self._deferred else "stopping")

    def __enter__(self) -> StopRequest:
        self._signals.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signals.end()
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

    def _hear(self, name: str) -> None:
        if self.reason is None:
            self.reason = name
            if not self._deferred:
                raise Stopped
