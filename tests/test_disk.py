"""A disk that is full, broken or read-only: what is saved stays, the run waits for the disk and goes on, or
ends with a message; and which checkpoints are kept (fault row 5).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import shutil
import signal
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_cases import exit_code_of, fork
from run_cases import STEPS, bits, call, checkpoints, events, rows, tree

from albor import checkpoint, durable, faults
from albor.checkpoint import checkpoint_name, find_latest
from albor.configfile import load_config
from albor.memory.estimate import plan_for_training
from albor.train import run, saver
from albor.train.session import checkpoint_bytes
from albor.train.time_limit import TimeLimit

RUN = Path("runs/tiny")
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 0.01)


@contextlib.contextmanager
def disk_fault(point: str, number: int, times: int, step: int = 8) -> Iterator[list[str]]:
    """The first `times` that `step`'s save comes to `point`, the disk fails; the list grows by each."""
    reach, failed = faults.reach, list[str]()

    def fail(name: str, at: int | None = None) -> float:
        if (name, at) == (point, step) and len(failed) < times:
            failed.append(name)
            raise OSError(number, os.strerror(number))
        return reach(name, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "reach", fail)
        yield failed


# Attempts


@pytest.mark.parametrize(
    ("point", "number"),
    [
        ("save.begin", errno.EROFS),
        ("save.tensors", errno.ENOSPC),
        ("save.written", errno.EIO),
        ("save.synced", errno.EDQUOT),
        ("save.verified", errno.ESTALE),
        ("save.renamed", errno.EIO),
    ],
)
def test_a_disk_that_recovers_costs_a_pause(config: Path, whole: dict[str, Any], point: str, number: int):
    with disk_fault(point, number, times=3) as failed:
        result = call("train", config)
    assert (result.code, len(failed)) == (0, 3)
    told = events(RUN, "save_failed")
    assert [(event["step"], event["pause"]) for event in told] == [(8, 0.01), (8, 0.02), (8, 0.04)]
    assert all(os.strerror(number) in event["message"] for event in told)
    assert (
        f"step 8: could not save {RUN}/checkpoints/{checkpoint_name(8)}: {os.strerror(number)}" in result.out
    )
    assert bits(RUN) == whole
    assert [path for path in (RUN / "checkpoints").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_does_not_recover_ends_the_run(config: Path, whole: dict[str, Any], number: int):
    before = {}

    def remember(*_: Any) -> None:
        before.update(tree(RUN / "checkpoints"))

    with disk_fault("save.written", number, times=100) as failed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver.Saver, "poll", lambda self: remember() if self.session.state.step == 8 else None)
        result = call("train", config)
    assert (result.code, len(failed)) == (1, 6)
    said = result.err
    assert (
        f"could not save {RUN}/checkpoints/{checkpoint_name(8)}: {os.strerror(number)} (it takes 0." in said
    )
    assert "MB are free); attempts: 6; what is saved is" in said
    assert f"{RUN}/checkpoints/{checkpoint_name(4)}, whole, and the same command goes on from there" in said
    assert "Traceback" not in said
    assert events(RUN)[-1]["event"] == "failed"
    assert tree(RUN / "checkpoints") == before, "the earlier checkpoints were touched"
    assert call("train", config).code == 0
    assert bits(RUN) == whole


def test_without_a_checkpoint_the_message_says_so(config: Path):
    with disk_fault("save.begin", errno.EIO, times=100, step=4):
        result = call("train", config, "checkpoint.retries=0")
    assert result.code == 1
    assert "attempts: 1; there is no checkpoint yet, and the same command starts anew" in result.err


