"""What counting alone would reach: the cross-entropy of a unigram and of a bigram model on a run's held-out
tokens, in nats per token, as `val/loss` is.

With counts c over tokens that the run trains on, N of them, and a vocabulary of V:

    unigram  p(w)   = (c(w) + 1) / (N + V)                                       (Laplace)
    bigram   p(w|v) = max(c(v, w) - d, 0) / c(v) + d t(v) / c(v) p(w)            (absolute discounting)

where c(v) counts v as a predecessor, t(v) the different tokens that follow it, and d = n1 / (n1 + 2 n2) by
the numbers of pairs that occur once (1 at least) and twice (Ney, Essen and Kneser 1994). A v that was never
seen has p(w).

Both are measured on exactly the targets of the run's final validation, and have read as many tokens as the
run reads, `MOST_TOKENS` at most, each source by its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from albor.architecture import IGNORED_TARGET
from albor.config import RunConfig
from albor.data.loader import validation_batches
from albor.data.prepare import PreparedData
from albor.data.shards import TokenStream

MOST_TOKENS = 20_000_000  # two seconds and half a gigabyte
_PIECES = 64  # spread over a stream of which not all is counted

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Baselines:
    """Cross-entropies in nats per token."""

    unigram: float
    bigram: float
    counted: int  # tokens
    targets: int  # held-out tokens that they are measured on

    def as_json(self) -> dict[str, Any]:
        """For ladder.json."""
        return asdict(self)


def measure_baselines(config: RunConfig, data: PreparedData) -> Baselines:
    """Both, for the run that `config` describes over its prepared `data`."""
    counted = min(config.steps * config.tokens_per_step, MOST_TOKENS)
    weights = [source.weight for source in config.data.sources]
    texts = [
        text
        for stream, weight in zip(data.train, weights, strict=True)
        for text in _spread(stream, int(counted * weight / sum(weights)))
    ]
    sequences = config.evaluate.final_batches * config.train.micro_batch_size
    pairs = list(_held_out(data.validation, config.data.sequence_length, sequences))
    before, after = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return cross_entropies(texts, before, after, config.model.vocab_size)


def cross_entropies(texts: Sequence[Tokens], before: Tokens, after: Tokens, vocabulary: int) -> Baselines:
    """Of models that count in `texts`, on the tokens `after`, (n,), each of which follows its `before`."""
    counts = sum((np.bincount(text, minlength=vocabulary) for text in texts), np.zeros(vocabulary, np.int64))
    total = int(counts.sum())
    unigram = (counts + 1.0) / (total + vocabulary)

    keys = np.concatenate([text[:-1] * vocabulary + text[1:] for text in texts if len(text) > 1])
    pairs, occurrences = np.unique(keys, return_counts=True)
    once, twice = int((occurrences == 1).sum()), int((occurrences == 2).sum())
    once = max(once, 1)  # without a discount a pair that was never seen would be impossible
    discount = once / (once + 2 * twice)
    first = pairs // vocabulary
    predecessors = np.bincount(first, weights=occurrences, minlength=vocabulary)
    followers = np.bincount(first, minlength=vocabulary)

    wanted = before * vocabulary + after
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    seen = np.where(pairs[place] == wanted, np.maximum(occurrences[place] - discount, 0.0), 0.0)
    times = predecessors[before]
    left_over = np.where(times > 0, discount * followers[before], 1.0)
    bigram = (seen + left_over * unigram[after]) / np.maximum(times, 1.0)
    return Baselines(
        unigram=float(-np.log(unigram[after]).mean()),
        bigram=float(-np.log(bigram).mean()),
        counted=total,
        targets=len(after),
    )


def _spread(stream: TokenStream, count: int) -> list[Tokens]:
    """`count` tokens, or all that there are; where not all, in pieces from everywhere."""
    if count >= len(stream):
        return [stream.read(0, len(stream)).astype(np.int64)]
    length = max(2, count // _PIECES)
    pieces = max(1, count // length)
    starts = (piece * (len(stream) - length) // max(1, pieces - 1) for piece in range(pieces))
    return [stream.read(start, length).astype(np.int64) for start in starts]


def _held_out(stream: TokenStream, length: int, sequences: int) -> Iterable[tuple[Tokens, Tokens]]:
    """(tokens, targets), flat, of the batches that the run's last validation reads."""
    for tokens, targets in validation_batches(stream, length, sequences, 1):
        known = targets != IGNORED_TARGET
        yield tokens[known], targets[known]
