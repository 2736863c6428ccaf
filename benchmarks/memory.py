"""Holds what `albor vram-estimate` says against what training takes, one shape after the other.

    python benchmarks/memory.py                       # on a GPU: all shapes; first run `albor calibrate`
    python benchmarks/memory.py --limit-seconds 540   # what fits into nine minutes; the same again goes on
    python benchmarks/memory.py --device cpu          # the same on a CPU, with smaller models

Each shape is a process that runs `albor train`: twelve steps, with evaluations, samples and a checkpoint. On
a GPU its allocator may take what the plan gives it and no more (a capped memory fraction), as on a card that
has just what the estimate asks for. Then come cards of several sizes: the largest micro-batch that each of
them accepts has to train there, and the next is tried too, to see whether it was refused rightly.

What was planned and measured is what the run itself recorded (`albor vram-estimate --audit`), and the peak is
what this process saw of the other from outside, if that is more. The goals: errors of at most 1.5 % in the
median and 3 % at most, never more than 64 MiB above the plan, no accepted shape that runs out of memory.

Writes benchmarks/results/memory-DEVICE.json (a CPU's: runs/memory/memory-cpu.json) after every shape, and
does not repeat what that holds of the same code, card and versions. What failed is tried again, after all
the rest. Exit code 1: a goal is missed; 2: there is no such device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402  (a checkout need not be installed)

from albor.bench.cases import SHAPES as MODELS  # noqa: E402
from albor.bench.launch import environment  # noqa: E402
from albor.bench.machine import facts  # noqa: E402
from albor.bench.records import replace_text  # noqa: E402
from albor.config import RunConfig, check_algebra  # noqa: E402
from albor.configfile import load_config  # noqa: E402
from albor.errors import AlborError  # noqa: E402
from albor.memory.audit import GOAL_SHARE, GOAL_UNDER, PEAK, PROCESS, audit  # noqa: E402
from albor.memory.cards import Hardware  # noqa: E402
from albor.memory.devices import this_machine  # noqa: E402
from albor.memory.estimate import Estimate  # noqa: E402
from albor.memory.process import CardProcess, peak_resident  # noqa: E402
from albor.units import GIB, MIB, format_bytes  # noqa: E402

GOAL_MAXIMUM = 0.03  # largest error; the median's goal is the audit's
GOAL_SHAPES = 40  # on which the goals are held to be reached
_LOOK_SECONDS = 0.05  # between two looks at a process's memory
_SHORTAGE = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED|MemoryError", re.IGNORECASE)

Keys = Mapping[str, Any]

_TINY = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip
_WIDE_HEADS = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
               "num_attention_heads": 6, "num_key_value_heads": 1}  # fmt: skip
_ON_CARD: dict[str, Keys] = {
    "10m": _TINY | {"vocab_size": 4096},
    "wide-heads": _WIDE_HEADS | {"vocab_size": 8192},
    **{name: MODELS[name][0] | {"vocab_size": 32768} for name in ("50m", "125m", "350m")},
}
# The same proportions, small enough for a CPU to take the steps in seconds.
_ON_CPU: dict[str, Keys] = {
    name: {"hidden_size": 64 * size, "intermediate_size": 192 * size, "num_hidden_layers": 2 + size,
           "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 512 * size}
    for name, size, kv_heads in (
        ("10m", 1, 2), ("wide-heads", 2, 1), ("50m", 2, 2), ("125m", 3, 4), ("350m", 4, 2),
    )
}  # fmt: skip
# What changes a plan, beside model, batch and accumulator. The first part also runs on a CPU.
_ANYWHERE: dict[str, Keys] = {
    "cheap": {"train.recompute": "cheap"},
    "block": {"train.recompute": "block"},
    "block-gpu": {"train.recompute": "block", "train.accumulator": "gpu"},
    "chunk": {"train.head_chunk_tokens": 128},
    "untied": {"model.tie_word_embeddings": False},
    "documents": {"data.document_mask": True},
    "background": {"checkpoint.background": True},
    "short": {"data.sequence_length": 128, "train.micro_batch_size": 32},
    "long-context": {"model.max_position_embeddings": 8192},
    "no-samples": {"evaluate.prompts": []},
    "evaluates-more": {"evaluate.micro_batch_size": 24},
    "no-accumulation": {"train.gradient_accumulation_steps": 1},
    "fp32": {"train.precision": "fp32"},
}
_CARD_ONLY: dict[str, Keys] = {
    "bf16-state": {"optimizer.state_dtype": "bf16"},
    "fp16": {"train.precision": "fp16"},
    "triton": {"train.attention": "triton"},
    "flash": {"train.attention": "flash"},
    "flash-any-order": {"train.attention": "flash", "train.deterministic": False},
    "cudnn": {"train.attention": "cudnn", "train.deterministic": False},
    "long": {
        "data.sequence_length": 4096,
        "model.max_position_embeddings": 4096,
        "train.micro_batch_size": 2,
    },
}
# (model, keys) at the edges of cards, in turn; gigabytes that such cards have for CUDA programs.
_AT_EDGES: tuple[tuple[str, Keys], ...] = (
    ("50m", {"train.accumulator": "cpu"}),
    ("125m", {"train.accumulator": "gpu"}),
    ("125m", {"train.accumulator": "cpu", "train.recompute": "cheap"}),
    ("350m", {"train.accumulator": "cpu", "train.recompute": "block"}),
)
_EDGES_GIB = (4, 5.8, 7.7, 9.6, 11.6, 15.5, 19.5, 23.5, 31.3, 39.4, 47.4, 79)


@dataclass(frozen=True)
class Shape:
    """One thing to train. Its capacity is a card's that it just fits, or just does not fit; None: it runs
    with what the plan asks for.
    """

    name: str
    config: RunConfig
    capacity: int | None = None
    accepted: bool = True


def make_config(name: str, keys: Keys, device: str, text: str | None) -> RunConfig:
    """A run of twelve steps that uses all that a run uses. `text`: a pattern of files; None: Python's own."""
    values: dict[str, Any] = {
        "name": name,
        "device": device,
        "runs_dir": "runs",
        "model": {"max_position_embeddings": 1024},
        "data": {
            "sequence_length": 1024 if device == "cuda" else 128, "max_epochs": 1000.0, "cache_dir": "data",
            "sources": [{"kind": "files", "path": text} if text else {"kind": "python-stdlib"}],
            "validation_fraction": 0.2,
        },
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "train": {"max_steps": 12, "gradient_accumulation_steps": 2},
        "evaluate": {
            "every_steps": 6, "batches": 2, "final_batches": 2, "prompts": ["def "], "sample_tokens": 8,
        },
        "checkpoint": {"every_steps": 12, "keep_last": 1, "retries": 0},
        "log": {"every_steps": 1},
    }  # fmt: skip
    for key, value in keys.items():
        section, _, last = key.partition(".")
        values.setdefault(section, {})[last] = value
    config = RunConfig.model_validate(values)
    assert not check_algebra(config), f"{name}: {check_algebra(config)}"
    return config


