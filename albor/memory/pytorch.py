"""What PyTorch takes of a card's memory for itself: cuBLAS's workspaces, and whole segments for a request.

By the rules of its sources, 2.11 to 2.13: aten/src/ATen/cuda/CublasHandlePool.cpp (parseChosenWorkspaceSize,
setWorkspaceForHandle, getCUDABlasLtWorkspace), c10/core/AllocatorConfig.h and
c10/cuda/CUDACachingAllocator.cpp (round_size, get_allocation_size, ExpandableSegment). No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from albor.errors import ConfigError, Problem
from albor.units import KIB, MIB

CUBLAS_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
# Eight buffers of 4096 KiB on every card. Without it PyTorch takes 8,519,680 bytes or 32 MiB, by its version
# and the card (pytorch #89027, #175344). NVIDIA recommends 32 MiB from Hopper on; and of the two settings
# that torch.use_deterministic_algorithms accepts this is the fast one: a deterministic run has the same bill.
CUBLAS_SETTING = ":4096:8"
_CUBLAS_MOST_BY_DEFAULT = 32 * MIB

_SMALL, _MIDDLE = 1 * MIB, 10 * MIB  # kSmallSize, kMinLargeAlloc
_BLOCK, _PAGE = 512, 2 * MIB  # kMinBlockSize; kSmallBuffer and kRoundLarge
_INTERVALS = 16  # kRoundUpPowerOfTwoIntervals
_NUMBER = re.compile(r"[0-9]{1,9}")


def pin_cublas_workspace(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets what the plan charges, unless the user has set something, which the plan charges then.

    Comes before a process's first product on a GPU: cuBLAS and PyTorch read it once.
    """
    environment.setdefault(CUBLAS_VARIABLE, CUBLAS_SETTING)


def cublas_workspace_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """Of one handle on one stream: it is kept until the process ends."""
    buffers = re.findall(r":(\d+):(\d+)", environment.get(CUBLAS_VARIABLE, CUBLAS_SETTING))
    if not buffers:  # PyTorch warns, and takes its default
        return _CUBLAS_MOST_BY_DEFAULT
    return sum(int(size) * KIB * int(count) for size, count in buffers)


def cublaslt_workspace_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """What cuBLASLt has beside it: nothing, unless sharing one workspace was switched off."""
    if environment.get("TORCH_CUBLASLT_UNIFIED_WORKSPACE") != "0":
        return 0
    size = re.match(r"\s*\d+", environment.get("CUBLASLT_WORKSPACE_SIZE", ""))
    return int(size[0]) * KIB if size else 1 * MIB


@dataclass(frozen=True)
class CachingAllocator:
    """How PyTorch's allocator takes memory from the driver."""

    expandable_segments: bool = False
    large_segment: int = 20 * MIB
    # Requests are rounded up to one of so many steps from a power of two to the next; 0 and 1: they are not.
    # One number for each power of two, from 1 MiB on.
    divisions: tuple[int, ...] = (0,) * _INTERVALS
    backend: str = "native"

    @classmethod
    def configured(cls, environment: Mapping[str, str] = os.environ) -> CachingAllocator:
        """By PYTORCH_ALLOC_CONF or, where that is not set, PYTORCH_CUDA_ALLOC_CONF.

        Options that only decide what is reused or given back take no more memory than this says. Another
        allocator, `backend:cudaMallocAsync`, is priced as this one; see `is_native`. Raises ConfigError for
        sizes that PyTorch refuses too.
        """
        names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
        name = next((name for name in names if environment.get(name)), names[0])
        text = "".join(environment.get(name, "").split())
        options = dict(re.findall(r"(\w+):(\[[^\]]*\]|[^,\[\]]*)", text))
        large = options.get("large_segment_size_mb", "20")
        if not _NUMBER.fullmatch(large) or not int(large):
            raise _refusal(name, f"large_segment_size_mb:{large} is no number of MiB above zero", "write 20")
        return cls(
            expandable_segments=options.get("expandable_segments") == "True",
            large_segment=int(large) * MIB,
            divisions=_divisions(options.get("roundup_power2_divisions", "0"), name),
            backend=options.get("backend", "native"),
        )

    @property
    def is_native(self) -> bool:
        """Whether it is the allocator that is modelled here."""
        return self.backend == "native"

    def round(self, size: int) -> int:
        """The block that a request of `size` bytes gets."""
        size = max(size, 1)
        interval = min(max((size // MIB).bit_length() - 1, 0), len(self.divisions) - 1)
        divisions = self.divisions[interval]
        if divisions > 1 and size > _BLOCK * divisions:
            return _whole(size, 1 << size.bit_length() - divisions.bit_length())
        return _whole(size, _BLOCK)

    def reserved(self, requests: Sequence[int]) -> int:
        """Bytes taken from the driver at most to hold `requests` at the same time, on one stream.

        Small ones share pages of 2 MiB, and middle ones larger segments, of which another is opened where the
        next does not fit; each large one has its own. An expandable segment grows by whole steps.
        """
        blocks = [self.round(size) for size in requests if size]
        small = sum(size for size in blocks if size <= _SMALL)
        middle = sum(size for size in blocks if _SMALL < size < _MIDDLE)
        large = [size for size in blocks if size >= _MIDDLE]
        if self.expandable_segments:
            return _whole(small, _PAGE) + _whole(middle + sum(large), self.large_segment)
        own = [_whole(size, _PAGE) for size in large]
        # A large one that finds room beside middle ones takes it, and they need another segment.
        guests = [size for size in own if size < self.large_segment] if middle else []
        return _shared(small, _PAGE, _SMALL) + max(
            _shared(middle, self.large_segment, _MIDDLE) + sum(own),
            _shared(middle + sum(guests), self.large_segment, _MIDDLE) + sum(own) - sum(guests),
        )


def _shared(total: int, segment: int, largest: int) -> int:
    """Of segments that hold `total` bytes, in pieces of at most `largest`."""
    filled = max(segment - largest, MIB)  # at least, when the next is opened
    return segment * (-(-total // segment) if total <= segment else -(-total // filled))


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def _divisions(option: str, variable: str) -> tuple[int, ...]:
    """Of `8`, or `[256:1,512:2,>:4]` with the MiB at which each begins; the first holds below it too."""
    if _NUMBER.fullmatch(option):
        return (int(option),) * _INTERVALS
    pairs = re.findall(r"([0-9]{1,9}|>):([0-9]{1,9})", option)
    if option != "[" + ",".join(f"{start}:{value}" for start, value in pairs) + "]":
        example = "write 8, or [256:1,512:2,>:4]"
        raise _refusal(variable, f"roundup_power2_divisions:{option} is not understood", example)
    found, end = [0] * _INTERVALS, 0
    for number, (start, value) in enumerate(pairs):
        if start == ">":
            found[end:] = [int(value)] * (_INTERVALS - end)
            break
        index = min(max(int(start).bit_length() - 1, 0), _INTERVALS - 1)
        begin = 0 if number == 0 else index
        end = index + 1
        found[begin:end] = [int(value)] * (end - begin)
    return tuple(found)


def _refusal(variable: str, message: str, remedy: str) -> ConfigError:
    return ConfigError([Problem(variable, message, remedy, "environment")])
