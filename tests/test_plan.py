"""The memory plan: to the byte the arena, tight, monotone, and equal to what one computes by hand."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_config

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.configfile import load_config
from albor.memory.arena import Arena
from albor.memory.cards import find_gpu
from albor.memory.estimate import estimate
from albor.memory.outside import outside
from albor.memory.plan import DTYPE_BYTES, MemoryPlan, plan_inference, plan_training

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = ("quickstart", "pretrain-50m", "pretrain-125m", "pretrain-350m", "pretrain-1.3b")
PLACES = ("device", "pinned", "host")


def _varied_plan(seed: int) -> MemoryPlan:
    """A plan of a small random run; each seed is another one, the same on every machine."""
    choose = random.Random(seed).choice
    kv_heads = choose((1, 2, 3))
    heads = kv_heads * choose((1, 2, 4))
    length, micro_batch = choose((7, 32, 300)), choose((1, 2, 5))
    config = make_config(
        hidden_size=heads * choose((2, 8, 10)),
        intermediate_size=choose((24, 65, 256)),
        num_hidden_layers=choose((1, 2, 3, 7)),
        num_attention_heads=heads,
        num_key_value_heads=choose((kv_heads, heads)),
        vocab_size=choose((37, 256, 1001)),
        max_position_embeddings=choose((300, 512)),
        tie_word_embeddings=choose((True, False)),
        sequence_length=length,
        micro_batch_size=micro_batch,
        recompute=choose(("none", "cheap", "block")),
        head_chunk_tokens=choose((None, 1, length * micro_batch)),
    )
    prompts = choose(((), ("once",)))
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"prompts": prompts})})
    device, dtype = choose(("cpu", "cuda")), choose(("bfloat16", "float16", "float32", "float64"))
    if seed % 8 == 0:
        return plan_inference(config, device, dtype)
    return plan_training(config, device, dtype, choose(("cpu", "gpu")))


@pytest.mark.parametrize("seed", range(72))
def test_arena_is_the_plan(seed: int) -> None:
    plan = _varied_plan(seed)
    arena = Arena(plan)  # a plan for CUDA too: its bytes do not depend on where they lie
    for place in PLACES:
        assert arena.slabs[place].nbytes == plan.size(place)
    for buffer in plan.buffers:
        view = arena[buffer.name]
        assert view.dtype == getattr(torch, buffer.dtype)
        assert view.dtype.itemsize == DTYPE_BYTES[buffer.dtype]
        assert tuple(view.shape) == buffer.shape
        assert view.is_contiguous()
        assert view.nbytes == buffer.nbytes
        assert view.data_ptr() == arena.slabs[buffer.place].data_ptr() + buffer.offset
    _check_placement(plan)


def _check_placement(plan: MemoryPlan) -> None:
    """Buffers that are alive in one phase lie apart; every buffer is aligned and within its slab."""
    for place in PLACES:
        buffers = sorted((b for b in plan.buffers if b.place == place), key=lambda b: b.offset)
        for index, one in enumerate(buffers):
            assert one.offset % 256 == 0
            assert one.offset + one.nbytes <= plan.size(place)
            for other in buffers[index + 1 :]:
                if other.offset >= one.offset + one.nbytes:
                    break
                alive = set(range(one.first, one.last + 1)) & set(range(other.first, other.last + 1))
                assert not alive, f"{one.name} and {other.name} share memory in {plan.phases[min(alive)]}"


@pytest.mark.parametrize("seed", range(0, 72, 5))
def test_groups_and_gaps_are_the_arena(seed: int) -> None:
    plan = _varied_plan(seed)
    assert sum(plan.groups.values()) == plan.size("device")
    assert max(plan.live_bytes.values()) <= plan.size("device")
    assert plan.live_bytes[plan.peak_phase] == sum(b.reserved for b in plan.live_in(plan.peak_phase))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_plans_waste_nothing(name: str) -> None:
    plan = plan_training(load_config(CONFIGS / f"{name}.yaml"), "cuda", "bfloat16")
    _check_placement(plan)
    assert max(plan.live_bytes.values()) == plan.size("device")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("quickstart", 2_361_024),
        ("pretrain-50m", 62_403_072),
        ("pretrain-125m", 163_603_200),
        ("pretrain-350m", 398_509_056),
        ("pretrain-1.3b", 1_224_837_120),
    ],
)
def test_shipped_parameter_counts(name: str, parameters: int) -> None:
    model = Architecture.from_config(load_config(CONFIGS / f"{name}.yaml").model)
    assert model.parameter_count == parameters


def test_350m_plans_at_most_10_gb() -> None:
    config = load_config(CONFIGS / "pretrain-350m.yaml")
    assert (config.data.sequence_length, config.train.micro_batch_size) == (1024, 4)
    plan = plan_training(config, "cuda", "bfloat16")
    assert plan.size("device") <= 10_000_000_000
    assert plan.size("device") + sum(outside(plan, find_gpu("RTX 4090")).values()) <= 10 * 2**30


def test_1_3b_fits_a_4090_without_masters_only() -> None:
    config = load_config(CONFIGS / "pretrain-1.3b.yaml")
    assert estimate(config, "RTX 4090").fits is True
    with_masters = load_config(CONFIGS / "pretrain-1.3b.yaml", ["optimizer.state_dtype=fp32"])
    assert estimate(with_masters, "RTX 4090").fits is False


def test_350m_with_long_sequences_fits_a_4090() -> None:
    config = load_config(
        CONFIGS / "pretrain-350m.yaml", ["data.sequence_length=2048", "train.micro_batch_size=8"]
    )
    assert estimate(config, "RTX 4090").fits is True


def _device_bytes(**keys: Any) -> int:
    return plan_training(make_config(**keys), "cuda", "bfloat16").size("device")


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("micro_batch_size", (1, 2, 3, 8, 32)),
        ("sequence_length", (8, 16, 64, 300, 1024)),
        ("num_hidden_layers", (1, 2, 3, 12)),
        ("vocab_size", (37, 100, 5000)),
        ("intermediate_size", (8, 40, 500)),
        ("head_chunk_tokens", (1, 8, 32)),
    ],
)
@pytest.mark.parametrize("recompute", ["none", "cheap", "block"])
def test_more_needs_more(key: str, values: tuple[int, ...], recompute: str) -> None:
    sizes = [_device_bytes(recompute=recompute, **{key: value}) for value in values]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("layers", [2, 12])
def test_recomputing_never_needs_more(layers: int) -> None:
    shape = {"num_hidden_layers": layers, "micro_batch_size": 16, "sequence_length": 64}
    none, cheap, block = (_device_bytes(recompute=mode, **shape) for mode in ("none", "cheap", "block"))
    assert none >= cheap >= block
    if layers > 2:
        assert none > cheap > block


def test_summing_on_the_host_frees_the_device() -> None:
    config = make_config()
    on_host, on_device = (plan_training(config, "cuda", "bfloat16", place) for place in ("cpu", "gpu"))
    assert on_host.size("device") < on_device.size("device")
    on_their_way = {b.name.rsplit(".", 2)[0] for b in on_device.buffers if b.place == "pinned"}
    assert on_their_way == {"io", "io.staged"}
    assert on_device.size("host") == 0


def test_equal_configurations_have_equal_plans() -> None:
    assert plan_training(make_config(), "cpu", "float32") == plan_training(make_config(), "cpu", "float32")


def _bytes_of(config: RunConfig, dtype: str) -> dict[str, int]:
    return {buffer.name: buffer.nbytes for buffer in plan_training(config, "cuda", dtype).buffers}


def test_hand_computed_bytes() -> None:
    # C = 24, F = 40, 2 blocks, 4 query heads and 2 key/value heads of width 6, V = 37; B = 2, T = 16: N = 32.
    bf16 = _bytes_of(make_config(), "bfloat16")
    # Elements, each tensor padded to 128. Embedding 37 * 24 = 888 -> 896; a block: qkv (4 + 2 * 2) * 6 * 24 =
    # 1,152, out 24 * 24 = 576 -> 640, gate and up 2 * 40 * 24 = 1,920, down 24 * 40 = 960 -> 1,024, and two
    # norms 24 -> 128.
    block = 1152 + 640 + 1920 + 1024 + 2 * 128
    flat = 896 + 2 * block + 128
    assert (block, flat) == (4992, 11008)
    assert bf16["weights"] == 2 * flat
    assert bf16["master"] == bf16["moments.first"] == bf16["moments.second"] == 4 * flat
    assert bf16["gradients.accumulator"] == 4 * flat
    assert bf16["gradients.block.0"] == bf16["gradients.block.1"] == 2 * block
    assert (bf16["gradients.embedding"], bf16["gradients.head"]) == (2 * 896, 2 * 128)
    # Kept for backward, per block: the residual stream twice, both norms and attention's output (32, 24), qkv
    # (32, 48), gate and up (32, 80) in bf16; two reciprocal norms (32,) and a logarithm per query and head
    # (32 * 4,) in fp32.
    kept = {name: size for name, size in bf16.items() if name.startswith("blocks.01.")}
    assert sum(kept.values()) == 32 * (5 * 24 + 48 + 80) * 2 + (2 + 4) * 32 * 4 == 16640
    assert bf16["head.logits"] == 32 * 37 * 2
    assert "head.probabilities" not in bf16  # the kernel needs none
    assert bf16["io.tokens"] == bf16["io.targets"] == 32 * 8

    # In fp32 the weights are their own masters.
    fp32 = _bytes_of(make_config(), "float32")
    assert fp32["weights"] == 4 * flat
    assert "master" not in fp32
    # With "cheap", norms are computed again; with "block", only a block's input is kept.
    for mode, expected in (("cheap", 16640 - 2 * 32 * 24 * 2), ("block", 32 * 24 * 2)):
        sizes = _bytes_of(make_config(recompute=mode), "bfloat16")
        assert sum(size for name, size in sizes.items() if name.startswith("blocks.01.")) == expected


def test_the_blocks_of_a_deep_model_are_found_in_one_pass() -> None:
    """A pass over all parameters for each block would take minutes here."""
    architecture = replace(Architecture.from_config(make_config().model), num_hidden_layers=20_000)
    start = time.perf_counter()
    blocks = architecture.blocks
    assert time.perf_counter() - start < 10
    assert len(blocks) == 20_002
    assert all(one.end == next.start for one, next in pairwise(blocks))
