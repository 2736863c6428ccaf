"""Which run is watched, and what its directory says now. Nothing is written, locked or left open."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from albor.errors import ConfigError, Problem
from albor.monitor.history import History
from albor.monitor.view import Subject, View, build_view
from albor.runlog import METRICS
from albor.runs.follow import Follower
from albor.runs.record import CONFIG, GROUPS, Run, find_runs, is_run, open_run
from albor.runs.state import State, last_written, standing, state_of

_LISTED = 8
_PIECE = 2**22  # bytes of a log that are parsed at a time: of a long run's it would be gigabytes
_SECONDS_BETWEEN_SEARCHES = 5.0  # for the current rung or trial
_DESCRIPTION = (CONFIG, "plan.json", "env.json")


class Gone(Exception):
    """The directory that was watched is not there any more."""


def find_target(given: Path | None, runs: Path = Path("runs")) -> Path:
    """The directory to watch: `given`, a run's, a ladder's or a sweep's, or one that is not there yet;
    without it the only run in progress under `runs`.

    Raises ConfigError where there is nothing to watch, and names the runs that there are.
    """
    if given is None:
        return _only_running(runs)
    if _group_of(given) or not given.exists():
        return given
    with suppress(OSError):
        if not os.listdir(given):
            return given  # a run, or a ladder, that is about to begin
    return open_run(given).directory


def _only_running(root: Path) -> Path:
    found = sorted(find_runs(root), key=lambda run: last_written(run.directory), reverse=True)
    states = {run.directory: state_of(run) for run in found}
    running = [run.directory for run in found if states[run.directory] is State.RUNNING]
    if len(running) == 1:
        return running[0]
    if running:
        listed = "\n".join(f"  albor monitor {directory}" for directory in running[:_LISTED])
        message, remedy = f"{len(running)} runs are in progress under {root}", f"say which one:\n{listed}"
    elif found:
        rest = f"\n  and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
        listed = "\n".join(f"  {run.directory}  {states[run.directory]}" for run in found[:_LISTED])
        message, remedy = f"no run is in progress under {root}", f"name one of these:\n{listed}{rest}"
    else:
        message, remedy = f"there are no runs under {root}", "name a run directory, or start in its project"
    raise ConfigError([Problem("RUN", message, remedy, "command line")])


def _group_of(directory: Path) -> str | None:
    return next((kind for name, kind in GROUPS.items() if (directory / name).exists()), None)


class Attachment:
    """The run in `target`, or the current one of the ladder or sweep there."""

    def __init__(self, target: Path, clock: Callable[[], float] = time.time):
        self.target, self._clock = target, clock
        self._seen = target.exists()
        self._searched = -_SECONDS_BETWEEN_SEARCHES
        self._note = self._waits_for = ""
        self._open(target)

    def _open(self, directory: Path) -> None:
        self.directory = directory
        self._follower, self._history = Follower(directory, _PIECE), History()
        self._run = _as_run(directory)
        self._described: tuple[int, ...] = ()
        self._bad_lines = 0

    def reload(self) -> None:
        """Forgets what has been read; the next poll reads everything again."""
        self._searched = -_SECONDS_BETWEEN_SEARCHES
        self._open(self.directory)

    def poll(self) -> View:
        """The run as it is now. Raises Gone when the directory has been there and is not any more."""
        now = self._clock()
        if not self.target.is_dir():
            if self._seen:
                raise Gone(f"{self.target} is gone: it was moved or deleted")
            return build_view(self._history, self._subject(State.NEW, "there is no such directory yet"), now)
        self._seen = True
        self._choose(now)
        more = True
        while more:
            update = self._follower.poll()
            self._bad_lines = update.bad_lines + (0 if update.rows_anew else self._bad_lines)
            self._history.take(update)
            more = update.more
        self._refresh()
        if self._waits_for:
            return build_view(self._history, self._subject(State.NEW, self._waits_for), now)
        found = standing(self._run)
        return build_view(self._history, self._subject(found.state, found.reason), now)

    def _choose(self, now: float) -> None:
        """Of a ladder or a sweep the run in progress, else the one that was written last."""
        kind = _group_of(self.target)
        if kind is None or abs(now - self._searched) < _SECONDS_BETWEEN_SEARCHES:
            return
        self._searched = now
        part = "rung" if kind == "ladder" else "trial"
        found = sorted(find_runs(self.target), key=lambda run: last_written(run.directory), reverse=True)
        self._waits_for = "" if found else f"no {part} of the {kind} has begun"
        if not found:
            return
        running = [run for run in found if state_of(run) is State.RUNNING]
        chosen = (running or found)[0].directory
        self._note = f"{part} of {kind} {self.target.name}, {len(found)} begun"
        if chosen != self.directory:
            self._open(chosen)

    def _refresh(self) -> None:
        """Reads what describes the run anew when it was written anew: a run that goes on does that."""
        times = tuple(_modified(self.directory / name) for name in _DESCRIPTION)
        if times != self._described:
            self._described, self._run = times, _as_run(self.directory)

    def _subject(self, state: State, reason: str) -> Subject:
        run, begun = self._run, self._history.revision > 0
        problems = list(run.problems) if begun else []
        if self._bad_lines:
            lines = "line" if self._bad_lines == 1 else "lines"
            found = f"{self._bad_lines} damaged {lines} in its logs, left out"
            problems.append(f"{self.directory}: {found}; albor runs show says where")
        written = _modified(self.directory / METRICS)
        return Subject(
            directory=self.directory,
            name=run.name,
            state=state.value,
            reason=reason,
            config=run.config if begun else None,
            environment=run.environment,
            plan=run.plan,
            note=self._note,
            last_row=written / 1e9 if written else None,
            problems=tuple(problems),
        )


def _as_run(directory: Path) -> Run:
    return open_run(directory) if is_run(directory) else Run(directory, directory.name)


def _modified(path: Path) -> int:
    """In nanoseconds; 0 for a file that is not there."""
    try:
        return os.stat(path).st_mtime_ns
    except OSError:
        return 0
