"""Compiles a run's kernels before its first step, several at a time.

Which ones those are is found out by rehearsal: a training step, an evaluation and a generation over an arena
without memory, where a launch is noted and comes to nothing. Left to themselves the kernels would be compiled
one by one, each at its first launch. What Triton's cache has is read from there.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import torch

from albor.config import RunConfig
from albor.errors import AlborError
from albor.kernels.launches import Grid, Launch, precompile, record
from albor.memory.arena import Arena
from albor.memory.plan import MemoryPlan, evaluation_batch
from albor.model.decode import Decoder
from albor.train.step import Accumulated, Trainer, TrainState


class _Rehearsal(Trainer):
    """A trainer over an arena without memory."""

    def step_without_results(self) -> None:
        """Launches a step's first micro-batch, another one, the gradient norm and the update."""
        train = self.config.train
        tokens = np.zeros((train.micro_batch_size, self.config.data.sequence_length), np.int64)
        self.accumulator.begin(3)  # of which the last, whose sums host memory would add up, does not come
        for _ in range(2):
            self.input.load(tokens, tokens)
            self._micro_batch()
            self.accumulator.end_micro_batch()
        if self.arena.plan.accumulator == "gpu":
            self.accumulator.squared_norms()
        self.update(Accumulated(1.0, 1.0, {}, gradient_scale=1.0, target_tokens=1), TrainState())


def record_run(config: RunConfig, plan: MemoryPlan, capability: int) -> dict[Launch, set[Grid]]:
    """What a run of `config` launches on a card of `capability` (90: 9.0); `plan` is one for CUDA."""
    with record(capability) as launches:
        arena = Arena(plan, "meta")
        trainer = _Rehearsal(config, arena, end_of_document=0)
        trainer.step_without_results()
        rows = evaluation_batch(config) * config.data.sequence_length
        trainer.model.losses(*(arena[f"io.{name}"][:rows] for name in ("tokens", "targets", "losses")))
        if config.evaluate.prompts:
            decoder = Decoder(trainer.model, arena)
            # Position and number of tokens are specialised on: 1, multiples of 16, others.
            for decoder.length, count in itertools.product((0, 1, 2, 16), (1, 2, 16)):
                decoder.feed(torch.zeros(count, dtype=torch.int64))
    return launches


def compile_kernels(config: RunConfig, plan: MemoryPlan, say: Callable[[str], None]) -> None:
    """Makes ready for the current CUDA device what a run launches; `say` is told how long that took.

    Raises AlborError where Triton cannot compile, which most often is for want of a C compiler.
    """
    started = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    launches = record_run(config, plan, 10 * major + minor)
    try:
        precompile(launches, workers=os.cpu_count() or 1)
    except Exception as error:  # Triton raises RuntimeError, CompilationError, PTXASError and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise AlborError(
            f"the kernels do not compile: {reason}; albor doctor shows what is missing"
        ) from error
    say(f"{len(launches)} kernels ready after {time.perf_counter() - started:.1f} s")
