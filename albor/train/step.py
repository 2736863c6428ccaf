"""One training step, from tokens to updated weights. If you read one file of albor, read this one.

Everything here works in buffers of the arena (`albor.memory.plan` lists them); nothing is allocated, and
nothing is read back to the host except the loss and the gradient norm, once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from albor import faults
from albor.architecture import Architecture, Segment, block_name
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.model.batch import BatchInput
from albor.model.parameters import block_tensors, named_tensors
from albor.model.transformer import Transformer
from albor.ops import UpdateScalars
from albor.seeds import derive_seed
from albor.train.accumulator import DeviceSums, make_accumulator
from albor.train.guard import GuardState, Verdict, judge
from albor.train.optimizer import AdamW
from albor.train.schedule import learning_rate
from albor.train.streams import Event, make_streams

Batch = tuple[np.ndarray, np.ndarray]  # tokens and targets, (B, T) each


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. With the weights and the moments, all that its next step depends on."""

    step: int = 0  # steps done, skipped ones included: the schedule and the data go by this
    updates: int = 0  # steps that changed the weights: the bias correction goes by this
    guard: GuardState = field(default_factory=GuardState)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return {"step": self.step, "updates": self.updates, "guard": self.guard.as_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainState:
        """The state in a checkpoint. Raises KeyError or ValueError for anything but what `as_json` gives."""
        step, updates = value["step"], value["updates"]
        if type(step) is not int or type(updates) is not int or not 0 <= updates <= step:
            raise ValueError("step and updates are no counts of a run")
        return cls(step, updates, GuardState.from_json(value["guard"]))


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is the mean over the global batch's target tokens, in nats."""

    loss: float
    grad_norm: float  # before clipping
    gradient_norms: Mapping[str, float]  # the same of its parts, see `gradient_norms`
    lr: float
    target_tokens: int
    verdict: Verdict

    @property
    def updated(self) -> bool:
        """False: the weights are as they were."""
        return self.verdict.updates


@dataclass(frozen=True)
class Accumulated:
    """What a step's micro-batches came to. The gradient itself is in the accumulator."""

    loss: float  # mean over the global batch's target tokens, in nats
    grad_norm: float  # before clipping
    gradient_norms: Mapping[str, float]  # see the function of that name
    gradient_scale: float  # the summed gradient times this is the true one
    target_tokens: int


class Trainer:
    """A model, its gradient accumulator and its optimizer over one arena."""

    def __init__(self, config: RunConfig, arena: Arena, end_of_document: int | None = None):
        """`end_of_document` is the token that ends a document; `data.document_mask` needs it."""
        self.config, self.arena = config, arena
        self.architecture = Architecture.from_config(config.model)
        terms = {"label_smoothing": config.train.label_smoothing, "z_loss": config.train.z_loss}
        self.model = Transformer(
            self.architecture, arena, config.data.sequence_length, config.train.recompute, terms
        )
        self.input = BatchInput(arena, self.model.ops, end_of_document)
        self.streams, self._graphs = make_streams(arena.device)
        self.accumulator = make_accumulator(self.architecture, arena, self.model.ops, self.streams)
        self.optimizer = AdamW(config.optimizer, self.architecture, arena, self.model.ops)
        self.layers = self.architecture.num_hidden_layers
        self._held_by: list[Event] = []  # what the next update waits for
        # A block sees its gradient buffer, which may be another's too, under its own tensor names.
        starts = {block.name: block.start for block in self.architecture.blocks}
        buffer = self.accumulator.buffer
        self._d_blocks = [
            block_tensors(buffer(block_name(i)), self.architecture, i, starts[block_name(i)])
            for i in range(self.layers)
        ]
        self._d_head = self.model.head.gradient_views(buffer("head"), buffer("embedding"))
        table = self.architecture.parameters[0]
        self._d_embedding = buffer("embedding")[: table.size].view(table.shape)
        # The io buffers have room for an evaluation's batch too, which may be larger.
        rows = config.train.micro_batch_size * config.data.sequence_length
        self._tokens, self._targets, self._losses = (
            arena[f"io.{name}"][:rows] for name in ("tokens", "targets", "losses")
        )
        self._index = {
            name: arena[f"io.{name}"] for name in self.model.ops.token_index(np.zeros(1, np.int64))
        }

    def step(self, batches: Iterable[Batch], state: TrainState) -> tuple[StepResult, TrainState]:
        """One optimizer step over `gradient_accumulation_steps` micro-batches."""
        faults.reach("step.begin", state.step + 1)
        outcome = self.update(self.accumulate(batches, state), state)
        faults.reach("step.updated", state.step + 1)
        return outcome

    def accumulate(self, batches: Iterable[Batch], state: TrainState) -> Accumulated:
        """Loss and gradient of the global batch. No weight moves."""
        config, arena = self.config, self.arena
        target_tokens = 0
        self.accumulator.begin(config.train.gradient_accumulation_steps)
        with self.streams.computing():
            # The head divides by the tokens of a full batch; what is padding is made up for at the end, when
            # it is known.
            arena["io.scale"].fill_(state.guard.loss_scale / config.tokens_per_step)
            arena["io.results"].zero_()
            for batch in batches:
                target_tokens += self.input.load(*batch)
                self._micro_batch()
                self.accumulator.end_micro_batch()
                faults.reach("step.micro_batch", state.step + 1)
            arena.enter("clip")
            squares = self._squared_norms()
            loss_sum, *squares_on_device = self._read_results()
            self.accumulator.fetch()  # whether or not an update follows, the next forward uses that memory
        # From here to the true gradient: the mean over target tokens, without the loss scale.
        gradient_scale = config.tokens_per_step / max(target_tokens, 1) / state.guard.loss_scale
        norm, norms = gradient_norms(
            self.architecture.segments, squares_on_device if squares is None else squares, gradient_scale
        )
        sums = Accumulated(loss_sum / max(target_tokens, 1), norm, norms, gradient_scale, target_tokens)
        return _times(sums, faults.reach("step.accumulated", state.step + 1))

    def update(self, sums: Accumulated, state: TrainState) -> tuple[StepResult, TrainState]:
        """The weights' update by what was accumulated, unless the guard forbids it."""
        config, arena = self.config, self.arena
        lr = learning_rate(state.step + 1, config.steps, config.optimizer.lr, config.schedule)
        dtype = arena.plan.compute_dtype
        verdict, guard = judge(
            state.guard, state.step + 1, sums.loss, sums.grad_norm, config.divergence, dtype,
            has_targets=sums.target_tokens > 0,
        )  # fmt: skip
        if verdict.updates:
            arena.enter("optimize")
            clip = clip_factor(sums.grad_norm, config.optimizer.grad_clip)
            if sums.grad_norm > verdict.largest_norm:
                clip = min(clip, verdict.largest_norm / sums.grad_norm)
            number = state.updates + 1
            seed = derive_seed(config.seed, "stochastic rounding", number)
            with self.streams.computing():
                self.streams.compute_waits(self._held_by)
                self._held_by.clear()
                self.model.ops.begin_update(
                    UpdateScalars(lr, sums.gradient_scale * clip, number, seed), config.optimizer.betas
                )
                if self.accumulator.resident:
                    self._graphs.run("optimizer", lambda: self.optimizer.update(self.accumulator))
                else:
                    self.optimizer.update(self.accumulator)
        result = StepResult(sums.loss, sums.grad_norm, sums.gradient_norms, lr, sums.target_tokens, verdict)
        return result, TrainState(state.step + 1, state.updates + int(verdict.updates), guard)

    def update_after(self, events: Iterable[Event]) -> None:
        """The next update of the weights comes after these: copies of the state that are still being made."""
        self._held_by.extend(events)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The accumulated sums by parameter name, until `update`, which may overwrite them."""
        return named_tensors(self.accumulator.sums, self.architecture)

    def _micro_batch(self) -> None:
        """One micro-batch: adds its loss to io.results and its gradients to the accumulator.

        On a GPU each part is a CUDA graph; the whole is one where no gradient has to leave in between.
        """
        adds = self.accumulator.adds_itself
        if isinstance(self.accumulator, DeviceSums):
            self._graphs.run(("micro-batch", adds), lambda: self._forward_backward(adds))
        else:
            self._forward_backward(adds)

    def before_capture(self, call: Callable[[], None]) -> None:
        """Has `call` called once, before the first CUDA graph is captured: all kernels of a micro-batch have
        been used by then. Without a GPU that is never.
        """
        self._graphs.before_capture = call

    def _forward_backward(self, adds: bool) -> None:
        accumulator, run = self.accumulator, self._graphs.run
        run(("forward", adds), self._forward)
        accumulator.reserve("head")
        accumulator.reserve("embedding")  # which a tied head writes into first
        run(("head", adds), lambda: self._head(adds))
        accumulator.add("head")
        for layer in reversed(range(self.layers)):
            accumulator.reserve(block_name(layer))
            run(("backward", layer, adds), partial(self._backward, layer, adds))
            accumulator.add(block_name(layer))
        run(("embedding", adds), lambda: self._embedding_backward(adds))
        accumulator.add("embedding")

    def _forward(self) -> None:
        """Tokens to the residual stream after the last block, which the head finds as a pair to be added."""
        arena, model = self.arena, self.model
        arena.enter("embed")
        residual, delta = arena["blocks.00.input"], None
        model.embedding.forward(self._tokens, residual)
        for layer, block in enumerate(model.blocks):
            arena.enter(f"forward.{layer:02d}")
            residual, delta = block.forward(residual, delta)

    def _head(self, adds: bool) -> None:
        """Loss, and its gradient with respect to the residual stream, in backward.d_x."""
        arena, model = self.arena, self.model
        arena.enter("head")
        residual, delta = model.blocks[-1].output
        d_x, scale = arena["backward.d_x"], arena["io.scale"]
        model.head.forward_backward(
            residual, delta, self._targets, self._losses, d_x, self._d_head, scale, add=adds
        )
        model.ops.add_sum(self._losses, arena["io.results"][:1])

    def _backward(self, layer: int, adds: bool) -> None:
        """backward.d_x from a block's output to its input, and the gradient of its weights."""
        arena, model = self.arena, self.model
        assert model.gradients is not None
        arena.enter(f"backward.{layer:02d}")
        model.blocks[layer].backward(arena["backward.d_x"], model.gradients, self._d_blocks[layer], add=adds)

    def _embedding_backward(self, adds: bool) -> None:
        arena = self.arena
        arena.enter("embed_backward")
        if not self.architecture.tie_word_embeddings and not adds:  # a tied one holds the head's share
            self._d_embedding.zero_()
        self.model.embedding.backward(arena["backward.d_x"], self._index, self._d_embedding)

    def _squared_norms(self) -> list[float] | None:
        """Of the summed gradient's segments; None where they are on the device."""
        if not isinstance(self.accumulator, DeviceSums):
            return self.accumulator.squared_norms()
        self._graphs.run("norms", self.accumulator.squared_norms)
        return None

    def _read_results(self) -> list[float]:
        """Sum of losses, and the squared gradient norms that are on the device: the one time in a step that
        the host waits for it.
        """
        results, staged = self.arena["io.results"], self.arena.get("io.staged_results")
        if staged is not None and self.arena.device.type == "cuda":
            self.streams.host_waits(self.streams.copy_out(staged, results))
            results = staged
        read: list[float] = results.tolist()
        return read


def gradient_norms(
    segments: Sequence[Segment], squares: Sequence[float], scale: float
) -> tuple[float, dict[str, float]]:
    """The gradient's L2 norm, and those of the embedding, of every block, of each block's attention and MLP,
    and of the head: {"embedding": ..., "block_00": ..., "block_00/attention": ..., ..., "head": ...}.

    `squares` are the segments' squared norms, of a gradient of which `scale` times is the true one.
    """
    sums: dict[str, float] = {}
    for segment, square in zip(segments, squares, strict=True):
        whole = segment.group.partition("/")[0]
        for group in dict.fromkeys((whole, segment.group)):
            sums[group] = sums.get(group, 0.0) + square
    total = sum(squares)  # in the order of the segments, always
    return math.sqrt(total) * scale, {group: math.sqrt(square) * scale for group, square in sums.items()}


def _times(sums: Accumulated, factor: float) -> Accumulated:
    """As if the loss, and with it the gradient, were `factor` times what they are: a fault's doing."""
    if factor == 1.0:
        return sums
    return replace(
        sums,
        loss=sums.loss * factor,
        grad_norm=sums.grad_norm * factor,
        gradient_norms={group: norm * factor for group, norm in sums.gradient_norms.items()},
        gradient_scale=sums.gradient_scale * factor,
    )


def clip_factor(norm: float, largest: float) -> float:
    """What the gradient is multiplied by so that its norm is at most `largest`; 0 means no limit.

    The same as `torch.nn.utils.clip_grad_norm_`, its 1e-6 included.
    """
    return min(1.0, largest / (norm + 1e-6)) if largest > 0 else 1.0
