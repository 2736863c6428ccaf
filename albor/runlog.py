"""The two logs in a run directory as a reader finds them; `albor.train.metrics` writes them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"

NO_METRICS = ("step", "tokens", "time", "non_finite")  # what a row of metrics.jsonl holds besides


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, oldest first; none if there is no such file. A line torn by a crash is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            row = parse_row(line)
            if row is not None:
                yield row


def _counted(digits: str) -> int:
    """A whole number as a run writes it: one that 64 bits do not hold is damage, and no float either."""
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{digits[:20]}... is beyond 64 bits")
    return number


def parse_row(line: bytes) -> dict[str, Any] | None:
    """The row that a line of a log is; None for what is none, such as half of one."""
    try:
        row = json.loads(line.decode(errors="replace"), parse_int=_counted)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def known_metrics(row: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a row of metrics.jsonl as they were before it was written, NaN and infinity included."""
    return {name: known_metric(row, name) for name in row if name not in NO_METRICS}


def known_metric(row: Mapping[str, Any], name: str) -> float | None:
    """One of them; None where it is not known."""
    value, odd = row.get(name), row.get("non_finite")
    if value is None and isinstance(odd, dict) and odd.get(name) in ("nan", "inf", "-inf"):
        return float(odd[name])
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
