"""What the canary found, for people: a row per step, every check, and the verdict."""

from __future__ import annotations

from rich.console import Console

from albor.architecture import Architecture
from albor.canary.findings import Canary, Row

_COLUMNS = "{:>6} {:>9} {:>9} {:>9}  {:>8} {:>8} {:>8}  {:>8}  {}"


def print_head(canary: Canary, console: Console) -> None:
    """What is compared, and the columns."""
    config = canary.config
    count = Architecture.from_config(config.model).parameter_count
    say(console, f"{config.name}: {count:,} parameters, {config.tokens_per_step:,} tokens per step")
    say(console, f"albor: {canary.compute_dtype} on {canary.device}")
    say(console, f"reference: {canary.reference}, float32 on {canary.device}")
    say(console, "")
    say(
        console,
        _COLUMNS.format(
            "step", "loss", "reference", "apart", "norm", "reference", "ratio", "cosine", "of (the lowest)"
        ),
    )


def print_row(row: Row, console: Console) -> None:
    """One step, or a comparison beside them."""
    parameter, cosine = row.lowest
    say(
        console,
        _COLUMNS.format(
            row.label,
            f"{row.loss:.5f}", f"{row.reference_loss:.5f}", f"{row.loss_difference:+.1e}",
            f"{row.grad_norm:.4f}", f"{row.reference_grad_norm:.4f}", f"{row.norm_ratio:.5f}",
            f"{cosine:.6f}", parameter,
        ),
    )  # fmt: skip


def print_verdict(canary: Canary, console: Console) -> None:
    """Each check beside its limit, and what follows."""
    say(console, "")
    # After a divergence a disagreement is no failure.
    beyond = "n/a " if canary.verdict == "DIVERGES" else "FAIL"
    for check in canary.checks:
        where = f"  {check.where}" if check.where else ""
        mark = "ok  " if check.passed else beyond
        say(console, f"{mark} {check.name:<52} {check.value:<8.2g} limit {check.limit:<8.2g}{where}")
    say(console, "")
    for line in canary.explanation():
        say(console, line)


def say(console: Console, line: str) -> None:
    """A line as it is, neither wrapped nor coloured; the last column may be empty."""
    console.out(line.rstrip(), highlight=False)
