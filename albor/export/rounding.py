"""What rounding the weights costs: the perplexity of a text of the model's own, before and after.

The text is the model's own, because held-out data may be gone, and any other may not be what the model is
for. At some of its positions the whole distributions are compared: with the old one as the truth, exp of its
entropy is the perplexity before, exp of the cross-entropy the one after. So neither depends on which token
was drawn, and few positions are enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from albor.generate.sampler import sample, uniform_for
from albor.model.decode import Decoder

_POSITIONS = 32
_TOKENS = 256
_IMPOSSIBLE = -80.0  # a log-probability; below, fp32 has no room for the probability itself


@dataclass(frozen=True)
class Before:
    """A text of the model's own, and what the model thought at some places of it."""

    tokens: list[int]
    positions: list[int]
    log_probabilities: np.ndarray  # (P, V) float64

    def perplexities(self, logits: np.ndarray) -> tuple[float, float]:
        """Before, and by these logits (P, V), each row up to a constant."""
        truth = np.exp(self.log_probabilities)
        return _perplexity(truth, self.log_probabilities), _perplexity(truth, log_softmax(logits))


def look_before(decoder: Decoder, first: int, vocabulary: int) -> Before:
    """Lets the model write, from the token `first` on and with the first `vocabulary` ids, by a fixed seed;
    it goes on behind the end of a document, as in training.
    """
    decoder.reset()
    tokens = [first]
    while len(tokens) < min(_TOKENS, decoder.context):
        logits = decoder.feed(torch.tensor(tokens[-1:]))[:vocabulary]
        tokens.append(sample(logits, 1.0, None, None, uniform_for(0, len(tokens))))
    positions = spread(len(tokens), _POSITIONS)
    decoder.reset()
    logits = decoder.feed_for_each(torch.tensor(tokens))
    return Before(tokens, positions, log_softmax(logits[positions].float().numpy()))


def spread(length: int, count: int) -> list[int]:
    """At most `count` positions, evenly over a sequence of `length` tokens but the last: behind that one a
    server has no room to be asked where the sequence fills the context.
    """
    places: list[int] = np.unique(np.linspace(0, max(length - 2, 0), count).round().astype(int)).tolist()
    return places


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, in float64: a constant that is added to its logits makes no difference."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return np.maximum(rows, _IMPOSSIBLE)


def _perplexity(truth: np.ndarray, log_probabilities: np.ndarray) -> float:
    return float(np.exp(-(truth * log_probabilities).sum(axis=1).mean()))
