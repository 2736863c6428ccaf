"""`albor runs show`: everything of one run on one page."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.runlog import EVENTS, METRICS
from albor.runs.record import CONFIG, FINAL, Metrics, Run, open_run
from albor.runs.state import Standing, State, last_written, standing
from albor.runs.summary import size_on_disk
from albor.runs.text import STATE_STYLES, iso_time, local_time, printable, seconds_of, show, table
from albor.strictjson import from_json, read_bounded
from albor.units import format_bytes, format_count, format_duration

# As albor.checkpoint has them, which brings torch; a test holds them together.
CHECKPOINTS, BEST, MANIFEST = "checkpoints", "best.json", "manifest.json"
STEP_NAME = re.compile(r"step-([1-9][0-9]{8,}|[0-9]{8})")

# What is told of a run besides its beginnings and ends: event, one of them, several of them.
_TOLD = {
    "skipped_step": ("step skipped", "steps skipped"),
    "spike": ("spike", "spikes"),
    "loss_scale": ("change of the loss scale", "changes of the loss scale"),
    "rollback": ("rollback", "rollbacks"),
    "alert": ("alert", "alerts"),
    "out_of_memory": ("time out of memory", "times out of memory"),
    "save_failed": ("save failed", "saves failed"),
    "not_saved": ("state not saved", "states not saved"),
    "checkpoint_warning": ("warning of a save", "warnings of saves"),
    "faults": ("start with faults on purpose", "starts with faults on purpose"),
    "resumed": ("resume", "resumes"),
}
_LOWER_IS_BETTER = re.compile(r"(train|val)/(loss|perplexity|bits_per_byte)")
_HIGHER_IS_BETTER = re.compile(r"train/(tokens_per_second|mfu)")
_SHOWN_STEPS = 8  # of events of one kind
_SHOWN_CHANGES = 10


@dataclass(frozen=True)
class Figure:
    """A metric: its last value, and the best where one is better than another."""

    last: float
    step: int
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there. `whole` is whether it has its manifest; nothing else of it is verified."""

    step: int
    bytes: int
    best: bool
    whole: bool


@dataclass(frozen=True)
class Details:
    """What is shown of a run. Seconds are of training, all its processes together."""

    run: Run
    metrics: Metrics
    standing: Standing
    step: int | None
    tokens: int | None
    began: float | None
    written: float | None
    seconds: float | None
    parameters: int | None
    shares: tuple[tuple[str, float], ...]  # source, share of the tokens
    figures: Mapping[str, Figure]
    checkpoints: tuple[Saved, ...]
    happened: Mapping[str, tuple[int | None, ...]]  # the steps of events, by their kind
    alerts: tuple[str, ...]  # the rules that held
    changes: tuple[str, ...]  # of configuration and environment, on resumes
    memory: Mapping[str, tuple[int, int | None]]  # planned and measured bytes, by component
    places: Mapping[str, str]
    next: str
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; what is not known, or not finite, is null."""
        config, final = self.run.config, self.run.final()
        return {
            "name": self.run.name,
            "directory": str(self.run.directory),
            "state": self.standing.state.value,
            "reason": self.standing.reason or None,
            "step": self.step,
            "steps": config.steps if config else None,
            "tokens": self.tokens,
            "began": iso_time(self.began),
            "written": iso_time(self.written),
            "seconds": self.seconds,
            "parameters": self.parameters,
            "config": config.model_dump(mode="json") if config else None,
            "environment": self.run.environment,
            "shares": [{"source": source, "share": share} for source, share in self.shares],
            "metrics": {
                name: {key: _finite(value) for key, value in asdict(figure).items()}
                for name, figure in self.figures.items()
            },
            "final": final,
            "checkpoints": [asdict(saved) for saved in self.checkpoints],
            "events": {kind: {"count": len(steps), "steps": steps} for kind, steps in self.happened.items()},
            "alerts": list(self.alerts),
            "changes": list(self.changes),
            "memory": {
                name: {"planned": planned, "measured": measured}
                for name, (planned, measured) in self.memory.items()
            },
            "places": dict(self.places),
            "next": self.next,
            "problems": list(self.problems),
        }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gather(run: Run) -> Details:
    """Reads all of `run`. Raises nothing for what is missing or damaged: `problems` names it."""
    metrics = run.metrics()
    events, event_problems = run.event_log()
    problems = [*run.problems, *metrics.problems, *event_problems]
    now = standing(run)
    config = run.config
    last = metrics.rows[-1] if metrics.rows else {}
    began = next((seconds_of(event.get("time")) for event in events), None)
    times = [seconds_of(row.get("time")) for row in (last, *events[-1:])]
    written = max((t for t in times if t is not None), default=last_written(run.directory) or None)
    return Details(
        run=run,
        metrics=metrics,
        standing=now,
        step=last.get("step"),
        tokens=last["tokens"] if type(last.get("tokens")) is int else None,
        began=began,
        written=written,
        seconds=_trained(events, metrics),
        parameters=Architecture.from_config(config.model).parameter_count if config else None,
        shares=_shares(config) if config else (),
        figures=figures(metrics),
        checkpoints=find_checkpoints(run.directory, problems),
        happened=_happened(events),
        alerts=tuple(dict.fromkeys(str(e.get("rule")) for e in events if e["event"] == "alert")),
        changes=_changes(events),
        memory=_memory(events, run.plan),
        places=_places(run),
        next=_next(run, now.state),
        problems=tuple(problems),
    )


def figures(metrics: Metrics) -> dict[str, Figure]:
    """The last and the best value of every metric but the gradients' norms, of which there are many."""
    found = {}
    for name in metrics.names:
        steps, values = metrics.series(name)
        if not values or name.startswith("gradients/"):
            continue
        place = None
        finite = [place for place, value in enumerate(values) if math.isfinite(value)]
        if finite and _LOWER_IS_BETTER.fullmatch(name):
            place = min(finite, key=values.__getitem__)
        elif finite and _HIGHER_IS_BETTER.fullmatch(name):
            place = max(finite, key=values.__getitem__)
        best = (None, None) if place is None else (values[place], steps[place])
        found[name] = Figure(values[-1], steps[-1], *best)
    return found


