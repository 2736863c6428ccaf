"""How a run's checkpoints get to the disk: room for them, attempts at it, the background, the best one.

A save that the disk refuses is tried again after a pause, while nothing else happens, and at last ends the
run: steps that cannot be saved are steps that will be lost. One that fails in the background is told at once;
the next one is then made in the foreground, with those attempts.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from albor import checkpoint
from albor.checkpoint import Retention
from albor.errors import AlborError, CheckpointError, DiskFault
from albor.memory.cost import most_checkpoints
from albor.memory.plan import MemoryPlan
from albor.train.display import Display
from albor.train.metrics import MetricsLog
from albor.train.session import Session, checkpoint_bytes, checkpoint_tensors
from albor.train.signals import StopRequest
from albor.train.snapshot import Snapshot
from albor.units import format_bytes

_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds between two attempts; each is twice the one before
_STOPPING = 10.0  # seconds that pauses may take together in a run that was stopped before: a scheduler waits
_GLANCE = 0.05  # seconds until a pause notices that a signal has come, or that time is up
_SMALL_FILES = 2 * 2**20  # bytes of a checkpoint beside its tensors: tokenizer, manifest, configuration


@dataclass
class _Save:
    """One checkpoint on its way: what it holds, and what is to be told of it."""

    step: int
    state: dict[str, Any]
    files: dict[str, bytes]
    retention: Retention
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # that writing took, the last attempt of it
    waited: float = 0.0  # seconds that the training stood still for it

    def write(self, directory: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
        """To the disk, verified, and older ones removed. Raises DiskFault."""
        began = time.monotonic()
        path = checkpoint.save(
            directory, self.step, tensors, self.state, self.files, self.retention, self.warnings.append
        )
        self.seconds = time.monotonic() - began
        return path


class Saver:
    """Saves a session's state; all of it is called from the thread that trains."""

    def __init__(self, session: Session, log: MetricsLog, display: Display, stop: StopRequest):
        self.session, self.log, self.display, self.stop = session, log, display, stop
        self.saved_step = session.saved_step  # of the newest of the run's own checkpoints that is whole
        self._directory = session.directory / checkpoint.CHECKPOINTS
        self._snapshot = Snapshot(session.trainer) if session.config.checkpoint.background else None
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._in_flight: tuple[_Save, Future[Path]] | None = None
        self._must_wait = False  # the last save in the background failed
        self._evaluated: tuple[int, float] | None = None  # a step and its validation loss

    def save(self, *, prune: bool = True) -> None:
        """Saves the current step: before this returns, or in the background where that is configured and the
        run goes on. Without `prune` no older checkpoint is removed. Raises DiskFault when all attempts
        failed.
        """
        began, session = time.monotonic(), self.session
        self.finish()
        retention = retention_of(session) if prune else Retention(keep_last=None)
        save = _Save(session.state.step, session.saved_state(), session.saved_files(), retention)
        last = session.state.step == session.config.steps
        with suppress(OSError):  # the save will tell
            if shortage := find_shortage(session, save.step, saves=1 if last else 2):
                self._tell("disk_is_short", save.step, shortage)
        if self._snapshot is None or self._must_wait or last or self.stop.reason is not None:
            path = self._try_to_write(save)
            save.waited = time.monotonic() - began
            self._done(save, path)
            return
        self._snapshot.take()
        self._in_flight = save, self._writer.submit(self._write_snapshot, save, self._snapshot)
        save.waited = time.monotonic() - began

    def _write_snapshot(self, save: _Save, snapshot: Snapshot) -> Path:
        flats = snapshot.wait()
        return save.write(self._directory, checkpoint_tensors(self.session.trainer, flats))

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._in_flight is not None and not self._in_flight[1].done()

    def poll(self) -> None:
        """Takes note of a save in the background that is done; comes after every step."""
        if not self.is_saving:
            self.finish()

    def finish(self) -> None:
        """Waits for the save in the background, if there is one."""
        if self._in_flight is None:
            return
        (save, future), self._in_flight = self._in_flight, None
        try:
            path = future.result()
        except DiskFault as error:
            self._must_wait = True
            self._tell_warnings(save)
            self._tell(
                "save_failed", save.step, f"{error}; the training goes on, and waits for the next save"
            )
        else:
            self._done(save, path)

    def went_back(self) -> None:
        """The run is at the step of an earlier checkpoint again; what was found of later ones is void."""
        # The beginning is the seed's, and what was read behind it is in no checkpoint yet.
        self.saved_step, self._evaluated = self.session.state.step or None, None

    def close(self) -> None:
        """However the run ends, a save that has begun comes to its end."""
        try:
            self.finish()
        finally:
            self._writer.shutdown()

    def evaluated(self, step: int, loss: float) -> None:
        """The validation loss at `step` is this: marks the checkpoint of that step, if there is one and it is
        the best. One that is still being written is marked when it is there.
        """
        under_way = self._in_flight[0].step if self._in_flight else None
        if self.session.config.checkpoint.keep_best and step in (self.saved_step, under_way):
            self._evaluated = step, loss
            self._mark_best()

    def _mark_best(self) -> None:
        if self._evaluated is None or self._evaluated[0] != self.saved_step:
            return
        step, loss = self._evaluated
        self._evaluated = None
        try:
            if checkpoint.mark_best(self._directory, step, loss):
                self.log.event("best_checkpoint", step, **{"val/loss": loss})
        except OSError as error:
            self._tell(
                "best_not_marked", step, f"could not write {self._directory / checkpoint.BEST}: {error}"
            )

    def _try_to_write(self, save: _Save) -> Path:
        """Attempts and pauses. A signal that comes meanwhile, or the end of train.max_hours, cuts them short:
        one more attempt, and no other. Where one had come before, it is this save that it waits for, and the
        pauses are few.
        """
        tensors, retries = checkpoint_tensors(self.session.trainer), self.session.config.checkpoint.retries
        asked = self.stop.reason
        left = math.inf if asked is None else _STOPPING
        for attempt in range(retries):
            try:
                return save.write(self._directory, tensors)
            except DiskFault as error:
                pause = min(_FIRST_PAUSE * 2**attempt, _LONGEST_PAUSE, left)
                if self.stop.reason != asked:
                    pause = 0.0
                self._tell("save_failed", save.step, f"{error}; another attempt in {pause:g} s", pause=pause)
            left -= pause
            if not self._pause(pause, asked) or left <= 0:
                break
        try:
            return save.write(self._directory, tensors)
        except DiskFault as error:
            kept = "there is no checkpoint yet, and the same command starts anew"
            if self.saved_step is not None:
                newest = self._directory / checkpoint.checkpoint_name(self.saved_step)
                kept = f"what is saved is {newest}, whole, and the same command goes on from there"
            problem = f"{error}; attempts: {attempt + 2 if retries else 1}; {kept}, once the disk is mended"
            raise DiskFault(problem) from error

    def _pause(self, seconds: float, asked: str | None) -> bool:
        """Waits; False: another reason to stop than `asked`, or the time limit, has cut it short."""
        until = time.monotonic() + seconds
        while self.stop.reason == asked and not self.stop.limit.is_last_call():
            left = until - time.monotonic()
            if left <= 0:
                return True
            time.sleep(min(left, _GLANCE))
        return False

    def _done(self, save: _Save, path: Path) -> None:
        self.saved_step, self._must_wait = save.step, False
        self.stop.limit.expect_save(save.seconds)
        times = {"seconds": round(save.seconds, 3), "waited": round(save.waited, 3)}
        self.log.event("checkpoint", save.step, path=str(path), **times)
        self.display.checkpoint(path)
        self._tell_warnings(save)
        self._mark_best()

    def _tell_warnings(self, save: _Save) -> None:
        for warning in save.warnings:
            self._tell("checkpoint_warning", save.step, warning)

    def _tell(self, event: str, step: int, message: str, **details: Any) -> None:
        self.log.event(event, step, message=message, **details)
        self.display.message(f"step {step}: {message}")


