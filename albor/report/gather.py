"""A run as the page shows it: plain data out of its directory. Whatever is missing is None or empty."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.data.sources import describe
from albor.errors import AlborError
from albor.memory.audit import ARENA, END, PEAK, PROCESS, Audit, Record, audit
from albor.memory.cost import TOKENS_PER_PARAMETER
from albor.memory.plot import SUMMED
from albor.report.hours import Hours, hours_of
from albor.report.thin import evenly, thin
from albor.runs.record import Metrics, Run
from albor.runs.state import standing
from albor.strictjson import from_json, read_bounded

SERIES = (
    *("train/loss", "val/loss", "val/bits_per_byte", "train/lr", "train/grad_norm"),
    *("train/tokens_per_second", "train/mfu", "memory/process", "memory/planned"),
)
PARTS = ("", "/attention", "/mlp")  # of a block, each with a gradient norm

# What a page holds of all runs together; a run gets its share.
_POINTS = 2400  # of each series
_MOST_POINTS = 1500  # of each series of one run: a screen has no more columns
_COLUMNS = 480  # of the heat maps of gradient norms
_MOST_COLUMNS = 160
_EVENTS = 1500
_SAMPLE_STEPS = 240
_SAMPLE_CHARACTERS = 2000  # of one text
_ODD_STEPS = 20  # that are named where a metric is not finite

# What the timeline shows, a lane for each; events of other kinds that are no sample and no record of memory
# are "other".
LANES = {
    "start, resume": ("started", "resumed", "init_from"),
    "checkpoint": ("checkpoint", "best_checkpoint"),
    "changed": ("config_changed", "environment_changed"),
    "skip, spike": ("skipped_step", "spike", "loss_scale"),
    "rollback": ("rollback",),
    "alert": ("alert",),
    "end": ("finished", "stopped", "failed", "diverged"),
    "other": (),
}
_LANE_OF = {kind: lane for lane, kinds in LANES.items() for kind in kinds}
_ELSEWHERE = ("sample", "memory")
_CHECKPOINT = re.compile(r"step-(\d{1,18})")


@dataclass
class Gathered:
    """One run. `series` and `heat` are what the charts draw, `span` the first and last place on each axis:
    `s` steps, `t` tokens, `h` hours.
    """

    label: str
    directory: str
    state: str
    reason: str
    headline: dict[str, Any]
    span: dict[str, list[float | None]]
    series: dict[str, dict[str, Any]]
    heat: dict[str, Any] | None
    events: list[dict[str, Any]]
    events_left_out: int
    samples: list[dict[str, Any]]
    samples_left_out: int
    memory: dict[str, Any] | None
    shares: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    smoke: dict[str, Any] | None
    final: dict[str, Any] | None
    config: dict[str, Any]
    environment: dict[str, Any]
    hours_from: str | None
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def gather(run: Run, label: str, runs: int = 1) -> Gathered:
    """What the page shows of `run`, one of `runs` on it. Raises nothing for files that are damaged: what is
    wrong with them is in `problems`.
    """
    metrics = run.metrics()
    events, event_problems = run.event_log()
    hours = hours_of(metrics.rows, events)
    where = _Where(metrics, hours)
    problems = [*run.problems, *metrics.problems, *event_problems]
    config, final = run.config, run.final()
    notes: list[str] = []
    shown = [event for event in events if event.get("event") not in _ELSEWHERE]
    samples = _samples(events)
    kept = evenly(len(samples), max(12, _SAMPLE_STEPS // runs))
    limit = max(100, _EVENTS // runs)
    stood = standing(run)
    return Gathered(
        label=label,
        directory=str(run.directory),
        state=str(stood.state),
        reason=stood.reason,
        headline=_headline(metrics, config, final, hours),
        span=_span(metrics, shown, where),
        series=_all_series(metrics, where, min(_MOST_POINTS, _POINTS // runs), notes),
        heat=_heat(metrics, where, max(24, min(_MOST_COLUMNS, _COLUMNS // runs))),
        events=[_event(shown[place], where) for place in _most_telling(shown, limit)],
        events_left_out=max(0, len(shown) - limit),
        samples=[samples[place] for place in kept],
        samples_left_out=len(samples) - len(kept),
        memory=_memory(run, problems),
        shares=_shares(run, config, problems),
        evaluations=_evaluations(run, problems),
        smoke=_read(run.directory / "eval" / "smoke.json", problems),
        final=final,
        config=_flat(config.model_dump(mode="json")) if config else {},
        environment=_flat(run.environment),
        hours_from=hours.basis,
        notes=notes,
        problems=list(dict.fromkeys(problems)),
    )


class _Where:
    """Where a step lies on each of the axes: tokens, and hours of training."""

    def __init__(self, metrics: Metrics, hours: Hours):
        self._tokens = metrics.tokens_at
        self._hours = hours
        last = next((row for row in reversed(metrics.rows) if row["step"] > 0 and _tokens_in(row)), None)
        self._tokens_per_step = last["tokens"] / last["step"] if last else None

    def tokens(self, step: int) -> int | None:
        """Those of its row; between rows in proportion, for a step has as many tokens as another."""
        found = self._tokens(step)
        if found is None and self._tokens_per_step is not None:
            return round(step * self._tokens_per_step)
        return found if step else 0

    def hours(self, step: int) -> float | None:
        """Those of its row, and between rows in proportion."""
        found = self._hours.at(step) if step else 0.0
        return None if found is None else _short(found)


def _tokens_in(row: Mapping[str, Any]) -> bool:
    return type(row.get("tokens")) is int


def _span(
    metrics: Metrics, events: Sequence[Mapping[str, Any]], where: _Where
) -> dict[str, list[float | None]]:
    """The first and the last step on each axis that anything is known of."""
    steps = [row["step"] for row in metrics.rows]
    steps += [event["step"] for event in events if type(event.get("step")) is int]
    ends = [min(steps), max(steps)] if steps else []
    return {"s": [*ends], "t": [where.tokens(s) for s in ends], "h": [where.hours(s) for s in ends]}


def _short(value: float) -> float:
    """Six digits: more than a chart shows or a hover says."""
    return float(f"{value:.6g}")


def _all_series(metrics: Metrics, where: _Where, limit: int, notes: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for name in SERIES:
        steps, values = metrics.series(name)
        if not any(map(math.isfinite, values)):
            if values:
                notes.append(f"{name} is never finite")
            continue
        odd = [step for step, value in zip(steps, values, strict=True) if not math.isfinite(value)]
        if odd:
            more = f" and {len(odd) - _ODD_STEPS:,} more" if len(odd) > _ODD_STEPS else ""
            notes.append(
                f"{name} is not finite at {len(odd):,} of {len(steps):,} rows: step "
                f"{', '.join(f'{step:,}' for step in odd[:_ODD_STEPS])}{more}"
            )
        places = thin(values, limit)
        kept = [steps[place] for place in places]
        found[name] = {
            "s": kept,
            "t": [where.tokens(step) for step in kept],
            "h": [where.hours(step) for step in kept],
            "y": [_short(values[place]) if math.isfinite(values[place]) else None for place in places],
            "of": len(values),
        }
    return found


def _heat(metrics: Metrics, where: _Where, columns: int) -> dict[str, Any] | None:
    """Gradient norms of the model's groups over the run, from the embedding to the head: the highest in each
    of at most `columns` stretches of rows, null where none in it is finite.
    """
    names: set[str] = set().union(*metrics.rows)
    groups = [name for name in names if name.startswith("gradients/")]
    rows = [row for row in metrics.rows if any(group in row for group in groups)]
    if not groups or not rows:
        return None
    count = min(columns, len(rows))
    edges = [column * len(rows) // count for column in range(count + 1)]
    last = [rows[end - 1]["step"] for end in edges[1:]]
    whole = [group for group in groups if "/block_" not in group]  # has no parts, and stands in each picture
    maps: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        blocks = [group for group in groups if group not in whole and _part_of(group) == part]
        if part and not blocks:
            continue
        chosen = _from_the_ground([*whole, *blocks])
        maps[part.removeprefix("/") or "block"] = {
            "groups": [group.removeprefix("gradients/").removesuffix(part) for group in chosen],
            "z": [[_highest(rows[i:j], group) for i, j in itertools.pairwise(edges)] for group in chosen],
        }
    return {
        "s": last,
        "t": [where.tokens(step) for step in last],
        "h": [where.hours(step) for step in last],
        "maps": maps,
    }


def _part_of(group: str) -> str:
    return next((part for part in PARTS[1:] if group.endswith(part)), "")


def _from_the_ground(groups: Sequence[str]) -> list[str]:
    """The embedding, the blocks in their order, the head."""
    place = {"gradients/embedding": -1, "gradients/head": 1}
    return sorted(groups, key=lambda group: (place.get(group, 0), len(group), group))


def _highest(rows: Sequence[Mapping[str, Any]], group: str) -> float | None:
    found = [value for row in rows if isinstance(value := row.get(group), int | float)]
    return float(f"{max(found):.3g}") if found else None


def _headline(
    metrics: Metrics, config: RunConfig | None, final: Mapping[str, Any] | None, hours: Hours
) -> dict[str, Any]:
    """The figures of the run's row at the top of the page. None: not measured, or not known."""
    final = final or {}
    judged = [pair for pair in zip(*metrics.series("val/loss"), strict=True) if math.isfinite(pair[1])]
    best = min(judged, key=lambda pair: pair[1]) if judged else None
    bits = [pair for pair in zip(*metrics.series("val/bits_per_byte"), strict=True) if math.isfinite(pair[1])]
    learned = [pair for pair in zip(*metrics.series("train/loss"), strict=True) if math.isfinite(pair[1])]
    last = metrics.rows[-1] if metrics.rows else {}
    tokens = last.get("tokens") if _tokens_in(last) else None
    parameters = Architecture.from_config(config.model).parameter_count if config else None
    ratio = tokens / (TOKENS_PER_PARAMETER * parameters) if tokens and parameters else None
    return {
        "step": last.get("step"),
        "steps": config.steps if config else None,
        "tokens": tokens,
        "parameters": parameters,
        "chinchilla_ratio": ratio,
        "hours": hours.hours[-1] if hours.hours else None,
        "tokens_per_second": _median(metrics, "train/tokens_per_second"),
        "mfu": _median(metrics, "train/mfu"),
        "train_loss": learned[-1][1] if learned else None,
        "val_loss": judged[-1][1] if judged else None,
        "best_val_loss": best[1] if best else None,
        "best_step": best[0] if best else None,
        "bits_per_byte": bits[-1][1] if bits else None,
        "final_val_loss": _number(final.get("val/loss")),
        "final_bits_per_byte": _number(final.get("val/bits_per_byte")),
        "gzip": _number(final.get("gzip/bits_per_byte")),
        "xz": _number(final.get("xz/bits_per_byte")),
    }


