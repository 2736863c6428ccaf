"""What is kept of a step that was skipped or clipped: `spikes/step-00000123.json` in the run directory
(`step-00000123-rollback-1.json` where the step came again after a rollback).

The batch is found again from the loader's position before the step, so a step that is good costs nothing.
`albor inspect-spike` shows these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from albor.config import RunConfig
from albor.data.loader import Loader, Sample
from albor.data.prepare import PreparedData
from albor.data.sources import describe
from albor.durable import make_directory, replace_file
from albor.spikes import FORMAT, SPIKES, spike_name
from albor.strictjson import to_json
from albor.train.guard import GuardState, spread
from albor.train.step import StepResult


def describe_spike(
    config: RunConfig,
    data: PreparedData,
    loader: Loader,
    position: Mapping[str, Any],
    before: GuardState,
    step: int,
    result: StepResult,
    action: str,
) -> dict[str, Any]:
    """All that is kept of `step`; `position` and `before` are the loader's and the guard's state as it began.

    JSON without NaN or infinity: such numbers are the texts "nan", "inf" and "-inf".
    """
    train = config.train
    count = train.micro_batch_size * train.gradient_accumulation_steps
    return {
        "format": FORMAT,
        "step": step,
        "verdict": result.verdict.kind,
        "action": action,
        "loss": _number(result.loss),
        "grad_norm": _number(result.grad_norm),
        "gradient_norms": {group: _number(norm) for group, norm in result.gradient_norms.items()},
        "lr": result.lr,
        "loss_scale": before.loss_scale,
        "window": {
            "steps": len(before.losses),
            "loss": _compare(result.loss, before.losses),
            "grad_norm": _compare(result.grad_norm, before.norms),
        },
        "skipped_before": list(before.skips),
        "rollbacks": before.rollbacks,
        "samples": [position["samples"], position["samples"] + count],
        "sequences": [
            _describe_sample(config, data, sample, number)
            for number, sample in enumerate(loader.samples_after(position, count), position["samples"])
        ],
    }


def write_spike(directory: Path, spike: Mapping[str, Any], keep: int) -> Path:
    """Writes the file of a step whole or not at all, and removes the oldest beyond `keep`. Raises OSError."""
    spikes = directory / SPIKES
    make_directory(spikes)
    for litter in spikes.glob(".*.tmp-*"):  # of a process that died; nobody else writes here
        litter.unlink()
    path = spikes / spike_name(spike["step"], spike["rollbacks"])
    replace_file(path, to_json(dict(spike)))
    # By age: after a rollback the newest may have a lower step than those before it.
    others = sorted((p for p in spikes.glob("step-*.json") if p != path), key=_age)
    for old in others[: max(0, len(others) - keep + 1)]:
        with suppress(FileNotFoundError):
            old.unlink()
    return path


def _age(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name


def _describe_sample(config: RunConfig, data: PreparedData, sample: Sample, number: int) -> dict[str, Any]:
    """One sequence: the tokens that the model read and, shifted by one, was to predict."""
    stream, end = data.train[sample.source], sample.start + config.data.sequence_length + 1
    offsets = stream.document_offsets
    first, last = np.searchsorted(offsets, [sample.start, end - 1], side="right") - 1
    documents = [
        {
            "document": document,
            "tokens": [
                max(sample.start, int(offsets[document])) - int(offsets[document]),
                min(end, int(offsets[document + 1])) - int(offsets[document]),
            ],
        }
        for document in range(int(first), int(last) + 1)
        if offsets[document] < offsets[document + 1]
    ]
    return {
        "sample": number,
        "source": sample.source,
        "origin": describe(config.data.sources[sample.source]),
        "tokens": [sample.start, end],
        "documents": documents,  # counted in their source, those held out left aside
        "text": data.tokenizer.decode(stream.read(sample.start, end - sample.start)),
    }


def _compare(value: float, window: tuple[float, ...]) -> dict[str, float | str] | None:
    if not window:
        return None
    mean, deviation = spread(window)
    zscore = (value - mean) / deviation if deviation else math.nan
    return {"mean": mean, "deviation": deviation, "zscore": _number(zscore)}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