def shapes(device: str, text: str | None = None) -> list[Shape]:
    """All of one device that run with what they were planned to take."""
    models = _ON_CARD if device == "cuda" else _ON_CPU
    few, many = ((2, 16), (4, 8))[device == "cpu"]
    keyed: dict[str, tuple[str, Keys]] = {}
    for model in models:
        for batch in (few, many if model != "350m" else many // 2):
            for accumulator in ("cpu", "gpu"):
                keys = {"train.micro_batch_size": batch, "train.accumulator": accumulator}
                keyed[f"{model}-mb{batch}-{accumulator}"] = model, keys
    others = _ANYWHERE | (_CARD_ONLY if device == "cuda" else {})
    for name, changed in others.items():
        keyed[f"50m-{name}"] = "50m", {"train.micro_batch_size": many // 2, **changed}
    for name in ("cheap", "block-gpu", "chunk", *(("flash", "cudnn", "long") if device == "cuda" else ())):
        keyed[f"125m-{name}"] = "125m", {"train.micro_batch_size": many // 2, **others[name]}
    for name in ("block", "block-gpu", *(("bf16-state", "long") if device == "cuda" else ())):
        keyed[f"350m-{name}"] = "350m", {"train.micro_batch_size": few, **others[name]}
    found = {name: _of_model(models[model]) | keys for name, (model, keys) in keyed.items()}
    if device == "cuda":
        found |= _shipped()
    return [Shape(name, make_config(name, keys, device, text)) for name, keys in found.items()]


def _shipped() -> dict[str, Keys]:
    """What sets the plan of the shipped configurations, by their names; see benchmarks/estimators.py."""
    found: dict[str, Keys] = {}
    for path in sorted(ROOT.glob("configs/pretrain-*.yaml")):
        config = load_config(path)
        keys = ("micro_batch_size", "accumulator", "recompute", "head_chunk_tokens", "precision")
        found[path.stem] = {
            **{f"model.{key}": value for key, value in config.model.model_dump().items()},
            **{f"train.{key}": getattr(config.train, key) for key in keys},
            "data.sequence_length": config.data.sequence_length,
            "optimizer.state_dtype": config.optimizer.state_dtype,
        }
    return found


def _of_model(model: Keys) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in model.items()}


def edges(
    device: str, here: Hardware, text: str | None = None, sizes: Sequence[float] = _EDGES_GIB
) -> list[Shape]:
    """For each card no larger than this one, the largest micro-batch that it accepts, and the next."""
    models = _ON_CARD if device == "cuda" else _ON_CPU
    found = []
    for place, size in enumerate(sizes):
        capacity, (model, keys) = int(size * GIB), _AT_EDGES[place % len(_AT_EDGES)]
        if here.capacity_bytes is None or capacity > here.capacity_bytes:
            continue

        def at(batch: int, model: str = model, keys: Keys = keys, size: float = size) -> RunConfig:
            name = f"card-{size:g}gib-{model}-mb{batch}"
            batch_keys = {"train.micro_batch_size": batch, "train.gradient_accumulation_steps": 1}
            return make_config(name, _of_model(models[model]) | keys | batch_keys, device, text)

        def fits(batch: int, at: Callable[[int], RunConfig] = at, capacity: int = capacity) -> bool:
            return Estimate.of(at(batch), here).required_bytes <= capacity

        batch = largest(fits)
        assert batch, f"{model} is too large for {size:g} GiB: give that card a smaller one in _AT_EDGES"
        found.append(Shape(at(batch).name, at(batch), capacity))
        found.append(Shape(at(batch + 1).name, at(batch + 1), capacity, accepted=False))
    return found


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where all below one that fits do too; 0: none does."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# One shape, in a process of its own


def cap_of(target: Estimate, capacity: int | None) -> int:
    """Bytes that PyTorch's allocator may have of a card of `capacity`: what the driver is planned to take,
    the allocator cannot.
    """
    beside = sum(item.bytes for item in target.outside_items if not item.pooled)
    return (target.required_bytes if capacity is None else capacity) - beside


def train_capped(config: Path, cap: int | None) -> None:
    """The child: `albor train` of `config`, whose allocator is refused what exceeds `cap` bytes."""
    from albor import cli
    from albor.train import run

    allocate = run.open_session

    def capped(*arguments: Any, **keywords: Any) -> Any:
        # Here and not at once: the process's first look at the card is albor's own.
        if cap is not None:
            import torch

            total = torch.cuda.get_device_properties(0).total_memory
            # The fraction times the total is cut to whole bytes, and must not be one too few.
            torch.cuda.set_per_process_memory_fraction(min(1.0, (cap + 0.5) / total))
        return allocate(*arguments, **keywords)

    run.open_session = capped
    sys.argv = ["albor", "train", str(config), "--resume", "never"]
    cli.main()


@dataclass
class Outcome:
    """How a process ended, and the most memory that it was seen to have; None: not known."""

    code: int
    log: str
    peak: int | None
    how: str
    seconds: float
    expired: bool = False


def run_child(config: Path, cap: int | None, device: str, work: Path, timeout: float) -> Outcome:
    """Runs a shape to its end, and looks at its memory meanwhile. What takes too long is killed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(config)]
    command += [] if cap is None else ["--cap", str(cap)]
    caches = {"TRITON_CACHE_DIR": str(work / "triton")}
    log, began = config.with_suffix(".log"), time.monotonic()
    watch = Watch(device)
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=work, env=environment() | caches, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, process_group=0,
        )  # fmt: skip
        expired = False
        try:
            with watch.of(process.pid):
                process.wait(max(0.1, timeout))
        except subprocess.TimeoutExpired:
            expired = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    return Outcome(process.returncode, text, watch.peak, watch.how, time.monotonic() - began, expired)


class Watch:
    """Looks at the memory of another process again and again, on the card or in RAM. To be made before it."""

    def __init__(self, device: str):
        self.peak: int | None = None
        self.how = "not seen"
        self._card = CardProcess() if device == "cuda" else None
        self._end = threading.Event()

    def of(self, pid: int) -> Watch:
        """The process to look at."""
        self._pid = pid
        if self._card is not None:
            self._card.pid = pid
        self._thread = threading.Thread(target=self._look, daemon=True)
        return self

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._end.set()
        self._thread.join()
        if self._card is not None:
            self._card.close()

    def _look(self) -> None:
        while not self._end.wait(_LOOK_SECONDS):
            reading = self._card.read() if self._card is not None else peak_resident(self._pid)
            if reading.bytes is not None:
                self.peak, self.how = max(self.peak or 0, reading.bytes), reading.how


def measure(shape: Shape, device: str, work: Path, timeout: float) -> dict[str, Any] | None:
    """The row of a shape; None where it did not end within `timeout` seconds."""
    config = shape.config
    target = Estimate.of(config, this_machine("cuda" if device == "cuda" else "cpu"))
    cap = cap_of(target, shape.capacity) if device == "cuda" else None
    folder = work / config.runs_dir / config.name
    shutil.rmtree(folder, ignore_errors=True)
    path = work / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    outcome = run_child(path, cap, device, work, timeout)
    if outcome.expired:
        return None
    row = {
        "name": shape.name,
        "accepted": shape.accepted,
        "capacity_bytes": shape.capacity,
        "cap_bytes": cap,
        "planned": target.required_bytes,
        "calibrated": target.calibrated,
        "attention": target.plan.attention.backend,
        "seconds": round(outcome.seconds, 1),
        **judge_child(outcome, folder),
    }
    shutil.rmtree(folder, ignore_errors=True)  # checkpoints of gigabytes
    return row


def judge_child(outcome: Outcome, folder: Path) -> dict[str, Any]:
    """Status and bytes of a run that has ended: from its own record, and from what was seen of it."""
    short = bool(_SHORTAGE.search(outcome.log)) and outcome.code != 0
    events = folder / "events.jsonl"
    # An evaluation that found no memory is left out by a run, which then goes on; here it counts.
    if events.exists() and '"event": "out_of_memory"' in events.read_text(encoding="utf-8"):
        short = True
    if outcome.code or short:
        lines = [line for line in outcome.log.splitlines() if line.strip()]
        error = lines[-1] if lines else f"exit code {outcome.code}, and no output"
        return {"status": "out of memory" if short else "failed", "error": error, "measured": outcome.peak}
    try:
        found = audit(folder)
    except AlborError as error:
        return {"status": "failed", "error": str(error), "measured": outcome.peak}
    parts = found.last.components
    own = max((parts[name].measured or 0 for name in (PROCESS, PEAK) if name in parts), default=0)
    measured = max(own, outcome.peak or 0) or None
    return {
        "status": "ok" if measured else "not measured",
        "error": None if measured else f"{parts[PROCESS].how}; {outcome.how}",
        "measured": measured,
        "seen_from_outside": outcome.peak,
        "how": f"{parts[PROCESS].how}; from outside: {outcome.how}",
        "components": {name: part.as_json() for name, part in parts.items()},
        "at_the_tenth_step": None if found.tenth_step is None else {
            name: part.as_json() for name, part in found.tenth_step.components.items()
        },
    }  # fmt: skip


# Many


def summarise(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of the rows: ratios of planned to measured, what was above the plan, what ran out of memory."""
    rows = list(rows)
    done = [row for row in rows if row["status"] == "ok" and row["accepted"]]
    ratios = [row["planned"] / row["measured"] for row in done]
    errors = [abs(row["planned"] - row["measured"]) / row["measured"] for row in done]
    above = [row["measured"] - row["planned"] for row in done]
    refused = [row for row in rows if not row["accepted"]]
    return {
        "shapes": len(done),
        "ratio": {
            "minimum": min(ratios), "median": statistics.median(ratios), "maximum": max(ratios),
        } if done else None,
        "error": {"median": statistics.median(errors), "maximum": max(errors)} if done else None,
        "below_parity": [row["name"] for row in done if row["planned"] < row["measured"]],
        "most_above_the_plan": max(above, default=None),
        "calibrated": all(row["calibrated"] for row in done) if done else None,
        "out_of_memory": [r["name"] for r in rows if r["accepted"] and r["status"] == "out of memory"],
        "refused_rightly": [row["name"] for row in refused if row["status"] == "out of memory"],
        "refused_and_trained": {
            row["name"]: (row["planned"] - row["capacity_bytes"]) / row["capacity_bytes"]
            for row in refused if row["status"] == "ok"
        },
        "failed": {row["name"]: row["error"] for row in rows if row["status"] in ("failed", "not measured")},
    }  # fmt: skip


def goals(summary: Mapping[str, Any], *, is_gpu: bool) -> list[dict[str, Any]]:
    """Each goal, what was found, and whether it is reached; None: too little was measured to say so, or it is
    not one of this device.
    """
    error, above, enough = summary["error"], summary["most_above_the_plan"], summary["shapes"] >= GOAL_SHAPES

    def goal(name: str, most: float, value: float | None, *, missed_at_once: bool) -> dict[str, Any]:
        reached = None if value is None or not is_gpu else value <= most
        if not enough and not (reached is False and missed_at_once):
            reached = None
        return {"goal": name, "most": most, "value": value, "reached": reached}

    return [
        goal("median error", GOAL_SHARE, error and error["median"], missed_at_once=False),
        goal("largest error", GOAL_MAXIMUM, error and error["maximum"], missed_at_once=True),
        goal("bytes above the plan", GOAL_UNDER, above, missed_at_once=True),
        goal("accepted and out of memory", 0, len(summary["out_of_memory"]), missed_at_once=True),
    ]


class Record:
    """The file of results. A row counts as long as code, card, versions and configuration are the same."""

    def __init__(self, path: Path, here: dict[str, Any], command: str):
        self.path, self.here, self.command = path, here, command
        found = json.loads(path.read_text(encoding="utf-8"))["shapes"] if path.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in found}

    def find(self, shape: Shape) -> dict[str, Any] | None:
        """The row of `shape`, if it counts."""
        row = self.rows.get(shape.name)
        return row if row is not None and row["fingerprint"] == self.fingerprint(shape) else None

    def save(self, shapes: Sequence[Shape], new: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Writes the file, with a `new` row and without those that count no longer; returns what it says."""
        if new is not None:
            of = next(shape for shape in shapes if shape.name == new["name"])
            about = {"commit": self.here["commit"], "date": self.here["date"]}
            self.rows[of.name] = {**new, **about, "fingerprint": self.fingerprint(of)}
        rows = [row for shape in shapes if (row := self.find(shape)) is not None]
        summary = summarise(rows)
        told = {
            "command": self.command,
            "machine": self.here,
            "wanted": len(shapes),
            "summary": summary,
            "goals": goals(summary, is_gpu=self.here["is_gpu"]),
            "shapes": rows,
        }
        replace_text(self.path, json.dumps(told, indent=1) + "\n")
        return told

    def fingerprint(self, shape: Shape) -> str:
        """What a row must carry to count."""
        here = self.here
        values = {
            "code": here["code"], "device": here["device"], "driver": here["driver"],
            "versions": {name: here["versions"][name] for name in ("torch", "triton", "numpy")},
            "config": shape.config.model_dump(mode="json"), "capacity": shape.capacity,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def benchmark(
    wanted: Sequence[Shape],
    record: Record,
    measure_shape: Callable[[Shape, float], dict[str, Any] | None],
    limit: float,
    timeout: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measures what the record lacks, within `limit` seconds in all and `timeout` seconds each, and returns
    what it then says.
    """
    end = clock() + limit
    told = record.save(wanted)
    rows = {shape.name: record.find(shape) for shape in wanted}
    missing = [shape for shape in wanted if rows[shape.name] is None]
    again = [
        shape for shape in wanted if (row := rows[shape.name]) and row["status"] in ("failed", "not measured")
    ]
    say(f"{len(wanted)} shapes, {len(wanted) - len(missing)} of them measured")
    for place, shape in enumerate([*missing, *again]):
        left = end - clock()
        if left <= 0:
            say(f"time is up, {len(missing) + len(again) - place} are left; the same command goes on")
            break
        row = measure_shape(shape, min(left, timeout))
        if row is None and left <= timeout:  # its time was cut short
            say(f"{shape.name}: time is up; the same command goes on")
            break
        if row is None:
            target = {"planned": 0, "calibrated": False, "measured": None, "capacity_bytes": shape.capacity}
            error = f"did not end within {timeout:g} seconds"
            row = {
                "name": shape.name,
                "accepted": shape.accepted,
                "status": "failed",
                "error": error,
                **target,
            }
        told = record.save(wanted, row)
        say(describe(row))
    return told


def describe(row: Mapping[str, Any]) -> str:
    """One line of the table."""
    sizes = [row["planned"], row["measured"]]
    cells = [f"{size / MIB:>10,.1f}" if size else f"{'-':>10}" for size in sizes]
    ratio = f"{sizes[0] / sizes[1]:7.4f}" if row["status"] == "ok" else f"{'':7}"
    above = f"{(sizes[1] - sizes[0]) / MIB:+9,.1f}" if row["status"] == "ok" else f"{'':9}"
    kind = "" if row["accepted"] else ", refused"
    return f"{row['name']:<28}{''.join(cells)}{ratio:>9}{above:>11}  {row['status']}{kind}"


HEADING = f"{'MiB':<28}{'planned':>10}{'measured':>10}{'ratio':>9}{'above':>11}"


def render(told: Mapping[str, Any]) -> Iterator[str]:
    """The table and the figures for people."""
    summary, machine = told["summary"], told["machine"]
    yield HEADING
    yield from (describe(row) for row in told["shapes"])
    yield ""
    yield f"{machine['device']}, {summary['shapes']} shapes, {len(told['shapes'])} of {told['wanted']} tried"
    if summary["ratio"]:
        ratio, error = summary["ratio"], summary["error"]
        yield (
            f"planned / measured: minimum {ratio['minimum']:.4f}, median {ratio['median']:.4f}, "
            f"maximum {ratio['maximum']:.4f}"
        )
        yield f"error: median {error['median']:.2%}, maximum {error['maximum']:.2%}"
        below = summary["below_parity"]
        most = format_bytes(max(0, summary["most_above_the_plan"]))
        yield f"below parity: {f'{len(below)}, by at most {most}' if below else 'none'}"
    for name in summary["out_of_memory"]:
        yield f"accepted and out of memory: {name}"
    for name, share in summary["refused_and_trained"].items():
        yield f"refused, {share:.1%} beyond the card, and trained all the same: {name}"
    for name, error in summary["failed"].items():
        yield f"failed: {name}: {error}"
    if not machine["is_gpu"]:
        yield "A CPU, as a stand-in: the goals are a GPU's."
        return
    if summary["calibrated"] is False:
        yield "Not calibrated: the plans have a margin; run `albor calibrate` first."
    words = {True: "reached", False: "missed", None: "open"}
    for goal in told["goals"]:
        yield f"{words[goal['reached']]}: {goal['goal']} at most {goal['most']:g}, found {goal['value']}"


def prepare(wanted: Iterable[Shape], work: Path, say: Callable[[str], None]) -> None:
    """Tokenizer and shards of each vocabulary, so that no measured process trains one."""
    first: dict[str, RunConfig] = {}
    for shape in wanted:
        config = shape.config
        first.setdefault(json.dumps([config.model.vocab_size, config.data.model_dump(mode="json")]), config)
    for config in first.values():
        path = work / "prepare.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "albor", "data", "prepare", str(path)]
        done = subprocess.run(
            command, cwd=work, env=environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise AlborError(f"the data cannot be prepared: {done.stderr.strip() or done.stdout.strip()}")
    say(f"data of {len(first)} kinds are ready")


def expression(text: str) -> re.Pattern[str]:
    """Of `--only`."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def arguments(given: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only", metavar="NAMES", type=expression, default="", help="shapes, by a regular expression"
    )
    parser.add_argument("--limit-seconds", type=float, default=float("inf"))
    parser.add_argument("--shape-timeout", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--text", metavar="FILES", help="text to train on; by default Python's own library")
    parser.add_argument("--out", type=Path, help="the record")
    parser.add_argument("--work", type=Path, default=Path("runs/memory"), help="runs, data and caches")
    parser.add_argument("--list", action="store_true", help="print the shapes and what each needs, and end")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cap", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str]) -> int:
    """Returns the exit code."""
    options = arguments(given)
    if options.child is not None:
        train_capped(options.child, options.cap)
        return 0
    device = options.device

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    here = this_machine(device)
    if device == "cuda" and here.capacity_bytes is None:
        say(f"benchmarks/memory.py: {here.description}; run it on a GPU, or with --device cpu")
        return 2
    every = [*shapes(device, options.text), *(edges(device, here, options.text) if device == "cuda" else [])]
    wanted = [shape for shape in every if re.search(options.only, shape.name)]
    room = here.capacity_bytes or 0
    needs = {shape.name: Estimate.of(shape.config, here).required_bytes for shape in wanted}
    too_large = [shape.name for shape in wanted if needs[shape.name] > room]
    for name in too_large:
        say(f"{name}: {format_bytes(needs[name])} needed, more than {here.description}; left out")
    wanted = [shape for shape in wanted if shape.name not in too_large]
    if not wanted:
        say(f"benchmarks/memory.py: of {len(every)} shapes none is left; leave out --only, or see --list")
        return 2
    if options.list:
        print("\n".join(f"{shape.name:<32}{needs[shape.name] / MIB:>12,.1f} MiB" for shape in wanted))
        return 0
    machine = facts(device)
    card = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    default = ROOT / "benchmarks/results" / f"memory-{card}.json" if device == "cuda" else None
    out = options.out or default or options.work / "memory-cpu.json"
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    record = Record(out, machine, shlex.join(["python", "benchmarks/memory.py", *given]))
    began = time.monotonic()
    try:
        prepare(wanted, work, say)
        say(HEADING)
        left = options.limit_seconds - (time.monotonic() - began)
        told = benchmark(
            wanted, record, lambda shape, most: measure(shape, device, work, most), left,
            options.shape_timeout, say,
        )  # fmt: skip
    except AlborError as error:
        say(str(error))
        return error.exit_code
    print("\n".join(render(told)))
    say(f"written to {out}")
    return 1 if any(goal["reached"] is False for goal in told["goals"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