def test_pauses_double_up_to_a_minute(config: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    assert (saver._FIRST_PAUSE, saver._LONGEST_PAUSE) == (1.0, 60.0)
    slept: list[float] = []
    monkeypatch.setattr(saver.Saver, "_pause", lambda self, seconds, _: slept.append(seconds) or True)
    with disk_fault("save.begin", errno.EIO, times=100, step=4):
        assert call("train", config, "checkpoint.retries=8", "name=patient").code == 1
    assert slept == [1, 2, 4, 8, 16, 32, 60, 60]
    shutil.rmtree("runs/patient")


def test_a_signal_ends_the_pause(config: Path, monkeypatch: pytest.MonkeyPatch):
    """One more attempt, since the pause may have been enough, and then the end: with the checkpoint, or
    without one."""
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 50.0)
    for times, code, says in ((1, 75, "the checkpoint is saved"), (100, 1, "attempts: 2")):
        with disk_fault("save.begin", errno.ENOSPC, times) as failed:
            watch = threading.Thread(target=signal_when, args=(lambda f=failed: f,))
            watch.start()
            began = time.monotonic()
            result = call("train", config, f"name=run{code}")
            watch.join()
        assert (result.code, time.monotonic() - began < 20) == (code, True)
        assert says in result.err
        assert checkpoints(Path(f"runs/run{code}"))[-1] == (8 if times == 1 else 4)


@contextlib.contextmanager
def told_at(point: str, step: int) -> Iterator[None]:
    """SIGTERM comes when the run first reaches `point`."""
    reach, told = faults.reach, list[str]()

    def tell(name: str, at: int | None = None) -> float:
        if (name, at) == (point, step) and not told:
            told.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
        return reach(name, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faults, "reach", tell)
        yield


@pytest.mark.parametrize("guarded", [True, False], ids=["", "without-its-guard"])
def test_a_signal_in_an_attempt_leaves_one_more(config: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch):
    """It comes while the save writes that then fails: no pause follows. The guard dropped, all attempts."""
    if not guarded:  # what came before a pause began would be nothing new to it
        pause = saver.Saver._pause
        monkeypatch.setattr(saver.Saver, "_pause", lambda self, s, _: pause(self, s, self.stop.reason))
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 50.0)
    with disk_fault("save.written", errno.EIO, times=100) as failed, told_at("save.tensors", 8):
        result = call("train", config, "checkpoint.retries=3")
    assert (result.code, len(failed)) == (1, 2 if guarded else 4)
    assert f"attempts: {len(failed)}" in result.err
    assert events(RUN, "save_failed")[0]["pause"] == 0


def test_the_pauses_of_a_run_that_was_stopped_before_are_bounded(
    config: Path, monkeypatch: pytest.MonkeyPatch
):
    """The scheduler that has told it to stop does not wait for ever."""
    monkeypatch.undo()
    slept: list[float] = []
    monkeypatch.setattr(saver.Saver, "_pause", lambda self, seconds, _: slept.append(seconds) or True)
    with disk_fault("save.begin", errno.EIO, times=100, step=6), told_at("step.begin", 7):
        result = call("train", config, "name=told", "checkpoint.retries=8")
    assert result.code == 1
    assert slept == [1, 2, 4, 3]
    assert sum(slept) == saver._STOPPING
    assert "attempts: 5" in result.err
    shutil.rmtree("runs/told")


