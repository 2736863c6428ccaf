"""The arithmetic of the model: one signature per operation, every output preallocated.

`Ops` says what each operation is; `TorchOps` does it with torch, on the CPU, and is the reference for
`TritonOps`, which launches the project's kernels on CUDA. The plan that an arena was allocated for decides
which of the two works in it.
"""

from __future__ import annotations

import torch

from albor.memory.arena import Arena
from albor.ops.base import Documents, Ops, UpdateScalars
from albor.ops.flat import accumulate, is_finite, norm, rotary_tables
from albor.ops.torch_ops import TorchOps

__all__ = [
    "Documents", "Ops", "TorchOps", "UpdateScalars",
    "accumulate", "is_finite", "make_ops", "norm", "rotary_tables",
]  # fmt: skip


def make_ops(arena: Arena) -> Ops:
    """The operations for an arena, with their scratch buffers in it."""
    if arena.plan.device == "cpu":
        return TorchOps.from_arena(arena)
    from albor.ops.triton_ops import TritonOps  # Triton is imported where a GPU asks for it

    # cuBLAS may otherwise round the parts of a sum that it splits among programs.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return TritonOps.from_arena(arena)
