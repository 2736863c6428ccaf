"""Commands that train several models, one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from albor.cli.shared import AsJson, app, open_console
from albor.errors import ConfigError, Problem


@app.command(rich_help_panel="Train several")
def ladder(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The ladder's YAML file.", show_default=False)],
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RUNG", help="Begin with this rung, whatever those below have shown."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print what every rung will take: tokens, memory, hours, disk."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --dry-run: on this card, which need not be here."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train small before large: runs that grow, and gates between them that each has to pass.

    \b
    albor ladder configs/ladder.yaml
    albor ladder configs/ladder.yaml --dry-run --gpu H100
    albor ladder configs/ladder-cpu.yaml
    albor ladder configs/ladder.yaml --from 125m

    A gate that fails ends the ladder and says what to look at. Ctrl-C, a crash or
    a power cut does no harm: the same command goes on where the ladder was. What
    has been trained is not trained again, and what has passed is not judged
    again. docs/ladder.md explains the gates; all of it lies in
    RUNS_DIR/NAME/ladder.md and ladder.json.

    Exit code 1: a gate failed. 2: the file is wrong, or a rung that has been
    trained was changed. 4: a rung does not fit this machine, and none was
    started. Others are those of the rung that ended the ladder.
    """
    from albor.ladder.command import run_dry, run_ladder

    console = open_console(stderr=as_json)
    if gpu is not None and not dry_run:
        problem = "asks about a card, and rungs train on the one that is here"
        raise ConfigError([Problem("--gpu", problem, "add --dry-run, or leave it out", "command line")])
    if dry_run:
        raise typer.Exit(run_dry(file, start, gpu, console, print_json=as_json))
    run_ladder(file, start, console, print_json=as_json)


@app.command(rich_help_panel="Train several")
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The sweep's YAML file.", show_default=False)],
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the trials, whether they fit and what they take; do nothing."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="With --dry-run: on this card, which need not be here."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the metric over each key: .png, .svg or .pdf"),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--for", metavar="CONFIG", help="Scale the winner for this run, each key by a rule that is named."
        ),
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="Take trials that failed (not: diverged) up again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train many small runs with some keys varied, and say which values were best.

    \b
    albor sweep configs/sweep-lr.yaml --dry-run
    albor sweep my-sweep.yaml --dry-run --gpu "RTX 4090"
    albor sweep configs/sweep-lr.yaml --plot sweep.png
    albor sweep configs/sweep-lr.yaml --for configs/pretrain-50m.yaml
    albor sweep configs/sweep-lr.yaml --json > result.json

    grid, random, tpe or halving, over any key of the run's file. Each trial is a
    run of its own in RUNS_DIR/NAME/. One that diverges or fails is shown as such,
    and the others go on. Ctrl-C (exit code 75), a crash or a power cut does no
    harm: the same command goes on, bit for bit. When all is done it prints the
    report again. docs/sweep.md. Needs pip install 'albor\\[sweep]'.

    Exit code 1: no trial came to a result. 2: the file is wrong, or is another
    one than the sweep began with. 4: with --dry-run, no trial fits.
    """
    from albor.sweep.command import run_dry, run_sweep
    from albor.train.signals import StopRequest

    console = open_console(stderr=as_json)
    if dry_run:
        for name, value in {"--plot": plot, "--for": other, "--retry": retry or None}.items():
            if value is not None:
                problem = "is for what was trained, and --dry-run trains nothing"
                raise ConfigError([Problem(name, problem, "leave one of them out", "command line")])
        raise typer.Exit(run_dry(file, console, json_wanted=as_json, gpu=gpu))
    if gpu is not None:
        problem = "asks about a card, and trials train on the one that is here"
        raise ConfigError([Problem("--gpu", problem, "add --dry-run, or leave it out", "command line")])
    with StopRequest() as stop:
        run_sweep(file, console, stop, json_wanted=as_json, plot=plot, other=other, retry=retry)
