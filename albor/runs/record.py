"""A run directory as it is read: configuration, environment, plan, metrics, events, final report.

Whatever is missing, damaged or of another version of albor is left out and named in `problems`, each with its
file and line, and the rest is there: a log with one bad line is still a log. Files are read when they are
asked for, so that a list of a thousand runs does not parse a thousand configurations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from albor.config import RunConfig
from albor.configfile import load_config
from albor.errors import ConfigError, Problem
from albor.runlog import EVENTS, METRICS, known_metric, known_metrics, parse_row
from albor.runs.owner import LOCK
from albor.strictjson import from_json, read_bounded
from albor.yamlcore import read_yaml

CONFIG = "config.resolved.yaml"
FINAL = "eval/final.json"
DEPTH = 3  # directories below the root in which runs are looked for: RUNS/LADDER/RUNG

GROUPS = {"ladder.json": "ladder", "sweep.json": "sweep"}  # what makes the runs in one directory a group
_MARKS = (CONFIG, METRICS, EVENTS)  # a directory that holds one of these is a run's
_MOST_PROBLEMS = 10  # lines of one file that are named
_LONGEST_LINE = 2**16  # of the first event, which is short
_REMEDY = "give a run directory, such as runs/my-run"


class Metrics:
    """What metrics.jsonl holds, oldest row first.

    A run that was killed and goes on writes its last rows again; those that stand twice count once, as they
    were written last.
    """

    def __init__(self, path: Path):
        self.path = path
        rows, self.problems = read_log(path, _is_row, "a row of metrics")
        self.rows = _without_rewound(rows)

    @cached_property
    def names(self) -> list[str]:
        """Every metric that some row holds, in the order in which they first come."""
        names: dict[str, None] = {}
        for row in self.rows:
            names |= dict.fromkeys(known_metrics(row))
        return list(names)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which the metric is known, and its values; NaN and infinity are among them."""
        steps: list[int] = []
        values: list[float] = []
        for row in self.rows:
            value = known_metric(row, name)
            if value is None:
                continue
            if steps and steps[-1] == row["step"]:  # written again
                steps.pop(), values.pop()
            steps.append(row["step"])
            values.append(value)
        return steps, values

    def tokens_at(self, step: int) -> int | None:
        """Tokens that the run had read after `step`; None for a step without a row."""
        return self._tokens.get(step)

    @cached_property
    def _tokens(self) -> dict[int, int]:
        return {row["step"]: row["tokens"] for row in self.rows if type(row.get("tokens")) is int}


