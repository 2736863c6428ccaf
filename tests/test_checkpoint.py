"""Checkpoints: what is saved is what is loaded, every damage is found, and the right one is chosen."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    FILES,
    exit_code_of,
    fork,
    load_step,
    make_state,
    make_tensors,
    names_in,
    no_skip,
    save_step,
)

from albor import checkpoint
from albor.checkpoint import (
    Best,
    candidates,
    find_latest,
    first_intact,
    list_checkpoints,
    load,
    mark_best,
    read_best,
    step_of,
    verify,
)
from albor.errors import CheckpointError
from albor.manifest import MANIFEST, Manifest

# --- what is saved is what is loaded


def test_round_trip(tmp_path: Path) -> None:
    path = save_step(tmp_path / "run" / "checkpoints", 5000)
    assert path.name == "step-00005000"
    assert load_step(path) == 5000
    assert (path / "config.yaml").read_bytes() == FILES["config.yaml"]
    assert names_in(path.parent) == ["step-00005000"]


def test_equal_states_are_equal_bytes_wherever_they_are_saved(tmp_path: Path) -> None:
    first, second = (
        save_step(tmp_path / "a", 7),
        save_step(tmp_path / "b" / "c", 7, state=dict(reversed(make_state(7).items()))),
    )
    assert names_in(first) == names_in(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names_in(first))


def test_manifest_names_every_file_and_tensor(tmp_path: Path) -> None:
    manifest = verify(save_step(tmp_path, 1))
    assert manifest.files.keys() == {*FILES, "optimizer.safetensors", "state.json", "weights.safetensors"}
    assert str(manifest.tensors["weights.safetensors"]["b"]) == "F32 [500, 2]"
    assert manifest.step == 1


def test_loading_restores_everything_or_says_what_it_would_not(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    weights = {"weights": make_tensors(0)["weights"]}
    with pytest.raises(
        CheckpointError, match=r"optimizer\.safetensors: holds state that would not be restored"
    ):
        load(path, weights)
    assert load(path, weights, partial=True) == make_state(1)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: missing"):
        load(path, {**make_tensors(0), "ema": {}})
    with pytest.raises(CheckpointError, match="b2 is missing"):
        load(path, {"weights": {"a": weights["weights"]["a"], "b2": weights["weights"]["b"]}}, partial=True)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], (1, 2), {1: 2}, b"x", torch.tensor(1)])
def test_state_that_json_would_change_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(CheckpointError, match="'guard'"):
        save_step(tmp_path, 1, state={"step": 1, "guard": value})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["../evil", "a/b", ".hidden", "manifest.json", "state.json", "weights.safetensors"]
)
def test_a_file_name_that_escapes_or_collides_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be the name"):
        save_step(tmp_path, 1, files={name: b""})


# --- damage


def _damage(rng: random.Random, path: Path) -> str:
    """Damage the file at a random place in a random way, and say how."""
    content = path.read_bytes()
    offset = rng.randrange(len(content))
    kind = rng.choice(["bit", "truncation", "zeroed", "appended"])
    if kind == "bit":
        damaged = bytearray(content)
        damaged[offset] ^= 1 << rng.randrange(8)
    elif kind == "truncation":
        damaged = content[:offset]
    elif kind == "zeroed":
        damaged = content[:offset] + bytes(min(4096, len(content) - offset)) + content[offset + 4096 :]
    else:
        damaged = content + b"\n"
    if damaged == content:  # there were zeros already
        return _damage(rng, path)
    path.write_bytes(damaged)
    return f"{kind} at {offset} of {path.name}"


def test_random_damage_is_always_found_and_the_previous_checkpoint_is_used(tmp_path: Path) -> None:
    previous, newest = save_step(tmp_path, 1), save_step(tmp_path, 2)
    rng = random.Random(0)
    for name in names_in(newest):
        content = (newest / name).read_bytes()
        for _ in range(60):
            how = _damage(rng, newest / name)
            skipped: list[tuple[Path, str]] = []
            assert find_latest(tmp_path, lambda *skip: skipped.append(skip)) == previous, how  # noqa: B023
            assert [path for path, _ in skipped] == [newest], how
            assert name in skipped[0][1], f"{how} was reported as {skipped[0][1]}"
            (newest / name).write_bytes(content)
    assert find_latest(tmp_path, no_skip) == newest


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST])
def test_a_file_of_another_checkpoint_is_found(tmp_path: Path, name: str) -> None:
    shutil.copy(save_step(tmp_path, 1) / name, save_step(tmp_path, 2) / name)
    with pytest.raises(CheckpointError):
        verify(tmp_path / "step-00000002")


def test_a_file_that_was_cut_off_is_said_to_be(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    os.truncate(path / "tokenizer.model", 100)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: has 100 bytes instead of 256"):
        verify(path)


def test_edited_state_is_found_and_fills_nothing(tmp_path: Path) -> None:
    path = save_step(tmp_path, 10)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("20480", "20481"))
    targets = {stem: {n: t * 0 for n, t in tensors.items()} for stem, tensors in make_tensors(0).items()}
    with pytest.raises(CheckpointError, match=r"state\.json: content differs"):
        load(path, targets)
    assert not any(t.any() for tensors in targets.values() for t in tensors.values())


def test_missing_unexpected_linked_and_renamed_are_found(tmp_path: Path) -> None:
    path = save_step(tmp_path / "c", 1)
    (path / "extra.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"extra\.txt: unexpected"):
        verify(path)
    (path / "extra.txt").unlink()
    (path / "config.yaml").rename(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match=r"config\.yaml: missing"):
        verify(path)
    (path / "config.yaml").symlink_to(tmp_path / "config.yaml")
    with pytest.raises(CheckpointError, match=r"config\.yaml: not a regular file"):
        verify(path)
    (path / "config.yaml").unlink()
    (tmp_path / "config.yaml").rename(path / "config.yaml")
    path.rename(path.with_name("step-00000009"))
    with pytest.raises(CheckpointError, match="checkpoint of step 1, renamed"):
        verify(path.with_name("step-00000009"))


def test_a_forged_manifest_reaches_nothing_outside(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    honest = verify(path)
    outside = {"../../outside.safetensors": honest.files["weights.safetensors"]}
    tensors = {"../../outside.safetensors": honest.tensors["weights.safetensors"]}
    for forged in (
        Manifest(1, "0", {**honest.files, **outside}, honest.tensors),
        Manifest(1, "0", honest.files, {**honest.tensors, **tensors}),
        Manifest(1, "0", {}, {}),
    ):
        (path / MANIFEST).write_bytes(forged.to_bytes())
        with pytest.raises(CheckpointError, match=r"missing|does not list"):
            verify(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"format": 1}', b'{"format": 2}', b"[" * 100_000, b"\xff"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = save_step(tmp_path, 1)
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(path)


# --- choosing, replacing and removing


def test_the_newest_is_the_highest_number_not_name_or_time(tmp_path: Path) -> None:
    steps = [99_999_999, 999_999, 1_000_000, 100_000_000, 1_234_567_890]
    for step in reversed(steps):
        save_step(tmp_path, step)
        time.sleep(0.01)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == sorted(steps)
    assert find_latest(tmp_path, no_skip) == tmp_path / "step-1234567890"
    (tmp_path / "step-99999999999").mkdir()
    (tmp_path / "step-000000001234567899").mkdir()  # not a name that we give
    with pytest.warns(UserWarning, match=r"damaged checkpoint.*no manifest\.json"):
        assert find_latest(tmp_path) == tmp_path / "step-1234567890"


def test_neither_the_clock_nor_the_order_of_names_says_which_is_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault row 24: the clock has jumped back and ahead; the run is beyond the eight digits of a name.
    Removing goes by the step too."""
    newest, kept = "step-100000000", "step-99999999"
    times = {99_999_998: 2_000_000_000, 99_999_999: 0, 100_000_000: 1_000_000_000}
    for step, seconds in times.items():
        os.utime(save_step(tmp_path, step), (seconds, seconds))
    assert find_latest(tmp_path, no_skip) == tmp_path / newest
    for wrong in (lambda path: path.name, lambda path: path.stat().st_mtime):  # the guard dropped
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "step_of", wrong)
            assert find_latest(tmp_path, no_skip) != tmp_path / newest
    save_step(tmp_path, 100_000_000, keep_last=2)
    assert names_in(tmp_path) == [newest, kept]


