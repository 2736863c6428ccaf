"""The few figures of a run that a list shows, at the price of a glance: a thousand runs take a second.

Of metrics.jsonl only the last rows and those of evaluations are parsed, of config.resolved.yaml only the keys
that make the number of steps, of events.jsonl the end.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.runlog import EVENTS, METRICS, known_metric, parse_row
from albor.runs.record import CONFIG, Run, began
from albor.runs.state import Standing, last_written, standing
from albor.runs.text import seconds_of

_LAST_ROWS = 10  # the speed is the median of theirs
_LONGEST_TAIL = 2**20  # bytes of a log's end in which they are looked for
_EVALUATED = b'"val/loss"'
_KEYS = (
    "train.micro_batch_size", "train.gradient_accumulation_steps", "data.sequence_length",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """What a list shows of a run; None is what is not known. Times are seconds since the epoch."""

    run: Run
    standing: Standing
    step: int | None
    steps: int | None
    tokens: int | None
    loss: float | None  # the last of training
    best_loss: float | None  # the lowest of an evaluation
    best_step: int | None
    bits_per_byte: float | None  # of that evaluation
    tokens_per_second: float | None
    began: float | None
    written: float | None
    size: int
    problems: tuple[str, ...]


def summarise(run: Run) -> Summary:
    """A glance at `run`. Raises nothing for what is missing or damaged."""
    problems: list[str] = []
    log = _read(run.directory / METRICS, problems)
    last = _last_rows(log, run.directory / METRICS, problems)
    evaluated = [row for row in _evaluations(log) if math.isfinite(_loss(row))]
    best = min(evaluated, key=_loss, default={})
    training = [row for row in last if known_metric(row, "train/loss") is not None]
    speeds = [known_metric(row, "train/tokens_per_second") for row in training]
    known = [speed for speed in speeds if speed is not None]
    newest: dict[str, Any] = last[-1] if last else {}
    return Summary(
        run=run,
        standing=standing(run),
        step=newest.get("step"),
        steps=_steps(run),
        tokens=newest["tokens"] if type(newest.get("tokens")) is int else None,
        loss=known_metric(training[-1], "train/loss") if training else None,
        best_loss=known_metric(best, "val/loss"),
        best_step=best.get("step"),
        bits_per_byte=known_metric(best, "val/bits_per_byte"),
        tokens_per_second=statistics.median(known) if known else None,
        began=seconds_of(began(run.directory)),
        written=_written(run.directory, newest),
        size=size_on_disk(run.directory),
        problems=tuple(problems),
    )


def size_on_disk(directory: Path) -> int:
    """Bytes of all files below `directory`; links are not followed."""
    total = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        total += size_on_disk(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
                except OSError:
                    continue  # removed while we look: a checkpoint that is not kept
    except OSError:
        pass
    return total


def _read(path: Path, problems: list[str]) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror or error}")
        return b""


def _last_rows(log: bytes, path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The last rows, oldest first; a damaged line among them is a problem."""
    found: list[dict[str, Any]] = []
    end = log.rfind(b"\n")  # what follows is half a line
    while end > 0 and len(found) < _LAST_ROWS and len(log) - end < _LONGEST_TAIL:
        start = log.rfind(b"\n", 0, end) + 1
        row = parse_row(log[start:end])
        if row is not None and type(row.get("step")) is int:
            found.append(row)
        elif log[start:end].strip():
            line = log.count(b"\n", 0, start) + 1
            problems.append(f"{path}:{line}: not a row of metrics, and left out")
        end = start - 1
    return found[::-1]


def _evaluations(log: bytes) -> Iterator[dict[str, Any]]:
    place = log.find(_EVALUATED)
    while place >= 0:
        end = log.find(b"\n", place)
        if end < 0:
            return
        row = parse_row(log[log.rfind(b"\n", 0, place) + 1 : end])
        if row is not None and type(row.get("step")) is int:
            yield row
        place = log.find(_EVALUATED, end)


def _written(directory: Path, newest: dict[str, Any]) -> float | None:
    """When the run last said something: by its own words, for a copy of a run has a copy's times."""
    times = [seconds_of(newest.get("time"))]
    try:
        with open(directory / EVENTS, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            lines = file.read().split(b"\n")
            times += [seconds_of((parse_row(line) or {}).get("time")) for line in lines[-2:]]
    except OSError:
        pass
    return max((time for time in times if time is not None), default=last_written(directory) or None)


def _loss(row: dict[str, Any]) -> float:
    loss = known_metric(row, "val/loss")
    return math.nan if loss is None else loss


def _steps(run: Run) -> int | None:
    """How many steps the run is to take."""
    given = _written_out(run.directory / CONFIG)
    try:
        if "train.max_steps" in given:
            return given["train.max_steps"]
        micro, accumulation, length = (given[key] for key in _KEYS)
        return -(-given["train.max_tokens"] // (micro * accumulation * length))
    except (KeyError, ZeroDivisionError):  # not as a run writes it: by the reader that understands all
        return run.config.steps if run.config is not None else None


def _written_out(path: Path) -> dict[str, int]:
    """The whole numbers in a configuration, as a run writes it: one key a line, below its section."""
    numbers: dict[str, int] = {}
    section = ""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        key, colon, value = line.partition(":")
        if not line.startswith(" "):
            section = key if colon and not value else ""
        elif section and line[2:3] != " " and value.strip().isdecimal():
            numbers[f"{section}.{key.strip()}"] = int(value)
    return numbers
