"""A sweep from its first trial to its last: each a run of its own, in a process of its own.

Nothing that a trial does ends the sweep. A signal does: the trials that train save, and the same command goes
on. No torch.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.child_process import Child, wait_for_one
from albor.config import RunConfig
from albor.errors import ConfigError, Diverged, DoesNotFit, Interrupted, Problem
from albor.group_directory import claim_group
from albor.memory.devices import this_machine
from albor.memory.estimate import Estimate
from albor.runs.record import open_run
from albor.sweep.file import SweepFile
from albor.sweep.halving import Round, promoted, rounds_of, saved_at, shared_steps
from albor.sweep.record import FAULT_OF_VALUES, FILE, Outcome, Record, State, Trial, open_record
from albor.sweep.suggest import Result, suggest, trial_count
from albor.train.signals import StopRequest
from albor.units import format_bytes

LOCK = "sweep.lock"
CHECKPOINTS = "checkpoints"
_LONGEST_REASON = 200
_LAST_ROWS = 0.1  # of a run, over which a metric that is not of the final validation is averaged


@dataclass(frozen=True)
class Work:
    """One trial in one round: the run that it comes to."""

    trial: Trial
    round: Round
    config: RunConfig
    arguments: list[str]  # KEY=VALUE
    source: Path | None  # the checkpoint that it goes on from

    @property
    def directory(self) -> Path:
        """The run's."""
        return Path(self.config.runs_dir) / self.config.name


def plan_work(file: SweepFile, rounds: Sequence[Round], trial: Trial, number: int) -> Work:
    """The run of `trial` in round `number`. Raises ConfigError where its values do not go together."""
    current = rounds[number - 1]

    def values_of(one: Round) -> dict[str, Any]:
        values = {
            **trial.values,
            "name": trial.run_name(one.number),
            "runs_dir": str(file.sweep.directory),
            "train.max_hours": None,
        }
        if len(rounds) > 1:
            steps = one.steps(file.config_with(trial.values))
            values |= {"train.max_tokens": None, "train.max_steps": steps}
        return values

    values = values_of(current)
    config = file.config_with(values)
    if number < len(rounds):
        step = shared_steps(config, file.config_with(values_of(rounds[number])))
        if not step:
            problem = "leaves no step of this round for the next to go on from"
            raise ConfigError([Problem("schedule.decay_fraction", problem, "lower it")])
        values |= saved_at(config, step)
        config = file.config_with(values)
    source = None
    if number > 1:
        before = file.config_with(values_of(rounds[number - 2]))
        step = shared_steps(before, config)
        source = Path(before.runs_dir) / before.name / CHECKPOINTS / f"step-{step:08d}"
    return Work(trial, current, config, file.arguments(values), source)