def find_checkpoints(directory: Path, problems: list[str]) -> tuple[Saved, ...]:
    """The checkpoints of a run, lowest step first; what is wrong with best.json is added to `problems`."""
    home, best = directory / CHECKPOINTS, None
    try:
        names = sorted(entry.name for entry in os.scandir(home) if STEP_NAME.fullmatch(entry.name))
    except FileNotFoundError:
        return ()
    except OSError as error:
        problems.append(f"{home}: cannot be read: {error.strerror or error}")
        return ()
    try:
        best = from_json(read_bounded(home / BEST))["step"]
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"{home / BEST}: does not say which checkpoint is the best ({error})")
    return tuple(
        Saved(
            step := int(name.removeprefix("step-")),
            size_on_disk(home / name),
            step == best,
            (home / name / MANIFEST).is_file(),
        )
        for name in sorted(names, key=lambda name: int(name.removeprefix("step-")))
    )


def _trained(events: Sequence[dict[str, Any]], metrics: Metrics) -> float | None:
    """Seconds between each beginning and the last that is known of that process."""
    total, begin, end, known = 0.0, None, None, False
    rows = [seconds_of(row.get("time")) for row in metrics.rows[-1:]]
    for kind, time in [*((event["event"], seconds_of(event.get("time"))) for event in events), *(
        ("row", time) for time in rows
    )]:  # fmt: skip
        if kind in ("started", "resumed"):
            total += end - begin if begin is not None and end is not None else 0.0
            begin = end = time
            known = known or time is not None
        elif begin is not None and time is not None:
            end = max(time, end or time)
    if begin is not None and end is not None:
        total += end - begin
    return total if known else None


def _shares(config: RunConfig) -> tuple[tuple[str, float], ...]:
    sources = config.data.sources
    total = sum(source.weight for source in sources)
    return tuple((_describe_source(source), source.weight / total) for source in sources)


def _describe_source(source: Any) -> str:
    parts = [source.kind, *(getattr(source, key, None) for key in ("path", "subset"))]
    return " ".join(part for part in parts if part)


def _happened(events: Sequence[dict[str, Any]]) -> dict[str, tuple[int | None, ...]]:
    found: dict[str, list[int | None]] = {}
    for event in events:
        if event["event"] in _TOLD:
            step = event.get("step")
            found.setdefault(event["event"], []).append(step if type(step) is int else None)
    return {kind: tuple(found[kind]) for kind in _TOLD if kind in found}


