"""Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943), in rounds of whole runs.

With a factor of 3, every trial trains for a share of its steps, the best third for three times as many, the
best third of these again, so that all rounds cost about the same. Each round is a run that comes to the end
of its schedule, because losses before that say little about those after it; the next round goes on from the
last step at which both have had the same learning rates: with a constant schedule the end, with wsd the
beginning of the decay (Hu et al. 2024, arXiv:2404.06395). Optuna's pruner is not used: it decides while
trials run one after another, and lets the first ones through unseen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.sweep.file import Sweep, SweepFile
from albor.train.schedule import learning_rate


@dataclass(frozen=True)
class Round:
    """One round of all trials that are still in it."""

    number: int  # from 1
    trials: int  # at most
    share: tuple[int, int]  # of a trial's steps, as a fraction

    def steps(self, config: RunConfig) -> int:
        """Of a run of `config` in this round, rounded up."""
        return -(-config.steps * self.share[0] // self.share[1])


def rounds_of(sweep: Sweep, trials: int) -> list[Round]:
    """The rounds; one, of whole runs, for every method but halving."""
    if sweep.method != "halving":
        return [Round(1, trials, (1, 1))]
    factor, counts = sweep.halving.factor, [trials]
    while counts[-1] > 1 and (sweep.halving.rounds is None or len(counts) < sweep.halving.rounds):
        counts.append(max(1, counts[-1] // factor))
    last = len(counts) - 1
    return [Round(i + 1, count, (1, factor ** (last - i))) for i, count in enumerate(counts)]


def check_rounds(file: SweepFile, rounds: Sequence[Round]) -> None:
    """Raises ConfigError where the warm-up, which no key varies, is longer than the first round."""
    warmup, steps = file.base.schedule.warmup_steps, rounds[0].steps(file.base)
    if len(rounds) > 1 and "schedule.warmup_steps" not in file.sweep.keys and warmup >= steps:
        message = f"begins with rounds of {steps} steps, in which a warm-up of {warmup} does not end"
        remedy = "ask for fewer trials or halving.rounds, or shorten schedule.warmup_steps"
        raise ConfigError([Problem("method", message, remedy, str(file.path))])


def promoted(metrics: Mapping[int, float], count: int, goal: str) -> list[int]:
    """The `count` best trials by their metric, in the order of their numbers; of equals the earlier."""
    sign = 1.0 if goal == "minimize" else -1.0
    return sorted(sorted(metrics, key=lambda number: (sign * metrics[number], number))[:count])


def shared_steps(short: RunConfig, long: RunConfig) -> int:
    """The steps from the first on that have the same learning rate in both: a run of `long` may go on from
    there (`albor.train.resume_policy`).
    """
    for step in range(1, short.steps + 1):
        rates = {learning_rate(step, run.steps, run.optimizer.lr, run.schedule) for run in (short, long)}
        if len(rates) > 1:
            return step - 1
    return short.steps


def saved_at(config: RunConfig, step: int) -> dict[str, int]:
    """Overrides by which a run keeps its checkpoint of `step`, and saves at least as often as configured."""
    every = min(config.checkpoint.every_steps, step)
    while step % every:
        every -= 1
    return {"checkpoint.every_steps": every, "checkpoint.keep_every": step}
