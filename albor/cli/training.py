"""Commands that train, and that look whether training would be right."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer

from albor.cli.shared import AsJson, ConfigPath, Overrides, app, open_console
from albor.errors import DoesNotFit


class Reference(StrEnum):
    """What `albor canary` compares with."""

    AUTO = "auto"
    TRANSFORMERS = "transformers"
    ORACLE = "oracle"


class StopSignal(StrEnum):
    """What `albor verify-resume` stops a run with."""

    KILL = "kill"
    TERM = "term"


@app.command(rich_help_panel="Train")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: go on from the run's newest checkpoint, or start; never: start, and refuse if there "
            "is one; PATH: go on from that checkpoint or run.",
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the resolved configuration and the memory plan; do nothing. "
            "Exits with 4 where it does not fit.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a model, from raw text or from the run's newest checkpoint.

    \b
    albor train configs/quickstart.yaml
    albor train configs/pretrain-350m.yaml train.micro_batch_size=8 name=my-350m
    albor train configs/quickstart.yaml --dry-run

    Ctrl-C (or SIGTERM) saves a checkpoint and exits with 75; the same command
    then goes on, bit for bit.
    """
    from albor.train.signals import StopRequest

    stop = StopRequest()  # train.max_hours counts from here
    from albor.configfile import dump_config, load_config
    from albor.memory.estimate import check_fits, plan_for_training
    from albor.memory.report import render
    from albor.train.display import TrainingConsole

    run = load_config(config, overrides or [])
    target = plan_for_training(run)
    console = TrainingConsole(stderr=as_json, soft_wrap=False)
    if dry_run:
        if as_json:
            print(json.dumps({"config": run.model_dump(mode="json"), "plan": target.as_json()}))
        else:
            console.out(dump_config(run), highlight=False)
            render(target, console)
        raise typer.Exit(DoesNotFit.exit_code if target.fits is False else 0)
    check_fits(target)  # before torch is imported, let alone a GPU touched
    for note in target.notes:
        console.out(note, highlight=False)

    given = config.read_text(encoding="utf-8")
    if overrides:
        given += "".join(f"\n# override: {override}" for override in overrides) + "\n"
    with stop:
        from albor.train.run import print_outcome, run_training  # torch, which takes seconds

        outcome = run_training(target, given, resume, console, stop, as_json=as_json)
    if as_json:
        print(json.dumps(outcome.as_json()))
    else:
        print_outcome(outcome, console)


@app.command(rich_help_panel="Train")
def canary(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to take and to compare.")] = 20,
    reference: Annotated[
        Reference,
        typer.Option(
            help="transformers: its LlamaForCausalLM; oracle: the plain model that comes with albor; auto: "
            "transformers where it is installed.",
        ),
    ] = Reference.AUTO,
    as_json: AsJson = False,
) -> None:
    """Take a run's first steps beside a plain fp32 reference, and say whether they agree.

    \b
    albor canary configs/quickstart.yaml
    albor canary configs/quickstart.yaml train.precision=fp32 --steps 5
    albor canary configs/pretrain-350m.yaml schedule.warmup_steps=0 --json

    For before days of training: same initial weights, data and settings on both
    sides; loss, gradient norm and every parameter's gradient side by side.
    Nothing is written but the prepared data.

    The learning rate is the run's own, tiny during a long warm-up; weights move
    further with schedule.warmup_steps=0. The reference takes the sequences one by
    one, which saves memory and costs time: train.gradient_accumulation_steps=1
    makes steps shorter.

    Exit code 1: they do not agree, and the worst parameters are named; or the
    configuration does not train.
    """
    from albor.canary.run import run_canary
    from albor.configfile import load_config
    from albor.memory.estimate import plan_for_training

    run = load_config(config, overrides or [])
    target = plan_for_training(run)
    console = open_console(stderr=as_json)
    for note in target.notes:
        console.out(note, highlight=False)
    outcome = run_canary(run, target, steps, reference.value, console)
    if as_json:
        print(json.dumps(outcome.as_json()))
    raise typer.Exit(0 if outcome.passed else 1)


@app.command("verify-resume", rich_help_panel="Train")
def verify_resume(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps to train, and to compare after.")] = 8,
    signal: Annotated[
        StopSignal, typer.Option(help="What stops the run: kill (SIGKILL) or term (SIGTERM, which saves).")
    ] = StopSignal.KILL,
    as_json: AsJson = False,
) -> None:
    """Stop and resume a run's first steps, and say whether that changes a single bit.

    \b
    albor verify-resume configs/quickstart.yaml
    albor verify-resume configs/pretrain-350m.yaml --steps 20 --signal term
    albor verify-resume configs/quickstart.yaml train.accumulator=gpu --json

    For before days of training, on the machine that will do it: one run is left
    alone, another is stopped in the middle of a step and started again; then
    weights, moments, state and logged losses are compared. Both are temporary,
    and nothing is written but the prepared data.

    Exit code 1: they differ, and the first tensor that does is named.
    """
    from albor.configfile import load_config
    from albor.memory.estimate import plan_for_training

    run = load_config(config, overrides or [])
    target = plan_for_training(run)
    console = open_console(stderr=as_json)
    for note in target.notes:
        console.out(note, highlight=False)

    from albor.train.verify_resume import print_verification
    from albor.train.verify_resume import verify_resume as verify

    found = verify(config, overrides or [], run, target, steps, signal.value, console)
    if as_json:
        print(json.dumps(found.as_json()))
    else:
        print_verification(found, console)
    raise typer.Exit(0 if found.identical else 1)
