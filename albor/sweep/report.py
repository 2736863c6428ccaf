"""What a sweep shows: its trials before they train, and what came of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from albor.errors import ConfigError
from albor.memory.devices import this_machine
from albor.memory.estimate import Estimate, estimate
from albor.runs.text import table
from albor.sweep.file import SweepFile
from albor.sweep.halving import Round
from albor.sweep.record import State, Trial
from albor.sweep.run import plan_work
from albor.sweep.scale import Line, yaml_lines
from albor.units import format_bytes, format_duration

_STYLES = {
    State.DIVERGED: "red", State.FAILED: "red", State.DOES_NOT_FIT: "red", State.REFUSED: "red",
    State.RUNNING: "green",
}  # fmt: skip
_LONGEST_REASON = 60


@dataclass(frozen=True)
class Planned:
    """A trial before it trains."""

    trial: Trial
    estimate: Estimate | None  # of its longest round
    problem: str = ""

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where no speed is known."""
        durations = self.estimate.cost.durations if self.estimate else ()
        return durations[-1].hours * 3600 if durations else None

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        known = self.estimate
        return {
            "trial": self.trial.number,
            "values": self.trial.values,
            "problem": self.problem or None,
            "parameters": known.architecture.parameter_count if known else None,
            "tokens": known.cost.tokens if known else None,
            "required_bytes": known.required_bytes if known else None,
            "fits": known.fits if known else None,
            "seconds": self.seconds,
            "disk_bytes": known.cost.disk_bytes if known else None,
        }


def plan_trials(
    file: SweepFile, rounds: Sequence[Round], trials: Sequence[Trial], gpu: str | None = None
) -> list[Planned]:
    """Each trial as this machine, or the card called `gpu`, would train it to the end. Raises ConfigError for
    an unknown card.
    """
    hardware = this_machine(file.base.device) if gpu is None else estimate(file.base, gpu).hardware
    found = []
    for trial in trials:
        try:
            works = [plan_work(file, rounds, trial, one.number) for one in rounds]
            found.append(Planned(trial, Estimate.of(works[-1].config, hardware)))
        except ConfigError as error:
            problem = "; ".join(f"{one.key}: {one.message}" for one in error.problems)
            found.append(Planned(trial, None, problem))
    return found


def plan_lines(file: SweepFile, rounds: Sequence[Round], planned: Sequence[Planned]) -> list[Text | str]:
    """The trials, one a line, and what all of them come to."""
    keys = list(file.sweep.keys)
    rows: list[list[str | Text]] = [["trial", *short_names(keys), "parameters", "needs", "", "time"]]
    for one in planned:
        shown = [f"{one.trial.number}", *(_show(one.trial.values[key]) for key in keys)]
        if one.estimate is None:
            rows.append([*shown, "", "", "", Text(f"refused: {one.problem}", style="red")])
            continue
        fits = {True: "fits", False: "does not fit", None: ""}[one.estimate.fits]
        verdict = Text(fits, style="red" if one.estimate.fits is False else "")
        count = f"{one.estimate.architecture.parameter_count:,}"
        time = "-" if one.seconds is None else format_duration(one.seconds)
        rows.append([*shown, count, format_bytes(one.estimate.required_bytes), verdict, time])
    lines: list[Text | str] = [*table(rows, right=(0, len(keys) + 1, len(keys) + 2)), ""]
    if file.sweep.method == "tpe":
        lines.append("tpe draws each of the others after what came of those before it.")
    lines += _round_lines(file, rounds)
    known = [one.seconds for one in planned if one.seconds is not None]
    if known:
        share = sum(one.trials * one.share[0] / one.share[1] for one in rounds) / rounds[0].trials
        note = planned[0].estimate.cost.durations[-1].note if planned[0].estimate else ""
        total = sum(known) / len(known) * share * rounds[0].trials
        lines.append(f"Time in training steps: at most {format_duration(total)} ({note})")
    else:
        lines.append("Time: no speed is known of this machine.")
    return lines


def _round_lines(file: SweepFile, rounds: Sequence[Round]) -> list[str]:
    if len(rounds) == 1:
        return [f"{rounds[0].trials} trials of {file.base.steps:,} steps"]
    return [
        f"round {one.number}: {one.trials} trial{'s' if one.trials > 1 else ''} to step "
        f"{one.steps(file.base):,}"
        for one in rounds
    ]


def short_names(keys: Sequence[str]) -> list[str]:
    """The last parts of dotted keys, where these tell them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for name, key in zip(last, keys, strict=True)]


def ranked(trials: Sequence[Trial], goal: str) -> list[Trial]:
    """Those that went further first, and of these the better; those without a metric at the end."""
    sign = 1.0 if goal == "minimize" else -1.0

    def key(trial: Trial) -> tuple[int, float, int]:
        finished = [one for one in trial.rounds if one.metric is not None]
        if not finished or finished[-1].metric is None:
            return (1, 0.0, trial.number)
        return (-len(finished), sign * finished[-1].metric, trial.number)

    return sorted(trials, key=key)


def winner_of(trials: Sequence[Trial], goal: str) -> Trial | None:
    """The best of those that came furthest; None where no trial came to a metric."""
    best = next(iter(ranked(trials, goal)), None)
    return best if best is not None and best.metric is not None else None


def result_lines(file: SweepFile, rounds: Sequence[Round], trials: Sequence[Trial]) -> list[Text | str]:
    """The trials, best first."""
    keys = list(file.sweep.keys)
    rows: list[list[str | Text]] = [["trial", *short_names(keys), "steps", file.sweep.metric, "state"]]
    for one in ranked(trials, file.sweep.goal):
        last = one.last
        state = last.state if last is not None else State.WAITING
        text = state.value
        if state is State.FINISHED and len(one.rounds) < len(rounds):
            text = f"ended in round {len(one.rounds)}"
        if last is not None and last.reason:
            text += f": {last.reason[:_LONGEST_REASON]}"
        values = [_show(one.values[key]) for key in keys]
        metric = "-" if one.metric is None else f"{one.metric:.4f}"
        steps = f"{last.steps:,}" if last is not None and last.steps else "-"
        rows.append([f"{one.number}", *values, steps, metric, Text(text, style=_STYLES.get(state, ""))])
    return list(table(rows, right=(0, len(keys) + 1, len(keys) + 2)))


def winner_lines(winner: Trial, file: SweepFile, found: Sequence[Line], other: str | None) -> list[str]:
    """The winner as lines of a run's file."""
    where = f"for {other}" if other else f"as in {file.sweep.directory / winner.run_name(len(winner.rounds))}"
    return ["", f"# the values of {winner.name}, {where}", *yaml_lines(found)]


def as_json(file: SweepFile, trials: Sequence[Trial]) -> dict[str, Any]:
    """What `--json` prints of the trials."""
    sweep, winner = file.sweep, winner_of(trials, file.sweep.goal)
    shown = [
        {
            "trial": one.number,
            "values": one.values,
            "state": (one.last.state if one.last else State.WAITING).value,
            "metric": one.metric,
            "rounds": [asdict(each) for each in one.rounds],
            "directory": str(sweep.directory / one.run_name(max(1, len(one.rounds)))),
        }
        for one in trials
    ]
    return {
        "sweep": sweep.name,
        "directory": str(sweep.directory),
        "method": sweep.method,
        "metric": sweep.metric,
        "goal": sweep.goal,
        "trials": shown,
        "best": None if winner is None else shown[winner.number],
    }


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
