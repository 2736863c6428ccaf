"""What the next rung will come to, from the rungs so far: its validation loss, its hours and its kWh.

The law is that of Hoffmann et al. 2022 (arXiv:2203.15556, section 3.3),

    L(N, D) = E + A / N^a + B / D^b

with N the parameters, embeddings included, and D the tokens trained on. Hoffmann counts N so; Kaplan et al.
2020 (arXiv:2001.08361) leave the embeddings out, which at these sizes bends the law (Pearce and Song 2024,
arXiv:2406.12907).

Two or three rungs cannot fit five constants. So nothing is fitted to a point: all laws that agree with the
rungs are weighed by how well they do, and by what is known of such laws beforehand. The exponents are held
near published ones; E, A and B depend on tokenizer and text, and are known only to be positive and not to be
more than the loss itself. The interval is that of the weighed laws, with the noise of a single run. It is
wide where the rungs say little; a bootstrap over two of them would say nothing at all.

The sum runs over a grid of (a, b, noise), where E, A and B have a closed form (Bayesian linear regression),
and draws from it with a fixed seed. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from albor.errors import AlborError

LEVEL = 0.9  # of the interval

# Both exponents: 0.34 and 0.28 in Hoffmann et al. 2022; 0.348 and 0.366 where Besiroglu et al. 2024
# (arXiv:2404.10102) fit the same runs again; 0.353 for both in Muennighoff et al. 2023 (arXiv:2305.16264).
# The spread is wider than theirs, for other texts and sizes.
_EXPONENT, _EXPONENT_SPREAD = 0.35, 0.08
_EXPONENTS = np.linspace(0.08, 0.62, 21)
# One run against the law, as a share of the loss: seeds, learning rates that are not equally good. Assumed.
_NOISE, _NOISE_FACTOR = 0.007, 2.0  # the median, and the factor of one standard deviation
_NOISES = _NOISE * _NOISE_FACTOR ** np.linspace(-2.0, 3.0, 13)
# E and the two terms at the rungs' middle, as shares of their loss: mean and standard deviation, before they
# are held positive. Besiroglu's law at 50M parameters and 1B tokens has 0.47, 0.26 and 0.27.
_SHARES, _SHARES_SPREAD = np.array([0.45, 0.2, 0.2]), np.array([0.35, 0.35, 0.35])
_WORSE = 0.03  # a larger run may end worse than a smaller one by this share: three times the noise of two
_DRAWS = 20_000
_SEED = 20221  # of the draws: equal runs give equal predictions


class NotPredicted(AlborError):
    """The rungs so far say nothing of the next; the message says why."""


@dataclass(frozen=True)
class Observation:
    """What one run, or one point of its curve, has shown."""

    parameters: int  # with embeddings; a tied matrix counts once
    tokens: int  # trained on, repetitions included
    loss: float  # validation, nats per token; of the same text with the same tokenizer in all observations
    tokens_per_second: float | None = None
    watts: float | None = None  # mean of the card
    # False: the learning rate had not come to its end. Such a point is worse than a run that ends there
    # (Hoffmann et al. 2022, appendix B), by an amount that no law here knows: it is left out of the fit.
    annealed: bool = True
    flops_per_token: float | None = None  # `Architecture.flops_per_token`
    modelled_tokens_per_second: float | None = None  # `albor.memory.speed`, where it models this machine


@dataclass(frozen=True)
class Speed:
    """How long a run takes, and what the card draws meanwhile."""

    tokens_per_second: float
    hours: float
    hours_low: float | None  # at the best and the worst relation of measured to expected speed so far
    hours_high: float | None  # both None with one rung, which shows no spread
    kwh: float | None
    basis: str  # what is measured and what is modelled, for people

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Prediction:
    """The validation loss that a run of `parameters` and `tokens` will end with."""

    parameters: int
    tokens: int
    loss: float  # the median
    low: float
    high: float
    level: float  # share of runs that are expected between low and high
    runs: int  # that the law rests on
    left_out: int  # observations that are not
    enough: bool  # two runs that differ in size or tokens at least; else the width is the literature's
    method: str  # for people
    exponents: tuple[float, float]  # a and b, their weighed means
    irreducible: float  # E, its median

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """A prediction, and what came of it."""

    predicted: float
    low: float
    high: float
    loss: float

    @property
    def verdict(self) -> Literal["inside", "better", "worse"]:
        """Where the result lies: in the interval, below or above it."""
        if self.low <= self.loss <= self.high:
            return "inside"
        return "better" if self.loss < self.low else "worse"

    @property
    def off(self) -> float:
        """Result less prediction, in nats per token."""
        return self.loss - self.predicted

    @property
    def outside_by(self) -> float:
        """How far beyond the interval's nearer end, in nats per token; 0 inside."""
        return max(0.0, self.low - self.loss, self.loss - self.high)

    def __str__(self) -> str:
        where = "inside" if self.verdict == "inside" else f"{self.verdict} than all of"
        beyond = f", by {self.outside_by:.3f}" if self.outside_by else ""
        return (
            f"{self.loss:.3f}, {self.off:+.3f} ({self.off / self.predicted:+.1%}) from the predicted "
            f"{self.predicted:.3f}, {where} {self.low:.3f} to {self.high:.3f}{beyond}"
        )

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {**asdict(self), "verdict": self.verdict, "off": self.off, "outside_by": self.outside_by}


