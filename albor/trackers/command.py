"""`albor track RUN --to TRACKER`: a run's files, written to trackers afterwards, or anew."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from albor.config import RunConfig
from albor.configfile import dump_config, load_config
from albor.errors import AlborError, ConfigError, Problem
from albor.progress import signals_unwind
from albor.runs.record import CONFIG, Run, open_run
from albor.runs.state import State, state_of
from albor.trackers.feed import Feed, send_run
from albor.trackers.installed import missing

_CLOSE_SECONDS = 3600.0  # for what is still to be written, or sent, once everything is handed over


def run_track(
    path: Path,
    trackers: Sequence[str],
    overrides: Sequence[str],
    say: Callable[[str], None],
    *,
    as_json: bool,
) -> int:
    """Writes the run at `path` to each of `trackers`, in place of what they have of it. Returns the exit
    code.

    Raises ConfigError where there is no run, an override is wrong, or a tracker is unknown or not installed,
    and AlborError where the run is being trained.
    """
    run = open_run(path)
    chosen = list(dict.fromkeys(name.strip() for given in trackers for name in given.split(",")))
    config = _configuration(run, [*overrides, f"track.to={json.dumps(chosen)}"], say)
    if problems := [
        Problem("--to", problem.message, problem.remedy, "command line")
        for problem in missing(chosen, "--to")
    ]:
        raise ConfigError(problems)
    if state_of(run) is State.RUNNING:
        raise AlborError(
            f"{run.directory} is being trained, and its trackers (track.to) are fed by that; wait for its end"
        )
    metrics = run.metrics()
    events, lost = run.event_log()
    for problem in (*metrics.problems, *lost):
        say(problem)
    results: dict[str, Any] = {}
    with signals_unwind():
        for tracker in chosen:
            feed = Feed(tracker, run.directory, config, close_seconds=_CLOSE_SECONDS)
            try:
                rows = send_run(feed, metrics.rows, events, run.final() or {})
                feed.finish(0)
                feed.close(_CLOSE_SECONDS)
            except BaseException:
                feed.close(0)
                raise
            results[tracker] = {"rows": rows, "problem": feed.problem}
            say(f"{tracker}: {feed.problem or f'{rows:,} rows of {run.directory}'}")
    if as_json:
        print(json.dumps({"run": str(run.directory), "trackers": results}))
    return 1 if any(result["problem"] for result in results.values()) else 0


def _configuration(run: Run, overrides: Sequence[str], say: Callable[[str], None]) -> RunConfig:
    """The run's, with `overrides`. Of a run of another albor, the keys that this one knows too, and the
    others are said; raises ConfigError where that is none.
    """
    path = run.directory / CONFIG
    try:
        return load_config(path, overrides)
    except ConfigError:
        try:
            load_config(path)
        except ConfigError:
            if run.config is None:
                raise
        else:
            raise  # an override is wrong
    for problem in run.problems:
        say(problem)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as known:
        known.write(dump_config(run.config))
        known.flush()
        return load_config(Path(known.name), overrides)
