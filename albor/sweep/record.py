"""`sweep.json`: what a sweep has drawn and what came of it, written after every change, read when it goes on.

    {"version": 1, "sweep": {...}, "config": {...}, "trials": [{"values": {"optimizer.lr": 0.004}, "rounds": [
        {"steps": 500, "state": "finished", "metric": 3.9, "reason": ""}]}]}

It holds no time and no path, so that equal sweeps have equal files. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from albor.durable import replace_file
from albor.errors import AlborError, ConfigError, Problem
from albor.strictjson import from_json, read_bounded, to_json
from albor.sweep.file import SweepFile

FILE = "sweep.json"
VERSION = 1
_MAY_CHANGE = ("parallel",)
_TRIALS_MAY_CHANGE = ("random", "tpe")  # of which each trial is drawn by its number alone


class State(StrEnum):
    """What a trial is at, in one round."""

    WAITING = "waiting"
    RUNNING = "running"  # or stopped: it goes on when the sweep does
    FINISHED = "finished"
    DIVERGED = "diverged"
    FAILED = "failed"
    DOES_NOT_FIT = "does not fit"
    REFUSED = "refused"  # its values do not go together

    @property
    def is_over(self) -> bool:
        """Whether the sweep will not touch it any more."""
        return self not in (State.WAITING, State.RUNNING)


# What is wrong with the values rather than with the machine.
FAULT_OF_VALUES = (State.DIVERGED, State.DOES_NOT_FIT, State.REFUSED)


@dataclass(frozen=True)
class Outcome:
    """One round of a trial."""

    steps: int
    state: State
    metric: float | None = None
    reason: str = ""  # of what is neither waiting, running nor finished


@dataclass
class Trial:
    """The values of one trial, and its rounds so far."""

    number: int
    values: dict[str, Any]
    rounds: list[Outcome] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`trial-0003`; trials count from 0."""
        return f"trial-{self.number:04d}"

    def run_name(self, round_number: int) -> str:
        """The name of its run in a round, which is a run of its own."""
        return self.name if round_number == 1 else f"{self.name}-round-{round_number}"

    @property
    def last(self) -> Outcome | None:
        """Its newest round."""
        return self.rounds[-1] if self.rounds else None

    @property
    def metric(self) -> float | None:
        """Of the last round that it finished."""
        return next((one.metric for one in reversed(self.rounds) if one.metric is not None), None)

    def as_json(self) -> dict[str, Any]:
        """For the file."""
        return {"values": self.values, "rounds": [asdict(one) for one in self.rounds]}


@dataclass
class Record:
    """The trials of one sweep, in the file at `path`."""

    path: Path
    definition: dict[str, Any]
    trials: list[Trial]

    def save(self) -> None:
        """Writes the file, whole or not at all. Raises AlborError where it cannot be."""
        content = {"version": VERSION, **self.definition, "trials": [one.as_json() for one in self.trials]}
        try:
            replace_file(self.path, to_json(content))
        except OSError as error:
            raise AlborError(f"{self.path} cannot be written: {error.strerror or error}") from error


def open_record(file: SweepFile) -> Record:
    """The record of the sweep that `file` describes; one without trials where there is none.

    Raises AlborError for a file that this version does not understand, which stays as it is, and ConfigError
    where the sweep has become another one.
    """
    path = file.sweep.directory / FILE
    definition = {
        "sweep": file.sweep.model_dump(mode="json"),
        "config": file.base.model_dump(mode="json", exclude={"name", "runs_dir"}),
    }
    try:
        raw = read_bounded(path)
    except FileNotFoundError:
        return Record(path, definition, [])
    except OSError as error:
        raise AlborError(f"{path} cannot be read: {error.strerror or error}") from error
    remedy = "move its directory away to begin again, or give the sweep another name"
    try:
        found = from_json(raw)
        version = found["version"]
        if version != VERSION:
            raise AlborError(f"{path} has version {version}, and this albor reads {VERSION}; {remedy}")
        trials = [_trial(number, one) for number, one in enumerate(found["trials"])]
        before = {"sweep": dict(found["sweep"]), "config": dict(found["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise AlborError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    _refuse_changes(file, before, definition)
    return Record(path, definition, trials)


def _trial(number: int, given: dict[str, Any]) -> Trial:
    rounds = []
    for one in given["rounds"]:
        metric = None if one["metric"] is None else float(one["metric"])
        rounds.append(Outcome(int(one["steps"]), State(one["state"]), metric, str(one["reason"])))
    return Trial(number, dict(given["values"]), rounds)


def _refuse_changes(file: SweepFile, before: dict[str, Any], after: dict[str, Any]) -> None:
    may_change = [f"sweep.{key}" for key in _MAY_CHANGE]
    if file.sweep.method in _TRIALS_MAY_CHANGE:
        may_change.append("sweep.trials")
    old, new = dict(_leaves(before)), dict(_leaves(after))
    problems = []
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) != new.get(key) and key not in may_change:
            name = key.removeprefix("sweep.")
            message = f"is {new.get(key)!r}, and was {old.get(key)!r} when the sweep began"
            remedy = "restore it, or give the sweep another name"
            problems.append(Problem(name, message, remedy, str(file.path)))
    if problems:
        raise ConfigError(problems)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value
