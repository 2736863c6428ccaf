"""What commands share: the application and its groups, and arguments that several have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
app.add_typer(data_app, name="data", rich_help_panel="Data")
app.add_typer(tokenizer_app, name="tokenizer", rich_help_panel="Data")
app.add_typer(runs_app, name="runs", rich_help_panel="See what runs do")

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


class ComputeDevice(StrEnum):
    """Where `albor calibrate` and `albor eval` compute."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run directory, one of its checkpoints, or RUN/best (checkpoint.keep_best).",
        show_default=False,
    ),
]


def open_console(*, stderr: bool = False) -> Console:
    """Where a command writes: standard output, or standard error where that is for JSON."""
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=False)
