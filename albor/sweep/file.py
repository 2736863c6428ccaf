"""The sweep's YAML file: which run, which keys, which values, and how they are chosen.

    configs/sweep-lr.yaml:14: keys.optimizer.lrr: unknown key; did you mean lr?

As strict as a run's file, and by the same parts (`albor.configfile`); what is wrong with the run's own file
is reported too. No torch.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from albor.config import RunConfig, Section, Text
from albor.configfile import apply_override, load_config, read_file, refused, validate_as
from albor.errors import Problem
from albor.metric_names import metric_names
from albor.overrides import Override, find_file, load_overridden
from albor.units import Count, CountOrZero
from albor.yamlcore import COMMAND_LINE, Document, KeyPath

Method = Literal["grid", "random", "tpe", "halving"]
Pair = Annotated[tuple[float, float], Field(strict=False)]

MOST_TRIALS = 1000
MOST_COMBINATIONS = 100_000  # of listed values
_OURS = ("name", "runs_dir", "train.max_hours")  # of a trial's run: the sweep's to set
_HORIZON = ("train.max_steps", "train.max_tokens")
_DIGITS = 3  # of a number that is drawn: more say nothing, and are a burden in a YAML file


class Range(Section):
    """The values of one key: give one of values, log, linear and integer."""

    values: tuple[Any, ...] | None = Field(
        None, strict=False, min_length=1, description="These, each of which the key takes."
    )
    log: Pair | None = Field(
        None, description="Numbers from the first to the second, each factor as likely as any other."
    )
    linear: Pair | None = Field(None, description="Numbers from the first to the second.")
    integer: Annotated[tuple[CountOrZero, CountOrZero], Field(strict=False)] | None = Field(
        None, description="Whole numbers from the first to the second."
    )
    points: Annotated[Count, Field(ge=2, le=MOST_TRIALS)] | None = Field(
        None, description="How many of a range a grid takes, both ends among them."
    )

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends of a range; None where the values are listed."""
        return self.log or self.linear or self.integer

    def rounded(self, value: float) -> float | int:
        """A number of the range as people write it, within the ends."""
        if self.integer is not None:
            return round(value)
        assert self.bounds is not None
        low, high = self.bounds
        return min(max(float(f"{value:.{_DIGITS}g}"), low), high)

    def grid(self) -> list[Any]:
        """What a grid takes: the list, or `points` of a range."""
        if self.values is not None:
            return list(self.values)
        assert self.bounds is not None
        assert self.points is not None
        low, high = self.bounds
        shares = [i / (self.points - 1) for i in range(self.points)]
        if self.log is not None:
            found = [self.rounded(low * (high / low) ** share) for share in shares]
        else:
            found = [self.rounded(low + (high - low) * share) for share in shares]
        return list(dict.fromkeys(found))


class Halving(Section):
    """All trials train a little, the best of them three times as long, the best of these again."""

    factor: Annotated[Count, Field(ge=2, le=10)] = Field(
        3, description="One of so many trials goes on, for so many times as many steps."
    )
    rounds: Count | None = Field(
        None, description="Rounds, of which the last is the whole run; null: until one trial is left."
    )


