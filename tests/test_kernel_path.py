"""A GPU's trainer on the CPU: the plan of a CUDA run, and the kernels in Triton's interpreter. What this
cannot show is in test_gpu.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    forward_backward,
    gradient_norm,
    gradients_of,
    make_batches,
    make_config,
    make_trainer,
    relative_error,
    trainer_over,
    weights_of,
)
from kernel_cases import DEVICE
from late_streams import LateStreams

from albor.config import RunConfig
from albor.memory import plan
from albor.memory.arena import Arena
from albor.ops import UpdateScalars, make_ops
from albor.train import step
from albor.train.step import Trainer, TrainState
from albor.train.streams import Graphs

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py runs the kernels themselves")

# Small, for the interpreter takes 2 ms per program; the sequence is no multiple of a block.
TINY = {"sequence_length": 11, "num_hidden_layers": 3, "gradient_accumulation_steps": 2, "vocab_size": 29}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "NORM_PARTIALS", 3)
    monkeypatch.setattr(plan, "SUM_PARTIALS", 5)


def kernel_trainer(config: RunConfig, accumulator: Any, *, poison: bool = True) -> Trainer:
    return trainer_over(config, plan.plan_training(config, "cuda", "float32", accumulator), poison=poison)


def train(trainer: Trainer, steps: int) -> list[tuple[float, float]]:
    """Loss and norm of each step."""
    state, seen = TrainState(), []
    for number in range(steps):
        result, state = trainer.step(make_batches(trainer.config, seed=number, ignored=0.2), state)
        seen.append((result.loss, result.grad_norm))
    return seen


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tie_word_embeddings": False, "recompute": "block", "head_chunk_tokens": 8},
        {"recompute": "cheap", "num_key_value_heads": 4, "document_mask": True},
        {"label_smoothing": 0.1, "z_loss": 1e-3, "num_key_value_heads": 1, "num_hidden_layers": 1},
    ],
    ids=["plain", "untied-block", "documents", "loss-terms"],
)
def test_loss_and_gradients_are_the_torch_paths(keys: dict, accumulator: str):
    """Out of poisoned buffers, every parameter's gradient."""
    config = make_config(**TINY | keys)
    kernels, torch_path = kernel_trainer(config, accumulator), make_trainer(config)
    batches = make_batches(config, ignored=0.2)
    losses = [forward_backward(trainer, batches) for trainer in (kernels, torch_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert gradient_norm(kernels) == pytest.approx(gradient_norm(torch_path), rel=1e-5)
    ours, theirs = gradients_of(kernels), gradients_of(torch_path)
    assert {name for name in ours if not relative_error(ours[name], theirs[name]) < 2e-5} == set()


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_training_is_the_torch_paths(accumulator: str):
    config = make_config(**TINY, weight_decay=0.2, lr=0.01)
    # Sums come back as soon as they can, and poison comes when the trainer's own thread enters a phase.
    kernels = kernel_trainer(config, accumulator, poison=accumulator == "gpu")
    torch_path = make_trainer(config, "float32")
    np.testing.assert_allclose(train(kernels, 3), train(torch_path, 3), rtol=1e-5)
    ours, theirs = weights_of(kernels), weights_of(torch_path)
    assert {name for name in ours if not relative_error(ours[name], theirs[name]) < 1e-4} == set()


@pytest.mark.parametrize("micro_batch_size", [1, 2], ids=["two-slots", "early-return"])
def test_slow_copies_change_no_bit(micro_batch_size: int, monkeypatch: pytest.MonkeyPatch):
    """Gradients that leave, and sums that come back, while the device is long at something else: the next
    micro-batch, the next step, an evaluation. The second step's norm is infinite, and no update follows.
    """
    config = make_config(**TINY | {"micro_batch_size": micro_batch_size})

    def losses(delay: float | None) -> list[Any]:
        if delay is not None:
            monkeypatch.setattr(step, "make_streams", lambda _: (LateStreams(delay), Graphs(None)))
        trainer = kernel_trainer(config, "cpu", poison=False)
        early = "gradients.returned.blocks.00" in trainer.arena
        assert early is (micro_batch_size == 2)
        state, seen = TrainState(), []
        for number in range(3):
            batches = make_batches(config, seed=number, ignored=0.2)
            sums = trainer.accumulate(batches, state)
            if number == 1:
                sums = replace(sums, grad_norm=math.inf)
            result, state = trainer.update(sums, state)
            assert result.updated is (number != 1)
            trainer.input.load(*batches[0], train=False)
            io = [trainer.arena[f"io.{name}"] for name in ("tokens", "targets", "losses")]
            trainer.model.losses(*io)
            seen += [result.loss, sums.grad_norm, float(io[2].sum())]
        return seen

    at_once = losses(None)
    assert losses(0.08) == at_once


def test_rounded_state_is_updated_with_the_same_bits():
    """Weights and moments in bf16: kernel and torch path draw the same random numbers."""
    config = make_config(state_dtype="bf16", precision="bf16")
    results = []
    for device in ("cpu", "cuda"):
        operations = make_ops(Arena(plan.plan_training(config, device, "bfloat16", "cpu")))
        generator = torch.Generator().manual_seed(1)
        weights, first = (torch.randn(1003, generator=generator).bfloat16() for _ in range(2))
        gradient = torch.randn(1003, generator=generator)
        state = (weights, first, first.square())
        for update in range(1, 4):
            operations.begin_update(UpdateScalars(1e-3, 0.5, update, seed=77 + update), (0.9, 0.95))
            operations.adamw(
                weights, None, gradient, *state[1:],
                decayed=800, start=5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
            )  # fmt: skip
        results.append(state)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