def test_the_end_of_the_time_ends_the_pause(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The scheduler kills who is still waiting: the last attempt comes while there is time for it."""
    monkeypatch.setattr(saver, "_FIRST_PAUSE", 50.0)
    monkeypatch.setattr(TimeLimit, "is_near", lambda self: False)
    monkeypatch.setattr(TimeLimit, "set", lambda self, *_: setattr(self, "seconds", 0.5))
    with disk_fault("save.begin", errno.ENOSPC, times=100) as failed:
        began = time.monotonic()
        result = call("train", config)
    assert (result.code, len(failed), time.monotonic() - began < 20) == (1, 2, True)
    assert "attempts: 2" in result.err


def signal_when(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_write_that_is_not_what_was_asked_for_is_tried_again(config: Path, whole: dict[str, Any]):
    """The disk reports success and keeps another byte: what is read back shows it. Twice, then it is well."""
    result, damaged = train_on_a_lying_disk(config)
    assert (result.code, len(damaged)) == (0, 2)
    assert "content differs from what was saved" in events(RUN, "save_failed")[0]["message"]
    assert bits(RUN) == whole


def test_without_reading_back_such_a_disk_is_believed(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The guard dropped: the damaged checkpoint is saved as if it were whole, and pushes good ones out."""
    verify = checkpoint.verify

    def trusting(path: Path, *, tensors: bool = True) -> Any:
        if path.name.startswith("."):
            return checkpoint.Manifest.from_bytes((path / "manifest.json").read_bytes())
        return verify(path, tensors=tensors)

    monkeypatch.setattr(checkpoint, "verify", trusting)
    train_on_a_lying_disk(config, "checkpoint.keep_last=1", "train.max_steps=8", times=1)
    with pytest.warns(UserWarning, match="damaged"):
        assert find_latest(RUN / "checkpoints") is None, "what cannot fail proves nothing"


def train_on_a_lying_disk(config: Path, *arguments: str, times: int = 2) -> tuple[Any, list[Path]]:
    """Of step 8, the optimizer's file comes to the disk with another last byte."""
    write, damaged = checkpoint.write_tensors, list[Path]()

    def lie(path: Path, tensors: Any) -> Any:
        record = write(path, tensors)
        if "optimizer" in path.name and checkpoint_name(8) in str(path) and len(damaged) < times:
            damaged.append(path)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_tensors", lie)
        return call("train", config, *arguments), damaged


# Room


Usage = namedtuple("Usage", "total used free")


def pretend_free(monkeypatch: pytest.MonkeyPatch, free: Callable[[], int]) -> None:
    """The disk says so much of its room; it has enough."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**15, 0, free()))


def size_of(config: Path) -> int:
    """Bytes that one checkpoint is taken for."""
    return checkpoint_bytes(plan_for_training(load_config(config)).plan) + saver._SMALL_FILES


def test_a_run_without_room_for_two_checkpoints_does_not_begin(config: Path, monkeypatch: pytest.MonkeyPatch):
    pretend_free(monkeypatch, lambda: 2 * size_of(config) - 1)
    result = call("train", config)
    assert result.code == 1
    assert result.err.startswith("albor: the next 2 checkpoints take 4.")
    assert f"and on the disk of {RUN}/checkpoints 4." in result.err
    assert "free; free some, or set runs_dir to another disk" in result.err
    assert not RUN.exists(), "a run that was refused leaves nothing"

    with monkeypatch.context() as patch:  # the guard dropped
        patch.setattr(run, "preflight", lambda *_, **__: None)
        assert call("train", config, "name=unguarded").code == 0, "what cannot fail proves nothing"
    pretend_free(monkeypatch, lambda: 4 * size_of(config))
    result = call("train", config)
    assert (result.code, "disk" in result.out) == (0, False)
    assert events(RUN, "disk_is_short") == []


def test_a_checkpoint_that_will_go_is_room_for_the_second(config: Path, monkeypatch: pytest.MonkeyPatch):
    """One whole checkpoint must fit beside all that is there; then an old one makes room for the next."""
    with disk_fault("save.begin", errno.EIO, times=1, step=12):
        assert call("train", config, "checkpoint.retries=0").code == 1
    assert checkpoints(RUN) == [4, 8]
    goes = sum(path.stat().st_size for path in (RUN / "checkpoints" / checkpoint_name(4)).iterdir())
    for free in (2 * size_of(config) - goes - 1, size_of(config) - 1):
        pretend_free(monkeypatch, lambda free=free: free)
        result = call("train", config)
        assert result.code == 1
        assert "more once older ones are removed" in result.err
    pretend_free(monkeypatch, lambda: 2 * size_of(config) - goes)
    assert call("train", config).code == 0
    assert events(RUN, "disk_is_short") == []
    pretend_free(monkeypatch, lambda: 0)
    assert call("train", config).code == 0, "a finished run saves nothing"


def test_room_is_looked_at_before_each_save(config: Path, monkeypatch: pytest.MonkeyPatch):
    """With a warning: another process may have filled the disk, and may go away again."""
    free = iter([10**9] * 3)  # asked twice before the first step, and at the first save
    pretend_free(monkeypatch, lambda: next(free, 1000))
    result = call("train", config, "train.max_steps=12")
    assert result.code == 0
    told = events(RUN, "disk_is_short")
    assert [event["step"] for event in told] == [8, 12]
    assert "the next 2 checkpoints take" in told[0]["message"]
    assert "the next checkpoint takes" in told[1]["message"], "after the last step there is no second"
    assert f"step 8: {told[0]['message']}" in result.out


def test_what_a_run_will_keep_is_held_against_the_disk(config: Path, monkeypatch: pytest.MonkeyPatch):
    pretend_free(monkeypatch, lambda: int(6.5 * size_of(config)))  # it keeps 6, those of keep_last among them
    keeps = ("checkpoint.keep_every=4", "checkpoint.keep_best=true")
    assert "the checkpoints that this run keeps come to" in call("train", config, "name=many", *keeps).out
    assert "this run keeps" not in call("train", config).out


def test_a_run_directory_that_cannot_be_written(config: Path, monkeypatch: pytest.MonkeyPatch):
    """At the start, before anything is prepared; and where it fails only at the end."""
    unpatched = os.open

    def read_only(path: Any, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_CREAT and "runs" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return unpatched(path, flags, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        result = call("train", config)
    assert (result.code, result.err) == (1, f"albor: runs_dir: {RUN} cannot be used: Read-only file system\n")

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable, "write_file", full)
    result = call("train", config)
    assert result.code == 1
    assert result.err == f"albor: {RUN}/config.yaml cannot be written: No space left on device\n"


# A real disk


def on_a_small_disk(size: str, work: Callable[[Path], None]) -> None:
    """Does `work` in a child that alone sees a file system of `size` in memory. Skips where the system allows
    none."""
    mounted = Path("disk").absolute()
    mounted.mkdir()

    def child() -> None:
        unshared = LIBC.unshare(0x20000)  # CLONE_NEWNS
        if unshared:
            unshared = LIBC.unshare(0x20000 | 0x10000000)  # and CLONE_NEWUSER, for whom is not root
        if unshared or LIBC.mount(b"tmpfs", bytes(mounted), b"tmpfs", 0, f"size={size}".encode()):
            os._exit(77)
        work(mounted)

    code = exit_code_of(fork(child))
    if code == 77:
        pytest.skip("no file system can be mounted here")
    assert code == 0


def test_a_full_disk(config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Something else fills it while the run trains, and goes away at the third attempt."""
    pauses: list[float] = []

    def fill(self: saver.Saver) -> None:
        if self.session.state.step == 6:
            with contextlib.suppress(OSError), open("disk/filler", "wb") as file:
                while True:
                    file.write(bytes(1000))
                    file.flush()

    def pause(self: saver.Saver, seconds: float, _: str | None) -> bool:
        pauses.append(seconds)
        if len(pauses) == 2:
            os.unlink("disk/filler")
        return True

    def work(disk: Path) -> None:
        monkeypatch.setattr(saver.Saver, "poll", fill)
        monkeypatch.setattr(saver.Saver, "_pause", pause)
        result = call("train", config, f"runs_dir={disk}")
        assert result.code == 0, result.err
        told = events(disk / "tiny", "save_failed")
        assert [event["step"] for event in told] == [8, 8]
        assert all("No space left on device" in event["message"] for event in told)
        assert bits(disk / "tiny")["saved"] == whole["saved"]

    on_a_small_disk("20m", work)


def test_a_read_only_disk(config: Path):
    def work(disk: Path) -> None:
        assert LIBC.mount(b"none", bytes(disk), None, 0x20 | 1, None) == 0  # MS_REMOUNT, MS_RDONLY
        result = call("train", config, f"runs_dir={disk}")
        assert result.code == 1
        assert result.err == f"albor: runs_dir: {disk}/tiny cannot be used: Read-only file system\n"

    on_a_small_disk("20m", work)


# Which are kept


def test_every_so_many_are_kept_for_good(config: Path):
    assert call("train", config, "checkpoint.keep_last=1", "checkpoint.keep_every=8").code == 0
    assert checkpoints(RUN) == [8, 16, STEPS]
    result = call("train", config, "checkpoint.keep_every=6")
    assert result.code == 2
    assert "checkpoint.keep_every: 6 is no multiple of every_steps (4)" in result.err
    assert "use 4" in result.err


BEST = ("checkpoint.keep_best=true", "checkpoint.keep_last=1", "evaluate.every_steps=2")
# Learns, and then unlearns: the best is in the middle.
WORSE = ("schedule.kind=constant", "schedule.warmup_steps=0", "optimizer.lr=0.3")


def best(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "checkpoints" / "best.json").read_text())
    return content