class Sweep(Section):
    """Runs of one configuration with some of its keys varied."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="The sweep's name, and its directory below runs_dir."
    )
    runs_dir: Text = Field("runs", description="Directory of all runs, relative to the current directory.")
    config: Text = Field(description="The run's YAML file, relative to this one.")
    overrides: tuple[Text, ...] = Field(
        (), strict=False, description="KEY=VALUE that replace keys of that file, in every trial."
    )
    method: Method = Field(
        "random",
        description="grid: every combination; random: draws; tpe: draws that learn from the trials so far; "
        "halving: draws, of which the best go on.",
    )
    trials: Annotated[Count, Field(le=MOST_TRIALS)] | None = Field(
        None, description="How many; null, for a grid only: all combinations."
    )
    parallel: Annotated[Count, Field(le=64)] = Field(1, description="Trials that train at the same time.")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1337, description="Of what is drawn; the runs keep their own."
    )
    metric: Text = Field("val/loss", description="What decides: a metric of metrics.jsonl.")
    goal: Literal["minimize", "maximize"] = Field("minimize", description="Whether less of it is better.")
    keys: dict[str, Range] = Field(
        min_length=1, description="The keys that vary, as `optimizer.lr: {log: [1e-4, 1e-2]}`."
    )
    halving: Halving = Field(default_factory=Halving, description="For method halving.")

    @property
    def directory(self) -> Path:
        """Where its runs lie, and what it writes about them."""
        return Path(self.runs_dir) / self.name

    @property
    def is_finite(self) -> bool:
        """Whether there are only so many combinations."""
        return self.method == "grid" or all(given.values is not None for given in self.keys.values())


@dataclass(frozen=True)
class SweepFile:
    """A sweep that holds together, with the run that it varies."""

    path: Path
    sweep: Sweep
    base: RunConfig  # with the sweep's overrides

    @property
    def config_path(self) -> Path:
        """The run's own file."""
        return self.path.parent / self.sweep.config

    def arguments(self, values: Mapping[str, Any]) -> list[str]:
        """KEY=VALUE of a run in which these keys have these `values`."""
        return [*self.sweep.overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())]

    def config_with(self, values: Mapping[str, Any]) -> RunConfig:
        """That run. Raises ConfigError where its values do not go together."""
        return _load(self.config_path, tuple(self.arguments(values)))


@lru_cache(maxsize=1024)  # a trial is asked for many times
def _load(path: Path, arguments: tuple[str, ...]) -> RunConfig:
    return load_config(path, arguments)


def load_sweep(path: Path) -> SweepFile:
    """The sweep that the file at `path` describes. Raises ConfigError with everything that is wrong."""
    document = read_file(path, "give at least name, config and keys")
    sweep = validate_as(document, Sweep)
    base = None
    if (sound := sweep or _sound_part(document)) is not None:  # what is right is looked into all the same
        _check_ranges(document, sound)
        base = _load_base(document, path, sound)
        if base is not None:
            _check_keys(document, path, sound)
            _check_method(document, sound, base)
    if document.problems or sweep is None or base is None:
        document.problems = list(dict.fromkeys(document.problems))
        raise refused(document)
    return SweepFile(path, sweep, base)


def _sound_part(document: Document) -> Sweep | None:
    """What the file would be without the keys that are wrong; None where too little is left."""
    paths = [re.split(r"[.\[]", problem.key, maxsplit=1)[0] for problem in document.problems]
    value = {key: given for key, given in document.value.items() if key not in paths or key == "keys"}
    ranges = {}
    given_keys = value.get("keys")
    for key, given in given_keys.items() if isinstance(given_keys, dict) else ():
        with suppress(ValidationError):
            ranges[key] = Range.model_validate(given)
    value = {"name": "stand-in", "trials": 1, **value, "keys": ranges}
    try:
        return Sweep.model_validate(value)
    except ValidationError:
        return None