KEPT = {  # of 0, 10, 20, ... 60, of which 20 is marked as the best
    "the last two": ({"keep_last": 2}, [50, 60]),
    "all": ({"keep_last": None}, [0, 10, 20, 30, 40, 50, 60]),
    "more than there are": ({"keep_last": 9}, [0, 10, 20, 30, 40, 50, 60]),
    "every thirty": ({"keep_last": 1, "keep_every": 30}, [30, 60]),
    "every twenty, and the last two": ({"keep_last": 2, "keep_every": 20}, [20, 40, 50, 60]),
    "the best": ({"keep_last": 1, "keep_best": True}, [20, 60]),
    "the best, and every thirty": ({"keep_last": 1, "keep_best": True, "keep_every": 30}, [20, 30, 60]),
}


@pytest.mark.parametrize("rule", KEPT)
def test_what_is_kept(tmp_path: Path, rule: str) -> None:
    arguments, expected = KEPT[rule]
    for step in range(0, 70, 10):
        save_step(tmp_path, step, keep_last=100)
        mark_best(tmp_path, step, abs(step - 20.0))
    save_step(tmp_path, 60, **arguments)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == expected


def test_the_best_is_the_lowest_loss_whose_checkpoint_is_there(tmp_path: Path) -> None:
    assert read_best(tmp_path) is None
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert mark_best(tmp_path, 1, 2.0)
    assert not mark_best(tmp_path, 2, 2.0), "the earlier one of two that are equal"
    assert not mark_best(tmp_path, 2, 2.5)
    assert read_best(tmp_path) == Best(1, 2.0)
    shutil.rmtree(tmp_path / "step-00000001")
    assert mark_best(tmp_path, 3, 3.0), "one that is gone is no best"
    assert read_best(tmp_path) == Best(3, 3.0)
    assert resolve(tmp_path / "best") == tmp_path / "step-00000003"