def _median(metrics: Metrics, name: str) -> float | None:
    """Over the rows, without that of the first step, which loads kernels, unless it is all there is."""
    steps, values = metrics.series(name)
    found = [value for step, value in zip(steps, values, strict=True) if step != 1] or values
    return statistics.median(found) if found else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e308:
        return None
    return float(value)


def _most_telling(events: Sequence[Mapping[str, Any]], limit: int) -> list[int]:
    """The places of at most `limit` events: of the lanes with the most, fewer, evenly spaced."""
    lanes: dict[str, list[int]] = {}
    for place, event in enumerate(events):
        lanes.setdefault(_lane(event), []).append(place)
    kept: list[int] = []
    left = limit
    for done, places in enumerate(sorted(lanes.values(), key=len)):
        chosen = evenly(len(places), left // (len(lanes) - done))
        kept += [places[index] for index in chosen]
        left -= len(chosen)
    return sorted(kept)


def _lane(event: Mapping[str, Any]) -> str:
    return _LANE_OF.get(str(event.get("event")), "other")


def _event(event: Mapping[str, Any], where: _Where) -> dict[str, Any]:
    step = event.get("step")
    step = step if type(step) is int else None
    details = {
        key: value
        for key, value in event.items()
        if key not in ("event", "step", "time") and value is not None
    }
    return {
        "kind": str(event.get("event")),
        "lane": _lane(event),
        "step": step,
        "t": where.tokens(step or 0),
        "h": where.hours(step or 0),
        "time": str(event.get("time", "")),
        "text": _in_words(details),
    }


def _in_words(details: Mapping[str, Any]) -> str:
    parts = []
    for key, value in details.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"{key}: {text}")
    text = "; ".join(parts)
    return text if len(text) <= 400 else text[:400] + "…"