def schema() -> dict[str, Any]:
    """The JSON schema of the file, by which editors complete keys and show what they mean."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Sweep.model_json_schema()}


def _check_ranges(document: Document, sweep: Sweep) -> None:
    for key, given in sweep.keys.items():
        place: KeyPath = ("keys", key)
        kinds = [name for name in ("values", "log", "linear", "integer") if getattr(given, name) is not None]
        if len(kinds) != 1:
            what = f"{' and '.join(kinds)} are given" if kinds else "no values are given"
            document.refuse(place, what, "give one of values, log, linear and integer")
            continue
        if given.bounds is not None:
            low, high = given.bounds
            if low >= high:
                document.refuse((*place, kinds[0]), f"goes from {low:g} to {high:g}", "put the smaller first")
            elif given.log and low <= 0:
                document.refuse((*place, "log"), f"begins at {low:g}", "a logarithm needs more than 0")
            elif sweep.method == "grid" and given.points is None:
                document.refuse(place, "is a range, and a grid takes so many of it", "add points: 5")
        if given.points is not None and (given.values is not None or sweep.method != "grid"):
            what = "values are listed" if given.values is not None else f"method is {sweep.method}"
            document.refuse((*place, "points"), f"is for the ranges of a grid, and {what}", "remove it")
    if sweep.method != "grid" and sweep.trials is None:
        document.refuse(("trials",), "is missing", f"say how many trials {sweep.method} is to make")
    if sweep.is_finite and not document.problems:
        count = math.prod(len(given.grid()) for given in sweep.keys.values())
        if count > MOST_COMBINATIONS or (sweep.trials is None and count > MOST_TRIALS):
            remedy = (
                f"give trials, {MOST_TRIALS} at most" if count <= MOST_COMBINATIONS else "list fewer values"
            )
            document.refuse(("keys",), f"are {count:,} combinations", remedy)
        elif sweep.method != "tpe" and (sweep.trials or 0) > count:
            message = f"is {sweep.trials}, and the keys have {count} combinations"
            document.refuse(("trials",), message, f"ask for {count} at most")
    if sweep.method == "tpe" and sweep.parallel > 1:
        message = f"is {sweep.parallel}, and tpe draws each trial after all before it"
        document.refuse(("parallel",), message, "set it to 1, or method to random")
    if sweep.method != "halving" and "halving" in sweep.model_fields_set:
        document.refuse(("halving",), f"is for method halving, and method is {sweep.method}", "remove it")


def _load_base(document: Document, path: Path, sweep: Sweep) -> RunConfig | None:
    overrides = [Override(text, ("overrides", index)) for index, text in enumerate(sweep.overrides)]
    for override in overrides:
        if override.key in _OURS:
            document.refuse(override.place, f"{override.key} is the sweep's to set", "remove it")
    file = find_file(document, path, sweep.config, ("config",))
    return None if file is None else load_overridden(document, file, overrides)


def _check_keys(document: Document, path: Path, sweep: Sweep) -> None:
    """Each value by itself; what does not go together with others is for the trials to find out."""
    for key, given in sweep.keys.items():
        place: KeyPath = ("keys", key)
        if key in _OURS:
            document.refuse(place, "is the sweep's to set", "remove it")
            continue
        if sweep.method == "halving" and key in _HORIZON:
            document.refuse(place, "is what halving varies", "remove it")
            continue
        for value in given.values if given.values is not None else given.bounds or ():
            found = _wrong(path.parent / sweep.config, sweep, key, value)
            if found is not None:
                document.refuse(place, found.message, found.remedy)
                break


def _wrong(file: Path, sweep: Sweep, key: str, value: Any) -> Problem | None:
    document = read_file(file, "")
    for override in (*sweep.overrides, f"{key}={json.dumps(value)}"):
        apply_override(document, override)
    validate_as(document, RunConfig)
    return next((problem for problem in document.problems if problem.where == COMMAND_LINE), None)


def _check_method(document: Document, sweep: Sweep, base: RunConfig) -> None:
    names = metric_names(base)
    if sweep.metric not in names:
        near = difflib.get_close_matches(sweep.metric, names, n=1)
        known = ", ".join(name for name in names if "/block_" not in name)
        message = f"a run of this model has no metric {sweep.metric}"
        document.refuse(("metric",), message, f"did you mean {near[0]}?" if near else f"there are {known}")
    if sweep.method != "halving":
        return
    kinds = {base.schedule.kind}
    if (given := sweep.keys.get("schedule.kind")) is not None:
        kinds = set(given.values or ())
    for kind in sorted(kinds & {"cosine", "linear"}):
        place: KeyPath = ("keys", "schedule.kind") if "schedule.kind" in sweep.keys else ("method",)
        document.refuse(
            place,
            f"halving goes on from checkpoints, and a {kind} schedule has other learning rates from the "
            "first step on when the run is longer",
            "add schedule.kind=wsd to overrides, or use method random or tpe",
        )


def combinations(sweep: Sweep) -> list[dict[str, Any]]:
    """All of a grid, the last key varying fastest."""
    grids = [given.grid() for given in sweep.keys.values()]
    return [dict(zip(sweep.keys, values, strict=True)) for values in itertools.product(*grids)]
