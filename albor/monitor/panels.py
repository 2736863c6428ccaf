"""The parts of the picture as text: each function fits what it shows into so many columns and lines.

Colours are the terminal's own sixteen, so that they suit a light background and a dark one, and no meaning
hangs on them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from datetime import datetime

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from albor.monitor.chart import draw
from albor.monitor.view import BlockNorms, Happening, View
from albor.units import format_bytes, format_count, format_duration

METRICS = ("loss", "lr", "speed", "mfu", "norm", "bits", "memory")  # in the order of the tab key
_SMALL = {
    "loss": "loss",
    "lr": "learning rate",
    "speed": "tokens/s",
}  # the first two of them that are not the large chart stand beside it
_STATES = {
    "running": "green", "finished": "bold green", "stopped": "yellow", "diverged": "bold red",
    "failed": "bold red", "lost": "bold red", "new": "cyan",
}  # fmt: skip
_LEVELS = {"plain": "", "good": "green", "warning": "yellow", "bad": "bold red"}
_BARS, _ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"
_FRAME = 2  # lines that a panel's title and border take


def header(view: View, width: int, *, ascii_only: bool = False) -> Text:
    """Three lines: what it is and how it goes; how far it is; the last numbers. What has no room is left
    out, the least important first.
    """
    state = Text(view.state.upper(), _STATES.get(view.state, ""))
    reason = Text(f"({view.reason})") if view.reason else None
    first = [(0, state), (0, Text(view.name, "bold")), (1, reason), (3, Text(view.device, "dim"))]
    if view.note:
        first.insert(2, (2, Text(view.note, "cyan")))
    numbers, speed = view.numbers, view.numbers.get("train/tokens_per_second")
    waiting = f"no row for {format_duration(view.seconds_since_row)}: evaluating, saving, or stuck"
    second = [
        (1, Text(waiting, "yellow") if view.is_late else None),
        (1, Text("no row yet") if view.step is None and not view.has_ended else None),
        (0, Text(f"step {_of(view.step, view.steps)}")),
        (2, Text(f"tokens {_count(view.tokens)}/{_count(view.tokens_planned)}")),
        (1, Text(f"elapsed {format_duration(view.elapsed_seconds)}")),
        (0, Text(f"eta {format_duration(view.eta_seconds)}") if not view.has_ended else None),
    ]
    third = [
        (0, _number("loss", numbers.get("train/loss"), ".3f")),
        (3, _number("smoothed", view.smoothed_loss, ".3f")),
        (1, _number("val", numbers.get("val/loss"), ".3f")),
        (2, Text(f"best {view.best[1]:.3f} at {view.best[0]}") if view.best else None),
        (3, _number("bits/byte", numbers.get("val/bits_per_byte"), ".3f")),
        (2, _number("lr", numbers.get("train/lr"), ".1e")),
        (2, _number("norm", numbers.get("train/grad_norm"), ".2f")),
        (1, Text(f"{format_count(speed)} tok/s") if speed is not None else None),
        (1, _number("mfu", numbers.get("train/mfu"), ".1%")),
        (4, _number("epoch", numbers.get("train/epoch"), ".2f")),
    ]
    line = _fit(second, width)
    if (room := width - line.cell_len - 2) >= 8 and view.progress is not None:
        line = Text.assemble(_bar(view.progress, min(room, 40), "green", ascii_only), "  ", line)
    return Text("\n").join([_fit(first, width), line, _fit(third, width)])


def chart(
    view: View, key: str, width: int, height: int, *, zoom: float = 1.0, logarithmic: bool = False,
    colour: bool = True, ascii_only: bool = False,
) -> Text:  # fmt: skip
    """The chart of one metric, or that there is nothing to draw."""
    found = view.charts.get(key)
    text = "" if found is None else draw(
        found, width, height, zoom=zoom, logarithmic=logarithmic, colour=colour, ascii_only=ascii_only
    )  # fmt: skip
    return Text.from_ansi(text, no_wrap=True) if text else Text(_nothing(view), "dim")


def chart_title(view: View, key: str, *, zoom: float = 1.0, logarithmic: bool = False) -> str:
    """What a chart shows, with its last value and the curves that are in it."""
    found = view.charts.get(key)
    if found is None:
        return _SMALL.get(key, key)
    title = found.title
    if key == "speed" and "train/tokens_per_second" in view.numbers:
        title += f" {format_count(view.numbers['train/tokens_per_second'])}"
        if "train/mfu" in view.numbers:
            title += f", MFU {view.numbers['train/mfu']:.1%}"
    if key == "lr" and "train/lr" in view.numbers:
        title += f" {view.numbers['train/lr']:.2e}"
    if any(curve.kind == "points" for curve in found.curves) and key == "loss":
        title += ", validation ●"
    if logarithmic:
        title += ", log scale"
    if zoom < 1:
        title += f", last 1/{round(1 / zoom)} of the steps"
    return title


def small_charts(key: str) -> list[str]:
    """The two charts that stand beside the one of `key`."""
    return [name for name in _SMALL if name != key][:2]


def memory(view: View, width: int, height: int, *, ascii_only: bool = False) -> Text:
    """Measured against planned, part by part, then the plan's largest groups."""
    if not view.memory:
        return Text(_nothing(view), "dim")
    largest = max(max(part.planned, part.measured or 0) for part in view.memory) or 1
    parts = sorted(view.memory, key=lambda part: ("process" not in part.name, -part.planned))[:height]
    name_width = min(22, max(len(part.name) for part in parts))
    numbers = [f"{_bytes(part.measured)} of {_bytes(part.planned)}" for part in parts]
    room = width - name_width - max(map(len, numbers)) - 2
    lines = []
    for part, text in zip(parts, numbers, strict=True):
        style = "yellow" if part.measured is not None and part.measured > part.planned else "green"
        bar = _bar((part.measured or 0) / largest, room, style, ascii_only) if room >= 6 else Text("")
        name = set_cell_size(part.name, name_width)
        lines.append(Text.assemble(name, " ", bar, " " if room >= 6 else "", text))
    groups = sorted(view.memory_groups.items(), key=lambda group: -group[1])
    if groups and len(lines) < height:
        sizes = [(rank, Text(f"{name} {_bytes(size)}", "dim")) for rank, (name, size) in enumerate(groups, 1)]
        lines.append(_fit([(0, Text("plan:", "dim")), *sizes], width))
    return _lines(lines, width)


