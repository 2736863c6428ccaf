"""Commands that say what a run would take, and what this machine is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from albor.cli.shared import AsJson, ComputeDevice, Overrides, app, open_console
from albor.errors import ConfigError, Problem


@app.command("vram-estimate", rich_help_panel="Before a run")
def vram_estimate(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="CONFIG", help="The run's YAML file; not with --audit.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="Hold the plan against this card.")] = None,
    vram: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Hold it against this much memory: 24GiB")
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="Search the fastest configuration that fits, with as many tokens per step and the same "
            "mathematics, and print the lines to change.",
        ),
    ] = False,
    fit_state: Annotated[
        bool,
        typer.Option("--fit-state", help="The same, and try optimizer.state_dtype=bf16: other arithmetic."),
    ] = False,
    fit_sequence: Annotated[
        bool,
        typer.Option(
            "--fit-sequence", help="The same, and where nothing fits, with shorter sequences: other training."
        ),
    ] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Print a grid instead: what fits by sequence length and micro-batch, or by the one or two "
            "keys that are given several values, KEY=VALUE,VALUE,...",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw a picture too, of the phases or of the grid: .png, .svg or .pdf"
        ),
    ] = None,
    audit: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Show what the run in this directory was planned to take, and what it took."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a run will allocate, to the byte, and whether it fits. Needs no GPU, and touches none.

    \b
    albor vram-estimate configs/pretrain-350m.yaml --gpu "RTX 4090"
    albor vram-estimate configs/pretrain-350m.yaml --vram 8GiB model.vocab_size=4K
    albor vram-estimate configs/pretrain-350m.yaml --json
    albor vram-estimate --audit runs/pretrain-350m
    albor vram-estimate configs/pretrain-350m.yaml --gpu "RTX 3060 12GB" --fit
    albor vram-estimate configs/pretrain-50m.yaml --gpu L4 --sweep --plot grid.png

    Exit code 4: it does not fit, and the nearest changes that would are shown;
    with --fit nothing that was searched fits, with --sweep no cell does. Exit
    code 1: with --audit, the run took more than it should have. A picture never
    replaces one that albor did not draw.
    """
    from albor.configfile import load_config
    from albor.memory.fit import Options
    from albor.memory.report import run_estimate

    search = Options(fit_state, fit_sequence) if fit or fit_state or fit_sequence else None
    if audit is not None:
        others = {
            "CONFIG": config, "--gpu": gpu, "--vram": vram,
            "--fit": search, "--sweep": sweep or None, "--plot": plot,
        }  # fmt: skip
        for name in (name for name, value in others.items() if value is not None):
            problem = "is given with --audit, which reads all that it needs from the run"
            raise ConfigError([Problem(name, problem, "leave one of them out", "command line")])
        from albor.memory.audit import run_audit

        raise typer.Exit(run_audit(audit, as_json, open_console()))
    if config is None:
        raise typer.BadParameter("give a configuration, or --audit RUN", param_hint="CONFIG")
    from albor.memory.sweep_report import run_sweep

    if gpu is not None and vram is not None:
        raise ConfigError(
            [Problem("--gpu", "a card and a size are given", "give --gpu or --vram", "command line")]
        )
    if search is not None and sweep:
        raise ConfigError(
            [Problem("--fit", "a search and a grid are asked for", "give --fit or --sweep", "command line")]
        )
    capacity = None if vram is None else _read_capacity(vram)
    if sweep:
        raise typer.Exit(run_sweep(config, overrides or [], gpu, capacity, as_json, plot, open_console()))
    run = load_config(config, overrides or [])
    asked = [str(config), *(overrides or [])]
    raise typer.Exit(run_estimate(run, gpu, capacity, as_json, open_console(), plot, search, asked))


def _read_capacity(size: str) -> int:
    from albor.units import parse_capacity

    try:
        capacity = parse_capacity(size)
    except ValueError as error:
        raise ConfigError([Problem("--vram", str(error), where="command line")]) from error
    if not capacity:
        message = f"{size.strip()} is less than a byte"
        raise ConfigError([Problem("--vram", message, "write for example 24GiB", "command line")])
    if capacity < 2**20 and not size.strip()[-1].isalpha():
        message, remedy = f"{capacity:,} bytes hold no model", f"did you mean {size.strip()}GiB?"
        raise ConfigError([Problem("--vram", message, remedy, "command line")])
    return capacity


