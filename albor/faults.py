"""Faults on purpose: `ALBOR_FAULT` makes a process die, fail or stall at a named point, so that the tests
can show what a run survives. It is read once, when this module is imported. Without it `reach` does nothing.

    ALBOR_FAULT=point:when:action[,point:when:action...]

`when` says at which of the times that the point is reached the action is taken:

    12      the first time at step 12        12.3    the third time at step 12
    (none)  the first time                   .3      the third time
    *       every time

`action` is one of

    kill, term, int, hup     that signal to this process (SIGKILL, SIGTERM, SIGINT, SIGHUP)
    exit                     the process ends with exit code 99, and no handler or `finally` runs
    enospc, eio, erofs       an OSError with that errno
    oom                      the exception with which PyTorch says that memory is short
    oom-driver               the one that Triton makes of what the CUDA driver says
    raise                    a RuntimeError
    hang                     sleeps until a signal ends the process
    stop                     SIGSTOP: the process stands still until somebody sends it SIGCONT
    nan, inf, spike          at step.accumulated only: `reach` returns NaN, infinity or 100

The points, in the order in which a run comes to them. `step` is what a number in `when` is compared with;
where there is none, only `(none)`, `.3` and `*` make sense, and a number is refused.

    point             step                        where
    shard.write       none                        before a document's ids are written to a token shard
    shard.synced      none                        a cache entry (tokenizer, shards) is flushed to the disk
    shard.renamed     none                        it has its name
    load.begin        none                        before a checkpoint is verified and read
    load.filled       none                        every tensor is read, the state is not yet in use
    step.begin        the one that begins         nothing of it is done
    step.micro_batch  the one under way           after each of its micro-batches
    step.accumulated  the one under way           the gradient is summed, no weight has moved
    step.updated      the one under way           the weights have moved, the run does not count the step yet
    save.begin        the one that is saved       nothing is written
    save.tensors      the one that is saved       after each tensor file
    save.written      the one that is saved       every file is written, the manifest too
    save.synced       the one that is saved       every file and the directory are flushed to the disk
    save.verified     the one that is saved       everything was read back and compared
    save.renamed      the one that is saved       the checkpoint has its name
    save.pruned       the one that is saved       older checkpoints are removed
    evaluate.begin    the last one done           before the first batch of an evaluation
    evaluate.batch    the last one done           before each batch of an evaluation
    sample.begin      the last one done           before each sample is written
    rollback.begin    the last one done           before a rollback looks for a checkpoint
    rollback.loaded   the last one done           an older state is in memory, nothing is recorded yet

A process that was told to fail says so in its log (`ACTIVE`), for nobody leaves this on unseen.
"""

from __future__ import annotations

import errno
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

VARIABLE = "ALBOR_FAULT"
EXIT_CODE = 99  # of the action `exit`

_WITHOUT_STEP = ("shard.write", "shard.synced", "shard.renamed", "load.begin", "load.filled")
POINTS = (
    *_WITHOUT_STEP,
    "step.begin", "step.micro_batch", "step.accumulated", "step.updated",
    "save.begin", "save.tensors", "save.written", "save.synced", "save.verified", "save.renamed",
    "save.pruned",
    "evaluate.begin", "evaluate.batch", "sample.begin",
    "rollback.begin", "rollback.loaded",
)  # fmt: skip

_WHEN = re.compile(r"(?P<every>\*)|(?P<step>[0-9]*)(?:\.(?P<time>[1-9][0-9]*))?")
_SIGNALS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "hup": signal.SIGHUP,
    "stop": signal.SIGSTOP,
}
_ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO, "erofs": errno.EROFS}
_FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 100.0}


@dataclass(frozen=True)
class Fault:
    """One `point:when:action`."""

    point: str
    every: bool
    step: int | None  # None: at any step
    time: int  # the first time is 1
    action: str


