"""A run that is small enough to be killed hundreds of times, the process that runs it, and the oracle.

The oracle: whatever happened to a run on its way, once it has finished, the newest checkpoint verifies and is
equal in every byte to the one of a run that nothing happened to, and so are the logged numbers; and every
micro-batch was the one that belongs to its place.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import run_cases
from fault_server import CONSUMED, REACHED
from run_cases import ENVIRONMENT, Result, bits

from albor.faults import VARIABLE

NAME = "tiny"
STEPS = 24
EVERY = 6  # steps between checkpoints, and between evaluations
CHANGES = {
    "intermediate_size: 64": "intermediate_size: 128",
    "every_steps: 4": f"every_steps: {EVERY}",
    "gradient_accumulation_steps: 3": "gradient_accumulation_steps: 2",
}
MEMORY = Path("/dev/shm")  # a file system in memory: processes are killed here, not the power
TIMEOUT = 60.0  # seconds; a run takes half of one


def write_project(directory: Path) -> Path:
    """Corpus and configuration in `directory`; the configuration's path is returned."""
    path = run_cases.write_project(directory)
    for document in sorted((directory / "corpus").iterdir())[8:]:
        document.unlink()  # so that the run has more than one epoch
    text = path.read_text()
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@contextmanager
def directory_of_runs() -> Iterator[Path]:
    """A directory that is removed afterwards; in memory where there is room for it."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1 << 30
    with tempfile.TemporaryDirectory(prefix="albor-", dir=MEMORY if roomy else None) as directory:
        yield Path(directory)


class Child:
    """A command that runs."""

    def __init__(self, address: str, request: dict[str, Any]):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT)
        self._socket.connect(address)
        self._stream = self._socket.makefile("rw")
        self._output = Path(request["directory"], request["output"])
        print(json.dumps(request), file=self._stream, flush=True)
        self.pid = int(self._stream.readline())

    def send(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> Result:
        """Its exit code (minus the number of the signal that killed it), and what it printed."""
        try:
            code = int(self._stream.readline())
        except TimeoutError:
            self.send(signal.SIGKILL)
            raise
        finally:
            self._socket.close()
        out, err = (self._output.with_suffix(kind).read_text() for kind in (".out", ".err"))
        return Result(code, out, err)


class Server:
    """The process of fault_server.py, while entered. Commands may be sent from several threads."""

    def __enter__(self) -> Server:
        self._directory = tempfile.TemporaryDirectory(prefix="albor-")
        self._address = str(Path(self._directory.name, "socket"))
        script = Path(__file__).with_name("fault_server.py")
        environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
        environment.pop(VARIABLE, None)
        command = [sys.executable, str(script), self._address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment)
        deadline = time.monotonic() + TIMEOUT
        while not Path(self._address).exists():
            assert self._process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server did not start within a minute"
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(TIMEOUT)
        self._directory.cleanup()

    def start(
        self,
        directory: Path,
        *arguments: object,
        fault: str = "",
        mutation: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> Child:
        """`albor ARGUMENTS` in `directory`, with ALBOR_FAULT=`fault` and without the guard of `mutation`."""
        directory.mkdir(parents=True, exist_ok=True)
        request = {
            "directory": str(directory),
            "arguments": [str(argument) for argument in arguments],
            "environment": {VARIABLE: fault, **(environment or {})},
            "output": f"command-{len(list(directory.glob('command-*.out')))}",
            "mutation": mutation,
        }
        return Child(self._address, request)

    def run(self, directory: Path, *arguments: object, **keywords: Any) -> Result:
        """`start`, and wait."""
        return self.start(directory, *arguments, **keywords).wait()


def run_of(directory: Path) -> Path:
    """The run directory of the commands in `directory`."""
    return directory / "runs" / NAME


def consumed(directory: Path) -> dict[tuple[int, int], set[str]]:
    """What was read for each (step, micro-batch), by all commands in `directory` together."""
    found = defaultdict(set)
    for line in (directory / CONSUMED).read_text().splitlines():
        step, micro, digest = line.split()
        found[int(step), int(micro)].add(digest)
    return dict(found)


def reached(directory: Path) -> list[tuple[str, int | None]]:
    """The points that traced commands in `directory` came to, in order, with their steps."""
    lines = (line.split(" ") for line in (directory / REACHED).read_text().splitlines())
    return [(point, int(step) if step else None) for point, step in lines]


def outcome(directory: Path) -> dict[str, Any]:
    """All that must be equal between two runs of one configuration."""
    return {**bits(run_of(directory)), "consumed": consumed(directory)}
