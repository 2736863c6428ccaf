"""The run at one moment as plain lines, for a pipe, a file, or a terminal that cannot move its cursor."""

from __future__ import annotations

from albor.monitor import panels
from albor.monitor.view import View
from albor.units import format_bytes, format_count, format_duration

_CHART_WIDTH, _CHART_HEIGHT = 78, 12
_EVENTS = 10


def lines(view: View, *, ascii_only: bool = False) -> list[str]:
    """Everything that is known; no line is cut, no escape code in it."""
    numbers = view.numbers
    rows = [
        ("run", f"{view.directory}{f' ({view.note})' if view.note else ''}"),
        ("state", view.state + (f" ({view.reason})" if view.reason else "")),
        ("device", view.device),
        (
            "step",
            _of(view.step, view.steps) + (f" ({view.progress:.0%})" if view.progress is not None else ""),
        ),
        ("tokens", _of(view.tokens, view.tokens_planned)),
        ("elapsed", format_duration(view.elapsed_seconds)),
        ("eta", "" if view.has_ended else format_duration(view.eta_seconds)),
        (
            "last row",
            "" if view.seconds_since_row is None else f"{format_duration(view.seconds_since_row)} ago",
        ),
        ("loss", _number(numbers.get("train/loss"), ".4f") + _aside("smoothed", view.smoothed_loss, ".4f")),
        ("val loss", _number(numbers.get("val/loss"), ".4f") + _best(view)),
        ("bits/byte", _number(numbers.get("val/bits_per_byte"), ".4f")),
        ("lr", _number(numbers.get("train/lr"), ".3e")),
        ("norm", _number(numbers.get("train/grad_norm"), ".3g")),
        ("tokens/s", format_count(numbers.get("train/tokens_per_second"))),
        ("mfu", _number(numbers.get("train/mfu"), ".1%")),
    ]
    if view.is_late:
        rows.append(("warning", "the next row is late: evaluating, saving, or stuck"))
    out = [f"{name:<10} {text}" for name, text in rows if text not in ("", "-")]
    if "loss" in view.charts:
        drawn = panels.chart(view, "loss", _CHART_WIDTH, _CHART_HEIGHT, colour=False, ascii_only=ascii_only)
        key = ". training, * smoothed, o validation" if ascii_only else "training loss, ● validation"
        out += ["", key, *(line.rstrip() for line in drawn.plain.split("\n"))]
    out += _section(
        "memory, measured of planned",
        [
            f"{part.name:<20} {'-' if part.measured is None else format_bytes(part.measured)} of "
            f"{format_bytes(part.planned)}"
            for part in view.memory
        ],
    )
    out += _section(
        "gradient norms",
        [
            f"{block.name:<12} {_number(block.total, '.3g')} (attention {_number(block.attention, '.3g')}, "
            f"mlp {_number(block.mlp, '.3g')})"
            for block in view.blocks
        ]
        + [f"{name:<12} {norm:.3g}" for name, norm in view.other_norms.items()],
    )
    out += _section("events", [panels.event_line(event).plain for event in view.events[-_EVENTS:]])
    samples = [
        f"step {'-' if one.step is None else one.step}: {one.prompt + (one.text or '')!r}"
        for one in view.samples
    ]
    out += _section("samples", samples)
    if panels.has_alerts(view):
        shown = panels.alerts(view, 10_000, len(view.alerts) + len(view.problems))
        out += _section("alerts", shown.plain.split("\n"))
    return [line.encode("ascii", "replace").decode() for line in out] if ascii_only else out


def _section(title: str, rows: list[str]) -> list[str]:
    return ["", title, *(f"  {row}" for row in rows)] if rows else []


def _of(count: int | None, whole: int | None) -> str:
    return f"{'-' if count is None else f'{count:,}'} of {'-' if whole is None else f'{whole:,}'}"


def _aside(label: str, value: float | None, form: str) -> str:
    return "" if value is None else f" ({label} {value:{form}})"


def _best(view: View) -> str:
    return "" if view.best is None else f" (best {view.best[1]:.4f} at step {view.best[0]})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
