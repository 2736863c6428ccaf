"""`albor ladder`: the way up, and what is printed and written whatever ends it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from albor import durable
from albor.errors import AlborError, ConfigError, DoesNotFit
from albor.filelock import lock_file
from albor.ladder.climb import Climb
from albor.ladder.dry_run import plan_ladder, print_plan
from albor.ladder.file import LadderFile, load_ladder
from albor.ladder.report import as_json, markdown, print_report, report_path
from albor.ladder.state import STATE, State
from albor.runs.owner import LOCK
from albor.runs.record import occupied_by
from albor.train.signals import StopRequest


def run_dry(path: Path, start: str | None, gpu: str | None, console: Console, *, print_json: bool) -> int:
    """Prints the plan of every rung from `start` on; the exit code says whether all fit."""
    content = plan_ladder(load_ladder(path), gpu, start)
    if print_json:
        print(json.dumps(content))
    else:
        print_plan(content, console)
    return 0 if content["fits"] else DoesNotFit.exit_code


def run_ladder(path: Path, start: str | None, console: Console, *, print_json: bool) -> None:
    """Goes up the ladder in the file at `path`, and reports. Raises the AlborError that ended it, if one did,
    when the report is out.
    """
    file = load_ladder(path)
    ended: AlborError | None = None
    with _claimed(file.ladder.directory, console), StopRequest() as stop:
        stop.defer()
        state = State.open(file.ladder.directory, file.ladder.name)
        climb = Climb(file, state, console, stop)
        try:
            climb.run(start)
        except ConfigError:
            raise
        except AlborError as error:
            ended = error
        content = as_json(file, climb.rungs, state, None if ended is None else str(ended))
        _write_report(file, markdown(content, file))
    if print_json:
        print(json.dumps(content))
    else:
        print_report(content, console)
    if ended is not None:
        raise ended


def _write_report(file: LadderFile, text: str) -> None:
    path = report_path(file)
    try:
        durable.replace_file(path, text.encode())
    except OSError as error:
        raise AlborError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _claimed(directory: Path, console: Console) -> Iterator[None]:
    """Keeps a second ladder out of the directory, and this one out of what is not a ladder's."""
    if (other := occupied_by(directory, STATE)) is not None:
        raise AlborError(f"{directory} is {other}'s directory; choose another name for the ladder")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        claimed = lock_file(directory / LOCK)
    except OSError as error:
        raise AlborError(f"runs_dir: {directory} cannot be used: {error.strerror}") from error
    if claimed is None:
        raise AlborError(
            f"another albor ladder is at work in {directory}; wait for it, or choose another name"
        )
    handle, refusal = claimed
    if refusal:
        warning = f"{directory} cannot be locked ({refusal}); see to it that no other ladder works in it"
        console.out(warning, highlight=False)
    try:
        yield
    finally:
        os.close(handle)
