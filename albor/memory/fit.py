"""`albor vram-estimate --fit`: the fastest configuration that fits, for one step's tokens and mathematics.

What is searched: how a step's sequences are split into micro-batches (every divisor), where gradients are
summed, what backward computes again, how many tokens' logits exist at a time. None of these changes what is
learnt, but for the rounding of sums. `optimizer.state_dtype` and the sequence length do, and are searched
only where that is asked for.

The best is exact, not sampled: configurations are taken in the order of the least time that they could take,
and one is planned only if a bound on its memory leaves it a chance. So a few plans answer for hundreds.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from albor.config import RunConfig
from albor.errors import ConfigError, Problem
from albor.memory.attention import AttentionChoice, choose_attention
from albor.memory.cards import Hardware
from albor.memory.devices import compute_dtype
from albor.memory.estimate import Estimate
from albor.memory.plan import MemoryPlan, head_chunk_tokens, training_temporaries
from albor.memory.speed import SpeedModel
from albor.memory.suggest import Change, apply, as_overrides, is_valid

MODES = ("none", "cheap", "block")
NEAR = 0.05  # of the best speed: within that, the configuration with the least memory is shown too
_LARGEST_MICRO_BATCH = 4096  # sequences
_CHUNKS = tuple(2**n for n in range(9, 13))  # head chunks on a GPU: 512 to 4,096 tokens
_FULL_CARD = 16_384  # tokens of a micro-batch that a GPU is taken to be busy with, where no speed is known
_SHORTEST_SEQUENCE = 128

Order = tuple[float, ...]  # by which configurations are ranked; the first is seconds where they are modelled


@dataclass(frozen=True)
class Options:
    """What may be changed beyond what leaves the mathematics alone."""

    state: bool = False  # optimizer.state_dtype=bf16
    sequence: bool = False  # a shorter data.sequence_length, where nothing fits at a longer one


@dataclass(frozen=True, eq=False)
class Candidate:
    """One configuration of the search: what it changes of the one that was given."""

    change: Change
    config: RunConfig
    sums_on_device: bool
    attention: AttentionChoice
    chunk: int  # tokens whose logits exist at a time
    soonest: Order  # no better than this can its order be

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences of a micro-batch, and tokens of each."""
        return self.config.train.micro_batch_size, self.config.data.sequence_length

    @property
    def rows(self) -> int:
        """Tokens of a micro-batch."""
        return math.prod(self.batch)

    @property
    def kind(self) -> tuple[bool, str, str]:
        """What it is apart from batch and chunk."""
        return self.sums_on_device, self.config.train.recompute, self.config.optimizer.state_dtype


@dataclass(frozen=True)
class Choice:
    """A configuration that was planned."""

    change: Change
    estimate: Estimate
    seconds: float | None  # of one step, modelled; None: no speed is known
    order: Order

    @property
    def overrides(self) -> str:
        """The change, as the command line takes it."""
        return as_overrides(self.change)

    @property
    def tokens_per_second(self) -> float | None:
        """At the modelled speed."""
        return None if self.seconds is None else self.estimate.config.tokens_per_step / self.seconds

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        train, config = self.estimate.config.train, self.estimate.config
        return {
            "changes": self.change,
            "overrides": self.overrides,
            "micro_batch_size": train.micro_batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "accumulator": self.estimate.plan.accumulator,
            "recompute": train.recompute,
            "head_chunk_tokens": head_chunk_tokens(config, self.estimate.device),
            "state_dtype": config.optimizer.state_dtype,
            "sequence_length": config.data.sequence_length,
            "seconds_per_step": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "device_bytes": self.estimate.device_bytes,
            "required_bytes": self.estimate.required_bytes,
            "fits": self.estimate.fits,
        }


