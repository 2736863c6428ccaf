"""The winner's values for another run: carried over, scaled by a rule that has a source, or left out.

A sweep is done where runs are cheap. What it finds holds at the next size as far as somebody has shown it:
each line says why, and what nobody has shown is not written. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.yamlcore import dump_yaml

# DeepSeek LLM (arXiv:2401.02954), section 3.1: the best rate is 0.3118 C^-0.125 for a run of C FLOPs, where
# the batch grows with C too.
_RATE_EXPONENT = -0.125
_DIGITS = 3

_RATE, _WARMUP = "optimizer.lr", "schedule.warmup_steps"
_CARRIED = (
    "optimizer.", "schedule.", "divergence.", "train.label_smoothing", "train.z_loss", "data.document_mask",
    "model.initializer_range", "model.rope_theta", "model.rms_norm_eps", "model.tie_word_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One key of the winner in another run."""

    key: str
    value: Any  # None: there is none to give
    why: str

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def as_found(values: Mapping[str, Any]) -> list[Line]:
    """The winner's values as they are."""
    return [Line(key, value, "") for key, value in values.items()]


def scaled(values: Mapping[str, Any], small: RunConfig, large: RunConfig) -> list[Line]:
    """`values`, which were best in `small`, for `large`."""
    lines = []
    for key, value in values.items():
        if key == _RATE:
            lines.append(_scale_rate(float(value), small, large))
        elif key == _WARMUP:
            steps = round(value * large.steps / small.steps)
            lines.append(Line(key, steps, f"the same share of the steps: {value} of {small.steps:,}"))
        elif key.startswith(_CARRIED):
            lines.append(Line(key, value, "carried over"))
        else:
            lines.append(Line(key, None, f"{_show(value)} was best there; that says nothing of another size"))
    return lines


def _scale_rate(rate: float, small: RunConfig, large: RunConfig) -> Line:
    base = small.model.mup_base_width or small.model.hidden_size
    if large.model.mup_base_width == base:
        return Line(
            _RATE, rate, f"carried over by muP from width {base} (Yang et al. 2022, arXiv:2203.03466)"
        )
    if large.model.mup_base_width is not None or small.model.mup_base_width is not None:
        why = f"{rate:g} was found for the width {base}: set model.mup_base_width: {base}, and it holds there"
        return Line(_RATE, None, why)
    ratio = _flops(large) / _flops(small)
    value = float(f"{rate * ratio**_RATE_EXPONENT:.{_DIGITS}g}")
    why = (
        f"{rate:g} x {ratio:.3g}^{_RATE_EXPONENT} for {ratio:.3g} times the FLOPs, where the batch grows too "
        "(DeepSeek LLM, arXiv:2401.02954)"
    )
    return Line(_RATE, value, why)


def _flops(config: RunConfig) -> float:
    model = Architecture.from_config(config.model)
    return float(config.steps) * config.tokens_per_step * model.flops_per_token(config.data.sequence_length)


def yaml_lines(lines: Sequence[Line]) -> list[str]:
    """The keys as they stand in a run's file, with their reasons; what has no value is a comment."""
    found: list[str] = []
    sections: dict[str, list[Line]] = {}
    for line in lines:
        sections.setdefault(line.key.partition(".")[0] if "." in line.key else "", []).append(line)
    for section, members in sections.items():
        given = [one for one in members if one.value is not None and _is_plain(one.key)]
        if section and given:
            found.append(f"{section}:")
        for one in given:
            text = f"{_show_key(one)}" + (f"  # {one.why}" if one.why else "")
            found.append(f"  {text}" if section else text)
        for one in members:
            if one.value is None:
                found.append(f"# {one.key}: {one.why}")
            elif not _is_plain(one.key):
                found.append(f"# on the command line: {one.key}={_show(one.value)}")
    return found


def _is_plain(key: str) -> bool:
    return key.count(".") <= 1 and "[" not in key


def _show_key(line: Line) -> str:
    name = line.key.rpartition(".")[2]
    if isinstance(line.value, list | tuple | dict):
        return f"{name}: {_show(line.value)}"
    return dump_yaml({name: line.value}).rstrip("\n")


def _show(value: Any) -> str:
    return json.dumps(value)
