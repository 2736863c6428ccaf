"""What the tests of the benchmark share: a tiny configuration, and a calibration that takes no time."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import make_config

from albor.bench import calibrate as calibration_module
from albor.config import RunConfig


def tiny(**keys: Any) -> RunConfig:
    """A run of fp32 on sequences of 16 tokens, with `keys` changed."""
    shape = {"max_position_embeddings": 16, "rope_theta": 300.0}  # no system's default
    return make_config(gradient_accumulation_steps=2, lr=3e-3, precision="fp32", **shape | keys)


def steps_of(events: list[dict[str, Any]], key: str) -> list[Any]:
    """What each step of a peer said under `key`."""
    return [event[key] for event in events if event["event"] == "step"]


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibrations on the CPU measure next to nothing."""
    monkeypatch.setattr(calibration_module, "_SECONDS", {"cpu": 1e-4})
    monkeypatch.setattr(calibration_module, "_REPEATS", 2)
    monkeypatch.setattr(calibration_module, "_TRAFFIC", {"cpu": [2**12, 2**16]})
    monkeypatch.setattr(calibration_module, "_LINK_BYTES", {"cpu": 2**14})
