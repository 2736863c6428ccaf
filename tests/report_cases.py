"""Run directories as a trainer leaves them, for the report: many rows, all kinds of events, hostile texts."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from albor.architecture import Architecture
from albor.configfile import dump_config, load_config

ROOT = Path(__file__).parents[1]
BEGAN = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOSTILE = "</script><script>document.title = 'broken out'</script><img src=x onerror=alert(1)><b>&amp;"
MIB = 2**20


def at(seconds: float, *, precise: bool = False) -> str:
    """A time of the run, as the logs write it."""
    return (BEGAN + timedelta(seconds=seconds)).isoformat("T", "milliseconds" if precise else "seconds")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(
    directory: Path,
    *,
    config: str = "pretrain-350m",
    overrides: tuple[str, ...] = (),
    rows: int = 400,
    every: int = 50,
    seed: int = 1,
    device: str = "cuda",
    times: bool = True,
    text: str = "def main():\n    return 0\n",
) -> Path:
    """A run of `rows` logged steps that was killed once and resumed, skipped a step, and finished."""
    chance = random.Random(seed)
    run = load_config(ROOT / "configs" / f"{config}.yaml", [f"name={directory.name}", *overrides])
    directory.mkdir(parents=True)
    (directory / "config.resolved.yaml").write_text(dump_config(run))
    groups = [segment.group for segment in Architecture.from_config(run.model).segments]
    blocks = {group.partition("/")[0]: None for group in groups} | dict.fromkeys(groups)
    gpu = device == "cuda"
    rate = 120_000.0 if gpu else 9_000.0
    metrics: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = [{"event": "started", "step": 0, "time": at(0), "source": None}]
    seconds = 0.0
    steps = [1, *range(every, rows * every, every)]
    for place, step in enumerate(steps):
        tokens = step * run.tokens_per_step
        taken = (step - (steps[place - 1] if place else 0)) * run.tokens_per_step / rate
        seconds += taken
        if place == len(steps) // 3:  # killed; for an hour nobody trained
            seconds += 3600
            events.append({"event": "resumed", "step": steps[place - 1], "time": at(seconds - taken)})
        if place % 20 == 19:
            events.append(
                {"event": "checkpoint", "step": step, "time": at(seconds), "path": f"step-{step:08d}"}
            )
        ideal = 2.4 + 7.5 * math.exp(-step / (rows * every / 12)) + 0.6 * math.exp(-2 * step / (rows * every))
        loss: float | None = ideal + chance.gauss(0, 0.06) + 0.05 * (seed - 1)
        row: dict[str, Any] = {"step": step, "tokens": tokens}
        if times:
            row["time"] = at(seconds, precise=True)
        norm = 0.4 + 2 * math.exp(-step / (rows * every / 20)) + abs(chance.gauss(0, 0.05))
        if place == len(steps) // 2:
            loss, norm, row["non_finite"] = None, 41.0, {"train/loss": "nan"}
            details = {"action": "skipped", "loss": None, "grad_norm": 41.0}
            events.append({"event": "skipped_step", "step": step, "time": at(seconds), **details})
            events.append(
                {"event": "alert", "step": step, "time": at(seconds), "rule": "train/loss is not finite"}
            )
        row |= {
            "train/loss": loss,
            "train/lr": run.optimizer.lr * min(1, step / 500) * (0.1 + 0.9 * (1 - step / (rows * every))),
            "train/grad_norm": norm,
            "train/epoch": step / (rows * every),
            **{name: norm * (0.1 + 0.9 * chance.random()) / (1 + index / 40) for index, name in
               enumerate(f"gradients/{group}" for group in blocks)},
            "train/tokens_per_second": rate * (1 + chance.gauss(0, 0.01)),
            "train/mfu": 0.46 * (1 + chance.gauss(0, 0.01)) if gpu else None,
            "memory/planned": 11_000 * MIB, "memory/arena": 9_800 * MIB,
            "memory/reserved": 9_900 * MIB if gpu else None, "memory/process": (10_900 + place // 40) * MIB,
        }  # fmt: skip
        metrics.append(row)
        if place and place % max(1, len(steps) // 24) == 0:
            judged = ideal + 0.08 + 0.05 * (seed - 1)
            row = {"step": step, "tokens": tokens}
            if times:
                row["time"] = at(seconds + 4, precise=True)
            metrics.append(
                row
                | {"val/loss": judged, "val/perplexity": math.exp(judged), "val/bits_per_byte": judged / 2.9}
            )
            for prompt in ("def ", "import os\n", "class Test"):
                events.append({
                    "event": "sample", "step": step, "time": at(seconds + 6), "prompt": prompt,
                    "text": f"{text}    # step {step}\n" * 2,
                })  # fmt: skip
    last = steps[-1]
    groups_of_plan = {
        "weights": 700 * MIB, "master": 1400 * MIB, "moments": 2800 * MIB, "gradients": 700 * MIB,
        "activations": 3300 * MIB, "scratch": 500 * MIB, "logits": 300 * MIB, "io": 1 * MIB, "gaps": 99 * MIB,
    }  # fmt: skip
    outside = [
        {"name": "CUDA context", "bytes": 480 * MIB, "pooled": False},
        {"name": "loaded kernels", "bytes": 320 * MIB, "pooled": False},
        {"name": "CUDA graphs", "bytes": 150 * MIB, "pooled": False},
        {"name": "cuBLAS workspace", "bytes": 64 * MIB, "pooled": True},
    ]
    required = sum(groups_of_plan.values()) + sum(int(str(item["bytes"])) for item in outside)
    plan = {
        "hardware": "NVIDIA H100" if gpu else "this machine", "device": device, "required_bytes": required,
        "groups": groups_of_plan, "outside": outside,
    }  # fmt: skip
    (directory / "plan.json").write_text(json.dumps(plan))
    arena = sum(groups_of_plan.values())
    components = {
        "arena, device": {"planned": arena, "measured": arena, "how": "size of the slab"},
        "CUDA context": {
            "planned": 480 * MIB,
            "measured": 471 * MIB,
            "how": "NVML, when the context was all",
        },
        "loaded kernels": {"planned": 320 * MIB, "measured": 333 * MIB, "how": "what was added"},
        "CUDA graphs": {"planned": 150 * MIB, "measured": 148 * MIB, "how": "what was added"},
        "process": {"planned": required, "measured": required + 20 * MIB, "how": "NVML"},
        "process, peak": {"planned": required, "measured": required + 20 * MIB, "how": "NVML"},
    }
    events.append({
        "event": "memory", "step": last, "time": at(seconds), "moment": "end", "device": device,
        "calibrated": gpu, "components": components,
    })  # fmt: skip
    events.append({"event": "finished", "step": last, "time": at(seconds + 20)})
    (directory / "env.json").write_text(
        json.dumps({"albor": "0.1.0", "torch": "2.13.0", "device": plan["hardware"], "threads": 2 + seed})
    )
    evaluation = directory / "eval"
    evaluation.mkdir()
    final = {
        "step": last, "val/loss": 2.61 + 0.05 * seed, "val/perplexity": 13.6,
        "val/bits_per_byte": 0.91 + 0.01 * seed,
        "val/target_tokens": 1_048_576, "gzip/bits_per_byte": 2.07, "xz/bits_per_byte": 1.8,
        "smoke": "of 20 texts 20 say something",
    }  # fmt: skip
    (evaluation / "final.json").write_text(json.dumps(final))
    finding = {"prompt": "def main():", "text": text, "parses": True}
    (evaluation / "smoke.json").write_text(
        json.dumps({"step": last, "summary": final["smoke"], "findings": [finding]})
    )
    results = {
        task: {
            "acc": {"value": value + 0.01 * seed, "stderr": 0.012},
            "acc_norm": {"value": value + 0.03, "stderr": 0.013},
            "items": 1000, "chance": 0.25, "requests": 4000,
        }
        for task, value in (("arc_easy", 0.41), ("hellaswag", 0.33), ("sciq", 0.71))
    }  # fmt: skip
    results["lambada_openai"] = {"perplexity": {"value": 41.2, "stderr": 1.9}, "items": 500, "chance": None}
    (evaluation / f"all-step-{last:08d}.json").write_text(
        json.dumps({"step": last, "limit": None, "results": results})
    )
    checkpoint = directory / "checkpoints" / f"step-{last:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(
        json.dumps({"loader": {"samples": 100, "per_source": [100] * len(run.data.sources)}})
    )
    write_lines(directory / "metrics.jsonl", metrics)
    write_lines(directory / "events.jsonl", events)
    return directory
