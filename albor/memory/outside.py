"""What a run takes on its device beside the arena, item by item, each with how its size is known.

What PyTorch takes is computed, by `albor.memory.pytorch`. What the driver takes nobody can compute: it is
measured by `albor calibrate`. Where that has not been run it is taken from outside.json, which says of every
number whether somebody has published it or albor itself makes it out of what is published, and a margin is
added for what those numbers differ by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from albor.memory.calibration import (
    CUDA_CONTEXT,
    GRAPHS,
    LOADED_KERNELS,
    PROCESS,
    Calibration,
    Software,
    Stored,
    calibration_path,
    find_calibration,
    read_calibrations,
)
from albor.memory.cards import Gpu
from albor.memory.plan import MemoryPlan
from albor.memory.pytorch import CachingAllocator, cublas_workspace_bytes, cublaslt_workspace_bytes
from albor.units import GIB, MIB

TABLE = Path(__file__).with_name("outside.json")
SCHEMA = 2

TRITON_MODULES = "Triton modules"
LOCAL_MEMORY = "local-memory pool"
GRAPH_POOL = "graph pool"
CUBLAS, CUBLASLT = "cuBLAS workspace", "cuBLASLt workspace"
ROUNDING = "allocator rounding"
MARGIN = "margin, not calibrated"
PREPARATION = "data preparation"

# What is published for one and the same thing, a context, lies between 256 and 512 MiB (outside.json): the
# driver and the libraries of a card that nobody has measured may take so much more than those that were; one
# of a generation of which nothing is published, twice that.
_MARGIN_BYTES = 256 * MIB
# Beside a quickstart run's arena, torch 2.13 for the CPU on Linux x86-64: 300 MB resident; a first run, which
# trains the tokenizer too, keeps up to 200 MB more.
_PROCESS_BYTES, _PREPARATION_BYTES = 320 * MIB, 192 * MIB
# The same with torch for CUDA, whose libraries are ten times the size: host memory beside a run's pinned and
# host arenas. Not measured.
CUDA_PROCESS_BYTES = 2 * GIB
# Kernels of a captured micro-batch per layer, and of the rest as for one layer more: 25, with recomputation
# 35, of which half are products, each of which may be two where cuBLAS splits a sum.
NODES_PER_LAYER = 56


@dataclass(frozen=True)
class Item:
    """One thing beside the arena, in bytes, and how its size is known."""

    name: str
    bytes: int
    basis: Literal["computed", "measured", "estimate"]
    source: str
    pooled: bool = False  # PyTorch's allocator takes it: `torch.cuda.memory_reserved` counts it


@dataclass(frozen=True)
class _Published:
    """A row of outside.json."""

    item: str
    capability: list[int] | None  # of the card it was read on; None: for every card
    bytes: int
    own: bool  # albor's own number, and nobody's reading
    source: str  # card and versions it was read with, and how the number comes out of that


def outside(plan: MemoryPlan, gpu: Gpu | None = None) -> dict[str, int]:
    """Bytes that a device needs beside the arena, by item; for an unknown `gpu`, the most it can be."""
    return {item.name: item.bytes for item in outside_items(plan, gpu)}


def outside_items(plan: MemoryPlan, gpu: Gpu | None = None) -> tuple[Item, ...]:
    """The same with their sources, by this machine's calibration where there is one."""
    row = calibration_for(plan, gpu)
    items = _beside_process(plan, row) if plan.device == "cpu" else _on_card(plan, gpu, row)
    return tuple(items)


def calibration_for(plan: MemoryPlan, gpu: Gpu | None) -> Calibration | None:
    """What was measured where `plan` goes; None: nothing."""
    rows = _stored().rows
    return find_calibration(rows, plan.device, gpu, _installed()) if rows else None


def calibration_note(plan: MemoryPlan, gpu: Gpu | None) -> str:
    """One line for people: what the estimate goes by, or why it goes by nothing."""
    row = calibration_for(plan, gpu)
    if row is not None:
        return f"calibrated ({row})"
    if problem := _stored().problem:
        return f"not calibrated: {problem}"
    return "not calibrated: run `albor calibrate`" + (" on it" if plan.device == "cuda" else "")


def _beside_process(plan: MemoryPlan, row: Calibration | None) -> Iterator[Item]:
    source = "a quickstart run, torch 2.13 for the CPU"
    if row is None:
        yield Item(PROCESS, _PROCESS_BYTES, "estimate", source)
        yield Item(PREPARATION, _PREPARATION_BYTES, "estimate", f"{source}: its first")
    else:
        yield Item(PROCESS, row.bytes[PROCESS], "measured", f"{row}, with its preparation of data")
    yield from _temporaries(plan)


