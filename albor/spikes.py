"""`albor inspect-spike`: the steps that a run skipped or clipped, and what was in their batches. No torch.

What it shows may have been in anybody's text, so nothing of it reaches a terminal that is not printable.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from albor.errors import AlborError, ConfigError, Problem
from albor.runlog import EVENTS, read_rows
from albor.strictjson import from_json, read_bounded

SPIKES = "spikes"  # where a run directory keeps them
FORMAT = 1

_FILE_NAME = re.compile(r"step-([0-9]{8,})(?:-rollback-([0-9]+))?\.json")
_SHOWN_CHARACTERS = 600  # of a sequence's text; --json has all
_SHOWN_STEPS = 20  # of those without a file
_NOT_KEPT = "not kept (divergence.keep_spikes, or a disk that had no room)"
_REMEDY = "give a run directory, such as runs/my-run"

Spike = dict[str, Any]


def spike_name(step: int, rollbacks: int = 0) -> str:
    """The file's name for `step`, which after a rollback comes again, with another batch."""
    return f"step-{step:08d}" + (f"-rollback-{rollbacks}" if rollbacks else "") + ".json"


def find_spikes(run: Path) -> list[tuple[int, Path]]:
    """The files of a run with their steps, in the order of steps and rollbacks.

    Raises ConfigError where `run` is no run's directory.
    """
    if not run.is_dir():
        raise ConfigError([Problem("RUN", f"{run} is no directory", _REMEDY, "command line")])
    if not (run / "config.resolved.yaml").exists() and not (run / SPIKES).is_dir():
        raise ConfigError([Problem("RUN", f"{run} is no run's directory", _REMEDY, "command line")])
    matches = ((_FILE_NAME.fullmatch(path.name), path) for path in (run / SPIKES).glob("step-*.json"))
    found = sorted((int(match[1]), int(match[2] or 0), path) for match, path in matches if match)
    return [(step, path) for step, _, path in found]


def read_spike(path: Path) -> Spike:
    """What is kept of a step. Raises AlborError for a file that is not what a run writes."""
    try:
        spike = from_json(read_bounded(path))
        if not isinstance(spike, dict) or spike.get("format") != FORMAT:
            raise ValueError("another format than this albor's")
        list(spike_lines(spike)), _row(spike)  # whatever is missing, or is something else, fails here
    except OSError as error:
        raise AlborError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AlborError(f"{path}: not what a run writes ({error!r}); remove it") from error
    return spike


def inspect_spikes(run: Path, step: int | None, *, as_json: bool) -> Iterator[str]:
    """The lines of `albor inspect-spike`. Raises ConfigError for a run or a step that is not there."""
    found = find_spikes(run)
    if step is not None:
        of_step = [path for number, path in found if number == step]
        if not of_step:
            steps = dict.fromkeys(str(number) for number, _ in found)
            there = f"there are {', '.join(steps)}" if found else f"{run} has none"
            if step in _steps_in_log(run):
                there += f"; {_NOT_KEPT}"
            problem = Problem("--step", f"nothing is kept of step {step}; {there}", "", "command line")
            raise ConfigError([problem])
        *earlier, last = map(read_spike, of_step)
        if as_json:
            yield json.dumps({**last, "before_rollbacks": earlier})
            return
        for spike in (*earlier, last):
            yield from spike_lines(spike)
            if spike is not last:
                yield ""
        return
    spikes, unreadable = [], []
    for _, path in found:
        try:
            spikes.append(read_spike(path))
        except AlborError as error:
            unreadable.append(str(error))
    not_kept = sorted(_steps_in_log(run) - {number for number, _ in found})
    if as_json:
        summaries = [{key: value for key, value in spike.items() if key != "sequences"} for spike in spikes]
        yield json.dumps(
            {"run": str(run), "spikes": summaries, "unreadable": unreadable, "not_kept": not_kept}
        )
        return
    if spikes:
        yield from _table([_HEADINGS, *map(_row, spikes)])
        yield ""
        command = shlex.join(["albor", "inspect-spike", str(run), "--step", str(spikes[-1]["step"])])
        yield f"{command} shows what was in the batch"
    elif not unreadable and not not_kept:
        yield f"{run}: no step was skipped or clipped"
    if not_kept:
        named = ", ".join(map(str, not_kept[:_SHOWN_STEPS]))
        more = f" and {len(not_kept) - _SHOWN_STEPS:,} more" if len(not_kept) > _SHOWN_STEPS else ""
        yield f"skipped or clipped as well, and {_NOT_KEPT}: steps {named}{more}"
    yield from unreadable


