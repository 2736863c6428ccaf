"""The logs of a run as they grow: `Follower.poll` gives what has been added since it was last asked.

A log is only ever appended to, except that a run which goes on, or goes back, removes the rows beyond its
step: it replaces the file by a shorter one. That is seen by the file's identity, its size, and the last bytes
that were read, which then stand elsewhere; the log is read from its beginning again, and the update says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albor.runlog import EVENTS, METRICS, parse_row

_REMEMBERED = 256  # bytes before the place where reading goes on; a row holds its own time, or loss


@dataclass(frozen=True)
class Update:
    """What is new. Where `rows_anew`, `rows` are all of them, and those of earlier updates are void; likewise
    `events_anew`. `bad_lines` counts whole lines that were no rows; `more`: there is more to read at once.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    rows_anew: bool = False
    events_anew: bool = False
    bad_lines: int = 0
    more: bool = False


class Follower:
    """Reads a run's metrics.jsonl and events.jsonl as they come; either may not be there yet.

    With `most_bytes` no update holds more of a log than that, rounded up to a line.
    """

    def __init__(self, directory: Path, most_bytes: int | None = None):
        self._metrics = Tail(Path(directory) / METRICS, most_bytes)
        self._events = Tail(Path(directory) / EVENTS, most_bytes)

    def poll(self) -> Update:
        """What was added since the last call; at the first, everything. Never raises for what it finds."""
        rows, rows_anew = self._metrics.poll()
        events, events_anew = self._events.poll()
        good = [row for row in rows if type(row.get("step")) is int]
        told = [event for event in events if isinstance(event.get("event"), str)]
        bad = self._metrics.bad_lines + self._events.bad_lines
        bad += len(rows) - len(good) + len(events) - len(told)
        return Update(good, told, rows_anew, events_anew, bad, self._metrics.more or self._events.more)


class Tail:
    """One log. A line counts once it is whole; what it holds half of is left for the next poll."""

    def __init__(self, path: Path, most_bytes: int | None = None):
        self._path, self._most = path, most_bytes
        self._seen: tuple[int, int, int, int] | None = None  # device, inode, size, time of the last look
        self._offset = 0
        self._before = b""  # the bytes before the offset
        self.bad_lines = 0  # of the last poll
        self.more = False  # whether the last poll left whole lines

    def poll(self) -> tuple[list[dict[str, Any]], bool]:
        """The new rows, and whether the log begins anew with them."""
        self.bad_lines, self.more = 0, False
        try:
            status = os.stat(self._path)
            seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if seen == self._seen:
                return [], False
            with open(self._path, "rb") as file:
                anew = not self._goes_on(file.fileno())
                content = self._read(file.fileno(), anew)
        except FileNotFoundError:
            # Gone: what comes next is another log.
            gone, self._seen, self._offset, self._before = self._offset > 0, None, 0, b""
            return [], gone
        except OSError:  # of a network, perhaps: the next poll tries again
            return [], False
        self._seen = (*seen[:2], -1, -1) if self.more else seen  # so that the next poll looks
        rows = []
        for line in content.split(b"\n"):
            row = parse_row(line)
            if row is not None:
                rows.append(row)
            elif line.strip():
                self.bad_lines += 1
        return rows, anew

    def _goes_on(self, handle: int) -> bool:
        """Whether the file still holds what was read of it."""
        status = os.fstat(handle)
        same = self._seen is None or (status.st_dev, status.st_ino) == self._seen[:2]
        start = self._offset - len(self._before)
        return same and os.pread(handle, len(self._before), start) == self._before

    def _read(self, handle: int, anew: bool) -> bytes:
        """The whole lines behind those that were read."""
        if anew:
            self._offset, self._before = 0, b""
        content = bytearray()
        size = 2**20 if self._most is None else min(2**20, self._most)
        while part := os.pread(handle, size, self._offset + len(content)):
            content += part
            if self._most is not None and len(content) >= self._most and b"\n" in content:
                self.more = True
                break
        del content[content.rfind(b"\n") + 1 :]
        self._offset += len(content)
        self._before = (self._before + content[-_REMEMBERED:])[-_REMEMBERED:]
        return bytes(content)
