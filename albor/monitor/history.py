"""What a run has written so far, in the form in which it is drawn: one series for each metric.

A run that resumes or goes back writes its last steps again. A row for an earlier step than the last one
therefore takes back everything that was known beyond it; so does the same file read anew.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from datetime import datetime
from typing import Any, TypeGuard

import numpy as np

from albor.runlog import known_metrics
from albor.runs.follow import Update

GRADIENTS = "gradients/"
_EVENTS_KEPT = 200
_NORMS_KEPT = 20  # rows whose median is a block's usual gradient norm
_LARGEST = 1e308  # an integer beyond it, which no run writes, is no float; NaN is not larger
_SPEED_ROWS = 20  # as the training's own display
_BEGINNINGS = ("started", "resumed")
_ENDINGS = ("finished", "stopped", "failed", "diverged")


class Series:
    """The values of one metric over the steps, ascending; NaN and infinity are kept."""

    def __init__(self) -> None:
        self._steps, self._values = array("q"), array("d")

    def put(self, step: int, value: float) -> None:
        """The value at `step`, which is the last one from here on."""
        self.cut(step - 1)
        self._steps.append(step)
        self._values.append(value)

    def cut(self, step: int) -> None:
        """Forgets what lies beyond `step`."""
        if self._steps and self._steps[-1] > step:
            kept = bisect_right(self._steps, step)
            del self._steps[kept:], self._values[kept:]

    @property
    def last(self) -> tuple[int, float] | None:
        """(step, value)."""
        return (self._steps[-1], self._values[-1]) if self._steps else None

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the steps (int64) and the values (float64)."""
        return np.array(self._steps, dtype=np.int64), np.array(self._values, dtype=np.float64)

    def __len__(self) -> int:
        return len(self._steps)


class Process:
    """One process of a run: from when to when in seconds since 1970, and from which step."""

    def __init__(self, began: float | None, step: int):
        self.began, self.step = began, step
        self.ended: float | None = None


class History:
    """All that has been read of one run."""

    def __init__(self) -> None:
        self.revision = 0  # grows with everything that is read
        self._forget_rows()
        self._forget_events()

    def take(self, update: Update) -> None:
        """Adds what the logs have grown by. What is not as a run writes it is left out."""
        self.revision += bool(update.rows or update.events or update.rows_anew or update.events_anew)
        if update.rows_anew:
            self._forget_rows()
        if update.events_anew:
            self._forget_events()
        for row in update.rows:
            step, tokens = row.get("step"), row.get("tokens")
            if _is_count(step) and _is_count(tokens):
                self._take_row(step, tokens, known_metrics(row))
        for event in update.events:
            self._take_event(event)

    def _forget_rows(self) -> None:
        self.series: dict[str, Series] = {}
        self.step: int | None = None
        self.tokens: int | None = None
        self.norms: deque[tuple[int, dict[str, float]]] = deque(maxlen=_NORMS_KEPT)
        self._seconds, self._trained = Series(), Series()  # training seconds of each row, and its tokens

    def _forget_events(self) -> None:
        self.processes: list[Process] = []
        self.events: deque[Mapping[str, Any]] = deque(maxlen=_EVENTS_KEPT)  # without samples and memory
        self.samples: dict[str, Mapping[str, Any]] = {}  # the newest of each prompt
        self.alerts: dict[str, Mapping[str, Any]] = {}  # the newest of each rule
        self.memory: Mapping[str, Any] | None = None  # the newest record
        self._last_event: float | None = None

    def _take_row(self, step: int, tokens: int, metrics: Mapping[str, float | None]) -> None:
        if self.step is not None and step < self.step:
            self._cut(step)
        rate = metrics.get("train/tokens_per_second")
        before = self.tokens or 0
        if rate and rate > 0 and tokens > before:
            self._seconds.put(step, (tokens - before) / rate)
            self._trained.put(step, tokens - before)
        self.step, self.tokens = step, tokens
        norms: dict[str, float] = {}
        for name, value in metrics.items():
            if value is None or abs(value) > _LARGEST:
                continue
            if name.startswith(GRADIENTS):
                norms[name.removeprefix(GRADIENTS)] = value
            else:
                self.series.setdefault(name, Series()).put(step, value)
        if norms:
            self.norms.append((step, norms))

    def _cut(self, step: int) -> None:
        for series in (*self.series.values(), self._seconds, self._trained):
            series.cut(step - 1)
        while self.norms and self.norms[-1][0] >= step:
            self.norms.pop()
        self.tokens = round(self._trained.arrays()[1].sum())
        self.samples = {k: v for k, v in self.samples.items() if (v.get("step") or 0) < step}

    def _take_event(self, event: Mapping[str, Any]) -> None:
        kind, step, when = event["event"], event.get("step"), seconds_of(event.get("time"))
        before, self._last_event = self._last_event, when or self._last_event
        if kind in _BEGINNINGS:
            if self.processes and self.processes[-1].ended is None:  # killed: the last that is known of it
                self.processes[-1].ended = before
            self.processes.append(Process(when, step if _is_count(step) else 0))
            self.memory = None
            if kind == "started":
                self.alerts.clear()
        elif kind in _ENDINGS:
            if not self.processes:
                self.processes.append(Process(None, 0))
            self.processes[-1].ended = when
        if kind == "sample":
            if isinstance(event.get("prompt"), str):
                self.samples.pop(event["prompt"], None)  # the newest comes last
                self.samples[event["prompt"]] = event
            return
        if kind == "memory":
            self.memory = event
            return
        if kind == "alert" and isinstance(event.get("rule"), str):
            self.alerts[event["rule"]] = event
        self.events.append(event)

    def elapsed(self, until: float, *, running: bool) -> float | None:
        """Seconds that the run's processes have taken, pauses between them not counted. One that ended
        without a word counts to `until`, if it is the last and runs, else not beyond the last event.
        """
        total = None
        for number, process in enumerate(self.processes, start=1):
            if process.began is None:
                continue
            end = process.ended
            if end is None and number == len(self.processes):
                end = until if running else max(until, self._last_event or until)
            if end is not None:
                total = (total or 0.0) + max(0.0, end - process.began)
        return total

    def seconds_per_token(self, last_row: float | None) -> float | None:
        """Of the last rows, times what evaluations and checkpoints have added so far in this process, whose
        newest row was written at `last_row`.
        """
        steps, seconds = self._seconds.arrays()
        tokens = self._trained.arrays()[1]
        if not len(steps):
            return None
        pace = float(seconds[-_SPEED_ROWS:].sum() / tokens[-_SPEED_ROWS:].sum())
        process = self.processes[-1] if self.processes else None
        if process is None or process.began is None or last_row is None:
            return pace
        training = float(seconds[steps > process.step].sum())
        return pace * max(1.0, (last_row - process.began) / training) if training else pace


def seconds_of(time: Any) -> float | None:
    """An event's time in seconds since 1970."""
    try:
        return datetime.fromisoformat(time).timestamp()
    except (TypeError, ValueError):
        return None


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