def gradients(view: View, width: int, height: int, *, ascii_only: bool = False) -> Text:
    """The last row's gradient norms, block by block on one logarithmic scale: attention, MLP, and in words
    what is odd.
    """
    if not view.blocks:
        return Text(_nothing(view), "dim")
    odd = [block.name for block in view.blocks if not block.total or not math.isfinite(block.total)]
    grown = [block.name for block in view.blocks if block.name not in odd and _has_grown(block)]
    words: list[tuple[int, Text | None]] = []
    if odd:
        words.append((0, Text(f"zero or not finite: {_some(odd)}", "bold red")))
    if grown:
        words.append((0, Text(f"over ten times as usual: {_some(grown)}", "yellow")))
    known = [block for block in view.blocks if block.total is not None and math.isfinite(block.total)]
    if known:
        top = max(known, key=lambda block: block.total or 0.0)
        least = min(known, key=lambda block: block.total or 0.0)
        words.append((1, Text(f"largest {top.name} {top.total:.2g}")))
        words.append((2, Text(f"smallest {least.name} {least.total:.2g}")))
    words += [(3, Text(f"{name} {norm:.2g}")) for name, norm in view.other_norms.items()]
    rows = [("attention", [b.attention for b in view.blocks]), ("mlp", [b.mlp for b in view.blocks])]
    values = [v for _, row in rows for v in row if v is not None and math.isfinite(v) and v > 0]
    lines: list[Text] = []
    if values and height >= 2:
        tall = max(1, min(4, (height - 1) // 2))
        low, high = math.log(min(values)), math.log(max(values))
        low = min(low, high - math.log(10))  # small differences stay small
        for label, row in rows[: max(1, (height - 1) // tall)]:
            lines += _heat(label, row, low, high, width, tall, ascii_only)
    return _lines([*lines, _fit(words, width)][-height:], width)


def events(view: View, width: int, height: int) -> Text:
    """The last events, the newest at the bottom."""
    shown = list(view.events)[-height:] if height > 0 else []
    if not shown:
        return Text(_nothing(view), "dim")
    return _lines([event_line(event) for event in shown], width)


def event_line(event: Happening) -> Text:
    """When, at which step, what."""
    when = "" if event.time is None else datetime.fromtimestamp(event.time).strftime("%H:%M:%S ")
    step = "" if event.step is None else f"step {event.step} "
    kind = (event.kind.replace("_", " "), _LEVELS[event.level])
    return Text.assemble((when, "dim"), step, kind, f" {event.text}" if event.text else "")


def sample(view: View, width: int, height: int) -> Text:
    """The newest samples, prompt by prompt, wrapped."""
    if not view.samples:
        return Text(_nothing(view), "dim")
    lines: list[Text] = []
    for one in view.samples:
        text = Text(one.prompt, "bold")
        text.append(one.text if one.text is not None else " (its logits were not finite)", "not bold")
        text.overflow, text.no_wrap = "fold", False
        lines += _wrap(text, width)[: max(1, height // len(view.samples))]
    return _lines(lines[:height], width)


def alerts(view: View, width: int, height: int) -> Text:
    """The rules that have held, those that still do first, and what is wrong with the run's files."""
    lines = []
    for alert in view.alerts:
        step = "" if alert.step is None else f" step {alert.step}"
        state = Text(f" holds{step and ' since' + step}", "bold red")
        if not alert.holds:
            state = Text(f" held{step and ' at' + step}, and is over", "dim")
        lines.append(Text.assemble(alert.rule, state, f" ({alert.values})" if alert.values else ""))
    lines += [Text(problem, "yellow") for problem in view.problems]
    return _lines(lines[:height], width)


def has_alerts(view: View) -> bool:
    """Whether the panel of alerts has something to say."""
    return bool(view.alerts or view.problems)


PANELS: dict[str, tuple[str, Callable[..., Text]]] = {
    "alerts": ("alerts", lambda view, width, height, **_: alerts(view, width, height)),
    "memory": ("memory, measured of planned", memory),
    "gradients": ("gradient norms by block", gradients),
    "events": ("events", lambda view, width, height, **_: events(view, width, height)),
    "sample": ("last sample", lambda view, width, height, **_: sample(view, width, height)),
}


def _fit(parts: Iterable[tuple[int, Text | None]], width: int) -> Text:
    """The parts side by side, in their order; while they are too wide the one with the highest number goes,
    of several the last.
    """
    left = [(rank, part) for rank, part in parts if part is not None and part.plain]
    while len(left) > 1 and sum(part.cell_len for _, part in left) + 2 * (len(left) - 1) > width:
        worst = max(range(len(left)), key=lambda n: (left[n][0], n))
        del left[worst]
    line = Text("  ").join(part for _, part in left)
    line.truncate(width, overflow="ellipsis")
    return line


def _lines(lines: Iterable[Text], width: int) -> Text:
    cut = []
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        cut.append(line)
    return Text("\n", no_wrap=True).join(cut)


def _wrap(text: Text, width: int) -> list[Text]:
    """By characters, for what a model writes has spaces that mean something."""
    lines = []
    for line in text.split("\n", allow_blank=True):
        while line.cell_len > width > 1:
            count = len(line.plain)
            while cell_len(line.plain[:count]) > width:
                count -= 1
            head, line = line.divide([count])
            lines.append(head)
        lines.append(line)
    return lines


def _bar(share: float, width: int, style: str, ascii_only: bool) -> Text:
    done = max(0, min(width, round(share * width)))
    full, rest = ("#", "-") if ascii_only else ("━", "─")
    return Text.assemble((full * done, style), (rest * (width - done), "dim"))


def _heat(
    label: str, row: list[float | None], low: float, high: float, width: int, tall: int, ascii_only: bool
) -> list[Text]:
    """Bars of `tall` lines, one for each block; `!` where the norm is zero or not finite."""
    bars = _ASCII_BARS if ascii_only else _BARS
    room = width - 10
    if len(row) > room:  # more blocks than columns: the largest of neighbours
        size = -(-len(row) // max(1, room))
        row = [
            max((v for v in row[n : n + size] if v is not None), default=None)
            for n in range(0, len(row), size)
        ]
    each = max(1, min(4, room // len(row)))
    most = 8 * tall - (2 if tall > 1 else 0)  # the tallest leaves a gap to the row above
    lines = []
    for level in range(tall - 1, -1, -1):
        text = ""
        for value in row:
            if value is None:
                mark = " "
            elif not math.isfinite(value) or value <= 0:
                mark = "!" if level == 0 else " "
            else:
                eighths = 1 + round((math.log(value) - low) / (high - low) * (most - 1))
                mark = bars[max(0, min(8, eighths - 8 * level))]
            text += mark * (each - (each > 1)) + " " * (each > 1)
        lines.append(Text.assemble((f"{label if level == 0 else '':<10}", "dim"), (text, "cyan")))
    return lines


def _has_grown(block: BlockNorms) -> bool:
    return block.total is not None and bool(block.usual) and block.total > 10 * (block.usual or 0.0)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _nothing(view: View) -> str:
    return "nothing yet" if not view.has_ended else "nothing"


def _number(label: str, value: float | None, form: str) -> Text | None:
    return None if value is None else Text(f"{label} {value:{form}}")


def _of(step: int | None, steps: int | None) -> str:
    return f"{'-' if step is None else step}/{'-' if steps is None else steps}"


def _count(count: float | None) -> str:
    if count is not None and count >= 999.5e6:
        return f"{count / 1e9:.2f}B"
    return format_count(count)


def _bytes(count: int | None) -> str:
    return "-" if count is None else format_bytes(count)
