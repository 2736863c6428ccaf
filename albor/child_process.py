"""Other albor commands as processes of their own: each ends with this one, and says what it says line by
line.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import IO

_KEPT_LINES = 200  # the last words, for when it fails
_LONGEST_LINE = 1 << 16  # characters; what is longer is cut, not kept in memory until it ends
_POLL_SECONDS = 0.05


class Child:
    """`albor ARGUMENTS`, from its start. What it prints goes to `on_line`, from a thread of its own.

    It has a session of its own: a Ctrl-C that is typed is for whoever started it to deal with. Leaving the
    block kills what still runs. With a file as `output`, standard output goes there (an object of `--json`
    may be longer than a line), and only standard error to `on_line`.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        on_line: Callable[[str], None] = lambda line: None,
        environment: Mapping[str, str] | None = None,
        output: IO[bytes] | None = None,
    ):
        self._on_line, self._lines, self._asked = on_line, list[str](), False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "albor.child", str(os.getpid()), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if output is None else output,
            stderr=subprocess.STDOUT if output is None else subprocess.PIPE,
            start_new_session=True,
            encoding="utf-8",
            errors="replace",
        )
        pipe = self._process.stdout or self._process.stderr
        assert pipe is not None
        self._pipe: IO[str] = pipe
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills it where it still runs, and returns when all that it has said was passed on."""
        if self._pipe.closed:
            return  # its number may be another process's by now
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers too, where it has ended itself
        self._process.wait()
        self._reader.join()  # nobody holds the pipe's other end any more
        self._pipe.close()

    def poll(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Asks it to save and to end, as SIGTERM does; once, for a second time would end it at once."""
        if not self._asked:
            self._asked = True
            self._process.terminate()

    @property
    def last_words(self) -> str:
        """The end of what it has printed."""
        return "\n".join(self._lines[-15:])

    def _read(self) -> None:
        while line := self._pipe.readline(_LONGEST_LINE):
            self._lines.append(line.rstrip("\n"))
            del self._lines[:-_KEPT_LINES]
            self._on_line(self._lines[-1])


def wait_for_one(children: Sequence[Child], is_stopped: Callable[[], bool]) -> Child:
    """The first of `children` that ends. When `is_stopped`, all are asked to."""
    while True:
        for child in children:
            if child.poll() is not None:
                return child
        if is_stopped():
            for child in children:
                child.stop()
        time.sleep(_POLL_SECONDS)
