"""Starts the measurement, stores its row in the user's cache, and says what came out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread
from typing import IO, Any, Literal

from rich.console import Console

from albor.calibrate.measure import Measured
from albor.durable import make_directory, replace_file
from albor.errors import AlborError
from albor.memory.calibration import (
    Calibration,
    Software,
    as_json,
    calibration_path,
    check,
    read_calibrations,
)
from albor.memory.cards import Hardware
from albor.memory.nvml import installed_gpu
from albor.progress import signals_unwind
from albor.strictjson import to_json
from albor.units import format_bytes

_SECONDS = 300  # a cold disk needs minutes for CUDA's libraries; otherwise it is less than one
_LAST_LINES = 5  # of what a measurement that failed has said


@dataclass(frozen=True)
class Outcome:
    """What was measured, and where it is stored."""

    row: Calibration
    path: Path
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"path": str(self.path), "seconds": round(self.seconds, 1), **asdict(self.row)}


def calibrate(device: Literal["auto", "cuda", "cpu"], say: Callable[[str], None]) -> Outcome:
    """Measures this machine and stores the row. `say` is told of every stage.

    Raises AlborError where there is no such device, where the measurement fails, and where the row cannot be
    stored; what was stored before then stays. SIGTERM and SIGHUP end it as Ctrl-C does.
    """
    started, path = time.perf_counter(), calibration_path()
    card = None if device == "cpu" else _card(required=device == "cuda")
    with signals_unwind():
        measured = _measure("cpu" if card is None else "cuda", say)
    here = Software.installed()
    if here.torch is None:
        raise AlborError("torch is not installed as a package: its version cannot be told")
    row = Calibration(
        device="cpu" if card is None else "cuda",
        gpu=card,
        driver=None if card is None else here.driver,
        torch=here.torch,
        triton=measured.triton,
        cuda=measured.cuda,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        method=measured.method,
        bytes=measured.bytes,
        graph_nodes=measured.graph_nodes,
        details=measured.details,
    )
    try:
        check(row)
    except ValueError as error:
        raise AlborError(f"what was measured cannot be, {error}: nothing is stored ({row.method})") from error
    store(row, path, say)
    return Outcome(row, path, time.perf_counter() - started)


def _card(*, required: bool) -> str | None:
    """The name of the card that CUDA takes here; None without one."""
    found: Hardware | None = installed_gpu()
    if found is None:
        if required:
            raise AlborError("there is no GPU here that NVML knows; albor doctor says why")
        return None
    if found.gpu is None or " or " in found.gpu.name:
        remedy = "set CUDA_VISIBLE_DEVICES to a UUID from `nvidia-smi -L`"
        raise AlborError(f"{found.description}: CUDA may take any of them; {remedy}")
    return found.gpu.name


def _measure(device: str, say: Callable[[str], None]) -> Measured:
    command = [sys.executable, "-P", "-m", "albor.calibrate.measure", device, str(os.getpid())]
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,  # a Ctrl-C that is typed is ours to deal with; its workers end with it
        )  # fmt: skip
    except OSError as error:
        raise AlborError(f"Python cannot be started: {error}") from error
    errors: deque[str] = deque(maxlen=_LAST_LINES)
    result: dict[str, Any] = {}

    def listen(stream: IO[str], hear: Callable[[str], None]) -> Thread:
        def each() -> None:
            for line in stream:
                hear(line)

        thread = Thread(target=each, daemon=True)
        thread.start()
        return thread

    def hear(line: str) -> None:
        try:
            value = json.loads(line)
        except ValueError:  # of a library that prints
            return
        if isinstance(value, dict) and set(value) == {"stage"}:
            say(value["stage"])
        elif isinstance(value, dict):
            result.update(value)

    assert child.stdout is not None
    assert child.stderr is not None
    listeners = [listen(child.stdout, hear), listen(child.stderr, lambda line: errors.append(line.rstrip()))]
    try:
        code = child.wait(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise AlborError(f"the measurement took more than {_SECONDS} s and was ended") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # it has no business without us
        child.wait()
    for thread in listeners:
        thread.join()
    if code != 0 or not result:
        said = "\n".join(errors) or f"exit code {code}"
        raise AlborError(f"the measurement failed: {said}")
    return Measured(**result)


def store(row: Calibration, path: Path, say: Callable[[str], None]) -> None:
    """Puts `row` into the file at `path`, in place of an earlier one of the same card and software."""
    stored = read_calibrations(path)
    if stored.problem:
        say(f"replaced: {stored.problem.partition(';')[0]}")
    rows = (*(other for other in stored.rows if other.key != row.key), row)
    try:
        make_directory(path.parent.absolute())
        replace_file(path, to_json(as_json(rows)))
    except OSError as error:
        raise AlborError(f"{path} cannot be written: {error.strerror or error}") from error


def print_outcome(outcome: Outcome, console: Console) -> None:
    """The row for people."""
    row = outcome.row
    where = row.gpu or "CPU"
    versions = [f"torch {row.torch}", *([f"driver {row.driver}"] if row.driver else [])]
    console.out(f"{where}, {', '.join(versions)}", highlight=False)
    for name, size in row.bytes.items():
        console.out(f"  {name:<30} {format_bytes(size):>10}", highlight=False)
    console.out(f"read: {row.method}", highlight=False)
    extra = row.details.get("allocator", 0) - row.details.get("allocator, computed", 0)
    if extra > 0:
        console.out(f"PyTorch's allocator holds {format_bytes(extra)} more than is computed", highlight=False)
    console.out(f"stored in {outcome.path}", highlight=False)
