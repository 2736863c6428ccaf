"""A picture of a sweep: the metric over each key that varied, a panel each.

matplotlib is imported when a picture is drawn and not before; it needs no display.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albor.memory.plot import save_picture
from albor.sweep.file import Sweep
from albor.sweep.record import Trial
from albor.sweep.report import winner_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, which the colour-blind tell apart; by the round that a trial came to.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_COLUMNS = 3


def plot_sweep(sweep: Sweep, trials: Sequence[Trial], path: Path) -> None:
    """Draws `trials` to the file at `path`. Raises AlborError where it cannot be written."""
    save_picture(lambda: draw_sweep(sweep, trials), path, "albor sweep")


def draw_sweep(sweep: Sweep, trials: Sequence[Trial]) -> Figure:
    """A panel for each key; trials that came to no metric are crosses at the upper edge."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(sweep.keys))
    rows = math.ceil(len(sweep.keys) / columns)
    size = (1.2 + 4.2 * columns, 0.8 + 3.6 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(f"{sweep.name}: {sweep.metric} by trial", x=0.01, ha="left", fontsize=11)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, key in zip(panels, sweep.keys, strict=False):
        _draw_panel(axes, sweep, key, trials)
    for axes in list(panels)[len(sweep.keys) :]:
        axes.set_visible(False)
    return figure


def _draw_panel(axes: Axes, sweep: Sweep, key: str, trials: Sequence[Trial]) -> None:
    place = _placing(axes, sweep, key)
    known = [trial for trial in trials if trial.metric is not None]
    rounds = sorted({_rounds(trial) for trial in known})
    for number in rounds:
        members = [trial for trial in known if _rounds(trial) == number]
        places = [place(trial.values[key]) for trial in members]
        heights = [trial.metric for trial in members if trial.metric is not None]
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        axes.scatter(places, heights, s=28, color=colour, label=f"round {number}", zorder=2)
    winner = winner_of(trials, sweep.goal)
    if winner is not None and winner.metric is not None:
        axes.scatter([place(winner.values[key])], [winner.metric], s=140, facecolors="none",
                     edgecolors="black", linewidths=1.4, label="best", gid="best", zorder=3)  # fmt: skip
    lost = [place(trial.values[key]) for trial in trials if trial.rounds and trial.metric is None]
    if lost:
        axes.scatter(lost, [0.97] * len(lost), marker="x", color="#D55E00", label="no result", gid="lost",
                     transform=axes.get_xaxis_transform(), zorder=2)  # fmt: skip
    axes.set_xlabel(key)
    axes.set_ylabel(sweep.metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(rounds) > 1 or lost:
        axes.legend(frameon=False, fontsize=8)


def _rounds(trial: Trial) -> int:
    """Rounds that the trial finished."""
    return sum(one.metric is not None for one in trial.rounds)


def _placing(axes: Axes, sweep: Sweep, key: str) -> Any:
    """Where a value of `key` stands on the axis, which is set up for it."""
    given = sweep.keys[key]
    if given.values is None or all(type(value) in (int, float) for value in given.values):
        if given.log is not None:
            axes.set_xscale("log")
        return float
    values = list(given.values)
    axes.set_xticks(range(len(values)), [str(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    return values.index
