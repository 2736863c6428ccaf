"""The charts of a report: which there are, and the data that page.js draws them from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from albor.memory.plot import COLOURS
from albor.report.gather import LANES, Gathered
from albor.units import GIB

_SHARES = ("acc", "pass@", "exact_match")  # how the names of metrics begin that lie between 0 and 1
_EVENT_KEYS = ("kind", "lane", "step", "t", "h", "text")


@dataclass(frozen=True)
class Metric:
    """One line of a chart. Its style is plain, faint, points or dashed."""

    name: str
    label: str
    style: str = "plain"


@dataclass(frozen=True)
class Chart:
    """A chart over the run. `format` and `ticks` are d3's, of values divided by `scale`; the switch to a
    logarithmic axis acts where `log` is true; `zero`: a linear axis begins there.
    """

    id: str
    title: str
    about: str
    unit: str
    metrics: tuple[Metric, ...]
    format: str = ".4f"
    ticks: str = ""
    log: bool = False
    zero: bool = False
    scale: float = 1


LOSS = Chart(
    "loss", "Loss", "Thin: of each logged step. With points: of held-out text.", "nats per token",
    (Metric("train/loss", "training", "faint"), Metric("val/loss", "held-out", "points")), log=True,
)  # fmt: skip
BITS = Chart(
    "bits", "Bits per byte", "Of held-out text, whatever the tokenizer. Dotted: what compressors need.",
    "bits per byte", (Metric("val/bits_per_byte", "held-out", "points"),), log=True,
)  # fmt: skip
LR = Chart(
    "lr", "Learning rate", "As the schedule had it.", "learning rate", (Metric("train/lr", "learning rate"),),
    ".3~e", log=True,
)  # fmt: skip
NORM = Chart(
    "norm", "Gradient norm", "Of all gradients, before clipping. Dotted: where they are clipped.", "norm",
    (Metric("train/grad_norm", "norm"),), ".4~g", log=True, zero=True,
)  # fmt: skip
SPEED = Chart(
    "speed", "Speed", "Of training steps, without saving and evaluating.", "tokens per second",
    (Metric("train/tokens_per_second", "tokens per second"),), ",.0f", zero=True,
)  # fmt: skip
MFU = Chart(
    "mfu", "Model FLOPs utilisation", "The steps’ arithmetic, as a share of the card’s peak.", "MFU",
    (Metric("train/mfu", "MFU"),), ".2%", ".0%", zero=True,
)  # fmt: skip
PROCESS = Chart(
    "process", "Memory over the run", "What the process has. Dashed: what was planned for it.", "GiB",
    (Metric("memory/process", "process"), Metric("memory/planned", "planned", "dashed")), ",.3f", zero=True,
    scale=GIB,
)  # fmt: skip
LINES = (LOSS, BITS, LR, NORM, SPEED, MFU, PROCESS)


def data_of(runs: Sequence[Gathered]) -> dict[str, Any]:
    """What page.js reads. A chart for which no run has anything is not among `charts`."""
    charts: list[dict[str, Any]] = []
    for chart in LINES:
        if any(metric.name in run.series for metric in chart.metrics for run in runs):
            described = asdict(chart)
            references = list(_references(chart, runs))
            charts.append({"kind": "line", **described, "references": references})
    heats = [run.heat for run in runs if run.heat]
    if heats:
        rows = max(len(heat["maps"]["block"]["groups"]) for heat in heats)
        charts.append({"id": "heat", "kind": "heat", "rows": rows})
    if any(run.memory for run in runs):
        charts.append({"id": "memory", "kind": "memory"})
    sources = {share["source"] for run in runs for share in run.shares}
    if sources:
        charts.append({"id": "shares", "kind": "shares", "rows": len(sources)})
    if any(run.events for run in runs):
        charts.append({"id": "timeline", "kind": "timeline"})
    newest = [_newest_tasks(run) for run in runs]
    tasks = list(dict.fromkeys(task for found in newest for task in found))
    if tasks:
        charts.append({"id": "tasks", "kind": "tasks", "rows": len(tasks)})
    return {
        "charts": charts,
        "lanes": [lane for lane in LANES if any(e["lane"] == lane for run in runs for e in run.events)],
        "components": COLOURS,
        "tasks": tasks,
        "runs": [_run(run, found) for run, found in zip(runs, newest, strict=True)],
    }


def is_share(metric: str) -> bool:
    """Whether the values of a metric of `albor eval` are shares, which are shown in %."""
    return metric.startswith(_SHARES)


def _run(run: Gathered, tasks: dict[str, Any]) -> dict[str, Any]:
    memory, rate = run.memory, _tokens_per_step(run)
    return {
        "label": run.label,
        "span": run.span,
        "tokens_per_step": rate,
        "series": {
            name: series if rate is None else {key: series[key] for key in series if key != "t"}
            for name, series in run.series.items()
        },
        "heat": run.heat,
        "events": [{key: event[key] for key in _EVENT_KEYS} for event in run.events],
        "memory": None if memory is None else {key: memory[key] for key in ("planned", "measured")},
        "shares": run.shares,
        "tasks": tasks,
    }


def _tokens_per_step(run: Gathered) -> float | None:
    """What a step has been in tokens; None where that was not the same all the time. The tokens of each point
    need not be in the page then, which are a third of it.
    """
    pairs = [pair for series in run.series.values() for pair in zip(series["s"], series["t"], strict=True)]
    rates = {tokens / step for step, tokens in pairs if step and tokens is not None}
    whole = len(rates) == 1 and all(tokens is not None for _, tokens in pairs)
    return rates.pop() if whole else None


def _references(chart: Chart, runs: Sequence[Gathered]) -> Iterator[dict[str, Any]]:
    """Level lines; one that is the same in all runs has no run."""
    found: dict[tuple[str, float], list[int]] = {}
    for place, run in enumerate(runs):
        levels = {}
        if chart is BITS:
            levels = {name: run.headline[name] for name in ("gzip", "xz")}
        elif chart is NORM:
            levels = {"clipped": run.config.get("optimizer.grad_clip")}
        for label, level in levels.items():
            if type(level) in (int, float):
                found.setdefault((label, level), []).append(place)
    for (label, level), places in found.items():
        shared = len(places) == len(runs)
        whose: list[int | None] = [None] if shared else [*places]
        yield from ({"run": place, "label": label, "y": level} for place in whose)


def _newest_tasks(run: Gathered) -> dict[str, dict[str, Any]]:
    """The shares of the latest step at which each task was asked, of all its items if there is such a one."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(run.evaluations, key=lambda entry: entry["limit"] is None):
        for task in entry.get("tasks", ()):
            if is_share(task["metric"]) and task["value"] is not None:
                name = f"{task['task']}, {task['metric']}"
                found[name] = {key: task[key] for key in ("value", "stderr", "chance")}
    return found
