"""Allocates exactly the memory plan, once, and hands out its buffers as views.

After this nothing of a tensor's size is allocated: the trainer works in these views.
"""

from __future__ import annotations

import weakref

import torch

from albor.architecture import Parameter
from albor.errors import AlborError
from albor.memory.plan import MemoryPlan
from albor.memory.pytorch import pin_cublas_workspace


class Arena:
    """One slab of bytes per place (device, pinned, host), and the plan's buffers as tensors in them.

    With `poison`, every buffer is filled with NaN (integers: with their smallest value) when its life begins.
    A kernel that reads what nobody wrote, or a lifetime that is too short, then shows in the result. It is
    for tests, and for `initialise`: fresh memory is poisoned there in any case.
    """

    def __init__(self, plan: MemoryPlan, device: torch.device | str = "cpu", *, poison: bool = False):
        self.plan = plan
        self.device = torch.device(device)
        if self.device.type == "cuda":
            pin_cublas_workspace()  # which is charged beside the plan; nothing was multiplied yet
        self._poison = poison
        self._phase_index = {phase: index for index, phase in enumerate(plan.phases)}
        self.slabs = {
            "device": torch.empty(plan.size("device"), dtype=torch.uint8, device=self.device),
            "pinned": self._host_memory(plan.size("pinned"), locked=True),
            "host": self._host_memory(plan.size("host"), locked=False),
        }
        self._views: dict[str, torch.Tensor] = {}
        for buffer in plan.buffers:
            dtype = getattr(torch, buffer.dtype)
            data = self.slabs[buffer.place][buffer.offset : buffer.offset + buffer.nbytes]
            self._views[buffer.name] = data.view(dtype).view(buffer.shape)
        self._fill_newborn(0)

    def _host_memory(self, size: int, *, locked: bool) -> torch.Tensor:
        if self.device.type == "meta":
            return torch.empty(size, dtype=torch.uint8, device="meta")
        memory = torch.empty(size, dtype=torch.uint8)
        if locked and size and self.device.type == "cuda":
            # torch's own pinned allocator would round the size up to a power of two.
            cudart = torch.cuda.cudart()
            failure = cudart.cudaHostRegister(memory.data_ptr(), size, 0)
            if failure != cudart.cudaError.success:
                raise AlborError(
                    f"{size:,} bytes of host memory cannot be page-locked (CUDA error {int(failure)}); free "
                    "memory, raise the container's limit, or sum gradients on the GPU: train.accumulator=gpu"
                )
            weakref.finalize(self, cudart.cudaHostUnregister, memory.data_ptr())
        return memory

    def __getitem__(self, name: str) -> torch.Tensor:
        """The buffer called `name`, in its planned shape and dtype."""
        return self._views[name]

    def get(self, name: str) -> torch.Tensor | None:
        """The buffer called `name`, or None where this plan has no use for it."""
        return self._views.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._views

    def parameter(self, flat: str, parameter: Parameter) -> torch.Tensor:
        """`parameter`'s elements in the flat buffer `flat` (weights, master, moments.first, ...), in its
        shape.
        """
        return self[flat][parameter.offset : parameter.offset + parameter.size].view(parameter.shape)

    def enter(self, phase: str) -> None:
        """Says that the run is now in `phase`; the step calls this at each border of the plan's phases."""
        if self._poison:
            self._fill_newborn(self._phase_index[phase])

    def _fill_newborn(self, phase: int) -> None:
        for buffer in self.plan.buffers:
            if buffer.first != phase or (phase == 0 and not self._poison and buffer.group != "io"):
                continue
            view = self._views[buffer.name]
            view.fill_(_poison(view.dtype))


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
