"""The memory plan, what lies around it, and whether that fits: `albor vram-estimate`, and `albor train` too.

No torch: the answer comes in the time that Python and pydantic take to start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.errors import ConfigError, DoesNotFit, Problem
from albor.memory.attention import AttentionChoice, choose_attention
from albor.memory.cards import Device, Hardware, find_gpu
from albor.memory.cost import Cost
from albor.memory.devices import compute_dtype, falls_back, resolve_accumulator, this_machine
from albor.memory.outside import (
    CUDA_PROCESS_BYTES,
    ROUNDING,
    Item,
    calibration_for,
    calibration_note,
    outside_items,
)
from albor.memory.plan import MemoryPlan, least_device_bytes, plan_training, training_temporaries
from albor.memory.pytorch import CachingAllocator
from albor.memory.suggest import Suggestion, apply, nearest_fits
from albor.units import format_bytes

_CUDA_13_LEAST = (7, 5)  # the oldest capability that CUDA 13 compiles for


@dataclass(frozen=True)
class Estimate:
    """A run on some hardware, in bytes."""

    config: RunConfig
    plan: MemoryPlan
    hardware: Hardware

    @classmethod
    def of(cls, config: RunConfig, hardware: Hardware) -> Estimate:
        """Training `config` on `hardware`, with dtype, attention and accumulator resolved for it.

        Raises ConfigError for an attention or a precision that the hardware does not have.
        """
        device = hardware.device
        dtype = compute_dtype(config.train.precision, device)
        capability = hardware.gpu.compute_capability if hardware.gpu else None
        attention = choose_attention(config, device, capability)
        # Where the accumulator is depends on what fits, and that on what this attention takes.
        pinned = config if device == "cpu" else apply(config, {"train.attention": attention.backend})
        accumulator = resolve_accumulator(pinned, hardware, dtype)
        return cls(config, plan_training(config, device, dtype, accumulator, attention), hardware)

    @cached_property
    def architecture(self) -> Architecture:
        """The model in numbers."""
        return Architecture.from_config(self.config.model)

    @property
    def device(self) -> Device:
        """Where the run goes."""
        return self.plan.device

    @property
    def fallback(self) -> str | None:
        """What one should know of the dtype: that it is not the configured one, or that it will be slow."""
        if falls_back(self.config.train.precision, self.plan.compute_dtype):
            return "This CPU has no bf16 instructions: bf16 is computed in fp32."
        if self.lacks_bf16:
            return f"{self.hardware.description} has no bf16 instructions: use train.precision=fp16."
        return None

    @property
    def lacks_bf16(self) -> bool:
        """Whether the run computes in bf16 on a card that has no instructions for it."""
        gpu = self.hardware.gpu
        return gpu is not None and gpu.compute_capability < (8, 0) and self.plan.compute_dtype == "bfloat16"

    @property
    def notes(self) -> list[str]:
        """What one should know before one relies on the verdict."""
        gpu, notes = self.hardware.gpu, [self.fallback] if self.fallback else []
        if gpu is not None and gpu.compute_capability < _CUDA_13_LEAST:
            notes.append(f"torch for CUDA 13 does not know {gpu.name}: install one built for CUDA 12.")
        if self.device == "cuda" and not CachingAllocator.configured().is_native:
            notes.append("cudaMallocAsync is configured: what it takes beside the plan is an estimate.")
        return notes

    @property
    def peak_flops(self) -> float | None:
        """Of the card, per second in bf16; None where it is not known or not what the run computes in."""
        half = self.plan.compute_dtype in ("bfloat16", "float16")
        return self.hardware.gpu.bf16_peak_flops if self.hardware.gpu and half else None

    @cached_property
    def cost(self) -> Cost:
        """What the whole run takes."""
        return Cost.of(self.config, self.plan, self.hardware.gpu)

    @property
    def device_bytes(self) -> int:
        """The device arena."""
        return self.plan.size("device")

    @cached_property
    def outside(self) -> dict[str, int]:
        """What the device needs beside the arena, by item."""
        return {item.name: item.bytes for item in self.outside_items}

    @cached_property
    def outside_items(self) -> tuple[Item, ...]:
        """The same with where each number is from."""
        return outside_items(self.plan, self.hardware.gpu)

    @property
    def calibrated(self) -> bool:
        """Whether what the driver takes was measured, on such a card with this software."""
        return calibration_for(self.plan, self.hardware.gpu) is not None

    @property
    def calibration_note(self) -> str:
        """The same for people, and where not, why."""
        return calibration_note(self.plan, self.hardware.gpu)

    @property
    def required_bytes(self) -> int:
        """What the device's memory must hold. Where that is the host's, it is all that is planned."""
        needed = self.device_bytes + sum(self.outside.values())
        if self.plan.device == "cpu":
            needed += self.plan.size("host") + self.plan.size("pinned")
        elif self.hardware.unified:
            needed += self.required_host_bytes
        return needed

    def least_required_bytes(
        self, config: RunConfig, accumulator: Literal["cpu", "gpu"], attention: AttentionChoice
    ) -> int:
        """What `config` needs at least here, in a fraction of the time of planning it. It has this one's
        model and precision; what lies beside its arena may be less than this one's.
        """
        dtype = self.plan.compute_dtype
        arena = least_device_bytes(config, self.device, dtype, accumulator, attention)
        temporaries = training_temporaries(config, self.device, dtype, attention)
        return arena + sum(temporaries.values()) + self._least_outside

    @cached_property
    def _least_outside(self) -> int:
        """What no batch and no recomputation changes; of the sums' places, that with fewer graphs."""
        plan = replace(self.plan, accumulator="cpu")
        items = outside_items(plan, self.hardware.gpu)
        return sum(item.bytes for item in items if item.name not in {ROUNDING, *plan.temporaries})

    @property
    def required_host_bytes(self) -> int:
        """What the host's memory must hold for a run on the GPU."""
        return self.plan.size("host") + self.plan.size("pinned") + CUDA_PROCESS_BYTES

    @property
    def fits(self) -> bool | None:
        """None: the capacity is not known."""
        if self._host_is_short:
            return False
        capacity = self.hardware.capacity_bytes
        return None if capacity is None else self.required_bytes <= capacity

    @property
    def _host_is_short(self) -> bool:
        host = self.hardware.host_capacity_bytes
        return self.plan.device == "cuda" and host is not None and self.required_host_bytes > host

    @property
    def verdict(self) -> str:
        """One line for people."""
        needed, capacity = self.required_bytes, self.hardware.capacity_bytes
        if self._host_is_short:
            needed, capacity = self.required_host_bytes, self.hardware.host_capacity_bytes
        need = f"{format_bytes(needed)} {'of host memory ' if self._host_is_short else ''}needed"
        if capacity is None:
            ask = "; give --gpu NAME or --vram 24GiB" if self.plan.device == "cuda" else ""
            if self.hardware.unified:
                ask = "; it uses the host's memory: give what is free of that, --vram 100GiB"
            return f"unknown: {need}, and no capacity known{ask}"
        if needed <= capacity:
            return f"fits: {need}, {format_bytes(capacity)} available"
        over = format_bytes(needed - capacity)
        return f"does not fit: {need}, {format_bytes(capacity)} available, {over} too little"

    @property
    def held(self) -> str | None:
        """Who else holds memory of the card, and whether that is what is missing; None: nobody does."""
        text, capacity = self.hardware.held, self.hardware.capacity_bytes
        if text is None or self.fits is not False or self._host_is_short or capacity is None:
            return text
        enough = self.required_bytes <= capacity + self.hardware.held_bytes
        return f"{text}; {'without them it would fit' if enough else 'without them it would not fit either'}"

    @cached_property
    def suggestions(self) -> tuple[Suggestion, ...]:
        """Where the run does not fit: the nearest changes with which it would."""
        if self.fits is not False:
            return ()

        capacity = self.hardware.capacity_bytes
        capability = self.hardware.gpu.compute_capability if self.hardware.gpu else None

        def required(config: RunConfig) -> int | None:
            attention = choose_attention(config, self.device, capability)
            given = config.train.accumulator
            places: tuple[Literal["cpu", "gpu"], ...] = ("cpu", "gpu") if given == "auto" else (given,)
            least = min(self.least_required_bytes(config, place, attention) for place in places)
            if capacity is not None and least > capacity:
                return None  # most end here
            changed = Estimate.of(config, self.hardware)
            return changed.required_bytes if changed.fits else None

        return nearest_fits(self.config, self.device, required)

    @property
    def advice(self) -> list[str]:
        """Lines that follow a refusal: each suggestion, ready to be added to the command."""
        if not self.suggestions:
            return ["No change of batch, recomputation or sequence makes it fit: take a smaller model."]
        width = max(len(suggestion.overrides) for suggestion in self.suggestions)
        lines = [f"  {s.overrides:<{width}}  {format_bytes(s.required_bytes)}" for s in self.suggestions]
        return ["Nearest changes that would fit:", *lines]

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        plan, config = self.plan, self.config
        return {
            "parameters": self.architecture.parameter_count,
            "flops_per_token": self.architecture.flops_per_token(config.data.sequence_length),
            "tokens_per_step": config.tokens_per_step,
            "device": plan.device,
            "compute_dtype": plan.compute_dtype,
            "attention": {"backend": plan.attention.backend, "reason": plan.attention.reason},
            "device_bytes": self.device_bytes,
            "pinned_bytes": plan.size("pinned"),
            "host_bytes": plan.size("host"),
            "capacity_bytes": self.hardware.capacity_bytes,
            "capacity_source": self.hardware.gpu.source if self.hardware.gpu else None,
            "holders": [
                {"pid": holder.pid, "name": holder.name, "bytes": holder.memory_bytes}
                for holder in self.hardware.holders
            ],
            "fits": self.fits,
            "peak_phase": plan.peak_phase,
            "phases": plan.live_bytes,
            "groups": plan.groups,
            "outside": self.outside,
            "calibrated": self.calibrated,
            "outside_sources": {
                item.name: {"basis": item.basis, "source": item.source} for item in self.outside_items
            },
            "cost": self.cost.as_json(),
            "notes": self.notes,
            "suggestions": [
                {"overrides": s.overrides, "required_bytes": s.required_bytes} for s in self.suggestions
            ],
            "buffers": [
                {
                    "name": buffer.name,
                    "shape": list(buffer.shape),
                    "dtype": buffer.dtype,
                    "bytes": buffer.nbytes,
                    "place": buffer.place,
                    "group": buffer.group,
                    "first_phase": plan.phases[buffer.first],
                    "last_phase": plan.phases[buffer.last],
                    "offset": buffer.offset,
                }
                for buffer in plan.buffers
            ],
        }


