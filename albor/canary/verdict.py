"""What agreement the canary asks for: limits, and checks against them.

- **The gradients** of both sides at the same weights, three times: at the initial ones; at those with norms
  whose scales are not 1, for a scale of 1 hides its misuse; and at those that albor has reached by its last
  step, which the reference then takes over.
- **The updates**, by `UpdateCheck`. albor's optimizer and torch's get the same gradients, so that no noise of
  bf16 stands between a right and a wrong update.
- **The losses** of all steps, while each side goes by its own gradients. Small differences grow there: AdamW
  moves a weight by about the learning rate however small its gradient is, so a weight whose gradient is
  mostly rounding goes its own way. The limit is wide; it is for what goes wrong only in sequence. The norms
  of these steps are shown and not judged: where training is near to unstable they come apart first.

Where the limits come from is in docs/canary.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class SameWeightsLimits:
    """The largest deviations that pass while both sides have the same weights."""

    cosine: float  # 1 - the lowest of any parameter
    parameter_norm: float  # |ratio - 1| of any parameter's gradient norms
    norm: float  # of the whole gradient, in units of its largest norm so far
    loss: float  # nats per token


@dataclass(frozen=True)
class Limits:
    """The largest deviations that pass.

    What is rounded is the gradient of single tokens, which does not shrink where their sum does. So rounding
    in a gradient is measured by the largest norm of the whole gradient so far: the whole gradient's norm is
    compared in units of that, and what noise of this size may do to a parameter is taken off its deviation. A
    small difference of large numbers, as a query's gradient can be, has little more than that noise.
    """

    initial: SameWeightsLimits
    last: SameWeightsLimits
    loss: float  # nats per token, of any step, each side on its own way
    update: float  # of any parameter's way, see UpdateCheck; moments in bf16 are rounded at every update
    noise: float  # of any parameter's gradient, in units of the whole gradient's largest norm so far

    @classmethod
    def of(cls, compute_dtype: str, state_dtype: str) -> Limits:
        """For a run that computes in `compute_dtype` with the optimizer's state in `state_dtype`."""
        limits = _FP32 if compute_dtype == "float32" else _HALF
        rounds = compute_dtype == "bfloat16" and state_dtype == "bf16"
        return replace(limits, update=0.02) if rounds else limits


_EXACT = SameWeightsLimits(1e-6, 1e-4, 1e-4, 2e-5)
_FP32 = Limits(_EXACT, _EXACT, loss=1e-3, update=1e-3, noise=1e-9)
_HALF = Limits(
    SameWeightsLimits(2e-3, 0.03, 0.01, 5e-3),
    SameWeightsLimits(0.1, 0.8, 0.1, 0.01),
    loss=1.0,
    update=1e-3,
    noise=2e-5,
)


@dataclass(frozen=True)
class Check:
    """One deviation, and whether it passes. `value` is the worst, and `where` it was found."""

    name: str
    value: float
    limit: float
    where: str
    failing: int = 0  # parameters, or steps, that do not pass

    @property
    def passed(self) -> bool:
        """A NaN does not pass."""
        return self.value <= self.limit

    @classmethod
    def worst(cls, name: str, deviations: Iterable[tuple[str, float]], limit: float) -> Check:
        """Over all (where, deviation). What is not a number is worse than anything."""
        found = [(where, math.inf if math.isnan(value) else value) for where, value in deviations]
        where, value = max(found, key=lambda pair: pair[1], default=("nothing was compared", math.inf))
        return cls(name, value, limit, where, sum(not value <= limit for _, value in found))
