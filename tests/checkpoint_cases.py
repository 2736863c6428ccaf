"""What the checkpoint tests save, how they check it, and how they run something that gets killed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from albor.checkpoint import Retention, load, save, verify
from albor.data.cache import file_sha256
from albor.manifest import MANIFEST
from albor.tensorfile import FileRecord

FILES = {"config.yaml": b"name: test\n", "tokenizer.model": bytes(range(256))}


def make_tensors(step: int, size: int = 1000) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that differ between any two steps in every file, as views of one storage."""
    arena = torch.arange(2 * size, dtype=torch.float32) + step
    return {
        "weights": {"a": arena[:size].bfloat16() + step, "b": arena[size:].view(-1, 2)},
        "optimizer": {"moment": arena[:size] * 0.5},
    }


def make_state(step: int) -> dict[str, Any]:
    return {"step": step, "tokens": step * 2048, "best_loss": None, "losses": [0.1, 1 / 3, step + 1e-9]}


def save_step(directory: Path, step: int, keep_last: int | None = 10, **changes: Any) -> Path:
    """A checkpoint of `step`; `changes` are other arguments of `save`, or further keys of Retention."""
    kept = {key: changes.pop(key) for key in ("keep_every", "keep_best") if key in changes}
    arguments = {"tensor_files": make_tensors(step), "state": make_state(step), "files": FILES, **changes}
    return save(directory, step, retention=Retention(keep_last, **kept), **arguments)


def load_step(path: Path, size: int = 1000) -> int:
    """Load the checkpoint, check that all of it belongs to one step, and return that step."""
    targets = {
        stem: {name: torch.zeros_like(t) for name, t in tensors.items()}
        for stem, tensors in make_tensors(0, size).items()
    }
    state = load(path, targets)
    step = state["step"]
    assert state == make_state(step)
    for stem, tensors in make_tensors(step, size).items():
        assert all(torch.equal(targets[stem][name], tensor) for name, tensor in tensors.items())
    return step


def names_in(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def no_skip(path: Path, reason: str) -> None:
    pytest.fail(f"{path} was skipped: {reason}")


def fork(work: Callable[[], None]) -> int:
    """The pid of a child that does `work` and exits 0, or 1 if it raised."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def exit_code_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forge(path: Path, name: str, content: bytes) -> None:
    """Puts `content` into the checkpoint, and a manifest beside it that says that it belongs there."""
    manifest = verify(path)
    (path / name).write_bytes(content)
    record = FileRecord(len(content), file_sha256(path / name))
    forged = replace(manifest, files={**manifest.files, name: record})
    (path / MANIFEST).write_bytes(forged.to_bytes())
