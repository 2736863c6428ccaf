"""What lies outside the arena: PyTorch's rules, items and their sources, and one stream for all products."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_config
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from run_cases import call, write_project
from torch.utils._python_dispatch import TorchDispatchMode

from albor.configfile import load_config
from albor.errors import ConfigError
from albor.memory import outside as module
from albor.memory.arena import Arena
from albor.memory.cards import GPUS, Gpu, find_gpu
from albor.memory.estimate import estimate
from albor.memory.outside import (
    CUBLAS,
    CUBLASLT,
    CUDA_CONTEXT,
    GRAPHS,
    MARGIN,
    NODES_PER_LAYER,
    ROUNDING,
    graph_nodes,
    outside,
    outside_items,
)
from albor.memory.plan import MemoryPlan, plan_training
from albor.memory.pytorch import (
    CUBLAS_SETTING,
    CUBLAS_VARIABLE,
    CachingAllocator,
    cublas_workspace_bytes,
    cublaslt_workspace_bytes,
    pin_cublas_workspace,
)
from albor.memory.report import render
from albor.train.streams import NoStreams
from albor.units import GIB, KIB, MIB

CONFIGS = Path(__file__).parent.parent / "configs"
VARIABLES = (
    *(CUBLAS_VARIABLE, "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def plan_of(**keys: Any) -> MemoryPlan:
    return plan_training(make_config(micro_batch_size=64, sequence_length=512, **keys), "cuda", "bfloat16")


# cuBLAS


@pytest.mark.parametrize(
    ("setting", "size"),
    [
        (":4096:8", 32 * MIB),
        (":16:8", 128 * KIB),
        (":4096:2:16:8", 8_519_680),  # PyTorch's default below Hopper, to the byte (pytorch #95668)
        ("", 32 * MIB),  # what PyTorch does not understand is its default: on some cards this
        ("4096", 32 * MIB),
        (":0:0", 0),
    ],
)
def test_a_workspace_is_what_the_variable_says(setting: str, size: int) -> None:
    assert cublas_workspace_bytes({CUBLAS_VARIABLE: setting}) == size


def test_an_arena_on_a_gpu_pins_the_workspace_that_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    pin_cublas_workspace(environment)
    assert environment == {CUBLAS_VARIABLE: CUBLAS_SETTING}
    assert cublas_workspace_bytes({}) == cublas_workspace_bytes(environment), "unset is what will be set"
    of_the_user = {CUBLAS_VARIABLE: ":16:8"}
    pin_cublas_workspace(of_the_user)
    assert of_the_user == {CUBLAS_VARIABLE: ":16:8"}

    plan, order = plan_training(make_config(), "cpu", "float32"), []
    empty = torch.empty
    monkeypatch.setattr("albor.memory.arena.pin_cublas_workspace", lambda: order.append("pinned"))
    for device in ("cpu", "meta"):
        Arena(plan, device)
    assert order == []

    def no_cuda(*args: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
        order.append(str(device))
        return empty(*args, **keywords)

    monkeypatch.setattr(torch, "empty", no_cuda)
    Arena(plan, "cuda")
    assert order[:2] == ["pinned", "cuda"], "before the first byte is asked for"


def test_cublaslt_has_a_workspace_of_its_own_only_where_sharing_is_off() -> None:
    off = {"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "0"}
    assert cublaslt_workspace_bytes({}) == 0
    assert cublaslt_workspace_bytes({"TORCH_CUBLASLT_UNIFIED_WORKSPACE": "1"}) == 0
    assert cublaslt_workspace_bytes(off) == MIB
    assert cublaslt_workspace_bytes(off | {"CUBLASLT_WORKSPACE_SIZE": "4096"}) == 4 * MIB
    assert cublaslt_workspace_bytes(off | {"CUBLASLT_WORKSPACE_SIZE": "much"}) == MIB


def test_the_environment_is_priced(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, gpu = plan_of(), find_gpu("RTX 4090")
    before = outside(plan, gpu)
    assert before[CUBLAS] == 32 * MIB
    monkeypatch.setenv(CUBLAS_VARIABLE, ":4096:2:16:8")
    monkeypatch.setenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "0")
    after = outside(plan, gpu)
    assert (after[CUBLAS], after[CUBLASLT]) == (8_519_680, MIB)
    # 8,519,680 bytes lie in a segment of 20 MiB; the other is small, and shares a page with what is.
    assert after[ROUNDING] - before[ROUNDING] == 20 * MIB - 8_519_680 - MIB


# The allocator


def test_divisions_are_read_as_pytorch_reads_them() -> None:
    """The numbers are those of PyTorch's own test, c10/test/core/AllocatorConfig_test.cpp."""
    text = "max_split_size_mb:40, roundup_power2_divisions:[64:8,128:2,256:4,512:2,1024:4,>:1],"
    text += "expandable_segments:True"
    allocator = CachingAllocator.configured({"PYTORCH_ALLOC_CONF": text})
    assert allocator.expandable_segments
    expected = {32: 8, 64: 8, 128: 2, 256: 4, 512: 2, 1024: 4, 2048: 1, 4096: 1, 8192: 1}
    assert {size: allocator.divisions[size.bit_length() - 1] for size in expected} == expected


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
@pytest.mark.parametrize(
    "option",
    [
        *("large_segment_size_mb:0", "large_segment_size_mb:²", "large_segment_size_mb:1.5"),
        *("large_segment_size_mb:", "roundup_power2_divisions:²", "roundup_power2_divisions:[256:2;>:4]"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(option: str, variable: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        CachingAllocator.configured({variable: f"max_split_size_mb:40,{option}"})
    (problem,) = refusal.value.problems
    assert problem.key == variable
    assert problem.message.startswith(option)
    assert problem.remedy


def test_another_allocator_is_said_to_be_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIGS / "pretrain-50m.yaml")
    native = estimate(config, "RTX 4090")
    assert native.notes == []
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    other = estimate(config, "RTX 4090")
    assert ["cudaMallocAsync" in note for note in other.notes] == [True]
    assert other.as_json()["notes"] == other.notes
    assert "cudaMallocAsync" in other.as_json()["outside_sources"][ROUNDING]["source"]
    bases = {name: row["basis"] for name, row in other.as_json()["outside_sources"].items()}
    assert (bases[ROUNDING], bases[CUBLAS]) == ("estimate", "computed")
    out = io.StringIO()
    render(other, Console(file=out, width=80))
    assert other.notes[0] in out.getvalue()
    assert f"{ROUNDING} (estimate)" in out.getvalue()


@pytest.mark.parametrize(
    ("text", "size", "block"),
    [
        ("", 1, 512),
        ("", 513, 1024),
        ("", 9 * MIB + 1, 9 * MIB + 512),
        ("roundup_power2_divisions:4", 1200, 1536),  # at most 512 bytes a step: as without
        ("roundup_power2_divisions:4", 1200 * MIB, 1280 * MIB),  # PyTorch's own example, 2^20 times
        ("roundup_power2_divisions:4", 1024 * MIB, 1024 * MIB),
        ("roundup_power2_divisions:[512:1,>:2]", 1200 * MIB, 1536 * MIB),
    ],
)
def test_blocks(text: str, size: int, block: int) -> None:
    assert CachingAllocator.configured({"PYTORCH_CUDA_ALLOC_CONF": text}).round(size) == block


@pytest.mark.parametrize(
    ("options", "requests", "reserved"),
    [
        ({}, [], 0),
        ({}, [1], 2),
        ({}, [MIB, MIB], 2),
        ({}, [MIB + 1], 20),
        ({}, [8_519_680], 20),
        ({}, [10 * MIB], 10),
        ({}, [32 * MIB], 32),
        ({}, [33 * MIB], 34),
        ({}, [6 * MIB] * 3, 20),
        ({}, [9 * MIB] * 3, 60),  # two to a segment; bounded by halves, since the order is not known
        ({"large_segment": 40 * MIB}, [2 * MIB], 40),
        ({"expandable_segments": True}, [33 * MIB], 40),
        ({"expandable_segments": True}, [33 * MIB, 5 * MIB, 1], 42),
    ],
)
def test_segments(options: dict[str, Any], requests: list[int], reserved: int) -> None:
    assert CachingAllocator(**options).reserved(requests) == reserved * MIB


@given(st.lists(st.integers(1, 40 * MIB), max_size=12), st.booleans(), st.sampled_from([0, 2, 8]))
@example([3 * MIB // 2, 12 * MIB, 8 * MIB], False, 0)  # the second beside the first
def test_no_order_of_requests_takes_more(requests: list[int], expandable: bool, divisions: int) -> None:
    """Against the allocator's own way: the smallest free block that will do, else another segment."""
    allocator = CachingAllocator(expandable, divisions=(divisions,) * 16)
    free: list[tuple[bool, int]] = []  # (small, bytes) of what is left in segments
    reserved = 0
    if expandable:
        small = sum(allocator.round(size) for size in requests if allocator.round(size) <= MIB)
        large = sum(allocator.round(size) for size in requests) - small
        reserved = -(-small // (2 * MIB)) * 2 * MIB + -(-large // (20 * MIB)) * 20 * MIB
    else:
        for size in map(allocator.round, requests):
            is_small = size <= MIB
            fitting = [block for block in free if block[0] == is_small and block[1] >= size]
            if fitting:
                block = min(fitting)
                free.remove(block)
            else:
                whole = -(-size // (2 * MIB)) * 2 * MIB
                block = (is_small, 2 * MIB if is_small else 20 * MIB if size < 10 * MIB else whole)
                reserved += block[1]
            left = block[1] - size
            if left >= 512 if is_small else left > MIB:
                free.append((is_small, left))
    assert reserved <= allocator.reserved(requests)
    assert allocator.reserved(requests) >= sum(requests)


# Items


def test_an_arena_and_what_pytorch_takes_end_in_whole_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of()
    arena = plan.size("device")
    assert arena > 10 * MIB
    assert arena % (2 * MIB)

    def pooled() -> int:
        return arena + sum(item.bytes for item in outside_items(plan, find_gpu("L4")) if item.pooled)

    # Steps of 2 MiB, 32 MiB for cuBLAS, and a page for small tensors on each of two streams.
    assert pooled() == -(-arena // (2 * MIB)) * 2 * MIB + (32 + 2 + 2) * MIB
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert pooled() == -(-arena // (20 * MIB)) * 20 * MIB + (40 + 2 + 2) * MIB


@pytest.mark.parametrize("gpu", [*GPUS, None], ids=lambda gpu: gpu.name if gpu else "unknown")
def test_every_item_says_where_it_is_from(gpu: Gpu | None) -> None:
    items = outside_items(plan_of(), gpu)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert outside(plan_of(), gpu) == {item.name: item.bytes for item in items}
    for item in items:
        assert item.source
        assert item.basis == ("computed" if item.pooled or item.name == "local-memory pool" else "estimate")
    assert names[-1] == MARGIN


def test_a_card_takes_what_was_read_on_its_kind_and_an_unknown_one_the_most() -> None:
    plan = plan_of()
    ampere, ada, hopper, unknown = (
        outside(plan, find_gpu(name) if name else None)[CUDA_CONTEXT]
        for name in ("RTX 3090", "RTX 4090", "H100", None)
    )
    assert (ampere, ada) == (256 * MIB, 426 * MIB)
    assert hopper == unknown == 512 * MIB, "nothing is published for Hopper"


def test_the_table_pretends_nothing() -> None:
    """Each row says whose it is and where it is from, nothing in it goes unused, and it has a version."""
    value = json.loads(module.TABLE.read_text())
    assert set(value) == {"schema", "version", "about", "rows"}
    assert value["schema"] == module.SCHEMA
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", value["version"])
    rows = value["rows"]
    names = {"CUDA context", "loaded kernels", "Triton modules", "CUDA graphs"}
    assert {row["item"] for row in rows} == names
    for row in rows:
        assert set(row) == {"item", "capability", "bytes", "own", "source"}
        assert re.search(r"#\d+|README|cubins", row["source"]), row
        said = re.search(r"([\d.]+) (GiB|MiB|MB|KB)", row["source"].partition(":")[2])
        assert said is not None, row
        unit = {"GiB": GIB, "MiB": MIB, "MB": MIB, "KB": KIB}[said[2]]
        assert (float(said[1]) * unit == row["bytes"]) is not row["own"], "a reading is as its source says"
    assert {row["item"] for row in rows if row["own"]} == {"loaded kernels", "Triton modules"}


def test_the_margin_is_the_spread_and_twice_that_where_nothing_is_published() -> None:
    rows = [row for row in module._table() if row.item == CUDA_CONTEXT]
    spread = max(row.bytes for row in rows) - min(row.bytes for row in rows)
    read_on = {tuple(row.capability) for row in rows if row.capability}
    assert {(8, 0), (8, 6), (8, 9)} == read_on
    for gpu in (*GPUS, None):
        known = gpu is not None and gpu.compute_capability in read_on
        assert outside(plan_of(), gpu)[MARGIN] == (spread if known else 2 * spread), gpu
    # All that was seen beside a ledger on an RTX 4090, less its context, is provided for.
    (kernels,) = (row.bytes for row in module._table() if row.item == "loaded kernels")
    assert kernels + spread >= (903 - 426) * MIB


def test_a_table_of_another_schema_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "outside.json"
    table.write_text(json.dumps({"schema": 1, "rows": []}))
    monkeypatch.setattr(module, "TABLE", table)
    module._table.cache_clear()
    try:
        with pytest.raises(AssertionError, match="schema 1"):
            outside_items(plan_of())
    finally:
        module._table.cache_clear()


def test_deterministic_attention_is_priced_and_products_cost_the_same() -> None:
    keys = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "attention": "flash"}
    any_order, ordered = (outside(plan_of(**keys, deterministic=value)) for value in (False, True))
    assert ordered["flash attention"] > any_order["flash attention"]
    assert ordered[CUBLAS] == any_order[CUBLAS] == cublas_workspace_bytes({CUBLAS_VARIABLE: ":4096:8"})


# Graphs


# What a recorded step launches: products are counted twice, since cuBLAS may split them.
_COUNT = """
import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from helpers import make_config
from albor.kernels.launches import record
from albor.memory.arena import Arena
from albor.memory.plan import plan_training
from albor.train.step import Trainer

class Torch(TorchDispatchMode):
    count = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 2 if "mm" in function.name() else 1 if "copy_" in function.name() else 0
        return function(*args, **(kwargs or {}))

for layers, recompute in ((1, "none"), (6, "none"), (6, "cheap"), (6, "block")):
    config = make_config(num_hidden_layers=layers, recompute=recompute, hidden_size=64)
    with record(90):
        trainer = Trainer(config, Arena(plan_training(config, "cuda", "bfloat16", "gpu"), "meta"), 0)
        launched, run = [], JITFunction.run
        def launch(*args, **kwargs):
            launched.append(1)
            return run(*args, **kwargs)
        JITFunction.run = launch
        tokens = np.zeros((config.train.micro_batch_size, config.data.sequence_length), np.int64)
        trainer.accumulator.begin(2)
        trainer.input.load(tokens, tokens)
        with Torch() as torch:
            trainer._micro_batch()
        JITFunction.run = run
    print(layers, len(launched) + torch.count)
"""


def test_a_captured_micro_batch_has_no_more_kernels_than_are_charged() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.getenv("PYTHONPATH", "")])
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT], env=environment, capture_output=True, text=True, timeout=120
    )
    assert counted.returncode == 0, counted.stderr
    found = [tuple(map(int, line.split())) for line in counted.stdout.splitlines()]
    assert [layers for layers, _ in found] == [1, 6, 6, 6]
    for layers, kernels in found:
        assert kernels <= NODES_PER_LAYER * (layers + 1)
    assert max(kernels for _, kernels in found) > 0.6 * NODES_PER_LAYER * 7, "as few as will do"


def test_graphs_are_charged_by_kernel() -> None:
    one, two = (plan_of(num_hidden_layers=layers) for layers in (6, 12))
    assert graph_nodes(one) == 7 * NODES_PER_LAYER
    on_device = plan_of(num_hidden_layers=6, accumulator="gpu")
    assert graph_nodes(on_device) == 2 * graph_nodes(one), (
        "with sums that are replaced, and that are added to"
    )
    assert outside(two)[GRAPHS] - outside(one)[GRAPHS] == 6 * NODES_PER_LAYER * 10 * KIB


# One stream


class _Products(TorchDispatchMode):
    """Where products are asked for: within `computing` or not."""

    def __init__(self, inside: list[bool]):
        super().__init__()
        self.inside, self.within, self.without = inside, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.name():
            self.within += bool(self.inside)
            self.without += not self.inside
        return func(*args, **(kwargs or {}))


def test_a_run_asks_for_products_on_one_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else cuBLAS would take another workspace: in steps, evaluations, samples and the report."""
    inside: list[bool] = []

    @contextmanager
    def computing(_: NoStreams) -> Iterator[None]:
        inside.append(True)
        try:
            yield
        finally:
            inside.pop()

    monkeypatch.setattr(NoStreams, "computing", computing)
    monkeypatch.chdir(tmp_path)
    config = write_project(tmp_path / "project")
    with _Products(inside) as products:
        result = call("train", config, "train.max_steps=4", "schedule.warmup_steps=0")
    assert result.code == 0, result.err
    assert products.without == 0
    assert products.within > 100
