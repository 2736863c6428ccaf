"""A run's logs as trackers take them: rows, and samples behind the rows of their steps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from albor.runlog import EVENTS, METRICS, known_metrics, read_rows


class Row(NamedTuple):
    """A row: what is not known is left out."""

    step: int
    tokens: int
    metrics: dict[str, float]
    seconds: float  # since 1970


def as_row(record: Mapping[str, Any]) -> Row:
    """The row that a line of metrics.jsonl is."""
    metrics = {name: float(value) for name, value in known_metrics(record).items() if value is not None}
    try:
        seconds = datetime.fromisoformat(record["time"]).timestamp()
    except (KeyError, TypeError, ValueError):  # rows of albor 0.1 have no time
        seconds = time.time()
    return Row(record["step"], record["tokens"], metrics, seconds)


def past(directory: Path, step: int) -> Iterator[dict[str, Any]]:
    """What has been logged of a run up to `step`, which never changes again, as the worker's messages."""
    rows = (row for row in read_rows(directory / METRICS) if is_row(row) and row["step"] <= step)
    return messages(rows, read_rows(directory / EVENTS))


def last_step(directory: Path, step: int) -> int:
    """The last step up to `step` that metrics.jsonl has a row of; -1 for none."""
    rows = read_rows(directory / METRICS)
    return max((row["step"] for row in rows if is_row(row) and row["step"] <= step), default=-1)


def messages(
    rows: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The worker's messages for rows and events: samples behind the rows of their steps, none beyond the last
    row. Steps that were trained again were sampled again: the last sample of a prompt is the one.
    """
    sampled: dict[int, dict[str, Mapping[str, Any]]] = {}
    for event in events:
        if event.get("event") == "sample" and type(event.get("step")) is int:
            sampled.setdefault(event["step"], {})[str(event.get("prompt"))] = event
    step = 0

    def due(limit: int) -> Iterator[dict[str, Any]]:
        for key in sorted(key for key in sampled if key < limit):
            yield from ({"event": dict(event)} for event in sampled.pop(key).values())

    for row in rows:
        if is_row(row):
            step = row["step"]
            yield from due(step)
            yield {"row": dict(row)}
    yield from due(step + 1)


def is_row(record: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is a row."""
    return type(record.get("step")) is int and type(record.get("tokens")) is int
