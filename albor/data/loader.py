"""Batches: which tokens the model reads at which position of the run.

The order is a pure function of (seed, source, epoch, position), so the loader's state is how many samples
each source has given, and a run that was stopped anywhere goes on with exactly the tokens that it would have
read. Nothing is shuffled in memory and nothing is skipped through at a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from math import lcm
from typing import Any, NamedTuple

import numpy as np

from albor.architecture import IGNORED_TARGET
from albor.data.shards import TokenStream
from albor.errors import DataError

_MASK = (1 << 64) - 1
_ROUNDS = 8  # four leave orders of a thousand windows or fewer visibly correlated now and then


class Permutation:
    """A pseudo-random order of `range(n)` in O(1) memory: `permutation(i)` is the i-th element.

    A balanced Feistel network permutes the next power of four, and an element that falls outside `range(n)`
    is sent through it again until it does not (cycle walking; Black and Rogaway 2002). Plain integers,
    written out here, because NumPy's generators may change their streams between versions.
    """

    def __init__(self, n: int, *key: int):
        self._n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        state = 0
        for part in key:
            state = _mix(state ^ part)
        self._round_keys = [_mix(state + round_) for round_ in range(_ROUNDS)]

    def __call__(self, i: int) -> int:
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = i >> half, i & mask
            for key in self._round_keys:
                left, right = right, left ^ (_mix(right ^ key) & mask)
            i = left << half | right
            if i < self._n:
                return i


def _mix(x: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out, never the same twice."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31


class Sample(NamedTuple):
    """One sequence: its source, and the place of its first token in the source's stream."""

    source: int
    start: int


class Loader:
    """Endless training batches from weighted token streams.

    A stream is cut into windows of T + 1 tokens with stride T; each epoch reads every window once, in its own
    order. The next sample comes from the source that lags its share most, so after n samples each source has
    given its share of n to within one sample (less than two with three or more sources), not just on average.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream],
        weights: Sequence[float],
        sequence_length: int,
        micro_batch_size: int,
        seed: int,
        state: dict[str, Any] | None = None,
    ):
        self._streams = tuple(streams)
        self._shape = (micro_batch_size, sequence_length)
        self._seed = seed
        self._windows = [max(0, len(stream) - 1) // sequence_length for stream in streams]
        for number, windows in enumerate(self._windows):
            if not windows:
                raise DataError(f"source {number} has no window of {sequence_length} tokens to train on")
        # Integers in the ratio of the weights: shares stay exact however long the run is.
        fractions = [Fraction(weight) for weight in weights]
        scale = lcm(*(fraction.denominator for fraction in fractions))
        self._shares = [int(fraction * scale) for fraction in fractions]
        self._drawn = [0] * len(self._streams)
        if state is not None:
            self.restore(state)
        self._orders: list[tuple[int, Permutation] | None] = [None] * len(self._streams)

    def next(self, tokens_out: np.ndarray, targets_out: np.ndarray) -> None:
        """Fills (B, T) integer arrays: token ids, and the id that follows each of them."""
        assert tokens_out.shape == targets_out.shape == self._shape
        for row in range(self._shape[0]):
            window = self._next_window()
            tokens_out[row] = window[:-1]
            targets_out[row] = window[1:]

    def state(self) -> dict[str, Any]:
        """What `Loader(..., state=...)` needs in order to continue: a few integers."""
        return {"samples": sum(self._drawn), "per_source": list(self._drawn)}

    def epochs(self) -> list[float]:
        """How often each source has been read so far."""
        return [drawn / windows for drawn, windows in zip(self._drawn, self._windows, strict=True)]

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a position that `state()` gave."""
        drawn = state["per_source"]
        counts = isinstance(drawn, list) and all(type(n) is int and n >= 0 for n in drawn)
        if not counts or len(drawn) != len(self._drawn) or state["samples"] != sum(drawn):
            raise DataError(
                f"the loader's saved position {state} does not belong to {len(self._drawn)} sources"
            )
        self._drawn = list(drawn)

    def samples_after(self, state: Mapping[str, Any], count: int) -> list[Sample]:
        """The `count` samples behind the position `state`. The loader stays where it is."""
        here = self.state()
        self.restore(state)
        samples = [self._next_sample() for _ in range(count)]
        self.restore(here)
        return samples

    def _next_window(self) -> np.ndarray:
        sample, length = self._next_sample(), self._shape[1]
        return self._streams[sample.source].read(sample.start, length + 1)

    def _next_sample(self) -> Sample:
        total, all_shares = sum(self._drawn) + 1, sum(self._shares)
        lags = [
            share * total - drawn * all_shares for share, drawn in zip(self._shares, self._drawn, strict=True)
        ]
        source = lags.index(max(lags))
        epoch, position = divmod(self._drawn[source], self._windows[source])
        cached = self._orders[source]
        if cached is None or cached[0] != epoch:
            order = Permutation(self._windows[source], self._seed, source, epoch)
            self._orders[source] = cached = (epoch, order)
        self._drawn[source] += 1
        return Sample(source, cached[1](position) * self._shape[1])


def validation_batches(
    stream: TokenStream, sequence_length: int, sequences: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """At most so many `sequences`, as pairs of (B, T) int64 arrays (tokens, targets) with B = `batch_size`;
    the same ones at every call, whatever the batch.

    Where they are enough, every token but the first is a target once, the tail included; where they are not,
    the windows are spread evenly over the stream. Rows and positions beyond the text have target -1, so that
    shapes never change.
    """
    windows = -(-max(0, len(stream) - 1) // sequence_length)
    taken = min(windows, sequences)
    chosen = [i * windows // taken for i in range(taken)]
    for first in range(0, taken, batch_size):
        tokens = np.zeros((batch_size, sequence_length), dtype=np.int64)
        targets = np.full((batch_size, sequence_length), IGNORED_TARGET, dtype=np.int64)
        for row, window in enumerate(chosen[first : first + batch_size]):
            start = window * sequence_length
            text = stream.read(start, min(sequence_length + 1, len(stream) - start))
            tokens[row, : len(text) - 1] = text[:-1]
            targets[row, : len(text) - 1] = text[1:]
        yield tokens, targets