def parse(text: str) -> list[Fault]:
    """The faults that `text` lists. Raises ValueError, which says what is wrong with it."""
    faults = []
    for item in text.split(","):
        parts = item.strip().split(":")
        if len(parts) != 3:
            raise ValueError(f"{item!r} is not point:when:action")
        point, when, action = parts
        match = _WHEN.fullmatch(when)
        if point not in POINTS:
            raise ValueError(f"there is no point {point!r}; the points are {', '.join(POINTS)}")
        if match is None:
            raise ValueError(f"{when!r} in {item!r} is neither a step, nor step.time, nor .time, nor *")
        if match["step"] and point in _WITHOUT_STEP:
            raise ValueError(f"{item!r}: {point} belongs to no step; leave the number out")
        if action not in _ACTIONS:
            raise ValueError(f"there is no action {action!r}; the actions are {', '.join(_ACTIONS)}")
        if action in _FACTORS and point != "step.accumulated":
            raise ValueError(f"{item!r}: {action} is for step.accumulated")
        step = int(match["step"]) if match["step"] else None
        faults.append(Fault(point, match["every"] is not None, step, int(match["time"] or 1), action))
    return faults


class Plan:
    """Counts how often each point was reached, and takes the actions that are due."""

    def __init__(self, faults: list[Fault]):
        self._faults = faults
        self._reached: Counter[tuple[str, int | None]] = Counter()

    def reach(self, point: str, step: int | None) -> float:
        """See `albor.faults.reach`."""
        assert point in POINTS, f"{point} is missing in albor.faults.POINTS"
        # At any step, and at this one: a point without steps is counted once.
        for key in {(point, None), (point, step)}:
            self._reached[key] += 1
        factor = 1.0
        for fault in self._faults:
            fits = fault.point == point and fault.step in (None, step)
            if fits and (fault.every or self._reached[point, fault.step] == fault.time):
                factor *= _take(fault.action, f"{point}, step {step}")
        return factor


def _take(action: str, where: str) -> float:
    if action in _FACTORS:
        return _FACTORS[action]
    if action in _SIGNALS:
        os.kill(os.getpid(), _SIGNALS[action])
    else:
        _ENDS[action](where)
    return 1.0


def _exit(where: str) -> NoReturn:
    os._exit(EXIT_CODE)


def _out_of_memory(where: str) -> NoReturn:
    import torch  # the command line does without it

    raise torch.OutOfMemoryError(f"out of memory on purpose at {where} ({VARIABLE})")


def _out_of_memory_by_the_driver(where: str) -> NoReturn:
    raise RuntimeError(f"Triton Error [CUDA]: out of memory on purpose at {where} ({VARIABLE})")


def _raise(where: str) -> NoReturn:
    raise RuntimeError(f"failed on purpose at {where} ({VARIABLE})")


def _hang(where: str) -> NoReturn:
    while True:
        time.sleep(3600)


def _os_error(number: int) -> Callable[[str], NoReturn]:
    def fail(where: str) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


_ENDS: dict[str, Callable[[str], NoReturn]] = {
    "exit": _exit,
    **{name: _os_error(number) for name, number in _ERRORS.items()},
    "oom": _out_of_memory,
    "oom-driver": _out_of_memory_by_the_driver,
    "raise": _raise,
    "hang": _hang,
}
_ACTIONS = (*_SIGNALS, *_ENDS, *_FACTORS)

ACTIVE = os.environ.get(VARIABLE, "")  # what this process was told to do, as it was told

if ACTIVE:
    try:
        _plan = Plan(parse(ACTIVE))
    except ValueError as _error:
        print(f"albor: {VARIABLE}: {_error}; unset it, or see albor/faults.py", file=sys.stderr)
        sys.exit(2)

    def reach(point: str, step: int | None = None) -> float:
        """The run has come to `point`, of `step` where it belongs to one; what ALBOR_FAULT names here is
        done.

        Returns what loss and gradient are to be multiplied with, which is 1 but for nan, inf and spike at
        step.accumulated. Call it as `faults.reach`: tests read ALBOR_FAULT anew by reloading this module.
        """
        return _plan.reach(point, step)

else:

    def reach(point: str, step: int | None = None) -> float:
        return 1.0
