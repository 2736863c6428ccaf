"""The run directory: what a run writes about itself, and whether it may go on in it."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from albor import __version__, durable
from albor.build import build_id
from albor.config import RunConfig
from albor.configfile import dump_config
from albor.errors import AlborError
from albor.filelock import lock_file
from albor.memory.estimate import Estimate
from albor.memory.plan import MemoryPlan
from albor.runs.owner import LOCK, clear_owner, write_owner
from albor.strictjson import from_json, read_bounded


def run_directory(config: RunConfig) -> Path:
    """Where the run called `config.name` lives."""
    return Path(config.runs_dir) / config.name


@contextmanager
def claim(directory: Path, warn: Callable[[str], None]) -> Iterator[bool]:
    """Makes the run directory, and keeps other processes from training in it until the block, or we, end.

    Yields whether it does that: where the file system has no locks (NFS without a lock service), `warn` is
    told so and nothing is kept out.
    """
    lock = directory / LOCK
    try:
        created = [path for path in (directory, directory.parent) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        claimed = lock_file(lock)
    except OSError as error:
        raise AlborError(f"runs_dir: {directory} cannot be used: {error.strerror}") from error
    if claimed is None:
        problem = f"another process is training in {directory}; wait for it, or choose another name"
        raise AlborError(problem)
    handle, refusal = claimed
    if refusal:
        warn(f"{directory} cannot be locked ({refusal}); see to it that no other process trains in it")
    write_owner(handle)
    try:
        yield not refusal
    finally:
        clear_owner(handle)
        # A run that was refused leaves nothing.
        if directory in created and not has_begun(directory):
            with suppress(OSError):
                lock.unlink()
                for path in created:
                    path.rmdir()
        os.close(handle)


def has_begun(directory: Path) -> bool:
    """Whether a claimed directory holds anything of a run."""
    return os.listdir(directory) != [LOCK]


def write_description(directory: Path, given: str, target: Estimate) -> None:
    """Writes config.yaml (as given), config.resolved.yaml, plan.json and env.json."""
    replace_file(directory / "config.yaml", given)
    replace_file(directory / "config.resolved.yaml", dump_config(target.config))
    replace_file(directory / "plan.json", json.dumps(_plan_json(target), indent=1) + "\n")
    replace_file(directory / "env.json", json.dumps(_environment(target.plan), indent=1) + "\n")


class EnvironmentChange(NamedTuple):
    """One thing that a result may depend on, and that is another than when the run was last started."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key} {self.before} -> {self.after}"


def environment_changes(directory: Path, plan: MemoryPlan) -> list[EnvironmentChange]:
    """What differs from the env.json of the run in `directory`; nothing where it has none that is whole."""
    try:
        before = from_json(read_bounded(directory / "env.json"))
    except (OSError, ValueError):
        return []
    if not isinstance(before, dict):
        return []
    return [
        EnvironmentChange(key, before.get(key), value)
        for key, value in _environment(plan).items()
        if before.get(key) != value
    ]


def _plan_json(target: Estimate) -> dict[str, Any]:
    plan = target.plan
    return {
        "hardware": target.hardware.description,
        "device": plan.device,
        "compute_dtype": plan.compute_dtype,
        "accumulator": plan.accumulator,
        "attention": asdict(plan.attention),
        **{f"{place}_bytes": plan.size(place) for place in ("device", "pinned", "host")},
        "required_bytes": target.required_bytes,
        "outside": [asdict(item) for item in target.outside_items],
        "peak_phase": plan.peak_phase,
        "groups": plan.groups,
        "phases": plan.phases,
        "buffers": [{**asdict(buffer), "bytes": buffer.nbytes} for buffer in plan.buffers],
    }


def _environment(plan: MemoryPlan) -> dict[str, Any]:
    """What a result may depend on besides the configuration."""
    return {
        "albor": __version__,
        "build": build_id(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if plan.device == "cuda" else "cpu",
        "compute_capability": list(torch.cuda.get_device_capability()) if plan.device == "cuda" else None,
        "cuda": torch.version.cuda,
        "compute_dtype": plan.compute_dtype,
        "attention": plan.attention.backend,
        "head_chunk_tokens": next(b.shape[0] for b in plan.buffers if b.name == "head.logits"),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def replace_file(path: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    try:
        durable.replace_file(path, text.encode())
    except OSError as error:
        raise AlborError(f"{path} cannot be written: {error.strerror or error}") from error
