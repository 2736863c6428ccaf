"""Gradients on their way between a device and host memory, over streams whose copies happen late."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from helpers import make_config
from late_streams import LateStreams

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.memory.plan import MemoryPlan, plan_training
from albor.train.accumulator import TravellingSums
from albor.train.streams import Event, NoStreams, Streams

MICRO_BATCHES = 3
# With a large micro-batch the activations are more than the gradients, whose sums can then return early.
SLOTS = {"two-slots": 2, "early-return": 256}


def config_of(micro_batch_size: int) -> RunConfig:
    return make_config(
        num_hidden_layers=5, micro_batch_size=micro_batch_size, gradient_accumulation_steps=MICRO_BATCHES
    )


def plan_of(micro_batch_size: int) -> MemoryPlan:
    return plan_training(config_of(micro_batch_size), "cuda", "bfloat16", "cpu")


def make_sums(streams: Streams, micro_batch_size: int = 2) -> TravellingSums:
    arena = Arena(plan_of(micro_batch_size), poison=True)
    return TravellingSums(Architecture.from_config(config_of(micro_batch_size).model), arena, streams)


def backward_order(sums: TravellingSums) -> list[str]:
    first, *blocks, last = sums.blocks
    return [last, *reversed(blocks), first]


def random_gradient(sums: TravellingSums, name: str, *seed: int) -> torch.Tensor:
    number = hash((list(sums.blocks).index(name), *seed)) % 2**31
    values = torch.randn(sums.blocks[name].size, generator=torch.Generator().manual_seed(number))
    return values.bfloat16()


def run_micro_batch(sums: TravellingSums, *seed: int) -> None:
    sums.reserve("head")
    sums.reserve("embedding")
    for name in backward_order(sums):
        if name.startswith("blocks"):
            sums.reserve(name)
        sums.buffer(name).copy_(random_gradient(sums, name, *seed))
        sums.add(name)
    sums.end_micro_batch()


def run_step(sums: TravellingSums, step: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The squared norm, and what the optimizer finds of each block."""
    sums.begin(MICRO_BATCHES)
    for micro_batch in range(MICRO_BATCHES):
        run_micro_batch(sums, step, micro_batch)
    square = sum(sums.squared_norms())
    sums.fetch()
    return square, {name: sums.gradient(block).clone() for name, block in sums.blocks.items()}


def expected_sums(sums: TravellingSums, step: int) -> dict[str, torch.Tensor]:
    """In the order of the micro-batches, in fp32; what lies between two parameters is cleared."""
    totals = {}
    for name in sums.blocks:
        total = random_gradient(sums, name, step, 0).float()
        for micro_batch in range(1, MICRO_BATCHES):
            total += random_gradient(sums, name, step, micro_batch)
        start = sums.blocks[name].start
        for padding in sums._padding[name]:
            offset = padding.storage_offset() - sums.sums.storage_offset() - start
            total[offset : offset + padding.numel()] = 0
        totals[name] = total
    return totals


@pytest.mark.parametrize("delay", [0.0, 0.003])
@pytest.mark.parametrize("micro_batch_size", SLOTS.values(), ids=SLOTS.keys())
def test_gradients_that_travel_late_arrive_whole(micro_batch_size: int, delay: float):
    """Five blocks through two buffers, with copies slower than what fills them, step after step."""
    streams = LateStreams(delay)
    sums = make_sums(streams, micro_batch_size)
    assert sums.resident is (micro_batch_size > 2)
    for step in range(3):
        square, gradients = run_step(sums, step)
        expected = expected_sums(sums, step)
        for name, total in expected.items():
            assert torch.equal(gradients[name], total), name
        assert square == pytest.approx(sum(float(t.double().square().sum()) for t in expected.values()))
    # Each step: 7 gradients on their way out in each micro-batch, and 7 sums back once.
    assert streams.copies == 3 * (7 * MICRO_BATCHES + 7)


def test_no_sum_returns_before_its_place_is_free(monkeypatch: pytest.MonkeyPatch):
    """By the plan: its place may hold an activation until the phase in which its life begins."""
    sums = make_sums(NoStreams(), SLOTS["early-return"])
    plan = plan_of(SLOTS["early-return"])
    begins = {b.name: b.first for b in plan.buffers}
    back = {tensor.data_ptr(): name for name, tensor in sums._back.items()}
    added: list[str] = []
    seen: list[str] = []

    def copy_out(target: torch.Tensor, source: torch.Tensor) -> Event:
        target.copy_(source)
        return added[-1]

    def copy_in(target: torch.Tensor, source: torch.Tensor, after: Event) -> Event:
        name = back[target.data_ptr()]
        phase = {"head": "head", "embedding": "embed_backward"}.get(
            after, after.replace("blocks", "backward")
        )
        assert plan.phases.index(phase) < begins[f"gradients.returned.{name}"]
        seen.append(name)
        target.copy_(source)

    add = sums.add

    def noted(name: str) -> None:
        added.append(name)
        add(name)

    monkeypatch.setattr(sums, "add", noted)
    monkeypatch.setattr(sums._streams, "copy_out", copy_out)
    monkeypatch.setattr(sums._streams, "copy_in", copy_in)
    run_step(sums, 0)
    assert sorted(seen) == sorted(sums.blocks)


def test_a_step_that_is_given_up_leaves_nothing_behind():
    """As a signal does between two micro-batches: gradients still travel when the next step begins."""
    sums = make_sums(LateStreams(0.003))
    sums.begin(MICRO_BATCHES)
    run_micro_batch(sums, 99)
    _, gradients = run_step(sums, 0)
    for name, total in expected_sums(sums, 0).items():
        assert torch.equal(gradients[name], total), name


def test_a_failure_on_another_thread_ends_the_step(monkeypatch: pytest.MonkeyPatch):
    sums = make_sums(NoStreams())
    monkeypatch.setattr(sums._streams, "host_waits", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_step(sums, 0)


@pytest.mark.parametrize("forgotten", ["compute_waits", "host_waits"])
def test_late_streams_show_a_wait_that_is_missing(forgotten: str, monkeypatch: pytest.MonkeyPatch):
    """What the tests above rely on."""
    sums = make_sums(LateStreams(0.01))
    monkeypatch.setattr(sums._streams, forgotten, lambda _: None)
    _, gradients = run_step(sums, 0)
    expected = expected_sums(sums, 0)
    assert any(not torch.equal(gradients[name], expected[name]) for name in expected)


def test_sums_are_added_in_several_threads(monkeypatch: pytest.MonkeyPatch):
    seen: set[str] = set()
    add = torch.Tensor.add_

    def spy(self: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        seen.add(threading.current_thread().name)
        time.sleep(0.001)  # long enough for the others to take a part
        return add(self, *arguments, **keywords)

    sums = make_sums(NoStreams())
    monkeypatch.setattr(torch.Tensor, "add_", spy)
    run_step(sums, 0)
    assert len({name for name in seen if name.startswith("gradient-sums")}) > 1
