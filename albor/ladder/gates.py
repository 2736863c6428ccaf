"""The gates: each holds one thing that a run has shown against a threshold, and says why that threshold.

Pure: rows of metrics.jsonl, events and other commands' JSON come in, a `Result` goes out. Whatever cannot be
judged is "not checked", with the reason, and never passes silently. No torch.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from albor.config import RunConfig
from albor.errors import DoesNotFit
from albor.ladder.file import (
    BigramGate,
    CanaryGate,
    FitsGate,
    GradientsGate,
    ScheduleEndGate,
    SkippedStepsGate,
    SpeedGate,
    UnigramGate,
    ValidationGate,
    VerifyResumeGate,
)
from albor.memory.estimate import Estimate
from albor.metric_names import metric_names
from albor.runlog import EVENTS, METRICS, known_metric
from albor.runs.record import read_log
from albor.train.schedule import learning_rate
from albor.units import format_bytes

Status = Literal["passed", "failed", "not checked", "left out"]
Row = dict[str, Any]

_LAST_ROWS = 8  # of the training loss, whose single rows are one batch each
_FEWEST_ROWS = 8  # for a trend
_MOST_ROWS = 100  # for one: its slopes are of all pairs
_UNIGRAM_LEAST_STEP, _UNIGRAM_SHARE = 200, 0.1
_STEPS_PER_SKIP = 1000

# Why each threshold is what it is, and where to look where it is not met.
WHY: dict[str, str] = {
    "fits": "what does not fit now will not fit after the hours that the rungs before it take",
    "canary": "its own limits, from what rounding was measured to do (docs/canary.md)",
    "verify_resume": "a run that resumes otherwise is another run, and long runs are resumed",
    "unigram": "a model that has not learnt how frequent each token is has learnt nothing",
    "bigram": "what counting pairs of tokens reaches needs no transformer",
    "gradients": "a part without a gradient does not learn; a norm that grows tenfold within half a run, by "
    "its trend and not by single steps, ends in divergence",
    "skipped_steps": "single steps are lost to odd batches; more of them are a wrong rate or broken data",
    "validation": "a model that knows its training text much better than other text repeats it by heart",
    "schedule_end": "a run whose rate has not come down is not finished, and its loss is not its best",
    "export": "what others load has to be what was trained; the limits are the export's own (docs/export.md)",
    "speed": "half of what was expected is another machine than the one that was planned for",
}
LOOK: dict[str, str] = {
    "fits": "albor vram-estimate with this rung's file, and --fit",
    "canary": "albor canary with this rung's file, and docs/canary.md",
    "verify_resume": "albor verify-resume with this rung's file, and docs/reliability.md",
    "unigram": "train/loss and train/lr of the first steps in metrics.jsonl: optimizer.lr, "
    "schedule.warmup_steps, and whether the data is the text that was meant",
    "bigram": "val/loss in metrics.jsonl: too few tokens, too small a model, or too low an optimizer.lr",
    "gradients": "gradients/* in metrics.jsonl: optimizer.lr, train.precision, model.initializer_range",
    "skipped_steps": "events.jsonl, and albor inspect-spike",
    "validation": "train/loss beside val/loss in metrics.jsonl: more data, fewer tokens, or a smaller model",
    "schedule_end": "train/lr in metrics.jsonl, and whether the run reached its last step",
    "export": "albor export with this run, which shows what differs",
    "speed": "train/tokens_per_second in metrics.jsonl, and albor doctor",
}


@dataclass(frozen=True)
class Result:
    """What a gate has found."""

    gate: str
    status: Status
    measured: str
    threshold: str = ""
    value: float | None = None  # the number that was judged, and the one that it was held against
    limit: float | None = None
    details: Row = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """None: it was not judged."""
        return {"passed": True, "failed": False}.get(self.status)

    def as_json(self) -> Row:
        """For ladder.json and `--json`."""
        values = asdict(self) | {
            "passed": self.passed,
            "why": WHY[self.gate],
            "look_at": LOOK[self.gate] if self.status == "failed" else None,
        }
        for key in ("value", "limit"):
            values[key] = values[key] if values[key] is not None and math.isfinite(values[key]) else None
        return values

    @classmethod
    def from_json(cls, values: Row) -> Result:
        """What `as_json` gave."""
        return cls(**{key: values[key] for key in cls.__dataclass_fields__})


def left_out(gate: str) -> Result:
    """Of a gate that the file says false to."""
    return Result(gate, "left out", "left out by the ladder's file")


def not_checked(gate: str, why: str, threshold: str = "") -> Result:
    """Of a gate that there is no way to judge."""
    return Result(gate, "not checked", f"not checked: {why}", threshold)


def _judge(
    gate: str, passed: bool, measured: str, threshold: str, value: float, limit: float, **details: Any
) -> Result:
    status: Status = "passed" if passed else "failed"
    return Result(gate, status, measured, threshold, value, limit, details)


@dataclass(frozen=True)
class RunLog:
    """What a run has left so far."""

    config: RunConfig
    rows: list[Row]
    events: list[Row]
    final: Row | None = None  # eval/final.json: it has ended
    problems: tuple[str, ...] = ()  # lines that are no rows: file, line, and that they are left out

    @classmethod
    def read(cls, config: RunConfig, directory: Path) -> RunLog:
        """Of a run directory; what is not there yet is empty."""
        try:
            final = json.loads((directory / "eval" / "final.json").read_bytes())
        except (OSError, ValueError):
            final = None
        rows, problems = read_log(
            directory / METRICS, lambda row: type(row.get("step")) is int, "a row of metrics"
        )
        events, others = read_log(
            directory / EVENTS, lambda row: isinstance(row.get("event"), str), "an event"
        )
        return cls(config, rows, events, final if isinstance(final, dict) else None, problems + others)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of the rows that have this metric; NaN and infinity as they were."""
        found = ((row["step"], known_metric(row, name)) for row in self.rows)
        return [(step, value) for step, value in found if value is not None]

    @property
    def pure_loss(self) -> bool:
        """Whether the training loss is the cross-entropy alone, as the validation's is."""
        return not (self.config.train.label_smoothing or self.config.train.z_loss)

    @property
    def skipped(self) -> set[int]:
        """Steps at which no weight moved, fp16's search for its scale aside."""
        return self._steps(lambda event: event.get("action") == "skipped")

    @property
    def unmoved(self) -> set[int]:
        """All steps at which no weight moved: their loss and norms need not be finite, and taught nothing."""
        return self.skipped | self._steps(lambda event: event["event"] == "loss_scale")

    def training_loss(
        self, first: int, last: int, *, least: int = 0, most: int | None = None
    ) -> float | None:
        """The mean of train/loss in the rows behind step `first` up to step `last`, without the steps that
        the guard left out: of the last `most`, and of the last `least` where fewer are behind `first`. None
        where there are none.
        """
        unmoved = self.unmoved
        rows = [(at, loss) for at, loss in self.series("train/loss") if at <= last and at not in unmoved]
        # Events may not be known yet, while the run trains: what is not finite was left out.
        rows = [row for row in rows if math.isfinite(row[1])] or rows
        count = max(sum(at > first for at, _ in rows), least)
        count = count if most is None else min(count, most)
        return statistics.fmean(loss for _, loss in rows[-count:]) if count and rows else None

    def _steps(self, chosen: Callable[[Row], bool]) -> set[int]:
        kinds = ("skipped_step", "spike", "loss_scale")
        return {
            event["step"]
            for event in self.events
            if event.get("event") in kinds and type(event.get("step")) is int and chosen(event)
        }


