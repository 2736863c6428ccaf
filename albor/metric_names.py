"""Which metrics a run logs, by its configuration alone: a rule on any other one would never act. No torch."""

from __future__ import annotations

import difflib

from albor.alerts import parse_rule
from albor.architecture import Architecture
from albor.config import RunConfig
from albor.errors import Problem

_WHOLE_RUN = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/epoch",
    "train/tokens_per_second",
    "train/mfu",
    "memory/planned",
    "memory/arena",
    "memory/reserved",
    "memory/process",
    "val/loss",
    "val/perplexity",
    "val/bits_per_byte",
)
_MOST_PROBLEMS = 100  # rules that are explained; nobody reads more


def metric_names(config: RunConfig) -> list[str]:
    """Every metric of metrics.jsonl, those that are null on some machines included."""
    groups: dict[str, None] = {}
    for segment in Architecture.from_config(config.model).segments:
        groups |= {segment.group.partition("/")[0]: None, segment.group: None}
    return [*_WHOLE_RUN, *(f"gradients/{group}" for group in groups)]


def check_alerts(config: RunConfig) -> list[Problem]:
    """A problem for each rule of `alerts` that no metric of this configuration matches."""
    if not config.alerts:
        return []
    problems, names = [], metric_names(config)
    for text in config.alerts:
        rule = parse_rule(text)
        if not any(map(rule.metric.fullmatch, names)):
            message = f"a run of this model has no metric {rule.metric_name}"
            key, related = f"alerts.{text}", ("model.num_hidden_layers",)
            problems.append(Problem(key, message, _advise(rule.metric_name, names), related=related))
            if len(problems) == _MOST_PROBLEMS:
                break
    return problems


def _advise(wrong: str, names: list[str]) -> str:
    blocks = [name for name in names if "/block_" in name]
    if wrong.startswith("gradients/block_") and blocks:
        last = blocks[-1].rpartition("/")[0]
        return f"its blocks are {blocks[0]} to {last}, and each has /attention and /mlp"
    groups = dict.fromkeys(f"{name.partition('/')[0]}/*" for name in names)
    near = difflib.get_close_matches(wrong, [*groups, *(n for n in names if n not in blocks)], n=1)
    if near:
        return f"did you mean {near[0]}?"
    return f"there are {', '.join(n for n in names if n not in blocks)} and, for each block, {blocks[0]}"
