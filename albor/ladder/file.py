"""The ladder's YAML file: rungs, budgets and gates, each rung with the run that it comes to.

    configs/ladder.yaml:14: rungs[1].overrides[0]: optimizer.lr is the text 'fast'; a number is expected

As strict as a run's file, and by the same parts (`albor.configfile`): everything that is wrong is reported at
once, what a rung's own file says too. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from albor.config import Fraction, Positive, RunConfig, Section, Text
from albor.configfile import overlap, read_file, refused, validate_as
from albor.errors import ConfigError, Problem
from albor.overrides import Override, find_file, load_overridden
from albor.strictjson import to_json
from albor.units import Count, CountOrZero
from albor.yamlcore import Document, KeyPath, dotted

NotNegative = Annotated[float, Field(ge=0)]
_HORIZON = ("train.max_steps", "train.max_tokens")
_TAKEN = ("ladder.json", "ladder.md")  # beside the rungs' directories
_OURS = ("name", "runs_dir")  # of a rung's run: the ladder's to set


class FitsGate(Section):
    """The plan of every rung fits this machine, before the first one trains."""

    free: Fraction = Field(0.0, description="Share of the memory that must stay free besides.")


class CanaryGate(Section):
    """`albor canary` agrees with a plain reference."""

    steps: Count = Field(10, description="Steps that are compared.")
    reference: Literal["auto", "transformers", "oracle"] = Field(
        "auto", description="What it is compared with; auto: transformers where it is installed."
    )
    micro_batches: Count = Field(
        2, description="Micro-batches per step at most; more take longer and show nothing else."
    )


class VerifyResumeGate(Section):
    """`albor verify-resume` finds a resumed run equal in every bit."""

    steps: Annotated[Count, Field(ge=2)] = Field(8, description="Steps that are trained and compared.")
    signal: Literal["kill", "term"] = Field("kill", description="What stops the run.")


class UnigramGate(Section):
    """The loss is below the unigram entropy of the data by some step."""

    by_step: Count | None = Field(
        None,
        description="The step; null: twice the warm-up or a tenth of the run, whichever is later, and 200 "
        "at least.",
    )
    margin: NotNegative = Field(0.0, description="How far below, in nats per token.")


class BigramGate(Section):
    """The validation loss ends below what a bigram model of the data reaches."""

    margin: NotNegative = Field(0.0, description="How far below, in nats per token.")


class GradientsGate(Section):
    """Every part of the model receives a gradient, and none grows without bound."""

    growth: Annotated[float, Field(gt=1)] = Field(
        10.0, description="Times that a part's norm may grow over the second half of the run, by its trend."
    )


class SkippedStepsGate(Section):
    """Few steps were skipped because their loss or gradient was not finite, zero or a spike."""

    at_most: CountOrZero | None = Field(
        None, description="Skipped steps; null: one, and one more for every 1,000 steps of the run."
    )


class ValidationGate(Section):
    """Validation follows training: no memorisation."""

    gap: Positive = Field(
        0.5, description="Nats per token that the last validation may be above the training loss."
    )
    rise: Positive = Field(0.05, description="Nats per token that it may be above its own minimum.")


class ScheduleEndGate(Section):
    """The learning rate came to the end of its schedule."""

    tolerance: Positive = Field(1e-6, description="Relative difference from the schedule's last value.")


class ExportGate(Section):
    """An exported Hugging Face checkpoint answers as the run does."""


class SpeedGate(Section):
    """The run is about as fast as it should be."""

    fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="Least share of the modelled tokens/s; where the machine is not modelled, as a CPU is "
        "not, of the run's own first quarter.",
    )


class _OrFalse:
    """The section that is annotated, or false, which leaves it out; true is the section with its defaults."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any, inner: core_schema.ValidatorFunctionWrapHandler) -> Any:
            if value is None:
                raise ValueError("is empty (null); write false to leave the gate out, or true")
            if isinstance(value, bool):
                return inner({}) if value else None
            return inner(value)

        return core_schema.no_info_wrap_validator_function(validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        section = handler(schema)
        inner = [one for one in section.get("anyOf", [section]) if one.get("type") != "null"]
        return {"anyOf": [{"type": "boolean"}, *inner]}


def _gate(section: type[Section]) -> Any:
    return Field(default_factory=section, description=f"{section.__doc__} false: left out.")


_OR_FALSE = _OrFalse()


class Gates(Section):
    """What a rung must show, gate by gate; `false` leaves one out, and the report says so."""

    fits: Annotated[FitsGate | None, _OR_FALSE] = _gate(FitsGate)
    canary: Annotated[CanaryGate | None, _OR_FALSE] = _gate(CanaryGate)
    verify_resume: Annotated[VerifyResumeGate | None, _OR_FALSE] = _gate(VerifyResumeGate)
    unigram: Annotated[UnigramGate | None, _OR_FALSE] = _gate(UnigramGate)
    bigram: Annotated[BigramGate | None, _OR_FALSE] = _gate(BigramGate)
    gradients: Annotated[GradientsGate | None, _OR_FALSE] = _gate(GradientsGate)
    skipped_steps: Annotated[SkippedStepsGate | None, _OR_FALSE] = _gate(SkippedStepsGate)
    validation: Annotated[ValidationGate | None, _OR_FALSE] = _gate(ValidationGate)
    schedule_end: Annotated[ScheduleEndGate | None, _OR_FALSE] = _gate(ScheduleEndGate)
    export: Annotated[ExportGate | None, _OR_FALSE] = _gate(ExportGate)
    speed: Annotated[SpeedGate | None, _OR_FALSE] = _gate(SpeedGate)

    def with_changes(self, own: Gates) -> Gates:
        """These, with what a rung's `own` say instead, threshold by threshold."""
        merged: dict[str, Section | None] = {}
        for name in Gates.model_fields:
            mine, given = getattr(self, name), getattr(own, name)
            if name not in own.model_fields_set:
                merged[name] = mine
            elif given is None or mine is None:
                merged[name] = given
            else:
                changed = {key: getattr(given, key) for key in given.model_fields_set}
                merged[name] = mine.model_copy(update=changed)
        return self.model_copy(update=merged)


GATES = tuple(Gates.model_fields)  # in the order in which they are judged


class Rung(Section):
    """One run of the ladder."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="The run's name, and its directory below the ladder's."
    )
    config: Text = Field(description="The run's YAML file, relative to this one.")
    overrides: tuple[Text, ...] = Field(
        (), strict=False, description="KEY=VALUE that replace keys of that file, behind the ladder's own."
    )
    tokens: Count | None = Field(
        None, description="Tokens of the run, instead of train.max_steps and train.max_tokens."
    )
    hours: Positive | None = Field(
        None,
        description="Hours of training steps instead: a few steps are timed, and say how many tokens that "
        "is. Without either the file's own length holds.",
    )
    gates: Gates = Field(default_factory=Gates, description="What differs from the ladder's gates.")


class Ladder(Section):
    """Runs that grow, and what each must show before the next one begins."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)] = Field(
        description="The ladder's name, and its directory below runs_dir."
    )
    runs_dir: Text = Field("runs", description="Directory of all runs, relative to the current directory.")
    overrides: tuple[Text, ...] = Field(
        (), strict=False, description="KEY=VALUE that replace keys of every rung's file."
    )
    rungs: tuple[Rung, ...] = Field(min_length=1, strict=False, description="The runs, smallest first.")
    gates: Gates = Field(default_factory=Gates, description="What every rung must show.")

    @property
    def directory(self) -> Path:
        """Where its runs lie, and what it writes about them."""
        return Path(self.runs_dir) / self.name


