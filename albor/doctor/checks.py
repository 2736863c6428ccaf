"""What a check of this machine says: a value, whether that is as it should be, and if not, what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

NOT_REPORTED = "not reported by the driver"

# note: harmless, and could be better; warning: some runs will be slow or fail; problem: every run will, or
# every run on the GPU.
Status = Literal["ok", "note", "warning", "problem"]
SEVERITY: dict[Status, int] = {"ok": 0, "note": 1, "warning": 2, "problem": 3}


class Gain(IntEnum):
    """What a remedy is worth in speed. An order of magnitude to sort by, not a measurement."""

    NONE = 0  # it mends something, and makes nothing faster
    SLIGHT = 1  # start-up, or some runs
    CLEAR = 2  # every step is held up
    LARGE = 3  # the run is on the wrong device, or held up at every operation


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    value: str  # may be several lines
    status: Status = "ok"
    message: str = ""  # what is wrong with the value
    remedy: str = ""  # what to do, and why; one sentence
    command: str = ""  # what to type for it
    gain: Gain = Gain.NONE

    def found(
        self, status: Status, message: str, remedy: str = "", command: str = "", gain: Gain = Gain.NONE
    ) -> Check:
        """This check with a finding."""
        return replace(self, status=status, message=message, remedy=remedy, command=command, gain=gain)


@dataclass(frozen=True)
class Section:
    """Facts that belong together, and what they were found to mean."""

    title: str
    facts: dict[str, Any]  # machine-readable: bytes, watts, MHz; None: not known
    checks: list[Check] = field(default_factory=list)


def read(path: Path) -> str:
    """A file's text, or nothing: what the kernel does not tell is no failure of ours."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def shown(value: Any, render: Callable[[Any], str] = str) -> str:
    """`value` for people, where the driver gave one."""
    return NOT_REPORTED if value is None else render(value)
