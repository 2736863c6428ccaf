"""A run that is told to stop, or whose time is up, wherever it is; and two processes in one run.

Signals in steps, evaluations, samples and saves are in test_run.py and test_faults.py.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoint_cases import exit_code_of, fork
from run_cases import STEPS, bits, call, checkpoints, events, tree

from albor import signals
from albor.errors import AlborError
from albor.train import run, time_limit
from albor.train.run_directory import claim
from albor.train.signals import StopRequest
from albor.train.step import Trainer
from albor.train.time_limit import TimeLimit

RUN = Path("runs/tiny")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own runs; the prepared data are the module's."""
    monkeypatch.chdir(tmp_path)


# The time limit


class FakeClock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit_of(
    hours: float | None, checkpoint_bytes: int = 0, *, background: bool = False
) -> tuple[TimeLimit, FakeClock]:
    clock = FakeClock()
    limit = TimeLimit(clock)
    sections = {"train": {"max_hours": hours}, "checkpoint": {"background": background}}
    config = SimpleNamespace(**{name: SimpleNamespace(**keys) for name, keys in sections.items()})
    limit.set(config, checkpoint_bytes)  # type: ignore[arg-type]
    return limit, clock


def test_the_margin_is_two_of_the_longest_saves_and_the_longest_step():
    limit, clock = limit_of(1.0)
    for seconds in (7.0, 30.0, 2.0):
        with limit.step():
            clock.now += seconds
    for seconds in (100.0, 250.0, 1.0):
        limit.expect_save(seconds)
    assert limit.margin == 2 * 250 + 30
    clock.now = 1000 + 3600 - 530 - 0.5
    assert not limit.is_near()
    clock.now += 0.5
    assert limit.is_near()


def test_a_save_in_the_background_may_be_under_way():
    """The last save waits for it, and is still to have twice the time of the longest."""
    limit, _ = limit_of(1.0, background=True)
    limit.expect_save(250.0)
    assert limit.margin == 3 * 250


def test_without_a_limit_it_is_never_near():
    limit, clock = limit_of(None, 10**15)
    clock.now += 1e9
    assert not limit.is_near()


def test_until_a_save_is_timed_it_is_taken_for_a_slow_one():
    limit, _ = limit_of(10.0, 6_000_000_000)
    assert limit.margin == 2 * 60
    limit.expect_save(3.0)
    assert limit.margin == 2 * 3


def run_on_a_fake_clock(monkeypatch: pytest.MonkeyPatch, step: float, save: float) -> FakeClock:
    """From here on a run's steps and saves take these seconds of the clock that its time limit looks at."""
    clock = FakeClock()
    monkeypatch.setattr(time_limit.time, "monotonic", clock)
    micro, written = Trainer._micro_batch, run.Session.saved_state

    def slow_step(self: Trainer) -> None:
        micro(self)
        clock.now += step / 3

    def slow_save(self: run.Session) -> Any:
        clock.now += save
        return written(self)

    monkeypatch.setattr(Trainer, "_micro_batch", slow_step)
    monkeypatch.setattr(run.Session, "saved_state", slow_save)
    expect = TimeLimit.expect_save
    monkeypatch.setattr(TimeLimit, "expect_save", lambda self, _: expect(self, save))
    return clock


def test_a_run_stops_in_time_and_goes_on(
    config: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    """Row 9. Steps of a minute, saves of 100 s at every fourth: all starts together make the whole run, and
    each ends within its half hour, with two saves and a step to spare."""
    with monkeypatch.context() as patch:
        clock = run_on_a_fake_clock(patch, 60.0, 100.0)
        ends = []
        for _ in range(4):
            began = clock.now
            result = call("train", config, "train.max_hours=0.5")
            ends.append((result.code, events(RUN)[-1]["step"]))
            assert clock.now - began <= 1800
            if result.code == 0:
                break
            assert "stopped by train.max_hours after step" in result.err
            assert checkpoints(RUN)[-1] == events(RUN, "stopped")[-1]["step"]
            # Stopping, it has made one save of at most two that there was time for.
            assert 1800 - (clock.now - began) >= 100
    assert [code for code, _ in ends] == [75, 0]
    assert 16 <= ends[0][1] < STEPS
    assert bits(RUN) == whole


def test_the_time_is_looked_at_between_micro_batches(config: Path, monkeypatch: pytest.MonkeyPatch):
    """And what is under way is given up: the step that it stops in is not half done."""
    clock = run_on_a_fake_clock(monkeypatch, 60.0, 1.0)
    looks = []
    near = TimeLimit.is_near
    monkeypatch.setattr(TimeLimit, "is_near", lambda self: looks.append(clock.now % 60) or near(self))
    assert call("train", config, "train.max_hours=0.1", "evaluate.every_steps=24").code == 75
    assert {round(look) for look in looks} >= {0, 20, 40}


@pytest.mark.parametrize("guarded", [True, False])
def test_a_jump_of_the_clock_is_no_reason_to_stop(
    config: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
):
    """Row 9. The time of day goes a year ahead in step 5, as NTP might set it; without a monotonic clock the
    run stops there."""
    wall = {"ahead": 0.0}
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + wall["ahead"])
    micro = Trainer._micro_batch

    def jump(self: Trainer) -> None:
        micro(self)
        wall["ahead"] = 365 * 86400.0

    monkeypatch.setattr(Trainer, "_micro_batch", jump)
    if not guarded:
        monkeypatch.setattr(time_limit.time, "monotonic", lambda: time.time())
    result = call("train", config, "train.max_hours=2", "train.max_steps=6")
    assert result.code == (0 if guarded else 75)


