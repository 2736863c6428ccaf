"""`albor report`: checks what is asked for, gathers the runs, and writes the page whole or not at all."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from albor.durable import replace_file
from albor.errors import AlborError, ConfigError, Problem
from albor.report.gather import gather, label_runs
from albor.report.page import MARK, MOST_RUNS, render
from albor.runs.record import Run, open_run

_SEARCHED = 4096  # bytes at the beginning of a file in which the mark stands


@dataclass(frozen=True)
class Written:
    """A page that was written."""

    path: Path
    size: int
    runs: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "path": str(self.path),
            "bytes": self.size,
            "runs": list(self.runs),
            "problems": list(self.problems),
        }


def write_report(directories: Sequence[Path], out: Path, *, force: bool = False) -> Written:
    """Writes the page about the runs in `directories` to the file `out`.

    Raises ConfigError, with everything that is wrong, for what is no run and for a file that is not to be
    replaced; AlborError where plotly is missing or the file cannot be written, and then what was there stays.
    """
    runs = _check(directories, out, force)
    plotly = _plotly()
    room = Path(__file__).parent
    style, script = ((room / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    labels = label_runs([run.directory for run in runs])
    gathered = [gather(run, label, len(runs)) for run, label in zip(runs, labels, strict=True)]
    made = datetime.now(UTC).strftime("%Y-%m-%d at %H:%M UTC")
    # A text may hold halves of characters (from "\ud800" in JSON), which no file can.
    content = render(gathered, plotly, style, script, made).encode(errors="replace")
    try:
        replace_file(out, content)
    except OSError as error:
        raise AlborError(
            f"{out} cannot be written: {error.strerror or error}; free space, or give another --out"
        ) from error
    problems = tuple(problem for run in gathered for problem in run.problems)
    return Written(out, len(content), tuple(str(run.directory) for run in runs), problems)


def _check(directories: Sequence[Path], out: Path, force: bool) -> list[Run]:
    problems: list[Problem] = []
    runs: list[Run] = []
    for directory in directories:
        try:
            runs.append(open_run(directory))
        except ConfigError as error:
            problems += error.problems
    seen: dict[Path, Path] = {}
    for run in runs:
        place = run.directory.resolve()
        if place in seen:
            problems.append(_problem("RUN", f"{run.directory} is given twice", "name each run once"))
        seen[place] = run.directory
    if len(directories) > MOST_RUNS:
        message = f"{len(directories)} runs are more than can be told apart"
        problems.append(_problem("RUN", message, f"give at most {MOST_RUNS}"))
    problems += _check_target(out, force)
    if problems:
        raise ConfigError(problems)
    return runs


def _check_target(out: Path, force: bool) -> list[Problem]:
    try:
        if out.is_dir():
            return [_problem("--out", f"{out} is a directory", "give a file, such as report.html")]
        if not out.parent.is_dir():
            return [_problem("--out", f"there is no directory {out.parent}", f"run: mkdir -p {out.parent}")]
        if os.path.lexists(out) and not out.is_file():
            return [_problem("--out", f"{out} is no regular file", "give another name")]
        if os.path.lexists(out) and not force and not is_ours(out):
            message, remedy = f"{out} exists, and is no report of albor", "give another name, or --force"
            return [_problem("--out", message, remedy)]
    except OSError as error:
        return [_problem("--out", f"{out}: {error.strerror or error}", "give another name")]
    return []


def is_ours(path: Path) -> bool:
    """Whether the file at `path` is a report, which another may replace."""
    with open(path, "rb") as file:
        return MARK.encode() in file.read(_SEARCHED)


def _problem(key: str, message: str, remedy: str) -> Problem:
    return Problem(key, message, remedy, "command line")


def _plotly() -> str:
    """plotly.js out of the Python package, which is not imported for it: that takes a second."""
    found = importlib.util.find_spec("plotly")
    if found is None or not found.submodule_search_locations:
        raise AlborError(
            "albor report needs plotly, which is not installed; run: pip install 'albor[report]'"
        )
    path = Path(next(iter(found.submodule_search_locations))) / "package_data" / "plotly.min.js"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AlborError(
            f"{path} cannot be read ({error}); run: pip install --force-reinstall 'albor[report]'"
        ) from error