def _steps_in_log(run: Path) -> set[int]:
    """The steps that events.jsonl says were skipped or clipped, whether or not a file tells of them."""
    try:
        return {
            row["step"]
            for row in read_rows(run / EVENTS)
            if row.get("event") in ("skipped_step", "spike") and type(row.get("step")) is int
        }
    except OSError as error:
        raise AlborError(f"{run / EVENTS}: cannot be read: {error.strerror or error}") from error


_HEADINGS = ("step", "rollbacks", "verdict", "action", "loss", "z", "norm", "z", "largest norm in")


def _row(spike: Spike) -> tuple[str, ...]:
    window, norms = spike["window"], spike["gradient_norms"]
    parts = {group: norm for group, norm in norms.items() if "/" in group or f"{group}/mlp" not in norms}
    sizes = {group: _rank(_size(norm)) for group, norm in parts.items()}
    largest = max(sizes, key=lambda group: sizes[group], default="-")
    if len(sizes) > 1 and min(sizes.values()) == math.inf:
        largest = "all"
    return (
        str(spike["step"]), str(spike["rollbacks"]), spike["verdict"], spike["action"],
        _show(spike["loss"]), _zscore(window["loss"]),
        _show(spike["grad_norm"]), _zscore(window["grad_norm"]), largest,
    )  # fmt: skip


def spike_lines(spike: Spike) -> Iterator[str]:
    """One step in full."""
    window = spike["window"]
    yield f"step {int(spike['step'])}: {_printable(spike['verdict'])}, {_printable(spike['action'])}"
    yield ""
    yield from _table([
        ("", "this step", "mean before", "deviation", "z"),
        ("loss", _show(spike["loss"]), *_statistics(window["loss"])),
        ("gradient norm", _show(spike["grad_norm"]), *_statistics(window["grad_norm"])),
    ])  # fmt: skip
    yield ""
    yield f"learning rate {_show(spike['lr'])}, loss scale {_show(spike['loss_scale'])}"
    yield f"compared with the {int(window['steps'])} finite steps before it"
    if spike["skipped_before"]:
        yield f"skipped shortly before: steps {', '.join(str(int(step)) for step in spike['skipped_before'])}"
    yield f"rollbacks before: {int(spike['rollbacks'])}"
    yield ""
    yield from _norm_lines(spike["gradient_norms"])
    first, end = spike["samples"]
    yield ""
    yield f"The batch: samples {int(first)} to {int(end) - 1}"
    for sequence in spike["sequences"]:
        yield ""
        yield from _sequence_lines(sequence)


def _norm_lines(norms: Mapping[str, Any]) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("gradient norm", "whole", "attention", "MLP")]
    for group, norm in norms.items():
        if "/" not in group:
            halves = (norms.get(f"{group}/{half}") for half in ("attention", "mlp"))
            rows.append((_printable(group), _show(norm), *("" if n is None else _show(n) for n in halves)))
    yield from _table(rows)


def _sequence_lines(sequence: Mapping[str, Any]) -> Iterator[str]:
    start, end = sequence["tokens"]
    documents = ", ".join(
        f"{int(d['document'])} (its tokens {int(d['tokens'][0])} to {int(d['tokens'][1]) - 1})"
        for d in sequence["documents"]
    )
    noun = "document" if len(sequence["documents"]) == 1 else "documents"
    yield (
        f"sample {int(sequence['sample'])}: {_printable(sequence['origin'])}, tokens {int(start)} to "
        f"{int(end) - 1}, {noun} {documents}"
    )
    text = sequence["text"]
    for line in text[:_SHOWN_CHARACTERS].splitlines():
        yield f"  | {_printable(line)}".rstrip()
    if len(text) > _SHOWN_CHARACTERS:
        yield f"  ... {len(text) - _SHOWN_CHARACTERS:,} more characters, which --json has"


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (_printable(cell).ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _statistics(compared: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if compared is None:
        return "-", "-", "-"
    return _show(compared["mean"]), _show(compared["deviation"]), _zscore(compared)


def _zscore(compared: Mapping[str, Any] | None) -> str:
    return "-" if compared is None else _show(compared["zscore"], ".1f")


def _show(value: float | str, form: str = ".4g") -> str:
    return format(_size(value), form)


def _rank(size: float) -> float:
    return size if math.isfinite(size) else math.inf


def _size(value: float | str) -> float:
    return float(value)  # also of "nan" and "inf", as which such numbers are kept


def _printable(text: str) -> str:
    """`text` with what could move a cursor or turn the reading direction written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
