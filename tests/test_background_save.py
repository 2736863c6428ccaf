"""Saving while the training goes on: the checkpoint is the state as it was when it was asked for (fault row
23).

The writer is slowed down, so that several steps are taken while it writes.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_cases import exit_code_of, fork
from helpers import make_batches, make_config, make_trainer
from late_streams import LateStreams
from run_cases import STEPS, bits, call, checkpoints, events, tree
from test_disk import BEST, WORSE, best, disk_fault

from albor import checkpoint
from albor.checkpoint import checkpoint_name
from albor.config import CheckpointConfig, RunConfig
from albor.configfile import load_config
from albor.memory.estimate import plan_for_training
from albor.memory.plan import STATE_BUFFERS, plan_training
from albor.train import loop, saver
from albor.train.loop import Loop
from albor.train.snapshot import Snapshot
from albor.train.step import Trainer, TrainState

RUN = Path("runs/tiny")
BACKGROUND = "checkpoint.background=true"
ALL = "checkpoint.keep_last=100"


@pytest.fixture(scope="module")
def whole(config: Path) -> dict[str, Any]:
    """A run that waits for its saves: its bits, and those of every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(config.parent)
        assert call("train", config, ALL).code == 0
        return {**bits(RUN), "all": saved(RUN)}


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 0.01)


def saved(run: Path) -> dict[str, str]:
    """SHA-256 of all that the checkpoints hold, but for what the configuration is named in."""
    unlike = ("config.yaml", "manifest.json", "best.json")
    return {name: digest for name, digest in tree(run / "checkpoints").items() if not name.endswith(unlike)}


class SlowWriter:
    """A save in the background begins to write only when `steps` more are done, or none comes any more.

    `during` has, for each save, the steps that were done as it began and as it ended, and in which thread.
    """

    def __init__(self, patch: pytest.MonkeyPatch, steps: int = 2):
        self.during: list[tuple[int, int, str]] = []
        self.writing = self.most_at_once = 0
        self.step = 0
        write, after_step = checkpoint.save, Loop._after_step

        def counted(this: Loop, *arguments: Any) -> None:
            self.step = this.session.state.step
            after_step(this, *arguments)

        def slow(*arguments: Any, **keywords: Any) -> Path:
            self.writing += 1
            self.most_at_once = max(self.most_at_once, self.writing)
            began, deadline = self.step, time.monotonic() + 1
            in_background = threading.current_thread() is not threading.main_thread()
            while in_background and self.step < began + steps and time.monotonic() < deadline:
                time.sleep(0.001)
            path = write(*arguments, **keywords)
            self.during.append((began, self.step, threading.current_thread().name))
            self.writing -= 1
            return path

        patch.setattr(Loop, "_after_step", counted)
        patch.setattr(checkpoint, "save", slow)


# The state as it was


