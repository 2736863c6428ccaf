"""Scores on disk, a line each, as they are computed: an evaluation that was stopped goes on behind the last
whole batch, and ends with the bits that it would have had.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from albor.errors import AlborError
from albor.strictjson import from_json, to_json


class Scores:
    """The file of what one checkpoint makes of one task.

    `facts` is all that the bits of a score depend on; it is the first line, and its hash is in the name: what
    was computed otherwise lies in another file. Raises AlborError while another process writes it, and where
    it cannot be written.
    """

    def __init__(self, directory: Path, name: str, facts: Mapping[str, Any]):
        header = json.loads(to_json(facts))
        digest = hashlib.sha256(to_json(header)).hexdigest()[:12]
        self.path = directory / f"{name}-{digest}.jsonl"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise AlborError(f"{self.path}: another evaluation writes it; wait for its end") from error
        self.found = self._read(header)

    def _read(self, header: Any) -> dict[int, dict[str, Any]]:
        """The lines that are whole, by their number; what follows the first that is not is cut off."""
        self._file.seek(0)
        found: dict[int, dict[str, Any]] = {}
        end = 0
        for count, line in enumerate(self._file):
            try:
                entry: Any = from_json(line) if line.endswith(b"\n") else None
                if count == 0:
                    if entry != header:
                        break
                else:
                    found[int(entry["n"])] = entry
            except (ValueError, KeyError, TypeError):
                break
            end += len(line)
        self._file.truncate(end)
        if end == 0:
            self._append([header])
        return found

    def add(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Appends a batch; each entry has a number `n` of its own."""
        self._append(entries)

    def _append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries)
        try:
            self._file.write(lines.encode())
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> AlborError:
        return AlborError(
            f"{self.path} cannot be written: {error.strerror}; free space, or evaluate a copy of the "
            "checkpoint elsewhere. What is there is kept"
        )

    def close(self) -> None:
        """Flushed to the disk, and free for others."""
        with suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()
