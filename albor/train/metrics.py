"""What a run leaves for its reader: `metrics.jsonl`, one row of numbers per line, and `events.jsonl`.

    {"step": 120, "tokens": 245760, "time": "2026-01-31T12:00:00.250+00:00", "train/loss": 4.321}
    {"event": "checkpoint", "step": 120, "time": "2026-01-31T12:00:00+00:00", "path": "..."}

Every line is valid JSON. What is not known is null, never 0; a NaN or an infinity is null too, and the row
says so under `non_finite`. `time` is when the row was written; rows of albor 0.1 have none. A log that cannot
be written or read is reported once and never stops the training.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from albor.runlog import EVENTS, METRICS, read_rows


def _print_to_stderr(message: str) -> None:
    print(message, file=sys.stderr)


class Follower(Protocol):
    """Who gets what the logs get, right behind them; it neither raises nor waits."""

    def row(self, record: Mapping[str, Any]) -> None:
        """A row as metrics.jsonl has it, but with NaN and infinity."""

    def event(self, record: Mapping[str, Any]) -> None:
        """An event as events.jsonl has it."""

    def rewind(self, step: int) -> None:
        """The rows beyond `step` are gone."""


class MetricsLog:
    """The two logs in `run_dir`. The first time that one cannot be written or read, `on_failure` gets a
    message.
    """

    follower: Follower | None = None

    def __init__(self, run_dir: Path, on_failure: Callable[[str], None] = _print_to_stderr):
        self.metrics_path = run_dir / METRICS
        self.events_path = run_dir / EVENTS
        self.on_failure = on_failure
        self._failed = False
        for path in (self.metrics_path, self.events_path):
            self._attempt(path, _cut_torn_line)

    def row(self, step: int, tokens: int, metrics: Mapping[str, float | None]) -> None:
        """Append a row: `step`, `tokens` and the time, then `metrics` by their names."""
        time = datetime.now(UTC).isoformat("T", "milliseconds")
        record = {"step": step, "tokens": tokens, "time": time, **metrics}
        self._attempt(self.metrics_path, lambda path: _append(path, record))
        if self.follower is not None:
            self.follower.row(record)

    def event(self, event: str, step: int | None, **details: Any) -> None:
        """Append something that happened (a checkpoint, a skipped step, the run's end), with the time; the
        step is null before the run has come to one.
        """
        record = {
            "event": event,
            "step": step,
            "time": datetime.now(UTC).isoformat("T", "seconds"),
            **details,
        }
        self._attempt(self.events_path, lambda path: _append(path, record))
        if self.follower is not None:
            self.follower.event(record)

    def truncate_after(self, step: int) -> None:
        """Remove the rows beyond `step`, which a run that resumes at `step` is about to write again.

        Events stay: they happened.
        """
        self._attempt(self.metrics_path, lambda path: _keep_rows(path, step))
        if self.follower is not None:
            self.follower.rewind(step)

    def rows(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds, oldest first; nothing where it cannot be read, which is reported too."""
        return self._read(self.metrics_path)

    def events(self) -> list[dict[str, Any]]:
        """What events.jsonl holds, likewise."""
        return self._read(self.events_path)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        self._attempt(path, lambda path: found.extend(read_rows(path)))
        return found

    def _attempt(self, path: Path, write: Callable[[Path], None]) -> None:
        try:
            write(path)
        except OSError as error:
            if not self._failed:
                self._failed = True
                self.on_failure(
                    f"cannot use {path}: {error.strerror or error}; training goes on, and the log has gaps"
                )


def _append(path: Path, record: Mapping[str, Any]) -> None:
    line = _encode(record)
    # Opened anew each time, so that a log recovers by itself once the disk has room or the folder is back.
    with open(path, "ab", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(start)  # half a line would spoil the next one as well
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _encode(record: Mapping[str, Any]) -> bytes:
    """One line. JSON has no NaN and no infinity: they become null, with their names under `non_finite`."""
    odd = {
        key: str(value)
        for key, value in record.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    if odd:
        record = {**record, **dict.fromkeys(odd), "non_finite": odd}
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _cut_torn_line(path: Path) -> None:
    """Remove an unfinished last line, which the next one would otherwise be glued to."""
    if not path.exists():
        return
    with open(path, "r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _keep_rows(path: Path, last_step: int) -> None:
    rows = list(read_rows(path))
    kept = [row for row in rows if row.get("step", 0) <= last_step]
    if len(kept) == len(rows):
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(map(_encode, kept))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
