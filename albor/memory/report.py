"""An estimate for people: a table on a terminal, the same text aligned and without colour in a pipe."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from albor.config import RunConfig
from albor.errors import DoesNotFit
from albor.memory.estimate import Estimate
from albor.memory.estimate import estimate as estimate_run
from albor.memory.nvml import MEASURED
from albor.memory.outside import MARGIN
from albor.memory.plan import peak_buffers
from albor.memory.plot import check_target, plot_phases
from albor.units import format_bytes

_BAR_WIDTH = 28
_VERDICT_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}


def render(estimate: Estimate, console: Console) -> None:
    """Prints the plan by group, the peak, what lies outside the arena, and the verdict, in 80 columns."""
    config, plan = estimate.config, estimate.plan
    _print(console, f"{config.name} on {estimate.hardware.description}", "bold")
    _print(console, f"{estimate.architecture.parameter_count:,} parameters, {plan.compute_dtype}")
    if estimate.fallback:
        _print(console, estimate.fallback, "yellow")

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(min_width=34)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column(no_wrap=True)
    arena = estimate.device_bytes
    _add_heading(table, "Device arena", arena, estimate.required_bytes)
    for group, size in plan.groups.items():
        if size:
            bar = "█" * round(_BAR_WIDTH * size / arena) if console.is_terminal else ""
            table.add_row(f"  {group}", format_bytes(size), f"{size / arena:.1%}", Text(bar, style="cyan"))
    _add_heading(table, "Outside the arena", sum(estimate.outside.values()), estimate.required_bytes)
    for item in estimate.outside_items:
        said = item.name == MARGIN or "(estimate)" in item.name
        basis = " (estimate)" if item.basis == "estimate" and not said else ""
        if item.bytes:
            table.add_row(f"  {item.name}{basis}", format_bytes(item.bytes))
    if plan.device == "cpu":
        _add_heading(table, "Gradients summed", plan.size("host"), estimate.required_bytes)
    console.print()
    console.print(table)

    console.print()
    largest = ", ".join(f"{buffer.name} {format_bytes(buffer.nbytes)}" for buffer in peak_buffers(plan))
    _print(console, f"Peak     {plan.peak_phase}: {largest}")
    _print(console, f"Arena    {arena:,} bytes")
    if plan.device == "cuda":
        pinned, pageable = format_bytes(plan.size("pinned")), format_bytes(plan.size("host"))
        _print(console, f"Host     {pinned} page-locked, {pageable} not")
    if estimate.held:
        _print(console, f"Held     {estimate.held}")
    if estimate.hardware.gpu and estimate.hardware.gpu.source != MEASURED:
        _print(console, f"Capacity {estimate.hardware.gpu.source}")
    _print(console, f"Outside  {estimate.calibration_note}")
    flops = estimate.architecture.flops_per_token(config.data.sequence_length)
    tokens = config.steps * config.tokens_per_step
    _print(console, f"Compute  {flops / 1e9:.2f} GFLOP per token, {flops * tokens:.2e} FLOP in all")
    _print(
        console,
        f"Tokens   {config.tokens_per_step:,} per step, {config.steps:,} steps, {tokens:,} in all",
    )
    console.print()
    _print(console, estimate.verdict[0].upper() + estimate.verdict[1:], _VERDICT_STYLES[estimate.fits])
    if estimate.fits is False:
        for line in estimate.advice:
            _print(console, line)


def _add_heading(table: Table, title: str, size: int, whole: int) -> None:
    name, amount = (Text(cell, style="bold") for cell in (title, format_bytes(size)))
    table.add_row(name, amount, f"{size / whole:.1%}", "of all")


def _print(console: Console, line: str, style: str = "") -> None:
    # Not wrapped: an override must survive being copied. No markup: names are the user's.
    console.print(Text(line, style=style), soft_wrap=True)


def run_estimate(
    config: RunConfig,
    gpu: str | None,
    vram: int | None,
    as_json: bool,
    console: Console,
    plot: Path | None = None,
) -> int:
    """The command: prints the estimate and returns the exit code, 4 where the run does not fit."""
    if plot is not None:
        check_target(plot)
    result = estimate_run(config, gpu, vram)
    if plot is not None:
        plot_phases(result, plot)
    if as_json:
        answer = result.as_json() | ({"plot": str(plot)} if plot else {})
        print(json.dumps(answer, indent=2), file=console.file)
    else:
        render(result, console)
        if plot is not None:
            _print(console, f"Picture: {plot}")
    return DoesNotFit.exit_code if result.fits is False else 0
