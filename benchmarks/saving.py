"""What saving costs a run on the CPU: waiting for it, and in the background.

    python benchmarks/saving.py [--rounds 5]

Runs of one configuration in turn, each in a process of its own, over several rounds. Within a run, the steps
that are taken while a checkpoint is being written are held against those in between, so that a machine that
is busy with other things slows both. The training has one thread and the writer another, as on a machine with
two cores. Prints medians, and what docs/reliability.md says of them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS, EVERY, WARMUP = 49, 12, 4
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


def measure(config: Path, mode: str, number: int) -> dict[str, Any]:
    """Seconds of the steps beside a save and of the others, and of the saves but the last, which is waited
    for.
    """
    name = f"{mode}-{number}"
    command = [sys.executable, "-m", "albor", "train", str(config), MODES[mode], f"name={name}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=config.parent, env=environment, check=True, capture_output=True)
    run = config.parent / "runs" / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    tokens = rows[0]["tokens"]
    steps = {row["step"]: tokens / row["train/tokens_per_second"] for row in rows if "train/loss" in row}
    saves = [event for event in events if event["event"] == "checkpoint" and event["step"] < STEPS]
    beside = set()
    if mode == "background":
        for save in saves:
            written, step = 0.0, save["step"]
            while written < save["seconds"] and (step := step + 1) in steps:
                written += steps[step]
                beside.add(step)
    return {
        "free": [seconds for step, seconds in steps.items() if step > WARMUP and step not in beside],
        "beside": [steps[step] for step in beside],
        "steps_beside": len(beside) / len(saves),
        "written": [event["seconds"] for event in saves],
        "waited": [event["waited"] for event in saves],
        "bytes": sum(path.stat().st_size for path in (run / "checkpoints").glob("step-*/*")),
    }


def summarise(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over rounds. `cost` is that of one save, in steps: standing still, and steps that are slower."""
    medians = [{key: statistics.median(r[key]) for key in ("free", "waited", "written")} for r in rounds]
    found: dict[str, float] = {
        f"{key}_seconds": statistics.median(m[key] for m in medians) for key in ("free", "waited", "written")
    }
    slower = [
        statistics.median(r["beside"]) / m["free"] if r["beside"] else 1.0
        for r, m in zip(rounds, medians, strict=True)
    ]
    costs = [
        m["waited"] / m["free"] + r["steps_beside"] * (ratio - 1)
        for r, m, ratio in zip(rounds, medians, slower, strict=True)
    ]
    found["step_beside_a_save_ratio"] = statistics.median(slower)
    found["cost_in_steps"] = statistics.median(costs)
    return found | {"checkpoint_bytes": rounds[0]["bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as directory:
        config = write_project(Path(directory))
        for number in range(parser.parse_args().rounds):
            for mode in MODES:
                rounds[mode].append(measure(config, mode, number))
    print(json.dumps({mode: summarise(found) for mode, found in rounds.items()}, indent=1))


if __name__ == "__main__":
    main()