# Before the training


def fits(gate: FitsGate, target: Estimate) -> Result:
    """`target` is the plan for this machine as it is now."""
    capacity, needed = target.hardware.capacity_bytes, target.required_bytes
    if target.fits is None or capacity is None:
        return not_checked("fits", f"the memory of {target.hardware.description} is not known")
    limit = math.floor(capacity * (1.0 - gate.free))
    share = f", less {gate.free:.0%}" if gate.free else ""
    passed = target.fits and needed <= limit
    measured = f"{format_bytes(needed)} needed"
    if target.fits is False and needed <= limit:
        measured = target.verdict
    threshold = f"at most {format_bytes(limit)} ({target.hardware.description}{share})"
    return _judge("fits", passed, measured, threshold, needed, limit)


def canary(gate: CanaryGate, code: int, found: Row | None, words: str = "") -> Result:
    """`found` is what `albor canary --json` printed, if it came to that, and `words` what it said last."""
    threshold = f"agrees with a reference over {gate.steps} steps"
    if code == DoesNotFit.exit_code:
        return not_checked("canary", f"run and reference together do not fit: {words}", threshold)
    if found is None or code not in (0, 1):
        return _judge("canary", False, f"ended with {code}: {words or 'no word'}", threshold, 1, 0)
    measured = f"{found['verdict']}, beside {found['reference']}"
    if found["verdict"] != "PASS":
        measured = f"{found['explanation'][0]} (beside {found['reference']})"
    # As shares of their limits; a count, whose limit is 0, is not one.
    checks = [check for check in found["checks"] if check["value"] is not None and check["limit"]]
    worst = max((check["value"] / check["limit"] for check in checks), default=math.inf)
    passed = code == 0 and found["verdict"] == "PASS"
    return _judge("canary", passed, measured, threshold, worst, 1.0, explanation=found["explanation"])


