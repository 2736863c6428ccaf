"""One training step, from tokens to updated weights. If you read one file of albor, read this one.

Everything here works in buffers of the arena (`albor.memory.plan` lists them); nothing is allocated, and
nothing is read back to the host except the loss and the gradient norm, once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch

from albor.architecture import IGNORED_TARGET, Architecture, block_name
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.model.parameters import block_tensors
from albor.model.transformer import Transformer
from albor.train.accumulator import PerBlockGradientAccumulator
from albor.train.guard import GuardState, judge
from albor.train.optimizer import AdamW
from albor.train.schedule import learning_rate

Batch = tuple[np.ndarray, np.ndarray]  # tokens and targets, (B, T) each


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With the weights and the moments, all that its next step depends on."""

    step: int = 0  # steps done, skipped ones included: the schedule and the data go by this
    updates: int = 0  # steps that changed the weights: the bias correction goes by this
    guard: GuardState = field(default_factory=GuardState)


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the mean over the global batch's target tokens, in nats."""

    loss: float
    grad_norm: float  # before clipping
    lr: float
    target_tokens: int
    updated: bool  # False: loss or norm was not finite, and the weights are as they were


class Trainer:
    """A model, its gradient accumulator and its optimizer over one arena."""

    def __init__(self, config: RunConfig, arena: Arena):
        self.config, self.arena = config, arena
        self.architecture = Architecture.from_config(config.model)
        self.model = Transformer(
            self.architecture, arena, config.data.sequence_length, config.train.recompute
        )
        self.accumulator = PerBlockGradientAccumulator(self.architecture, arena)
        self.optimizer = AdamW(config.optimizer, self.architecture, arena)
        self.layers = self.architecture.num_hidden_layers
        # Two gradient buffers for all blocks, used in turn; a block sees its slot under its own tensor names.
        self._slots = [arena[f"gradients.block.{slot}"] for slot in range(min(2, self.layers))]
        starts = {block.name: block.start for block in self.architecture.blocks}
        self._d_weights = [
            block_tensors(self._slots[layer % 2], self.architecture, layer, starts[block_name(layer)])
            for layer in range(self.layers)
        ]

    def step(self, batches: Iterable[Batch], state: TrainState) -> tuple[StepResult, TrainState]:
        """One optimizer step over `gradient_accumulation_steps` micro-batches."""
        config, arena = self.config, self.arena
        # The head divides by the tokens of a full batch; what is padding is made up for at the end, when it
        # is known.
        scale = state.guard.loss_scale / config.tokens_per_step
        target_tokens = 0
        self.accumulator.begin()
        arena["io.loss_sum"].zero_()
        for batch in batches:
            target_tokens += self._load(batch)
            self._forward_backward(scale)
            self.accumulator.end_micro_batch()

        arena.enter("clip")
        loss = float(arena["io.loss_sum"]) / max(target_tokens, 1)
        # From here to the true gradient: the mean over target tokens, without the loss scale.
        gradient_scale = config.tokens_per_step / max(target_tokens, 1) / state.guard.loss_scale
        norm = self.accumulator.norm() * gradient_scale
        lr = learning_rate(state.step + 1, config.steps, config.optimizer.lr, config.schedule)
        updates, guard = judge(state.guard, loss, norm, arena.plan.compute_dtype)
        if updates:
            arena.enter("optimize")
            clip = clip_factor(norm, config.optimizer.grad_clip)
            self.optimizer.update(self.accumulator, lr, state.updates + 1, gradient_scale * clip)
        result = StepResult(loss, norm, lr, target_tokens, updates)
        return result, TrainState(state.step + 1, state.updates + int(updates), guard)

    def _forward_backward(self, scale: float) -> None:
        """One micro-batch: adds its loss to io.loss_sum and its gradients to the accumulator."""
        arena, model, accumulator = self.arena, self.model, self.accumulator
        assert model.gradients is not None
        d_x = arena["backward.d_x"]

        arena.enter("embed")
        residual, delta = arena["blocks.00.input"], None
        model.embedding.forward(arena["io.tokens"], residual)
        for layer, block in enumerate(model.blocks):
            arena.enter(f"forward.{layer:02d}")
            residual, delta = block.forward(residual, delta)
        assert delta is not None

        arena.enter("head")
        model.head.forward_backward(residual, delta, arena["io.targets"], arena["io.losses"], d_x, scale)
        arena["io.loss_sum"].add_(arena["io.losses"].sum(dtype=torch.float64))
        accumulator.add("head", arena["gradients.head"])

        for layer in reversed(range(self.layers)):
            arena.enter(f"backward.{layer:02d}")
            model.blocks[layer].backward(d_x, model.gradients, self._d_weights[layer])
            accumulator.add(block_name(layer), self._slots[layer % 2])

        arena.enter("embed_backward")
        d_embedding = arena["gradients.embedding"]
        if not self.architecture.tie_word_embeddings:  # a tied one holds the head's share
            d_embedding.zero_()
        parameter = self.architecture.parameters[0]
        model.embedding.backward(
            d_x,
            arena["io.unique_tokens"],
            arena["io.unique_index"],
            d_embedding[: parameter.size].view(parameter.shape),
            arena["backward.d_embedded"],
        )
        accumulator.add("embedding", d_embedding)

    def _load(self, batch: Batch) -> int:
        """Puts a micro-batch into the io buffers; returns the number of its target tokens."""
        tokens, targets = (part.reshape(-1) for part in batch)
        # Which tokens are the same one is known here, on the host: the embedding's backward sums by it.
        unique, index = np.unique(tokens, return_inverse=True)
        padded = np.zeros_like(tokens)
        padded[: unique.size] = unique
        for name, values in (
            ("tokens", tokens),
            ("targets", targets),
            ("unique_tokens", padded),
            ("unique_index", index),
        ):
            self.arena[f"io.{name}"].copy_(torch.from_numpy(values))
        return int(np.count_nonzero(targets != IGNORED_TARGET))


def clip_factor(norm: float, largest: float) -> float:
    """What the gradient is multiplied by so that its norm is at most `largest`; 0 means no limit.

    The same as `torch.nn.utils.clip_grad_norm_`, its 1e-6 included.
    """
    return min(1.0, largest / (norm + 1e-6)) if largest > 0 else 1.0
