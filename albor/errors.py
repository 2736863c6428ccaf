"""Every failure that albor explains to its user, each with its documented exit code.

An `AlborError` reaches the terminal as a message, never as a traceback. Anything else that escapes is a
bug in albor and is shown as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class AlborError(Exception):
    """A failure that the user can act on. The message says what is wrong and what would help."""

    exit_code = 1


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration, and what would be right.

    `where` is `file:line` (or `command line`, for an override), empty when it is not known.
    `key` is the dotted path (`model.hidden_size`), empty when the problem is the file itself.
    `related` are the other keys that a problem between keys depends on.
    """

    key: str
    message: str
    remedy: str = ""
    where: str = ""
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = ": ".join(part for part in (self.where, self.key) if part)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text}; {self.remedy}" if self.remedy else text


class ConfigError(AlborError):
    """The configuration or the command line is wrong; carries every problem that was found."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class DataError(AlborError):
    """A source, a tokenizer or a token shard cannot be used."""


class CheckpointError(AlborError):
    """A checkpoint is missing, damaged, or belongs to something else."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not, to the byte, what was saved; an older one may be."""


class DiskFault(CheckpointError):
    """A checkpoint could not be written, or not be read back. The earlier ones are as they were."""


class Diverged(AlborError):
    """Loss or gradients stayed non-finite, and going back did not help; no such weights were saved."""

    exit_code = 3


class Alert(AlborError):
    """A rule of the configuration's `alerts` ended the run; its state is saved."""


class DoesNotFit(AlborError):
    """The memory plan is larger than the device or the host."""

    exit_code = 4


class Interrupted(AlborError):
    """A signal or the time limit stopped the run, and no training is lost: the same command goes on."""

    exit_code = 75
