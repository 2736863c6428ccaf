"""`albor sweep`: the file is read, the trials are planned or trained, and the winner is written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from albor.configfile import load_config
from albor.errors import AlborError, DoesNotFit
from albor.runs.text import show
from albor.sweep.file import SweepFile, load_sweep
from albor.sweep.halving import check_rounds, rounds_of
from albor.sweep.record import Record, State, Trial, open_record
from albor.sweep.report import (
    as_json,
    plan_lines,
    plan_trials,
    result_lines,
    winner_lines,
    winner_of,
)
from albor.sweep.run import Runner, check_parallel, open_sweep
from albor.sweep.scale import Line, as_found, scaled
from albor.sweep.suggest import suggest, trial_count
from albor.train.signals import StopRequest


def run_dry(path: Path, console: Console, *, json_wanted: bool, gpu: str | None) -> int:
    """Prints what would be trained here, or on the card called `gpu`; nothing is written. Returns 4 where no
    trial fits.
    """
    file = load_sweep(path)
    trials = open_record(file).trials
    count = 1 if file.sweep.method == "tpe" else trial_count(file.sweep)
    while len(trials) < count:
        trials.append(Trial(len(trials), suggest(file.sweep, len(trials))))
    rounds = rounds_of(file.sweep, trial_count(file.sweep))
    check_rounds(file, rounds)
    planned = plan_trials(file, rounds, trials, gpu)
    if json_wanted:
        print(json.dumps({
            **as_json(file, trials),
            "rounds": [{"trials": one.trials, "steps": one.steps(file.base)} for one in rounds],
            "plan": [one.as_json() for one in planned],
        }))  # fmt: skip
    else:
        show(console, plan_lines(file, rounds, planned))
    fitting = [one for one in planned if one.estimate is None or one.estimate.fits is not False]
    return 0 if fitting else DoesNotFit.exit_code


def run_sweep(
    path: Path,
    console: Console,
    stop: StopRequest,
    *,
    json_wanted: bool,
    plot: Path | None,
    other: Path | None,
    retry: bool,
) -> None:
    """Trains what is left of the sweep, and reports on all of it; `stop` has been entered.

    `other` is the configuration that the winner is scaled for; `retry` takes trials that failed up again.
    Raises Interrupted after a signal, and AlborError where no trial came to a metric.
    """
    file = load_sweep(path)
    check_rounds(file, rounds_of(file.sweep, trial_count(file.sweep)))
    target = None if other is None else load_config(other)
    if plot is not None:
        from albor.memory.plot import check_target

        check_target(plot)

    def say(line: str) -> None:
        show(console, [line])

    with open_sweep(file, say) as record:
        if retry:
            _take_up_again(record)
        stop.defer()
        runner = Runner(file, record, stop, say)
        runner.draw()
        check_parallel(file, record.trials)
        runner.run()
    trials, rounds = record.trials, runner.rounds
    if plot is not None:
        from albor.sweep.plot import plot_sweep

        plot_sweep(file.sweep, trials, plot)
    winner = winner_of(trials, file.sweep.goal)
    found: list[Line] = []
    if winner is not None:
        found = as_found(winner.values)
        if target is not None:
            found = scaled(winner.values, file.config_with(winner.values), target)
    if json_wanted:
        print(json.dumps({**as_json(file, trials), **_next_json(other, found, plot)}))
    else:
        show(console, ["", *result_lines(file, rounds, trials)])
        if winner is not None:
            show(console, winner_lines(winner, file, found, None if other is None else str(other)))
        if plot is not None:
            show(console, ["", f"Picture: {plot}"])
    if winner is None:
        raise AlborError(f"no trial came to a {file.sweep.metric}; {_what_failed(file, trials)}")


def _take_up_again(record: Record) -> None:
    """Trials that failed, for a reason that may be gone, wait again."""
    for trial in record.trials:
        if trial.last is not None and trial.last.state is State.FAILED:
            trial.rounds.pop()
    record.save()


def _next_json(other: Path | None, found: list[Line], plot: Path | None) -> dict[str, Any]:
    lines = [line.as_json() for line in found]
    return {"for": str(other) if other else None, "lines": lines, "plot": str(plot) if plot else None}


def _what_failed(file: SweepFile, trials: list[Trial]) -> str:
    """The first reason, for the others are likely to be the same."""
    first = next((one for one in trials if one.last is not None and one.last.reason), None)
    if first is None or first.last is None:
        return f"see {file.sweep.directory}"
    return f"{first.name}: {first.last.reason}"
