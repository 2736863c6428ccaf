"""What only a GPU can show: bf16 kernels against float64, equal bits with graphs and both accumulators, and a
step in which the host waits for the device once.
"""

from __future__ import annotations

import inspect
import math
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    END_OF_DOCUMENT,
    forward_backward,
    gradients_of,
    make_batches,
    make_config,
    make_trainer,
    relative_error,
    spread_norms,
)
from run_cases import ENVIRONMENT, albor, bits, write_project

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.memory.arena import Arena
from albor.memory.plan import plan_training
from albor.model.parameters import initialise
from albor.train.guard import GuardState
from albor.train.step import Trainer, TrainState
from albor.train.streams import CudaStreams, Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "sequence_length": 200,
    "max_position_embeddings": 256,
    "micro_batch_size": 3,
    "gradient_accumulation_steps": 3,
    "initializer_range": 0.05,
    "kind": "constant",
}
KEYS = {
    "plain": {},
    "untied-block": {"tie_word_embeddings": False, "recompute": "block", "head_chunk_tokens": 100},
    "documents": {"document_mask": True, "recompute": "cheap"},
    "rounded-state": {"state_dtype": "bf16"},
    "muP": {"mup_base_width": 192, "head_chunk_tokens": 100},
}


def gpu_trainer(config: RunConfig, accumulator: Any, dtype: str = "bfloat16") -> Trainer:
    arena = Arena(plan_training(config, "cuda", dtype, accumulator), "cuda")
    initialise(arena, Architecture.from_config(config.model), config.seed)
    return Trainer(config, arena, END_OF_DOCUMENT)


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    names = ("weights", "master", "moments.first", "moments.second")
    return {name: trainer.arena[name].cpu().clone() for name in names if name in trainer.arena}


def train(trainer: Trainer, steps: range, state: TrainState | None = None) -> tuple[list[Any], TrainState]:
    state, seen = state or TrainState(), []
    for number in steps:
        result, state = trainer.step(make_batches(trainer.config, seed=number, ignored=0.1), state)
        seen.append((result.loss, result.grad_norm))
    return seen, state


def assert_same(one: Trainer, other: Trainer) -> None:
    torch.cuda.synchronize()
    ours, theirs = state_of(one), state_of(other)
    assert {name for name in ours if not torch.equal(ours[name], theirs[name])} == set()


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01), ("float32", 1e-5)])
def test_gradients_against_float64(keys: dict, accumulator: str, dtype: str, tolerance: float):
    if "state_dtype" in keys and dtype != "bfloat16":
        pytest.skip("bf16 state is of bf16 weights")
    config = make_config(**SHAPE | keys)
    here, exact = gpu_trainer(config, accumulator, dtype), make_trainer(config, poison=False)
    for trainer in (here, exact):
        spread_norms(trainer)
    batches = make_batches(config, ignored=0.1)
    losses = [forward_backward(trainer, batches) for trainer in (here, exact)]
    here.accumulator.squared_norms()  # waits for the sums
    assert losses[0] == pytest.approx(losses[1], rel=tolerance / 5)
    ours, theirs = gradients_of(here), gradients_of(exact)
    errors = {name: relative_error(ours[name].cpu(), theirs[name]) for name in ours}
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS.keys())
def test_equal_runs_have_equal_bits_with_graphs_and_without(keys: dict, accumulator: str):
    config = make_config(**SHAPE | keys)
    one, other, without = (gpu_trainer(config, accumulator) for _ in range(3))
    without._graphs = Graphs(None)
    seen = [train(trainer, range(5))[0] for trainer in (one, other, without)]
    assert seen[0] == seen[1] == seen[2]
    assert one._graphs._graphs, "nothing was captured"
    assert_same(one, other)
    assert_same(one, without)


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_a_resumed_run_has_the_bits_of_a_whole_one(accumulator: str):
    config = make_config(**SHAPE)
    whole, first, second = (gpu_trainer(config, accumulator) for _ in range(3))
    expected, _ = train(whole, range(6))
    begun, state = train(first, range(3))
    torch.cuda.synchronize()
    for name, values in state_of(first).items():
        second.arena[name].copy_(values)
    rest, _ = train(second, range(3, 6), state)
    assert begun + rest == expected
    assert_same(whole, second)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the main thread waits for an event. PyTorch reports other waits, but not these."""
    found: list[str] = []
    wait = torch.cuda.Event.synchronize

    def noted(event: torch.cuda.Event) -> None:
        if threading.current_thread() is threading.main_thread():
            caller = inspect.stack()[1].function
            found.append(f"{caller}, over already" if event.query() else caller)
        wait(event)

    monkeypatch.setattr(torch.cuda.Event, "synchronize", noted)
    yield found
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_the_host_waits_for_the_device_once_in_a_step(accumulator: str, waits: list[str]):
    """For loss and norm, in Trainer._read_results; and for a batch's slot where one is used again."""
    config = make_config(**SHAPE)
    trainer = gpu_trainer(config, accumulator)
    _, state = train(trainer, range(3))  # compiles, captures
    batches = make_batches(config, seed=3)
    waits.clear()
    torch.cuda.set_sync_debug_mode("error")
    trainer.step(batches, state)
    assert [wait for wait in waits if not wait.startswith("_stage")] == ["host_waits"]
    assert waits.count("_stage") <= config.train.gradient_accumulation_steps - 1


