"""`train.max_hours`: when a run has to stop so that its last save is over in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from albor.config import RunConfig
from albor.errors import ConfigError, Problem

_ASSUMED_BYTES_PER_SECOND = 100e6  # of a save, until one has been timed: a slow network disk


class TimeLimit:
    """Counts from its making, on a clock that no adjustment of the time of day moves.

    It is near when what is left is no more than two saves and one step, each as long as the longest so far:
    a step may have begun when it is looked at, and the last save may be slower than any before. With
    checkpoint.background it is three: one may be under way, which the last one waits for.
    """

    def __init__(self, clock: Callable[[], float] | None = None):
        self._clock = clock or time.monotonic
        self._started = self._clock()
        self.seconds: float | None = None  # no limit
        self._longest_save, self._longest_step = 0.0, 0.0  # seconds
        self._save_is_assumed = True
        self._saves = 2

    def set(self, config: RunConfig, checkpoint_bytes: int) -> None:
        """Takes `train.max_hours`. Raises ConfigError where it leaves no time between two saves."""
        hours = config.train.max_hours
        if hours is None:
            return
        self.seconds = hours * 3600
        self._saves = 3 if config.checkpoint.background else 2
        self._longest_save = checkpoint_bytes / _ASSUMED_BYTES_PER_SECOND
        if self.margin >= self.seconds:
            problem = f"is {hours:g}, {self.seconds:g} s, of which {self.margin:.2g} s are kept for saving"
            raise ConfigError([Problem("train.max_hours", problem, "raise it, or set it to null")])

    def expect_save(self, seconds: float) -> None:
        """A save of this run was timed: now, or in an earlier process."""
        longest = 0.0 if self._save_is_assumed else self._longest_save
        self._longest_save, self._save_is_assumed = max(longest, seconds), False

    @property
    def margin(self) -> float:
        """Seconds before the limit at which the run stops."""
        return self._saves * self._longest_save + self._longest_step

    def is_near(self) -> bool:
        """Whether the run has to save and stop now."""
        return self.seconds is not None and self._clock() - self._started >= self.seconds - self.margin

    def is_last_call(self) -> bool:
        """Whether what is left is hardly enough for one save."""
        return self.seconds is not None and self._clock() - self._started >= self.seconds - self._longest_save

    @contextmanager
    def step(self) -> Iterator[None]:
        """Times a step."""
        began = self._clock()
        yield
        self._longest_step = max(self._longest_step, self._clock() - began)
