"""The results of an evaluation as a table, beside published ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from albor.evaluate import published


def table(results: dict[str, Any]) -> Iterator[str]:
    """The lines that `albor eval` prints; `results` as they are stored."""
    if "text" in results:
        yield from _text(results["text"])
        return
    found: dict[str, Any] = results["results"]
    asked = {name: figures for name, figures in found.items() if "pass@1" not in figures}
    if asked:
        yield from _columns(_accuracies(asked, "published" in results))
    for name, figures in found.items():
        if "pass@1" in figures:
            yield from _code(name, figures)
    yield ""
    if results["limit"] is not None:
        yield f"The first {results['limit']} items of each task only: not a result to compare."
    for name, figures in found.items():
        for key, what in (
            ("truncated", "contexts lost their beginning"),
            ("longer_than_context", "answers are longer than the context"),
        ):
            if figures.get(key):
                total = figures["requests"]
                yield f"{name}: {figures[key]:,} of {total:,} {what} ({results['context']:,} tokens)."
    if asked:
        yield "Accuracies in %, with standard errors. ppl is perplexity."
    if "published" in results:
        yield f"{results['published']['note']}."


def _accuracies(found: dict[str, Any], compare: bool) -> Iterator[list[str]]:
    models = list(published.ROWS) if compare else []
    yield ["task", "items", "acc", "acc_norm", "perplexity", "guessing", *models]
    for name, figures in found.items():
        chance = figures.get("chance")
        others = []
        for model in models:
            accuracy = published.ROWS[model].get(name)
            shown = "" if accuracy is None else f"{accuracy:.2f}"
            others.append(
                f"{shown}, ppl {published.PERPLEXITY[model]}" if name == "lambada_openai" else shown
            )
        yield [
            name,
            f"{figures['items']:,}" if figures.get("items") is not None else "",
            _percent(figures.get("acc")),
            _percent(figures.get("acc_norm")),
            _perplexity(figures.get("perplexity")),
            "" if chance is None else f"{chance * 100:.2f}",
            *others,
        ]


def _percent(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    error = figure["stderr"]
    return f"{figure['value'] * 100:.2f}" + ("" if error is None else f" ± {error * 100:.2f}")


def _perplexity(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return ""
    if figure["value"] is None:
        return "beyond 1e304"
    error = figure["stderr"]
    return _short(figure["value"]) + ("" if error is None else f" ± {_short(error)}")


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2e}"


def _code(name: str, figures: dict[str, Any]) -> Iterator[str]:
    rates = ", ".join(f"{key} {_percent(figures[key])}" for key in figures if key.startswith("pass@"))
    outcomes = ", ".join(f"{count:,} {verdict}" for verdict, count in figures["outcomes"].items())
    yield f"{name}: {rates} % of {figures['items']:,} problems"
    yield f"  programs, at temperature {figures['temperature']:g}: {outcomes}"


def _text(figures: dict[str, Any]) -> Iterator[str]:
    yield from _columns(
        [
            ["bits per byte", f"{figures['bits_per_byte']:.4f}"],
            ["perplexity", f"{figures['perplexity']:.3f} per token"],
            ["loss", f"{figures['loss']:.4f} nats per token"],
            [
                "text",
                f"{figures['bytes']:,} bytes, {figures['tokens']:,} tokens, stride {figures['stride']:,}",
            ],
        ]
    )


def _columns(rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    """Rows with their cells below each other; columns without any are left out."""
    rows = list(rows)
    shown = [column for column in zip(*rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in shown]
    for row in zip(*shown, strict=True):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
