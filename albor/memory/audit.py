"""`albor vram-estimate --audit RUN`: what a run took, beside what was planned. No torch.

It reads what the run wrote itself: the events `memory` of events.jsonl (see albor.train.memory_record), and
plan.json for what was planned on what grounds. A residual is what was measured less what was planned, in
bytes and as a share of what was measured: above zero, the run took more than its plan said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from albor.errors import AlborError, ConfigError, Problem
from albor.strictjson import from_json, read_bounded
from albor.units import MIB, format_bytes

EVENT = "memory"
TENTH_STEP, END = "tenth step", "end"  # moments of a process at which a run writes the event

# The goals: of a run on a calibrated card, and of every run. What a process takes in host memory depends on
# the texts that it has read.
GOAL_SHARE = 0.015
GOAL_UNDER = 64 * MIB
ARENA, PROCESS, PEAK = "arena, ", "process", "process, peak"
_BEGINNINGS = ("started", "resumed")
_REMEDY = "give a run directory, such as runs/my-run"


@dataclass(frozen=True)
class Component:
    """One part of a run's memory in bytes. `how` says how it was measured; where it was not, why."""

    planned: int
    measured: int | None
    how: str

    @property
    def residual(self) -> int | None:
        """Bytes beyond the plan."""
        return None if self.measured is None else self.measured - self.planned

    @property
    def share(self) -> float | None:
        """The residual as a share of what was measured."""
        return self.residual / self.measured if self.residual is not None and self.measured else None

    def as_json(self) -> dict[str, Any]:
        """With both residuals."""
        share = None if self.share is None else round(100 * self.share, 4)
        return {
            "planned": self.planned,
            "measured": self.measured,
            "residual": self.residual,
            "residual_percent": share,
            "how": self.how,
        }


@dataclass(frozen=True)
class Record:
    """One event `memory`."""

    step: int
    moment: str
    device: str
    calibrated: bool
    components: Mapping[str, Component]

    @property
    def is_exact(self) -> bool:
        """Whether the plan knows what lies outside the arena, and is held against the goal for that."""
        return self.calibrated and self.device == "cuda"


@dataclass(frozen=True)
class Verdict:
    """Whether a run's memory was what it had been said to be; None: that was not measured."""

    reached: bool | None
    text: str


@dataclass(frozen=True)
class Audit:
    """The newest process of a run that has a record: after its tenth step, and at its end."""

    run: Path
    plan: Mapping[str, Any]
    tenth_step: Record | None
    end: Record | None
    notes: tuple[str, ...]

    @property
    def last(self) -> Record:
        """The later record; there is one."""
        record = self.end or self.tenth_step
        assert record is not None
        return record

    @property
    def verdict(self) -> Verdict:
        """Held against the goals."""
        return judge(self.last)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        records = {"tenth_step": self.tenth_step, "end": self.end}
        last = self.last
        return {
            "run": str(self.run),
            "device": last.device,
            "hardware": self.plan.get("hardware"),
            "attention": self.plan.get("attention"),
            "calibrated": last.calibrated,
            **{
                name: None if record is None else {
                    "step": record.step,
                    "components": {key: part.as_json() for key, part in record.components.items()},
                }
                for name, record in records.items()
            },
            "outside": self.plan.get("outside"),
            "goal": {
                "residual_percent": 100 * GOAL_SHARE if last.is_exact else None, "under_bytes": GOAL_UNDER,
            },
            "reached": self.verdict.reached,
            "verdict": self.verdict.text,
            "notes": list(self.notes),
        }  # fmt: skip


def judge(record: Record) -> Verdict:
    """Whether the arenas are what was planned, to the byte, and the process is as near as it should be."""
    whole = record.components[PEAK if PEAK in record.components else PROCESS]
    goal = f"at most {format_bytes(GOAL_UNDER)} more than planned"
    if record.is_exact:
        goal = f"within {GOAL_SHARE:.1%} of what it takes, and {goal}"
    other = [name for name, part in record.components.items() if name.startswith(ARENA) and part.residual]
    if other:
        return Verdict(False, f"Missed: {', '.join(other)} is not what was planned")
    if whole.residual is None or whole.share is None:
        return Verdict(None, f"Unknown: the arena is as planned; the process: {whole.how}")
    words = "more" if whole.residual > 0 else "less"
    found = f"{format_bytes(abs(whole.residual))} ({abs(whole.share):.1%}) {words} than planned"
    reached = whole.residual <= GOAL_UNDER
    reached = reached and (not record.is_exact or abs(whole.share) <= GOAL_SHARE)
    start = "Missed" if not reached else "Reached" if record.is_exact else "Within the plan"
    if not record.is_exact:
        why = "the card is not calibrated" if record.device == "cuda" else "host memory depends on the texts"
        goal += f"; how much less is not judged: {why}"
    return Verdict(reached, f"{start}: the arena is as planned, the process took {found}; the goal: {goal}")


