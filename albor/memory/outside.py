"""What a run takes on its device beside the arena, item by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from albor.memory.cards import Gpu
from albor.memory.plan import MemoryPlan
from albor.units import GIB, MIB

# What the arena does not hold. Items marked as estimates are read off other people's machines, rounded up.
CUDA_CONTEXT = "CUDA context"
LOADED_KERNELS = "loaded kernels"
PROCESS = "Python and torch"
ESTIMATED = frozenset({CUDA_CONTEXT, LOADED_KERNELS, PROCESS})
# 426 MiB on an RTX 6000 Ada with torch 2.10 (unsloth-zoo#1053); 300 to 400 MB (pytorch#107667, #109888).
_CUDA_CONTEXT_BYTES = 448 * MIB
# They grow when a library's kernel is first used. llmq's whole remainder on an RTX 4090, with context, cuDNN
# and NCCL, is 903 MiB; here are cuBLAS and Triton.
_LOADED_KERNELS_BYTES = 256 * MIB
# Beside a quickstart run's arena, torch 2.13 for the CPU on Linux x86-64: 300 MB resident, and 500 MB in a
# first run, which trains the tokenizer too.
_PROCESS_BYTES = 512 * MIB
# The same with torch for CUDA, whose libraries are ten times the size: host memory beside a run's pinned and
# host arenas. Not measured.
CUDA_PROCESS_BYTES = 2 * GIB
# PyTorch's CublasHandlePool: ":4096:2:16:8" by default, 32 MiB from compute capability 9; one per handle and
# stream.
_CUBLAS_BYTES, _CUBLAS_BYTES_90 = 8_519_680, 32 * MIB
_SMALL_POOL_BYTES = 2 * MIB  # one segment holds all tensors of up to 1 MiB: the loss, the norm


@dataclass(frozen=True)
class Item:
    """One thing beside the arena, in bytes, and how its size is known."""

    name: str
    bytes: int
    basis: Literal["computed", "measured", "estimate"]
    source: str
    pooled: bool = False  # PyTorch's allocator takes it: `torch.cuda.memory_reserved` counts it


def outside(plan: MemoryPlan, gpu: Gpu | None = None) -> dict[str, int]:
    """Bytes that a device needs beside the arena, by item; for an unknown `gpu`, the most it can be."""
    return {item.name: item.bytes for item in outside_items(plan, gpu)}


def outside_items(plan: MemoryPlan, gpu: Gpu | None = None) -> tuple[Item, ...]:
    """The same with their sources."""
    pooled = plan.device == "cuda"
    taken = tuple(
        Item(name, size, "estimate" if "(estimate)" in name else "computed", "the plan", pooled)
        for name, size in plan.temporaries.items()
    )
    if plan.device == "cpu":
        return (Item(PROCESS, _PROCESS_BYTES, "estimate", "a quickstart run, torch 2.13 for the CPU"), *taken)
    cublas = _CUBLAS_BYTES_90 if gpu is None or gpu.compute_capability >= (9, 0) else _CUBLAS_BYTES
    segments = (plan.size("device"), cublas, *plan.temporaries.values())
    rounding = sum(_segment(size) - size for size in segments) + _SMALL_POOL_BYTES
    return (
        Item(CUDA_CONTEXT, _CUDA_CONTEXT_BYTES, "estimate", "unsloth-zoo#1053, pytorch#107667, #109888"),
        Item(LOADED_KERNELS, _LOADED_KERNELS_BYTES, "estimate", "llmq's README run, less cuDNN and NCCL"),
        Item("cuBLAS workspace", cublas, "computed", "PyTorch's CublasHandlePool.cpp", True),
        *taken,
        Item("allocator rounding", rounding, "computed", "PyTorch's CUDACachingAllocator.cpp", True),
    )


def _segment(size: int) -> int:
    """What CUDACachingAllocator takes from the driver for a first request of `size` bytes."""
    if size <= MIB:
        return 2 * MIB if size else 0
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
