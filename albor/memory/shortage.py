"""What counts as out of memory. PyTorch, NumPy and cuBLAS each say it in their own way."""

from __future__ import annotations

import torch

# PyTorch raises a plain RuntimeError for these two.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory is short: less work may succeed where this failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


def give_back() -> None:
    """Returns to the device what PyTorch's allocator only holds in reserve, for others to use."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
