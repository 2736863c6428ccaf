"""`albor runs ls`: the runs below a directory, a line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from albor.errors import ConfigError, Problem
from albor.runs.record import DEPTH, GROUPS, find_runs
from albor.runs.state import State
from albor.runs.summary import Summary, summarise
from albor.runs.text import STATE_STYLES, iso_time, local_time, number, printable, show, table
from albor.units import format_bytes, format_count

_NONE = float("inf")
SORTS: dict[str, Callable[[Summary], Any]] = {
    "began": lambda s: s.began or _NONE,
    "name": lambda s: str(s.run.directory),
    "state": lambda s: list(State).index(s.standing.state),
    "loss": lambda s: _NONE if s.best_loss is None else s.best_loss,
    "bits": lambda s: _NONE if s.bits_per_byte is None else s.bits_per_byte,
    "step": lambda s: -(s.step or 0),
    "tokens": lambda s: -(s.tokens or 0),
    "speed": lambda s: -(s.tokens_per_second or 0),
    "when": lambda s: -(s.written or 0),
    "size": lambda s: -s.size,
}
_HEADINGS = ("run", "state", "step", "best val", "bits/byte", "tokens", "tok/s", "when", "size")
_LEFT_OUT_FIRST = ("when", "tokens", "size", "tok/s", "bits/byte")  # where the terminal is narrow


def run_listing(root: Path, sort: str, states: Sequence[str], as_json: bool, console: Console) -> None:
    """Prints the runs of `root`. Raises ConfigError where that is no directory, or an option is unknown."""
    _check(root, sort, states)
    found = [summarise(run) for run in find_runs(root)]
    chosen = [summary for summary in found if not states or summary.standing.state in states]
    chosen = sorted(chosen, key=SORTS[sort])  # stable: the order of their beginnings where it is the same
    problems = [problem for summary in chosen for problem in summary.problems]
    if as_json:
        listed = [as_object(summary, root) for summary in chosen]
        print(json.dumps({"directory": str(root), "runs": listed, "problems": problems}))
        return
    if chosen:
        show(console, _lines(chosen, root, console.width if console.is_terminal else None))
    elif found:
        count = f"{len(found)} run{'s' * (len(found) > 1)}"
        show(console, [f"{printable(root)}: {count}, and none is {' or '.join(states)}"])
    else:
        show(console, [f"{printable(root)}: no runs here, nor up to {DEPTH} directories below"])
    for problem in problems:
        print(f"albor: {printable(problem)}", file=sys.stderr)


def as_object(summary: Summary, root: Path) -> dict[str, Any]:
    """A run as `--json` has it; what is not known is null."""
    return {
        "name": summary.run.name,
        "directory": str(summary.run.directory),
        "group": _group(summary, root) or None,
        "state": summary.standing.state.value,
        "reason": summary.standing.reason or None,
        "step": summary.step,
        "steps": summary.steps,
        "tokens": summary.tokens,
        "train/loss": _finite(summary.loss),
        "best_val/loss": summary.best_loss,
        "best_step": summary.best_step,
        "best_val/bits_per_byte": _finite(summary.bits_per_byte),
        "train/tokens_per_second": _finite(summary.tokens_per_second),
        "began": iso_time(summary.began),
        "written": iso_time(summary.written),
        "bytes": summary.size,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and abs(value) < _NONE else None


def _check(root: Path, sort: str, states: Sequence[str]) -> None:
    problems = []
    if not root.is_dir():
        what = "is no directory" if root.exists() else "does not exist"
        remedy = "give the directory that holds runs, such as runs"
        problems.append(Problem("DIR", f"{root} {what}", remedy, "command line"))
    if sort not in SORTS:
        message = f"{sort!r} is nothing to sort by"
        problems.append(Problem("--sort", message, f"use one of {', '.join(SORTS)}", "command line"))
    for state in states:
        if state not in list(State):
            remedy = f"use {', '.join(State)}"
            problems.append(Problem("--state", f"{state!r} is no state", remedy, "command line"))
    if problems:
        raise ConfigError(problems)


def _group(summary: Summary, root: Path) -> str:
    """The directory below `root` that the run lies in with others; empty for one in `root` itself."""
    place = summary.run.directory
    return "" if place == root or place.parent == root else str(place.parent.relative_to(root))


def _lines(chosen: Sequence[Summary], root: Path, width: int | None) -> list[Text]:
    groups: dict[str, list[Summary]] = {}
    for summary in chosen:
        groups.setdefault(_group(summary, root) or str(summary.run.directory), []).append(summary)
    left_out: set[str] = set()
    while True:
        lines = _table(groups, root, left_out)
        if width is None or max(line.cell_len for line in lines) <= width:
            break
        further = next((name for name in _LEFT_OUT_FIRST if name not in left_out), None)
        if further is None:
            break
        left_out.add(further)
    if left_out:
        names = ", ".join(name for name in _HEADINGS if name in left_out)
        lines += [Text(f"no room for {names}; a pipe and --json have them", "dim")]
    return lines


def _table(groups: dict[str, list[Summary]], root: Path, left_out: set[str]) -> list[Text]:
    rows: list[list[str | Text]] = [[Text(name, "bold") for name in _HEADINGS]]
    for members in groups.values():
        indent, group = "", _group(members[0], root)
        if group:
            kinds = (kind for file, kind in GROUPS.items() if (root / group / file).exists())
            kind, count = next(kinds, "directory"), len(members)
            title = f"{printable(group)}/ ({kind}, {count} run{'s' * (count > 1)})"
            rows.append([Text(title, "bold")])
            indent = "  "
        rows += [_row(summary, indent) for summary in members]
    shown = [place for place, name in enumerate(_HEADINGS) if name not in left_out]
    titles = {place for place, row in enumerate(rows) if len(row) == 1}
    cells = [[row[place] for place in shown] for row in rows if len(row) > 1]
    lines = iter(table(cells, right=range(2, len(shown))))
    return [rows[place][0] if place in titles else next(lines) for place in range(len(rows))]  # type: ignore[misc]


def _row(summary: Summary, indent: str) -> list[str | Text]:
    state = summary.standing.state
    step = "-" if summary.step is None else str(summary.step)
    return [
        indent + printable(summary.run.name),
        Text(state, STATE_STYLES.get(state, "")),
        f"{step}/{summary.steps if summary.steps is not None else '?'}",
        number(summary.best_loss),
        number(summary.bits_per_byte),
        format_count(summary.tokens),
        format_count(summary.tokens_per_second),
        local_time(summary.written),
        format_bytes(summary.size),
    ]
