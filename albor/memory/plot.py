"""A picture of an estimate: stacked groups against the card's line, by phase or by the cells of a sweep.

Bars are as high as bytes, and colours are those of Okabe and Ito, which the colour-blind tell apart.
matplotlib is imported when a picture is drawn and not before; it needs no display.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from albor.durable import replace_file
from albor.errors import AlborError, ConfigError, Problem
from albor.memory.estimate import Estimate
from albor.memory.sweep import Sweep
from albor.units import GIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTSIDE, SUMMED = "outside the arena", "gradients summed"
COLOURS = {  # from the bottom of a bar to its top
    OUTSIDE: "#999999",
    "weights": "#0072B2",
    "master": "#56B4E9",
    "moments": "#009E73",
    "gradients": "#F0E442",
    "activations": "#E69F00",
    "scratch": "#D55E00",
    "logits": "#CC79A7",
    "io": "#000000",
    "gaps": "#E8E8E8",
    SUMMED: "#6A4C93",  # on a CPU
}
FORMATS = ("png", "svg", "pdf")
_MARK = "albor vram-estimate"  # in the file's metadata: what says that a picture is albor's own
_MARKS = (_MARK, "albor sweep")
_SEARCHED = 65536  # bytes at both ends of a file in which the mark stands
# Where bars are far higher than the line, or the line than the bars, only the lower is shown whole.
_HIGHEST_BAR, _HIGHEST_LINE = 1.6, 4.0
_MOST_TICKS = 9
_LINE_NAMES = 66  # points, the width of "139.40 GiB"
_MOST_UPRIGHT = 12  # bars whose names and numbers stand side by side without being turned
_LAYER_UNITS = 10.0  # the width of all layers' forward, and of their backward; another phase is 1 wide
_MOST_LAYERS = 100  # bars for the layers of one pass


def check_target(path: Path) -> None:
    """Raises, before anything is computed, where no picture can be drawn to `path`.

    That is ConfigError for a suffix other than .png, .svg and .pdf, for a directory that is not there, and
    for a file that is there, unless albor drew it; AlborError where matplotlib is not installed.
    """
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise _refused(f"{path} is no picture's name", "end it in .png, .svg or .pdf")
    try:
        if not path.parent.is_dir():
            raise _refused(f"there is no directory {path.parent}", f"run: mkdir -p {path.parent}")
        if os.path.lexists(path) and not _is_ours(path):
            raise _refused(f"{path} exists, and albor did not draw it", "give another name")
    except OSError as error:
        raise _refused(f"{path}: {error.strerror or error}", "give another name") from error
    if importlib.util.find_spec("matplotlib") is None:
        raise AlborError("--plot needs matplotlib, which is not installed; run: pip install 'albor[plot]'")


def _refused(message: str, remedy: str) -> ConfigError:
    return ConfigError([Problem("--plot", message, remedy, "command line")])


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_SEARCHED)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _SEARCHED))
        content = start + file.read()
        return any(mark.encode() in content for mark in _MARKS)


def plot_sweep(sweep: Sweep, path: Path) -> None:
    """Draws the bars of `sweep` to the file at `path`. Raises AlborError where it cannot be written."""
    save_picture(lambda: draw_sweep(sweep), path)


def plot_phases(estimate: Estimate, path: Path) -> None:
    """Draws what `estimate` holds, phase by phase, to the file at `path`; raises like `plot_sweep`."""
    save_picture(lambda: draw_phases(estimate), path)


def parts_of(estimate: Estimate) -> dict[str, int]:
    """What the run needs of its device, in bytes by part; together that is `required_bytes`."""
    parts = {OUTSIDE: sum(estimate.outside.values()), **estimate.plan.groups}
    if estimate.device == "cpu":
        parts[SUMMED] = estimate.required_bytes - sum(parts.values())
    return parts


def parts_in(estimate: Estimate, phase: str) -> dict[str, int]:
    """Like `parts_of`, but of the arena only the buffers that hold data in `phase`."""
    whole = parts_of(estimate)
    parts = {name: size for name, size in whole.items() if name in (OUTSIDE, SUMMED)}
    for buffer in estimate.plan.live_in(phase):
        parts[buffer.group] = parts.get(buffer.group, 0) + buffer.reserved
    return parts


def draw_sweep(sweep: Sweep) -> Figure:
    """A bar for every cell; the cells of a row stand together."""
    width = len(sweep.columns.values) if sweep.columns else 1
    # Rows of one cell need no space between them.
    places = [i + (i // width if width > 1 else 0) for i in range(len(sweep.cells))]
    axes, figure = _new_picture(sweep.base, max(8.0, 2.5 + 0.34 * len(places)))
    drawn = [(x, cell.estimate) for x, cell in zip(places, sweep.cells, strict=True) if cell.estimate]
    bars = [parts_of(estimate) for _, estimate in drawn]
    _stack(axes, [x - 0.42 for x, _ in drawn], [0.84] * len(drawn), bars)
    limit = _show_capacity(axes, sweep.base, [sum(bar.values()) for bar in bars])

    def write(text: str, x: float, height: float, side: str, **style: Any) -> None:
        axes.annotate(text, (x, height), (0, 3 if side == "bottom" else -3), textcoords="offset points",
                      ha="center", va=side, rotation=90 if len(places) > _MOST_UPRIGHT else 0, fontsize=8,
                      **style)  # fmt: skip

    for x, estimate in drawn:
        needed = estimate.required_bytes
        number = f"{needed / GIB:.1f}" if needed >= GIB else f"{needed / GIB:.2f}"
        if needed <= limit:
            write(number, x, needed, "bottom", bbox=_paper())
        else:  # the bar ends above the picture
            write(f"{number} ↑", x, limit, "top", bbox=_paper())
    for x, cell in zip(places, sweep.cells, strict=True):
        if cell.estimate is None:
            write("refused", x, 0, "bottom", color="#666666")
    _name_cells(axes, places, sweep)
    axes.set_xlim(places[0] - 0.8, places[-1] + 0.8)
    return figure


def _name_cells(axes: Axes, places: Sequence[int], sweep: Sweep) -> None:
    rows, columns = sweep.axes[0], sweep.columns
    names = columns.values * len(rows.values) if columns else rows.values
    turned = max(map(len, names)) > 3 and len(names) > _MOST_UPRIGHT
    axes.set_xticks(places, names, rotation=90 if turned else 0, fontsize=8)
    axes.tick_params(axis="x", length=0)
    if columns is None:
        axes.set_xlabel(rows.key)
        return
    width = len(columns.values)
    below = -16 - (5.5 * max(map(len, names)) if turned else 8)  # points, under the columns' values
    for i, value in enumerate(rows.values):
        middle = (places[i * width] + places[i * width + width - 1]) / 2
        axes.annotate(value, (middle, 0), (0, below), xycoords=("data", "axes fraction"), va="center",
                      textcoords="offset points", ha="center", fontsize=9, fontweight="bold")  # fmt: skip
    axes.set_xlabel(f"{columns.key}, and in bold {rows.key}", labelpad=22)


def draw_phases(estimate: Estimate) -> Figure:
    """What holds data in each phase of the run, in their order. The more layers, the narrower is each, and of
    very many only the highest of each group is drawn.
    """
    plan = estimate.plan
    layers = sum(phase.startswith("forward.") for phase in plan.phases)
    each = -(-layers // _MOST_LAYERS)
    groups = _in_groups(plan.phases, each)
    widths = [_LAYER_UNITS * len(group) / layers if "." in group[0] else 1.0 for group in groups]
    starts = [0.0, *itertools.accumulate(widths)]
    axes, figure = _new_picture(estimate, 10.0)
    bars = [parts_in(estimate, max(group, key=lambda phase: plan.live_bytes[phase])) for group in groups]
    _stack(axes, starts[:-1], widths, bars)
    needed, capacity = estimate.required_bytes, estimate.hardware.capacity_bytes
    limit = _show_capacity(axes, estimate, [needed])
    name = f"{format_bytes(needed)}\nneeded"
    if needed > limit:  # the line would be above the picture
        _name_line(axes, limit, f"{name} ↑", "top")
    else:
        axes.axhline(needed, color="black", linewidth=1, linestyle="--", gid="needed")
        above = capacity is not None and needed > capacity
        _name_line(axes, needed, name, "bottom" if above else "top")
    heights = [sum(bar.values()) for bar in bars]
    for is_high, run in itertools.groupby(range(len(bars)), lambda i: heights[i] > limit):
        if is_high:
            high = list(run)
            middle = (starts[high[0]] + starts[high[-1] + 1]) / 2
            axes.annotate(f"up to {max(heights[i] for i in high) / GIB:.1f} ↑", (middle, limit), (0, -3),
                          textcoords="offset points", ha="center", va="top", fontsize=8,
                          bbox=_paper())  # fmt: skip

    ticks: dict[str, list[float]] = {}  # the layers of one pass share a name
    for group, start, width in zip(groups, starts, widths, strict=False):
        ticks.setdefault(group[0].partition(".")[0], []).append(start + width / 2)
    axes.set_xticks([sum(at) / len(at) for at in ticks.values()], list(ticks), rotation=45, ha="right",
                    rotation_mode="anchor")  # fmt: skip
    for label in axes.get_xticklabels():
        if label.get_text() == plan.peak_phase.partition(".")[0]:
            label.set_fontweight("bold")
    thinned = f"; of each {each} layers the highest is shown" if each > 1 else ""
    axes.set_xlabel(f"phases of the run; most is held in {plan.peak_phase}{thinned}")
    axes.set_xlim(0, starts[-1])
    return figure


def _in_groups(phases: Sequence[str], each: int) -> list[list[str]]:
    """`phases` in their order, those of the layers of one pass `each` at a time."""
    groups: list[list[str]] = []
    for _, same in itertools.groupby(phases, lambda phase: phase.partition(".")[0]):
        names = list(same)
        groups += [names[i : i + each] for i in range(0, len(names), each)]
    return groups


def _new_picture(estimate: Estimate, width: float) -> tuple[Axes, Figure]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(width, 5.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    parameters = f"{estimate.architecture.parameter_count:,} parameters"
    title = f"{estimate.config.name} on {estimate.hardware.description}"
    axes.set_title(f"{title}: {parameters}, {estimate.plan.compute_dtype}", loc="left", fontsize=11)
    axes.set_ylabel("GiB")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / GIB:g}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    return axes, figure


def _stack(
    axes: Axes, starts: Sequence[float], widths: Sequence[float], bars: Sequence[dict[str, int]]
) -> None:
    """Draws `bars`, part upon part, and the parts' names beside the picture in the same order."""
    from matplotlib.transforms import offset_copy

    bottoms = [0] * len(bars)
    for part, colour in COLOURS.items():
        heights = [bar.get(part, 0) for bar in bars]
        if any(heights):
            axes.bar(starts, heights, widths, bottoms, align="edge", color=colour, label=part,
                     edgecolor=colour, linewidth=0.2)  # fmt: skip
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    handles, names = axes.get_legend_handles_labels()
    # Between the picture and its legend stand the names of its lines.
    beside = offset_copy(axes.transAxes, axes.get_figure(root=True), x=_LINE_NAMES, units="points")
    axes.legend(handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(1, 1), bbox_transform=beside,
                borderaxespad=0, frameon=False)  # fmt: skip


