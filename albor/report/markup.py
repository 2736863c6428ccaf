"""Pieces of HTML. Whatever a run wrote goes through `text` before it stands in a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from albor.units import format_bytes

NOT_MEASURED = '<span class="soft">not measured</span>'
_LETTERS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def text(value: Any) -> str:
    """Anything as text that no browser takes for markup."""
    return escape(str(value))


def count(value: Any) -> str:
    """A whole number with its thousands; empty for anything else."""
    return f"{value:,}" if type(value) is int else ""


def figure(value: Any, digits: int = 4) -> str:
    """A number with so many decimals; empty for anything else, and for an integer that is no float."""
    return f"{value:,.{digits}f}" if type(value) in (int, float) and abs(value) < 1e308 else ""


def amount(value: int | None) -> str:
    """A large count in three digits, and whole in its title."""
    if value is None:
        return NOT_MEASURED
    for size, letter in _LETTERS:
        if value >= size:
            return f'<span title="{value:,}">{value / size:.3g}{letter}</span>'
    return f"{value:,}"


def size(value: int | None) -> str:
    """Bytes in a unit that suits them, and to the byte in its title; empty for none."""
    return "" if value is None else f'<span title="{value:,} bytes">{format_bytes(value)}</span>'


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), long: Sequence[int] = ()
) -> str:
    """A table of HTML cells; columns that are empty in all rows are left out. In the columns `numbers` stand
    numbers, in `long` long texts.
    """
    shown = [column for column in range(len(heads)) if any(row[column] for row in rows)]
    kind = dict.fromkeys(shown, "")
    kind |= dict.fromkeys(numbers, ' class="number"') | dict.fromkeys(long, ' class="long"')
    head = "".join(f'<th scope="col"{kind[c]}>{text(heads[c])}</th>' for c in shown)
    body = "".join(f"<tr>{''.join(f'<td{kind[c]}>{row[c]}</td>' for c in shown)}</tr>" for row in rows)
    return scroll(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scroll(content: str) -> str:
    """Content that may be wider than the page; with the focus on it, arrow keys move it."""
    return f'<div class="scroll" tabindex="0">{content}</div>'


def details(summary: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def note(content: str) -> str:
    """A remark below a chart; nothing for no words."""
    return f'<p class="note">{content}</p>' if content else ""


def nothing(why: str = "not measured") -> str:
    """What a panel shows in place of an empty chart."""
    return f'<p class="none">{why}</p>'


def panel(identity: str, title: str, content: str, about: str = "", *, wide: bool = False) -> str:
    """A part of the page. `about` says what is in it."""
    about = f'<p class="about">{about}</p>' if about else ""
    kind = "panel wide" if wide else "panel"
    return f'<section class="{kind}" id="panel-{identity}"><h2>{title}</h2>{about}{content}</section>'


def chart_place(identity: str, title: str, kind: str = "") -> str:
    """Where page.js draws a chart. It can have the focus, and then its keys act."""
    label = f"Chart: {title}. Arrow keys say its values, plus and minus zoom, 0 shows all."
    return (
        f'<div class="chart {kind}" id="chart-{identity}" tabindex="0" role="application" '
        f'aria-label="{text(label)}"></div>'
    )


def swatch(place: int) -> str:
    """A piece of the line that the run at `place` has in the charts; page.js colours it."""
    line = '<line x1="0" y1="5" x2="26" y2="5"/>'
    return f'<svg viewBox="0 0 26 10" data-run="{place}" aria-hidden="true">{line}</svg>'
