"""The speed that a run has measured of itself so far, for an estimate of the rest of it."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.config import RunConfig
from albor.configfile import load_config
from albor.errors import AlborError
from albor.memory.cards import Gpu, matching_gpus

_METRIC = "train/tokens_per_second"
_MOST_BYTES = 256 * 2**10  # of the end of a log, which may be large: the newest rows say most
_FASTEST = 1e15  # tokens per second; a log may hold anything, integers too large for a float among it
_HORIZON = ("max_steps", "max_tokens", "max_hours")  # keys that say how long it lasts, not how fast it is


@dataclass(frozen=True)
class Measured:
    """The median over the newest rows of a run's metrics."""

    tokens_per_second: float
    rows: int
    path: Path


def measured_tokens_per_second(config: RunConfig, device: str, gpu: Gpu | None) -> Measured | None:
    """What the run called `config.name` has measured, if it has, with these settings and on such a card.

    None for anything else, a log that cannot be read included: this never fails.
    """
    directory = Path(config.runs_dir) / config.name
    path = directory / "metrics.jsonl"
    rows = _newest_rows(path)
    # The first step loads kernels. It counts only where it is all there is.
    rates = [rate for row in rows if row.get("step") != 1 and (rate := _rate(row)) is not None]
    rates = rates or [rate for row in rows if (rate := _rate(row)) is not None]
    if not rates or not _is_same(directory, config, device, gpu):
        return None
    return Measured(statistics.median(rates), len(rates), path)


def _rate(row: dict[str, Any]) -> float | None:
    value = row.get(_METRIC)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 < value < _FASTEST else None


def _newest_rows(path: Path) -> list[dict[str, Any]]:
    """The rows at the end of a log. Whatever is no row is left out."""
    lines = _tail(path).split(b"\n")
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def _tail(path: Path) -> bytes:
    """The end of a regular file; empty where there is none, or it cannot be read."""
    try:
        if not path.is_file():  # a FIFO would wait
            return b""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_BYTES))
            return file.read(_MOST_BYTES)
    except OSError:
        return b""


def _is_same(directory: Path, config: RunConfig, device: str, gpu: Gpu | None) -> bool:
    """Whether the run in `directory` computes as `config` would, on such a device as is asked about."""
    try:
        environment = json.loads(_tail(directory / "env.json"))
        before = load_config(directory / "config.resolved.yaml")
    except (AlborError, OSError, ValueError, RecursionError):
        return False
    if not isinstance(environment, dict) or _settings(before) != _settings(config):
        return False
    where = environment.get("device")
    if device == "cpu" or not isinstance(where, str):
        return where == device
    return gpu is not None and gpu.name in [known.name for known in matching_gpus(where)]


def _settings(config: RunConfig) -> dict[str, Any]:
    """What a step's time depends on."""
    train = {key: value for key, value in config.train.model_dump().items() if key not in _HORIZON}
    state = config.optimizer.state_dtype
    return {"model": config.model, "length": config.data.sequence_length, "train": train, "state": state}
