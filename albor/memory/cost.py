"""What a whole run costs: arithmetic, hours, electricity, and room on the disk.

Hours and kilowatt-hours need a speed: a modelled one (`albor.memory.speed`), or what the run has measured of
itself (`albor.memory.measured`). They count training steps alone; evaluations and saves come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from albor.architecture import Architecture
from albor.config import RunConfig
from albor.memory.cards import Gpu
from albor.memory.measured import measured_tokens_per_second
from albor.memory.plan import DTYPE_BYTES, STATE_BUFFERS, MemoryPlan
from albor.memory.speed import SpeedModel

TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022 (Chinchilla), table 3: the most for a run's arithmetic
LITTLE = 0.25  # of that: from here on the report says that it is little


@dataclass(frozen=True)
class Duration:
    """How long all steps of a run take, at one speed."""

    basis: Literal["modelled", "measured"]
    tokens_per_second: float
    hours: float
    kwh: float | None  # of the card at its board's power limit; None: the limit is not known
    note: str  # how it is known, in a few words
    source: str

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "hours": self.hours,
            "kwh": self.kwh,
            "note": self.note,
            "source": self.source,
        }


@dataclass(frozen=True)
class Cost:
    """One run from its first step to its last."""

    parameters: int
    tokens: int
    flops: int
    durations: tuple[Duration, ...]
    checkpoint_bytes: int  # of one checkpoint's tensors
    checkpoints: int  # that are kept at most

    @classmethod
    def of(cls, config: RunConfig, plan: MemoryPlan, gpu: Gpu | None) -> Cost:
        """What `config` costs where it is planned as `plan`; on a GPU, on the card `gpu`."""
        model = Architecture.from_config(config.model)
        tokens = config.steps * config.tokens_per_step
        speed = SpeedModel.of(gpu, plan.compute_dtype) if plan.device == "cuda" else None
        speeds: list[tuple[Literal["modelled", "measured"], float, str, str]] = []
        if speed is not None:
            rate = config.tokens_per_step / speed.step_seconds(config, plan)
            speeds.append(("modelled", rate, speed.note, speed.source))
        if (measured := measured_tokens_per_second(config, plan.device, gpu)) is not None:
            note = f"measured in {measured.path.parent}"
            speeds.append(("measured", measured.tokens_per_second, note, str(measured.path)))
        watts = gpu.board_watts if gpu is not None else None
        durations = []
        for basis, rate, note, source in speeds:
            hours = tokens / rate / 3600
            kwh = None if watts is None else watts * hours / 1000
            durations.append(Duration(basis, rate, hours, kwh, note, source))
        return cls(
            parameters=model.parameter_count,
            tokens=tokens,
            flops=tokens * model.flops_per_token(config.data.sequence_length),
            durations=tuple(durations),
            checkpoint_bytes=checkpoint_bytes(plan, model),
            checkpoints=most_checkpoints(config),
        )

    @property
    def chinchilla_ratio(self) -> float:
        """Tokens, as a share of 20 for each parameter."""
        return self.tokens / (TOKENS_PER_PARAMETER * self.parameters)

    @property
    def disk_bytes(self) -> int:
        """Of the checkpoints that are kept, and of one more that is being written beside them."""
        return (self.checkpoints + 1) * self.checkpoint_bytes

    def as_json(self) -> dict[str, Any]:
        """For `--json`; a duration that is not known is null."""
        durations = {duration.basis: duration.as_json() for duration in self.durations}
        return {
            "parameters": self.parameters,
            "tokens": self.tokens,
            "chinchilla_ratio": self.chinchilla_ratio,
            "flops": self.flops,
            "modelled": durations.get("modelled"),
            "measured": durations.get("measured"),
            "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints": self.checkpoints,
            "disk_bytes": self.disk_bytes,
        }


def checkpoint_bytes(plan: MemoryPlan, model: Architecture) -> int:
    """Of the tensors in one checkpoint: the flat buffers that it holds, without their padding.

    Beside them it has up to two megabytes of configuration, tokenizer and manifest.
    """
    held = (buffer for buffer in plan.buffers if buffer.name in STATE_BUFFERS)
    return sum(DTYPE_BYTES[buffer.dtype] for buffer in held) * model.parameter_count


def most_checkpoints(config: RunConfig) -> int:
    """How many checkpoints stand side by side when the run ends, which is when they are most."""
    keep, steps = config.checkpoint, config.steps
    saves = -(-steps // keep.every_steps)  # the last step's too
    newest = min(keep.keep_last, saves)
    # Of the steps before the newest that were saved, those at multiples of keep_every.
    before = (saves - newest) * keep.every_steps
    milestones = before // keep.keep_every if keep.keep_every else 0
    best = int(keep.keep_best and saves > newest + milestones)
    return newest + milestones + best