def predict(
    observations: Sequence[Observation], parameters: int, tokens: int, *, level: float = LEVEL
) -> Prediction:
    """The loss of a finished run of `parameters` and `tokens`, and the interval that holds `level` of such
    runs.

    It falls with more parameters and with more tokens, whatever the observations are. Raises NotPredicted
    where no finished run is among these, and where a larger one ended worse than a smaller.
    """
    usable = [one for one in observations if one.annealed and math.isfinite(one.loss) and one.loss > 0]
    if not usable:
        ended = "no run has been observed"
        if observations:
            ended = "no observed run has come to its end with a finite loss"
        raise NotPredicted(f"the loss is not predicted: {ended}")
    _refuse_contradictions(usable)
    laws = _Laws.weigh(usable)
    drawn = laws.draw(parameters, tokens)
    outside = (1.0 - level) / 2
    low, high = np.quantile(laws.with_noise(drawn), [outside, 1.0 - outside])
    enough = len({(one.parameters, one.tokens) for one in usable}) > 1
    return Prediction(
        parameters=parameters,
        tokens=tokens,
        loss=float(np.median(drawn)),
        low=float(max(low, 0.0)),
        high=float(high),
        level=level,
        runs=len(usable),
        left_out=len(observations) - len(usable),
        enough=enough,
        method=_describe(usable, enough),
        exponents=(float(laws.a.mean()), float(laws.b.mean())),
        irreducible=float(np.median(laws.constants[:, 0])),
    )


def compare(prediction: Prediction, loss: float) -> Comparison:
    """`prediction` beside the validation loss that the run came to."""
    return Comparison(prediction.loss, prediction.low, prediction.high, loss)


def predict_speed(
    observations: Sequence[Observation],
    flops_per_token: float,
    tokens: int,
    *,
    modelled_tokens_per_second: float | None = None,
    board_watts: float | None = None,
) -> Speed:
    """The hours and the kWh of a run of `tokens`, after the measured tokens per second of `observations`.

    Where both the next run and some observed ones have a modelled speed, the next runs at that times the
    measured share of it; else FLOPs per token relate them, as if the machine did as many per second. Power is
    that of the largest measured run; else `board_watts`, the card's limit, which is the most. These are
    training steps alone, as in `albor.memory.cost`. Raises NotPredicted where no speed was measured.
    """
    measured = [one for one in observations if one.tokens_per_second]
    shares = [
        one.tokens_per_second / one.modelled_tokens_per_second
        for one in measured
        if one.tokens_per_second and one.modelled_tokens_per_second
    ]
    rates: list[float]
    if modelled_tokens_per_second and shares:
        rates = [modelled_tokens_per_second * share for share in shares]
        basis = "modelled tokens/s, times the share of them that was measured"
    else:
        rates = [
            one.tokens_per_second * one.flops_per_token / flops_per_token
            for one in measured
            if one.tokens_per_second and one.flops_per_token
        ]
        basis = "measured FLOP/s, held for the next size"
    if not rates:
        raise NotPredicted("the hours are not predicted: no run has measured its speed")
    rate = rates[-1]  # of the newest rung, which is the most similar
    hours = [tokens / one / 3600 for one in rates]
    power = [one for one in measured if one.watts]
    watts = max(power, key=lambda one: one.parameters).watts if power else board_watts
    if watts is not None:
        basis += "; measured watts" if power else "; watts of the board's limit"
    return Speed(
        tokens_per_second=rate,
        hours=tokens / rate / 3600,
        hours_low=min(hours) if len(rates) > 1 else None,
        hours_high=max(hours) if len(rates) > 1 else None,
        kwh=None if watts is None else watts * tokens / rate / 3.6e6,
        basis=basis,
    )


