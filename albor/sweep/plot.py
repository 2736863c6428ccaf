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
    """A panel for each key; the rounds of a trial stand above each other, joined by a line, and trials that
    came to no metric are crosses at the upper edge.
    """
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(sweep.keys))
    rows = math.ceil(len(sweep.keys) / columns)
    size = (2.2 + 4.2 * columns, 0.8 + 3.6 * rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    figure.suptitle(f"{sweep.name}: {sweep.metric} by trial", x=0.01, ha="left", fontsize=11)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, key in zip(panels, sweep.keys, strict=False):
        _draw_panel(axes, sweep, key, trials)
    for axes in panels[len(sweep.keys) :]:
        axes.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, sweep: Sweep, key: str, trials: Sequence[Trial]) -> None:
    place = _placing(axes, sweep, key)
    rounds: dict[int, tuple[list[float], list[float]]] = {}
    for trial in trials:
        heights = [one.metric for one in trial.rounds if one.metric is not None]
        where = place(trial.values[key])
        axes.plot([where] * len(heights), heights, color="#BBBBBB", linewidth=0.8, zorder=1)
        for number, height in enumerate(heights, 1):
            places, metrics = rounds.setdefault(number, ([], []))
            places.append(where)
            metrics.append(height)
    for number, (places, metrics) in sorted(rounds.items()):
        colour = _COLOURS[(number - 1) % len(_COLOURS)]
        name = f"round {number}" if len(rounds) > 1 else "trial"
        axes.scatter(places, metrics, s=28, color=colour, label=name, gid=name, zorder=2)
    winner = winner_of(trials, sweep.goal)
    if winner is not None and winner.metric is not None:
        axes.scatter([place(winner.values[key])], [winner.metric], s=140, facecolors="none",
                     edgecolors="black", linewidths=1.4, label="best", gid="best", zorder=3)  # fmt: skip
    lost = [place(trial.values[key]) for trial in trials if trial.rounds and trial.metric is None]
    if lost:
        axes.scatter(lost, [0.97] * len(lost), marker="x", color="#D55E00", label="no result", gid="lost",
                     transform=axes.get_xaxis_transform(), zorder=2)  # fmt: skip
    axes.set_xlabel(key)
    if axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
        axes.set_ylabel(sweep.metric)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _placing(axes: Axes, sweep: Sweep, key: str) -> Any:
    """Where a value of `key` stands on the axis, which is set up for it: listed values side by side."""
    given = sweep.keys[key]
    if given.values is not None:
        values = list(given.values)
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        axes.set_xlim(-0.5, len(values) - 0.5)
        return values.index
    assert given.bounds is not None
    low, high = given.bounds
    if given.log is not None:
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        margin = (high / low) ** 0.05
        axes.set_xlim(low / margin, high * margin)
    else:
        margin = 0.05 * (high - low)
        axes.set_xlim(low - margin, high + margin)
    return float