@dataclass(frozen=True)
class Planned:
    """A rung, and the run that it comes to."""

    rung: Rung
    path: Path  # of the run's own file
    overrides: tuple[Override, ...]
    config: RunConfig
    gates: Gates

    @property
    def name(self) -> str:
        """The rung's."""
        return self.rung.name

    @property
    def directory(self) -> Path:
        """The run's."""
        return Path(self.config.runs_dir) / self.name

    @property
    def arguments(self) -> list[str]:
        """What `albor train` is called with."""
        return [str(self.path), *(override.text for override in self.overrides)]

    @property
    def sha256(self) -> str:
        """Names the resolved configuration: results for another one are not this one's."""
        return hashlib.sha256(to_json(self.config.model_dump(mode="json"))).hexdigest()[:16]


@dataclass(frozen=True)
class LadderFile:
    """A ladder that holds together, with its rungs planned as its file says."""

    path: Path
    ladder: Ladder
    rungs: tuple[Planned, ...]
    document: Document  # for places

    def index_of(self, start: str | None) -> int:
        """The place of the rung that `--from` names; of the first where it names none. Raises ConfigError
        where there is no such rung.
        """
        names = [planned.name for planned in self.rungs]
        if start is not None and start not in names:
            message = f"{start} is no rung of {self.path}"
            raise ConfigError([Problem("--from", message, f"use {', '.join(names)}", "command line")])
        return 0 if start is None else names.index(start)

    def refuse(self, planned: Planned, key: str, message: str, remedy: str = "") -> Problem:
        """A problem with a key of a rung's run, at the line of this file that sets it, if one does."""
        place = next((o.place for o in reversed(planned.overrides) if overlap(o.key, key)), None)
        if place is None:
            index = next(i for i, one in enumerate(self.rungs) if one.name == planned.name)
            place = ("rungs", index, "config")
        text = message if place[-1] in ("tokens", "hours") else f"{key} {message}"
        return Problem(dotted(place), text, remedy, self.document.where(place))

    def refuse_rung(self, planned: Planned, message: str, remedy: str) -> Problem:
        """A problem with a rung as a whole, at its line."""
        index = next(i for i, one in enumerate(self.rungs) if one.name == planned.name)
        place: KeyPath = ("rungs", index)
        return Problem(dotted(place), f"{planned.name} {message}", remedy, self.document.where(place))

    def with_tokens(self, planned: Planned, tokens: int) -> Planned:
        """A rung whose `hours` have become `tokens`. Raises ConfigError where its run then does not hold
        together.
        """
        index = next(i for i, one in enumerate(self.rungs) if one.name == planned.name)
        budget = _budget(tokens, ("rungs", index, "hours"))
        document = Document(str(self.path), places=self.document.places)
        found = _plan(document, self.path, self.ladder, index, planned.rung, planned.gates, budget)
        if found is None:
            raise refused(document)
        return found


