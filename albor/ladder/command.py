"""`albor ladder`: the way up, and what is printed and written whatever ends it."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from albor import durable
from albor.errors import AlborError, ConfigError, DoesNotFit
from albor.group_directory import claim_group
from albor.ladder.climb import Climb
from albor.ladder.dry_run import plan_ladder, print_plan
from albor.ladder.file import LadderFile, load_ladder
from albor.ladder.report import as_json, markdown, print_report, report_path
from albor.ladder.state import STATE, State
from albor.runs.owner import LOCK
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

    def say(line: str) -> None:
        console.out(line, highlight=False)

    with claim_group(file.ladder.directory, STATE, LOCK, say), StopRequest() as stop:
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
