"""What the canary found, the verdict that follows from it, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from albor.canary.compare import Agreement
from albor.canary.verdict import Check, Limits, SameWeightsLimits
from albor.config import RunConfig

# The reference's loss is this many times its first: it does not train. Runs that pass have not exceeded 1.
_RISE = 1.1

_LISTED = 5  # parameters that a failing check names
_OWN_WAY = "loss, each on its own way"

Verdict = Literal["PASS", "FAIL", "DIVERGES"]


@dataclass
class Row:
    """One step of both sides. Where either is not finite, no gradient is compared."""

    label: str
    step: int  # whose data it is
    loss: float
    grad_norm: float
    lr: float | None = None  # None: no weight moves
    reference_loss: float = math.nan
    reference_grad_norm: float = math.nan
    cosines: dict[str, float] = field(default_factory=dict)  # by parameter
    update_errors: dict[str, float] = field(default_factory=dict)  # by parameter
    updated: bool = False
    scale_search: bool = False  # skipped, but only because fp16's loss scale is too large yet

    @property
    def finite(self) -> bool:
        """Of albor. A gradient of nothing is no more use than one that is not finite, as the guard has it:
        weights whose squares overflow give that.
        """
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and self.grad_norm > 0

    @property
    def reference_finite(self) -> bool:
        """Of the reference."""
        return math.isfinite(self.reference_loss) and math.isfinite(self.reference_grad_norm)

    @property
    def loss_difference(self) -> float:
        """albor's loss less the reference's."""
        return self.loss - self.reference_loss

    @property
    def norm_ratio(self) -> float:
        """albor's gradient norm by the reference's."""
        return self.grad_norm / self.reference_grad_norm if self.reference_grad_norm else math.nan

    @property
    def lowest(self) -> tuple[str, float]:
        """The parameter whose gradients agree least, and their cosine."""
        return min(self.cosines.items(), key=lambda pair: pair[1], default=("", math.nan))

    def as_json(self) -> dict[str, Any]:
        """The worst parameters instead of all."""
        parameter, cosine = self.lowest
        moved, error = max(self.update_errors.items(), key=lambda pair: pair[1], default=("", math.nan))
        return {
            "step": self.step,
            "lr": self.lr,
            "loss": self.loss,
            "reference_loss": self.reference_loss,
            "loss_difference": self.loss_difference,
            "grad_norm": self.grad_norm,
            "reference_grad_norm": self.reference_grad_norm,
            "norm_ratio": self.norm_ratio,
            "min_cosine": cosine,
            "min_cosine_parameter": parameter,
            "max_update_error": error,
            "max_update_error_parameter": moved,
            "updated": self.updated,
        }


@dataclass(frozen=True)
class SameWeights:
    """A comparison while both sides have equal weights."""

    where: str
    row: Row
    agreements: dict[str, Agreement]
    scale: float  # the largest norm of the whole gradient so far, see `Limits`

    def deviations(self, noise: float) -> dict[str, tuple[float, float]]:
        """(1 - cosine, |norm ratio - 1|) of every parameter, less what rounding alone may do to either."""
        found = {}
        for name, agreement in self.agreements.items():
            # Noise of relative size r turns a vector by an angle of r, and changes its length by r at most.
            share = agreement.reference_norm / self.scale
            r = noise / share if share > 0 else 0.0
            turned, stretched = 1 - agreement.cosine, abs(agreement.norm_ratio - 1)
            found[name] = max(turned - r * r / 2, 0.0), max(stretched - r, 0.0)  # a NaN stays one
        return found

    def checks(self, limits: SameWeightsLimits, noise: float) -> Iterator[Check]:
        """Every parameter's gradient, the whole one, and the loss."""
        row, each = self.row, self.deviations(noise)
        turned = [(name, deviation) for name, (deviation, _) in each.items()]
        yield Check.worst(f"gradient direction, {self.where}", turned, limits.cosine)
        stretched = [(name, deviation) for name, (_, deviation) in each.items()]
        yield Check.worst(f"parameters' gradient norms, {self.where}", stretched, limits.parameter_norm)
        apart = abs(row.grad_norm - row.reference_grad_norm) / self.scale
        yield Check.worst(f"gradient norm, {self.where}", [("", apart)], limits.norm)
        yield Check.worst(f"loss, {self.where}", [("", abs(row.loss_difference))], limits.loss)