def verify_resume(gate: VerifyResumeGate, code: int, found: Row | None, words: str = "") -> Result:
    """`found` is what `albor verify-resume --json` printed."""
    threshold = f"equal in every bit over {gate.steps} steps"
    if found is None or code not in (0, 1):
        return _judge("verify_resume", False, f"ended with {code}: {words or 'no word'}", threshold, 1, 0)
    differing = [one for one in found["comparisons"] if one["difference"]]
    compared = ", ".join(f"{one['compared']} {one['unit']} of {one['what']}" for one in found["comparisons"])
    measured = f"identical: {compared}"
    if differing or not found["identical"]:
        measured = "; ".join(f"{one['what']}: {one['difference']}" for one in differing) or "not identical"
    passed = code == 0 and found["identical"] is True and not differing
    return _judge("verify_resume", passed, measured, threshold, len(differing), 0)


# By what the run has logged


def unigram_step(gate: UnigramGate, config: RunConfig) -> int:
    """The step by which the loss must be below the unigram entropy."""
    if gate.by_step is not None:
        return min(gate.by_step, config.steps)
    share = math.ceil(_UNIGRAM_SHARE * config.steps)
    return min(config.steps, max(2 * config.schedule.warmup_steps, share, _UNIGRAM_LEAST_STEP))