@dataclass(frozen=True)
class _Laws:
    """Draws from all laws, as probable as the observations make them."""

    size: float  # parameters and tokens at the rungs' middle, where the constants are what the terms come to
    tokens: float
    a: NDArray[np.float64]  # (draws,)
    b: NDArray[np.float64]
    constants: NDArray[np.float64]  # (draws, 3): E, and both terms in the middle; nats, all positive
    noise: NDArray[np.float64]  # standard deviation of one run, as a share of its loss
    chance: NDArray[np.float64]  # standard normal

    def draw(self, parameters: int, tokens: int) -> NDArray[np.float64]:
        """What each law says, in nats per token."""
        terms = (self.size / parameters) ** self.a, (self.tokens / tokens) ** self.b
        drawn: NDArray[np.float64] = (
            self.constants[:, 0] + self.constants[:, 1] * terms[0] + self.constants[:, 2] * terms[1]
        )
        return drawn

    def with_noise(self, drawn: NDArray[np.float64]) -> NDArray[np.float64]:
        """Single runs instead of laws. The same chance for each question keeps answers in order."""
        return drawn * (1.0 + self.noise * np.clip(self.chance, -4.0, 4.0))

    @classmethod
    def weigh(cls, observed: Sequence[Observation]) -> _Laws:
        """The laws, as `observed` makes them probable; none of these contradicts another."""
        sizes = np.array([one.parameters for one in observed], dtype=float)
        tokens = np.array([one.tokens for one in observed], dtype=float)
        losses = np.array([one.loss for one in observed])
        size, middle = math.exp(np.log(sizes).mean()), math.exp(np.log(tokens).mean())
        scale = float(losses.mean())

        a, b, noise = (axis.ravel() for axis in np.meshgrid(_EXPONENTS, _EXPONENTS, _NOISES, indexing="ij"))
        terms = np.stack([  # (grid, runs, 3)
            np.ones((len(a), len(sizes))), (size / sizes) ** a[:, None], (middle / tokens) ** b[:, None],
        ], axis=-1)  # fmt: skip
        # Linear regression of the losses, in units of `scale`, with a normal prior on the three constants.
        targets, spread = losses / scale, np.diag(_SHARES_SPREAD**2)
        deviations = noise[:, None] * targets
        covariance = terms @ spread @ terms.transpose(0, 2, 1) + (
            np.eye(len(targets)) * deviations[:, :, None] ** 2
        )
        rest = targets - terms @ _SHARES
        solved = np.linalg.solve(covariance, rest[..., None])[..., 0]
        evidence = -0.5 * ((rest * solved).sum(-1) + np.linalg.slogdet(covariance)[1])
        for exponent in (a, b):
            evidence += -0.5 * ((exponent - _EXPONENT) / _EXPONENT_SPREAD) ** 2
        evidence += -0.5 * (np.log(noise / _NOISE) / math.log(_NOISE_FACTOR)) ** 2
        weights = np.exp(evidence - evidence.max())
        weights /= weights.sum()
        gain = spread @ terms.transpose(0, 2, 1) @ np.linalg.inv(covariance)  # (grid, 3, runs)
        means = _SHARES + (gain @ rest[..., None])[..., 0]
        spreads = spread - gain @ terms @ spread

        # E and the terms are positive: what is not is drawn again, which is what a bound on the prior means.
        generator = np.random.default_rng(_SEED)
        roots = _roots(spreads)
        chosen: list[NDArray[np.int64]] = []
        drawn: list[NDArray[np.float64]] = []
        while sum(map(len, chosen)) < _DRAWS:
            points = generator.choice(len(weights), size=_DRAWS, p=weights)
            normal = generator.standard_normal((_DRAWS, 3, 1))
            constants = means[points] + (roots[points] @ normal)[..., 0]
            positive = (constants > 0).all(axis=-1)
            chosen.append(points[positive])
            drawn.append(constants[positive])
        points = np.concatenate(chosen)
        constants = np.concatenate(drawn) * scale
        chance = generator.standard_normal(len(points))
        return cls(size, middle, a[points], b[points], constants, noise[points], chance)


def _roots(spreads: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matrices R with R R' = spread; an eigenvalue that rounding made negative is 0."""
    values, vectors = np.linalg.eigh(spreads)
    roots: NDArray[np.float64] = vectors * np.sqrt(np.clip(values, 0.0, None))[:, None, :]
    return roots


def _refuse_contradictions(usable: Sequence[Observation]) -> None:
    """No law of this form has a loss that rises with parameters and tokens."""
    for small in usable:
        for large in usable:
            one, other = (small.parameters, small.tokens), (large.parameters, large.tokens)
            grows = one != other and one[0] <= other[0] and one[1] <= other[1]
            if grows and large.loss > small.loss * (1 + _WORSE):
                raise NotPredicted(
                    f"the loss is not predicted: {large.parameters:,} parameters on {large.tokens:,} tokens "
                    f"came to {large.loss:.3f}, and {small.parameters:,} on {small.tokens:,} to "
                    f"{small.loss:.3f}; see that they share text and tokenizer, and that the learning rate "
                    "suits both"
                )


def _describe(usable: Sequence[Observation], enough: bool) -> str:
    runs = f"{len(usable)} finished run{'s' if len(usable) > 1 else ''}"
    law = "E + A/N^a + B/D^b (Hoffmann et al. 2022), exponents held near published ones"
    if not enough:
        return f"{law}; {runs} of one size and length: how fast the loss falls is the literature's alone"
    return f"{law}, weighed by {runs}"
