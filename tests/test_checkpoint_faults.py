"""A save that is killed or fails at any point leaves a complete checkpoint, and no litter after the next."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import exit_code_of, fork, load_step, make_tensors, names_in, no_skip, save_step

from albor.checkpoint import checkpoint_name, find_latest, list_checkpoints, verify
from albor.errors import CheckpointError
from albor.manifest import MANIFEST

_CALLS = ("fsync", "rename", "mkdir", "rmdir", "unlink")  # every durable step of the protocol is one of these


def _fail_at(monkeypatch: pytest.MonkeyPatch, point: int, after: bool, fail: Callable[[], None]) -> list[str]:
    """Call `fail` before or after the `point`-th of `_CALLS`; the list returned grows by each call's name."""
    made: list[str] = []

    def patch(name: str) -> None:
        original = getattr(os, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            made.append(name)
            due = len(made) == point
            if due and not after:
                fail()
            result = original(*arguments, **keywords)
            if due and after:
                fail()
            return result

        monkeypatch.setattr(os, name, call)

    for name in _CALLS:
        patch(name)
    return made


# What is there, which step is then saved with keep_last=2, and at which step a resume may then stand.
_SCENES: dict[str, tuple[list[int], int, set[int]]] = {
    "add and prune": ([1, 2], 3, {2, 3}),
    "replace the only one": ([2], 2, {2}),
}


def _prepare(directory: Path, scene: str) -> tuple[int, set[int]]:
    existing, step, allowed = _SCENES[scene]
    for old in existing:
        save_step(directory, old, files={"config.yaml": b"an earlier one"})
    return step, allowed


@pytest.mark.parametrize("scene", _SCENES)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_every_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene: str, after: bool
) -> None:
    exit_code, point = 9, 0
    while exit_code == 9:
        point += 1
        directory = tmp_path / str(point)
        step, allowed = _prepare(directory, scene)

        def work(directory: Path = directory, step: int = step, point: int = point) -> None:
            _fail_at(monkeypatch, point, after, lambda: os._exit(9))
            save_step(directory, step, keep_last=2)

        exit_code = exit_code_of(fork(work))
        latest = find_latest(directory, no_skip)
        assert latest is not None, f"killed at {point}: nothing is left"
        assert load_step(latest) in allowed, f"killed at {point}"
        assert all(verify(path) for path in list_checkpoints(directory)), "one was half removed"
        save_step(directory, step, keep_last=2)
        assert load_step(directory / checkpoint_name(step)) == step
        assert not [name for name in names_in(directory) if name.startswith(".")], f"killed at {point}"
    assert exit_code == 0
    assert point > 10, "the points were not reached"


@pytest.mark.parametrize("scene", _SCENES)
def test_an_error_at_every_point(tmp_path: Path, scene: str) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    point, reached = 0, True
    while reached:
        point += 1
        directory = tmp_path / str(point)
        step, allowed = _prepare(directory, scene)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            made = _fail_at(patch, point, False, fail)
            message = ""
            try:
                save_step(directory, step, keep_last=2)
            except CheckpointError as error:
                message = str(error)
            assert not message or "No space left on device" in message
            reached = len(made) >= point
        assert all("could not remove an old checkpoint" in str(warning.message) for warning in warned)
        latest = find_latest(directory, no_skip)
        assert latest is not None, f"error at {point}: nothing is left"
        assert load_step(latest) in allowed
    assert point > 10, "the points were not reached"


def test_everything_is_on_the_disk_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run" / "checkpoints"
    done: list[tuple[str, int]] = []  # what was done, to which inode
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append(("fsync", os.fstat(descriptor).st_ino))

    def recorded_rename(source: Path, target: Path) -> None:
        done.append(("rename", os.stat(source).st_ino))
        written = {entry.stat().st_mtime_ns for entry in os.scandir(source) if entry.name != MANIFEST}
        assert max(written) <= os.stat(source / MANIFEST).st_mtime_ns, "the manifest was not written last"
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    path = save_step(directory, 1)

    inode = {name: (path / name).stat().st_ino for name in names_in(path)}
    manifest, itself, parent = inode.pop(MANIFEST), path.stat().st_ino, directory.stat().st_ino
    for created in (tmp_path, tmp_path / "run"):
        assert ("fsync", created.stat().st_ino) in done, "a directory that was created is not durable"
    commit = done[-(len(inode) + 4) :]
    assert set(commit[: len(inode)]) == {("fsync", number) for number in inode.values()}
    assert commit[len(inode) :] == [
        ("fsync", manifest),
        ("fsync", itself),
        ("rename", itself),
        ("fsync", parent),
    ]


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    rng, step, litter = random.Random(0), 0, 0

    def save_many() -> None:
        for later in range(step + 1, step + 2000):
            save_step(tmp_path, later, keep_last=2, tensor_files=make_tensors(later, 16_000))

    for _ in range(15):
        child = fork(save_many)
        deadline = time.monotonic() + 30
        while not list_checkpoints(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.001)  # the first save of all takes as long as the machine likes
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
        latest = find_latest(tmp_path, no_skip)
        assert latest is not None
        reached = load_step(latest, 16_000)
        assert reached >= step, "a checkpoint that was there is gone"
        litter += any(name.startswith(".") for name in names_in(tmp_path))
        step = reached
    assert litter, "no kill came during a save"
    save_step(tmp_path, step + 1, keep_last=1)
    assert names_in(tmp_path) == [checkpoint_name(step + 1)]


def test_a_full_disk_is_said_and_costs_only_the_new_checkpoint(tmp_path: Path) -> None:
    save_step(tmp_path, 1)

    def save_beyond_the_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # stands in for a full disk
        with pytest.raises(CheckpointError) as caught:
            save_step(tmp_path, 2, keep_last=1, tensor_files=make_tensors(2, 50_000))
        said = r"step-00000002: File too large \(it takes 0\.5 MB, and [\d,.]+ MB are free\)"
        assert re.search(said, str(caught.value))

    assert exit_code_of(fork(save_beyond_the_limit)) == 0
    assert names_in(tmp_path) == ["step-00000001"]
    assert load_step(tmp_path / "step-00000001") == 1
