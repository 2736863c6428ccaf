"""Which values each trial gets: Optuna's samplers, asked so that every answer can be given again.

A suggestion is a function of the sweep's file, the trial's number and the results before it, not of a
generator's state: a sweep that was killed goes on as if it had not been. No torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from albor.errors import AlborError
from albor.seeds import derive_seed
from albor.sweep.file import Range, Sweep, combinations

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial


@dataclass(frozen=True)
class Result:
    """A trial that has ended, as a sampler sees it."""

    values: dict[str, Any]
    metric: float | None  # None: it came to none
    bad: bool = False  # where it came to none: the values' fault, and not that of the machine


def suggest(sweep: Sweep, number: int, results: Sequence[Result] = ()) -> dict[str, Any]:
    """The values of trial `number`, counted from 0; only tpe looks at `results`, those of all before it."""
    if sweep.is_finite and sweep.method != "tpe":
        return combinations(sweep)[_order(sweep)[number]]
    optuna = _optuna()
    seed = derive_seed(sweep.seed, "sweep", number) % 2**32
    sampler = optuna.samplers.TPESampler if sweep.method == "tpe" else optuna.samplers.RandomSampler
    study = _study(sampler(seed=seed), sweep)
    study.add_trials([_frozen(sweep, result) for result in results])
    space = {key: _distribution(given) for key, given in sweep.keys.items()}
    drawn = study.ask(space).params
    return {key: _read(given, drawn[key]) for key, given in sweep.keys.items()}


def trial_count(sweep: Sweep) -> int:
    """How many trials there are; without tpe no combination of listed values comes twice."""
    if sweep.method == "tpe" or not sweep.is_finite:
        assert sweep.trials is not None
        return sweep.trials
    count = len(combinations(sweep))
    return min(count, sweep.trials or count)


def _order(sweep: Sweep) -> list[int]:
    """Of all combinations: a whole grid as it is written, and else as Optuna shuffles it."""
    count = len(combinations(sweep))
    if sweep.method == "grid" and trial_count(sweep) == count:
        return list(range(count))
    optuna = _optuna()
    space = {"combination": list(range(count))}
    study = _study(optuna.samplers.GridSampler(space, seed=derive_seed(sweep.seed, "grid") % 2**32), sweep)
    distribution = optuna.distributions.CategoricalDistribution(space["combination"])
    asked = range(trial_count(sweep))
    return [study.ask({"combination": distribution}).params["combination"] for _ in asked]


def _study(sampler: BaseSampler, sweep: Sweep) -> Study:
    return _optuna().create_study(sampler=sampler, direction=sweep.goal)


def _distribution(given: Range) -> BaseDistribution:
    distributions = _optuna().distributions
    if given.values is not None:  # by their places: a value may be a list, which Optuna does not take
        return distributions.CategoricalDistribution(range(len(given.values)))
    assert given.bounds is not None
    low, high = given.bounds
    if given.integer is not None:
        return distributions.IntDistribution(int(low), int(high))
    return distributions.FloatDistribution(low, high, log=given.log is not None)


def _read(given: Range, drawn: Any) -> Any:
    return given.values[drawn] if given.values is not None else given.rounded(drawn)


def _frozen(sweep: Sweep, result: Result) -> FrozenTrial:
    trial = _optuna().trial
    state, metric = trial.TrialState.COMPLETE, result.metric
    if metric is None:  # what is pruned is worse than all that is complete; what fails is not looked at
        state = trial.TrialState.PRUNED if result.bad else trial.TrialState.FAIL
    params = {
        key: given.values.index(result.values[key]) if given.values is not None else result.values[key]
        for key, given in sweep.keys.items()
    }
    space = {key: _distribution(given) for key, given in sweep.keys.items()}
    return trial.create_trial(state=state, value=metric, params=params, distributions=space)


def _optuna() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its own dependencies; users cannot mend them
            import optuna
    except ImportError:
        raise AlborError(
            "albor sweep needs Optuna, which is not installed; run: pip install 'albor[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
