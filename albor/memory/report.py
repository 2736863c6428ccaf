"""An estimate for people: a table on a terminal, the same text aligned and without colour in a pipe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from albor.config import RunConfig
from albor.errors import DoesNotFit
from albor.memory.cost import LITTLE, TOKENS_PER_PARAMETER
from albor.memory.estimate import Estimate
from albor.memory.estimate import estimate as estimate_run
from albor.memory.fit import Options, find_fit
from albor.memory.fit_report import render_fit
from albor.memory.nvml import MEASURED
from albor.memory.outside import MARGIN
from albor.memory.plan import peak_buffers
from albor.memory.plot import check_target, plot_phases
from albor.memory.speed import MODELLED_DTYPES
from albor.units import format_bytes

_BAR_WIDTH = 28
_VERDICT_STYLES = {True: "bold green", False: "bold red", None: "bold yellow"}


def render(estimate: Estimate, console: Console, *, advise: bool = True) -> None:
    """Prints the plan by group, what lies outside the arena, the peak, what the run costs, and the verdict,
    in 80 columns; with `advise`, after a refusal what would fit.
    """
    config, plan = estimate.config, estimate.plan
    _print(console, f"{config.name} on {estimate.hardware.description}", "bold")
    _print(console, f"{estimate.architecture.parameter_count:,} parameters, {plan.compute_dtype}")
    for note in estimate.notes:
        _print(console, note, "yellow")

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
    _print(console, f"Outside  {estimate.calibration_note}")
    if estimate.held:
        _print(console, f"Held     {estimate.held}")
    if estimate.hardware.gpu and estimate.hardware.gpu.source != MEASURED:
        # A source is words or an address, which stays whole.
        source = f"Capacity {estimate.hardware.gpu.source}"
        wrapped = textwrap.wrap(
            source, 80, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False
        )
        for line in wrapped:
            _print(console, line)
    console.print()
    for cost_line in _cost_lines(estimate):
        _print(console, cost_line)
    if estimate.cost.chinchilla_ratio < LITTLE:
        _print(console, "Little data: a smaller model learns more from the same compute.", "yellow")
    console.print()
    _print(console, estimate.verdict[0].upper() + estimate.verdict[1:], _VERDICT_STYLES[estimate.fits])
    if estimate.fits is False and advise:
        for line in estimate.advice:
            _print(console, line)


def _cost_lines(estimate: Estimate) -> list[str]:
    """What the whole run takes: arithmetic, tokens, hours, energy, disk."""
    config, cost = estimate.config, estimate.cost
    flops = estimate.architecture.flops_per_token(config.data.sequence_length)
    lines = [
        f"Compute  {flops / 1e9:.2f} GFLOP per token, {cost.flops:.2e} FLOP in all",
        f"Tokens   {config.tokens_per_step:,} per step, {config.steps:,} steps, {cost.tokens:,} in all",
        f"         {cost.chinchilla_ratio:.3f} of Chinchilla's {TOKENS_PER_PARAMETER} for each parameter",
    ]
    for duration in cost.durations:
        rate = f"{duration.tokens_per_second:,.0f} tokens/s"
        lines.append(f"Time     {_hours(duration.hours)} at {rate}, {duration.note}")
    if not cost.durations:
        known = "known once the run has measured its first steps"
        lines += [f"Time     not modelled {_no_speed(estimate)};", f"         {known}"]
    gpu, kwh = estimate.hardware.gpu, cost.durations[-1].kwh if cost.durations else None
    if gpu is not None and kwh is not None:
        lines.append(f"Energy   {kwh:,.1f} kWh, with the card at its {gpu.board_watts} W all the time")
    kept = f"{format_bytes(cost.disk_bytes)} with {cost.checkpoints} kept and one being written"
    lines.append(f"Disk     {format_bytes(cost.checkpoint_bytes)} per checkpoint, {kept}")
    return lines


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _no_speed(estimate: Estimate) -> str:
    if estimate.device == "cpu":
        return "on a CPU"
    if estimate.plan.compute_dtype not in MODELLED_DTYPES:
        return f"in {estimate.plan.compute_dtype}"
    gpu = estimate.hardware.gpu
    return "for a card that is not known" if gpu is None else f"for {gpu.name}"


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
    fit: Options | None = None,
    command: Sequence[str] = (),
) -> int:
    """The command: prints the estimate and returns the exit code, 4 where the run does not fit. With `fit`,
    what would be the fastest is searched and printed too, and 4 means that nothing fits.

    `command` is the path of the configuration and its overrides, for a command that can be copied.
    """
    if plot is not None:
        check_target(plot)
    result = estimate_run(config, gpu, vram)
    found = None if fit is None else find_fit(result, fit)
    if plot is not None:
        plot_phases(result, plot)
    if as_json:
        answer = result.as_json() | ({"plot": str(plot)} if plot else {})
        answer |= {"fit": found.as_json()} if found else {}
        print(json.dumps(answer, indent=2), file=console.file)
    else:
        render(result, console, advise=found is None)
        if found is not None:
            render_fit(found, command, console)
        if plot is not None:
            _print(console, f"Picture: {plot}")
    fits = result.fits is not False if found is None else found.best is not None
    return 0 if fits else DoesNotFit.exit_code
