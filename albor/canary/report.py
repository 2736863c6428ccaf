"""What the canary found: the rows and the verdict for people, and the same as one JSON object."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from albor.architecture import Architecture
from albor.canary.compare import Agreement
from albor.canary.verdict import Check, Limits, SameWeightsLimits
from albor.config import RunConfig

_LISTED = 5  # parameters that a failing check names


@dataclass
class Row:
    """One step of both sides. Where albor's gradient is not finite, nothing is compared with it."""

    step: int
    lr: float | None  # None: no weight moves
    loss: float
    grad_norm: float
    reference_loss: float = math.nan
    reference_grad_norm: float = math.nan
    cosines: dict[str, float] = field(default_factory=dict)  # by parameter
    update_errors: dict[str, float] = field(default_factory=dict)  # by parameter
    updated: bool = False

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
            found[name] = max(0.0, turned - r * r / 2), max(0.0, stretched - r)
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
    last: SameWeights | None = None

    @property
    def limits(self) -> Limits:
        """What this run must keep."""
        return Limits.of(self.compute_dtype, self.config.optimizer.state_dtype)

    @property
    def checks(self) -> list[Check]:
        """All that is asked, in the order in which one would look for a mistake."""
        limits, compared = self.limits, [row for row in self.rows if row.cosines]
        skipped = len(self.rows) - sum(row.updated for row in self.rows)
        # In fp16 the loss scale is found by steps that are too large for it, which are skipped.
        allowed = len(self.rows) - 1 if self.compute_dtype == "float16" else 0
        updates = [
            (f"step {row.step}, {name}", error)
            for row in compared
            for name, error in row.update_errors.items()
        ]
        losses = [(f"step {row.step}", abs(row.loss_difference)) for row in compared]
        return [
            *(self.first.checks(limits.initial, limits.noise) if self.first else ()),
            Check.worst("updates, from the same gradients", updates, limits.update),
            *(self.last.checks(limits.last, limits.noise) if self.last else ()),
            Check.worst("loss, each on its own way", losses, limits.loss),
            Check.worst("skipped steps", [("", skipped)], allowed),
        ]

    @property
    def passed(self) -> bool:
        """Whether albor did what the reference does."""
        return self.first is not None and self.last is not None and all(check.passed for check in self.checks)

    @property
    def reference_is_finite(self) -> bool:
        """Whether the plain side itself could train."""
        return all(math.isfinite(row.reference_loss + row.reference_grad_norm) for row in self.rows)

    def parameters(self) -> dict[str, dict[str, float]]:
        """By parameter: how its gradients agree at the same weights, its lowest cosine of all steps, and the
        largest error of its updates.
        """
        found: dict[str, dict[str, float]] = {}
        for when, same in (("first", self.first), ("last", self.last)):
            for name, agreement in same.agreements.items() if same else ():
                values = {f"{when}_cosine": agreement.cosine, f"{when}_norm_ratio": agreement.norm_ratio}
                found.setdefault(name, {}).update(values)
        rows = [row for row in self.rows if row.cosines]
        for name, values in found.items():
            values["min_cosine"] = min((row.cosines[name] for row in rows), default=math.nan)
            values["max_update_error"] = max((row.update_errors[name] for row in rows), default=math.nan)
        return found

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; what is not finite is null."""
        last = self.last
        values = {
            "config": self.config.model_dump(mode="json"),
            "device": self.device,
            "compute_dtype": self.compute_dtype,
            "reference": self.reference,
            "reference_dtype": "float32",
            "steps": [row.as_json() for row in self.rows],
            "at_last_weights": last.row.as_json() if last else None,
            "parameters": self.parameters(),
            "thresholds": asdict(self.limits),
            "checks": [asdict(check) | {"passed": check.passed} for check in self.checks],
            "verdict": "PASS" if self.passed else "FAIL",
        }
        finite: dict[str, Any] = _finite(values)
        return finite


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLUMNS = "{:>5} {:>9} {:>9} {:>9}  {:>8} {:>8} {:>8}  {:>8}  {}"


def print_head(canary: Canary, console: Console) -> None:
    """What is compared, and the columns."""
    config = canary.config
    count = Architecture.from_config(config.model).parameter_count
    say(console, f"{config.name}: {count:,} parameters, {config.tokens_per_step:,} tokens per step")
    say(console, f"albor: {canary.compute_dtype} on {canary.device}")
    say(console, f"reference: {canary.reference}, float32 on {canary.device}")
    say(console, "")
    say(
        console,
        _COLUMNS.format(
            "step", "loss", "reference", "apart", "norm", "reference", "ratio", "cosine", "of (the lowest)"
        ),
    )


def print_row(row: Row, console: Console) -> None:
    """One step, or the comparison at the end."""
    parameter, cosine = row.lowest
    say(
        console,
        _COLUMNS.format(
            row.step if row.lr is not None else "same",
            f"{row.loss:.5f}", f"{row.reference_loss:.5f}", f"{row.loss_difference:+.1e}",
            f"{row.grad_norm:.4f}", f"{row.reference_grad_norm:.4f}", f"{row.norm_ratio:.5f}",
            f"{cosine:.6f}", parameter,
        ),
    )  # fmt: skip


def print_verdict(canary: Canary, console: Console) -> None:
    """Each check beside its limit, and what follows."""
    say(console, "")
    for check in canary.checks:
        mark = "ok  " if check.passed else "FAIL"
        where = f"  {check.where}" if check.where else ""
        say(console, f"{mark} {check.name:<52} {check.value:<8.2g} limit {check.limit:<8.2g}{where}")
    say(console, "")
    for line in verdict_lines(canary):
        say(console, line)


def verdict_lines(canary: Canary) -> list[str]:
    """The verdict, and where it is FAIL, the worst parameter and what to do."""
    if canary.passed:
        return [f"PASS: albor's first {canary.steps} steps are the reference's, within the limits"]
    if not canary.reference_is_finite:
        return [
            "FAIL: the reference does not stay finite either",
            "The configuration cannot train: lower optimizer.lr, or raise schedule.warmup_steps.",
        ]
    failed = [check for check in canary.checks if not check.passed]
    lines = [f"FAIL: {failed[0].name}: {failed[0].where or failed[0].value}" if failed else "FAIL"]
    suspects = _suspects(canary)
    if suspects:
        more = f" and {len(suspects) - _LISTED} more" if len(suspects) > _LISTED else ""
        lines.append(f"Parameters beyond a limit: {', '.join(suspects[:_LISTED])}{more}")
    lines.append("Do not train with this. What tells more, and what to report:")
    if canary.compute_dtype != "float32":
        lines.append("  the same with train.precision=fp32: if it passes, precision is what differs")
    if not canary.reference.startswith("albor"):
        lines.append("  the same with --reference oracle: if it passes, the other reference is what differs")
    lines.append("  then please report it, with what the same command prints with --json")
    return lines


def _suspects(canary: Canary) -> list[str]:
    """Parameters beyond a limit at the same weights or in their updates, the worst first."""
    limits = canary.limits
    excess = {
        name: [values["max_update_error"] / limits.update] for name, values in canary.parameters().items()
    }
    for same, allowed in ((canary.first, limits.initial), (canary.last, limits.last)):
        for name, (turned, stretched) in same.deviations(limits.noise).items() if same else ():
            excess[name] += [turned / allowed.cosine, stretched / allowed.parameter_norm]
    worst = {
        name: max(math.inf if math.isnan(value) else value for value in values)
        for name, values in excess.items()
    }
    beyond = [name for name, value in worst.items() if value > 1]
    return sorted(beyond, key=lambda name: -worst[name])


def say(console: Console, line: str) -> None:
    """A line as it is: neither wrapped nor coloured."""
    console.out(line, highlight=False)
