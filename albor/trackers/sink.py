"""What a tracker is to albor: somewhere that rows, samples and the result of a run are written to as well."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from albor import durable
from albor.config import RunConfig

_LOCK_SECONDS = 40.0  # longer than the worker of a trainer that was killed goes on


@dataclass(frozen=True)
class Source:
    """The run that is tracked."""

    directory: Path
    config: RunConfig


class Sink(Protocol):
    """One tracker, in a process of its own. Any exception ends it, and is reported.

    `rewind` comes first of all, and again when the run goes back.
    """

    def __init__(self, source: Source): ...

    def rewind(self, step: int) -> bool:
        """Go on behind `step`: what is there beyond it goes. Returns whether all else had to go with it, and
        is to be written again, as for step -1.
        """

    def row(self, step: int, tokens: int, metrics: Mapping[str, float], seconds: float) -> None:
        """Numbers by the names of metrics.jsonl, NaN and infinity among them; what is not known is left out.
        `seconds` since 1970 is when they were written. Steps never decrease between two rewinds.
        """

    def samples(self, step: int, samples: Sequence[tuple[str, str | None]]) -> None:
        """How the model went on from each prompt after `step`; None where its logits were not finite."""

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """The final result, after the last `step`."""

    def close(self, exit_code: int) -> None:
        """The run has ended for now: 0 done, 75 stopped to go on, 3 diverged, 1 anything else."""


def describe_samples(samples: Sequence[tuple[str, str | None]]) -> str:
    """Samples as Markdown. A prompt and what follows it are one text, so they stand in one block, indented:
    whatever the model wrote, no line of it ends that.
    """
    blocks = []
    for prompt, text in samples:
        whole = prompt + text if text is not None else f"{prompt} (no text: the logits were not finite)"
        blocks.append("\n".join(f"    {line}" for line in whole.splitlines()))
    return "\n\n---\n\n".join(blocks)


def directory_of(source: Source, tracker: str) -> Path:
    """RUN/TRACKER, which is made, and which no other process writes to until this one ends."""
    directory = source.directory.absolute() / tracker
    directory.mkdir(exist_ok=True)
    handle = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)  # kept open
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RuntimeError(f"another process writes to {directory}") from None
            time.sleep(0.1)
        except OSError:  # no locks on this file system
            return directory
        else:
            return directory


class RunId:
    """The run's name in a tracker that gives runs names of their own, kept as RUN/TRACKER/run_id."""

    def __init__(self, directory: Path):
        self._path = directory / "run_id"

    def read(self) -> str | None:
        """None: the tracker has no such run yet."""
        try:
            return self._path.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, run_id: str) -> str:
        """Keeps `run_id`, and returns it."""
        durable.replace_file(self._path, f"{run_id}\n".encode())
        return run_id

    def make(self) -> str:
        """A new one, which is kept."""
        return self.write(uuid.uuid4().hex[:16])