def _changes(events: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    changed = (event for event in events if event["event"] in ("config_changed", "environment_changed"))
    return tuple(
        f"step {event.get('step')}: {event.get('key')} {event.get('before')} -> {event.get('after')}"
        for event in changed
    )


def _memory(events: Sequence[dict[str, Any]], plan: Mapping[str, Any]) -> dict[str, tuple[int, int | None]]:
    """As the run last recorded it; before that, as it was planned."""
    for event in reversed(events):
        if event["event"] == "memory" and isinstance(event.get("components"), dict):
            parts = {
                name: (part.get("planned"), part.get("measured"))
                for name, part in event["components"].items()
                if isinstance(part, dict)
            }
            return {
                name: (planned, measured if type(measured) is int else None)
                for name, (planned, measured) in parts.items()
                if type(planned) is int
            }
    planned = {name: plan.get(f"{name}_bytes") for name in ("device", "pinned", "host", "required")}
    return {name: (size, None) for name, size in planned.items() if type(size) is int}


def _places(run: Run) -> dict[str, str]:
    named = {
        "configuration": CONFIG, "metrics": METRICS, "events": EVENTS, "checkpoints": CHECKPOINTS,
        "final report": FINAL, "smoke test": "eval/smoke.json", "spikes": "spikes", "exports": "export",
    }  # fmt: skip
    return {
        name: str(run.directory / path) for name, path in named.items() if (run.directory / path).exists()
    }


def _next(run: Run, state: State) -> str:
    """The command that a person would give now."""
    directory = str(run.directory)
    if state is State.RUNNING:
        return shlex.join(["albor", "monitor", directory])
    if state is State.FINISHED:
        return shlex.join(["albor", "generate", directory, "--prompt", "The"])
    if state is State.DIVERGED and (run.directory / "spikes").is_dir():
        return shlex.join(["albor", "inspect-spike", directory])
    return _resume(run)


def _resume(run: Run) -> str:
    """`albor train` as it goes on: from the directory that the configuration's paths are relative to."""
    directory, config = run.directory.resolve(), run.config
    command = ["albor", "train", str(directory / CONFIG)]
    if config is not None:
        home = directory
        for _ in Path(config.runs_dir, config.name).parts:
            home = home.parent
        if Path(home, config.runs_dir, config.name).resolve() != directory:  # it was moved
            command += [f"runs_dir={directory.parent}", f"name={directory.name}"]
        elif not Path(config.runs_dir).is_absolute():
            command[2] = str(Path(config.runs_dir, config.name, CONFIG))
            if home != Path.cwd():
                return f"cd {shlex.quote(str(home))} && {shlex.join(command)}"
    return shlex.join(command)


def run_show(path: Path, as_json: bool, console: Console) -> None:
    """Prints the run at `path`. Raises ConfigError where that is none."""
    found = gather(open_run(path))
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        show(console, list(_page(found)))


def _page(found: Details) -> list[Text]:
    run, config = found.run, found.run.config
    state, reason = found.standing.state, found.standing.reason
    title = Text.assemble((printable(run.directory), "bold"), ": ", (state, STATE_STYLES.get(state, "")))
    lines = [title.append(f" ({printable(reason)})" if reason else "")]
    lines += [Text(line) for line in _progress(found)]
    if config is not None:
        lines += _section("configuration", table(_highlights(config, found)))
    lines += _section("data", table([[f"{share:.1%}", source] for source, share in found.shares], right=[0]))
    lines += _section("results", _results(found))
    lines += _section("checkpoints", table([_saved(saved, found) for saved in found.checkpoints], right=[1]))
    lines += _section("what happened", list(_told(found)))
    if found.memory:
        rows = [["", "planned", "measured"]]
        for name, (planned, measured) in found.memory.items():
            rows.append([name, format_bytes(planned), "-" if measured is None else format_bytes(measured)])
        lines += _section("memory", table(rows, right=[1, 2]))
    lines += _section("where things lie", table(list(map(list, found.places.items()))))
    lines += _section("next", [Text(found.next)])
    return lines + _section("problems", [Text(printable(problem), "yellow") for problem in found.problems])


def _section(title: str, lines: Sequence[Text]) -> list[Text]:
    return [Text(), Text(title, "bold"), *(Text("  ").append_text(line) for line in lines)] if lines else []


def _progress(found: Details) -> list[str]:
    config = found.run.config
    parts = []
    if found.step is not None:
        parts.append(f"step {found.step}{f' of {config.steps}' if config else ''}")
    if found.tokens is not None:
        parts.append(f"{format_count(found.tokens)} tokens")
    if found.seconds is not None:
        parts.append(f"{format_duration(found.seconds)} of training")
    times = [f"began {local_time(found.began)}"] if found.began else []
    times += [f"last heard of {local_time(found.written)}"] if found.written else []
    return [", ".join(part) for part in (parts, times) if part]


def _highlights(config: RunConfig, found: Details) -> list[list[str]]:
    model, train, optimizer, schedule = config.model, config.train, config.optimizer, config.schedule
    heads = f"{model.num_attention_heads} heads"
    if model.num_key_value_heads not in (None, model.num_attention_heads):
        heads += f" ({model.num_key_value_heads} key/value)"
    sequences = f"{train.micro_batch_size} x {train.gradient_accumulation_steps} sequences"
    environment = found.run.environment
    machine = [str(environment[key]) for key in ("device", "processor") if environment.get(key)]
    machine += [f"{key} {environment[key]}" for key in ("albor", "torch") if environment.get(key)]
    rows = [
        ["model", f"{found.parameters:,} parameters: {model.num_hidden_layers} blocks, width "
         f"{model.hidden_size}, {heads}, vocabulary {model.vocab_size}"],
        ["batch", f"{config.tokens_per_step:,} tokens a step: {sequences} of {config.data.sequence_length}"],
        ["length", f"{config.steps:,} steps, {format_count(config.steps * config.tokens_per_step)} tokens"],
        ["optimizer", f"{optimizer.name}, lr {optimizer.lr:g}, weight decay {optimizer.weight_decay:g}, "
         f"{schedule.kind} after {schedule.warmup_steps} steps of warm-up"],
        ["precision", f"{train.precision}, accumulator on the {train.accumulator}, seed {config.seed}"],
    ]  # fmt: skip
    if model.init_from:
        rows.append(["begun from", model.init_from])
    if machine:
        rows.append(["machine", ", ".join(machine)])
    return rows


def _results(found: Details) -> list[Text]:
    rows = [["metric", "last", "at step", "best", "at step"]]
    for name, figure in found.figures.items():
        best = "" if figure.best is None else _value(name, figure.best)
        at = "" if figure.best_step is None else str(figure.best_step)
        rows.append([name, _value(name, figure.last), str(figure.step), best, at])
    lines = table(rows, right=[1, 2, 3, 4]) if len(rows) > 1 else []
    final = found.run.final()
    if final is not None:
        named = ("val/loss", "val/perplexity", "val/bits_per_byte", "gzip/bits_per_byte", "xz/bits_per_byte")
        known = [f"{name} {final[name]:.4f}" for name in named if isinstance(final.get(name), float)]
        if known:
            lines.append(Text(f"at the end, on more text: {', '.join(known)}"))
    return lines


def _value(name: str, value: float) -> str:
    if name.startswith("memory/") and math.isfinite(value):
        return format_bytes(int(value))
    if name == "train/tokens_per_second" and math.isfinite(value):
        return format_count(value)
    if name == "train/mfu":
        return f"{value:.1%}"
    return f"{value:.3g}" if name in ("train/lr", "train/epoch") else f"{value:.4f}"


def _saved(saved: Saved, found: Details) -> list[str]:
    marks = ["best"] if saved.best else []
    if not saved.whole:
        marks.append("has no manifest, and is not taken")
    elif saved.step == max(other.step for other in found.checkpoints if other.whole):
        marks.append("a resume goes on from here")
    return [f"step {saved.step}", format_bytes(saved.bytes), ", ".join(marks)]


def _told(found: Details) -> Iterator[Text]:
    for kind, steps in found.happened.items():
        known = Counter(step for step in steps if step is not None)
        shown = [f"{step}" + (f" ({times} times)" if times > 1 else "") for step, times in known.items()]
        at = f", step{'s' * (len(shown) > 1)} {_first(shown, _SHOWN_STEPS)}" if shown else ""
        rules = f": {_first(found.alerts, _SHOWN_STEPS)}" if kind == "alert" else ""
        yield Text(printable(f"{len(steps):,} {_TOLD[kind][len(steps) > 1]}{at}{rules}"))
    for change in found.changes[:_SHOWN_CHANGES]:
        yield Text(printable(f"changed at {change}"))
    if len(found.changes) > _SHOWN_CHANGES:
        yield Text(f"and {len(found.changes) - _SHOWN_CHANGES} more changes")


def _first(texts: Sequence[str], count: int) -> str:
    more = f" and {len(texts) - count} more" if len(texts) > count else ""
    return ", ".join(texts[:count]) + more
