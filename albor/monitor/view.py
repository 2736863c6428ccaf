"""What there is to see of a run at one moment: `build_view`, a pure function of what has been read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from albor.alerts import parse_rule
from albor.config import RunConfig
from albor.monitor.history import GRADIENTS, History, seconds_of

Level = Literal["plain", "good", "warning", "bad"]
Kind = Literal["raw", "line", "points"]

_SMOOTHED = 50  # the smoothed curve is the mean over a fiftieth of the rows behind it, and at least
_LEAST_SMOOTHED = 5
_LATE_ROWS, _LATE_SECONDS = 10, 60.0  # a row is late after so many times its usual time, and so much
_ENDED = ("finished", "stopped", "diverged", "failed", "lost")
_LEVELS: Mapping[str, Level] = {
    "finished": "good", "best_checkpoint": "good",
    "stopped": "warning", "alert": "warning", "spike": "warning", "skipped_step": "warning",
    "loss_scale": "warning", "config_changed": "warning", "environment_changed": "warning",
    "disk_is_short": "warning", "checkpoint_warning": "warning", "best_not_marked": "warning",
    "faults": "warning", "rollback": "bad", "save_failed": "bad", "not_saved": "bad",
    "out_of_memory": "bad", "failed": "bad", "diverged": "bad",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """The run that is watched, as its files describe it; `note` says why this one, where it was chosen."""

    directory: Path
    name: str
    state: str  # albor.runs.state.State
    reason: str = ""
    config: RunConfig | None = None
    environment: Mapping[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    note: str = ""
    last_row: float | None = None  # when metrics.jsonl was last written, in seconds since 1970
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Curve:
    """One line of a chart. The steps ascend; every value is finite."""

    label: str
    kind: Kind
    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Chart:
    """What one metric looks like over the steps."""

    title: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class MemoryPart:
    """Bytes that were planned, and bytes that were measured, if they were."""

    name: str
    planned: int
    measured: int | None


@dataclass(frozen=True)
class BlockNorms:
    """The gradient norms of one block, in the last row; `usual` is the median of its total over the rows
    before.
    """

    name: str
    total: float | None
    attention: float | None
    mlp: float | None
    usual: float | None


@dataclass(frozen=True)
class Happening:
    """A line of events.jsonl in words; `time` in seconds since 1970."""

    time: float | None
    step: int | None
    kind: str
    text: str
    level: Level


@dataclass(frozen=True)
class Sample:
    """What the model wrote at `step`; None: its logits were not finite."""

    step: int | None
    prompt: str
    text: str | None


@dataclass(frozen=True)
class AlertLine:
    """A rule that has held in this run, and whether it still does by the last row."""

    step: int | None
    rule: str
    action: str
    values: str
    holds: bool


@dataclass(frozen=True)
class View:
    """All that is shown. What is not known is None; numbers have the names that they have in the log."""

    revision: int  # of what was read: where it is the same, so is all but the state and the clock's numbers
    directory: str
    name: str
    note: str
    state: str
    reason: str
    device: str
    step: int | None
    steps: int | None
    tokens: int | None
    tokens_planned: int | None
    elapsed_seconds: float | None
    eta_seconds: float | None
    seconds_since_row: float | None
    is_late: bool
    numbers: Mapping[str, float]
    smoothed_loss: float | None
    best: tuple[int, float] | None  # (step, validation loss)
    charts: Mapping[str, Chart]
    memory: tuple[MemoryPart, ...]
    memory_groups: Mapping[str, int]
    blocks: tuple[BlockNorms, ...]
    other_norms: Mapping[str, float]
    events: tuple[Happening, ...]
    samples: tuple[Sample, ...]
    alerts: tuple[AlertLine, ...]
    problems: tuple[str, ...]

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come, unless the run is started again."""
        return self.state in _ENDED

    @property
    def progress(self) -> float | None:
        """The share of the steps that is done."""
        return min(1.0, self.step / self.steps) if self.step is not None and self.steps else None

    def as_json(self) -> dict[str, Any]:
        """What `albor monitor --json` prints; the curves are in metrics.jsonl. Not finite: as text."""
        fields = {
            name: value
            for name, value in vars(self).items()
            if name not in ("revision", "charts", "best", "samples")
        }
        for name in ("memory", "blocks", "events", "alerts"):
            fields[name] = [asdict(item) for item in fields[name]]
        fields["samples"] = [asdict(sample) for sample in self.samples]
        fields["best"] = None if self.best is None else {"step": self.best[0], "val/loss": self.best[1]}
        encoded: dict[str, Any] = _finite(fields)
        return encoded


