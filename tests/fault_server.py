"""A process that has imported albor, and forks a child for every command that it is sent.

Importing torch takes longer than a whole run of the fault tests' model. A child is a process of its own: it
reads ALBOR_FAULT as one that has just started, and dies of it alone.

    python fault_server.py SOCKET      serves until its standard input ends

A connection sends one line of JSON, {"directory", "arguments", "environment", "output", "mutation"}, gets the
child's pid on one line and what it ended with on another: its exit code, or minus the signal's number.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from mutations import MUTATIONS

from albor import cli, faults, tensorfile
from albor.data.loader import Loader
from albor.memory import devices
from albor.train import session
from albor.train.step import Accumulated, Batch, Trainer, TrainState

CONSUMED = "consumed.txt"  # in the command's directory: step, micro-batch, SHA-256 of its tokens and targets
REACHED = "reached.txt"  # with TRACE set: the points that were reached, one a line, with their steps
TRACE = "FAULT_TRACE"
POISONED = "FAULT_POISONED"  # samples of the run, as `first-last`: a step that reads one has a loss of NaN
FAIL_TENSORS = "FAULT_TENSORS"  # the end of a tensor file's path: the disk gives its header and no more
FAIL_ARENA = "FAULT_ARENA"  # set: there is no memory for the arena
FAIL_READS = "FAULT_READS"  # the name of a file: once it is there, os.pread fails as on a disk that is going


def serve(path: str) -> None:
    """Forks for whoever connects. Children are each waited for by a process between us and them."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Whoever started us in the background or by nohup had them ignored, and then a run ignores them too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    devices.cpu_has_bf16 = lambda: True  # a run that rounds at random does so on any CPU, if slowly
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _wait_for_child(connection)
            connection.close()


def _wait_for_child(connection: socket.socket) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with connection, connection.makefile("rw") as stream:
        request = json.loads(stream.readline())
        pid = os.fork()
        if pid == 0:
            connection.close()
            os._exit(_run(request))
        print(pid, file=stream, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=stream, flush=True)
    os._exit(0)


def _run(request: dict[str, Any]) -> int:
    """What `python -m albor ARGUMENTS` would do; the exit code."""
    code: object = 0
    try:
        os.chdir(request["directory"])
        for number, path in (
            (0, os.devnull),
            (1, request["output"] + ".out"),
            (2, request["output"] + ".err"),
        ):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, number)
            os.close(handle)
        os.environ.update(request["environment"])
        sys.argv = ["albor", *request["arguments"]]
        importlib.reload(faults)
        _record_consumed()
        if os.environ.get(TRACE):
            _record_reached()
        if os.environ.get(POISONED):
            first, last = map(int, os.environ[POISONED].split("-"))
            _poison(range(first, last + 1))
        if os.environ.get(FAIL_READS):
            _fail_reads(Path(os.environ[FAIL_READS]))
        if os.environ.get(FAIL_TENSORS):
            _fail_tensors(os.environ[FAIL_TENSORS])
        if os.environ.get(FAIL_ARENA):
            _fail_arena()
        if request["mutation"]:
            MUTATIONS[request["mutation"]].apply()
        cli.main()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:  # before anybody takes signals; the interpreter ends like this
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 0 if code is None else 1


def _record_consumed() -> None:
    """Every micro-batch that the trainer takes goes into CONSUMED at once, so that a kill loses none."""
    handle = os.open(CONSUMED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    accumulate = Trainer.accumulate

    def recorded(batches: Iterator[Batch], step: int) -> Iterator[Batch]:
        for micro, (tokens, targets) in enumerate(batches, start=1):
            digest = hashlib.sha256(tokens.tobytes() + targets.tobytes()).hexdigest()
            os.write(handle, f"{step} {micro} {digest}\n".encode())
            yield tokens, targets

    def recording(self: Trainer, batches: Iterator[Batch], state: TrainState) -> Accumulated:
        return accumulate(self, recorded(batches, state.step + 1), state)

    Trainer.accumulate = recording  # type: ignore[method-assign]


def _record_reached() -> None:
    handle = os.open(REACHED, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    reach = faults.reach

    def recording(point: str, step: int | None = None) -> float:
        os.write(handle, f"{point} {'' if step is None else step}\n".encode())
        return reach(point, step)

    faults.reach = recording


def _poison(samples: range) -> None:
    """By what is read, not when: a run that goes back and reads other data is healthy again."""
    following, accumulate, read = Loader.next, Trainer.accumulate, set()

    def noted(self: Loader, *arguments: Any) -> None:
        read.add(self.state()["samples"])
        following(self, *arguments)

    def poisoned(self: Trainer, *arguments: Any) -> Accumulated:
        read.clear()
        sums = accumulate(self, *arguments)
        return dataclasses.replace(sums, loss=math.nan) if read & {*samples} else sums

    Loader.next = noted  # type: ignore[method-assign]
    Trainer.accumulate = poisoned  # type: ignore[method-assign]


def _fail_reads(marker: Path) -> None:
    read = os.pread

    def failing(file: int, size: int, offset: int) -> bytes:
        if marker.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, size, offset)

    os.pread = failing


def _fail_tensors(end: str) -> None:
    read = tensorfile._store

    def failing(path: Path, *arguments: Any) -> Iterator[memoryview]:
        if str(path).endswith(end):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(path, *arguments)

    tensorfile._store = failing


def _fail_arena() -> None:
    def no_memory(*_: Any) -> NoReturn:
        raise torch.OutOfMemoryError("out of memory on purpose")

    session.Arena = no_memory  # type: ignore[assignment, misc]


if __name__ == "__main__":
    Path(sys.argv[1]).unlink(missing_ok=True)
    serve(sys.argv[1])