def _samples(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """[{step, texts: [{prompt, text}]}]; of a step that was trained twice, what was written last."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for event in events:
        step, prompt, text = event.get("step"), event.get("prompt"), event.get("text")
        if event.get("event") != "sample" or type(step) is not int or not isinstance(prompt, str):
            continue
        text = text if isinstance(text, str) else None
        if text is not None and len(text) > _SAMPLE_CHARACTERS:
            text = text[:_SAMPLE_CHARACTERS] + "…"
        found.setdefault(step, {})[prompt] = {"prompt": prompt, "text": text}
    return [{"step": step, "texts": list(texts.values())} for step, texts in sorted(found.items())]


def _memory(run: Run, problems: list[str]) -> dict[str, Any] | None:
    """The plan and what was measured, each as parts that add up to a process; None without a plan."""
    plan = run.plan
    groups = plan.get("groups")
    if not isinstance(groups, dict) or not _is_size(plan.get("required_bytes")):
        return None
    found: Audit | None = None
    try:
        found = audit(run.directory)
    except AlborError as error:
        reason = str(error).splitlines()[0]
    else:
        reason = ""
        problems += [note for note in found.notes if "left out" in note]
    planned = {str(name): size for name, size in groups.items() if _is_size(size)}
    for item in plan.get("outside") or []:
        if isinstance(item, dict) and _is_size(item.get("bytes")):
            planned[str(item.get("name"))] = item["bytes"]
    if rest := plan["required_bytes"] - sum(planned.values()):
        planned[SUMMED if plan.get("device") == "cpu" else "other"] = max(0, rest)
    measured, total = _measured_parts(found.last, planned) if found else ({}, None)
    return {
        "hardware": str(plan.get("hardware", "")),
        "planned": {name: size for name, size in planned.items() if size},
        "planned_total": plan["required_bytes"],
        "measured": measured,
        "measured_total": total,
        "measured_when": _when(found.last) if found else "",
        "verdict": found.verdict.text if found else "",
        "why_not": reason,
    }


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _when(record: Record) -> str:
    moment = "at the end of the newest process" if record.moment == END else "after its tenth step"
    return f"{moment}, step {record.step:,}"


def _measured_parts(record: Record, planned: Mapping[str, int]) -> tuple[dict[str, int], int | None]:
    """What was read of the process, part by part, and the whole. The arena and what the driver has can be
    told apart; all else is "not told apart".
    """
    parts = record.components
    whole = parts[PEAK if PEAK in parts and parts[PEAK].measured is not None else PROCESS].measured
    if whole is None:
        return {}, None
    of_process = f"{ARENA}device" if record.device == "cuda" else ARENA
    arena = sum(part.measured or 0 for name, part in parts.items() if name.startswith(of_process))
    found = {"arena": min(arena, whole)} if arena else {}
    for name in planned:
        part = parts.get(name)
        if part is not None and part.measured is not None:
            found[name] = part.measured
    rest = whole - sum(found.values())
    if rest > 0:
        found["not told apart"] = rest
    return found, whole


def _shares(run: Run, config: RunConfig | None, problems: list[str]) -> list[dict[str, Any]]:
    """Each source's share of the tokens by its weight, and of the sequences that were read by the newest
    checkpoint.
    """
    if config is None:
        return []
    sources = config.data.sources
    whole = sum(source.weight for source in sources)
    step, drawn = _drawn(run, problems)
    if len(drawn) != len(sources) or not any(drawn):
        drawn = []
    return [
        {
            "source": describe(source),
            "asked": source.weight / whole,
            "read": drawn[place] / sum(drawn) if drawn else None,
            "step": step if drawn else None,
        }
        for place, source in enumerate(sources)
    ]


def _drawn(run: Run, problems: list[str]) -> tuple[int | None, list[int]]:
    """The step of the newest checkpoint, and how many sequences had been read of each source."""
    directory = run.directory / "checkpoints"
    try:
        names = os.listdir(directory)
    except OSError:
        return None, []
    steps = {int(match[1]): match[0] for name in names if (match := _CHECKPOINT.fullmatch(name))}
    if not steps:
        return None, []
    step = max(steps)
    loader = (_read(directory / steps[step] / "state.json", problems) or {}).get("loader")
    drawn = loader.get("per_source") if isinstance(loader, dict) else None
    if not isinstance(drawn, list) or not all(_is_size(count) for count in drawn):
        return step, []
    return step, [int(count) for count in drawn]


def _evaluations(run: Run, problems: list[str]) -> list[dict[str, Any]]:
    """What `albor eval` stored, by file: [{file, step, limit, tasks: [...]}] or a text's figures."""
    found: list[dict[str, Any]] = []
    known = ("final.json", "smoke.json")
    try:
        paths = sorted(p for p in (run.directory / "eval").glob("*.json") if p.name not in known)
    except OSError:
        return []
    for path in paths:
        content = _read(path, problems)
        if content is None:
            continue
        results, text = content.get("results"), content.get("text")
        entry = {"file": path.name, "step": content.get("step"), "limit": content.get("limit")}
        if isinstance(results, dict):
            entry["tasks"] = [task for name, figures in results.items() for task in _figures(name, figures)]
            found.append(entry)
        elif isinstance(text, dict):
            keys = ("bits_per_byte", "perplexity", "loss", "bytes", "tokens", "stride")
            entry["text"] = {
                "path": str(text.get("path", "")), **{key: _number(text.get(key)) for key in keys},
            }  # fmt: skip
            found.append(entry)
        else:
            problems.append(f"{path}: no results of albor eval, and left out")
    return sorted(found, key=_step_then_name)


def _step_then_name(entry: Mapping[str, Any]) -> tuple[int, str]:
    return (entry["step"] if type(entry["step"]) is int else 0, entry["file"])


def _figures(name: str, figures: Any) -> list[dict[str, Any]]:
    """A task's metrics, each with its standard error; None where there is none."""
    if not isinstance(figures, dict):
        return []
    items, chance = figures.get("items"), _number(figures.get("chance"))
    return [
        {
            "task": str(name),
            "metric": metric,
            "value": _number(figure.get("value")),
            "stderr": _number(figure.get("stderr")),
            "items": items if _is_size(items) else None,
            "chance": chance if metric.startswith("acc") else None,
        }
        for metric, figure in figures.items()
        if isinstance(figure, dict) and "value" in figure
    ]


def _read(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file or, with a problem, no such object."""
    try:
        content = from_json(read_bounded(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read ({error}), and left out")
        return None
    if not isinstance(content, dict):
        problems.append(f"{path}: no JSON object, and left out")
        return None
    return content


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Keys as dotted paths: {"model": {"hidden_size": 8}} is {"model.hidden_size": 8}."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if isinstance(inner, Mapping) and inner:
            found |= _flat(inner, f"{path}.")
        else:
            found[path] = inner
    return found


def label_runs(directories: Sequence[Path]) -> list[str]:
    """A name for each run: its directory's, with as many of its parents' as tell it from the others."""
    parts = [directory.absolute().parts for directory in directories]
    labels = []
    for place, own in enumerate(parts):
        others = [other for index, other in enumerate(parts) if index != place and other != own]
        long_enough: Callable[[int], bool] = lambda n: all(other[-n:] != own[-n:] for other in others)  # noqa: E731, B023
        length = next((n for n in range(1, len(own)) if long_enough(n)), len(own))
        labels.append("/".join(own[-length:]))
    return labels