def build_view(history: History, subject: Subject, now: float) -> View:
    """The run as it is at `now` (seconds since 1970), by what its logs have said."""
    config, state = subject.config, subject.state
    running = state == "running"
    numbers = {name: series.last[1] for name, series in history.series.items() if series.last}
    planned = None if config is None else config.steps * config.tokens_per_step
    pace = history.seconds_per_token(subject.last_row)
    silent = None if subject.last_row is None else max(0.0, now - subject.last_row)
    eta = None
    if running and pace is not None and planned is not None and history.tokens is not None:
        eta = max(0.0, (planned - history.tokens) * pace - (silent or 0.0))
    usual = None
    if config is not None and pace is not None:
        usual = config.log.every_steps * config.tokens_per_step * pace
    charts = _charts(history)
    loss = charts.get("loss")
    smoothed = [curve for curve in loss.curves if curve.kind == "line"] if loss else []
    validation = history.series.get("val/loss")
    return View(
        revision=history.revision,
        directory=str(subject.directory),
        name=_clean(subject.name),
        note=_clean(subject.note),
        state=state,
        reason=_reason(history, subject),
        device=_device(subject),
        step=history.step,
        steps=None if config is None else config.steps,
        tokens=history.tokens,
        tokens_planned=planned,
        elapsed_seconds=history.elapsed(now if running else subject.last_row or now, running=running),
        eta_seconds=eta,
        seconds_since_row=silent,
        is_late=running
        and silent is not None
        and silent > max(_LATE_SECONDS, _LATE_ROWS * usual if usual is not None else 0.0),
        numbers=numbers,
        smoothed_loss=float(smoothed[0].values[-1]) if smoothed and len(smoothed[0].values) else None,
        best=_best(*validation.arrays()) if validation else None,
        charts=charts,
        memory=_memory(history, numbers),
        memory_groups=_groups(subject.plan),
        blocks=_blocks(history),
        other_norms=_other_norms(history),
        events=tuple(map(_happening, history.events)),
        samples=tuple(map(_sample, history.samples.values())),
        alerts=_alerts(history, numbers),
        problems=tuple(map(_clean, subject.problems)),
    )


def _charts(history: History) -> dict[str, Chart]:
    """By the name under which a person picks them; only what has a value."""
    found: dict[str, Chart] = {}

    def add(key: str, title: str, *curves: Curve) -> None:
        known = tuple(curve for curve in curves if len(curve.steps))
        if known:
            found[key] = Chart(title, known)

    loss = _curve(history, "train/loss", "train", "raw")
    add("loss", "loss", loss, _smooth(loss), _curve(history, "val/loss", "validation", "points"))
    add("lr", "learning rate", _curve(history, "train/lr", "lr", "line"))
    speed = _curve(history, "train/tokens_per_second", "tokens/s", "raw")
    add("speed", "tokens/s", speed, _smooth(speed))
    mfu = _curve(history, "train/mfu", "MFU", "raw", factor=100.0)
    add("mfu", "MFU, %", mfu, _smooth(mfu))
    norm = _curve(history, "train/grad_norm", "gradient norm", "raw")
    add("norm", "gradient norm", norm, _smooth(norm))
    add("bits", "bits per byte", _curve(history, "val/bits_per_byte", "validation", "points"))
    add(
        "memory",
        "memory, GiB",
        _curve(history, "memory/planned", "planned", "raw", factor=2.0**-30),
        _curve(history, "memory/process", "process", "line", factor=2.0**-30),
    )
    return found


def _curve(history: History, name: str, label: str, kind: Kind, factor: float = 1.0) -> Curve:
    series = history.series.get(name)
    if series is None:
        return Curve(label, kind, np.empty(0, np.int64), np.empty(0))
    steps, values = series.arrays()
    finite = np.isfinite(values)
    return Curve(label, kind, steps[finite], values[finite] * factor)


