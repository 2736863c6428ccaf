"""What counts as out of memory. PyTorch, NumPy, the CUDA driver, Triton and NVIDIA's libraries each say it in
their own way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from albor.errors import AlborError

# What comes as a RuntimeError, or as torch.AcceleratorError, which is one.
_SAID = re.compile(
    r"(?:CUDA error|CUDA driver error|Triton Error \[CUDA\]): .*out of memory"  # at its beginning
    r"|.*(?:DefaultCPUAllocator: can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED)",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that host or device memory is short: less work may succeed where this failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SAID.match(str(error)) is not None


@contextmanager
def explained(remedy: str) -> Iterator[None]:
    """Makes an AlborError, which says `remedy`, of a shortage in the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise AlborError(f"out of memory: {reason}; {remedy}") from error


def give_back() -> None:
    """Returns to the device what PyTorch's allocator only holds in reserve, for others to use."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