class Runner:
    """Does what is left of a sweep. `say` gets lines for people."""

    def __init__(self, file: SweepFile, record: Record, stop: StopRequest, say: Callable[[str], None]):
        self.file, self.record, self._stop = file, record, stop
        self.rounds = rounds_of(file.sweep, trial_count(file.sweep))
        self._say_now, self._lock = say, threading.Lock()

    def run(self) -> None:
        """Returns when all is done. Raises Interrupted after a signal."""
        self.draw()
        for current in self.rounds:
            if len(self.rounds) > 1:
                self._say(f"round {current.number} of {len(self.rounds)}")
            self._run_round(current)

    def draw(self) -> None:
        """All trials; of tpe the first, for others need its result."""
        tpe = self.file.sweep.method == "tpe"
        self._draw_up_to(1 if tpe else trial_count(self.file.sweep))

    def _draw_up_to(self, count: int) -> None:
        trials = self.record.trials
        while len(trials) < count:
            trials.append(Trial(len(trials), suggest(self.file.sweep, len(trials), results(trials))))
        self.record.save()

    def _run_round(self, current: Round) -> None:
        waiting = self._members(current)
        running: dict[Child, Work] = {}
        with ExitStack() as stack:
            while True:
                while len(running) < self.file.sweep.parallel and not self._stop.reason:
                    trial = next(waiting, None)
                    if trial is None:
                        break
                    work = self._prepare(trial, current)
                    if work is not None:
                        running[stack.enter_context(self._start(work))] = work
                if not running:
                    break
                child = wait_for_one(list(running), lambda: self._stop.reason is not None)
                child.close()  # so that all it has said is here
                self._end(running.pop(child), child)
        if self._stop.reason:
            raise Interrupted(
                f"stopped by {self._stop.reason}; what trained is saved, and the same command goes on"
            )

    def _members(self, current: Round) -> Iterator[Trial]:
        """The trials that this round has still to train."""
        trials, index = self.record.trials, current.number - 1
        if self.file.sweep.method == "tpe":
            for number in range(trial_count(self.file.sweep)):
                self._draw_up_to(number + 1)
                if not _is_over(trials[number], index):
                    yield trials[number]
            return
        numbers = [trial.number for trial in trials]
        if index:
            before = {one.number: one.rounds[index - 1] for one in trials if len(one.rounds) >= index}
            known = {n: one.metric for n, one in before.items() if one.metric is not None}
            numbers = promoted(known, current.trials, self.file.sweep.goal)
        yield from (trials[number] for number in numbers if not _is_over(trials[number], index))

    def _prepare(self, trial: Trial, current: Round) -> Work | None:
        try:
            return plan_work(self.file, self.rounds, trial, current.number)
        except ConfigError as error:
            reason = "; ".join(f"{one.key}: {one.message}" for one in error.problems)
            self._note(trial, current, Outcome(0, State.REFUSED, reason=reason[:_LONGEST_REASON]))
            return None

    def _start(self, work: Work) -> Child:
        name = work.config.name
        resume = "auto"
        if work.source is not None and not any(work.directory.glob(f"{CHECKPOINTS}/step-*")):
            resume = str(work.source)
        self._note(work.trial, work.round, Outcome(work.config.steps, State.RUNNING))
        arguments = ["train", str(self.file.config_path), *work.arguments, "--resume", resume, "--json"]
        with open(os.devnull, "wb") as nowhere:  # its result lies in eval/final.json
            return Child(arguments, lambda line: self._say(f"{name}: {line}"), output=nowhere)

    def _end(self, work: Work, child: Child) -> None:
        code = child.poll()
        assert code is not None
        states = {
            0: State.FINISHED,
            Diverged.exit_code: State.DIVERGED,
            DoesNotFit.exit_code: State.DOES_NOT_FIT,
        }
        state, metric = states.get(code, State.FAILED), None
        if code == Interrupted.exit_code and not self._stop.reason:
            self._stop.reason = f"the end of {work.config.name}, which somebody else stopped"
        if state is State.FAILED and self._stop.reason:
            return  # it goes on with the sweep
        reason = _reason(code, child.last_words, state) if state is not State.FINISHED else ""
        if state is State.FINISHED:
            metric = read_metric(work.directory, self.file.sweep.metric)
            if metric is None:
                state, reason = State.DIVERGED, f"{self.file.sweep.metric} is not finite, or not known"
        self._note(work.trial, work.round, Outcome(work.config.steps, state, metric, reason))

    def _note(self, trial: Trial, current: Round, outcome: Outcome) -> None:
        trial.rounds[current.number - 1 :] = [outcome]
        self.record.save()
        values = ", ".join(f"{key}={value}" for key, value in trial.values.items())
        shown = outcome.state.value if outcome.state is not State.RUNNING else f"{outcome.steps} steps"
        if outcome.metric is not None:
            shown = f"{self.file.sweep.metric} {outcome.metric:.4f}"
        self._say(f"{trial.name} ({values}): {shown}" + (f": {outcome.reason}" if outcome.reason else ""))

    def _say(self, line: str) -> None:
        with self._lock:  # children speak from threads
            self._say_now(line)


def _is_over(trial: Trial, index: int) -> bool:
    return len(trial.rounds) > index and trial.rounds[index].state.is_over


def _reason(code: int, last_words: str, state: State) -> str:
    """Why a trial came to nothing, in a line."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    line = next((line for line in reversed(last_words.splitlines()) if line.strip()), "")
    ended = f"exit code {code}: " if state is State.FAILED else ""
    return f"{ended}{line.removeprefix('albor: ')}"[:_LONGEST_REASON]


def results(trials: Sequence[Trial]) -> list[Result]:
    """What a sampler learns from."""
    return [
        Result(one.values, one.metric, bad=one.last is not None and one.last.state in FAULT_OF_VALUES)
        for one in trials
    ]


def read_metric(directory: Path, name: str) -> float | None:
    """What the run in `directory` came to: of its final validation, or the mean of its last rows; None where
    that is not finite or not known.
    """
    run = open_run(directory)
    final = run.final() or {}
    value = final.get(name)
    if name not in final:
        _, values = run.metrics().series(name)
        last = values[-max(1, round(_LAST_ROWS * len(values))) :]
        value = sum(last) / len(last) if last else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@contextmanager
def open_sweep(file: SweepFile, say: Callable[[str], None]) -> Iterator[Record]:
    """The sweep's record, with its directory made and kept from other commands."""
    with claim_group(file.sweep.directory, FILE, LOCK, say):
        yield open_record(file)


def check_parallel(file: SweepFile, trials: Sequence[Trial]) -> None:
    """Raises DoesNotFit where the largest trials do not fit side by side; one alone is its own to refuse."""
    together = file.sweep.parallel
    if together == 1:
        return
    hardware, needed = this_machine(file.base.device), []
    for trial in trials:
        try:
            needed.append(Estimate.of(file.config_with(trial.values), hardware).required_bytes)
        except ConfigError:
            continue
    largest = sum(sorted(needed)[-together:])
    if hardware.capacity_bytes is not None and largest > hardware.capacity_bytes:
        raise DoesNotFit(
            f"{together} trials side by side need {format_bytes(largest)}, and "
            f"{format_bytes(hardware.capacity_bytes)} are available; lower parallel"
        )
