"""A chart as lines of text, drawn by plotext: braille dots, or plain ASCII where that is all there is."""

from __future__ import annotations

import math

import numpy as np
import plotext

from albor.monitor.view import Chart, Curve
from albor.units import format_count

ZOOMS = (1.0, 0.5, 0.25, 0.125, 0.0625)  # shares of the steps that are shown, the newest
_COLOURS = {"raw": "gray", "line": "cyan", "points": "orange"}  # of the terminal's own palette
_MARKERS = {"raw": "braille", "line": "braille", "points": "●"}
_ASCII_MARKERS = {"raw": ".", "line": "*", "points": "o"}
_ASCII = str.maketrans("┤│├┬─┼┴└┌┘┐", "||||-+++++|")
_HUGE, _TINY = 1e300, 1e-300  # what a float holds beyond these is drawn at them: differences overflow
_LEAST_WIDTH, _LEAST_HEIGHT = 16, 4


def draw(
    chart: Chart,
    width: int,
    height: int,
    *,
    zoom: float = 1.0,
    logarithmic: bool = False,
    colour: bool = True,
    ascii_only: bool = False,
) -> str:
    """`chart` in `width` times `height` characters, axes included, with ANSI colours or without.

    `zoom` is the share of the steps that is shown, the newest. On a logarithmic scale what is not above zero
    has no place. Returns an empty string where there is nothing to draw, or no room.
    """
    last = max((int(curve.steps[-1]) for curve in chart.curves), default=0)
    first = min((int(curve.steps[0]) for curve in chart.curves), default=0)
    first = max(first, math.floor(last - (last - first) * zoom))
    curves = [_clip(curve, first, logarithmic) for curve in chart.curves]
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves or width < _LEAST_WIDTH or height < _LEAST_HEIGHT:
        return ""
    low = min(float(curve.values.min()) for curve in curves)
    high = max(float(curve.values.max()) for curve in curves)
    if high - low <= max(1e-9 * max(abs(high), abs(low)), _TINY):  # a flat line lies in the middle
        margin = 0.5 if logarithmic else abs(high) * 0.05 or 0.5
        low, high = low - margin, high + margin
    ticks = (_log_ticks if logarithmic else _ticks)(low, high, max(3, height // 3))

    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plot_size(width, height)
    plotext.xlim(first, max(last, first + 1))
    plotext.ylim(low, high)
    for curve in sorted(curves, key=lambda curve: ("raw", "line", "points").index(curve.kind)):
        thin = curve if curve.kind == "points" else _thin(curve, first, last, width)
        marker = (_ASCII_MARKERS if ascii_only else _MARKERS)[curve.kind]
        put = plotext.scatter if curve.kind == "points" or len(thin.steps) == 1 else plotext.plot
        put(thin.steps.tolist(), thin.values.tolist(), marker=marker, color=_COLOURS[curve.kind])
    plotext.yticks(ticks, [_label(tick, logarithmic) for tick in ticks])
    places = sorted({first, (first + last) // 2, last}) if width >= 40 else sorted({first, last})
    plotext.xticks(places, [format_count(place) for place in places])
    plotext.xaxes(True, False)
    plotext.yaxes(True, False)
    text = plotext.build()
    plotext.clear_figure()
    if not colour:
        text = plotext.uncolorize(text)
    if ascii_only:
        text = text.translate(_ASCII)
    return text.rstrip("\n")


def _clip(curve: Curve, first: int, logarithmic: bool) -> Curve:
    shown = curve.steps >= first
    if logarithmic:
        shown &= curve.values > 0
    values = np.clip(curve.values[shown], _TINY if logarithmic else -_HUGE, _HUGE)
    return Curve(curve.label, curve.kind, curve.steps[shown], np.log10(values) if logarithmic else values)


def _thin(curve: Curve, first: int, last: int, columns: int) -> Curve:
    """Of each column's values the lowest and the highest, so that no spike is lost; few enough to draw."""
    if len(curve.steps) <= 2 * columns:
        return curve
    column = (curve.steps - first) * columns // max(1, last - first + 1)
    order = np.lexsort((curve.values, column))  # by column, and in it by value
    ends = np.flatnonzero(np.diff(column[order], append=-1))
    starts = np.concatenate([[0], ends[:-1] + 1])
    kept = np.unique(np.concatenate([order[starts], order[ends]]))
    return Curve(curve.label, curve.kind, curve.steps[kept], curve.values[kept])


def _ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round values from `low` to `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float, wanted: int) -> list[float]:
    """The same on a scale of decimal logarithms: powers of ten, or with round values between them."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        ticks = [n + math.log10(factor) for n in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 2:
            return ticks[:: max(1, len(ticks) // (2 * wanted))]
    values = _ticks(10.0**low, 10.0**high, wanted)
    return [math.log10(value) for value in values if value > 0]


def _label(tick: float, logarithmic: bool) -> str:
    value = 10.0**tick if logarithmic else tick
    if abs(value) >= 10_000:
        return format_count(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
