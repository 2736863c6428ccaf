"""After its first step the trainer allocates nothing of a tensor's size: all of that is in the arena."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import make_batches, make_config, make_trainer
from torch.profiler import ProfilerActivity, profile

from albor import ops
from albor.train.step import Trainer, TrainState

TENSOR = 256 * 1024  # bytes of the smallest (N, C) tensor of this model in bf16
SMALL = 16 * 1024  # bytes: room for vectors, such as one number per token or per column, in float64
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "sequence_length": 600,  # three query blocks and three row chunks, the last ones short
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 2,  # the second micro-batch is added to the first
}
GEMMS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


def allocations(trainer: Trainer, steps: int) -> list[tuple[int, str]]:
    """(bytes, innermost operation) of whatever PyTorch allocates after a first step.

    The allocator itself tells the profiler: a dispatch mode would not see what a kernel takes for itself.
    """
    batches = make_batches(trainer.config)
    _, state = trainer.step(batches, TrainState())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in range(steps):
            _, state = trainer.step(batches, state)
    assert state.updates == 1 + steps
    found: list[tuple[int, str]] = []
    calls: list[Any] = []  # those that are open, the innermost last
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: (e.start_ns(), -e.duration_ns())):
        while calls and calls[-1].end_ns() < event.start_ns():
            calls.pop()
        if event.name() != "[memory]":
            calls.append(event)
        elif event.nbytes() > 0:  # negative: memory that is given back
            found.append((event.nbytes(), calls[-1].name() if calls else "no operation"))
    return found


def make_large(dtype: str, recompute: str = "none") -> Trainer:
    trainer = make_trainer(make_config(**SHAPE, recompute=recompute), dtype, poison=False)
    assert trainer.config.data.sequence_length * trainer.architecture.hidden_size * 2 >= TENSOR
    assert min(p.size for p in trainer.architecture.parameters if p.decays) * 2 >= TENSOR / 2
    return trainer


@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_fp32_steps_allocate_no_tensor(recompute: str):
    found = allocations(make_large("float32", recompute), steps=2)
    assert (0, "") < max(found) < (SMALL, "")


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="a CPU that computes bf16 runs in fp32"
)
def test_bf16_steps_allocate_no_tensor_beside_onednns_scratch():
    """Inside a GEMM, oneDNN reorders blocks of its operands: so much per thread, whatever the batch."""
    trainer = make_large("bfloat16")
    found = allocations(trainer, steps=2)
    assert max(call for call in found if call[1] not in GEMMS) < (SMALL, "")
    assert max(found) < (trainer.arena.plan.temporaries["oneDNN scratch"], "")


@pytest.mark.parametrize("size", [SMALL, TENSOR])
def test_the_watch_sees_an_allocation(size: int, monkeypatch: pytest.MonkeyPatch):
    """Also one that a kernel makes for itself, such as an addition that widens its operand first."""
    trainer = make_large("float32")
    narrow = torch.ones(size // 4, dtype=torch.bfloat16)
    wide, swiglu = torch.ones(size // 4), ops.TorchOps.swiglu_forward

    def wasteful(self: ops.TorchOps, *arguments: torch.Tensor) -> None:
        wide.add_(narrow)
        swiglu(self, *arguments)

    monkeypatch.setattr(ops.TorchOps, "swiglu_forward", wasteful)
    assert max(allocations(trainer, steps=1))[0] >= size