@dataclass
class Canary:
    """Everything that was compared; the verdict follows from it."""

    config: RunConfig
    device: str
    compute_dtype: str
    reference: str  # name and version
    steps: int
    rows: list[Row] = field(default_factory=list)
    first: SameWeights | None = None
    spread: SameWeights | None = None
    last: SameWeights | None = None

    @property
    def limits(self) -> Limits:
        """What this run must keep."""
        return Limits.of(self.compute_dtype, self.config.optimizer.state_dtype)

    @property
    def same_weights(self) -> list[tuple[str, SameWeights, SameWeightsLimits]]:
        """The comparisons at equal weights that were made: name, what was found, what is allowed."""
        limits = self.limits
        made = [
            ("first", self.first, limits.initial),
            ("spread", self.spread, limits.initial),
            ("last", self.last, limits.last),
        ]
        return [(name, same, allowed) for name, same, allowed in made if same is not None]

    @property
    def update_check(self) -> Check:
        """Every update of every parameter."""
        errors = [
            (f"step {row.label}, {name}", error)
            for row in self.rows
            for name, error in row.update_errors.items()
        ]
        return Check.worst("updates, from the same gradients", errors, self.limits.update)

    @property
    def checks(self) -> list[Check]:
        """All that is asked, in the order in which one would look for a mistake."""
        noise = self.limits.noise
        early, late = (
            [
                check
                for name, same, allowed in self.same_weights
                if (name == "last") == is_last
                for check in same.checks(allowed, noise)
            ]
            for is_last in (False, True)
        )
        losses = [(f"step {row.label}", abs(row.loss_difference)) for row in self.rows if row.cosines]
        skipped = [row for row in self.rows if not row.updated and not row.scale_search]
        where = f"the first is step {skipped[0].label}" if skipped else ""
        return [
            *early,
            self.update_check,
            *late,
            Check.worst(_OWN_WAY, losses, self.limits.loss),
            Check.worst("skipped steps", [(where, len(skipped))], 0),
        ]

    @property
    def passed(self) -> bool:
        """Whether albor did what the reference does."""
        return len(self.same_weights) == 3 and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> Verdict:
        """PASS: albor did what the reference does. DIVERGES: with these settings the reference does not
        train, and until then albor did the same; what follows says nothing of albor. FAIL: anything else.
        """
        if self.passed:
            return "PASS"
        end = self.reference_diverges
        if end is None or self._alone_not_finite(end) or self._wrong_before_training():
            return "FAIL"
        return "DIVERGES"

    def _wrong_before_training(self) -> bool:
        """Whether something fails that no learning rate excuses: the gradients before the first step, where
        the reference has finite ones, or an update.
        """
        checks = [
            check
            for name, same, allowed in self.same_weights
            if name != "last" and same.row.reference_finite
            for check in same.checks(allowed, self.limits.noise)
        ]
        if any(row.update_errors for row in self.rows):  # there was an update
            checks.append(self.update_check)
        return not all(check.passed for check in checks)

    @property
    def not_finite(self) -> Row | None:
        """albor's first step that is not finite, the search for fp16's loss scale aside."""
        return next((row for row in self.rows if not row.finite and not row.scale_search), None)

    @property
    def reference_diverges(self) -> Row | None:
        """The first step at which the reference, on its own way, is not finite or its loss has risen."""
        return next(
            (
                row
                for row in self.rows
                if not row.reference_finite or row.reference_loss > _RISE * self.rows[0].reference_loss
            ),
            None,
        )

    def _alone_not_finite(self, end: Row) -> bool:
        """Whether albor has stopped being finite before the reference diverged, or where the reference, with
        the same weights, is finite.
        """
        ours = self.not_finite
        if ours is not None and ours.step < end.step:
            return True
        return any(not same.row.finite and same.row.reference_finite for _, same, _ in self.same_weights)

    def parameters(self) -> dict[str, dict[str, float]]:
        """By parameter: how its gradients agree at the same weights, its lowest cosine of all steps, and the
        largest error of its updates.
        """
        found: dict[str, dict[str, float]] = {}
        for when, same, _ in self.same_weights:
            for name, agreement in same.agreements.items():
                values = {f"{when}_cosine": agreement.cosine, f"{when}_norm_ratio": agreement.norm_ratio}
                found.setdefault(name, {}).update(values)
        for name, values in found.items():
            cosines = [row.cosines[name] for row in self.rows if row.cosines]
            errors = [row.update_errors[name] for row in self.rows if row.update_errors]
            values["min_cosine"] = min(cosines, default=math.nan)
            values["max_update_error"] = max(errors, default=math.nan)
        return found

    def explanation(self) -> list[str]:
        """The verdict as people read it: what it rests on, and what to do."""
        if self.verdict == "PASS":
            return [f"PASS: albor's first {self.steps} steps are the reference's, within the limits"]
        return self._diverges() if self.verdict == "DIVERGES" else self._fails()

    def _diverges(self) -> list[str]:
        end, ours = self.reference_diverges, self.not_finite
        assert end is not None
        albor = f"albor does not stay finite (step {ours.label})" if ours else "albor stays finite"
        if end.reference_finite:
            losses = f"{self.rows[0].reference_loss:.2f} to {end.reference_loss:.2f}"
            reference = f"the reference's loss rises from {losses} (step {end.label})"
        else:
            either = " either" if ours else ""
            reference = f"the reference does not stay finite{either} (step {end.label})"
        if end is self.rows[0]:
            remedy = "lower model.initializer_range"
        else:
            remedy = "lower optimizer.lr, or raise schedule.warmup_steps"
        return [
            f"DIVERGES: {albor}, and {reference}",
            f"It is the configuration that does not train: {remedy}.",
        ]

    def _fails(self) -> list[str]:
        failed = [check for check in self.checks if not check.passed]
        ours = self.not_finite
        if ours is not None and not self._wrong_before_training():
            lines = [
                f"FAIL: albor's loss or gradient is not finite (step {ours.label}), and the reference's is"
            ]
        else:
            lines = [f"FAIL: {failed[0].name}: {failed[0].where or format(failed[0].value, '.2g')}"]
        if suspects := self._suspects():
            more = f" and {len(suspects) - _LISTED} more" if len(suspects) > _LISTED else ""
            lines.append(f"Parameters beyond a limit: {', '.join(suspects[:_LISTED])}{more}")
        if [check.name for check in failed] == [_OWN_WAY]:
            lines += [
                "Gradients at the same weights and every update agree. What differs may have grown from",
                "rounding, as it does near the largest learning rate that trains. What tells more:",
                "  the same with a lower optimizer.lr: if it passes, there is nothing to report",
            ]
        else:
            lines += ["Do not train with this: it looks like a bug in albor. What tells more:"]
        if self.compute_dtype != "float32":
            lines += ["  the same with train.precision=fp32: if it passes, precision is what differs"]
        if not self.reference.startswith("albor"):
            lines += ["  the same with --reference oracle: if it passes, the other reference is what differs"]
        return [*lines, "  then please report it, with what the same command prints with --json"]

    def _suspects(self) -> list[str]:
        """Parameters beyond a limit at the same weights or in their updates, the worst first."""
        limits = self.limits
        excess = {
            name: [values["max_update_error"] / limits.update] for name, values in self.parameters().items()
        }
        for _, same, allowed in self.same_weights:
            for name, (turned, stretched) in same.deviations(limits.noise).items():
                excess[name] += [turned / allowed.cosine, stretched / allowed.parameter_norm]
        worst = {
            name: max(math.inf if math.isnan(value) else value for value in values)
            for name, values in excess.items()
        }
        beyond = [name for name, value in worst.items() if value > 1]
        return sorted(beyond, key=lambda name: -worst[name])

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; what is not finite is null."""
        values = {
            "config": self.config.model_dump(mode="json"),
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "reference": self.reference,
            "reference_dtype": "float32",
            "steps": [row.as_json() for row in self.rows],
            "at_spread_norms": self.spread.row.as_json() if self.spread else None,
            "at_last_weights": self.last.row.as_json() if self.last else None,
            "parameters": self.parameters(),
            "thresholds": asdict(self.limits),
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "verdict": self.verdict,
            "explanation": self.explanation(),
        }
        finite: dict[str, Any] = _finite(values)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
