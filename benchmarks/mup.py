"""Does the best learning rate stay where it is as a model gets wider, with muP and without?

    python benchmarks/mup.py                # writes benchmarks/results/mup.json, prints the tables
    python benchmarks/mup.py --widths 64,128 --steps 50      # something else; never writes

Trains a small model on the source of Python's standard library at each of several widths with each of several
learning rates, once as it is and once with model.mup_base_width at the narrowest. All trainings read the same
tokens in the same order, none of them twice. A loss is the mean over the last tenth of the steps. The best
rate is the vertex of the parabola through the best of the grid and its two neighbours, in log2 of the rate;
where the best is at the grid's end there is none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from multiprocessing import Pool
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: so small a model is slower with more

from albor.bench.machine import facts
from albor.config import RunConfig
from albor.data.prepare import PreparedData, check_horizon, prepare
from albor.errors import ConfigError
from albor.memory.plan import plan_training
from albor.train.session import open_session

RECORD = Path(__file__).parent / "results" / "mup.json"
WIDTHS, STEPS, EXPONENTS = (64, 128, 256), 60, range(-10, -4)
HEAD_WIDTH = 32
WAYS = ("standard", "muP")


def make_config(width: int, base: int | None, lr: float, steps: int, cache: str) -> RunConfig:
    """A model of 2 layers; 512 tokens a step."""
    heads = width // HEAD_WIDTH
    return RunConfig.model_validate({
        "name": "mup", "device": "cpu",
        "model": {
            "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2,
            "num_attention_heads": heads, "num_key_value_heads": heads // 2, "vocab_size": 512,
            "max_position_embeddings": 64, "initializer_range": 0.08, "mup_base_width": base,
        },
        "tokenizer": {"sample_bytes": 1_000_000},
        "data": {
            "sequence_length": 64, "cache_dir": cache, "max_epochs": 1,
            "sources": [{"kind": "python-stdlib", "max_bytes": 4_000_000}],
        },
        "optimizer": {"lr": lr},
        "schedule": {"warmup_steps": steps // 10},
        "train": {"max_steps": steps, "micro_batch_size": 8, "precision": "fp32"},
    })  # fmt: skip


def train(config: RunConfig, data: PreparedData) -> float | None:
    """The loss at the end; None where training diverged."""
    session = open_session(config, data, plan_training(config, "cpu", "float32"), "cpu")
    state, losses = session.state, []
    for _ in range(config.steps):
        result, state = session.trainer.step(session.batches(lambda: None), state)
        losses.append(result.loss)
    last = losses[-max(1, config.steps // 10) :]
    loss = sum(last) / len(last)
    return loss if math.isfinite(loss) and result.verdict.updates else None


def best_exponent(losses: dict[int, float | None]) -> float | None:
    """Where the loss is lowest, as a power of 2; None at an end of the grid."""
    known = {exponent: loss for exponent, loss in losses.items() if loss is not None}
    lowest = min(known, key=lambda exponent: known[exponent])
    if lowest - 1 not in known or lowest + 1 not in known:
        return None
    left, middle, right = (known[lowest + step] for step in (-1, 0, 1))
    return lowest + (left - right) / (2 * (left - 2 * middle + right))


def measure(widths: list[int], steps: int) -> dict[str, Any]:
    """Every training: losses[way][width][exponent], and the best exponent of each width.

    At the narrowest width both ways are one.
    """
    wanted = [(way, width) for way in WAYS for width in widths if way == "standard" or width != widths[0]]
    found: dict[tuple[str, int], dict[int, float | None]] = {}
    with tempfile.TemporaryDirectory(prefix="albor-benchmark-") as home, Pool() as pool:
        first = make_config(widths[0], None, 1.0, steps, f"{home}/data")
        if problems := check_horizon(first, prepare(first, lambda *_: None)):
            raise ConfigError(problems)
        # The widest first, so that none of them is left to one process at the end.
        tasks = [
            (way, width, exponent, widths[0], steps, f"{home}/data")
            for way, width in sorted(wanted, key=lambda one: -one[1])
            for exponent in EXPONENTS
        ]
        for way, width, exponent, loss in pool.imap_unordered(_train, tasks):
            print(f"{way}, width {width}, 2^{exponent}: {loss}", file=sys.stderr, flush=True)
            found.setdefault((way, width), {})[exponent] = loss
    found["muP", widths[0]] = found["standard", widths[0]]
    losses: dict[str, dict[str, dict[str, float | None]]] = {way: {} for way in WAYS}
    best: dict[str, dict[str, float | None]] = {way: {} for way in WAYS}
    for way in WAYS:
        for width in widths:
            by_exponent = dict(sorted(found[way, width].items()))
            losses[way][str(width)] = {str(e): loss and round(loss, 4) for e, loss in by_exponent.items()}
            exponent = best_exponent(by_exponent)
            best[way][str(width)] = exponent and round(exponent, 2)
    return {"losses": losses, "best_exponent": best}


def _train(task: tuple[str, int, int, int, int, str]) -> tuple[str, int, int, float | None]:
    """One training, in a process of its own."""
    way, width, exponent, base, steps, cache = task
    config = make_config(width, base if way == "muP" else None, 2.0**exponent, steps, cache)
    return way, width, exponent, train(config, prepare(config, lambda *_: None))


def table(record: dict[str, Any]) -> str:
    """Markdown: the losses, and the best rate of each width."""
    exponents = [str(exponent) for exponent in EXPONENTS]
    lines = [
        "| | width | " + " | ".join(f"2^{exponent}" for exponent in exponents) + " | best |",
        "|---|---|" + "---|" * (len(exponents) + 1),
    ]
    for way, by_width in record["losses"].items():
        for width, losses in by_width.items():
            cells = ["diverged" if losses[e] is None else f"{losses[e]:.3f}" for e in exponents]
            exponent = record["best_exponent"][way][width]
            best = "beyond" if exponent is None else f"2^{exponent:.2f}"
            lines.append(f"| {way} | {width} | " + " | ".join(cells) + f" | {best} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default=",".join(map(str, WIDTHS)), help="the first is muP's base")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training")
    arguments = parser.parse_args()
    widths = [int(width) for width in arguments.widths.split(",")]
    record = {**facts("cpu"), "steps": arguments.steps, **measure(widths, arguments.steps)}
    print(table(record))
    if (tuple(widths), arguments.steps) == (WIDTHS, STEPS):
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written to {RECORD.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