def _smooth(curve: Curve) -> Curve:
    """The mean over the rows just before each."""
    count = len(curve.values)
    window = max(_LEAST_SMOOTHED, count // _SMOOTHED)
    sums = np.concatenate([[0.0], np.cumsum(curve.values)])
    ends = np.arange(1, count + 1)
    starts = np.maximum(0, ends - window)
    return Curve(
        f"{curve.label}, smoothed", "line", curve.steps, (sums[ends] - sums[starts]) / (ends - starts)
    )


def _best(steps: np.ndarray, values: np.ndarray) -> tuple[int, float] | None:
    finite = np.isfinite(values)
    if not finite.any():
        return None
    lowest = int(np.argmin(np.where(finite, values, np.inf)))
    return int(steps[lowest]), float(values[lowest])


def _memory(history: History, numbers: Mapping[str, float]) -> tuple[MemoryPart, ...]:
    """The components of the newest record that were measured; before there is one, what the rows say."""
    components = (history.memory or {}).get("components")
    if isinstance(components, dict):
        parts = [
            MemoryPart(_clean(name), part["planned"], part["measured"])
            for name, part in components.items()
            if isinstance(part, dict)
            and isinstance(part.get("planned"), int)
            and isinstance(part.get("measured"), int)
        ]
        if parts:
            return tuple(parts)
    if "memory/planned" not in numbers:
        return ()
    process = numbers.get("memory/process")
    return (MemoryPart("process", int(numbers["memory/planned"]), None if process is None else int(process)),)


def _groups(plan: Mapping[str, Any] | None) -> dict[str, int]:
    groups = (plan or {}).get("groups")
    if not isinstance(groups, dict):
        return {}
    return {_clean(str(name)): size for name, size in groups.items() if isinstance(size, int) and size}


def _is_block(name: str) -> bool:
    return name.startswith("block_")


def _blocks(history: History) -> tuple[BlockNorms, ...]:
    if not history.norms:
        return ()
    last, before = history.norms[-1][1], [norms for _, norms in history.norms][:-1]

    def usual(name: str) -> float | None:
        known = [norms[name] for norms in before if math.isfinite(norms.get(name, math.nan))]
        return float(np.median(known)) if known else None

    names = dict.fromkeys(name.partition("/")[0] for name in last if _is_block(name))
    return tuple(
        BlockNorms(name, last.get(name), last.get(f"{name}/attention"), last.get(f"{name}/mlp"), usual(name))
        for name in names
    )


def _other_norms(history: History) -> dict[str, float]:
    last = history.norms[-1][1] if history.norms else {}
    return {name: norm for name, norm in last.items() if not _is_block(name)}


def _alerts(history: History, numbers: Mapping[str, float]) -> tuple[AlertLine, ...]:
    latest = dict(numbers)
    if history.norms:
        latest |= {GRADIENTS + name: norm for name, norm in history.norms[-1][1].items()}
    lines = []
    for text, event in history.alerts.items():
        try:
            rule = parse_rule(text)
        except ValueError:  # of another version
            holds = False
        else:
            holds = any(rule.metric.fullmatch(name) and rule.holds(value) for name, value in latest.items())
        values = event.get("values")
        shown = ", ".join(f"{k} {_short(v)}" for k, v in values.items()) if isinstance(values, dict) else ""
        action = _clean(str(event.get("action", "")))
        lines.append(AlertLine(_step(event), _clean(text), action, _clean(shown), holds))
    return tuple(sorted(lines, key=lambda line: (not line.holds, -(line.step or 0))))


def _short(value: Any) -> str:
    """A number that was written as text, in four digits."""
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)


def _reason(history: History, subject: Subject) -> str:
    """Why the run is in its state, and what one can do; empty where there is nothing to say."""
    why = _clean(subject.reason)
    if subject.state == "new":
        return why or "it has written nothing yet"
    if subject.state == "running":
        count = len(history.processes) - 1
        again = f"resumed {count} {'time' if count == 1 else 'times'}" if count > 0 else ""
        return ", ".join(part for part in (why, again) if part)
    if subject.state == "finished":
        return f"at step {history.step}" if history.step is not None else ""
    if subject.state in ("stopped", "lost"):
        return "; ".join(part for part in (why, "the same command goes on") if part)
    return why


def _device(subject: Subject) -> str:
    environment, plan = subject.environment or {}, subject.plan or {}
    device = environment.get("device") or plan.get("device")
    if device == "cpu" and environment.get("processor"):
        device = f"cpu, {environment['processor']}"
    dtype = environment.get("compute_dtype") or plan.get("compute_dtype")
    return _clean(" · ".join(str(part) for part in (device, dtype) if part))


def _happening(event: Mapping[str, Any]) -> Happening:
    kind = event["event"]
    level = _LEVELS.get(kind, "plain")
    if kind == "alert" and event.get("action") == "stop":
        level = "bad"
    return Happening(
        seconds_of(event.get("time")), _step(event), _clean(kind), _clean(_describe(event)), level
    )


def _describe(event: Mapping[str, Any]) -> str:
    """The details of an event in words; those of a kind that is not known here, as they are."""
    kind = event["event"]
    details = {
        k: v for k, v in event.items() if k not in ("event", "step", "time", "build") and v is not None
    }
    for text in ("message", "reason", "error"):
        if isinstance(details.get(text), str):
            return str(details[text])
    if kind == "checkpoint":
        seconds = details.get("seconds")
        return f"in {seconds:.1f} s" if isinstance(seconds, int | float) else ""
    if kind in ("started", "resumed"):
        source = details.get("source")
        return f"from {Path(str(source)).name}" if source else ""
    if kind == "alert":
        return str(details.get("rule", ""))
    if kind in ("config_changed", "environment_changed"):
        return f"{details.get('key')}: {event.get('before')} -> {event.get('after')}"
    if kind in ("spike", "skipped_step", "loss_scale"):
        action = f"{details['action']}: " if "action" in details else ""
        return f"{action}loss {_short(event.get('loss'))}, gradient norm {_short(event.get('grad_norm'))}"
    return ", ".join(f"{name} {value}" for name, value in details.items())


def _sample(event: Mapping[str, Any]) -> Sample:
    text = event.get("text")
    return Sample(
        _step(event),
        _clean(event["prompt"], lines=True),
        _clean(text, lines=True) if isinstance(text, str) else None,
    )


def _step(event: Mapping[str, Any]) -> int | None:
    step = event.get("step")
    return step if isinstance(step, int) else None


def _clean(text: str, *, lines: bool = False) -> str:
    """`text` without what would move a cursor: a model may write anything, an escape sequence too."""
    if lines:
        text = text.expandtabs(4)
    else:
        text = text.replace("\n", " ")
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
