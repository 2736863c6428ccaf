"""trackio: a database in RUN/trackio or in `track.trackio_dir`, for `TRACKIO_DIR=... trackio show`.

Local, always: a Space may be made of the database afterwards (`trackio sync`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from albor.trackers.rows import last_step
from albor.trackers.sink import RunId, Source, describe_samples, directory_of


class Trackio:
    """Rows by their names, and `tokens`; samples as Markdown. NaN and infinity are kept as such."""

    def __init__(self, source: Source):
        directory = directory_of(source, "trackio")
        self._source, self._id = source, RunId(directory)
        self._project, self._name = source.config.track.project, source.config.name
        self._problem: str | None = None
        self._run: Any = None
        chosen = source.config.track.trackio_dir
        os.environ["TRACKIO_DIR"] = str(Path(chosen).absolute() if chosen else directory)
        # trackio asks the hub who one is, and takes a Space or a server from the environment.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_BUCKET_ID", "TRACKIO_WEBHOOK_URL"):
            os.environ.pop(name, None)
        # What its thread cannot write it drops with a warning: for us that is a failure, at the next call.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = self._heed

    def rewind(self, step: int) -> bool:
        """trackio cannot forget rows of a run: one that has any beyond `step` is written anew, under its
        name. So is one that lacks the last before: the trainer was killed before it had handed them over.
        """
        import trackio

        if self._run is not None:
            self._run.finish()
        known = self._find()
        logged = last_step(self._source.directory, step)
        if known is not None and step >= 0 and logged <= self._last_step(known) <= step:
            self._run = self._begin(trackio, "must")
            if self._run.id == known.id:
                return False
            self._run.finish()  # of that name there is a newer one, of another run in the same database
        if known is not None:
            known.delete()
        self._run = self._begin(trackio, "never")
        self._id.write(self._run.id)
        return True

    def row(self, step: int, tokens: int, metrics: Mapping[str, float], seconds: float) -> None:
        self._log({"tokens": tokens, **metrics}, step)

    def samples(self, step: int, samples: Sequence[tuple[str, str | None]]) -> None:
        import trackio

        self._log({"samples": trackio.Markdown(describe_samples(samples))}, step)

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        self._log({f"final/{name}": value for name, value in values.items()}, step)

    def close(self, exit_code: int) -> None:
        self._run.finish()  # waits for its thread
        self._check()

    def _begin(self, trackio: Any, resume: str) -> Any:
        return trackio.init(
            project=self._project,
            name=self._name,
            group=self._source.config.track.group,
            config=self._source.config.model_dump(mode="json"),
            resume=resume,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def _find(self) -> Any:
        """This run in the database; None if it is not there."""
        import trackio

        run_id = self._id.read()
        try:
            runs = trackio.Api().runs(self._project)
        except ValueError:  # no such project
            return None
        return next((run for run in runs if run.id == run_id), None)

    def _last_step(self, run: Any) -> int:
        from trackio.sqlite_storage import SQLiteStorage

        last = SQLiteStorage.get_max_step_for_run(self._project, run.name, run_id=run.id)
        return -1 if last is None else last

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._check()
        self._run.log(values, step=step)

    def _check(self) -> None:
        if self._problem is not None:
            raise RuntimeError(self._problem)

    def _heed(self, message: Warning | str, *where: Any, **more: Any) -> None:
        text = str(message)
        if "trackio" in text.lower() or "could not" in text.lower():
            self._problem = self._problem or text
