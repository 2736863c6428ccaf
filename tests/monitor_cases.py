"""A run's logs as the monitor's tests write them: small, exact, and with everything in them once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from run_cases import YAML

from albor.config import RunConfig
from albor.monitor.history import History
from albor.monitor.view import Subject
from albor.runs.follow import Update

BEGAN = 1_700_000_000.0  # seconds since 1970
TOKENS = 96  # of one step of the configuration in run_cases


def at(seconds: float) -> str:
    """A time so many seconds after the beginning, as events have it."""
    return datetime.fromtimestamp(BEGAN + seconds, UTC).isoformat("T", "seconds")


def row(step: int, loss: float | None = None, **others: Any) -> dict[str, Any]:
    """A row of training at 96 tokens per second, so that a step takes one second."""
    return {
        "step": step, "tokens": step * TOKENS, "train/loss": 8.0 / step if loss is None else loss,
        "train/lr": 1e-3, "train/grad_norm": 0.5, "train/epoch": 0.25 * step,
        "train/tokens_per_second": 96.0, "train/mfu": None, "memory/planned": 2.0**30,
        "memory/process": 2.0**29, "gradients/embedding": 0.4, "gradients/block_00": 0.3,
        "gradients/block_00/attention": 0.2, "gradients/block_00/mlp": 0.1, "gradients/block_01": 0.03,
        "gradients/block_01/attention": 0.02, "gradients/block_01/mlp": 0.01, **others,
    }  # fmt: skip


def validation(step: int, loss: float) -> dict[str, Any]:
    """A row of validation."""
    return {"step": step, "tokens": step * TOKENS, "val/loss": loss, "val/bits_per_byte": loss / 2}


def event(kind: str, step: int | None, after: float, /, **details: Any) -> dict[str, Any]:
    """An event so many seconds after the beginning."""
    return {"event": kind, "step": step, "time": at(after), **details}


ROWS = [*(row(step) for step in range(1, 11)), validation(10, 2.5)]
EVENTS = [
    event("started", 0, 0, source=None, build="abc"),
    event("alert", 2, 3, rule="train/loss > 3", action="warn", values={"train/loss": "4.0"}),
    event("alert", 3, 4, rule="gradients/* > 0.2", action="warn", values={"gradients/block_00": "0.3"}),
    event("checkpoint", 4, 5, path="runs/x/checkpoints/step-00000004", seconds=0.25, waited=0.0),
    event("spike", 5, 6, action="clipped", loss="1e+30", grad_norm="123.456789"),
    event("sample", 10, 11, prompt="the", text=" model\n\twrites \x1b[2J text"),
]


def config() -> RunConfig:
    """That of run_cases: 24 steps of 96 tokens."""
    return RunConfig.model_validate(yaml.safe_load(YAML.replace("1e-2", "0.01")))


def subject(state: str = "running", **others: Any) -> Subject:
    """What the run's other files say."""
    given = {"directory": Path("runs/x"), "name": "x", "config": config(), "last_row": BEGAN + 12, **others}
    return Subject(state=state, **given)


def history(
    rows: Iterable[Mapping[str, Any]] = ROWS, events: Iterable[Mapping[str, Any]] = EVENTS
) -> History:
    """What is known when these have been read."""
    found = History()
    found.take(Update(list(map(dict, rows)), list(map(dict, events))))
    return found


def write_run(
    directory: Path,
    rows: Iterable[Mapping[str, Any]] = ROWS,
    events: Iterable[Mapping[str, Any]] = (*EVENTS, event("finished", 10, 12)),
) -> Path:
    """A run's directory with these logs."""
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (directory / "events.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    (directory / "config.resolved.yaml").write_text(YAML)
    (directory / "env.json").write_text('{"device": "cpu", "processor": "A CPU", "compute_dtype": "float32"}')
    (directory / "plan.json").write_text('{"device": "cpu", "groups": {"weights": 1024, "gaps": 0}}')
    return directory
