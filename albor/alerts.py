"""Rules on metrics: `train/loss > 10`, `gradients/* > 100`, `val/loss is not finite`.

    METRIC OPERATOR NUMBER        with one of > >= < <= ==
    METRIC is not finite

METRIC is a metric's name, in which `*` stands for any characters, `/` among them. A NaN is not larger than
any number, nor smaller: `is not finite` finds it. A metric that is not known has no value, and no rule holds
for it.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

Action = Literal["warn", "stop"]
Metrics = Mapping[str, float | None]

_RULE = re.compile(r"(?P<metric>[^\s<>=!]+)\s*(?P<operator>[<>=!]+|\bis\b)\s*(?P<operand>.*)", re.DOTALL)
_METRIC = re.compile(r"[\w./*-]+", re.ASCII)
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", re.ASCII)
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
}
_NOT_FINITE = "not finite"
_REMEDY = "write METRIC > NUMBER (or >=, <, <=, ==), such as train/loss > 10, or METRIC is not finite"


@dataclass(frozen=True)
class Rule:
    """One rule, as it was written and as it is understood."""

    text: str
    metric_name: str  # as it was written, with its stars
    metric: re.Pattern[str]
    holds: Callable[[float], bool]


def parse_rule(text: str) -> Rule:
    """The rule that `text` is. Raises ValueError, which says what is wrong and what would be right."""
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"is no rule; {_REMEDY}")
    name, sign, operand = match["metric"], match["operator"], match["operand"].strip()
    if not _METRIC.fullmatch(name):
        raise ValueError(f"{name!r} is no metric's name; use letters, digits, _ . / - and *")
    pattern = re.compile(".*".join(map(re.escape, re.split(r"\*+", name))))
    if sign == "is":
        if operand.split() != _NOT_FINITE.split():
            raise ValueError(f"'is' is followed by {operand!r}; write {name} is not finite")
        return Rule(text, name, pattern, lambda value: not math.isfinite(value))
    if sign not in _OPERATORS:
        raise ValueError(f"{sign!r} is no comparison; {_REMEDY}")
    if not _NUMBER.fullmatch(operand) or not math.isfinite(float(operand.replace("_", ""))):
        raise ValueError(f"{operand!r} is no finite number; {_REMEDY}")
    compare, bound = _OPERATORS[sign], float(operand.replace("_", ""))
    return Rule(text, name, pattern, lambda value: compare(value, bound))


def check_rule(text: str) -> str:
    """`text`, if it is a rule; else ValueError."""
    parse_rule(text)
    return text


@dataclass(frozen=True)
class Alarm:
    """A rule that holds."""

    rule: str
    action: Action
    values: Mapping[str, float]  # of the metrics for which it holds

    def as_json(self) -> dict[str, object]:
        """What events.jsonl keeps of it; the values as text, for they may be NaN."""
        values = {metric: str(value) for metric, value in self.values.items()}
        return {"rule": self.rule, "action": self.action, "values": values}

    def __str__(self) -> str:
        named = [f"{metric} is {value:g}" for metric, value in self.values.items()]
        others = f" and {len(named) - 3} more" if len(named) > 3 else ""
        return f"alert {self.rule}: {', '.join(named[:3])}{others}"


class Watch:
    """Holds every row of metrics against the rules, and remembers which of them hold."""

    def __init__(self, rules: Mapping[str, Action]):
        self._rules = [(parse_rule(text), action) for text, action in rules.items()]
        self._holding: dict[str, dict[str, float]] = {rule.text: {} for rule, _ in self._rules}

    def judge(self, metrics: Metrics) -> list[Alarm]:
        """What this row sets off: rules that begin to hold. One that held before for another metric, or for
        this one, says nothing until it has held for none.
        """
        alarms = []
        for rule, action in self._rules:
            held = bool(self._holding[rule.text])
            holding = self._holding[rule.text] = self._holding_with(rule, metrics)
            if holding and not held:
                alarms.append(Alarm(rule.text, action, dict(holding)))
        return alarms

    def changes(self, metrics: Metrics) -> bool:
        """Whether a row of these metrics would make a rule begin to hold, or end to. Without such a row, what
        is remembered is what the rows so far say.
        """
        return any(
            bool(self._holding_with(rule, metrics)) != bool(self._holding[rule.text])
            for rule, _ in self._rules
        )

    def _holding_with(self, rule: Rule, metrics: Metrics) -> dict[str, float]:
        seen = {metric: value for metric, value in metrics.items() if rule.metric.fullmatch(metric)}
        others = {metric: v for metric, v in self._holding[rule.text].items() if metric not in seen}
        return others | {metric: v for metric, v in seen.items() if v is not None and rule.holds(v)}

    def holding(self, action: Action) -> list[Alarm]:
        """The rules with this action that hold by the rows so far."""
        return [
            Alarm(rule.text, action, dict(self._holding[rule.text]))
            for rule, own in self._rules
            if own == action and self._holding[rule.text]
        ]
