"""What saving costs a run on the CPU: waiting for it, and in the background.

    python benchmarks/saving.py             # writes benchmarks/results/saving.json, prints it
    python benchmarks/saving.py --rounds 1 --no-write

Runs of one configuration in turn, over several rounds. A step is measured in the processor time of the thread
that trains, which other processes do not lengthen, and the steps that overlap a save are held against the
others of the same run. What the training stands still for a save is in the run's events. Prints medians;
those in docs/reliability.md were made by this.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the step runs in the thread that is measured

import torch

from albor.bench.machine import facts
from albor.cli import main as albor
from albor.train.saver import Saver
from albor.train.step import Trainer

RECORD = Path(__file__).parent / "results" / "saving.json"
STEPS, EVERY, WARMUP = 49, 6, 4
MODES = {"waiting": "checkpoint.background=false", "background": "checkpoint.background=true"}
CONFIG = """\
name: saving
device: cpu
model: {{hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 8, num_attention_heads: 8,
  num_key_value_heads: 4, vocab_size: 2048, max_position_embeddings: 256}}
data:
  sequence_length: 128
  sources: [{{kind: files, path: {home}/corpus}}]
  validation_fraction: 0.1
  max_epochs: 100
  cache_dir: {home}/data
train: {{max_steps: {steps}, micro_batch_size: 1, gradient_accumulation_steps: 2, precision: fp32}}
schedule: {{warmup_steps: 10}}
evaluate: {{every_steps: 1000, batches: 1, final_batches: 1}}
checkpoint: {{every_steps: {every}, keep_last: 1}}
log: {{every_steps: 1}}
"""


def write_project(home: Path) -> Path:
    """A corpus of random words, and the configuration."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(3000)]
    (home / "corpus").mkdir()
    for number in range(40):
        text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(100))
        (home / "corpus" / f"{number}.txt").write_text(text)
    config = home / "saving.yaml"
    config.write_text(CONFIG.format(home=home, steps=STEPS, every=EVERY))
    return config


def measure(config: Path, mode: str, number: int) -> dict[str, list[float]]:
    """Processor seconds of the steps `beside` a save and of the others; of the saves but the last, which is
    waited for in any case, the seconds that were `written` and that the training `waited`.
    """
    name = f"{mode}-{number}"
    found: dict[str, list[float]] = {"free": [], "beside": []}
    step, savers = Trainer.step, list[Saver]()
    make = Saver.__init__

    def remember(self: Saver, *arguments: Any) -> None:
        make(self, *arguments)
        savers.append(self)

    def timed(self: Trainer, batches: Any, state: Any) -> Any:
        beside, began = savers[0].is_saving, time.thread_time()
        result = step(self, batches, state)
        if state.step >= WARMUP:
            found["beside" if beside or savers[0].is_saving else "free"].append(time.thread_time() - began)
        return result

    command = ["albor", "train", str(config), MODES[mode], f"name={name}"]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(Saver, "__init__", remember),
        mock.patch.object(Trainer, "step", timed),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        albor()
    lines = (config.parent / "runs" / name / "events.jsonl").read_text().splitlines()
    saves = [event for event in map(json.loads, lines) if event["event"] == "checkpoint"]
    assert saves[-1]["step"] == STEPS, "the run did not come to its end"
    found["written"] = [event["seconds"] for event in saves[:-1]]
    found["waited"] = [event["waited"] for event in saves[:-1]]
    return found


def summarise(rounds: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians over rounds of each round's median."""
    summary = {
        f"{key}_seconds": statistics.median(statistics.median(found[key]) for found in rounds)
        for key in ("free", "beside", "written", "waited")
        if all(found[key] for found in rounds)
    }
    if "beside_seconds" in summary:
        ratios = [statistics.median(found["beside"]) / statistics.median(found["free"]) for found in rounds]
        summary["step_beside_a_save_ratio"] = statistics.median(ratios)
    return {key: round(value, 4) for key, value in summary.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    rounds: dict[str, list[dict[str, list[float]]]] = {mode: [] for mode in MODES}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        config = write_project(Path(directory))
        for number in range(arguments.rounds):
            for mode in MODES:
                rounds[mode].append(measure(config, mode, number))
        size = sum(path.stat().st_size for path in Path("runs/waiting-0/checkpoints").glob("step-*/*"))
    record = {
        **facts("cpu"),
        "command": f"python benchmarks/saving.py --rounds {arguments.rounds}",
        "load_before": load,
        "bytes": size,
        **{mode: summarise(found) for mode, found in rounds.items()},
    }
    text = json.dumps(record, indent=1) + "\n"
    print(text, end="")
    if not arguments.no_write:
        RECORD.write_text(text)
        print(f"written to {RECORD}", file=sys.stderr)


if __name__ == "__main__":
    main()