def _show_capacity(axes: Axes, estimate: Estimate, heights: Sequence[int]) -> float:
    """Draws the line of what the card has, and returns the height of the picture in bytes, which it sets."""
    capacity, highest = estimate.hardware.capacity_bytes, max(heights)
    if capacity is None:
        return _set_height(axes, highest * 1.15)
    label = f"{format_bytes(capacity)}\navailable"
    if capacity > _HIGHEST_LINE * highest:
        limit = _set_height(axes, highest * 1.15)
        _name_line(axes, limit, f"{label} ↑", "top", fontweight="bold")
        return limit
    axes.axhline(capacity, color="black", linewidth=1.6, gid="capacity")
    _name_line(axes, capacity, label, "top" if highest > capacity else "bottom", fontweight="bold")
    return _set_height(axes, min(max(highest, capacity) * 1.15, capacity * _HIGHEST_BAR))


def _name_line(axes: Axes, height: float, name: str, side: str, **style: Any) -> None:
    """Writes what a line is beside the picture, where no bar is; `side` of the text is at its height."""
    axes.annotate(name, (1, height), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                  va=side, fontsize=9, annotation_clip=False, **style)  # fmt: skip


def _set_height(axes: Axes, limit: float) -> float:
    from matplotlib.ticker import MultipleLocator

    axes.set_ylim(0, limit)
    # Heights are bytes: left to itself, matplotlib would set ticks at round numbers of them, not of GiB.
    steps = (GIB * unit * 10.0**power for power in range(-3, 7) for unit in (1, 2, 5))
    axes.yaxis.set_major_locator(MultipleLocator(next(step for step in steps if limit / step <= _MOST_TICKS)))
    return limit


def _paper() -> dict[str, object]:
    """The background of a text that may stand upon a bar."""
    return {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}


def save_picture(draw: Callable[[], Figure], path: Path, mark: str = _MARK) -> None:
    """Writes what `draw` draws to `path`, marked as albor's. Raises AlborError where it cannot be written."""
    assert mark in _MARKS, f"{mark} would not be known again"
    import matplotlib.style

    kind = path.suffix.lower().removeprefix(".")
    # No date: the same estimate draws the same bytes.
    metadata = {
        "png": {"Software": mark},
        "svg": {"Creator": mark, "Date": None},
        "pdf": {"Creator": mark, "CreationDate": None},
    }[kind]
    content = io.BytesIO()
    # Whatever the user's own style is; and a dollar sign in a name is no formula.
    with matplotlib.style.context(["default", {"svg.hashsalt": mark, "text.parse_math": False}]):
        draw().savefig(content, format=kind, metadata=metadata)
    try:
        replace_file(path, content.getvalue())
    except OSError as error:
        raise AlborError(f"{path} cannot be written: {error.strerror or error}") from error
