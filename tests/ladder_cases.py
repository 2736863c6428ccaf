"""A ladder for tests: its file over a tiny corpus, runs as they would be logged, and commands that only
seem to train."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from helpers import make_config

from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.ladder.gates import RunLog
from albor.metric_names import metric_names
from albor.train.schedule import learning_rate

Row = dict[str, Any]

LADDER = """\
name: steps
overrides:
  - seed=3
rungs:
  - {name: one, config: tiny.yaml, tokens: 1536}
  - {name: two, config: tiny.yaml, overrides: [model.hidden_size=48], tokens: 2304}
"""


def config_of(steps: int = 100, **keys: Any) -> RunConfig:
    """A small run of so many steps."""
    config = make_config(max_steps=steps, **keys)
    log = config.log.model_copy(update={"every_steps": 1})
    return config.model_copy(update={"log": log})


def logged(config: RunConfig, last: int | None = None) -> list[Row]:
    """The rows of a run in which nothing is wrong: the loss falls from 6 to 2, validation with it."""
    rows: list[Row] = []
    norms = [name for name in metric_names(config) if name.startswith("gradients/")]
    for step in range(1, (last or config.steps) + 1):
        loss = 2.0 + 4.0 * (1 - step / config.steps) ** 2
        rows.append(
            {
                "step": step,
                "tokens": step * config.tokens_per_step,
                "train/loss": loss,
                "train/lr": learning_rate(step, config.steps, config.optimizer.lr, config.schedule),
                "train/grad_norm": 1.0,
                "train/tokens_per_second": 1000.0 + step % 3,
                **dict.fromkeys(norms, 0.1 + 0.01 * (step % 5)),
            }
        )
        if step % max(1, config.steps // 4) == 0:
            rows.append({"step": step, "tokens": step * config.tokens_per_step, "val/loss": loss + 0.1})
    return rows


def final_of(config: RunConfig, loss: float = 2.1) -> Row:
    """What eval/final.json then holds."""
    tokens = config.steps * config.tokens_per_step
    return {"step": config.steps, "tokens": tokens, "val/loss": loss, "val/bits_per_byte": loss / 2}


def run_of(
    config: RunConfig, rows: Sequence[Row] | None = None, events: Sequence[Row] = (), **final: Any
) -> RunLog:
    """That run, read; `rows` and `events` instead of the good ones."""
    shown = logged(config) if rows is None else list(rows)
    return RunLog(config, shown, [{"event": "started", "step": 0}, *events], final_of(config, **final))


def write_run(directory: Path, run: RunLog) -> None:
    """A run directory as the trainer leaves it, as far as a ladder reads it."""
    (directory / "eval").mkdir(parents=True, exist_ok=True)
    (directory / "config.resolved.yaml").write_text(dump_config(run.config))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.rows))
    (directory / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.events))
    if run.final is not None:
        (directory / "eval" / "final.json").write_text(json.dumps(run.final))


CANARY = {
    "verdict": "PASS",
    "reference": "oracle",
    "explanation": ["PASS"],
    "checks": [{"name": "loss", "value": 0.1, "limit": 1.0, "passed": True}],
}
RESUME = {
    "identical": True,
    "comparisons": [{"what": "weights", "compared": 14, "unit": "tensors", "difference": None}],
}
_GATE = {
    "passed": True,
    "runtime": "transformers 5",
    "unchecked": None,
    "checks": [{"check": "logits", "compared": "9", "found": "equal", "passed": True}],
}
EXPORT = {"step": 9, "planned_steps": 9, "exports": [{"format": "hf", "gate": _GATE}]}

Answer = tuple[int, Row | None]


class Commands:
    """Stands in for `Child`: notes what was called, and answers as it was told to."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []
        self.answers: dict[str, Callable[[RunConfig], Answer]] = {
            "canary": lambda config: (0, CANARY),
            "verify-resume": lambda config: (0, RESUME),
            "export": lambda config: (0, EXPORT),
            "train": self.train,
        }
        self.run: Callable[[RunConfig], RunLog] = lambda config: run_of(config, loss=0.5)

    def names(self) -> list[str]:
        """The commands so far, with their rungs."""
        return [f"{arguments[0]} {self.rung(arguments)}" for arguments in self.called]

    @staticmethod
    def rung(arguments: Sequence[str]) -> str:
        if arguments[0] == "export":
            return Path(arguments[1]).name
        return next(json.loads(a.removeprefix("name=")) for a in arguments if a.startswith("name="))

    def train(self, config: RunConfig) -> Answer:
        """A run directory, in no time."""
        directory = Path(config.runs_dir) / config.name
        shutil.rmtree(directory, ignore_errors=True)
        write_run(directory, self.run(config))
        return 0, None

    def __call__(self, arguments: Sequence[str], on_line: Any = None, **keywords: Any) -> Commands:
        self.called.append(list(arguments))
        name = arguments[0]
        overrides = [a for a in arguments[2:] if "=" in a and not a.startswith("--")]
        config = make_config() if name == "export" else load_config(Path(arguments[1]), overrides)
        self.code, found = self.answers[name](config)
        if found is not None:
            keywords["output"].write(json.dumps(found).encode())
        self.last_words = f"albor: {name} has spoken"
        return self

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def poll(self) -> int:
        return self.code

    def stop(self) -> None:
        pass
