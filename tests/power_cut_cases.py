"""Saves, evaluations and removals to cut the power in, and what must be true of the disk afterwards."""

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


Action = Save | Evaluate


def recorded(root: Path, before: Sequence[Action], then: Sequence[Action]) -> Log:
    """What happens to the disk while `then` is done, where `before` has been done long ago."""
    root.mkdir()
    for action in before:
        _act(root / CHECKPOINTS, action)
    with record(root, *(f"saved {action.step}" for action in before if isinstance(action, Save))) as log:
        for action in then:
            log.mark(f"saving {action.step}" if isinstance(action, Save) else f"marking {action.step}")
            _act(root / CHECKPOINTS, action)
            if isinstance(action, Save):
                log.mark(f"saved {action.step}")
    return log


def _act(directory: Path, action: Action) -> None:
    if isinstance(action, Save):
        files = {} if action.files is None else {"files": action.files}
        save_step(directory, action.step, tensor_files=make_tensors(action.step), **action.keeps, **files)
    else:
        mark_best(directory, action.step, action.loss)


def judge(root: Path, marks: Sequence[str]) -> None:
    """A checkpoint that was saved is there, or a newer one; every one that has its name is whole; best.json
    is whole and names one of them; and what was left half done is cleared away without touching these."""
    directory = root / CHECKPOINTS
    saved = [int(mark.split()[1]) for mark in marks if mark.startswith("saved")]
    begun = saved + [int(mark.split()[1]) for mark in marks if mark.startswith("saving")]
    latest = find_latest(directory, no_skip)
    if latest is None:
        assert not saved, "no checkpoint is left"
        return
    assert load_step(latest) in begun
    assert step_of(latest) >= max(saved, default=0), "one that was saved is gone"
    steps = [verify(path).step for path in list_checkpoints(directory)]
    best = read_best(directory)
    assert best is None or best.step in steps, f"{BEST} names what is not there"
    clear_leftovers(directory)
    names = {path.name for path in directory.iterdir()}
    assert names - {BEST} == {checkpoint_name(step) for step in steps}


def random_scene(rng: random.Random) -> tuple[list[Action], list[Action]]:
    """Some actions that were done, and some that are recorded."""
    actions: list[Action] = []
    steps, keep_best = rng.sample(range(1, 30), rng.randint(2, 6)), rng.random() < 0.7
    for step in sorted(steps):
        keeps: dict[str, Any] = {"keep_last": rng.randint(1, 3), "keep_best": keep_best}
        if rng.random() < 0.3:
            keeps["keep_every"] = rng.randint(2, 5)
        actions.append(Save(step, keeps))
        if rng.random() < 0.2:  # the run was stopped, and goes on with another configuration
            actions.append(Save(step, keeps, {"config.yaml": rng.randbytes(20)}))
        if keep_best and rng.random() < 0.7:
            actions.append(Evaluate(step, rng.uniform(1, 4)))
    cut = rng.randrange(len(actions))
    return actions[:cut], actions[cut:]


def replay_random_scene(root: Path, seed: int) -> int:
    """Every power cut in one random scene, in the new directory `root`; how many states there were."""
    return replay(recorded(root, *random_scene(random.Random(seed))), judge)
