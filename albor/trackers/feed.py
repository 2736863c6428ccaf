"""The trainer's side of the trackers: it hands over, and never waits.

Each tracker has a process of its own (`albor.trackers.worker`), which cannot slow, crash, hang or outlive the
training, and a thread here that writes to its pipe from a bounded queue. What does not fit is left out there
and counted; metrics.jsonl has it, and `albor track` makes the tracker's copy anew.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from albor.config import RunConfig
from albor.trackers.rows import messages

QUEUED = 4096  # messages, of a kilobyte or two each
CLOSE_SECONDS = 30.0  # that a tracker has from the end of the run
_PATIENCE = 2.0  # seconds of waiting after which it is said
_EVENTS = ("sample",)


class Feed:
    """One tracker's process, queue and thread. No call raises, and only `close` waits."""

    def __init__(
        self,
        tracker: str,
        directory: Path,
        config: RunConfig,
        queued: int = QUEUED,
        close_seconds: float = CLOSE_SECONDS,
    ):
        self.tracker = tracker
        self.left_out = 0  # messages that the tracker did not get
        self.problem: str | None = None
        self._done = False
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._queued = queued
        command = [sys.executable, "-m", "albor.trackers.worker", tracker, str(directory)]
        # No GPU, no threads; a session of its own: a Ctrl-C that is typed is the trainer's.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self.problem = f"its process cannot be started: {error.strerror or error}"
            return
        self._queue.put({"config": config.model_dump(mode="json"), "close_seconds": close_seconds})
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._writer.start()
        self._reader.start()

    def put(self, message: dict[str, Any], *, wait: bool = False) -> None:
        """Hands over a message, or counts it where there is no room or no tracker any more. `wait`: for room,
        as only a reader of an old run can.
        """
        while self.problem is None:
            if self._queue.qsize() < self._queued:
                self._queue.put(message)
                return
            if not wait:
                if "rewind" in message:  # what it would write from here on would stand there twice
                    self._fail("it did not keep up when the run went back")
                break
            time.sleep(0.01)
        self.left_out += 1

    def finish(self, exit_code: int) -> None:
        """Nothing more comes; returns at once. A full queue has room for this: a tracker that is slow, and
        never hears of the end, would be waited for in vain.
        """
        self._queue.put({"end": exit_code})
        self._queue.put(None)

    def ends_within(self, seconds: float) -> bool:
        """Whether the tracker's process ends in that time."""
        if hasattr(self, "_process"):
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
        return True

    def close(self, seconds: float, since: float | None = None) -> None:
        """Gives the tracker that long, from now or since then, to write what it has, and ends it."""
        if not hasattr(self, "_process"):
            return
        deadline = (time.monotonic() if since is None else since) + seconds
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))
        if self._process.poll() is None:
            self._fail(f"it did not end within {seconds:g} seconds")
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(max(1.0, deadline - time.monotonic()))  # what it said last
        if not self._done:
            self._fail("its process has ended")

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem

    def _write(self) -> None:
        """Thread: from the queue into the pipe. A tracker that hangs holds this up, and nothing else."""
        pipe = self._process.stdin
        assert pipe is not None
        try:
            while (message := self._queue.get()) is not None:
                pipe.write((json.dumps(message) + "\n").encode())
                if self._queue.empty():
                    pipe.flush()
        except OSError:
            pass  # it is gone, and the other thread knows why
        with suppress(OSError):
            pipe.close()

    def _read(self) -> None:
        """Thread: what the worker says, until it ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with suppress(ValueError):
                said = json.loads(line)
                self._done = self._done or "done" in said
                if "problem" in said:
                    self._fail(str(said["problem"])[:1000])
        if not self._done:
            self._fail("its process has ended")


class Trackers:
    """All trackers of a run, as its log feeds them (`MetricsLog.follower`).

    `say` gets a message and `record` an event where a tracker fails: once, and once more at the end with what
    it lacks.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        say: Callable[[str], None],
        record: Callable[..., None],
    ):
        self._directory, self._say, self._record = directory, say, record
        self._feeds = [Feed(tracker, directory, config) for tracker in config.track.to]
        self._reported: set[str] = set()
        self._step: int | None = None

    def row(self, record: Mapping[str, Any]) -> None:
        """A row as metrics.jsonl has it, but with NaN and infinity."""
        self._step = record["step"]
        self._put({"row": dict(record)})

    def event(self, record: Mapping[str, Any]) -> None:
        """An event as events.jsonl has it."""
        if record["event"] in _EVENTS:
            self._put({"event": dict(record)})

    def rewind(self, step: int) -> None:
        """The run goes on behind `step`."""
        self._step = step
        self._put({"rewind": step})

    def summary(self, step: int, values: Mapping[str, Any]) -> None:
        """The final result; what is no number is left out."""
        self._put({"summary": numbers(values), "step": step})

    def close(self, exit_code: int, seconds: float) -> None:
        """The run ends with `exit_code`; returns within about `seconds`."""
        since = time.monotonic()
        for feed in self._feeds:
            feed.finish(exit_code)
        late = [feed.tracker for feed in self._feeds if not feed.ends_within(min(_PATIENCE, seconds))]
        if late:
            self._say(f"waiting for {' and '.join(late)} to write what is left, at most {seconds:g} seconds")
        for feed in self._feeds:
            feed.close(seconds, since)
        self._report()
        for feed in self._feeds:
            if feed.left_out or feed.problem:
                again = f"albor track {self._directory} --to {feed.tracker}"
                self._record("tracker_incomplete", self._step, tracker=feed.tracker, left_out=feed.left_out)
                self._say(f"{feed.tracker} lacks rows of this run; all are in metrics.jsonl: {again}")

    def _put(self, message: dict[str, Any]) -> None:
        for feed in self._feeds:
            feed.put(message)
        self._report()

    def _report(self) -> None:
        for feed in self._feeds:
            problem = feed.problem or ("it does not keep up" if feed.left_out else None)
            if problem is not None and feed.tracker not in self._reported:
                self._reported.add(feed.tracker)
                self._record("tracker_failed", self._step, tracker=feed.tracker, error=problem)
                self._say(f"{feed.tracker}: {problem}; training goes on")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those of `values` that are numbers."""
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def send_run(
    feed: Feed,
    rows: Iterable[Mapping[str, Any]],
    events: Iterable[Mapping[str, Any]],
    final: Mapping[str, Any],
) -> int:
    """Hands over a run that is on the disk. Returns how many rows it has."""
    feed.put({"rewind": -1}, wait=True)
    step, count = 0, 0
    for message in messages(rows, events):
        if "row" in message:
            step, count = message["row"]["step"], count + 1
        feed.put(message, wait=True)
    if final:
        feed.put({"summary": numbers(final), "step": step}, wait=True)
    return count
