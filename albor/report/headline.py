"""The figures at the top of the page: tiles for one run, a table for several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from albor.report.gather import Gathered
from albor.report.hours import SPEED
from albor.report.markup import NOT_MEASURED, amount, figure, scroll, swatch, text
from albor.units import format_bytes


def headline(runs: Sequence[Gathered]) -> str:
    """The headline figures of `runs`."""
    if len(runs) == 1:
        tiles = "".join(f"<div><dt>{name}</dt><dd>{show(runs[0])}</dd></div>" for name, show in _FIGURES)
        return f'<dl class="tiles" id="headline">{tiles}</dl>'
    head = "".join(f'<th scope="col" class="number">{name}</th>' for name, _ in _FIGURES)
    rows = "".join(
        f'<tr><th scope="row">{swatch(place)} {text(run.label)}</th><td>{text(run.state)}</td>'
        + "".join(f'<td class="number">{show(run)}</td>' for _, show in _FIGURES)
        + "</tr>"
        for place, run in enumerate(runs)
    )
    head = f'<thead><tr><th scope="col">run</th><th scope="col">state</th>{head}</tr></thead>'
    whole = scroll(f"<table>{head}<tbody>{rows}</tbody></table>")
    return f'<section class="panel" id="headline">{whole}</section>'


def _last(run: Gathered, name: str, final: str) -> str:
    value = run.headline[final]
    if value is not None:
        return f"{value:.4f} <small>all held-out text</small>"
    value = run.headline[name]
    return NOT_MEASURED if value is None else f"{value:.4f} <small>last evaluation</small>"


def _best(run: Gathered) -> str:
    value, step = run.headline["best_val_loss"], run.headline["best_step"]
    return NOT_MEASURED if value is None else f"{value:.4f} <small>step {step:,}</small>"


def _steps(run: Gathered) -> str:
    step, steps = run.headline["step"], run.headline["steps"]
    if step is None:
        return NOT_MEASURED
    return f"{step:,}" + (f" <small>of {steps:,}</small>" if steps and steps != step else "")


def _hours(run: Gathered) -> str:
    value = run.headline["hours"]
    if value is None:
        return NOT_MEASURED
    shown = f"{value:,.2f}" if value >= 0.1 else f"{value * 60:,.1f} min"
    return shown + (" <small>of steps alone, by their speed</small>" if run.hours_from == SPEED else "")


def _speed(run: Gathered) -> str:
    value = run.headline["tokens_per_second"]
    return NOT_MEASURED if value is None else f"{value:,.0f} <small>median</small>"


def _mfu(run: Gathered) -> str:
    value = run.headline["mfu"]
    return NOT_MEASURED if value is None else f"{value:.1%} <small>median</small>"


def _tokens(run: Gathered) -> str:
    ratio = run.headline["chinchilla_ratio"]
    told = "" if ratio is None else f" <small>{ratio:.3g} of Chinchilla’s 20 per parameter</small>"
    return amount(run.headline["tokens"]) + told


def _memory(run: Gathered) -> str:
    peak = run.memory and run.memory["measured_total"]
    return f"{format_bytes(peak)} <small>peak</small>" if peak else NOT_MEASURED


_FIGURES: tuple[tuple[str, Callable[[Gathered], str]], ...] = (
    ("held-out loss", lambda run: _last(run, "val_loss", "final_val_loss")),
    ("best held-out loss", _best),
    ("bits per byte", lambda run: _last(run, "bits_per_byte", "final_bits_per_byte")),
    ("training loss, last", lambda run: figure(run.headline["train_loss"]) or NOT_MEASURED),
    ("parameters", lambda run: amount(run.headline["parameters"])),
    ("tokens", _tokens),
    ("steps", _steps),
    ("hours of training", _hours),
    ("tokens per second", _speed),
    ("MFU", _mfu),
    ("memory", _memory),
)
