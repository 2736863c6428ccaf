"""What a ladder has found: one object for `--json`, tables for people, and `ladder.md` beside the runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from albor.architecture import Architecture
from albor.ladder.climb import finished
from albor.ladder.file import GATES, LadderFile, Planned
from albor.ladder.gates import Result
from albor.ladder.state import STATE, State
from albor.units import format_count

REPORT = "ladder.md"

Row = dict[str, Any]


def as_json(file: LadderFile, rungs: Sequence[Planned], state: State, end: str | None) -> Row:
    """What `--json` prints. `end` says why the ladder ended before its last rung, if it did."""
    entries = [_rung_json(planned, state) for planned in rungs]
    return {
        "ladder": file.ladder.name,
        "directory": str(file.ladder.directory),
        "state_file": str(file.ladder.directory / STATE),
        "report": str(file.ladder.directory / REPORT),
        "passed": end is None and all(entry["state"] in ("passed", "skipped") for entry in entries),
        "ended_by": end,
        "rungs": entries,
    }


def _rung_json(planned: Planned, state: State) -> Row:
    results = [state.result(planned, gate) for gate in GATES]
    found = [one for one in results if one is not None]
    return {
        "name": planned.name,
        "run": str(planned.directory),
        "config": str(planned.path),
        "config_sha256": planned.sha256,
        "state": _state(planned, state, found),
        "parameters": Architecture.from_config(planned.config.model).parameter_count,
        "tokens": planned.config.steps * planned.config.tokens_per_step,
        "budget": state.get(planned.name, "budget"),
        "baselines": state.get(planned.name, "baselines", planned),
        "prediction": state.get(planned.name, "prediction", planned),
        "predicted_speed": state.get(planned.name, "predicted_speed", planned),
        "result": state.get(planned.name, "result", planned),
        "comparison": state.get(planned.name, "comparison", planned),
        "gates": [one.as_json() for one in found],
    }


def _state(planned: Planned, state: State, found: Sequence[Result]) -> str:
    if any(one.status == "failed" for one in found):
        return "failed"
    if finished(planned) and len(found) == len(GATES):
        return "passed"
    if state.get(planned.name, "skipped"):
        return "skipped"
    return "not finished" if planned.directory.is_dir() else "not begun"


def rung_rows(content: Row) -> list[list[str]]:
    """A header, and a row for each rung."""
    rows = [["rung", "state", "params", "tokens", "val loss", "predicted", "bits/byte", "tokens/s", "hours"]]
    for rung in content["rungs"]:
        result, prediction = rung["result"] or {}, rung["prediction"]
        predicted = ""
        if prediction is not None:
            predicted = "not predicted"
            if "loss" in prediction:
                predicted = f"{prediction['loss']:.3f} ({prediction['low']:.3f} to {prediction['high']:.3f})"
        rows.append(
            [
                rung["name"],
                rung["state"],
                format_count(rung["parameters"]),
                format_count(rung["tokens"]),
                _number(result.get("loss"), ".3f"),
                predicted,
                _number(result.get("bits_per_byte"), ".3f"),
                _number(result.get("tokens_per_second"), ",.0f"),
                _number(result.get("hours"), ".3g"),
            ]
        )
    return rows


def gate_rows(content: Row) -> list[list[str]]:
    """A header, and a row for each gate that has been judged, or left out, of each rung."""
    rows = [["rung", "gate", "", "measured", "threshold", "why", "look at"]]
    for rung in content["rungs"]:
        for gate in rung["gates"]:
            rows.append(
                [
                    *(rung["name"], gate["gate"], gate["status"], gate["measured"], gate["threshold"]),
                    *(gate["why"], gate["look_at"] or ""),
                ]
            )
    return rows


def print_report(content: Row, console: Console) -> None:
    """Both tables, without what only the report has room for, and where that lies."""
    gates = [row[:5] for row in gate_rows(content)]
    for rows in (rung_rows(content), gates):
        table = Table(box=None, pad_edge=False, header_style="")
        for title in rows[0]:
            table.add_column(title, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print()
        console.print(table, highlight=False, markup=False)
    console.out(f"\nreport: {content['report']}", highlight=False)


def markdown(content: Row, file: LadderFile) -> str:
    """The content of ladder.md."""
    parts = [f"# Ladder {content['ladder']}\n", f"From `{file.path}`.\n"]
    if content["ended_by"]:
        quoted = "\n".join(f"> {line}" for line in content["ended_by"].splitlines())
        parts.append(f"**It ended before its last rung:**\n\n{quoted}\n")
    parts += ["## Rungs\n", _table(rung_rows(content))]
    for rung in content["rungs"]:
        if rung["comparison"] is not None:
            low, high = rung["comparison"]["low"], rung["comparison"]["high"]
            parts.append(
                f"{rung['name']}: validation loss {rung['comparison']['loss']:.3f}, predicted "
                f"{rung['comparison']['predicted']:.3f} ({low:.3f} to {high:.3f}): "
                f"{rung['comparison']['verdict']}. {rung['prediction']['method']}.{_hours(rung)}\n"
            )
        elif rung["prediction"] is not None and "not_predicted" in rung["prediction"]:
            parts.append(f"{rung['name']}: {rung['prediction']['not_predicted']}.\n")
    parts += ["## Gates\n", _table(gate_rows(content))]
    return "\n".join(parts)


def _hours(rung: Row) -> str:
    """What was expected of the speed, and what it was."""
    expected, taken = (rung["predicted_speed"] or {}).get("hours"), (rung["result"] or {}).get("hours")
    if expected is None or taken is None:
        return ""
    kwh = rung["predicted_speed"]["kwh"]
    power = "" if kwh is None else f", {kwh:.3g} kWh"
    basis = rung["predicted_speed"]["basis"]
    return f" Predicted {expected:.3g} hours{power} ({basis}); taken {taken:.3g}."


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def report_path(file: LadderFile) -> Path:
    """Where `markdown` goes."""
    return file.ladder.directory / REPORT