@app.command(rich_help_panel="Before a run")
def calibrate(
    device: Annotated[
        ComputeDevice, typer.Option(help="What to measure; auto: the card, or without one the CPU.")
    ] = ComputeDevice.AUTO,
    as_json: AsJson = False,
) -> None:
    """Measure what a run takes beside its arena on this machine: driver, libraries, kernels. Under a minute.

    \b
    albor calibrate
    albor calibrate --device cpu
    albor calibrate --json

    A small model is trained, evaluated and sampled from in a process of its own;
    close what else uses the card. The result is stored in $ALBOR_CALIBRATION, or
    in albor/calibration.json in the cache directory, and vram-estimate goes by it
    from then on, for this card with this driver and this version of torch.
    """
    from albor.calibrate.run import calibrate as measure
    from albor.calibrate.run import print_outcome

    console = open_console(stderr=as_json)
    outcome = measure(device.value, lambda stage: console.out(f"measured: {stage}", highlight=False))
    if as_json:
        print(json.dumps(outcome.as_json()))
    else:
        print_outcome(outcome, console)


@app.command(rich_help_panel="Before a run")
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine is, what is wrong with it, and what would make it faster. Changes nothing.

    \b
    albor doctor
    albor doctor --json > doctor.json

    Exit code 1: there is a problem. Paste the output into a bug report; it holds
    no secrets.
    """
    from albor.doctor.report import run_doctor

    raise typer.Exit(run_doctor(as_json, open_console()))


@app.command(rich_help_panel="Before a run")
def bench(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]", help="A YAML file whose model and batch are measured.", show_default=False
        ),
    ] = None,
    overrides: Overrides = None,
    models: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="50m, 125m, 350m, 1.3b; 350m-mb4 for a micro-batch of 4. [default: all]"
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="albor, albor-host, hf, hf-compile, hf-liger, torch-compile, torch-chunked, torch-graphs, "
            "torch-autotune, torch-autocast, litgpt, reference. [default: one of each kind]",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps that are measured.")] = 20,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them that are not.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each system; a second has warm caches.")] = 1,
    reference_steps: Annotated[
        int, typer.Option(min=1, help="Steps of the fp32 reference, which is slow; at most all.")
    ] = 20,
    profile: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Systems of which one more step is profiled, kernel by kernel."),
    ] = None,
    time_limit: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="End within this time; the same command then goes on."),
    ] = None,
    run_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1, help="End a single run that takes longer.")
    ] = 600,
    calibrate_only: Annotated[
        bool, typer.Option("--calibrate-only", help="Time GEMMs, attention and copies, and no system.")
    ] = False,
    modelled: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Print the floor of a card as it is modelled; measure nothing."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results are kept.")] = Path("runs/bench"),
    as_json: AsJson = False,
) -> None:
    """Measure training speed and memory beside other trainers, and how near they come to what the card can.

    \b
    albor bench configs/quickstart.yaml --peers albor,torch-compile
    albor bench --models 350m,350m-mb4 --profile albor --time-limit 540
    albor bench --models 350m --calibrate-only --json
    albor bench --modelled H100

    Each system runs in a process of its own. A peer that is not installed or
    fails is reported as such.
    """
    import shlex

    from albor.bench.command import (
        Request,
        find_card,
        find_cases,
        find_peers,
        model_cases,
        modelled_lines,
        run_bench,
    )

    cases = find_cases(config, overrides or [], models, warmup + steps)
    if modelled is not None:
        figures = model_cases(cases, find_card(modelled))
        print(json.dumps(figures) if as_json else "\n".join(modelled_lines(figures)))
        return
    console = open_console(stderr=as_json)
    request = Request(
        steps=steps,
        warmup=warmup,
        rounds=rounds,
        reference_steps=reference_steps,
        profiled=find_peers(profile, (), "--profile"),
        time_limit=time_limit,
        run_timeout=run_timeout,
        calibrate_only=calibrate_only,
        command=shlex.join(["albor", *sys.argv[1:]]),
    )
    report = run_bench(
        cases, find_peers(peers), out, request, lambda line: console.out(line, highlight=False)
    )
    if as_json:
        print(json.dumps(report))
    else:
        print((out / "report.md").read_text(encoding="utf-8"), end="")


@app.command(rich_help_panel="Before a run")
def schema(
    of_ladder: Annotated[bool, typer.Option("--ladder", help="Of a ladder's file instead.")] = False,
    of_sweep: Annotated[bool, typer.Option("--sweep", help="Of a sweep's file instead.")] = False,
) -> None:
    """Print the JSON schema of the configuration, for editors that complete and check YAML.

    \b
    albor schema > albor.schema.json
    albor schema --ladder > ladder.schema.json
    albor schema --sweep > sweep.schema.json

    The first line of a YAML file then is # yaml-language-server:
    $schema=albor.schema.json
    """
    if of_ladder:
        from albor.ladder.file import schema as build
    elif of_sweep:
        from albor.sweep.file import schema as build
    else:
        from albor.configfile import schema as build
    print(json.dumps(build(), indent=2))