def test_every_checkpoint_is_the_state_at_its_step(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    writer = SlowWriter(monkeypatch)
    assert call("train", config, BACKGROUND, ALL).code == 0
    assert saved(RUN) == whole["all"]
    found = bits(RUN)
    assert (found["rows"], found["saved"]) == (whole["rows"], whole["saved"])
    assert [began for began, _, _ in writer.during] == [4, 8, 12, 16, 20, STEPS]
    assert all(ended >= began + 2 for began, ended, _ in writer.during[:-1]), "the training did not go on"
    assert writer.most_at_once == 1
    assert [thread == "MainThread" for _, _, thread in writer.during] == [False] * 5 + [True]


@pytest.mark.parametrize("shared", STATE_BUFFERS)
def test_without_a_copy_of_its_own_it_is_a_later_state(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shared: str
):
    """The guard dropped for one buffer: the writer gets what the training goes on to change."""
    make = Snapshot.__init__

    def by_reference(self: Snapshot, trainer: Trainer) -> None:
        make(self, trainer)
        if shared in self.flats:
            self.flats[shared] = trainer.arena[shared]

    monkeypatch.setattr(Snapshot, "__init__", by_reference)
    SlowWriter(monkeypatch)
    assert call("train", config, BACKGROUND, ALL).code == 0
    assert (saved(RUN) == whole["all"]) == (shared == "master"), (
        "fp32 has no master copy, and no other may be shared"
    )


def test_without_a_copy_of_its_own_the_state_is_a_later_one(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """The same for state.json."""
    write = saver._Save.write

    def late(self: Any, *arguments: Any) -> Path:
        time.sleep(0.05)
        self.state = session_of[-1].saved_state()
        return write(self, *arguments)

    session_of: list[Any] = []
    make = Loop.__init__

    def remember(self: Loop, session: Any, *arguments: Any) -> None:
        session_of.append(session)
        make(self, session, *arguments)

    monkeypatch.setattr(saver._Save, "write", late)
    monkeypatch.setattr(Loop, "__init__", remember)
    assert call("train", config, BACKGROUND, ALL).code == 0
    assert saved(RUN) != whole["all"]


def test_without_waiting_for_the_one_under_way_it_is_a_later_state(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """There is one copy: the next save may not take its own before the writer is done with it."""
    SlowWriter(monkeypatch, steps=6)
    with monkeypatch.context() as patch:
        patch.setattr(saver.Saver, "finish", lambda _: None)
        assert call("train", config, BACKGROUND, ALL).code == 0
    assert saved(RUN) != whole["all"]


def background(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"checkpoint": CheckpointConfig(background=True)})


def late_trainer(delay: float) -> Trainer:
    trainer = make_trainer(background(make_config()), "float32", poison=False)
    trainer.streams = LateStreams(delay)
    return trainer


def copy_during_a_step(trainer: Trainer) -> bool:
    """Whether a snapshot that is being made while the next step is taken has the state from before it."""
    batches = make_batches(trainer.config)
    _, state = trainer.step(batches, TrainState())
    before = {name: trainer.arena[name].clone() for name in STATE_BUFFERS if name in trainer.arena}
    snapshot = Snapshot(trainer)
    snapshot.take()
    trainer.step(batches, state)
    after = snapshot.wait()
    assert not torch.equal(before["weights"], trainer.arena["weights"])
    return all(torch.equal(after[name], before[name]) for name in before)


def test_an_update_waits_for_copies_that_come_late(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU, where the copies run beside the next step's forward and backward."""
    assert copy_during_a_step(late_trainer(0.1))
    monkeypatch.setattr(Trainer, "update_after", lambda *_: None)  # the guard dropped
    assert not copy_during_a_step(late_trainer(0.1))


def test_the_writer_waits_for_copies_that_come_late(monkeypatch: pytest.MonkeyPatch):
    trainer = late_trainer(0.1)
    snapshot = Snapshot(trainer)
    for flat in snapshot.flats.values():
        flat.zero_()
    snapshot.take()
    assert not any(bool(flat.any()) for flat in snapshot.flats.values()), "nothing came late"
    assert torch.equal(snapshot.wait()["weights"], trainer.arena["weights"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(config: Path):
    for name, override in (("waiting", "checkpoint.background=false"), ("going-on", BACKGROUND)):
        keys = ("device=cuda", "train.precision=bf16", ALL, override, f"name={name}")
        assert call("train", config, *keys).code == 0
    assert saved(Path("runs/going-on")) == saved(Path("runs/waiting"))


# The plan


@pytest.mark.parametrize(("device", "place"), [("cpu", "host"), ("cuda", "pinned")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_is_planned(device: Any, place: Any, dtype: str):
    config = make_config()
    plain, copied = (plan_training(c, device, dtype) for c in (config, background(config)))
    snapshot = {b.name.removeprefix("snapshot."): b for b in copied.buffers if b.name.startswith("snapshot.")}
    state = {buffer.name: buffer for buffer in plain.buffers if buffer.name in STATE_BUFFERS}
    assert snapshot.keys() == state.keys()
    assert len(state) == (4 if dtype == "bfloat16" else 3)
    for name, buffer in snapshot.items():
        assert (buffer.shape, buffer.dtype, buffer.place) == (state[name].shape, state[name].dtype, place)
    size = sum(buffer.reserved for buffer in state.values())
    assert copied.size(place) == plain.size(place) + size
    assert copied.size("device") == plain.size("device")


def test_the_estimate_counts_the_copy(config: Path):
    plain, copied = (plan_for_training(load_config(config, keys)) for keys in ([], [BACKGROUND]))
    assert copied.required_bytes > plain.required_bytes


# What goes wrong meanwhile


def test_an_error_is_told_and_the_next_save_is_waited_for(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    writer = SlowWriter(monkeypatch)
    with disk_fault("save.written", errno.EIO, times=1) as failed:
        result = call("train", config, BACKGROUND, ALL)
    assert (result.code, len(failed)) == (0, 1)
    (told,) = events(RUN, "save_failed")
    assert told["step"] == 8
    assert "Input/output error" in told["message"]
    assert "the training goes on, and waits for the next save" in result.out
    assert checkpoints(RUN) == [4, 12, 16, 20, STEPS]
    threads = {began: thread for began, _, thread in writer.during}
    assert threads[12] == "MainThread", "the save after a failure was not waited for"
    assert threads[16] != "MainThread"
    assert bits(RUN)["saved"] == whole["saved"]


def test_a_disk_that_does_not_recover_ends_the_run(config: Path, whole: dict[str, Any]):
    """At the next save, after its attempts."""
    fails = [disk_fault("save.begin", errno.ENOSPC, 100, step) for step in (8, 12)]
    with fails[0], fails[1]:
        result = call("train", config, BACKGROUND)
    assert result.code == 1
    assert [event["step"] for event in events(RUN, "save_failed")] == [8] + [12] * 5
    assert f"attempts: 6; what is saved is {RUN}/checkpoints/{checkpoint_name(4)}" in result.err
    assert call("train", config, BACKGROUND).code == 0
    assert bits(RUN)["saved"] == whole["saved"]


def test_the_last_save_is_waited_for_and_tried_again(config: Path, whole: dict[str, Any]):
    with disk_fault("save.synced", errno.EIO, times=2, step=STEPS) as failed:
        assert call("train", config, BACKGROUND).code == 0
    assert len(failed) == 2
    assert bits(RUN)["saved"] == whole["saved"]


def test_a_signal_waits_for_the_save_under_way(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """And saves the step that it came in as well."""
    writer = SlowWriter(monkeypatch)
    with signal_while(writer):
        result = call("train", config, BACKGROUND, ALL)
    assert result.code == 75
    (stopped,) = events(RUN, "stopped")
    assert checkpoints(RUN) == [4, stopped["step"]]
    assert 4 < stopped["step"] <= 8
    assert not [path for path in (RUN / "checkpoints").iterdir() if path.name.startswith(".")]
    assert call("train", config, BACKGROUND).code == 0
    assert bits(RUN)["saved"] == whole["saved"]


@contextmanager
def signal_while(writer: SlowWriter) -> Iterator[None]:
    """SIGTERM as soon as a step was taken while a checkpoint is being written."""

    def watch() -> None:
        deadline = time.monotonic() + 30
        while not (writer.writing and writer.step > 4) and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    yield
    thread.join()


def test_a_failure_waits_for_the_save_under_way(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Whatever ends the run, the save that has begun is no loss."""
    SlowWriter(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "validate", lambda *_: {}["no"])
        assert call("train", config, BACKGROUND).code == 1
    assert checkpoints(RUN) == [4]
    assert events(RUN, "checkpoint")[0]["step"] == 4


def test_a_kill_in_the_middle_of_one(config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    write = checkpoint.write_tensors

    def work() -> None:
        def die(path: Path, tensors: Any) -> Any:
            record = write(path, tensors)
            if checkpoint_name(12) in str(path):
                os._exit(9)
            return record

        monkeypatch.setattr(checkpoint, "write_tensors", die)
        call("train", config, BACKGROUND)

    assert exit_code_of(fork(work)) == 9
    assert checkpoints(RUN) == [4, 8]
    assert call("train", config, BACKGROUND).code == 0
    assert bits(RUN)["saved"] == whole["saved"]


def test_something_else_than_the_disk_ends_the_run_at_once(config: Path, monkeypatch: pytest.MonkeyPatch):
    """What is no fault of the disk is not tried again: the next time it is looked at, it ends the run."""

    def fail(*_: Any) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(checkpoint, "_write_contents", fail)
    result = call("train", config, BACKGROUND)
    assert result.code == 1
    assert "out of memory" in result.err
    assert events(RUN, "save_failed") == []
    assert checkpoints(RUN) == []


def test_the_best_is_marked_when_it_is_there(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The evaluation is over long before the checkpoint that it belongs to is written."""
    assert call("train", config, *BEST, *WORSE, "name=waiting").code == 0
    SlowWriter(monkeypatch)
    mark = checkpoint.mark_best

    def checked(directory: Path, step: int, loss: float) -> bool:
        assert (directory / checkpoint_name(step)).is_dir(), "marked before it was there"
        return mark(directory, step, loss)

    monkeypatch.setattr(checkpoint, "mark_best", checked)
    assert call("train", config, *BEST, *WORSE, BACKGROUND).code == 0
    assert best(RUN) == best(Path("runs/waiting"))
    assert checkpoints(RUN) == checkpoints(Path("runs/waiting"))
    order = [(event["event"], event["step"]) for event in events(RUN) if "checkpoint" in event["event"]]
    for kind, step in order:
        if kind == "best_checkpoint":
            assert order.index(("checkpoint", step)) < order.index((kind, step))