@dataclass(frozen=True)
class Run:
    """One run directory. Nothing is read before it is asked for; what cannot be read is in `problems`."""

    directory: Path
    name: str

    @property
    def config(self) -> RunConfig | None:
        """What the run trains, without keys that this albor does not know (`problems` names them); None where
        config.resolved.yaml cannot be understood.
        """
        return self._config[0]

    @property
    def environment(self) -> dict[str, Any]:
        """env.json: what a result may depend on besides the configuration."""
        return self._environment[0]

    @property
    def plan(self) -> dict[str, Any]:
        """plan.json: the memory that was planned."""
        return self._plan[0]

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the files that describe the run. The logs have their own."""
        return (*self._config[1], *self._environment[1], *self._plan[1], *self._final[1])

    def metrics(self) -> Metrics:
        """The metrics as they are now."""
        return Metrics(self.directory / METRICS)

    def events(self) -> list[dict[str, Any]]:
        """What happened, oldest first; `event_log` says what is wrong with the file too."""
        return self.event_log()[0]

    def event_log(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """The events, and a problem for each line that is none."""
        return read_log(self.directory / EVENTS, _is_event, "an event")

    def final(self) -> dict[str, Any] | None:
        """eval/final.json, the report at the end of the run; None before there is one."""
        return self._final[0] or None

    @cached_property
    def _config(self) -> tuple[RunConfig | None, tuple[str, ...]]:
        path = self.directory / CONFIG
        if not os.path.lexists(path):
            return None, (f"{path}: is missing; the run has not begun, or was copied without it",)
        try:
            return load_config(path), ()
        except ConfigError as error:
            problems = error.problems[:_MOST_PROBLEMS]
        # Of a run of another albor, what both know.
        config = _understood(path)
        remedy = "; it is left out" if config is not None else ""
        return config, tuple(
            f"{problem.where}: {problem.key}: unknown to this albor{remedy}"
            if problem.message == "unknown key"
            else str(problem)
            for problem in problems
        )

    @cached_property
    def _environment(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        return _read_object(self.directory / "env.json")

    @cached_property
    def _plan(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        return _read_object(self.directory / "plan.json")

    @cached_property
    def _final(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        return _read_object(self.directory / FINAL)


def open_run(path: Path) -> Run:
    """The run in the directory `path`. Raises ConfigError where that is none, and says what is there."""
    path = Path(path)
    if is_run(path):
        return _run(path)
    raise ConfigError([Problem("RUN", f"{path} {_what_it_is(path)}", _REMEDY, "command line")])


def find_runs(root: Path) -> list[Run]:
    """The runs in the directory `root` and up to DEPTH levels below it, the first started first.

    A directory that cannot be read holds none. One that is reached by two paths counts once.
    """
    found: dict[tuple[int, int], Run] = {}
    for directory in _directories(Path(root), DEPTH):
        try:
            status = directory.stat()
        except OSError:
            continue
        found.setdefault((status.st_dev, status.st_ino), _run(directory))
    return sorted(found.values(), key=lambda run: (began(run.directory), str(run.directory)))


def is_run(directory: Path) -> bool:
    """Whether a run has been started in `directory`. A ladder's or a sweep's is none: it has a lock too."""
    try:
        if any(os.path.lexists(directory / name) for name in GROUPS):
            return False
        if any(os.path.lexists(directory / mark) for mark in _MARKS):
            return True
        # One that still prepares its data has a lock, and nothing else yet.
        return os.path.lexists(directory / LOCK) and os.listdir(directory) == [LOCK]
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return False


def occupied_by(directory: Path, own: str) -> str | None:
    """What else has been at work in a directory that a group with the state file `own` wants: `a run`, `a
    sweep`; None where nothing has.
    """
    if any(os.path.lexists(directory / mark) for mark in _MARKS):
        return "a run"
    others = (kind for name, kind in GROUPS.items() if name != own and os.path.lexists(directory / name))
    return next((f"a {kind}" for kind in others), None)


def began(directory: Path) -> str:
    """When the run first began, in ISO 8601 (UTC); empty where nothing tells."""
    try:
        with open(directory / EVENTS, "rb") as file:
            event = parse_row(file.readline(_LONGEST_LINE)) or {}
    except OSError:
        return ""
    time = event.get("time")
    return time if isinstance(time, str) else ""


def read_log(
    path: Path, fits: Callable[[dict[str, Any]], bool], what: str
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
    """The lines of a log that are rows and for which `fits` holds, and a problem for each that is none.

    A last line without an end is still being written, or was torn by a crash: it is no problem, and no row.
    """
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                row = parse_row(line)
                if row is not None and fits(row):
                    rows.append(row)
                elif line.strip():
                    bad.append(number)
    except FileNotFoundError:
        pass
    except OSError as error:
        return rows, (f"{path}: cannot be read: {error.strerror or error}",)
    problems = [f"{path}:{number}: not {what}, and left out" for number in bad[:_MOST_PROBLEMS]]
    if len(bad) > _MOST_PROBLEMS:
        problems.append(f"{path}: and {len(bad) - _MOST_PROBLEMS:,} more such lines")
    return rows, tuple(problems)


def _is_row(row: dict[str, Any]) -> bool:
    return type(row.get("step")) is int


def _is_event(row: dict[str, Any]) -> bool:
    return isinstance(row.get("event"), str)


def _without_rewound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` in the order of their steps: where a step comes again after later ones, those are void."""
    kept: list[dict[str, Any]] = []
    for row in rows:
        while kept and kept[-1]["step"] > row["step"]:
            kept.pop()
        kept.append(row)
    return kept


def _understood(path: Path) -> RunConfig | None:
    """The configuration at `path` without the keys that are unknown here; None where that is none."""
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), str(path)).value
        for _ in range(2):
            try:
                return RunConfig.model_validate(values)
            except ValidationError as error:
                unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
                if not unknown:
                    return None
                for place in unknown:
                    _remove(values, place)
    except (OSError, ValueError, ConfigError):
        pass
    return None


def _remove(values: Any, place: Sequence[int | str]) -> None:
    *above, last = place
    for step in above:
        inside = step in values if isinstance(values, dict) else isinstance(step, int)
        values = values[step] if inside else values  # a source's kind is in the place, and not in the file
    del values[last]


def _read_object(path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        content = from_json(read_bounded(path))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError:
        return {}, ()
    except OSError as error:
        return {}, (f"{path}: cannot be read: {error.strerror or error}",)
    except ValueError as error:
        line = f":{error.lineno}" if hasattr(error, "lineno") else ""
        return {}, (f"{path}{line}: not what a run writes ({error}), and left out",)
    return content, ()


def _run(directory: Path) -> Run:
    return Run(directory, directory.name or directory.resolve().name)


def _directories(root: Path, depth: int) -> Iterator[Path]:
    """The run directories in `root`; inside a run there are no others."""
    if is_run(root):
        yield root
        return
    if depth == 0:
        return
    try:
        entries = sorted(os.scandir(root), key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError:
        return
    for entry in entries:
        try:
            inside = not entry.name.startswith(".") and entry.is_dir()
        except OSError:
            continue
        if inside:
            yield from _directories(root / entry.name, depth - 1)


def _what_it_is(path: Path) -> str:
    try:
        if not path.exists():
            return "does not exist"
        if not path.is_dir():
            return "is a file"
        inside = sorted(entry.name for entry in os.scandir(path))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError:  # a NUL in the path
        return "cannot be a path"
    runs = [str(run.directory.relative_to(path)) for run in find_runs(path)]
    if runs:
        return f"is no run, and holds {_listed(runs)}"
    if not inside:
        return "is an empty directory"
    if "manifest.json" in inside:
        return "is a checkpoint or an export of a run, and not the run itself"
    return f"is a directory without a run; in it: {_listed(inside)}"


def _listed(names: list[str]) -> str:
    shown, more = ", ".join(names[:5]), len(names) - 5
    return f"{shown} and {more:,} more" if more > 0 else shown
