"""`albor ladder FILE --dry-run`: what every rung will take, from the files alone. No data and no torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from albor.errors import ConfigError, Problem
from albor.ladder import gates
from albor.ladder.file import LadderFile, Planned
from albor.memory.cost import Duration
from albor.memory.estimate import Estimate, estimate, plan_for_training
from albor.units import format_bytes, format_count

Row = dict[str, Any]


def plan_ladder(file: LadderFile, gpu: str | None, start: str | None = None) -> Row:
    """Plan and cost on the card called `gpu`, or on this machine, of every rung from `start` on, or from the
    first; what `--json` prints. Raises ConfigError where there is no such rung.
    """
    rungs = [_plan(file, planned, gpu) for planned in file.rungs[file.index_of(start) :]]
    return {
        "ladder": file.ladder.name,
        "directory": str(file.ladder.directory),
        "rungs": rungs,
        "fits": all(rung["fits"] is not False for rung in rungs),
        "total": {
            key: None if any(rung[key] is None for rung in rungs) else sum(rung[key] for rung in rungs)
            for key in ("tokens", "hours", "kwh", "checkpoint_bytes", "disk_bytes")
        },
    }


def _plan(file: LadderFile, planned: Planned, gpu: str | None) -> Row:
    try:
        target = plan_for_training(planned.config) if gpu is None else estimate(planned.config, gpu)
    except ConfigError as error:
        raise ConfigError([_placed(file, planned, one) for one in error.problems]) from error
    cost, duration = target.cost, _duration(target)
    tokens: int | None = cost.tokens
    hours = None if duration is None else duration.hours
    note = "no speed is known for this machine" if duration is None else duration.note
    kwh = None if duration is None else duration.kwh
    verdict, fits = target.verdict, target.fits
    if planned.gates.fits is not None and fits:  # more may have to stay free than the plan leaves
        gate = gates.fits(planned.gates.fits, target)
        if gate.status == "failed":
            verdict, fits = f"does not fit: {gate.measured}, {gate.threshold}", False
    if planned.rung.hours is not None:
        hours, note = planned.rung.hours, "as the file says; how many tokens that is will be measured"
        tokens = None if duration is None else int(hours * 3600 * duration.tokens_per_second)
        if duration is not None and duration.kwh is not None:
            kwh = duration.kwh * hours / duration.hours
    return {
        "name": planned.name,
        "config": str(planned.path),
        "parameters": cost.parameters,
        "tokens": tokens,
        "steps": planned.config.steps if planned.rung.hours is None else None,
        "chinchilla_ratio": cost.chinchilla_ratio if planned.rung.hours is None else None,
        "fits": fits,
        "verdict": verdict,
        "required_bytes": target.required_bytes,
        "hours": hours,
        "kwh": kwh,
        "note": note,
        "checkpoint_bytes": cost.checkpoint_bytes,
        "disk_bytes": cost.disk_bytes,
        "gates_left_out": [name for name, gate in planned.gates if gate is None],
    }


def _placed(file: LadderFile, planned: Planned, problem: Problem) -> Problem:
    """A problem with the rung's run at its line; one with --gpu stays where it is."""
    key = problem.key
    return (
        problem if not key or key == "--gpu" else file.refuse(planned, key, problem.message, problem.remedy)
    )


def _duration(target: Estimate) -> Duration | None:
    """The measured one where the run has measured itself, else the modelled."""
    known = {one.basis: one for one in target.cost.durations}
    return known.get("measured") or known.get("modelled")


def print_plan(content: Row, console: Console) -> None:
    """The same as a table, with what it adds up to."""
    table = Table(box=None, pad_edge=False, header_style="")
    for title in ("rung", "parameters", "tokens", "hours", "kWh", "checkpoint", "disk", "memory"):
        table.add_column(title, overflow="fold")
    for rung in content["rungs"]:
        table.add_row(
            rung["name"],
            format_count(rung["parameters"]),
            "measured later" if rung["tokens"] is None else format_count(rung["tokens"]),
            _number(rung["hours"]),
            _number(rung["kwh"]),
            format_bytes(rung["checkpoint_bytes"]),
            format_bytes(rung["disk_bytes"]),
            rung["verdict"],
        )
    total = content["total"]
    table.add_row(
        "together",
        "",
        "" if total["tokens"] is None else format_count(total["tokens"]),
        _number(total["hours"]),
        _number(total["kwh"]),
        format_bytes(total["checkpoint_bytes"]),
        format_bytes(total["disk_bytes"]),
        "",
    )
    console.print(table, highlight=False, markup=False)
    for note, names in _by(content["rungs"], "note").items():
        console.out(f"hours of {', '.join(names)}: {note}", highlight=False)
    for rung in content["rungs"]:
        if rung["gates_left_out"]:
            console.out(
                f"{rung['name']}: gates left out: {', '.join(rung['gates_left_out'])}", highlight=False
            )


def _by(rungs: list[Row], key: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for rung in rungs:
        found.setdefault(rung[key], []).append(rung["name"])
    return found


def _number(value: float | None) -> str:
    return "?" if value is None else format(value, ",.3g")
