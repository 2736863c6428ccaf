"""When a run does not fit: the nearest changes of its configuration with which it would."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from albor.config import RunConfig, check_algebra
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
    `required` is the bytes that a configuration needs, None where it does not fit. Every setting is tried:
    a smaller one may need more, see docs/memory.md.
    """
    attempts: dict[str, Suggestion | None] = {}

    def attempt(change: Change) -> Suggestion | None:
        change = _with_whole_chunk(config, change)
        overrides = as_overrides(change)
        if overrides not in attempts:
            changed = apply(config, change)
            size = required(changed) if is_valid(changed) else None
            attempts[overrides] = None if size is None else Suggestion(overrides, size)
        return attempts[overrides]

    def mildest(changes: Iterable[Change]) -> Suggestion | None:
        return next(filter(None, map(attempt, changes)), None)

    levers = [lever for lever in _levers(config, device) if lever]
    found = [mildest(lever) for lever in levers]
    # A pair is of interest where neither half is enough.
    weak = [lever for lever, suggestion in zip(levers, found, strict=True) if suggestion is None]
    found += [mildest(_pairs(one, other)) for one, other in itertools.combinations(weak, 2)]
    if config.train.accumulator == "cpu":  # what helps where it is the host's memory that is short
        found.append(attempt({"train.accumulator": "gpu"}))
    if not any(found):
        everything: Change = {key: value for lever in levers for key, value in lever[-1].items()}
        # Sums in host memory save the device's, and may be too much for the host's.
        in_place = {key: value for key, value in everything.items() if key != "train.accumulator"}
        enough = attempt(everything) or attempt(in_place)
        smallest = mildest([everything | c for c in _shorter_sequences(apply(config, everything))])
        found = [enough or mildest(_shorter_sequences(config)), smallest]
    return tuple(dict.fromkeys(filter(None, found)))[:MOST]


def _pairs(one: list[Change], other: list[Change]) -> list[Change]:
    """Of each a change, the mildest first: by the sum of their places."""
    places = itertools.product(range(len(one)), range(len(other)))
    in_turn = sorted(places, key=lambda pair: (sum(pair), pair))
    return [one[first] | other[second] for first, second in in_turn]


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


def is_valid(config: RunConfig) -> bool:
    """Whether a changed configuration would be accepted from a file: `apply` itself does not look."""
    try:
        RunConfig.model_validate(config.model_dump())
    except ValidationError:
        return False
    return not check_algebra(config)


def as_overrides(change: Change) -> str:
    """`change` as it is written on the command line."""
    return " ".join(f"{key}={value}" for key, value in change.items())
