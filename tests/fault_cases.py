"""A run that is small enough to be killed hundreds of times, the process that runs it, and the oracle.

The oracle: whatever happened to a run on its way, once it has finished, the newest checkpoint verifies and is
equal in every byte to the one of a run that nothing happened to, and so are the logged numbers; and every
micro-batch was the one that belongs to its place.
"""

from __future__ import annotations

import itertools
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import run_cases
from fault_server import CONSUMED, POISONED, REACHED, TRACE
from run_cases import ENVIRONMENT, Result, bits

from albor.checkpoint import find_latest, list_checkpoints, verify
from albor.errors import CheckpointError
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
        output = f"command-{len(list(directory.glob('command-*.out')))}"
        for kind in (".out", ".err"):  # it may be killed before it opens them
            directory.joinpath(output + kind).touch()
        request = {
            "directory": str(directory),
            "arguments": [str(argument) for argument in arguments],
            "environment": {VARIABLE: fault, **(environment or {})},
            "output": output,
            "mutation": mutation,
        }
        return Child(self._address, request)

    def run(self, directory: Path, *arguments: object, **keywords: Any) -> Result:
        """`start`, and wait."""
        return self.start(directory, *arguments, **keywords).wait()


@dataclass(frozen=True)
class Variant:
    """A way of running the configuration; each has an undisturbed run of its own."""

    name: str
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


PLAIN = Variant("plain")
ROUNDED = Variant("random rounding", ("train.precision=bf16", "optimizer.state_dtype=bf16"))
BACKGROUND = Variant("background saves", ("checkpoint.background=true",))
# Five steps after the first checkpoint have a loss of NaN, and the run goes back to it.
ROLLED_BACK = Variant("rollback", environment={POISONED: "16-25"})


class NotReached(Exception):
    """A case did not come to what it is about, which is no verdict on it."""


def reach(condition: object, what: object) -> None:
    """Raises NotReached unless `condition`."""
    if not condition:
        raise NotReached(what)


class Bench:
    """The server, what undisturbed runs come to, and directories for disturbed ones."""

    def __init__(self, server: Server, directory: Path, variants: Sequence[Variant] = (PLAIN,)):
        self.server, self._directory, self._numbers = server, directory, itertools.count()
        self.project = directory / "project"
        self.config = write_project(self.project)
        self.expected: dict[str, dict[str, Any]] = {}
        self.points: dict[str, list[tuple[str, int | None]]] = {}
        for variant in variants:
            undisturbed = self.fresh()
            result = self.train(undisturbed, variant=variant, trace=True)
            reach(result.code == 0, f"the undisturbed run ({variant.name}) failed: {result.err}")
            self.expected[variant.name] = outcome(undisturbed)
            self.points[variant.name] = reached(undisturbed)

    def fresh(self) -> Path:
        """The path of a new directory."""
        return self._directory / str(next(self._numbers))

    def start(
        self,
        directory: Path,
        *arguments: str,
        variant: Variant = PLAIN,
        environment: Mapping[str, str] | None = None,
        trace: bool = False,
        **keywords: Any,
    ) -> Child:
        """`albor train` in `directory`; keywords as in `Server.start`."""
        variables = {**variant.environment, **(environment or {}), TRACE: "1" if trace else ""}
        given = (*variant.arguments, *arguments)
        return self.server.start(directory, "train", self.config, *given, environment=variables, **keywords)

    def train(self, directory: Path, *arguments: str, **keywords: Any) -> Result:
        """`start`, and wait."""
        return self.start(directory, *arguments, **keywords).wait()

    def finish(self, directory: Path, *arguments: str, variant: Variant = PLAIN, mutation: str = "") -> None:
        """The same command, undisturbed, goes on from the newest checkpoint, comes to what an undisturbed run
        does, and leaves nothing else.
        """
        result = self.train(directory, *arguments, variant=variant, mutation=mutation)
        assert result.code == 0, result.err
        self.compare(directory, variant)
        assert "passed over" not in result.out, "a checkpoint that was saved was passed over"
        litter = [path.name for path in (run_of(directory) / "checkpoints").glob(".*")]
        assert not litter, f"left behind: {litter}"

    def compare(self, directory: Path, variant: Variant = PLAIN) -> None:
        """The run in `directory` has come to what an undisturbed one does."""
        differs = differences(outcome(directory), self.expected[variant.name])
        assert not differs, f"differs in {', '.join(differs)}"


def newest(directory: Path) -> int:
    """The step that a run in `directory` would go on from; whatever has a checkpoint's name is one."""
    checkpoints = run_of(directory) / "checkpoints"
    try:
        for path in list_checkpoints(checkpoints):
            verify(path)
    except CheckpointError as error:
        raise AssertionError(str(error)) from error
    latest = find_latest(checkpoints)
    return int(latest.name.removeprefix("step-")) if latest is not None else 0


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


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what two outcomes are not equal, the files of the checkpoint by their names."""
    files = found["saved"].keys() | expected["saved"].keys()
    parts = [key for key in ("step", "consumed", "rows") if found[key] != expected[key]]
    return parts + sorted(file for file in files if found["saved"].get(file) != expected["saved"].get(file))