def test_prune_keeps_the_last_and_whatever_is_newer(tmp_path: Path) -> None:
    for step in (1, 2, 3, 50):
        save_step(tmp_path, step)
    save_step(tmp_path, 4, keep_last=2)
    assert names_in(tmp_path) == ["step-00000003", "step-00000004", "step-00000050"]
    save_step(tmp_path, 5, keep_last=0)
    assert names_in(tmp_path) == ["step-00000005", "step-00000050"]


def test_nothing_is_removed_unless_the_new_checkpoint_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)
    written = checkpoint._write_contents

    def damaged(directory: Path, *arguments: Any) -> Manifest:
        manifest = written(directory, *arguments)
        _damage(random.Random(1), directory / "weights.safetensors")
        return manifest

    monkeypatch.setattr(checkpoint, "_write_contents", damaged)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        save_step(tmp_path, 2, keep_last=1)
    assert names_in(tmp_path) == ["step-00000001"]


def test_saving_the_same_step_again(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    inode = path.stat().st_ino
    save_step(tmp_path, 1)
    assert path.stat().st_ino == inode, "equal content was written anew"
    save_step(tmp_path, 1, files={"config.yaml": b"name: other\n"})
    assert (path / "config.yaml").read_bytes() == b"name: other\n"
    _damage(random.Random(2), path / "weights.safetensors")
    assert load_step(save_step(tmp_path, 1)) == 1
    assert names_in(tmp_path) == ["step-00000001"]


def test_litter_of_the_dead_is_removed_and_of_the_living_is_not(tmp_path: Path) -> None:
    dead = fork(lambda: None)
    exit_code_of(dead)
    living = os.getppid()
    for pid in (dead, living):
        (tmp_path / f".step-00000009.tmp-{pid}").mkdir()
    save_step(tmp_path, 1)
    assert names_in(tmp_path) == [f".step-00000009.tmp-{living}", "step-00000001"]


def resolve(path: Path) -> Path:
    """The checkpoint that `path` means, if it is intact."""
    return first_intact(candidates(path), lambda found: (found, verify(found)), no_skip)[0]


def test_a_path_means_a_run_a_directory_of_checkpoints_or_one(tmp_path: Path) -> None:
    directory = tmp_path / "run" / "checkpoints"
    first, second = save_step(directory, 1), save_step(directory, 2)
    assert resolve(tmp_path / "run") == resolve(directory) == resolve(second) == second
    assert resolve(first) == first
    copy = shutil.copytree(first, tmp_path / "best")
    assert resolve(copy) == copy
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resolve(tmp_path)
    (first / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        resolve(first)
