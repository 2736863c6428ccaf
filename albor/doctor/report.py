"""All sections of the report; for people in 80 columns, or as one JSON object."""

from __future__ import annotations

import json
import os
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from albor.doctor import environment, gpu_checks, gpus, kernels, machine, software, storage, trial
from albor.doctor.checks import SEVERITY, Check, Section, Status

_WIDTH = 80
_STYLES: dict[Status, str] = {"ok": "", "note": "cyan", "warning": "yellow", "problem": "bold red"}


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    software: Section
    start: Section
    machine: Section
    driver: Section
    gpus: list[Section]
    kernels: Section
    environment: Section
    storage: Section

    @property
    def sections(self) -> list[Section]:
        """All of them, in the order of the report."""
        return [
            self.software,
            self.driver,
            *self.gpus,
            self.start,
            self.machine,
            self.kernels,
            self.environment,
            self.storage,
        ]

    @property
    def checks(self) -> list[tuple[Section, Check]]:
        """Every check with its section."""
        return [(section, check) for section in self.sections for check in section.checks]

    @property
    def status(self) -> Status:
        """The worst that was found."""
        return max((check.status for _, check in self.checks), key=SEVERITY.__getitem__, default="ok")

    @property
    def repairs(self) -> list[Check]:
        """What mends something and makes nothing faster, the worst first."""
        found = [check for _, check in self.checks if check.remedy and not check.gain]
        return sorted(found, key=lambda check: -SEVERITY[check.status])

    @property
    def faster(self) -> list[Check]:
        """What would make this machine faster, the most valuable first."""
        found = [check for _, check in self.checks if check.remedy and check.gain]
        return sorted(found, key=lambda check: (-check.gain, -SEVERITY[check.status]))

    def as_json(self) -> dict[str, Any]:
        """The facts of every section, all checks, and the remedies in order."""
        checks = [
            {"section": section.title, **asdict(check), "gain": check.gain.name.lower()}
            for section, check in self.checks
        ]
        return {
            "status": self.status,
            "software": self.software.facts,
            "start": self.start.facts,
            "driver": self.driver.facts,
            "gpus": [section.facts for section in self.gpus],
            "machine": self.machine.facts,
            "kernels": self.kernels.facts,
            "environment": self.environment.facts,
            "storage": self.storage.facts,
            "checks": checks,
            "repairs": [{"remedy": check.remedy, "command": check.command} for check in self.repairs],
            "faster": [
                {"remedy": check.remedy, "command": check.command, "gain": check.gain.name.lower()}
                for check in self.faster
            ],
        }


def diagnose(root: Path = Path("/"), folder: Path | None = None) -> Diagnosis:
    """Looks at this machine. `root` holds /proc, /sys and /etc; `folder` is where runs would go."""
    build, system, cores = software.torch_build(), machine.read_system(root), machine.read_cores(root)
    driver, cards = gpus.read_machine(root)
    has_gpu = bool(cards or driver.cards_on_bus)
    container = system.container is not None
    chosen = next((card for card in cards if card.chosen), None)
    about_driver = gpu_checks.examine_driver(driver, cards, build, container=container, wsl=system.wsl)
    about_cards = [gpu_checks.examine_gpu(card, build, several=len(cards) > 1) for card in cards]
    explained = any(
        check.status == "problem" for part in (about_driver, *about_cards) for check in part.checks
    )
    usable = build is not None and build.cuda is not None and bool(cards)
    return Diagnosis(
        software=software.examine(build, has_gpu, gpu_checks.wheels_for(driver, cards)),
        start=trial.examine(
            None if build is None else trial.attempt(software.installed("triton") is not None),
            gpu_expected=usable and not explained,
        ),
        machine=machine.examine(system, cores, has_gpu, root),
        driver=about_driver,
        gpus=about_cards,
        kernels=kernels.examine(has_gpu, None if chosen is None else chosen.compute_capability, root),
        environment=environment.examine(os.environ, cores.usable, has_gpu),
        storage=storage.examine(folder or _current_folder(), container, root),
    )


def _current_folder() -> Path | None:
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def render(diagnosis: Diagnosis, console: Console) -> None:
    """Prints the sections, then what to mend and what would make the machine faster."""
    for section in diagnosis.sections:
        column = max(len(check.name) for check in section.checks) + 2
        console.print(Text(section.title, style="bold"))
        for check in section.checks:
            _print_check(check, column, console)
        console.print()
    if diagnosis.repairs:
        _print_remedies("What to mend", diagnosis.repairs, console)
    if diagnosis.repairs and diagnosis.faster:
        console.print()
    if diagnosis.faster:
        _print_remedies("What would make this machine faster", diagnosis.faster, console)
    if not (diagnosis.repairs or diagnosis.faster):
        line = "Nothing to mend, and nothing that would make this machine faster."
        console.print(Text(line, style="bold green"))


def _print_check(check: Check, column: int, console: Console) -> None:
    for line_number, line in enumerate(check.value.splitlines() or [""]):
        first = f"  {check.name:<{column}}" if line_number == 0 else " " * (column + 2)
        _print(line, first, column + 2, "", console)
    if check.message:
        _print(
            f"{check.status}: {check.message}", " " * (column + 2), column + 2, _STYLES[check.status], console
        )


def _print_remedies(title: str, checks: list[Check], console: Console) -> None:
    console.print(Text(title, style="bold"))
    for number, check in enumerate(checks, 1):
        _print(check.remedy[0].upper() + check.remedy[1:], f"  {number}. ", 5, "", console)
        if check.command:
            _print(check.command, " " * 7, 7, "green", console, wrap=False)


def _print(text: str, first: str, indent: int, style: str, console: Console, *, wrap: bool = True) -> None:
    """`text` after `first`, in 80 columns on any terminal: a report is read where it is pasted."""
    lines = [first + text]
    if wrap:
        lines = textwrap.wrap(
            text, _WIDTH, initial_indent=first, subsequent_indent=" " * indent,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    for line in lines:
        # Not markup, and not wrapped again: names are the user's, and commands are copied.
        console.print(Text(line, style=style), soft_wrap=True)


def run_doctor(as_json: bool, console: Console) -> int:
    """The command: prints the report and returns the exit code, 1 where there is a problem."""
    diagnosis = diagnose()
    if as_json:
        print(json.dumps(diagnosis.as_json(), indent=2), file=console.file)
    else:
        render(diagnosis, console)
    return 1 if diagnosis.status == "problem" else 0