def test_the_best_is_kept(config: Path):
    """The one with the lowest loss of those that were evaluated at their own step."""
    assert call("train", config, *BEST, *WORSE).code == 0
    losses = {row["step"]: row["val/loss"] for row in rows(RUN) if "val/loss" in row and row["step"] % 4 == 0}
    step = min(losses, key=lambda step: losses[step])
    assert best(RUN) == {"step": step, "val/loss": losses[step]}
    assert 4 < step < STEPS, "no test of anything"
    assert checkpoints(RUN) == [step, STEPS]
    marked = events(RUN, "best_checkpoint")
    lowest = itertools.accumulate(losses.values(), min)
    assert [event["step"] for event in marked] == [
        s for s, low in zip(losses, lowest, strict=True) if low == losses[s]
    ]

    written = call("generate", RUN / "best", "--prompt", "the", "--json")
    same = call("generate", RUN / "checkpoints" / checkpoint_name(step), "--prompt", "the", "--json")
    assert (written.code, json.loads(written.out)["text"]) == (0, json.loads(same.out)["text"])
    last = call("generate", RUN, "--prompt", "the", "--json")
    assert json.loads(last.out)["text"] != json.loads(written.out)["text"]
    result = call("train", config, *BEST, *WORSE, "name=again", "--resume", RUN / "best")
    assert (result.code, f"going on from step {step}" in result.out) == (0, True)
    assert bits(Path("runs/again"))["saved"] == bits(RUN)["saved"]


