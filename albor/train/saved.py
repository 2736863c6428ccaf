"""What a checkpoint's state says of a run, held against its own manifest, configuration and tokenizer.

The hashes find damage, and vouch for whatever was written with them. A state that contradicts what stands
beside it was written by nobody's run, and is damage too: an older checkpoint is taken instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from albor.config import DivergenceConfig
from albor.configfile import load_config
from albor.data.tokenizer import Tokenizer
from albor.errors import DamagedCheckpoint
from albor.manifest import MANIFEST, STATE, Manifest
from albor.strictjson import read_bounded
from albor.train.guard import GuardState
from albor.train.step import TrainState

CONFIG = "config.yaml"  # a file of a checkpoint


class Saved(NamedTuple):
    """What a checkpoint holds beside its tensors."""

    position: dict[str, Any]  # the loader's
    state: TrainState
    best_validation_loss: float | None


def read_saved(saved: Mapping[str, Any], source: Path, policy: DivergenceConfig) -> Saved:
    """The state `saved` of the verified checkpoint `source`, of which as much is kept as `policy` remembers.

    Raises DamagedCheckpoint for anything that `Session.saved_state` does not give at that step.
    """
    config = load_config(source / CONFIG)
    try:
        state, position, best = TrainState.from_json(saved), saved["loader"], saved["best_validation_loss"]
        step = Manifest.from_bytes(read_bounded(source / MANIFEST)).step
        if state.step != step:
            raise ValueError(f"it is of step {state.step}, and the checkpoint of step {step}")
        if saved["tokens"] != step * config.tokens_per_step:
            raise ValueError(f"{saved['tokens']} tokens are not those of {step} steps")
        if not (best is None or type(best) is float):
            raise ValueError("best_validation_loss is no number")
        samples = _samples(position, len(config.data.sources))
        batch = config.train.micro_batch_size * config.train.gradient_accumulation_steps
        rollbacks = state.guard.rollbacks
        fits = samples == step * batch if rollbacks == 0 else step * batch <= samples < 2**63
        if not fits:
            raise ValueError(f"{samples} samples are not those of {step} steps and {rollbacks} rollbacks")
        _check_guard(state.guard, step, samples // batch, config.divergence)
    except (KeyError, ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{source / STATE}: it is not the state of a run: {error}") from error
    return Saved(position, replace(state, guard=_within(state.guard, step, policy)), best)


def check_tokenizer(source: Path, tokenizer: Tokenizer) -> None:
    """The checkpoint's tokenizer is `tokenizer`, where its data are known to be the run's.

    Raises DamagedCheckpoint.
    """
    path = source / tokenizer.file_name
    try:
        found = path.read_bytes()
    except OSError as error:
        raise DamagedCheckpoint(f"{path}: {error.strerror}") from error
    if found != tokenizer.model:
        raise DamagedCheckpoint(f"{path}: it is not the tokenizer of the data that the checkpoint names")


def _samples(position: Any, sources: int) -> int:
    """How many samples a loader's position stands behind."""
    if not isinstance(position, dict) or not {"per_source", "samples"} <= position.keys():
        raise ValueError("the loader's position is none")
    drawn, samples = position["per_source"], position["samples"]
    counts = isinstance(drawn, list) and all(type(n) is int and n >= 0 for n in drawn)
    if not counts or type(samples) is not int or len(drawn) != sources or samples != sum(drawn):
        raise ValueError(f"the loader's position is not one in {sources} sources")
    return samples


def _check_guard(guard: GuardState, step: int, taken: int, policy: DivergenceConfig) -> None:
    """Raises ValueError for what no run has after `step` steps, `taken` with those behind its rollbacks."""
    ascending = list(guard.skips) == sorted(set(guard.skips))
    if not ascending or not all(step - policy.window_steps < skip <= step for skip in guard.skips):
        raise ValueError(f"steps were skipped that are none of the last {policy.window_steps}")
    if len(guard.losses) != len(guard.norms) or len(guard.losses) > min(step, policy.spike_window):
        raise ValueError("the guard's windows are longer than the configuration's")
    if max(guard.good_steps, guard.anchor or 0) > step:
        raise ValueError("the guard counts more steps than the run has")
    if max(guard.rollbacks, guard.skipped + guard.spikes) > taken:
        raise ValueError("the guard counts more events than there were steps")


def _within(guard: GuardState, step: int, policy: DivergenceConfig) -> GuardState:
    """With windows as short as `policy`, which may have changed, has them."""
    size = policy.spike_window
    return replace(
        guard,
        skips=tuple(skip for skip in guard.skips if skip > step - policy.window_steps),
        losses=guard.losses[-size:],
        norms=guard.norms[-size:],
    )
