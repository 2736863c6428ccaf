"""Run directories as trainings leave them, written in an instant: for whatever reads runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from albor.config import ModelConfig, RunConfig, ScheduleConfig, TrainConfig
from albor.configfile import dump_config
from albor.train.metrics import MetricsLog

BEGAN = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def small_config(name: str = "small", **keys: Any) -> RunConfig:
    """A configuration of 100 steps; `keys` are sections or keys of the top level."""
    model = ModelConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=512
    )
    train = TrainConfig(max_steps=100, micro_batch_size=2)
    schedule = ScheduleConfig(warmup_steps=10)
    return RunConfig(**{"name": name, "model": model, "train": train, "schedule": schedule, **keys})


def write_run(
    directory: Path,
    *,
    steps: int = 100,
    every: int = 10,
    config: RunConfig | None = None,
    ending: str | None = "finished",
    loss: float = 3.0,
    began: datetime = BEGAN,
    happened: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """A run that came to `steps`, with a row every `every` steps, an evaluation at every fifth of them and
    one checkpoint; `ending` None leaves it without an end. `happened` are further events.
    """
    config = config or small_config()
    directory.mkdir(parents=True)
    (directory / "config.resolved.yaml").write_text(dump_config(config))
    (directory / "config.yaml").write_text(dump_config(config))
    (directory / "env.json").write_text(json.dumps({"albor": "0.1.0", "torch": "2.13.0", "device": "cpu"}))
    (directory / "plan.json").write_text(json.dumps({"device": "cpu", "device_bytes": 2**20}))
    (directory / ".lock").touch()
    tokens, lines = config.tokens_per_step, []
    for step in range(every, steps + 1, every):
        row = {"step": step, "tokens": step * tokens, "time": _time(began, step)}
        training = {"train/loss": loss + 1 / step, "train/lr": 1e-3, "train/tokens_per_second": 1000.0}
        lines.append({**row, **training, "train/mfu": None})
        if step % (5 * every) == 0:
            lines.append({**row, "val/loss": loss + 2 / step, "val/bits_per_byte": (loss + 2 / step) / 3})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [{"event": "started", "step": 0, "source": None}, *happened]
    saved = directory / "checkpoints" / f"step-{steps:08d}"
    saved.mkdir(parents=True)
    for name in ("weights.safetensors", "state.json", "manifest.json"):
        (saved / name).write_bytes(b"{}" * 50)
    events.append({"event": "checkpoint", "step": steps, "path": str(saved), "seconds": 0.5})
    if ending is not None:
        events.append({"event": ending, "step": steps})
    for event in events:
        event.setdefault("time", _time(began, event["step"] or 0))
    (directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if ending == "finished":
        (directory / "eval").mkdir()
        final = {"step": steps, "tokens": steps * tokens, "val/loss": loss, "val/bits_per_byte": loss / 3}
        (directory / "eval" / "final.json").write_text(json.dumps(final))
    return directory


def _time(began: datetime, step: int) -> str:
    return (began + timedelta(seconds=step)).isoformat("T", "seconds")


def add_row(directory: Path, step: int, **metrics: float | None) -> None:
    """As the trainer appends one; names with `__` for `/`."""
    names = {name.replace("__", "/"): value for name, value in metrics.items()}
    MetricsLog(directory).row(step, step * 1000, names)