def estimate(config: RunConfig, gpu: str | None = None, vram: int | None = None) -> Estimate:
    """Plans `config` for the card called `gpu`, or for `vram` bytes, or for the card in this machine.

    Without any of these the capacity is unknown. A configuration with `device: cpu` is planned for this host.
    Raises ConfigError for an unknown card.
    """
    hardware = _asked(config.device, gpu, vram)
    return Estimate.of(config, hardware)


def _asked(device: Literal["auto", "cuda", "cpu"], gpu: str | None, vram: int | None) -> Hardware:
    if gpu is None and vram is None:
        return this_machine("cpu" if device == "cpu" else "cuda")
    if device == "cpu":
        what = "is cpu, and --gpu and --vram ask about a GPU"
        raise ConfigError([Problem("device", what, "add device=cuda, or leave them out")])
    card = None if gpu is None else find_gpu(gpu)
    usable = card.usable_bytes if card else None
    capacity = usable if vram is None else vram
    unified = card is not None and card.unified
    return Hardware("cuda", card.name if card else "CUDA", card, capacity, unified=unified)


def plan_for_training(config: RunConfig) -> Estimate:
    """What `albor train` goes by: the plan of `config` for this machine, as it is now."""
    hardware = this_machine(config.device)
    return Estimate.of(config, hardware)


def check_fits(target: Estimate) -> None:
    """Raises DoesNotFit, with what `albor vram-estimate` would say; an unknown capacity passes.

    `albor train` asks this before any CUDA call.
    """
    if target.fits is False:
        verdict = f"{target.hardware.description}: {target.verdict}"
        held = [f"Held: {target.held}."] if target.held else []
        raise DoesNotFit("\n".join([verdict, *held, *target.advice]))