@dataclass(frozen=True)
class Fit:
    """What the search found."""

    given: Choice
    best: Choice | None  # None: nothing fits
    smallest_near: Choice | None  # the least memory within NEAR of the best speed; None: the best itself
    other_batch: Choice | None  # the fastest with another micro-batch than the best
    smallest: Choice | None  # where nothing fits: the smallest that was tried
    tried: int  # configurations that the answer holds for
    planned: int  # of those, the ones that a bound did not settle
    basis: Literal["modelled", "order"]
    source: str  # of the speed, or of the order
    costs: dict[str, float]  # by changed key: what the change does to the speed, 0.1 for 10 % more
    options: Options
    with_state: Choice | None  # where nothing fits: what would with bf16 state

    @cached_property
    def choices(self) -> tuple[tuple[str, Choice], ...]:
        """The table's rows, the fastest first, each with what it is."""
        named = (
            ("as given" if self.best and not self.best.change else self.best_is, self.best),
            ("other batch", self.other_batch),
            ("least memory", self.smallest_near),
            ("as given", self.given),
            ("smallest", self.smallest),
        )
        rows: dict[str, tuple[str, Choice]] = {}
        for name, choice in named:
            if choice is not None:
                rows.setdefault(choice.overrides, (name, choice))
        return tuple(rows.values())

    @property
    def best_is(self) -> str:
        """What the best is called: without a speed, nothing is the fastest."""
        return "fastest" if self.basis == "modelled" else "best"

    @property
    def yaml_lines(self) -> list[str]:
        """The lines of the file to change for the best, by section, each with what it does to the speed."""
        lines: list[str] = []
        section = None
        change = self.best.change if self.best else {}
        # A section stands once; the sort leaves keys of one in their order.
        for key, value in sorted(change.items(), key=lambda item: item[0].partition(".")[0]):
            if key.partition(".")[0] != section:
                section = key.partition(".")[0]
                lines.append(f"{section}:")
            line = f"  {key.partition('.')[2]}: {value}"
            if key in self.costs:
                line = f"{line:<36}# {self.costs[key]:+.1%} speed"
            elif key == "train.precision":
                line = f"{line:<36}# no bf16 on this card"
            lines.append(line)
        return lines

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""

        def shown(choice: Choice | None) -> dict[str, Any] | None:
            return None if choice is None else choice.as_json()

        return {
            "basis": self.basis,
            "source": self.source,
            "tokens_per_step": self.given.estimate.config.tokens_per_step,
            "tried": self.tried,
            "planned": self.planned,
            "chosen": shown(self.best),
            "yaml": self.yaml_lines,
            "speed_by_change": self.costs,
            "configurations": [{"is": name, **choice.as_json()} for name, choice in self.choices],
            "smallest": shown(self.smallest),
            "with_bf16_state": shown(self.with_state),
        }


def find_fit(given: Estimate, options: Options = Options()) -> Fit:
    """The fastest configuration that fits `given`'s hardware. Raises ConfigError where its capacity is not
    known.
    """
    if given.hardware.capacity_bytes is None:
        what = "asks what fits, and no capacity is known"
        raise ConfigError([Problem("--fit", what, "give --gpu NAME or --vram 24GiB", "command line")])
    return _Search(given, options).run()


