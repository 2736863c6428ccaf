"""`albor export`: a run's model in the formats that other programs load, each checked by such a program."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from albor import checkpoint
from albor.durable import write_file
from albor.errors import AlborError, ConfigError, Problem
from albor.export.directory import check_disk, check_target, new_directory
from albor.export.format import Format, Source, open_source
from albor.export.gate import AlborRuntime, Gate, NotInstalled, compare
from albor.export.weights import hf_tensors, layout
from albor.memory.shortage import explained
from albor.progress import Report, show_progress
from albor.strictjson import to_json

FORMATS = ("hf", "gguf", "onnx")  # each is the module of its name
GATE = "gate.json"


class GateFailed(AlborError):
    """The program that is to load an export does not compute with it what albor does."""

    def __init__(self, gate: Gate):
        self.gate = gate
        super().__init__("the export is not what albor computes")


@dataclass(frozen=True)
class Export:
    """What became of one format."""

    format: str
    dtype: str
    target: Path
    gate: Gate
    files: dict[str, int]  # bytes by name; empty where the gate refused it and nothing is kept

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "format": self.format,
            "dtype": self.dtype,
            "path": str(self.target) if self.files else None,
            "bytes": sum(self.files.values()),
            "files": self.files,
            "gate": self.gate.as_json(),
        }


def find_formats(given: Sequence[str]) -> list[Format]:
    """The formats that `--to` names, once or several times, with commas or without.

    Raises ConfigError for one that there is not.
    """
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    unknown = [name for name in dict.fromkeys(names) if name not in FORMATS]
    if unknown or not names:
        problem = f"{', '.join(unknown)} is no format" if unknown else "names no format"
        raise ConfigError([Problem("--to", problem, f"use {', '.join(FORMATS)}", "command line")])
    return [importlib.import_module(f"albor.export.{name}").FORMAT for name in dict.fromkeys(names)]


def export(
    path: Path,
    formats: Sequence[Format],
    out: Path | None,
    dtype: str | None,
    model_license: str | None,
    check: bool,
    report: Report,
) -> tuple[Source, list[Export]]:
    """Writes the model at `path` (a run, a checkpoint, RUN/best) in each of `formats`.

    To `out`, or below it by format where there are several; without it to RUN/export. `dtype` None: each
    format's own choice. Whatever can be known to fail does so before the first byte is written: ConfigError
    for a target that is taken or a dtype that a format has not, CannotCarry, a full disk. An export that its
    gate refuses is removed; the others stay.
    """
    _check_dtype(formats, dtype)
    run = checkpoint.candidates(path)[0].parent.parent
    parent = run / "export" if out is None else out
    alone = out is not None and len(formats) == 1
    targets = {format.name: parent if alone else parent / format.name for format in formats}
    for target in targets.values():
        check_target(target)
    report("reading the checkpoint", 0, None)
    source = open_source(path, model_license)
    _check_weights(source)
    dtypes = {format.name: dtype or format.default_dtype(source) for format in formats}
    for format in formats:
        format.check(source, dtypes[format.name])
    check_disk({targets[f.name]: f.needed_bytes(source, dtypes[f.name]) for f in formats})
    return source, [
        _export_one(source, format, targets[format.name], dtypes[format.name], check, report)
        for format in formats
    ]


def _check_dtype(formats: Sequence[Format], dtype: str | None) -> None:
    problems = [
        Problem("--dtype", f"{format.name} has no {dtype}", f"use {', '.join(format.dtypes)}", "command line")
        for format in formats
        if dtype is not None and dtype not in format.dtypes
    ]
    if problems:
        raise ConfigError(problems)


def _check_weights(source: Source) -> None:
    """Raises AlborError where a weight is no number, which some formats would store as another one."""
    for name, tensor in hf_tensors(source.loaded.arena, source.architecture):
        if not tensor.isfinite().all():
            raise AlborError(
                f"{source.checkpoint}: {name} has values that are NaN or infinite: the training diverged, or "
                "they were damaged since; use an earlier checkpoint"
            )


def _export_one(
    source: Source, format: Format, target: Path, dtype: str, check: bool, report: Report
) -> Export:
    source.load_weights()  # the gate of the format before has rounded them
    try:
        with new_directory(target) as directory:
            format.write(source, directory, dtype, report)
            gate = _check(source, format, directory, dtype, check, report)
            if gate.passed is False:
                raise GateFailed(gate)
            write_file(directory / GATE, to_json(gate.as_json()))
            paths = sorted(path for path in directory.rglob("*") if path.is_file())
            files = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    except GateFailed as refused:
        return Export(format.name, dtype, target, refused.gate, {})
    return Export(format.name, dtype, target, gate, files)


def _check(source: Source, format: Format, directory: Path, dtype: str, check: bool, report: Report) -> Gate:
    tolerance = format.tolerance(dtype)
    if not check:
        return Gate("none", (), tolerance, "--no-check was given")
    report(f"checking {format.name}: before rounding", 0, None)
    own = AlborRuntime(source.loaded, source.stop_ids)
    before = own.look_before() if _loses(source, format, dtype) else None
    for piece in layout(source.architecture):
        values = piece.of(source.loaded.arena["weights"])
        rounded = format.rounded(piece.name, piece.times_factor(values), dtype)
        values.copy_(rounded if piece.factor == 1.0 else rounded / piece.factor)
    context = source.architecture.max_position_embeddings
    try:
        return compare(
            own,
            format.program,
            lambda: format.open_runtime(directory, dtype),
            context,
            tolerance,
            before,
            on_check=lambda check: report(f"checking {format.name}: {check}", 0, None),
        )
    except NotInstalled as missing:
        return Gate("none", (), tolerance, str(missing))


def _loses(source: Source, format: Format, dtype: str) -> bool:
    """Whether the file's values are others than the source's."""
    tensors = hf_tensors(source.loaded.arena, source.architecture)
    return any(not torch.equal(format.rounded(name, values, dtype), values) for name, values in tensors)


def run_export(
    path: Path,
    to: Sequence[str],
    out: Path | None,
    dtype: str | None,
    model_license: str | None,
    check: bool,
    as_json: bool,
    console: Console,
) -> int:
    """The command; returns its exit code."""
    formats = find_formats(to)
    with show_progress(console) as report, explained("free memory, or export on a larger machine"):
        source, exports = export(path, formats, out, dtype, model_license, check, report)
    step, planned = source.state["step"], source.config.steps
    if step < planned:
        console.out(f"This is step {step:,} of the {planned:,} that the run is to have.", highlight=False)
    for result in exports:
        _print(result, console)
    if as_json:
        content = {
            "checkpoint": str(source.checkpoint),
            "step": step,
            "planned_steps": planned,
            "tokens": source.state["tokens"],
            "exports": [result.as_json() for result in exports],
        }
        print(json.dumps(content))
    refused = [result for result in exports if not result.files]
    if refused:
        names = ", ".join(result.format for result in refused)
        raise AlborError(
            f"{names}: the gate found a mismatch, shown above, and nothing of that export is kept"
        )
    return 0


def _print(result: Export, console: Console) -> None:
    gate = result.gate
    line = f"{result.format}, {result.dtype}: "
    if gate.unchecked is not None:
        console.out(f"{line}NOT CHECKED: {gate.unchecked}", highlight=False)
    else:
        console.out(f"{line}albor and {gate.runtime}; {gate.tolerance.reason}", highlight=False)
        table = Table(box=None, pad_edge=False, header_style="")
        for title in ("", "compared", "found", ""):
            table.add_column(title, overflow="fold")
        for row in gate.rows:
            table.add_row(row.check, row.compared, row.found, "ok" if row.passed else "MISMATCH")
        console.print(table, highlight=False, markup=False)
    if result.files:
        size = sum(result.files.values())
        console.out(f"{size / 1e6:,.1f} MB in {result.target}", highlight=False)