def test_a_limit_that_leaves_no_time_is_refused_before_anything_is_made(config: Path):
    result = call("train", config, "train.max_hours=1e-7", "data.cache_dir=new")
    assert result.code == 2
    said = r"train.max_hours: is 1e-07, 0.00036 s, of which 0.00\d+ s are kept for saving"
    assert re.search(said, result.err)
    assert not any(Path().iterdir())


def test_earlier_starts_have_timed_saves(config: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk that took 50 s for one takes as long again."""
    assert call("train", config, "train.max_steps=5").code == 0
    log = RUN / "events.jsonl"
    log.write_text(re.sub(r'"seconds": [0-9.]+', '"seconds": 50.0', log.read_text()))
    margins = []
    defer = StopRequest.defer
    monkeypatch.setattr(StopRequest, "defer", lambda self: margins.append(self.limit.margin) or defer(self))
    assert call("train", config, "train.max_steps=5", "train.max_hours=1").code == 0
    assert margins == [100.0]


# Signals before the first step


def nothing_but_its_own_work(name: str, number: signal.Signals) -> pytest.MonkeyPatch:
    """From here to its undo, the signal comes while `name` of albor.train.run is at work."""
    patch = pytest.MonkeyPatch()
    work = getattr(run, name)

    def signalled(*arguments: Any, **keywords: Any) -> Any:
        work(*arguments, **keywords)
        os.kill(os.getpid(), number)
        time.sleep(10)
        pytest.fail("the signal was not heeded")

    patch.setattr(run, name, signalled)
    return patch


def stop_after(step: int, config: Path) -> None:
    """A run that gets a signal as `step` ends."""
    update, patch = Trainer.update, pytest.MonkeyPatch()

    def signalled(self: Trainer, sums: Any, state: Any) -> Any:
        if state.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, sums, state)

    patch.setattr(Trainer, "update", signalled)
    assert call("train", config).code == 75
    patch.undo()
    assert checkpoints(RUN)[-1] == step


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["find_checkpoints", "prepare", "open_session", "write_description"])
def test_a_signal_before_the_first_step_loses_nothing(
    config: Path, whole: dict[str, Any], name: str, number: signal.Signals
):
    """Of a new run nothing is left but what the next start writes again; one that goes on is as it was."""
    patch = nothing_but_its_own_work(name, number)
    result = call("train", config)
    patch.undo()
    assert (result.code, "Traceback" in result.err) == (75, False)
    assert f"stopped by {number.name} before the first step" in result.err
    assert RUN.exists() == (name == "write_description")
    if number != signal.SIGTERM:
        return
    stop_after(7, config)
    before = tree(RUN / "checkpoints")
    patch = nothing_but_its_own_work(name, number)
    assert call("train", config).code == 75
    patch.undo()
    assert tree(RUN / "checkpoints") == before
    assert call("train", config).code == 0
    assert bits(RUN) == whole


def test_a_library_that_makes_an_error_of_the_signal(config: Path, monkeypatch: pytest.MonkeyPatch):
    """SentencePiece calls back for its text, and what is raised there becomes a RuntimeError."""

    def in_a_callback(*_: Any, **__: Any) -> Any:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException as stop:
            raise RuntimeError(f"INTERNAL: {stop!r}") from None

    monkeypatch.setattr(run, "prepare", in_a_callback)
    result = call("train", config)
    assert (result.code, RUN.exists()) == (75, False)
    assert "stopped by SIGTERM before the first step" in result.err


def test_kernels_that_compile_are_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    """What is queued is left; what a thread is at ends by itself."""
    from albor.kernels import launches

    done = []

    def compile_slowly(launch: int) -> None:
        if launch == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        done.append(launch)

    monkeypatch.setattr(launches, "compile_launch", compile_slowly)
    monkeypatch.setattr(
        launches, "driver", SimpleNamespace(active=SimpleNamespace(
            get_current_device=lambda: 0, set_current_device=lambda _: None
        ))
    )  # fmt: skip
    with pytest.raises(AlborError, match="stopped by SIGTERM before the first step"), StopRequest():
        launches.precompile(range(100), workers=2)  # type: ignore[arg-type]
    assert len(done) < 20


# One request, and two


def stopped_twice(config: Path, apart: float) -> int:
    """The exit code of a run that gets SIGTERM twice in step 6."""

    def work() -> None:
        micro, count = Trainer._micro_batch, iter(range(1, 1000))

        def twice(self: Trainer) -> None:
            micro(self)
            if next(count) == 3 * 5 + 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(apart)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.1)

        Trainer._micro_batch = twice  # type: ignore[method-assign]
        os._exit(call("train", config).code)

    return exit_code_of(fork(work))


@pytest.mark.parametrize("guarded", [True, False])
def test_what_timeout_sends_twice_is_one_request(
    config: Path, guarded: bool, monkeypatch: pytest.MonkeyPatch
):
    """To the process and to its group; without this the second would keep the first from saving."""
    if not guarded:
        monkeypatch.setattr(signals, "ONE_REQUEST_SECONDS", 0.0)
    assert stopped_twice(config, 0.01) == (75 if guarded else 128 + signal.SIGTERM)
    assert checkpoints(RUN) == ([4, 5] if guarded else [4])


@pytest.mark.parametrize("guarded", [True, False])
def test_a_second_signal_ends_even_a_long_call(guarded: bool, monkeypatch: pytest.MonkeyPatch):
    """One that comes back to Python only at its end, so that no handler runs; a thread ends the process."""
    if not guarded:
        monkeypatch.setattr(signals, "_end_at_the_second", lambda *_: None)

    def work() -> None:
        with StopRequest() as stop:
            stop.defer()
            Path("ready").touch()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)

    child = fork(work)
    deadline = time.monotonic() + 60
    while not Path("ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for _ in range(2):
        os.kill(child, signal.SIGTERM)
        time.sleep(0.6)
    if not guarded:
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == (128 + signal.SIGTERM if guarded else -signal.SIGKILL)


def test_handlers_and_descriptors_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    descriptors = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with StopRequest():
            pass
    deadline = time.monotonic() + 10
    while set(os.listdir("/proc/self/fd")) != descriptors and time.monotonic() < deadline:
        time.sleep(0.01)  # the thread closes its end a moment later
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


# The lock


def flocks(behave: Callable[[int], None]) -> pytest.MonkeyPatch:
    """From here to its undo, taking a lock does `behave` instead."""
    patch = pytest.MonkeyPatch()
    patch.setattr(fcntl, "flock", lambda handle, _: behave(handle))
    return patch


@pytest.mark.parametrize("guarded", [True, False])
def test_a_second_process_is_refused(config: Path, guarded: bool):
    """Row 7. Without the lock both would write, and each remove the other's checkpoints."""
    patch = pytest.MonkeyPatch() if guarded else flocks(lambda _: None)
    with claim(RUN, pytest.fail):
        child = fork(lambda: os._exit(call("train", config).code))
        assert exit_code_of(child) == (1 if guarded else 0)
        assert (RUN / "checkpoints").exists() == (not guarded)
    patch.undo()


def test_a_refused_run_leaves_nothing(config: Path):
    assert call("train", config, "--resume", "absent").code == 1
    assert not RUN.parent.exists()
    with claim(RUN, pytest.fail):
        assert os.listdir(RUN) == [".lock"]
    assert not RUN.parent.exists()


def test_a_file_system_without_locks_is_said_and_used(config: Path, whole: dict[str, Any]):
    def no_locks(_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    patch = flocks(no_locks)
    result = call("train", config)
    patch.undo()
    assert result.code == 0
    said = "runs/tiny cannot be locked (No locks available); see to it that no other process trains in it"
    assert said in " ".join(result.out.split())
    assert bits(RUN) == whole


def test_the_lock_is_one_that_nfs_can_give():
    """There flock is a lock on a byte range, and an exclusive one needs a file that is open for writing."""
    modes = []
    patch = flocks(lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    with claim(RUN, pytest.fail):
        pass
    patch.undo()
    assert modes == [os.O_RDWR]


def test_a_lock_whose_file_is_gone_is_none():
    """Its last owner removes the file after we have opened it: a third process would lock a new one."""
    RUN.mkdir(parents=True)
    lock, given = fcntl.flock, []

    def late(handle: int) -> None:
        if not given:
            (RUN / ".lock").unlink()
        given.append(handle)
        lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    patch = flocks(late)
    with claim(RUN, pytest.fail):
        patch.undo()
        assert len(given) == 2
        with pytest.raises(AlborError, match="another process is training"), claim(RUN, pytest.fail):
            pytest.fail("two have the lock")