def test_the_best_survives_a_kill_before_it_is_marked(config: Path, monkeypatch: pytest.MonkeyPatch):
    assert call("train", config, *BEST, *WORSE, "name=unstopped").code == 0
    mark = checkpoint.mark_best
    for step in (4, 8, 12):

        def work(step: int = step) -> None:
            patch = lambda path, at, loss: os._exit(9) if at == step else mark(path, at, loss)  # noqa: E731
            monkeypatch.setattr(checkpoint, "mark_best", patch)
            call("train", config, *BEST, *WORSE)

        assert exit_code_of(fork(work)) == 9
    assert call("train", config, *BEST, *WORSE).code == 0
    assert best(RUN) == best(Path("runs/unstopped"))
    assert checkpoints(RUN) == checkpoints(Path("runs/unstopped"))


def test_a_mark_that_cannot_be_written_ends_nothing(config: Path, monkeypatch: pytest.MonkeyPatch):
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "replace_file", full)
    result = call("train", config, "checkpoint.keep_best=true")
    assert result.code == 0
    assert "best.json: [Errno 28]" in events(RUN, "best_not_marked")[0]["message"]
    missing = call("generate", RUN / "best")
    assert missing.code == 1
    assert "no checkpoint is marked as the best (checkpoint.keep_best does that)" in missing.err