class _Search:
    """One call of find_fit."""

    def __init__(self, given: Estimate, options: Options):
        self.given, self.options = given, options
        self.hardware: Hardware = given.hardware
        self._always: Change = {}  # what every candidate changes
        if given.lacks_bf16:
            self._always = {"train.precision": "fp16"}
            if given.config.optimizer.state_dtype == "bf16":
                self._always["optimizer.state_dtype"] = "fp32"
        precision = apply(given.config, self._always).train.precision
        self.dtype = compute_dtype(precision, given.device)
        on_gpu = given.device == "cuda"
        self.speed = SpeedModel.of(self.hardware.gpu, self.dtype) if on_gpu else None
        self.planned = 0
        self._choices: dict[str, Choice] = {}
        self._bounds: dict[Candidate, int] = {}

    def run(self) -> Fit:
        asked = self._choice({})
        tried: list[Candidate] = []
        best = None
        for length in self._lengths():
            candidates = sorted(self._candidates(length), key=lambda c: (c.soonest, len(c.change)))
            tried += candidates
            best = self._best(candidates)
            if best is not None:
                break
        near, other, smallest, with_state = None, None, None, None
        if best is not None:
            batch = best.estimate.config.train.micro_batch_size
            other = self._best([c for c in candidates if c.config.train.micro_batch_size != batch])
            near = self._smallest_near(best, candidates)
        else:
            shortest = min(c.config.data.sequence_length for c in tried)
            alike = [c for c in tried if c.config.data.sequence_length == shortest]
            smallest = self._choice(min(alike, key=self._bound).change)
            if not self.options.state and self._may_round():
                with_state = _Search(self.given, Options(True, self.options.sequence)).run().best
        if self.speed is not None:
            basis: Literal["modelled", "order"] = "modelled"
            source = self.speed.source
        else:
            basis = "order"
            source = (
                "least recomputation, sums on the device, a micro-batch of 16,384 tokens, the head's chunk "
                "as given"
                if self.given.device == "cuda"
                else "least recomputation, the micro-batch and the head's chunk as given"
            )
        return Fit(
            asked, best, near, other, smallest, len(tried), self.planned, basis, source,
            self._costs(best) if best else {}, self.options, with_state,
        )  # fmt: skip

    # What is searched

    def _lengths(self) -> list[int]:
        lengths = [self.given.config.data.sequence_length]
        while self.options.sequence and lengths[-1] % 2 == 0 and lengths[-1] // 2 >= _SHORTEST_SEQUENCE:
            lengths.append(lengths[-1] // 2)
        return lengths

    def _may_round(self) -> bool:
        """Whether bf16 state is a choice: the run computes in bf16, and has fp32 state."""
        return self.dtype == "bfloat16" and self.given.config.optimizer.state_dtype == "fp32"

    def _candidates(self, length: int) -> Iterator[Candidate]:
        config, device = self.given.config, self.given.device
        train = config.train
        longer = config.data.sequence_length // length
        sequences = train.micro_batch_size * train.gradient_accumulation_steps * longer
        states = ["fp32", "bf16"] if self.options.state and self._may_round() else [None]
        places = [True, False] if device == "cuda" else [self.given.plan.accumulator == "gpu"]
        for micro_batch in _micro_batches(sequences, train.micro_batch_size):
            batch = dict(self._always)
            if longer != 1:
                batch["data.sequence_length"] = length
            if micro_batch != train.micro_batch_size:
                batch["train.micro_batch_size"] = micro_batch
            if sequences // micro_batch != train.gradient_accumulation_steps:
                batch["train.gradient_accumulation_steps"] = sequences // micro_batch
            split = apply(config, batch)
            if not is_valid(split):  # as many micro-batches as no step can have
                continue
            attention = self._attention(split)
            rows = micro_batch * length
            for chunk in _chunks(split, device):
                head = {} if chunk == head_chunk_tokens(split, device) else {"train.head_chunk_tokens": chunk}
                if (train.head_chunk_tokens or 0) > rows:  # refused, though the same chunk
                    head = {"train.head_chunk_tokens": chunk}
                for on_device in places:
                    where = "gpu" if on_device else "cpu"
                    place = {} if where == train.accumulator else {"train.accumulator": where}
                    if device == "cpu":
                        place = {}
                    for mode in MODES:
                        again = {} if mode == train.recompute else {"train.recompute": mode}
                        for state in states:
                            kept = {"optimizer.state_dtype": "bf16"} if state == "bf16" else {}
                            change = {**batch, **place, **again, **head, **kept}
                            if change == {**self._always, "train.accumulator": self.given.plan.accumulator}:
                                change = dict(self._always)  # auto comes to that by itself
                            changed = apply(config, change)
                            soonest = self._order(changed, on_device, attention, chunk, early=True)
                            yield Candidate(change, changed, on_device, attention, chunk, soonest)

    def _attention(self, config: RunConfig) -> AttentionChoice:
        gpu = self.hardware.gpu
        return choose_attention(config, self.given.device, gpu.compute_capability if gpu else None)

    # How good a configuration is

    def _order(
        self, config: RunConfig, on_device: bool, attention: AttentionChoice, chunk: int, *, early: bool
    ) -> Order:
        if self.speed is not None:
            return (self.speed.seconds(config, self.dtype, on_device, attention, early=early),)
        given = self.given.config
        rows = config.train.micro_batch_size * config.data.sequence_length
        target = given.train.micro_batch_size * given.data.sequence_length
        if self.given.device == "cuda":
            target = _FULL_CARD
        return (
            float(MODES.index(config.train.recompute)),
            float(not on_device),
            abs(math.log(rows / target)),
            abs(math.log(chunk / head_chunk_tokens(given, self.given.device))),
        )

    def _choice(self, change: Change) -> Choice:
        """Plans a configuration; each at most once."""
        key = as_overrides(change)
        if key not in self._choices:
            estimate = (
                self.given if not change else Estimate.of(apply(self.given.config, change), self.hardware)
            )
            self.planned += bool(change)
            plan, config = estimate.plan, estimate.config
            order = self._order(
                config, plan.accumulator == "gpu", plan.attention,
                head_chunk_tokens(config, estimate.device), early=_returns_early(plan),
            )  # fmt: skip
            seconds = order[0] if self.speed is not None else None
            self._choices[key] = Choice(change, estimate, seconds, order)
        return self._choices[key]

    def _best(self, candidates: Sequence[Candidate]) -> Choice | None:
        """The best that fits; of equally good ones, that with the least memory. Sorted by `soonest`."""
        best: Choice | None = None
        for candidate in self._possible(candidates):
            if best is not None and candidate.soonest > best.order:
                break
            if self._cannot_fit(candidate):
                continue
            choice = self._choice(candidate.change)
            if choice.estimate.fits and (best is None or _rank(choice) < _rank(best)):
                best = choice
        return best

    def _possible(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those whose micro-batch is not too large at any chunk. Bounds grow with it, so few of them tell;
        but where a library's attention has scratch of its own, which may be less for more sequences.
        """
        if any(self._temporaries(candidate) for candidate in candidates):
            return list(candidates)
        most: dict[tuple[Any, ...], int] = {}
        groups: dict[tuple[Any, ...], dict[int, Candidate]] = {}
        for candidate in candidates:
            batches = groups.setdefault(candidate.kind, {})
            rows = candidate.rows
            if rows not in batches or candidate.chunk < batches[rows].chunk:
                batches[rows] = candidate
        for kind, batches in groups.items():
            sizes = sorted(batches)
            too_large = bisect_left(sizes, True, key=lambda rows: self._cannot_fit(batches[rows]))
            most[kind] = sizes[too_large - 1] if too_large else 0
        return [candidate for candidate in candidates if candidate.rows <= most[candidate.kind]]

    def _smallest_near(self, best: Choice, candidates: Sequence[Candidate]) -> Choice | None:
        if best.seconds is None:
            return None
        limit = best.seconds * (1 + NEAR)
        near = sorted((c for c in candidates if c.soonest[0] <= limit), key=self._bound)
        smallest = best
        for candidate in near:
            if self._bound(candidate) >= smallest.estimate.required_bytes:
                break
            choice = self._choice(candidate.change)
            fits = choice.estimate.fits and choice.seconds is not None and choice.seconds <= limit
            if fits and choice.estimate.required_bytes < smallest.estimate.required_bytes:
                smallest = choice
        return None if smallest is best else smallest

    def _costs(self, best: Choice) -> dict[str, float]:
        """By changed key: the speed with it against the speed without it, all other changes made."""
        if best.seconds is None:
            return {}
        split = [key for key in best.change if key.endswith(("batch_size", "steps", "length"))]
        groups = [split] if split else []
        groups += [[key] for key in best.change if key not in split]
        costs = {}
        for keys in groups:
            without = {key: value for key, value in best.change.items() if key not in keys}
            config = apply(self.given.config, without)
            rows = config.train.micro_batch_size * config.data.sequence_length
            if (config.train.head_chunk_tokens or 0) > rows:
                config = apply(config, {"train.head_chunk_tokens": rows})
            place = without.get("train.accumulator", self.given.plan.accumulator)
            (seconds,) = self._order(
                config, place == "gpu", self._attention(config), 0, early=_returns_early(best.estimate.plan)
            )
            costs[keys[0]] = seconds / best.seconds - 1
        return costs

    # What settles most of them without a plan

    def _cannot_fit(self, candidate: Candidate) -> bool:
        capacity = self.hardware.capacity_bytes
        return capacity is not None and self._bound(candidate) > capacity

    def _bound(self, candidate: Candidate) -> int:
        """Bytes that the configuration needs at least."""
        if candidate not in self._bounds:
            where: Literal["cpu", "gpu"] = "gpu" if candidate.sums_on_device else "cpu"
            base = self._choice(self._always).estimate
            self._bounds[candidate] = base.least_required_bytes(candidate.config, where, candidate.attention)
        return self._bounds[candidate]

    def _temporaries(self, candidate: Candidate) -> dict[str, int]:
        return training_temporaries(candidate.config, self.given.device, self.dtype, candidate.attention)


def _returns_early(plan: MemoryPlan) -> bool:
    return any(buffer.name == "gradients.returned.head" for buffer in plan.buffers)


def _rank(choice: Choice) -> tuple[Order, int, int]:
    return choice.order, choice.estimate.required_bytes, len(choice.change)


def _micro_batches(sequences: int, given: int) -> list[int]:
    """How many sequences a micro-batch can have when all have as many, and the one that is given."""
    most = min(sequences, _LARGEST_MICRO_BATCH)
    divisors = {size for size in range(1, most + 1) if sequences % size == 0}
    return sorted(divisors | ({given} if sequences % given == 0 else set()))


def _chunks(config: RunConfig, device: str) -> list[int]:
    """Tokens whose logits may exist at a time: as given, and powers of two; a CPU's are for its cache."""
    rows = config.train.micro_batch_size * config.data.sequence_length
    given = head_chunk_tokens(config, device)
    powers = _CHUNKS if device == "cuda" else ()
    return sorted({given, *(chunk for chunk in powers if chunk <= rows)})
