"""Saves, evaluations and rollbacks to cut the power in, and what must be true of the disk afterwards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint_cases import load_step, make_tensors, no_skip, save_step
from power_cut import Log, record, replay

from albor.checkpoint import (
    BEST,
    checkpoint_name,
    clear_leftovers,
    find_latest,
    list_checkpoints,
    mark_best,
    read_best,
    remove_after,
    step_of,
    verify,
)

CHECKPOINTS = Path("run", "checkpoints")


class Save(NamedTuple):
    """A checkpoint of `step`; `keeps` are keys of Retention, `files` make it another one than before."""

    step: int
    keeps: dict[str, Any] = {}  # noqa: RUF012  # never changed
    files: dict[str, bytes] | None = None


class Evaluate(NamedTuple):
    """The checkpoint of `step`, which is there, has this loss."""

    step: int
    loss: float


class GoBack(NamedTuple):
    """The run goes on from the checkpoint of `step`, and what lies beyond it is removed."""

    step: int


Action = Save | Evaluate | GoBack
BEFORE = {Save: "saving", Evaluate: "marking", GoBack: "leaving"}  # what a mark calls them, and then the step
AFTER = {Save: "saved", Evaluate: "marked", GoBack: "left"}


def recorded(root: Path, before: Sequence[Action], then: Sequence[Action]) -> Log:
    """What happens to the disk while `then` is done, where `before` has been done long ago."""
    root.mkdir()
    for action in before:
        _act(root / CHECKPOINTS, action)
    with record(root, *(f"{AFTER[type(action)]} {action.step}" for action in before)) as log:
        for action in then:
            log.mark(f"{BEFORE[type(action)]} {action.step}")
            _act(root / CHECKPOINTS, action)
            log.mark(f"{AFTER[type(action)]} {action.step}")
    return log


def _act(directory: Path, action: Action) -> None:
    if isinstance(action, Save):
        files = {} if action.files is None else {"files": action.files}
        save_step(directory, action.step, tensor_files=make_tensors(action.step), **action.keeps, **files)
    elif isinstance(action, Evaluate):
        mark_best(directory, action.step, action.loss)
    else:
        remove_after(directory, action.step)


def judge(root: Path, marks: Sequence[str]) -> None:
    """A checkpoint that was saved is there, or a newer one, unless the run went back beyond it: then it is
    gone; every one that has its name is whole; best.json is whole and names one of them; and what was left
    half done is cleared away without touching these."""
    directory = root / CHECKPOINTS
    saved, begun = set[int](), set[int]()
    for mark in marks:
        action, step = mark.split()[0], int(mark.split()[1])
        if action in ("leaving", "left"):
            saved = {other for other in saved if other <= step}
        if action == "left":
            begun = {other for other in begun if other <= step}
        if action in ("saving", "saved"):
            begun.add(step)
        if action == "saved":
            saved.add(step)
    latest = find_latest(directory, no_skip)
    if latest is None:
        assert not saved, "no checkpoint is left"
        return
    assert load_step(latest) in begun, "one that was left behind is back"
    assert step_of(latest) >= max(saved, default=0), "one that was saved is gone"
    steps = [verify(path).step for path in list_checkpoints(directory)]
    best = read_best(directory)
    assert best is None or best.step in steps, f"{BEST} names what is not there"
    clear_leftovers(directory)
    names = {path.name for path in directory.iterdir()}
    assert names - {BEST} == {checkpoint_name(step) for step in steps}


def random_scene(rng: random.Random) -> tuple[list[Action], list[Action]]:
    """Some actions that were done, and some that are recorded."""
    actions, there = list[Action](), list[int]()  # and the checkpoints that none of them has removed
    steps, keep_best = rng.sample(range(1, 30), rng.randint(2, 6)), rng.random() < 0.7
    for step in sorted(steps):
        keeps: dict[str, Any] = {"keep_last": rng.randint(1, 3), "keep_best": keep_best}
        if rng.random() < 0.3:
            keeps["keep_every"] = rng.randint(2, 5)
        actions.append(Save(step, keeps))
        there = [*there, step][-keeps["keep_last"] :]
        if rng.random() < 0.2:  # the run was stopped, and goes on with another configuration
            actions.append(Save(step, keeps, {"config.yaml": rng.randbytes(20)}))
        if keep_best and rng.random() < 0.7:
            actions.append(Evaluate(step, rng.uniform(1, 4)))
        if rng.random() < 0.2:
            there = there[: rng.randint(1, len(there))]
            actions.append(GoBack(there[-1]))
    cut = rng.randrange(len(actions))
    return actions[:cut], actions[cut:]


def replay_random_scene(root: Path, seed: int) -> int:
    """Every power cut in one random scene, in the new directory `root`; how many states there were."""
    return replay(recorded(root, *random_scene(random.Random(seed))), judge)
