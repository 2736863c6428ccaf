"""What a launcher needs to know of its device: block sizes are a function of that and of shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """A kind of device, by CUDA compute capability."""

    capability: int  # 10 * major + minor: 80, 86, 89, 90, 100, 120

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may have at most (CUDA programming guide, compute capabilities)."""
        return {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}.get(self.capability, 99) * 1024


_assumed: Target | None = None


def target_of(tensor: torch.Tensor) -> Target:
    """The target on which a kernel over `tensor` runs.

    On the CPU kernels run in Triton's interpreter, as for an sm_80. Tensors without data (device "meta") take
    the target that `assume` says.
    """
    if _assumed is not None:
        return _assumed
    if tensor.device.type != "cuda":
        return Target(80)
    return _cuda_target(tensor.device.index)


@cache
def _cuda_target(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    return Target(10 * major + minor)


@contextmanager
def assume(target: Target) -> Iterator[None]:
    """Within it every launcher chooses for `target`: kernels can be compiled for a card that is not here."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before
