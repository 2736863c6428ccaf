"""What only a GPU can show of a library's attention: bf16 against float64, equal bits, a captured step, and
memory within the plan. What a CPU can show is in test_attention_backends.py.
"""

from __future__ import annotations

import gc

import pytest
import torch
from helpers import (
    forward_backward,
    gradients_of,
    make_batches,
    make_config,
    make_trainer,
    relative_error,
    spread_norms,
)
from test_gpu import SHAPE, assert_same, gpu_trainer, train

from albor.memory.arena import Arena
from albor.memory.outside import outside_items
from albor.memory.plan import plan_training
from albor.ops import make_ops
from albor.train.streams import Graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LIBRARIES = {
    "flash": {"attention": "flash"},
    "flash-any-order": {"attention": "flash", "deterministic": False},
    "cudnn": {"attention": "cudnn", "deterministic": False},
}
each_library = pytest.mark.parametrize("keys", LIBRARIES.values(), ids=LIBRARIES.keys())


@each_library
@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("float16", 0.002)])
def test_a_librarys_attention_against_float64(keys: dict, dtype: str, tolerance: float):
    config = make_config(**SHAPE | keys)
    plans = plan_training(config, "cuda", dtype), plan_training(make_config(**SHAPE), "cpu", "float64")
    generator, results = torch.Generator().manual_seed(1), []
    qkv, d_out = (
        torch.randn(600, width, generator=generator).to(getattr(torch, dtype)) for width in (512, 256)
    )
    for plan in plans:
        arena = Arena(plan, plan.device)
        ops = make_ops(arena)
        saved = [arena.get(f"blocks.00.{name}") for name in ("qkv", "attention_out", "attention_lse")]
        saved[0].copy_(qkv)
        arena["backward.d_attention"].copy_(d_out)
        ops.attention_forward(*saved, 200, 2, 64)
        ops.attention_backward(arena["backward.d_attention"], *saved, arena["backward.d_qkv"], 200, 2, 64)
        results.append((saved[1].cpu(), arena["backward.d_qkv"].cpu()))
        if saved[2] is not None:
            lse = saved[2].cpu()
    for ours, exact in zip(*results, strict=True):
        assert relative_error(ours, exact) < tolerance
    heads = qkv.double().view(3, 200, 8, 64).transpose(1, 2)
    scores = heads[:, :4] @ heads[:, 4:6].repeat_interleave(2, 1).transpose(2, 3) / 8
    hidden = torch.ones(200, 200).triu(1).bool()
    assert relative_error(lse, scores.masked_fill(hidden, -torch.inf).logsumexp(-1)) < 1e-4


@each_library
@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_gradients_with_a_librarys_attention(keys: dict, recompute: str, accumulator: str):
    here = gpu_trainer(make_config(**SHAPE | keys, recompute=recompute), accumulator)
    exact = make_trainer(make_config(**SHAPE), poison=False)
    for trainer in (here, exact):
        spread_norms(trainer)
    batches = make_batches(here.config, ignored=0.1)
    losses = [forward_backward(trainer, batches) for trainer in (here, exact)]
    here.accumulator.squared_norms()  # waits for the sums
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    ours, theirs = gradients_of(here), gradients_of(exact)
    errors = {name: relative_error(ours[name].cpu(), theirs[name]) for name in ours}
    assert {name: error for name, error in errors.items() if not error < 0.05} == {}


@pytest.mark.parametrize("accumulator", ["cpu", "gpu"])
def test_flash_has_equal_bits_with_graphs_and_without(accumulator: str):
    """dQ of few heads is summed by many programs at a time: here is where another order would show."""
    config = make_config(**SHAPE | LIBRARIES["flash"] | {"sequence_length": 256, "micro_batch_size": 1})
    one, other, without = (gpu_trainer(config, accumulator) for _ in range(3))
    without._graphs = Graphs(None)
    seen = [train(trainer, range(5))[0] for trainer in (one, other, without)]
    assert seen[0] == seen[1] == seen[2]
    assert one._graphs._graphs, "nothing was captured"
    assert_same(one, other)
    assert_same(one, without)
    assert torch.get_deterministic_debug_mode() == 0


@each_library
def test_a_librarys_attention_is_captured(keys: dict):
    """From the third step on nothing is allocated, and the host waits once; the loss is that of a run without
    graphs, but for the order of sums.
    """
    config = make_config(**SHAPE | keys)
    captured, eager = (gpu_trainer(config, "gpu") for _ in range(2))
    eager._graphs = Graphs(None)
    (ours, state), (theirs, _) = (train(trainer, range(4)) for trainer in (captured, eager))
    assert captured._graphs._graphs
    for (loss, norm), (other_loss, other_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-3)
        assert norm == pytest.approx(other_norm, rel=0.02)
    batches = make_batches(config, seed=4)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.step(batches, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocated_bytes.all.allocated"] == before


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("keys", [{}, *LIBRARIES.values()], ids=["triton", *LIBRARIES])
def test_what_pytorch_reserves_is_within_the_plan(keys: dict, batch: int):
    """A step as it is, captured ones, and an evaluation; triton shows what is not attention's."""
    shape = {
        "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "sequence_length": 1024,
        "max_position_embeddings": 1024, "num_hidden_layers": 2, "gradient_accumulation_steps": 2,
        "micro_batch_size": batch,
    }  # fmt: skip
    gc.collect()  # the graphs of other tests
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    trainer = gpu_trainer(make_config(**SHAPE | shape | keys), "gpu")
    train(trainer, range(3))
    arena = trainer.arena
    with trainer.streams.computing():
        trainer.model.losses(arena["io.tokens"], arena["io.targets"], arena["io.losses"])
    torch.cuda.synchronize()
    pooled = sum(item.bytes for item in outside_items(arena.plan) if item.pooled)
    allowed = arena.plan.size("device") + pooled
    assert torch.cuda.max_memory_reserved() - before <= allowed
