"""When a run does not fit: the nearest changes of its configuration with which it would."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from albor.config import RunConfig
from albor.memory.plan import head_chunk_tokens

MOST = 5
_SMALLEST_CHUNK = 256  # tokens; below, the head's GEMMs are too small to be fast
_SHORTEST_SEQUENCE = 128
_LARGEST_MICRO_BATCH = 4096  # that is suggested in place of a larger one; numbers up to 2^63 may be given

Change = dict[str, Any]  # dotted key -> new value


@dataclass(frozen=True)
class Suggestion:
    """A change as the command line takes it, and what the run would then need."""

    overrides: str  # "train.micro_batch_size=2 train.gradient_accumulation_steps=64"
    required_bytes: int


def nearest_fits(
    config: RunConfig, device: str, required: Callable[[RunConfig], int | None]
) -> tuple[Suggestion, ...]:
    """Up to five changes that fit, the smallest first: single ones, pairs, all together, a shorter sequence.

    A step has as many tokens after each change as before it; all but the last leave what is learnt as it is.
    `required` is the bytes that a configuration needs, None where it does not fit.
    """

    attempts: dict[str, Suggestion | None] = {}

    def attempt(change: Change) -> Suggestion | None:
        change = _with_whole_chunk(config, change)
        overrides = as_overrides(change)
        if overrides not in attempts:
            size = required(apply(config, change))
            attempts[overrides] = None if size is None else Suggestion(overrides, size)
        return attempts[overrides]

    def mildest(changes: list[Change]) -> Suggestion | None:
        return None if (place := _first_that_fits(changes, attempt)) is None else attempt(changes[place])

    found: list[Suggestion | None] = []
    levers = [lever for lever in _levers(config, device) if lever]
    everything: Change = {key: value for lever in levers for key, value in lever[-1].items()}
    # Sums in host memory save the device's, and may be too much for the host's.
    in_place = {key: value for key, value in everything.items() if key != "train.accumulator"}
    enough = attempt(everything) or attempt(in_place)
    if enough:  # else no lever alone is, and no two of them
        found = [mildest(lever) for lever in levers]
        # A pair is of interest where neither half is enough.
        weak = [lever for lever, suggestion in zip(levers, found, strict=True) if suggestion is None]
        found += [_mildest_pair(one, other, attempt) for one, other in itertools.combinations(weak, 2)]
    if config.train.accumulator == "cpu":  # what helps where it is the host's memory that is short
        found.append(attempt({"train.accumulator": "gpu"}))
    if not any(found):
        smallest = mildest([everything | c for c in _shorter_sequences(apply(config, everything))])
        found = [enough or (smallest and mildest(_shorter_sequences(config))), smallest]
    return tuple(dict.fromkeys(filter(None, found)))[:MOST]


Attempt = Callable[[Change], Suggestion | None]  # None: does not fit


def _first_that_fits(changes: list[Change], attempt: Attempt) -> int | None:
    """The place of the first of `changes` that fits, each of which saves more than the one before it."""
    # Where the last is not enough, the others need not be tried.
    if not changes or attempt(changes[-1]) is None:
        return None
    return bisect_left(changes, True, hi=len(changes) - 1, key=lambda change: attempt(change) is not None)


def _mildest_pair(one: list[Change], other: list[Change], attempt: Attempt) -> Suggestion | None:
    """Of the pairs that fit, the first by the sum of their places."""
    best, most = None, len(one) + len(other)  # which that sum is below
    for place, change in enumerate(one[:most]):
        pairs = [change | second for second in other[: max(0, most - place)]]
        if (second := _first_that_fits(pairs, attempt)) is not None:
            best, most = attempt(pairs[second]), place + second
    return best


def _levers(config: RunConfig, device: str) -> Iterator[list[Change]]:
    """What saves memory without changing what is learnt: for each lever its settings, the mildest first.

    The levers are in the order of what they cost in speed.
    """
    train = config.train
    chunks = [head_chunk_tokens(config, device) // 2]
    while chunks[-1] // 2 >= _SMALLEST_CHUNK:
        chunks.append(chunks[-1] // 2)
    yield [{"train.head_chunk_tokens": chunk} for chunk in chunks if chunk >= _SMALLEST_CHUNK]

    sequences = train.micro_batch_size * train.gradient_accumulation_steps
    yield [
        {"train.micro_batch_size": size, "train.gradient_accumulation_steps": sequences // size}
        for size in range(min(train.micro_batch_size - 1, _LARGEST_MICRO_BATCH), 0, -1)
        if sequences % size == 0
    ]
    yield [{"train.accumulator": "cpu"}] if train.accumulator == "gpu" else []
    modes = ("none", "cheap", "block")
    yield [{"train.recompute": mode} for mode in modes[modes.index(train.recompute) + 1 :]]


def _shorter_sequences(config: RunConfig) -> list[Change]:
    """Halved lengths, with as many more micro-batches that a step has as many tokens."""
    length, steps = config.data.sequence_length, config.train.gradient_accumulation_steps
    changes: list[Change] = []
    while length % 2 == 0 and length // 2 >= _SHORTEST_SEQUENCE:
        length, steps = length // 2, steps * 2
        changes.append({"data.sequence_length": length, "train.gradient_accumulation_steps": steps})
    return changes


def _with_whole_chunk(config: RunConfig, change: Change) -> Change:
    """A head chunk longer than the changed micro-batch would be refused: it becomes the micro-batch."""
    changed = apply(config, change)
    rows = changed.train.micro_batch_size * changed.data.sequence_length
    chunk = changed.train.head_chunk_tokens
    return change if chunk is None or chunk <= rows else change | {"train.head_chunk_tokens": rows}


def apply(config: RunConfig, change: Change) -> RunConfig:
    """`config` with the values of `change`, whose keys are a section and a key."""
    for key, value in change.items():
        section, name = key.split(".")
        config = config.model_copy(
            update={section: getattr(config, section).model_copy(update={name: value})}
        )
    return config


def as_overrides(change: Change) -> str:
    """`change` as it is written on the command line."""
    return " ".join(f"{key}={value}" for key, value in change.items())
