"""What a step's loss and gradient norm decide: whether the weights move, and when a run goes back.

`judge` is a pure function of what it is given, and all that it remembers is `GuardState`, which is part of
every checkpoint: a run that resumes decides as one that was never stopped. No value that is not finite enters
the windows, so one NaN does not make the steps after it look wrong, or right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from albor.config import DivergenceConfig

_GROWTH_INTERVAL = (
    2000  # good steps after which fp16 tries twice the loss scale (the usual choice: torch.amp's)
)
_LARGEST_SCALE = 2.0**24
# A window of equal values has no spread, and then anything would be a spike. As a share of the mean.
_LEAST_SPREAD = 1e-3


@dataclass(frozen=True)
class GuardState:
    """Part of a run's state: what the next step's verdict depends on."""

    loss_scale: float = 1.0  # of fp16; bf16 and fp32 have none
    good_steps: int = 0  # finite ones since the loss scale last changed
    skips: tuple[int, ...] = ()  # of the last window_steps steps, the unusable ones
    losses: tuple[float, ...] = ()  # of the last spike_window finite steps, a spike's cut at the threshold
    norms: tuple[float, ...] = ()  # gradient norms, likewise
    skipped: int = 0  # unusable steps, in the whole run
    spikes: int = 0  # steps that were spikes, in the whole run
    rollbacks: int = 0
    # The step of the newest checkpoint that the run's cadence saved, where a rollback goes. One that a signal
    # left does not count: an interrupted run has to go back as far as one that was not.
    anchor: int | None = None

    @classmethod
    def initial(cls, compute_dtype: str) -> GuardState:
        """A new run's state. fp16 gradients of a small model vanish without a scale; bf16 has fp32's
        range.
        """
        return cls(loss_scale=2.0**16) if compute_dtype == "float16" else cls()

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Any) -> GuardState:
        """The state in a checkpoint. Raises ValueError for anything but what `as_json` gives."""
        names = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or value.keys() != names:
            raise ValueError(f"the guard's state must have just these keys: {', '.join(sorted(names))}")
        counts = [value[key] for key in ("good_steps", "skipped", "spikes", "rollbacks")]
        anchor = [] if value["anchor"] is None else [value["anchor"]]
        numbers = [value["loss_scale"], *(v for key in ("losses", "norms") for v in _items(value, key))]
        whole = [*counts, *anchor, *_items(value, "skips")]
        if not all(type(n) is float and math.isfinite(n) for n in numbers) or value["loss_scale"] <= 0:
            raise ValueError("a number in the guard's state is not finite, or none")
        if not all(type(n) is int and n >= 0 for n in whole):
            raise ValueError("a count in the guard's state is no whole number")
        windows = {name: tuple(value[name]) for name in ("skips", "losses", "norms")}
        return cls(**{**value, **windows})


def _items(value: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(value[key], list):
        raise ValueError(f"{key} in the guard's state is no list")
    return value[key]


class Verdict(NamedTuple):
    """What becomes of a step."""

    kind: Literal["good", "non-finite", "zero", "loss scale", "spike"]
    updates: bool  # False: weights, moments and bias correction stay as they are
    largest_norm: float = math.inf  # the gradient is scaled down to this norm


def judge(
    state: GuardState,
    step: int,
    loss: float,
    norm: float,
    policy: DivergenceConfig,
    compute_dtype: str,
    *,
    has_targets: bool = True,
) -> tuple[Verdict, GuardState]:
    """The verdict on `step` with this loss and gradient norm, and the state after it.

    Unusable, and skipped, is a step whose loss or norm is not finite; and one whose loss is not above zero or
    whose norm is zero, unless it has no targets: cross-entropy does not come to that, but memory that was
    never written does, and the moments would decay as if there were nothing to learn.
    An fp16 gradient that overflowed only because of the scale is no divergence: the scale is halved, and the
    step counts as skipped only once the scale can go no lower.
    """
    state = replace(state, skips=tuple(s for s in state.skips if s > step - policy.window_steps))
    if not (math.isfinite(loss) and math.isfinite(norm)):
        if compute_dtype == "float16" and math.isfinite(loss) and state.loss_scale > 1.0:
            scale = state.loss_scale / 2
            return Verdict("loss scale", False), replace(state, loss_scale=scale, good_steps=0)
        return Verdict("non-finite", False), _skipped(state, step)
    if has_targets and (loss <= 0 or norm == 0):
        return Verdict("zero", False), _skipped(state, step)

    loss_limit, norm_limit = (_threshold(window, policy) for window in (state.losses, state.norms))
    spike = loss > loss_limit or norm > norm_limit
    verdict = Verdict("good", True)
    if spike:
        clips = policy.on_spike == "clip"
        verdict = Verdict("spike", clips, math.fsum(state.norms) / len(state.norms) if clips else math.inf)
    size = policy.spike_window
    state = replace(
        state,
        losses=(*state.losses, min(loss, loss_limit))[-size:],
        norms=(*state.norms, min(norm, norm_limit))[-size:],
        spikes=state.spikes + int(spike),
        good_steps=state.good_steps + 1,
    )
    grows = state.good_steps >= _GROWTH_INTERVAL and state.loss_scale < _LARGEST_SCALE
    if compute_dtype == "float16" and grows:
        state = replace(state, loss_scale=state.loss_scale * 2, good_steps=0)
    return verdict, state


def _skipped(state: GuardState, step: int) -> GuardState:
    return replace(state, skips=(*state.skips, step), skipped=state.skipped + 1, good_steps=0)


def must_roll_back(state: GuardState, policy: DivergenceConfig) -> bool:
    """Whether too many of the last steps were skipped."""
    return len(state.skips) >= policy.max_skips


def rolled_back(state: GuardState, saved: GuardState) -> GuardState:
    """The state after going back from `state` to a checkpoint with `saved`: its windows, but no skipped
    steps, and counters that go on.
    """
    return replace(saved, skips=(), skipped=state.skipped, spikes=state.spikes, rollbacks=state.rollbacks + 1)


def spread(window: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a window that is not empty."""
    mean = math.fsum(window) / len(window)
    variance = math.fsum([(value - mean) ** 2 for value in window]) / len(window)
    return mean, max(math.sqrt(variance), _LEAST_SPREAD * abs(mean))


def _threshold(window: Sequence[float], policy: DivergenceConfig) -> float:
    """Above this a value is a spike; infinite where none is looked for, and while the window is less than
    half full.
    """
    if policy.on_spike == "none" or 2 * len(window) < policy.spike_window:
        return math.inf
    mean, deviation = spread(window)
    return mean + policy.spike_zscore * deviation
