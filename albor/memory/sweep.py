"""A grid of estimates: one configuration with two of its keys varied, and whether each cell fits.

A cell is what `albor train` would make of the file with the cell's overrides, with all its refusals: a
sequence longer than the model's positions is no cell that fits, and none that does not, but one that is
refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from albor.config import RunConfig
from albor.configfile import load_config
from albor.errors import ConfigError, Problem
from albor.memory.estimate import Estimate, estimate

SEQUENCE, MICRO_BATCH = "data.sequence_length", "train.micro_batch_size"
MOST_CELLS = 400  # each takes about 10 ms
# A list, a mapping and a quoted text are one value, whatever commas they hold.
_SEVERAL = re.compile(r"(?P<key>[\w.]+)\s*=\s*(?P<values>[^\[{'\",][^,]*(,[^,]+)+)")
_HALVINGS, _LENGTHS, _BATCHES, _SHORTEST = 2, 5, 6, 128  # of the default axes


@dataclass(frozen=True)
class Axis:
    """A key of the configuration, and the values that it takes, as the command line writes them."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One configuration of the grid: its estimate, or why it is refused."""

    overrides: tuple[str, ...]  # one for each axis
    estimate: Estimate | None
    problems: tuple[Problem, ...] = ()

    @property
    def problem(self) -> str:
        """Why it is refused; empty where it is not."""
        return "; ".join(f"{problem.key}: {problem.message}" for problem in self.problems)

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints of the cell."""
        known = self.estimate
        return {
            "overrides": " ".join(self.overrides),
            "problem": self.problem or None,
            "tokens_per_step": known.config.tokens_per_step if known else None,
            "device_bytes": known.device_bytes if known else None,
            "required_bytes": known.required_bytes if known else None,
            "fits": known.fits if known else None,
            "peak_phase": known.plan.peak_phase if known else None,
            "groups": known.plan.groups if known else None,
        }


@dataclass(frozen=True)
class Sweep:
    """The configuration as it is given, and the cells around it, row by row."""

    base: Estimate
    axes: tuple[Axis, ...]  # the rows', and the columns' if there is a second
    cells: tuple[Cell, ...]

    @property
    def columns(self) -> Axis | None:
        """The second axis."""
        return self.axes[1] if len(self.axes) > 1 else None

    @property
    def rows(self) -> list[tuple[Cell, ...]]:
        """The cells, one row for each value of the first axis."""
        width = len(self.cells) // len(self.axes[0].values)
        return [self.cells[start : start + width] for start in range(0, len(self.cells), width)]

    @property
    def estimates(self) -> list[Estimate]:
        """Of the cells that are not refused."""
        return [cell.estimate for cell in self.cells if cell.estimate is not None]

    @property
    def fits(self) -> bool | None:
        """Whether any cell does; None where that is not known."""
        answers = {estimate.fits for estimate in self.estimates}
        return True if True in answers else None if None in answers else False

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints as `sweep`."""
        axes = [{"key": axis.key, "values": list(axis.values)} for axis in self.axes]
        return {"axes": axes, "cells": [cell.as_json() for cell in self.cells]}


def split_axes(overrides: Sequence[str]) -> tuple[list[str], tuple[Axis, ...]]:
    """The overrides with one value, and those with several, `train.micro_batch_size=1,2,4`, as axes.

    Raises ConfigError for more axes than a table has, and for a key with two of them.
    """
    single, axes = [], []
    for override in overrides:
        several = _SEVERAL.fullmatch(override)
        if several is None:
            single.append(override)
        else:
            values = dict.fromkeys(value.strip() for value in several["values"].split(","))
            axes.append(Axis(several["key"], tuple(values)))
    if len(axes) > 2 or len({axis.key for axis in axes}) < len(axes):
        message = f"{' and '.join(axis.key for axis in axes)} are given several values"
        remedy = "give several values to one key, or to two different ones"
        raise ConfigError([Problem("--sweep", message, remedy, "command line")])
    return single, tuple(axes)


def sweep(path: Path, overrides: Sequence[str], gpu: str | None, vram: int | None) -> Sweep:
    """The grid that `overrides` ask for, over the file at `path`; see `albor.memory.estimate.estimate`.

    Without an override of several values, sequence lengths and micro-batches around the file's. Raises
    ConfigError where the file itself is refused, or every cell.
    """
    single, axes = split_axes(overrides)
    base = estimate(load_config(path, single), gpu, vram)
    axes = axes or default_axes(base.config)
    count = 1
    for axis in axes:
        count *= len(axis.values)
        if axis.key == "device":
            message, remedy = "is one for the whole sweep", "ask once for each device"
            raise ConfigError([Problem("device", message, remedy, "command line")])
    if count > MOST_CELLS:
        message, remedy = f"{count:,} cells are too many to look at", f"ask for {MOST_CELLS} at most"
        raise ConfigError([Problem("--sweep", message, remedy, "command line")])

    combinations = itertools.product(*([f"{axis.key}={value}" for value in axis.values] for axis in axes))
    cells = tuple(_cell(path, single, combination, base) for combination in combinations)
    if all(cell.estimate is None for cell in cells):
        raise ConfigError(cells[0].problems)
    return Sweep(base, axes, cells)


def _cell(path: Path, overrides: Sequence[str], values: tuple[str, ...], base: Estimate) -> Cell:
    try:
        config = load_config(path, [*overrides, *values])
        same = config == base.config
        return Cell(values, base if same else Estimate.of(config, base.hardware))
    except ConfigError as error:
        return Cell(values, None, tuple(error.problems))


def default_axes(config: RunConfig) -> tuple[Axis, Axis]:
    """Sequence lengths that the model has positions for, and micro-batches, by powers of two around those of
    `config`.
    """
    length, batch = config.data.sequence_length, config.train.micro_batch_size
    longest = config.model.max_position_embeddings
    lengths = [n for n in _powers_around(length, _LENGTHS) if min(length, _SHORTEST) <= n <= longest]
    axes = ((SEQUENCE, lengths), (MICRO_BATCH, _powers_around(batch, _BATCHES)))
    rows, columns = (Axis(key, tuple(map(str, values))) for key, values in axes)
    return rows, columns


def _powers_around(value: int, count: int) -> list[int]:
    """`value` halved twice, as far as it is even, and then doubled, `count` numbers in all."""
    for _ in range(_HALVINGS):
        value = value // 2 if value % 2 == 0 else value
    return [value * 2**power for power in range(count)]
