"""Fault row 4: whatever instant the power goes, the newest checkpoint that can be found is complete.

`power_cut` makes every state in which the disk may be found; `judge` says what must be true of each. Then the
same with one guard of the protocol missing, which must show.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from power_cut import Log, Operation, image_of, record, replay
from power_cut_cases import Action, Evaluate, GoBack, Save, judge, recorded, replay_random_scene

from albor import checkpoint
from albor.checkpoint import BEST, Retention
from albor.manifest import MANIFEST

LAST = {"keep_last": 1}
# What was done long ago, and what is done while the power may go.
SCENES: dict[str, tuple[list[Action], list[Action]]] = {
    "the first of all": ([], [Save(1)]),
    "the older of two goes": ([Save(1), Save(2)], [Save(3, {"keep_last": 2}), Save(4, {"keep_last": 2})]),
    "only one is ever kept": ([Save(1)], [Save(2, LAST), Save(3, LAST)]),
    "three go at once": ([Save(1), Save(2), Save(3)], [Save(4, LAST)]),
    "one is replaced": ([Save(1), Save(2, {}, {"config.yaml": b"another"})], [Save(2, LAST)]),
    "the best is another one": (
        [Save(1), Evaluate(1, 3.0), Save(2)],
        [Evaluate(2, 2.5), Save(3, {**LAST, "keep_best": True}), Evaluate(3, 2.0)],
    ),
    "the run goes back": (
        [Save(1), Save(2), Save(3), Evaluate(3, 2.0)],
        [GoBack(1), Save(2, {}, {"config.yaml": b"another"}), Evaluate(2, 2.5)],
    ),
    "what was replaced is left": ([Save(1), Save(2)], [Save(2, {}, {"config.yaml": b"another"}), GoBack(1)]),
}


@pytest.mark.parametrize("scene", SCENES)
def test_the_power_may_go_at_any_instant(tmp_path: Path, scene: str) -> None:
    log = recorded(tmp_path / "root", *SCENES[scene])
    assert sum(operation.kind == "fsync" for operation in log.operations) >= 8
    assert replay(log, judge) > 3


@pytest.mark.parametrize("seed", range(5))
def test_the_power_may_go_in_any_scene(tmp_path: Path, seed: int) -> None:
    assert replay_random_scene(tmp_path / "root", seed) > 1


# Without a guard


def of(kind: str, name: str) -> Callable[[Log], Log]:
    """Leaves out the operations of this kind on files whose name begins so."""

    def dropped(operation: Operation) -> bool:
        return operation.kind == kind and Path(operation.path).name.startswith(name)

    return lambda log: log.without(dropped)


def removed_at_once(log: Log) -> Log:
    """A checkpoint's files go before it is sure that its name went."""
    after = {id(b) for a, b in zip(log.operations, log.operations[1:], strict=False) if ".tmp-" in a.target}
    return log.without(lambda operation: id(operation) in after and operation.kind == "fsync")


def unmarked_with_the_rest(log: Log) -> Log:
    """best.json goes together with what it names, in any order."""
    (unlinked,) = (
        i for i, o in enumerate(log.operations) if o.kind == "unlink" and Path(o.path).name == BEST
    )
    fsync = log.operations[unlinked + 1]
    assert fsync.kind == "fsync"
    return log.without(lambda operation: operation is fsync)


DROPPED: dict[str, tuple[Callable[[Log], Log], str, str]] = {  # how, in which scene, what then shows
    "fsync of the tensors": (of("fsync", "weights"), "the first of all", "was skipped"),
    "fsync of the state": (of("fsync", "state"), "the first of all", "was skipped"),
    "fsync of the manifest": (of("fsync", MANIFEST), "the first of all", "was skipped"),
    "fsync of the new directory": (of("fsync", ".step"), "the first of all", "was skipped"),
    "fsync of its name": (of("fsync", "checkpoints"), "only one is ever kept", "no checkpoint is left"),
    "fsync of the directories above": (of("fsync", "run"), "the first of all", "no checkpoint is left"),
    "fsync of best.json": (of("fsync", f".{BEST}"), "the best is another one", BEST),
    "fsync of best.json's name": (of("fsync", "checkpoints"), "the best is another one", BEST),
    "fsync before a removal": (removed_at_once, "the older of two goes", "missing|no manifest"),
    "fsync before what is left behind goes": (removed_at_once, "the run goes back", "missing|no manifest"),
    "fsync of best.json's removal": (
        unmarked_with_the_rest,
        "the run goes back",
        f"{BEST} names what is not there",
    ),
}


@pytest.mark.parametrize("guard", DROPPED)
def test_without_a_guard_a_power_cut_shows(tmp_path: Path, guard: str) -> None:
    drop, scene, shows = DROPPED[guard]
    log = drop(recorded(tmp_path / "root", *SCENES[scene]))
    with pytest.raises(BaseException, match=shows):  # pytest.fail raises no Exception
        replay(log, judge)


def test_without_the_new_one_first_a_power_cut_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older ones are removed to make room before the new one has its name."""
    commit = checkpoint._commit

    def room_first(temporary: Path, final: Path) -> None:
        step = checkpoint.step_of(final)
        checkpoint.remove(checkpoint.removable(final.parent, step, Retention(keep_last=1)))
        commit(temporary, final)

    monkeypatch.setattr(checkpoint, "_commit", room_first)
    log = recorded(tmp_path / "root", *SCENES["only one is ever kept"])
    with pytest.raises(AssertionError, match="no checkpoint is left"):
        replay(log, judge)


# The recorder itself


def test_every_state_of_a_small_program(tmp_path: Path) -> None:
    """Two writes and a rename, nothing synced: counted by hand."""
    (tmp_path / "old").write_bytes(b"old")
    with record(tmp_path) as log:
        with open(tmp_path / "new", "wb") as file:
            file.write(b"ab")
            file.write(b"cd")
        (tmp_path / "new").replace(tmp_path / "old")
    found = set()
    count = replay(log, lambda directory, _: found.add(tuple(sorted(image_of(directory).items()))))
    contents = (b"", b"a", b"ab", b"abc", b"abcd", b"\0\0\0\0")
    before = {(("old", b"old"),)}
    created = {(("new", content), ("old", b"old")) for content in (*contents, b"\0\0")}
    renamed = {(("old", content),) for content in contents}
    assert found == before | created | renamed
    assert count == len(found)


def test_what_is_not_recorded_is_noticed(tmp_path: Path) -> None:
    import subprocess

    with pytest.raises(AssertionError, match="not recorded"), record(tmp_path):
        subprocess.run(["touch", tmp_path / "file"], check=True)
