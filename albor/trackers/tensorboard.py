"""TensorBoard: event files in RUN/tensorboard, for `tensorboard --logdir runs`.

Written with TensorBoard's own writer, which needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from albor.configfile import dump_config
from albor.trackers.sink import Source, describe_samples, directory_of


class TensorBoard:
    """Scalars by their names, and `tokens`; samples and the configuration as text."""

    def __init__(self, source: Source):
        self._directory = directory_of(source, "tensorboard")
        self._config = source.config
        self._writer: EventFileWriter | None = None
        self._seconds = 0.0  # of the last row: text has no time of its own

    def rewind(self, step: int) -> bool:
        """Event files only grow: one that begins with SessionLog.START tells the reader to forget the steps
        from there on (`purge_step` in PyTorch's SummaryWriter). What another process wrote is written anew:
        it may have been killed before it had all.
        """
        earlier = list(self._directory.glob("events.out.tfevents.*"))
        if self._writer is not None:
            self._writer.close()
        elif earlier:
            step = -1
        if step < 0:
            for path in earlier:
                path.unlink()
        self._writer = EventFileWriter(str(self._directory), flush_secs=10)
        if earlier:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(step=step + 1, wall_time=time.time(), session_log=start))
        text = f"    {dump_config(self._config).rstrip()}".replace("\n", "\n    ")
        self._add(Event(step=step + 1, wall_time=time.time(), summary=text_pb("config", text)))
        return step < 0

    def row(self, step: int, tokens: int, metrics: Mapping[str, float], seconds: float) -> None:
        self._seconds = seconds
        values = {"tokens": float(tokens), **metrics}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        self._add(Event(step=step, wall_time=seconds, summary=summary))

    def samples(self, step: int, samples: Sequence[tuple[str, str | None]]) -> None:
        text = text_pb("samples", describe_samples(samples))
        self._add(Event(step=step, wall_time=self._seconds, summary=text))

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        found = [Summary.Value(tag=f"final/{name}", simple_value=value) for name, value in values.items()]
        self._add(Event(step=step, wall_time=self._seconds, summary=Summary(value=found)))

    def close(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()

    def _add(self, event: Event) -> None:
        assert self._writer is not None, "rewind comes first"
        self._writer.add_event(event)