def load_ladder(path: Path) -> LadderFile:
    """The ladder that the file at `path` describes. Raises ConfigError with everything that is wrong."""
    document = read_file(path, "give at least name and rungs")
    ladder = validate_as(document, Ladder)
    rungs: list[tuple[int, Rung]]
    if ladder is not None:
        shell, rungs = ladder, list(enumerate(ladder.rungs))
    else:  # what is right is looked into all the same
        shell, rungs = _salvaged(document.value)
    _check_names(document, rungs)
    planned = []
    for index, rung in rungs:
        gates = shell.gates.with_changes(rung.gates)
        if rung.tokens is not None and rung.hours is not None:
            document.refuse(("rungs", index, "hours"), "tokens are given too", "give one of them")
        tokens = None if rung.hours is not None else rung.tokens
        budget = () if tokens is None else _budget(tokens, ("rungs", index, "tokens"))
        planned.append(_plan(document, path, shell, index, rung, gates, budget))
    if document.problems:
        # What holds for every rung is said once.
        document.problems = list(dict.fromkeys(document.problems))
        raise refused(document)
    assert ladder is not None
    return LadderFile(path, ladder, tuple(one for one in planned if one is not None), document)


def schema() -> dict[str, Any]:
    """The JSON schema of the file, by which editors complete keys and show what they mean."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Ladder.model_json_schema()}


def _salvaged(value: dict[str, Any]) -> tuple[Ladder, list[tuple[int, Rung]]]:
    """The rungs that are right by themselves, and a ladder for them to stand on."""
    rungs = []
    items = value.get("rungs")
    for index, item in enumerate(items if isinstance(items, list) else []):
        try:
            rungs.append((index, Rung.model_validate(item)))
        except ValidationError:
            continue
    given = value.get("overrides")
    overrides = tuple(one for one in given if isinstance(one, str)) if isinstance(given, list) else ()
    shell = Ladder.model_construct(
        name="ladder", runs_dir="runs", overrides=overrides, rungs=(), gates=Gates()
    )
    return shell, rungs


def _check_names(document: Document, rungs: Sequence[tuple[int, Rung]]) -> None:
    seen: dict[str, int] = {}
    for index, rung in rungs:
        if rung.name in seen:
            first = document.where(("rungs", seen[rung.name], "name")).rpartition(":")[2]
            message = f"{rung.name} is the name of another rung, on line {first}"
            document.refuse(("rungs", index, "name"), message, "each rung has its own directory; rename one")
        seen.setdefault(rung.name, index)
        if rung.name in _TAKEN:
            document.refuse(
                ("rungs", index, "name"), f"{rung.name} is a file of the ladder's own", "rename it"
            )


def _budget(tokens: int, place: KeyPath) -> tuple[Override, ...]:
    return (Override("train.max_steps=null", place), Override(f"train.max_tokens={tokens}", place))


def _plan(
    document: Document,
    file: Path,
    ladder: Ladder,
    index: int,
    rung: Rung,
    gates: Gates,
    budget: tuple[Override, ...],
) -> Planned | None:
    """The rung's run; None where it is none, and the document then has the problems."""
    place: KeyPath = ("rungs", index)
    given = [Override(text, ("overrides", i)) for i, text in enumerate(ladder.overrides)]
    given += [Override(text, (*place, "overrides", i)) for i, text in enumerate(rung.overrides)]
    for override in given:
        if override.key in _OURS:
            document.refuse(override.place, f"{override.key} is the ladder's to set", "remove it")
        if (rung.tokens or rung.hours) and override.key in _HORIZON:
            key = "tokens" if rung.tokens else "hours"
            document.refuse(override.place, f"{override.key} is set, and so is {key}", "give one of them")
            budget = ()
    path = find_file(document, file, rung.config, (*place, "config"))
    if path is None:
        return None
    ours = (
        Override(f"name={json.dumps(rung.name)}", (*place, "name")),
        Override(f"runs_dir={json.dumps(str(ladder.directory))}", ("runs_dir",)),
    )
    overrides = (*given, *budget, *ours)
    config = load_overridden(document, path, overrides)
    if config is None:
        return None
    return Planned(rung, path, overrides, config, gates)
