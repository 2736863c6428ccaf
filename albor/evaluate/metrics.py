"""Accuracies, perplexity and pass@k with their standard errors, each as lm-eval 0.4.13 computes it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from albor.evaluate.scorer import Score
from albor.evaluate.tasks import Item, Task

_RESAMPLES, _CHUNK = 100_000, 1000  # lm-eval's bootstrap: so many, in chunks with a generator each
_AT_A_TIME = 2**20  # numbers drawn at a time


@dataclass(frozen=True)
class Measured:
    """A figure. `stderr` is None where it cannot be estimated from so few items."""

    value: float
    stderr: float | None

    def as_json(self) -> dict[str, float | None]:
        """None for what is no number: JSON has none for it."""
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "stderr": self.stderr if self.stderr is not None and math.isfinite(self.stderr) else None,
        }


def measure(task: Task, items: Sequence[Item], scores: Sequence[Sequence[Score]]) -> dict[str, Measured]:
    """The metrics of `task` from the scores of each item's choices."""
    return {
        name: _perplexity(scores) if name == "perplexity" else _accuracy(name, items, scores)
        for name in task.metrics
    }


def is_right(name: str, item: Item, scores: Sequence[Score]) -> bool:
    """Whether the likeliest choice is the right one: by its log-likelihood for `acc`, by that per character
    for `acc_norm`; a single choice is right if greedy decoding writes it.
    """
    if len(scores) == 1:
        return scores[0].greedy
    values = np.array([score.logprob for score in scores])
    if name == "acc_norm":
        values = values / np.array(item.lengths, dtype=float)
    return int(values.argmax()) == item.gold


def _accuracy(name: str, items: Sequence[Item], scores: Sequence[Sequence[Score]]) -> Measured:
    right = [float(is_right(name, item, given)) for item, given in zip(items, scores, strict=True)]
    return mean(right)


def mean(values: Sequence[float]) -> Measured:
    """The mean, and the sample's standard deviation over the root of its size."""
    count, average = len(values), sum(values) / len(values)
    if count < 2:
        return Measured(average, None)
    variance = sum((value - average) ** 2 for value in values) / (count - 1)
    return Measured(average, math.sqrt(variance) / math.sqrt(count))


def _perplexity(scores: Sequence[Sequence[Score]]) -> Measured:
    """exp of the mean negative log-likelihood of a last word, all its tokens together."""
    values = np.array([given[0].logprob for given in scores])
    return Measured(_exp(-values.mean()), _bootstrap(values) if values.size > 1 else None)


def _bootstrap(values: np.ndarray) -> float:
    """The standard deviation of the perplexity over lm-eval's own resamples: the same generator, the same
    draws, many at a time."""
    with np.errstate(over="ignore", invalid="ignore"):  # of a model that knows nothing
        resampled = np.concatenate([np.exp(-values[drawn].mean(1)) for drawn in _draws(values.size)])
        return float(resampled.std(ddof=1))


def _draws(size: int) -> Iterator[np.ndarray]:
    """Indices (n, size) of resamples, 100,000 in all: what `random.Random(chunk).choices` draws."""
    for chunk in range(_RESAMPLES // _CHUNK):
        _, state, _ = random.Random(chunk).getstate()
        twister = np.random.MT19937(0)
        key = np.array(state[:-1], dtype=np.uint32)
        twister.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": state[-1]}}
        generator = np.random.Generator(twister)
        at_a_time = max(1, _AT_A_TIME // size)
        for start in range(0, _CHUNK, at_a_time):
            uniform = generator.random((min(at_a_time, _CHUNK - start), size))
            yield np.floor(uniform * size).astype(np.int64)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The probability that one of `k` programs passes, of `samples` of which `passed` do, without bias:
    1 - C(samples - passed, k) / C(samples, k) (Chen et al. 2021, arXiv:2107.03374).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)