def unigram(gate: UnigramGate, run: RunLog, entropy: float) -> Result:
    """The lower of the last validation by that step and the mean training loss of the rows before it."""
    step, limit = unigram_step(gate, run.config), entropy - gate.margin
    threshold = f"below {limit:.3f}, the unigram entropy{_less(gate.margin)}, by step {step:,}"
    validation = [loss for at, loss in run.series("val/loss") if at <= step][-1:]
    training = run.training_loss(step // 2, step, most=_LAST_ROWS)
    measured = [(value, "validation") for value in validation]
    if run.pure_loss and training is not None:
        measured.append((training, "training"))
    reached = max((row["step"] for row in run.rows), default=0)
    if reached < step:
        return not_checked("unigram", f"the run is at step {reached:,}", threshold)
    if not measured:
        return not_checked(
            "unigram", f"no loss is logged up to step {step:,}; lower log.every_steps", threshold
        )
    value, what = min(measured, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    return _judge("unigram", value < limit, f"{what} loss {value:.3f}", threshold, value, limit)


def bigram(gate: BigramGate, run: RunLog, entropy: float) -> Result:
    """The validation at the end, on the very tokens that `entropy` is of."""
    limit = entropy - gate.margin
    threshold = f"below {limit:.3f}, what a bigram model reaches{_less(gate.margin)}"
    if run.final is None:
        return not_checked("bigram", "the run has not ended", threshold)
    value = known_metric(run.final, "val/loss")
    value = math.nan if value is None else value
    return _judge("bigram", value < limit, f"validation loss {value:.3f}", threshold, value, limit)


def gradients(gate: GradientsGate, run: RunLog) -> Result:
    """No part's norm is 0 or not finite in any row; none grows without bound.

    Growth is the Theil-Sen slope (the median of the slopes between all pairs of rows) of the norm's logarithm
    over the second half of the run, behind the warm-up, times its length: a few odd steps do not move it,
    and a fall of the rate, which raises norms by less than twice, does not reach the threshold.
    """
    config = run.config
    names = [name for name in metric_names(config) if name.startswith("gradients/")]
    threshold = f"no part 0 or not finite; growth at most {gate.growth:g}-fold"
    unmoved = run.unmoved
    rows = [row for row in run.rows if "train/loss" in row and row["step"] not in unmoved]
    if not rows:
        return not_checked("gradients", "no row is logged", threshold)
    for row in rows:
        for name in names:
            norm = known_metric(row, name)
            if norm is None or not math.isfinite(norm) or norm <= 0:
                shown = "not in the row" if norm is None else f"{norm:g}"
                measured = f"{name} is {shown} at step {row['step']:,}"
                value = math.nan if norm is None else norm
                return _judge(
                    "gradients", False, measured, threshold, value, 0.0, part=name, step=row["step"]
                )
    behind = max(config.steps / 2, config.schedule.warmup_steps)
    late = [row for row in rows if row["step"] > behind]
    if len(late) < _FEWEST_ROWS:
        measured = f"{len(names)} parts, none 0; growth not checked: {len(late)} rows, {_FEWEST_ROWS} needed"
        return Result("gradients", "passed", measured, threshold)
    steps = [row["step"] for row in late]
    growths = {name: trend(steps, [known_metric(row, name) or math.nan for row in late]) for name in names}
    worst = max(growths, key=lambda name: growths[name])
    measured = f"{len(names)} parts, none 0; most growth {growths[worst]:.2f}-fold, {worst}"
    return _judge(
        "gradients", growths[worst] <= gate.growth, measured, threshold, growths[worst], gate.growth
    )


def trend(steps: Sequence[int], norms: Sequence[float]) -> float:
    """By what factor the positive `norms` change from the first step to the last, by the median slope."""
    every = -(-len(steps) // _MOST_ROWS)
    points = [(step, math.log(norm)) for step, norm in zip(steps[::every], norms[::every], strict=True)]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in combinations(points, 2) if b[0] > a[0]]
    return math.exp(min(statistics.median(slopes) * (steps[-1] - steps[0]), 700.0)) if slopes else 1.0


def skipped_steps(gate: SkippedStepsGate, run: RunLog) -> Result:
    """Steps whose update was left out; fp16's search for its loss scale does not count."""
    limit = gate.at_most if gate.at_most is not None else 1 + run.config.steps // _STEPS_PER_SKIP
    if not run.events:  # a run's first is that it has started
        return not_checked("skipped_steps", f"there is no {EVENTS}", f"at most {limit}")
    count = len(run.skipped)
    shown = f" (steps {', '.join(map(str, sorted(run.skipped)[:5]))}{', ...' if count > 5 else ''})"
    measured = f"{count} of {run.config.steps:,}{shown if count else ''}"
    return _judge("skipped_steps", count <= limit, measured, f"at most {limit}", count, limit)


def validation(gate: ValidationGate, run: RunLog) -> Result:
    """How far the last validation is above the mean training loss since the one before it, and above its own
    minimum. A row's loss is one batch's: `_LAST_ROWS` are the fewest that say something.
    """
    threshold = f"gap at most {gate.gap:g}, rise at most {gate.rise:g}"
    losses = run.series("val/loss")
    if run.final is None or not losses:
        return not_checked("validation", "the run has not ended", threshold)
    last = losses[-1][1]
    at, lowest = min(losses, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    rise = last - lowest
    final = known_metric(run.final, "val/loss")
    before = ([0] + [step for step, _ in losses])[-2]
    training = run.training_loss(before, run.config.steps, least=_LAST_ROWS)
    gap = None
    if run.pure_loss and training is not None and final is not None:
        gap = final - training
    shown = "gap not checked: the training loss has label smoothing or z-loss in it"
    if gap is not None:
        shown = f"gap {gap:+.3f}"
    passed = rise <= gate.rise and (gap is None or gap <= gate.gap)
    measured = f"{shown}, rise {rise:.3f} from step {at:,}"
    worst = max([(rise, gate.rise), (gap or 0.0, gate.gap)], key=lambda pair: pair[0] / pair[1])
    return _judge("validation", passed, measured, threshold, *worst, gap=gap, rise=rise)


def schedule_end(gate: ScheduleEndGate, run: RunLog) -> Result:
    """The rate of the last step, and that it is the last step."""
    config = run.config
    limit = learning_rate(config.steps, config.steps, config.optimizer.lr, config.schedule)
    threshold = f"{limit:.3g} at step {config.steps:,}"
    rates = run.series("train/lr")
    if not rates:
        return not_checked("schedule_end", "no row is logged", threshold)
    step, rate = rates[-1]
    passed = step == config.steps and abs(rate - limit) <= gate.tolerance * max(limit, 1e-30)
    return _judge("schedule_end", passed, f"{rate:.3g} at step {step:,}", threshold, rate, limit)


def speed(gate: SpeedGate, run: RunLog, modelled: float | None) -> Result:
    """The median tokens/s, held against the modelled; where there is none, against the run's own beginning,
    which shows a machine that slows down, and not one that is slow.
    """
    rates = [rate for step, rate in run.series("train/tokens_per_second") if step > 1]
    if modelled is not None:
        threshold = f"at least {gate.fraction:g} of the modelled {modelled:,.0f}"
        if not rates:
            return not_checked("speed", "no row is logged", threshold)
        value = statistics.median(rates)
        measured, limit = f"{value:,.0f} tokens/s", modelled * gate.fraction
    else:
        threshold = f"at least {gate.fraction:g} of its own first quarter"
        if len(rates) < _FEWEST_ROWS:
            reason = "this machine is not modelled"
            reason += f", and {len(rates)} rows are too few to compare the run with its own beginning"
            return not_checked("speed", reason, threshold)
        early = statistics.median(rates[: len(rates) // 4])
        value, limit = statistics.median(rates[len(rates) // 4 :]), early * gate.fraction
        measured = f"{value:,.0f} tokens/s, {early:,.0f} in the first quarter; this machine is not modelled"
    return _judge("speed", value >= limit, measured, threshold, value, limit)


# Behind the training


def export(code: int, found: Row | None, words: str = "") -> Result:
    """`found` is what `albor export --to hf --json` printed."""
    threshold = "tokens, logits, greedy text and the stop are the run's"
    checked = (found or {}).get("exports") or [None]
    gate = checked[0]["gate"] if checked[0] else None
    step, last = (found or {}).get("step"), (found or {}).get("planned_steps")
    if gate is not None and step != last:
        measured = (
            f"the export is of step {step}, and the run ended at {last}: its last checkpoint is damaged"
        )
        return _judge("export", False, measured, threshold, 1, 0)
    if gate is None or code not in (0, 1):
        return _judge("export", False, f"ended with {code}: {words or 'no word'}", threshold, 1, 0)
    if gate["passed"] is None:
        return not_checked("export", gate["unchecked"] or "no program to check it with", threshold)
    wrong = [row for row in gate["checks"] if not row["passed"]]
    measured = "; ".join(f"{row['check']}: {row['found']}" for row in wrong or gate["checks"])
    passed = code == 0 and gate["passed"] is True and not wrong
    return _judge("export", passed, f"{gate['runtime']}: {measured}", threshold, len(wrong), 0)


def _less(margin: float) -> str:
    return f" less {margin:g}" if margin else ""
