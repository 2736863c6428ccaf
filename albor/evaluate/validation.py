"""Validation: loss, perplexity and bits per byte of held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from albor.architecture import IGNORED_TARGET
from albor.model.batch import BatchInput
from albor.model.transformer import Transformer


@dataclass(frozen=True)
class Validation:
    """What the model makes of a text."""

    loss: float  # mean over the target tokens, in nats
    bits_per_byte: (
        float | None
    )  # of the text, whatever the tokenizer; None where the targets stand for no text
    target_tokens: int
    text_bytes: int  # UTF-8 bytes that the target tokens stand for

    @property
    def perplexity(self) -> float:
        """exp(loss): between how many tokens the model wavers."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def metrics(self) -> dict[str, float | None]:
        """As a row of metrics.jsonl names them."""
        return {
            "val/loss": self.loss,
            "val/perplexity": self.perplexity,
            "val/bits_per_byte": self.bits_per_byte,
        }


def validate(
    model: Transformer,
    batch_input: BatchInput,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    token_bytes: np.ndarray,
) -> Validation:
    """Runs the model over (tokens, targets) batches, (B, T) each as planned, with at least one target.

    token_bytes (V,) are the UTF-8 bytes that each token stands for. Works in the plan's evaluation buffers.
    """
    arena = model.arena
    assert model.evaluation is not None, "the plan has no phase for evaluation"
    rows = model.evaluation.input.shape[0]
    tokens_buffer, targets_buffer, losses = (
        arena[f"io.{name}"][:rows] for name in ("tokens", "targets", "losses")
    )
    total, target_tokens, text_bytes = 0.0, 0, 0
    for tokens, targets in batches:
        target_tokens += batch_input.load(tokens, targets, train=False)
        model.losses(tokens_buffer, targets_buffer, losses)
        total += float(losses.sum(dtype=torch.float64))
        counted = targets[targets != IGNORED_TARGET]
        text_bytes += int(token_bytes[counted].sum(dtype=np.int64))
    bits = total / math.log(2) / text_bytes if text_bytes else None
    return Validation(total / target_tokens, bits, target_tokens, text_bytes)
