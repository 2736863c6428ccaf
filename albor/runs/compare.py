"""`albor runs compare`: what differs between runs, key by key, and how they came out, side by side.

Runs of different lengths are compared where both have been, too: at the tokens of the last evaluation of the
shorter one. A loss per token is only comparable between runs with the same tokens, and validation only on the
same text; where a key that decides this differs, it is said, and nothing is called better.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.runs.details import Details, gather
from albor.runs.record import Metrics, Run, open_run
from albor.runs.text import STATE_STYLES, printable, show, table
from albor.units import format_bytes, format_count, format_duration

MISSING = "(not there)"
_SMOOTH = 10  # rows of which the training loss is the mean
_WHERE_IT_LIES = ("name", "runs_dir")  # which differ between any two runs, and make no difference
_VALIDATION = ("val/loss", "val/bits_per_byte")
_WIDEST = 48  # characters of a value that are shown

# Keys without which a loss per token, or a validation on the same text, is not the same measure.
_TOKENS = ("tokenizer", "model.vocab_size")
_TEXT = ("data.sources", "data.validation_fraction", "data.sequence_length")


@dataclass(frozen=True)
class Result:
    """One figure of each run, in their order; `better` is the place of the best, None where none is."""

    name: str
    values: tuple[float | None, ...]
    better: int | None
    shown: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Several runs. `config` and `environment` hold, by dotted key, the value of each run."""

    labels: tuple[str, ...]
    runs: tuple[Details, ...]
    config: Mapping[str, tuple[Any, ...]]
    environment: Mapping[str, tuple[Any, ...]]
    differing: frozenset[str]
    everything: bool  # whether they hold what does not differ too
    results: tuple[Result, ...]
    tokens: int | None  # at which those results are compared that say so
    notes: tuple[str, ...]
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints; what is not known, or not finite, is null."""
        return {
            "runs": [
                {"label": label, "directory": str(run.run.directory), "state": run.standing.state.value}
                for label, run in zip(self.labels, self.runs, strict=True)
            ],
            "config": {key: list(values) for key, values in self.config.items()},
            "environment": {key: list(values) for key, values in self.environment.items()},
            "differing": sorted(self.differing),
            "at_tokens": self.tokens,
            "results": {
                result.name: {
                    "values": [v if v is not None and math.isfinite(v) else None for v in result.values],
                    "better": None if result.better is None else self.labels[result.better],
                }
                for result in self.results
            },
            "notes": list(self.notes),
            "problems": list(self.problems),
        }


def compare(runs: Sequence[Run], everything: bool = False) -> Comparison:
    """Holds `runs` side by side: the keys that differ, or with `everything` all of them."""
    details = tuple(gather(run) for run in runs)
    configs = [
        flatten(run.config.model_dump(mode="json", exclude=set(_WHERE_IT_LIES))) if run.config else None
        for run in runs
    ]
    environments = [flatten(run.environment) for run in runs]
    notes = []
    config = _side_by_side([found or {} for found in configs])
    environment = _side_by_side(environments)
    differing = frozenset(
        key for table in (config, environment) for key, values in table.items() if _differ(values)
    )
    tokens, text = (_decided_by(keys, differing) for keys in (_TOKENS, _TEXT))
    if len({_sequences(run.config, "batches") for run in runs}) > 1:
        text.append("evaluate.batches x train.micro_batch_size")
    if tokens:
        notes.append(
            f"{' and '.join(tokens)} differ: losses per token are of other tokens, and bits per byte do not "
            "depend on those"
        )
    if text:
        notes.append(f"{' and '.join(text)} differ: they are validated on other text, or in other pieces")
    other_end = len({_sequences(run.config, "final_batches") for run in runs}) > 1
    unfair = {
        "train/loss": bool(tokens), "val/loss": bool(tokens or text), "val/bits_per_byte": bool(text),
    }  # fmt: skip
    at, results = _results(details, unfair, other_end)
    return Comparison(
        labels=labels_of([run.directory for run in runs]),
        runs=details,
        config={key: v for key, v in config.items() if everything or key in differing},
        environment={key: v for key, v in environment.items() if everything or key in differing},
        differing=differing,
        everything=everything,
        results=tuple(results),
        tokens=at,
        notes=tuple(notes),
        problems=tuple(problem for run in details for problem in run.problems),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; a list is one value, but for one of sections, such as data.sources."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{name}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for place, item in enumerate(value):
                found |= flatten(item, f"{name}[{place}].")
        else:
            found[name] = value
    return found


def labels_of(directories: Sequence[Path]) -> tuple[str, ...]:
    """The shortest ends of the paths by which they differ: the name where that is enough."""
    paths = [Path(directory).resolve() for directory in directories]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        labels = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(labels)) == len(set(paths)):
            break
    return tuple(labels)


def _side_by_side(tables: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, ...]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    return {key: tuple(table.get(key, MISSING) for table in tables) for key in keys}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] or type(value) is not type(values[0]) for value in values)


def _decided_by(keys: Sequence[str], differing: frozenset[str]) -> list[str]:
    """Those of `keys` that differ, a section or a list as one."""
    return [key for key in keys if any(k == key or k.startswith((f"{key}.", f"{key}[")) for k in differing)]


def _sequences(config: RunConfig | None, key: str) -> int | None:
    """Sequences of held-out text in an evaluation, at most."""
    return None if config is None else getattr(config.evaluate, key) * config.train.micro_batch_size


def _results(
    runs: Sequence[Details], unfair: Mapping[str, bool], other_end: bool
) -> tuple[int | None, list[Result]]:
    """The figures that any run has, and the tokens at which they are compared in common. A metric that is
    `unfair` is shown, and nothing is better for it; `other_end`: nor by its value at the run's end.
    """
    shared = _shared_tokens(runs)
    results = list(_at_the_end(runs, unfair, other_end))
    if shared is not None and any(run.tokens != runs[0].tokens for run in runs):
        for name in _VALIDATION:
            values = [_value_at(run.metrics, name, shared) for run in runs]
            result = _result(f"{name} at {format_count(shared)} tokens", values, ".4f", -1)
            results.append(_judged(result, unfair[name]))
    return shared, [result for result in results if any(value is not None for value in result.values)]


def _at_the_end(runs: Sequence[Details], unfair: Mapping[str, bool], other_end: bool) -> Iterator[Result]:
    for name in _VALIDATION:
        best = [run.figures[name].best if name in run.figures else None for run in runs]
        yield _judged(_result(f"best {name}", best, ".4f", -1), unfair[name])
    for name in _VALIDATION:
        finals = [(run.run.final() or {}).get(name) for run in runs]
        known = [value if isinstance(value, float) else None for value in finals]
        yield _judged(_result(f"final {name}", known, ".4f", -1), unfair[name] or other_end)
    losses = [_last_loss(run.metrics) for run in runs]
    yield _judged(_result("train/loss, last rows", losses, ".4f", -1), unfair["train/loss"])
    speeds = [_middle(run.metrics, "train/tokens_per_second") for run in runs]
    yield _result("tokens per second", speeds, format_count, +1)
    yield _result("mfu", [_middle(run.metrics, "train/mfu") for run in runs], ".1%", +1)
    yield _result("tokens", [run.tokens for run in runs], format_count, 0)
    yield _result("steps", [run.step for run in runs], ".0f", 0)
    yield _result("time of training", [run.seconds for run in runs], format_duration, 0)
    yield _result("parameters", [run.parameters for run in runs], format_count, 0)
    yield _result("memory of the process", [_memory(run) for run in runs], _format_size, -1)
    for title, kind in (("steps skipped", "skipped_step"), ("rollbacks", "rollback"), ("alerts", "alert")):
        counts = [len(run.happened.get(kind, ())) for run in runs]
        if any(counts):
            yield _result(title, counts, ".0f", -1)


def _result(name: str, values: Sequence[float | None], form: Any, sign: int) -> Result:
    """`sign` is +1 where more is better, -1 where less is, 0 where neither is."""
    known = [value * sign for value in values if value is not None and math.isfinite(value)]
    show_value = (lambda value: format(value, form)) if isinstance(form, str) else form
    shown = tuple("-" if value is None else show_value(value) for value in values)
    better = None
    if sign and len(known) == len(values):
        best = known.index(max(known))
        better = best if shown.count(shown[best]) == 1 else None  # a difference that is not seen is none
    return Result(name, tuple(values), better, shown)


def _judged(result: Result, unfair: bool) -> Result:
    return Result(result.name, result.values, None, result.shown) if unfair else result


def _format_size(value: float) -> str:
    return format_bytes(int(value))


def _shared_tokens(runs: Sequence[Details]) -> int | None:
    """The tokens of the last evaluation of that run whose last evaluation came first."""
    lasts = [(run.metrics.series("val/loss")[0] or [-1])[-1] for run in runs]
    tokens = [run.metrics.tokens_at(step) for run, step in zip(runs, lasts, strict=True)]
    known = [found for found in tokens if found is not None]
    return min(known) if len(known) == len(runs) else None


def _value_at(metrics: Metrics, name: str, tokens: int) -> float | None:
    """The metric at so many tokens: between its two neighbours in proportion."""
    points = [
        (at, value)
        for step, value in zip(*metrics.series(name), strict=True)
        if (at := metrics.tokens_at(step)) is not None and math.isfinite(value)
    ]
    before = [point for point in points if point[0] <= tokens][-1:]
    after = [point for point in points if point[0] >= tokens][:1]
    if not before or not after:
        return None
    (left, low), (right, high) = before[0], after[0]
    return low if left == right else low + (high - low) * (tokens - left) / (right - left)


def _last_loss(metrics: Metrics) -> float | None:
    values = metrics.series("train/loss")[1][-_SMOOTH:]
    return statistics.fmean(values) if values else None


def _middle(metrics: Metrics, name: str) -> float | None:
    values = metrics.series(name)[1]
    return statistics.median(values) if values else None


def _memory(run: Details) -> float | None:
    measured = [size for name, (_, size) in run.memory.items() if name.startswith("process")]
    return max((size for size in measured if size is not None), default=None)


def run_compare(paths: Sequence[Path], everything: bool, as_json: bool, console: Console) -> None:
    """Prints the comparison. Raises ConfigError with every path that is no run."""
    problems: list[Problem] = []
    runs = []
    for path in paths:
        try:
            runs.append(open_run(path))
        except ConfigError as error:
            problems += error.problems
    seen: set[Path] = set()
    for run in runs:
        if (place := run.directory.resolve()) in seen:
            message = f"{run.directory} is given twice"
            problems.append(Problem("RUN", message, "name each run once", "command line"))
        seen.add(place)
    if len(paths) < 2:
        problems.append(Problem("RUN", "one run is compared with nothing", "give two", "command line"))
    if problems:
        raise ConfigError(problems)
    found = compare(runs, everything)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        show(console, list(_page(found)))


def _page(found: Comparison) -> Iterator[Text]:
    states = [Text(run.standing.state, STATE_STYLES.get(run.standing.state, "")) for run in found.runs]
    heading: list[str | Text] = [Text(""), *(Text(printable(label), "bold") for label in found.labels)]
    rows: list[list[str | Text]] = [heading, ["state", *states]]
    for result in found.results:
        cells = [
            Text(f"{shown} *", "green") if place == result.better else Text(f"{shown}  ")
            for place, shown in enumerate(result.shown)
        ]
        rows.append([result.name, *cells])
    yield from table(rows, right=range(1, len(heading)))
    if any(result.better is not None for result in found.results):
        yield Text("* the better one", "dim")
    for title, differences in (("configuration", found.config), ("environment", found.environment)):
        yield Text()
        if not differences:
            yield Text(f"{title}: no difference")
            continue
        yield Text(title, "bold")
        rows = [[Text(""), *heading[1:]]]
        for key, values in differences.items():
            style = "bold" if key in found.differing and found.everything else ""
            rows.append([Text(f"  {key}", style), *map(_shown, values)])
        yield from table(rows)
    if found.notes or found.problems:
        yield Text()
    for note in (*found.notes, *found.problems):
        yield Text(printable(note), "yellow")


def _shown(value: Any) -> str:
    text = value if value is MISSING else json.dumps(value, ensure_ascii=False)
    text = printable(text)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