def _on_card(plan: MemoryPlan, gpu: Gpu | None, row: Calibration | None) -> Iterator[Item]:
    nodes = graph_nodes(plan)
    if row is None:
        yield _published(CUDA_CONTEXT, gpu)
        yield _published(LOADED_KERNELS, gpu)
        yield _published(TRITON_MODULES, gpu)
        each = _published(GRAPHS, gpu)
        yield Item(GRAPHS, nodes * each.bytes, each.basis, f"{nodes} kernels; {each.source}")
    else:
        yield Item(CUDA_CONTEXT, row.bytes[CUDA_CONTEXT], "measured", str(row))
        yield Item(LOADED_KERNELS, row.bytes[LOADED_KERNELS], "measured", str(row))
        graphs = -(-row.bytes[GRAPHS] * nodes // max(row.graph_nodes, 1))
        yield Item(GRAPHS, graphs, "measured", f"{row}: {row.graph_nodes} kernels, here {nodes}")
    # A spilled register costs its bytes for every thread that the card can hold.
    yield Item(
        LOCAL_MEMORY, 0, "computed", "no kernel of albor's spills: benchmarks/results/kernels-aot.json"
    )
    yield from _from_allocator(plan)
    if row is None:
        reason = "what is published for one context differs by 256 MiB (albor/memory/outside.json)"
        if _alike(CUDA_CONTEXT, gpu):
            yield Item(MARGIN, _MARGIN_BYTES, "estimate", reason)
        else:
            reason += ", and none is of such a card: twice that"
            yield Item(MARGIN, 2 * _MARGIN_BYTES, "estimate", reason)


def _from_allocator(plan: MemoryPlan) -> Iterator[Item]:
    """What PyTorch takes, and what it takes too much. The trainer has one thread that asks for products, and
    gives them to one stream: cuBLAS has one handle and one workspace.
    """
    allocator = CachingAllocator.configured()
    arena, cublas, lt = plan.size("device"), cublas_workspace_bytes(), cublaslt_workspace_bytes()
    yield Item(CUBLAS, cublas, "computed", "CUBLAS_WORKSPACE_CONFIG, by CublasHandlePool.cpp", True)
    if lt:
        yield Item(CUBLASLT, lt, "computed", "TORCH_CUBLASLT_UNIFIED_WORKSPACE=0: its own", True)
    yield from _temporaries(plan)
    if not plan.temporaries:
        yield Item(GRAPH_POOL, 0, "computed", "captured kernels work in the arena alone", True)
    # Small tensors, such as a sum on its way to the host: on the default stream, and on that of the products.
    reserved = allocator.reserved([arena, 1]) + allocator.reserved([cublas, lt, 1])
    reserved += sum(allocator.reserved([size]) for size in plan.temporaries.values())
    rounding = reserved - arena - cublas - lt - sum(plan.temporaries.values())
    if allocator.is_native:
        yield Item(ROUNDING, rounding, "computed", "CUDACachingAllocator.cpp", True)
    else:
        yield Item(
            ROUNDING, rounding, "estimate", f"as the native allocator's, not {allocator.backend}'s", True
        )


def _temporaries(plan: MemoryPlan) -> Iterator[Item]:
    for name, size in plan.temporaries.items():
        basis: Literal["estimate", "computed"] = "estimate" if "(estimate)" in name else "computed"
        yield Item(name, size, basis, "albor.memory.attention_bytes", plan.device == "cuda")


def graph_nodes(plan: MemoryPlan) -> int:
    """Kernels in the graphs that a run captures, at most."""
    layers = sum(phase.startswith("forward.") for phase in plan.phases)
    # A first micro-batch replaces the sums on the device, and the others add to them: two sets of graphs.
    return NODES_PER_LAYER * (layers + 1) * (2 if plan.accumulator == "gpu" else 1)


def _published(item: str, gpu: Gpu | None) -> Item:
    """Of what is published of `item`, what is for cards like `gpu`; the most, where nothing is."""
    rows = _alike(item, gpu) or [row for row in _table() if row.item == item]
    row = max(rows, key=lambda row: row.bytes)
    return Item(item, row.bytes, "estimate", row.source)


def _alike(item: str, gpu: Gpu | None) -> list[_Published]:
    """The rows that were read on cards of the generation of `gpu`."""
    return [
        row for row in _table() if row.item == item and gpu and row.capability == list(gpu.compute_capability)
    ]


@cache
def _table() -> tuple[_Published, ...]:
    value = json.loads(TABLE.read_text(encoding="utf-8"))
    assert value["schema"] == SCHEMA, f"{TABLE} is of schema {value['schema']}, and this code reads {SCHEMA}"
    return tuple(_Published(**row) for row in value["rows"])


# An estimate asks some hundred times, when it looks for a configuration that fits.
_installed = cache(Software.installed)
_read = cache(lambda path, _changed: read_calibrations(path))


def _stored() -> Stored:
    path = calibration_path()
    try:
        status = path.stat()
    except OSError:
        return read_calibrations(path)
    stored: Stored = _read(path, (status.st_mtime_ns, status.st_size, status.st_ino))
    return stored
