"""A tracker in a process of its own, `python -m albor.trackers.worker TRACKER RUN`, fed through a pipe.

One JSON object a line. First `{"config": {...}, "close_seconds": 30}`, then any of

    {"rewind": 120}                      go on behind step 120; everything goes for -1
    {"row": {...}}, {"event": {...}}     as in metrics.jsonl and events.jsonl
    {"summary": {...}, "step": 200}      the final result
    {"end": 75}                          the run's exit code

The trainer's end is the end of the input, however it comes. The answer is one line, with what went wrong.
A tracker may start threads, services and exit handlers, block, or write to the terminal: here that is nobody
else's.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from albor.config import RunConfig
from albor.trackers.installed import open_sink
from albor.trackers.rows import as_row, past
from albor.trackers.sink import Sink, Source

_NICE = 10
_KILLED = 1  # the exit code of a run that could not say goodbye


def main() -> None:
    """Feeds the tracker until the input ends, and goes whether or not it wants to."""
    tracker, directory = sys.argv[1], Path(sys.argv[2])
    messages, report = _take_over_pipes()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the trainer's, which closes our input
    with suppress(OSError):
        os.nice(_NICE)  # the processor is the training's first
    try:
        lines = iter(messages)
        first = json.loads(next(lines))
        config = RunConfig.model_validate(first["config"])
        sink = open_sink(tracker, Source(directory, config))
        threading.Thread(
            target=_end_late, args=(messages.fileno(), first["close_seconds"]), daemon=True
        ).start()
        follow(sink, directory, (json.loads(line) for line in lines))
        sys.stdout.flush()
    except BaseException as error:
        with suppress(OSError):
            os.write(report, (json.dumps({"problem": _describe(error)}) + "\n").encode())
        os._exit(1)  # what a tracker that failed still wants to do at exit may take for ever
    with suppress(OSError):
        os.write(report, b'{"done": true}\n')


def follow(sink: Sink, directory: Path, messages: Iterable[Mapping[str, Any]]) -> None:
    """Tells the sink what the messages say; samples of one step together."""
    samples: list[tuple[str, str | None]] = []
    step, exit_code = 0, _KILLED

    def give_samples() -> None:
        if samples:
            sink.samples(step, list(samples))
            samples.clear()

    for message in _with_the_past(sink, directory, messages):
        event = message.get("event", {})
        if samples and event.get("step") != step:
            give_samples()
        if event:
            step = event["step"]
            samples.append((event["prompt"], event["text"]))
        elif "row" in message:
            row = as_row(message["row"])
            sink.row(row.step, row.tokens, row.metrics, row.seconds)
        elif "summary" in message:
            sink.summary(message["step"], message["summary"])
        elif "end" in message:
            exit_code = message["end"]
    give_samples()
    sink.close(exit_code)


def _with_the_past(
    sink: Sink, directory: Path, messages: Iterable[Mapping[str, Any]]
) -> Iterator[Mapping[str, Any]]:
    """The messages; in place of one that rewinds, what the sink then lacks."""
    for message in messages:
        if "rewind" not in message:
            yield message
            continue
        yield {}  # what is collected belongs to what is before
        if sink.rewind(message["rewind"]):
            yield from past(directory, message["rewind"])


def _take_over_pipes() -> tuple[Any, int]:
    """The pipes from and to the trainer, under numbers that no service of a tracker inherits; in their place
    stands what swallows everything.
    """
    messages, report = os.dup(0), os.dup(1)  # dup: not inheritable
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    return os.fdopen(messages, encoding="utf-8"), report


def _end_late(messages: int, seconds: float) -> None:
    """Ends this process `seconds` after the trainer has closed our input, or is gone."""
    poll = select.poll()
    poll.register(messages, 0)  # POLLHUP comes unasked, once nobody holds the other end
    while not poll.poll(1000):
        pass
    time.sleep(seconds)
    os._exit(1)


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}" if text else type(error).__name__


if __name__ == "__main__":
    main()
