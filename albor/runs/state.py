"""What has become of a run: it trains, it ended and how, or its process is gone without a word."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from albor.runlog import EVENTS, METRICS, parse_row
from albor.runs.owner import is_locked, read_owner
from albor.runs.record import Run

# A run whose process cannot be seen from here, as it is another machine's, counts as running while it writes.
FRESH_SECONDS = 600.0
_TAIL = 2**16  # bytes of events.jsonl in which the end is looked for first
_BEGINNINGS = ("started", "resumed")
_ENDINGS = ("finished", "stopped", "diverged", "failed")


class State(StrEnum):
    """What a run is at."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # by a signal, the time limit or an alert; its state is saved, and it can go on
    DIVERGED = "diverged"
    FAILED = "failed"
    LOST = "lost"  # its process is gone and has not said why: SIGKILL, a power cut
    NEW = "new"  # nothing has been trained yet


@dataclass(frozen=True)
class Standing:
    """The state, and what is known of how it came about."""

    state: State
    reason: str = ""


def state_of(run: Run) -> State:
    """The run's state now. Takes no lock and writes nothing."""
    return standing(run).state


def standing(run: Run) -> Standing:
    """The run's state now, with its reason."""
    trains, where = _trains(run.directory)
    if trains:
        return Standing(State.RUNNING, where)
    events, whole = _turning_points(run.directory / EVENTS, _TAIL)
    found = _judge(events)
    if found is None and not whole:
        events, _ = _turning_points(run.directory / EVENTS, None)
        found = _judge(events)
    return found or _judge_all(events, run)


def _trains(directory: Path) -> tuple[bool, str]:
    """Whether a process trains in `directory`, and which."""
    owner = read_owner(directory)
    lives = None if owner is None else owner.lives()
    if owner is not None and lives:
        return True, f"process {owner.pid}"
    if owner is not None and lives is None:
        silent = time.time() - last_written(directory)
        if silent < FRESH_SECONDS or is_locked(directory):
            return True, f"process {owner.pid} on {owner.host}"
        return False, ""
    return owner is None and is_locked(directory), "the process that holds its lock"


def last_written(directory: Path) -> float:
    """When a log of the run was last written, in seconds since the epoch; 0 where there is none."""
    times = [0.0]
    for name in (METRICS, EVENTS):
        with suppress(OSError):
            times.append((directory / name).stat().st_mtime)
    return max(times)


def _turning_points(path: Path, tail: int | None) -> tuple[list[dict[str, Any]], bool]:
    """The beginnings and the ends among the last `tail` bytes of the log, and whether that is all of it."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            whole = tail is None or size <= tail
            file.seek(0 if whole or tail is None else size - tail)
            lines = file.read().split(b"\n")
    except OSError:
        return [], True
    lines = lines[:-1] if whole else lines[1:-1]  # the last has no end, the first no beginning
    names = [f'"{name}"'.encode() for name in (*_BEGINNINGS, *_ENDINGS)]
    rows = (parse_row(line) for line in lines if any(name in line for name in names))
    return [row for row in rows if row and row.get("event") in (*_BEGINNINGS, *_ENDINGS)], whole


def _judge(events: Sequence[dict[str, Any]]) -> Standing | None:
    """What the last event says by itself; None where it takes the earlier ones to tell."""
    if not events:
        return None
    last = events[-1]
    if last["event"] == "finished":
        return Standing(State.FINISHED)
    if last["event"] in _BEGINNINGS or last.get("step") is None:
        return None
    return _end(last)


def _judge_all(events: Sequence[dict[str, Any]], run: Run) -> Standing:
    """A command that is given to a finished run, and is refused or killed while it reports again, leaves it
    finished; one that goes on to further steps does not.
    """
    finished: Any = None  # at which step
    for event in events:
        kind, step = event["event"], event.get("step")
        if kind == "finished":
            finished = step
        elif kind == "started" or step not in (None, finished):
            finished = None
    if finished is not None and (run.config is None or run.config.steps <= finished):
        return Standing(State.FINISHED)
    if not events:
        return Standing(State.NEW)
    last = events[-1]
    if last["event"] in _BEGINNINGS:
        return Standing(State.LOST, "the process is gone and has recorded no end: killed, or a power cut")
    if last["event"] == "stopped" and not any(event["event"] in _BEGINNINGS for event in events):
        return Standing(State.NEW, "stopped before it began")
    return _end(last)


def _end(event: dict[str, Any]) -> Standing:
    state = {"stopped": State.STOPPED, "diverged": State.DIVERGED, "failed": State.FAILED}[event["event"]]
    reason = event.get("error" if state is State.FAILED else "reason")
    return Standing(state, reason if isinstance(reason, str) else "")