def retention_of(session: Session) -> Retention:
    """Which checkpoints the run keeps, that of a rollback among them."""
    config = session.config.checkpoint
    return Retention(config.keep_last, config.keep_every, config.keep_best, session.state.guard.anchor)


def find_shortage(session: Session, step: int, saves: int) -> str | None:
    """What is missing on the disk for the next `saves` checkpoints, the first of them of `step`; None:
    nothing.

    The first needs room beside all that is there. When it is verified, older ones make room for the second.
    """
    directory = session.directory / checkpoint.CHECKPOINTS
    size = _size(session)
    freed = 0
    with suppress(CheckpointError, OSError):
        freed = sum(map(_bytes_of, checkpoint.removable(directory, step, retention_of(session))))
    free = _free(session)
    if free >= size and free + freed >= saves * size:
        return None
    what = "the next checkpoint takes" if saves == 1 else f"the next {saves} checkpoints take"
    removed = f", and {format_bytes(freed)} more once older ones are removed" if freed else ""
    there = f"on the disk of {directory} {format_bytes(free)} are free{removed}"
    return f"{what} {format_bytes(saves * size)}, and {there}"


def preflight(session: Session, say: Callable[[str], None], *, alone: bool = False) -> None:
    """Before the first step: whether the disk takes two checkpoints. Raises AlborError if it does not.

    Says so where it takes two, but not all that the run is going to keep. What dead saves have left is
    removed; `alone`, nobody else can be saving here, whatever process lives.
    """
    config, directory = session.config, session.directory / checkpoint.CHECKPOINTS
    with suppress(OSError):
        checkpoint.clear_leftovers(directory, alone=alone)
    if session.saved_step == config.steps:
        return  # the run is finished, and saves nothing
    if shortage := find_shortage(session, session.state.step + 1, saves=2):
        raise AlborError(f"{shortage}; free some, or set runs_dir to another disk")
    kept, size = most_checkpoints(config), _size(session)
    room = _free(session) + sum(map(_bytes_of, checkpoint.list_checkpoints(directory)))
    if room < (kept + 1) * size:  # one is written while the others are there
        say(
            f"the checkpoints that this run keeps come to {format_bytes(kept * size)}, and one more while it "
            f"is written; on the disk of {directory} there is room for {format_bytes(room)}"
        )


def _size(session: Session) -> int:
    """Bytes of one checkpoint, as planned."""
    return size_on_disk(session.trainer.arena.plan)


def size_on_disk(plan: MemoryPlan) -> int:
    """Bytes of one checkpoint of a run with this plan, with room for the small files."""
    return checkpoint_bytes(plan) + _SMALL_FILES


def _free(session: Session) -> int:
    directory = session.directory / checkpoint.CHECKPOINTS  # which may be a link to another disk
    return shutil.disk_usage(directory if directory.is_dir() else session.directory).free


def _bytes_of(path: Path) -> int:
    return sum(entry.stat(follow_symlinks=False).st_size for entry in path.iterdir())
