"""Commands about what a model reads, and what it begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from albor.cli.shared import AsJson, ConfigPath, Overrides, app, data_app, open_console, tokenizer_app
from albor.errors import ConfigError


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
    console = open_console(stderr=as_json)
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
    with show_progress(open_console(stderr=True)) as progress:
        _, path = prepare_tokenizer(run, progress)
    print(path)


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
    with show_progress(open_console(stderr=True)) as progress:
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


@app.command("init-from", rich_help_panel="Data")
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
