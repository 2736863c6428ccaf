"""`--fit` for people: the best configuration beside a few others, the lines to change, the command."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from albor.memory.fit import NEAR, Choice, Fit
from albor.memory.plan import head_chunk_tokens
from albor.units import format_bytes


def render_fit(fit: Fit, command: Sequence[str], console: Console) -> None:
    """Prints what the search found. `command` is what was asked about, as the shell's words: the path of the
    configuration and the overrides; empty: not known.
    """
    for line in fit_lines(fit, command):
        console.print(Text(line), soft_wrap=True)


def fit_lines(fit: Fit, command: Sequence[str]) -> list[str]:
    """The lines of it, of which only overrides and paths may be wider than 80 columns."""
    tokens = fit.given.estimate.config.tokens_per_step
    ranked = "by modelled speed" if fit.basis == "modelled" else "in a fixed order"
    lines = ["", f"Fit      {fit.tried:,} configurations of {tokens:,} tokens a step, {ranked}"]
    if fit.basis == "order":
        lines += [f"         {line}" for line in textwrap.wrap(f"No speed is known: {fit.source}.", 70)]
    lines += ["", *_table(fit), ""]
    if fit.best is None:
        return lines + _nothing_fits(fit)
    if not fit.best.change:
        return [*lines, f"As given it is the {fit.best_is} that fits: there is nothing to change."]
    path = command[0] if command else "the configuration"
    lines += [f"Lines to change in {path}:", *(f"  {line}" for line in fit.yaml_lines)]
    lines += _evaluation(fit.best, fit.given)
    # An override of a key that the best changes has no use any more.
    kept = [word for word in command if word.partition("=")[0] not in fit.best.change]
    words = shlex.join(["albor", "train", *kept]) if command else "albor train CONFIG"
    return [*lines, "Or as a command:", f"  {words} {fit.best.overrides}"]


def _nothing_fits(fit: Fit) -> list[str]:
    assert fit.smallest is not None
    capacity = fit.given.estimate.hardware.capacity_bytes
    assert capacity is not None
    size = format_bytes(fit.smallest.estimate.required_bytes)
    lines = [
        f"Nothing fits: the smallest needs {size}, and there are {format_bytes(capacity)}.",
        f"  {fit.smallest.overrides or 'as given'}",
    ]
    if fit.with_state is not None:
        lines += [
            "With bf16 optimizer state, other arithmetic, this would fit (--fit-state):",
            f"  {fit.with_state.overrides}",
        ]
    return lines


def _evaluation(best: Choice, given: Choice) -> list[str]:
    """What else the size of a micro-batch means."""
    before, after = given.estimate.config, best.estimate.config
    held = before.evaluate.batches * before.train.micro_batch_size * before.data.sequence_length
    count, odd = divmod(held, after.train.micro_batch_size * after.data.sequence_length)
    if count == before.evaluate.batches or odd or not count:
        return []
    return [f"(evaluate.batches: {count} would be as much text per evaluation as before.)"]


def _table(fit: Fit) -> list[str]:
    heads = ["", "micro-batch", "sums", "recompute", "chunk", "needs", "tokens/s", "speed"]
    numbers = {1, 4, 5, 6, 7}  # columns that end on the right
    rows = [heads]
    for name, choice in fit.choices:
        rows.append([name, *_cells(choice, fit.best)])
    left_out = {6, 7} if fit.basis == "order" else {6} if fit.options.state else set()
    if fit.options.state:
        for row, (_, choice) in zip(rows[1:], fit.choices, strict=True):
            row[3] += f" {choice.estimate.config.optimizer.state_dtype}"
    kept = [i for i in range(len(heads)) if i not in left_out]
    widths = {i: max(len(row[i]) for row in rows) for i in kept}
    lines = []
    for row in rows:
        cells = [row[i].rjust(widths[i]) if i in numbers else row[i].ljust(widths[i]) for i in kept]
        lines.append("  ".join(cells).rstrip())
    if any(name == "least memory" for name, _ in fit.choices):
        lines.append(f"least memory: the smallest within {NEAR:.0%} of the fastest")
    if any(not choice.estimate.fits for _, choice in fit.choices):
        lines.append("!: does not fit")
    return lines


def _cells(choice: Choice, best: Choice | None) -> list[str]:
    config, plan = choice.estimate.config, choice.estimate.plan
    batch = f"{config.train.micro_batch_size} x {config.train.gradient_accumulation_steps}"
    needs = format_bytes(choice.estimate.required_bytes) + (" " if choice.estimate.fits else "!")
    speed = relative = ""
    if choice.tokens_per_second is not None:
        speed = f"{choice.tokens_per_second:,.0f}"
        if best is not None and best.tokens_per_second is not None and choice is not best:
            relative = f"{choice.tokens_per_second / best.tokens_per_second - 1:+.1%}"
    chunk = f"{head_chunk_tokens(config, plan.device):,}"
    return [batch, plan.accumulator, config.train.recompute, chunk, needs, speed, relative]
