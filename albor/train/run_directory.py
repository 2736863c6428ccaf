"""The run directory: what a run writes about itself, and whether it may go on in it."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from albor import __version__
from albor.config import RunConfig
from albor.configfile import dump_config
from albor.errors import AlborError, ConfigError, Problem
from albor.memory.plan import MemoryPlan

# Keys that change neither what is computed nor the state it is computed from. Any other is refused on resume:
# the run would no longer be the one that its checkpoint belongs to.
_FREE_KEYS = (
    "runs_dir",
    "device",
    "data.cache_dir",
    "data.max_epochs",
    "tokenizer.path",  # the content of tokenizer and sources is compared by its hash
    "train.accumulator",
    "train.recompute",
    "train.max_skipped_steps",
    "evaluate",
    "checkpoint",
    "log",
)


_SOURCE_PATH = re.compile(r"data\.sources\.\d+\.path")


def run_directory(config: RunConfig) -> Path:
    """Where the run called `config.name` lives."""
    return Path(config.runs_dir) / config.name


@contextmanager
def claim(directory: Path) -> Iterator[None]:
    """Makes the run directory, and keeps other processes from training in it until the block, or we, end."""
    created = [path for path in (directory, directory.parent) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise AlborError(f"runs_dir: {directory} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        problem = f"another process is training in {directory}; wait for it, or choose another name"
        raise AlborError(problem) from error
    except OSError:
        pass  # a file system without locks: better to train than not to
    try:
        yield
    finally:
        with suppress(OSError):  # a run that was refused leaves nothing; one that was not is not empty
            for path in created:
                path.rmdir()
        os.close(handle)


def write_description(directory: Path, config: RunConfig, given: str, plan: MemoryPlan) -> None:
    """Writes config.yaml (as given), config.resolved.yaml, plan.json and env.json."""
    replace_file(directory / "config.yaml", given)
    replace_file(directory / "config.resolved.yaml", dump_config(config))
    replace_file(directory / "plan.json", json.dumps(_plan_json(plan), indent=1) + "\n")
    replace_file(directory / "env.json", json.dumps(_environment(plan), indent=1) + "\n")


def check_resumable(config: RunConfig, saved: RunConfig, checkpoint: Path) -> None:
    """Raises ConfigError, with every key, if `config` would continue `checkpoint` as a different run."""
    problems = []
    before, now = _leaves(saved.model_dump(mode="json")), _leaves(config.model_dump(mode="json"))
    for key in dict.fromkeys([*before, *now]):
        free = any(key == name or key.startswith(name + ".") for name in _FREE_KEYS)
        if before.get(key) == now.get(key) or free or key == "name" or _SOURCE_PATH.fullmatch(key):
            continue
        problems.append(
            Problem(
                key,
                f"{json.dumps(now.get(key))}, but {checkpoint} has {json.dumps(before.get(key))}",
                "restore it, or give the new run another name",
            )
        )
    if problems:
        raise ConfigError(problems)


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Nested dicts and lists as {dotted key: leaf}."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)  # type: ignore[assignment]  # keys become text either way
    else:
        return {path: value}
    return {
        k: v for key, item in items for k, v in _leaves(item, f"{path}.{key}" if path else str(key)).items()
    }


def _plan_json(plan: MemoryPlan) -> dict[str, Any]:
    return {
        "device": plan.device,
        "compute_dtype": plan.compute_dtype,
        "accumulator": plan.accumulator,
        **{f"{place}_bytes": plan.size(place) for place in ("device", "pinned", "host")},
        "peak_phase": plan.peak_phase,
        "groups": plan.groups,
        "phases": plan.phases,
        "buffers": [{**asdict(buffer), "bytes": buffer.nbytes} for buffer in plan.buffers],
    }


def _environment(plan: MemoryPlan) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    return {
        "albor": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "compute_dtype": plan.compute_dtype,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def replace_file(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
