"""How long a run had trained at each of its steps: a log has times of day, a chart wants hours of training.

A row of metrics.jsonl says when it was written, and events.jsonl when a process began to train. The hours of
a run are those of its processes up to the row, saving and evaluating included; the time from the last entry
of one process to the beginning of the next does not count, for nobody trained.

Rows of albor 0.1 have no time. Where one is without, the hours of the whole run are computed from the tokens
between the rows and the measured speed, which leaves out saving and evaluating.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

CLOCK, SPEED = "clock", "speed"  # what hours are from
_BEGINNINGS = ("started", "resumed")


@dataclass(frozen=True)
class Hours:
    """Hours of training by step. `basis` is CLOCK or SPEED; None: they are not known, and there are none."""

    basis: str | None
    steps: Sequence[int]
    hours: Sequence[float]

    def at(self, step: int) -> float | None:
        """The hours at `step`: between two rows in proportion, beyond the first and the last as there."""
        if not self.steps:
            return None
        place = bisect.bisect_left(self.steps, step)
        if place == len(self.steps) or place == 0 or self.steps[place] == step:
            return self.hours[min(place, len(self.steps) - 1)]
        low, high = self.steps[place - 1], self.steps[place]
        part = (step - low) / (high - low)
        return self.hours[place - 1] + part * (self.hours[place] - self.hours[place - 1])


def hours_of(rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> Hours:
    """The hours of training at each step of `rows`, which are in the order of their steps."""
    times = [seconds_of(row.get("time")) for row in rows]
    known = [time for time in times if time is not None]
    if len(known) < len(rows):
        return _by_speed(rows)
    if not rows:
        return Hours(None, (), ())
    processes = _processes(known, events)
    found: dict[int, float] = {}
    highest = 0.0
    for row, time in zip(rows, known, strict=True):
        highest = max(highest, _trained(processes, time) / 3600)  # a clock may have been set back
        found[row["step"]] = highest
    return Hours(CLOCK, list(found), list(found.values()))


def seconds_of(time: Any) -> float | None:
    """Seconds since 1970 of a time as the logs have it; None for what is none."""
    if not isinstance(time, str):
        return None
    try:
        moment = datetime.fromisoformat(time)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _processes(rows: Sequence[float], events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """When each process began to train, and when it last wrote something."""
    times = [(event.get("event"), seconds_of(event.get("time"))) for event in events]
    begun = sorted({time for kind, time in times if kind in _BEGINNINGS and time is not None})
    # An event's time is cut to the second, a row's is not.
    if not begun or rows[0] < begun[0] - 1:
        begun.insert(0, min(rows))
    every = sorted([*rows, *(time for kind, time in times if time is not None and kind not in _BEGINNINGS)])
    ends = [*begun[1:], float("inf")]
    found = []
    for begin, end in zip(begun, ends, strict=True):
        place = bisect.bisect_left(every, end)
        last = every[place - 1] if place else begin
        found.append((begin, max(begin, last)))
    return found


def _trained(processes: Sequence[tuple[float, float]], time: float) -> float:
    """Seconds that the processes had trained by `time`."""
    return sum(max(0.0, min(time, end) - begin) for begin, end in processes)


def _by_speed(rows: Sequence[Mapping[str, Any]]) -> Hours:
    found: dict[int, float] = {}
    seconds, before = 0.0, 0
    for row in rows:
        rate, tokens = row.get("train/tokens_per_second"), row.get("tokens")
        if (
            not isinstance(rate, int | float)
            or isinstance(rate, bool)
            or type(tokens) is not int
            or rate <= 0
        ):
            continue
        seconds += max(0, tokens - before) / rate
        before = tokens
        found[row["step"]] = seconds / 3600
    return Hours(SPEED, list(found), list(found.values())) if found else Hours(None, (), ())
