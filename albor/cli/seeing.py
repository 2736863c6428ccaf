"""Commands that show what runs do and did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from albor.cli.shared import AsJson, Overrides, app, open_console, runs_app


@app.command(rich_help_panel="See what runs do")
def monitor(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RUN]",
            help="A run directory, or a ladder's or sweep's, whose current rung or trial is followed. "
            "[default: the only run in progress under runs/]",
            show_default=False,
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print what there is to see now, as plain lines, and end.")
    ] = False,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="Look this often.")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch a run in progress from another terminal. Reads its directory, and never disturbs it.

    \b
    albor monitor
    albor monitor runs/quickstart
    albor monitor runs/quickstart --once
    albor monitor runs/quickstart --json > now.json

    Loss, learning rate, speed, memory against plan, gradient norms by block,
    events, samples, alerts, and the time that is left. ? shows the keys; q ends
    the monitor, not the run. A pipe gets what --once prints. Needs
    pip install 'albor\\[monitor]'; --json does not.
    """
    from albor.monitor.command import run_monitor

    raise typer.Exit(run_monitor(run, interval, once=once, as_json=as_json))


@runs_app.command("ls")
def runs_ls(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where runs lie, at most three directories deep.")
    ] = Path("runs"),
    sort: Annotated[
        str,
        typer.Option(
            metavar="BY",
            help="began, name, state, loss, bits, step, tokens, speed, when or size: the best, largest or "
            "newest first.",
        ),
    ] = "began",
    state: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATE",
            help="Only these, with commas or given several times: running, finished, stopped, diverged, "
            "failed, lost, new.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List runs: state, step, best validation, tokens, speed, size. Reads only; a run in progress goes on.

    \b
    albor runs ls
    albor runs ls --sort loss
    albor runs ls /data/runs --state stopped,lost --json

    The runs of a ladder or a sweep stand together. lost: the process is gone and
    has not said why. best val and bits/byte are those of the best evaluation.
    """
    from albor.runs.listing import run_listing

    states = [name for given in state or [] for name in given.split(",")]
    run_listing(directory, sort, states, as_json, open_console())


@runs_app.command("show")
def runs_show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show everything of one run on one page: state, results, checkpoints, events, memory, what to do next.

    \b
    albor runs show runs/my-run
    albor runs show runs/my-run --json

    A damaged line or file is named, and the rest is shown.
    """
    from albor.runs.details import run_show

    run_show(run, as_json, open_console())


@runs_app.command("compare")
def runs_compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN...", help="Directories of runs.", show_default=False)
    ],
    everything: Annotated[bool, typer.Option("--all", help="Show the keys that do not differ, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare runs: the keys that differ, the results side by side, the better one marked.

    \b
    albor runs compare runs/a runs/b
    albor runs compare runs/my-sweep/* --json
    albor runs compare runs/a runs/b --all

    Runs of different lengths are compared at the same number of tokens as well.
    Nothing is called better where tokens or validation text are not the same.
    """
    from albor.runs.compare import run_compare

    run_compare(runs, everything, as_json, open_console())


@app.command(rich_help_panel="See what runs do")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, at most 24.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Replace FILE even if albor report did not make it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one page about one or several runs: an HTML file that needs no network.

    \b
    albor report runs/my-run --out my-run.html
    albor report runs/a runs/b runs/c --out compared.html

    Losses and bits per byte over tokens or hours, gradient norms by block, speed,
    memory planned and measured, data, events, evaluations, samples, configuration
    and environment. What was not measured says so. Several runs are drawn over
    each other.

    It may be made while a run trains, and never writes into one. FILE is written
    whole or not at all; one that albor report made is replaced.
    """
    from albor.report.command import write_report

    written = write_report(runs, out, force=force)
    if as_json:
        print(json.dumps(written.as_json()))
        return
    for problem in written.problems:
        print(f"albor: {problem}", file=sys.stderr)
    print(f"{written.path}: {written.size / 1e6:.1f} MB; open it in a browser")


@app.command(rich_help_panel="See what runs do")
def track(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)],
    to: Annotated[
        list[str],
        typer.Option(
            metavar="TRACKER",
            help="tensorboard, trackio or wandb; several with commas, or given several times.",
        ),
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write a run that is over to TensorBoard, trackio or wandb, in place of what they have of it.

    \b
    albor track runs/my-run --to tensorboard
    albor track runs/my-run --to trackio,wandb track.project=my-models
    albor track runs/my-run --to wandb track.wandb_mode=online

    While it trains, track.to in its configuration does that. Needs
    pip install 'albor\\[track]'.

    Exit code 1: the run is being trained, or a tracker failed; 2: it is no run,
    or the tracker is not installed.
    """
    from albor.trackers.command import run_track

    console = open_console(stderr=as_json)
    code = run_track(
        run, to, overrides or [], lambda line: console.out(line, highlight=False), as_json=as_json
    )
    raise typer.Exit(code)


@app.command("inspect-spike", rich_help_panel="See what runs do")
def inspect_spike(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(metavar="N", help="Show this step, with the texts of its batch.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the steps that a run skipped, clipped or went back from, and what was in their batches.

    \b
    albor inspect-spike runs/my-run
    albor inspect-spike runs/my-run --step 1234
    albor inspect-spike runs/my-run --step 1234 --json > spike.json
    """
    from albor.spikes import inspect_spikes

    for line in inspect_spikes(run, step, as_json=as_json):
        print(line)