def audit(run: Path) -> Audit:
    """Reads what the run in the directory `run` recorded.

    Raises ConfigError where that is no run's directory, and AlborError where there is no record in it that
    can be read.
    """
    if not run.is_dir():
        raise ConfigError([Problem("--audit", f"{run} is no directory", _REMEDY, "command line")])
    events, described = run / "events.jsonl", run / "plan.json"
    if not events.exists() and not described.exists():
        raise ConfigError([Problem("--audit", f"{run} is no run's directory", _REMEDY, "command line")])
    processes, damaged = _read_events(events)
    notes = [f"{events}, line {line}: not what a run writes, and left out" for line in damaged]
    recorded = [place for place, records in enumerate(processes) if records]
    if not recorded:
        raise AlborError("\n".join([_explain_nothing(events, processes), *notes]))
    if recorded[-1] != len(processes) - 1:
        notes.append("The newest process has no record yet; here is an earlier one.")
    records = processes[recorded[-1]]
    if END not in records:
        notes.append("There is no record of the process's end: it still runs, or was killed.")
    if TENTH_STEP not in records:
        notes.append("The process ended before its tenth step.")
    return Audit(run, _read_plan(described), records.get(TENTH_STEP), records.get(END), tuple(notes))


def _explain_nothing(events: Path, processes: list[dict[str, Record]]) -> str:
    if not processes:
        return f"{events}: no training has begun here, so there is nothing to audit"
    return (
        f"{events}: there is no record of memory; the run ended before its tenth step without a word, still "
        "comes to it, or was trained by an albor that kept none (train it again, or further)"
    )


def _read_events(path: Path) -> tuple[list[dict[str, Record]], list[int]]:
    """The records of each process by their moment, oldest first, and the numbers of damaged lines."""
    processes: list[dict[str, Record]] = []
    damaged = []
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise AlborError(f"{path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            event = from_json(line)
            kind = event["event"]
            if kind in _BEGINNINGS:
                processes.append({})
            elif kind == EVENT:
                record = _read_record(event)
                if not processes:  # the line of its beginning is damaged
                    processes.append({})
                processes[-1][record.moment] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged.append(number)
    return processes, damaged


def _read_record(event: Mapping[str, Any]) -> Record:
    """Raises ValueError, KeyError, TypeError or AttributeError for what no run writes."""
    components = {name: _read_component(part) for name, part in event["components"].items()}
    moment, step = event["moment"], event["step"]
    if moment not in (TENTH_STEP, END) or not _is_count(step) or PROCESS not in components:
        raise ValueError("not a record of memory")
    if event["device"] not in ("cpu", "cuda") or not isinstance(event["calibrated"], bool):
        raise ValueError("not a record of memory")
    return Record(step, moment, event["device"], event["calibrated"], components)


def _read_component(values: Mapping[str, Any]) -> Component:
    planned, measured, how = values["planned"], values["measured"], values["how"]
    if not _is_count(planned) or not (measured is None or _is_count(measured)) or not isinstance(how, str):
        raise ValueError("not a component of memory")
    return Component(planned, measured, how)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _read_plan(path: Path) -> Mapping[str, Any]:
    """What plan.json says; nothing where it cannot be read, for the records stand by themselves."""
    try:
        plan = from_json(read_bounded(path))
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan, dict) else {}


def render(found: Audit, console: Console) -> None:
    """Both tables, why some numbers are not known, and the verdict."""
    plan, last = found.plan, found.last
    attention = plan.get("attention")
    backend = attention.get("backend") if isinstance(attention, dict) else None
    facts = [str(plan.get("hardware") or last.device), f"attention by {backend}" if backend else ""]
    if last.device == "cuda":
        facts.append("calibrated" if last.calibrated else "not calibrated")
    _print(console, str(found.run), "bold")
    _print(console, ", ".join(filter(None, facts)))
    moments = ((found.tenth_step, "the process's tenth step"), (found.end, "the process's end"))
    parts = [part for record, _ in moments if record for part in record.components.values()]
    reasons = list(dict.fromkeys(part.how for part in parts if part.measured is None))
    for record, when in moments:
        if record is not None:
            console.print()
            _print(console, f"At {when}, step {record.step}", "bold")
            console.print(_table(record, reasons))
    console.print()
    for number, why in enumerate(reasons, start=1):
        _print(console, f"({number}) {why}")
    for note in found.notes:
        _print(console, note, "yellow")
    verdict = found.verdict
    style = {True: "bold green", False: "bold red", None: "bold yellow"}[verdict.reached]
    _print(console, verdict.text, style)


def _table(record: Record, reasons: list[str]) -> Table:
    """A row for each component; one that was not measured has the number of its reason."""
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("", min_width=24)
    for heading in ("planned", "measured", "residual", "%"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, part in record.components.items():
        if part.residual is None:
            cells = [f"({reasons.index(part.how) + 1})", "", ""]
        elif not part.residual:
            cells = [f"{part.measured:,}", "0", "0.00"]
        else:
            share = "" if part.share is None else f"{100 * part.share:+.2f}"
            cells = [f"{part.measured:,}", f"{part.residual:+,}", share]
        table.add_row(Text(_printable(name)), f"{part.planned:,}", *cells)
    return table


def _print(console: Console, line: str, style: str = "") -> None:
    console.print(Text(_printable(line), style=style), soft_wrap=True)


def _printable(text: str) -> str:
    """What it says may be of anybody's making: no escape codes reach the terminal."""
    return "".join(character if character.isprintable() else "�" for character in text)


def run_audit(run: Path, as_json: bool, console: Console) -> int:
    """The command: prints the audit and returns the exit code, 1 where the goals were missed."""
    found = audit(run)
    if as_json:
        print(json.dumps(found.as_json(), indent=2), file=console.file)
    else:
        render(found, console)
    return 1 if found.verdict.reached is False else 0
