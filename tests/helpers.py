"""What several tests build: small configurations, poisoned trainers, batches, and the oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from albor.architecture import IGNORED_TARGET, Architecture
from albor.canary.reference import Reference, unpacked
from albor.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, ScheduleConfig, TrainConfig
from albor.memory.arena import Arena
from albor.memory.plan import MemoryPlan, plan_training
from albor.model.parameters import initialise, master_weights, named_tensors
from albor.train.step import Batch, Trainer

torch.set_num_threads(1)  # everything here is small: a second thread would only wait

SECTIONS = {
    "model": ModelConfig,
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "schedule": ScheduleConfig,
    "train": TrainConfig,
}
END_OF_DOCUMENT = 5  # any token may be it
SMALL = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
    "initializer_range": 0.2,  # large, so that every nonlinearity and every gradient matters
    "sequence_length": 16,
    "micro_batch_size": 2,
    "max_steps": 20,
    "warmup_steps": 0,
}


def make_config(*, seed: int = 1337, **keys: Any) -> RunConfig:
    """SMALL with `keys` changed; each key goes to the first section that has it."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for key, value in (SMALL | keys).items():
        name = next(name for name, section in SECTIONS.items() if key in section.model_fields)
        sections[name][key] = value
    return RunConfig.model_validate({"name": "test", "seed": seed, **sections})


def make_trainer(
    config: RunConfig, dtype: str = "float64", *, poison: bool = True, accumulator: Any = None
) -> Trainer:
    """A CPU trainer that computes in `dtype`, with initial weights; any other buffer is NaN until written."""
    return trainer_over(config, plan_training(config, "cpu", dtype, accumulator), poison=poison)


def trainer_over(config: RunConfig, plan: MemoryPlan, *, poison: bool = True) -> Trainer:
    """`make_trainer` over a plan of the caller's own."""
    arena = Arena(plan, poison=poison)
    initialise(arena, Architecture.from_config(config.model), config.seed)
    return Trainer(config, arena, END_OF_DOCUMENT)


def make_batches(
    config: RunConfig, count: int | None = None, *, seed: int = 0, ignored: float = 0.0
) -> list[Batch]:
    """Random micro-batches, by default one step's; a target is ignored with probability `ignored`."""
    rng = np.random.default_rng(seed)
    shape = (config.train.micro_batch_size, config.data.sequence_length)
    batches = []
    for _ in range(config.train.gradient_accumulation_steps if count is None else count):
        tokens, targets = rng.integers(config.model.vocab_size, size=(2, *shape))
        batches.append((tokens, np.where(rng.random(shape) < ignored, IGNORED_TARGET, targets)))
    return batches


def spread_norms(trainer: Trainer) -> None:
    """Moves the norms' weights away from 1, where a forgotten or doubled multiplication would not show."""
    generator = torch.Generator().manual_seed(7)
    master, weights = master_weights(trainer.arena), trainer.arena["weights"]
    for name, tensor in named_tensors(master, trainer.architecture).items():
        if name.endswith("norm"):
            tensor.copy_(1 + 0.3 * torch.randn(tensor.shape, generator=generator))
    if master is not weights:
        weights.copy_(master)


def make_reference(trainer: Trainer, dtype: torch.dtype = torch.float64) -> Reference:
    """The oracle with `trainer`'s weights."""
    reference = Reference(trainer.architecture).to(dtype)
    weights = unpacked(weights_of(trainer), trainer.architecture)
    reference.load_state_dict(weights, strict=not trainer.architecture.tie_word_embeddings)
    return reference


def reference_loss(reference: torch.nn.Module, batches: Sequence[Batch]) -> torch.Tensor:
    """The mean over all target tokens of all `batches` at once."""
    tokens, targets = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*batches, strict=True))
    return reference.loss(tokens, targets)


def forward_backward(trainer: Trainer, batches: Sequence[Batch]) -> float:
    """The mean loss of `batches`; its gradient is then in the accumulator. No weight moves."""
    counted = sum(int((targets != IGNORED_TARGET).sum()) for _, targets in batches)
    trainer.accumulator.begin(len(batches))
    with trainer.streams.computing():
        trainer.arena["io.scale"].fill_(1.0 / counted)
        trainer.arena["io.results"].zero_()
        for batch in batches:
            trainer.input.load(*batch)
            trainer._micro_batch()
            trainer.accumulator.end_micro_batch()
    return float(trainer.arena["io.results"][0]) / counted


def gradient_norm(trainer: Trainer) -> float:
    """The L2 norm of the summed gradient over all parameters."""
    squares = trainer.accumulator.squared_norms()
    return math.sqrt(sum(trainer.arena["io.results"][1:].tolist() if squares is None else squares))


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The optimizer's weights by parameter name, as views."""
    return named_tensors(master_weights(trainer.arena), trainer.architecture)


def gradients_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The summed gradients by parameter name, as views."""
    return named_tensors(trainer.arena["gradients.accumulator"], trainer.architecture)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of two tensors, in the L2 norm; NaN where either has a NaN."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())
