"""What is out of memory, and what is another failure, by the words of those who say so."""

from __future__ import annotations

import pytest
import torch

from albor import faults
from albor.memory.shortage import is_out_of_memory

SHORT: list[BaseException] = [
    MemoryError("Unable to allocate 8.00 EiB for an array"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
]
OTHER: list[BaseException] = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    RuntimeError("the tokenizer's text says: out of memory"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    OSError("CUDA error: out of memory"),  # what no library raises
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", SHORT, ids=str)
def test_a_shortage(error: BaseException):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_another_failure(error: BaseException):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize("action", ["oom", "oom-driver"])
def test_what_is_raised_on_purpose_is_a_shortage(action: str):
    plan = faults.Plan(faults.parse(f"evaluate.batch:12:{action}"))
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        plan.reach("evaluate.batch", 12)
    assert is_out_of_memory(raised.value)