@pytest.mark.parametrize("micro_batch_size", [1, 8], ids=["two-slots", "early-return"])
def test_slow_copies_change_no_bit(micro_batch_size: int, monkeypatch: pytest.MonkeyPatch):
    """What waits for a copy waits in order, also where the copy takes long and no update follows a step."""
    config = make_config(**SHAPE | {"micro_batch_size": micro_batch_size})

    def run() -> list[float]:
        trainer = gpu_trainer(config, "cpu")
        assert ("gradients.returned.blocks.00" in trainer.arena) is (micro_batch_size == 8)
        state, seen = TrainState(), []
        for number in range(5):
            sums = trainer.accumulate(make_batches(config, seed=number), state)
            _, state = trainer.update(replace(sums, grad_norm=math.inf) if number == 3 else sums, state)
            seen += [sums.loss, sums.grad_norm]
        return seen

    copy = CudaStreams._copy

    def slow_copy(self: CudaStreams, stream: torch.cuda.Stream, *arguments: Any) -> Any:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms
        return copy(self, stream, *arguments)

    at_once = run()
    monkeypatch.setattr(CudaStreams, "_copy", slow_copy)
    assert run() == at_once


def test_evaluation_between_steps_changes_nothing():
    config = make_config(**SHAPE)
    one, other = (gpu_trainer(config, "cpu") for _ in range(2))
    expected, _ = train(one, range(5))
    state, seen = TrainState(), []
    for number in range(5):
        step, state = train(other, range(number, number + 1), state)
        seen += step
        (batch,) = make_batches(config, seed=100)[:1]
        with other.streams.computing():
            other.input.load(*batch, train=False)
            other.model.losses(*(other.arena[f"io.{name}"] for name in ("tokens", "targets", "losses")))
    assert seen == expected
    assert_same(one, other)


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_fp16_finds_its_loss_scale(accumulator: str):
    """From a scale at which every gradient overflows."""
    config = make_config(**SHAPE | {"precision": "fp16"})
    trainer = gpu_trainer(config, accumulator, "float16")
    state = TrainState(guard=replace(GuardState.initial("float16"), loss_scale=2.0**40))
    seen, after = train(trainer, range(40), state)
    assert after.guard.loss_scale < 2.0**40
    assert after.updates > 0
    assert math.isfinite(seen[-1][1])


def test_heads_of_128():
    config = make_config(**SHAPE | {"hidden_size": 512, "num_attention_heads": 4})
    here, exact = gpu_trainer(config, "gpu"), make_trainer(config, poison=False)
    batches = make_batches(config)
    losses = [forward_backward(trainer, batches) for trainer in (here, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    torch.cuda.synchronize()
    ours, theirs = gradients_of(here), gradients_of(exact)
    errors = {name: relative_error(ours[name].cpu(), theirs[name]) for name in ours}
    assert {name: error for name, error in errors.items() if not error < 0.05} == {}


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_a_killed_run_goes_on_with_the_same_bits(accumulator: str, tmp_path: Path):
    """`albor train`: kernels, graphs, evaluation, samples, checkpoint, resume."""
    config = write_project(tmp_path)
    command = ["train", config, "device=cuda", "train.precision=bf16", f"train.accumulator={accumulator}"]
    for name in ("whole", "killed"):
        fault = {"ALBOR_FAULT": "step.updated:9:kill"} if name == "killed" else {}
        first = albor(tmp_path, *command, f"runs_dir={name}", env=ENVIRONMENT | fault)
        assert first.code == (-signal.SIGKILL if fault else 0), first.err
    assert albor(tmp_path, *command, "runs_dir=killed").code == 0
    assert bits(tmp_path / "killed" / "tiny") == bits(tmp_path / "whole" / "tiny")


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_a_step_allocates_nothing(accumulator: str):
    config = make_config(**SHAPE)
    trainer = gpu_trainer(config, accumulator)
    _, state = train(trainer, range(3))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    trainer.step(make_batches(config, seed=3), state)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == before
