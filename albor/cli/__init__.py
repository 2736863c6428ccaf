"""The command line. Every command imports what it needs inside, so that `albor vram-estimate` answers at
once.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, TextIO

import typer

# isort: off
from albor.cli import training, planning, data, several, seeing, models  # noqa: F401  (as --help lists them)

# isort: on
from albor.cli.shared import app
from albor.errors import AlborError


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


def _show_warnings_of_albor() -> None:
    """Warnings that albor gives are lines for its user; a library's look as Python has them."""
    package, others = Path(__file__).parents[1], warnings.showwarning

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
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # our output's, say
            place = f"{error.filename}: " if error.filename else ""
            print(f"albor: {place}{error.strerror}; free some, and give the command again", file=sys.stderr)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it
            sys.exit(1)
        traceback.print_exc()
        print("albor: this is a bug in albor; please report it with the lines above", file=sys.stderr)
        sys.exit(1)
