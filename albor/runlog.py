"""The two logs in a run directory as a reader finds them; `albor.train.metrics` writes them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, oldest first; none if there is no such file. A line torn by a crash is left out."""
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
