"""Files that name a run's file and replace keys of it: a ladder's rungs, a sweep's trials.

What is wrong with the run is reported where a person would mend it: in its own file, or at the line of the
naming file that has the override.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from albor.config import RunConfig
from albor.configfile import load_config, overlap
from albor.errors import ConfigError, Problem
from albor.yamlcore import COMMAND_LINE, Document, KeyPath, dotted


@dataclass(frozen=True)
class Override:
    """One KEY=VALUE, and the place in the naming file that it comes from."""

    text: str
    place: KeyPath

    @property
    def key(self) -> str:
        """The dotted key; whatever stands before the first = otherwise."""
        return self.text.partition("=")[0].strip()


def find_file(document: Document, file: Path, name: str, place: KeyPath) -> Path | None:
    """The file that `name`, at `place` of `file`, stands for. None where there is none, and `document` has
    the problem then.
    """
    path = file.parent / name
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*.yaml")], n=1)
    remedy = f"did you mean {near[0]}?" if near else "the path is relative to this file"
    document.refuse(place, f"{name}: there is no such file", remedy)
    return None


def load_overridden(document: Document, path: Path, overrides: Sequence[Override]) -> RunConfig | None:
    """The run in `path` with these keys replaced. None where it is none, and `document` has the problems."""
    try:
        return load_config(path, [override.text for override in overrides])
    except ConfigError as error:
        document.problems += [_placed(document, overrides, problem) for problem in error.problems]
        return None


def _placed(document: Document, overrides: Sequence[Override], problem: Problem) -> Problem:
    """A problem of the run; one with an override at the line of the naming file that has it."""
    if problem.where != COMMAND_LINE:
        return problem
    newest = list(reversed(overrides))
    # A problem between keys stands at the one that a person would change, which may be the file's own: then
    # its message names the override.
    own = [one for one in newest if problem.key and overlap(one.key, problem.key)]
    named = [one for one in newest if repr(one.text) in problem.message]
    named += [one for one in newest if "." in one.key and one.key in problem.message]
    if not (found := own + named):
        return problem
    place = found[0].place
    message = f"{problem.key} {problem.message}".strip()
    return Problem(dotted(place), message, problem.remedy, document.where(place))
